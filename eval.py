# SPDX-License-Identifier: MIT
"""Measures a LLaRA model by dot-product retrieval on collections in BEIR layout.

FOLDER/corpus.jsonl    {"_id", "title", "text"}       -> SELF prompt -> embeddings, by chunks -.
FOLDER/queries.jsonl   {"_id", "text"}                -> NEXT prompt -> embeddings -> top k  <-'
FOLDER/qrels/test.tsv  query-id, corpus-id, score     -> nDCG, MRR, recall, MAP of trec_eval

python eval.py                                        # ./out, on docstrings of Python's library
python eval.py --model retriever --data scifact cranfield
python eval.py --model out --query-prompt self --data scifact --split train --pairs pairs.jsonl
torchrun --nproc-per-node 8 eval.py --model BAAI/LLARA-passage --data msmarco --split dev
"""

import argparse
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from tqdm import tqdm

from llara import (
    BadInput,
    Rows,
    check_length,
    check_text,
    choose_dtype,
    docstrings,
    encode,
    make_prompts,
    pick_device,
    process_group,
    read_pretrained,
)

CHUNK = 1024  # passages that are encoded, and saved, together
# Chunks that are searched together, and queries: 8 * 1024 * 1024 scores, 34 MB. Blocks of 28 chunks
# were slower for the top 100 and no faster for the top 1,000.
BLOCK = 8
QUERIES_AT_ONCE = 1024

# ---- read a collection ---------------------------------------------------------------------------


class Texts:
    """corpus.jsonl or queries.jsonl. Ids are held in memory, texts are read when they are needed.

    BadInput names the line that is malformed, or whose id is no id, or that repeats one.
    """

    def __init__(self, path: Path):
        self.rows = Rows([path])
        self.ids: list[str] = []
        self.empty: list[str] = []  # "file:line" of texts that are empty
        self.row_of: dict[str, int] = {}
        digest = hashlib.sha256()
        for i in range(len(self.rows)):
            name, text = self.read(i)
            if name in self.row_of:
                first = self.rows.place(self.row_of[name])
                raise BadInput(f"{self.rows.place(i)}: the id {name!r} is also that of {first}")
            self.row_of[name] = i
            self.ids.append(name)
            if not text:
                self.empty.append(self.rows.place(i))
            digest.update(f"{name}\n{text}\n".encode())
        self.digest = digest.hexdigest()

    def read(self, i: int) -> tuple[str, str]:
        """-> the id of row i; its title and text, joined by a space."""
        row, place = self.rows[i], self.rows.place(i)
        if "_id" not in row or "text" not in row:
            raise BadInput(f'{place}: needs "_id" and "text"; its keys are {sorted(row)[:5]}')
        name = check_text(str(row["_id"]), '"_id"', place)
        if name.split() != [name]:
            raise BadInput(
                f"{place}: the id {name!r} is empty or has white space: no run can hold it"
            )
        title = check_text(row.get("title") or "", '"title"', place)
        text = check_text(row["text"], '"text"', place)
        return name, f"{title} {text}".strip()

    def text(self, i: int) -> str:
        return self.read(i)[1]


Qrels = dict[str, dict[str, int]]  # query: {document: grade}


def read_qrels(path: Path) -> Qrels:
    """qrels/SPLIT.tsv. BadInput names the line that is no judgement, and says what it is."""
    if not path.exists():
        splits = sorted(file.stem for file in path.parent.glob("*.tsv"))
        raise BadInput(f"{path}: does not exist; the splits there are {splits}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: is not UTF-8 ({error})") from None
    qrels: Qrels = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        query, document, score = split_judgement(line, place)
        is_number = re.fullmatch(r"-?\d{1,9}", score)
        if number == 1:
            if is_number:
                raise BadInput(
                    f"{place}: should be a header: query-id, corpus-id, score, with tabs"
                )
            continue
        if not is_number:
            raise BadInput(f"{place}: the score {score[:40]!r} is not a whole number")
        grades = qrels.setdefault(query, {})
        if grades.get(document, int(score)) != int(score):
            raise BadInput(f"{place}: {query} and {document} are judged twice, with other grades")
        grades[document] = int(score)
    if not qrels:
        raise BadInput(f"{path}: holds no judgement")
    return qrels


def split_judgement(line: str, place: str) -> tuple[str, str, str]:
    """The three fields of a line. BadInput says what the line is instead."""
    fields = [field.strip() for field in line.split("\t")]
    if len(fields) == 3 and all(field.split() == [field] for field in fields):
        return fields[0], fields[1], fields[2]
    if len(fields) == 3:
        raise BadInput(f"{place}: an id is empty or has a space: {line[:60]!r}")
    if len(line.split()) == 4:
        raise BadInput(
            f"{place}: four columns, as in a TREC file; write a header, and query id, document id, "
            "score, with tabs"
        )
    raise BadInput(f"{place}: {line[:60]!r} is not query id, document id, score, with tabs between")


def write_aside(path: Path, text: str) -> None:
    """Writes a file so that nobody ever sees half of it."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def write_python_collection(folder: Path) -> None:
    """A collection of the docstrings in Python's library, for want of a better one.

    A query is the first sentence, without the object's own name; its one relevant document is the
    rest. What is short, or repeats a line of another, is left out.
    """
    seen: set[str] = set()
    corpus, queries, judgements = [], [], ["query-id\tcorpus-id\tscore"]
    for _, name, text in docstrings():
        summary, _, rest = text.partition("\n\n")
        query = " ".join(re.sub(rf"\b{name}\b(\(.*?\))?", " ", summary, flags=re.I | re.S).split())
        lines = {query.lower()} | {line.strip() for line in rest.splitlines() if len(line) > 30}
        is_long_enough = len(query.split()) > 3 and len(rest.split()) > 15
        if name and is_long_enough and seen.isdisjoint(lines):
            number = len(corpus)
            corpus.append(json.dumps({"_id": f"d{number}", "text": " ".join(rest.split())}))
            queries.append(json.dumps({"_id": f"q{number}", "text": query}))
            judgements.append(f"q{number}\td{number}\t1")
        seen |= lines
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    write_aside(folder / "corpus.jsonl", "\n".join(corpus))
    write_aside(folder / "queries.jsonl", "\n".join(queries))
    write_aside(folder / "qrels" / "test.tsv", "\n".join(judgements))


# ---- encode --------------------------------------------------------------------------------------


class Encoder(NamedTuple):
    """A model, and all that decides what it makes of a text."""

    model: torch.nn.Module
    tokenizer: object
    digest: str  # of the weights, the configuration and the tokenizer
    batch_size: int

    def embed(self, texts: list[str], prompt: str, max_length: int) -> np.ndarray:
        """(n, d) unit rows."""
        return encode(self.model, self.tokenizer, texts, prompt, max_length, self.batch_size)


def load_encoder(args, device: torch.device) -> Encoder:
    """BadInput if --model is no LLaRA model."""
    dtype = choose_dtype(args.dtype, device)
    model, tokenizer = read_pretrained(transformers.AutoModel, args.model, dtype)
    for flag, length in (("query", args.query_length), ("passage", args.passage_length)):
        check_length(args.model, model.config, length, f"--{flag}-length")
    try:
        prompts = make_prompts(tokenizer)
    except ValueError as error:
        raise BadInput(f"{args.model}: {error}; adapt it with llara.py first") from None
    shortest = len(prompts.prefix) + 1 + max(len(prompts.SELF), len(prompts.NEXT))
    if min(args.query_length, args.passage_length) < shortest:
        raise BadInput(f"--query-length and --passage-length: {shortest} tokens at least")
    largest = max(prompts.SELF + prompts.NEXT)
    if largest >= model.get_input_embeddings().num_embeddings:
        raise BadInput(f"{args.model}: has no embeddings of the prompts' tokens: not a LLaRA model")
    digest = hashlib.sha256(model.config.to_json_string().encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    # All of the weights: two models can differ in the special tokens' rows alone.
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.contiguous().flatten().view(torch.uint8).numpy().data)
    return Encoder(model.to(device).eval(), tokenizer, digest.hexdigest(), args.batch_size)


def cut_into_chunks(texts: Texts, rows: np.ndarray) -> list[np.ndarray]:
    """rows (n,) -> chunks of them, longest texts first, so that little is padded.

    Chunks are the same for any number of ranks, and so are their embeddings, to the last bit.
    """
    order = np.argsort(-texts.rows.lengths[rows], kind="stable")  # (n,)
    longest_first = rows[order]
    return [longest_first[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]


def chunk_file(encoder: Encoder, texts: Texts, chunk: np.ndarray, max_length: int, folder: Path):
    """Where the embeddings of a chunk lie: the name tells all that shapes them."""
    shaped_by = (
        encoder.digest,
        texts.digest,
        chunk.tolist(),
        max_length,
        encoder.batch_size,
        str(encoder.model.dtype),
        encoder.model.device.type,
        make_prompts(encoder.tokenizer),
        torch.__version__,
        transformers.__version__,
    )
    name = hashlib.sha256(repr(shaped_by).encode()).hexdigest()[:32]
    return folder / f"embeddings-{name}.npy"


def embed_chunk(
    encoder: Encoder, texts: Texts, chunk: np.ndarray, max_length: int, path: Path
) -> np.ndarray:
    """(c, d): from `path` if an earlier, killed run left it there whole, else made and saved.

    A file is only ever a saving of time. Another run may remove it or write it again at any moment:
    it is written aside and renamed, and one that is missing or damaged is made anew.
    """
    shape = (len(chunk), encoder.model.config.hidden_size)
    try:
        embeddings = np.load(path, allow_pickle=False)
        if embeddings.shape == shape and np.isfinite(embeddings).all():
            return embeddings
    except (OSError, ValueError, EOFError):
        pass  # not there, or damaged
    embeddings = encoder.embed([texts.text(i) for i in chunk], "self", max_length)
    if encoder.model.dtype != torch.float32:
        embeddings = embeddings.astype(np.float16)  # unit rows: within its range
    aside = path.with_name(f".{path.name}.{os.getpid()}.{dist.get_rank()}")
    with open(aside, "wb") as file:
        np.save(file, embeddings)
    os.replace(aside, path)
    return embeddings


def embed_queries(encoder: Encoder, texts: Texts, rows: np.ndarray, prompt: str, max_length: int):
    """(q, d) float32, on every rank: each embeds some chunks, and gets the others' by a sum."""
    rank, world = dist.get_rank(), dist.get_world_size()
    vectors = torch.zeros(len(rows), encoder.model.config.hidden_size)  # (q, d)
    place = {int(row): i for i, row in enumerate(rows)}
    for chunk in cut_into_chunks(texts, rows)[rank::world]:
        places = [place[int(row)] for row in chunk]
        chunk_vectors = encoder.embed([texts.text(i) for i in chunk], prompt, max_length)
        vectors[places] = torch.from_numpy(chunk_vectors)
    dist.all_reduce(vectors)
    return vectors


# ---- search --------------------------------------------------------------------------------------


def search(
    queries: Tensor, blocks: Iterable[tuple[np.ndarray, np.ndarray]], k: int
) -> tuple[Tensor, Tensor]:
    """The k passages of the highest dot product for each query, exactly.

    queries (q, d) float32, on the device to use; blocks: (embeddings (n, d), names (n,) int64),
    read once. -> scores (q, k), best first, and names (q, k); -inf and -1 where there are fewer.
    ValueError if a block has 2^15 passages or more.
    """
    device = queries.device
    best_scores = torch.full((len(queries), k), -torch.inf, device=device)  # (q, k)
    best_names = torch.full((len(queries), k), -1, device=device)  # (q, k)
    for embeddings, names in blocks:
        if len(names) >= 2**15:
            raise ValueError(f"a block of {len(names)} passages: its counts would not fit int16")
        passages = torch.from_numpy(embeddings).to(device).float()  # (n, d)
        block_names = torch.from_numpy(names).to(device)  # (n,)
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            some = slice(start, start + QUERIES_AT_ONCE)
            scores = queries[some] @ passages.T  # (b, n)
            # Only what beats a query's k-th best so far (-inf at first) can enter its list. No
            # query has more than n_candidates of these, so its top n_candidates hold them all.
            # After a few blocks they are few, and much cheaper to find than the top k.
            kth_best = best_scores[some, -1:]  # (b, 1)
            # Truth values are summed in int64 by default, which takes four times as long.
            counts = (scores > kth_best).sum(dim=1, dtype=torch.int16)  # (b,)
            n_candidates = int(counts.max())
            if n_candidates == 0:
                continue
            new_scores, columns = scores.topk(min(n_candidates, k))  # (b, c)
            all_scores = torch.cat([best_scores[some], new_scores], dim=1)  # (b, k + c)
            all_names = torch.cat([best_names[some], block_names[columns]], dim=1)  # (b, k + c)
            best_scores[some], order = all_scores.topk(k)  # (b, k)
            best_names[some] = all_names.gather(1, order)
    return best_scores, best_names


def search_over_ranks(
    queries: Tensor, blocks: Iterable[tuple[np.ndarray, np.ndarray]], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """`search`, each rank in blocks of its own; every rank gets the best of all."""
    scores, names = (result.cpu() for result in search(queries, blocks, k))  # (q, k)
    world = dist.get_world_size()
    scores_of_ranks = [torch.empty_like(scores) for _ in range(world)]
    names_of_ranks = [torch.empty_like(names) for _ in range(world)]
    dist.all_gather(scores_of_ranks, scores)
    dist.all_gather(names_of_ranks, names)
    best_scores, order = torch.cat(scores_of_ranks, dim=1).topk(k)  # (q, k)
    best_names = torch.cat(names_of_ranks, dim=1).gather(1, order)  # (q, k)
    return best_scores.numpy(), best_names.numpy()


def corpus_blocks(
    encoder: Encoder, corpus: Texts, max_length: int, folder: Path, files: list[Path]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The embeddings of this rank's chunks, BLOCK chunks at a time, with the rows they are of.

    `files` gets the names of the files that were used.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = cut_into_chunks(corpus, np.arange(len(corpus.ids)))[rank::world]
    with tqdm(total=sum(map(len, mine)), unit="text", desc="corpus", disable=rank > 0) as bar:
        for start in range(0, len(mine), BLOCK):
            chunks = mine[start : start + BLOCK]
            embeddings = []
            for chunk in chunks:
                path = chunk_file(encoder, corpus, chunk, max_length, folder)
                files.append(path)
                embeddings.append(embed_chunk(encoder, corpus, chunk, max_length, path))
                bar.update(len(chunk))
            yield np.concatenate(embeddings), np.concatenate(chunks)


# ---- metrics -------------------------------------------------------------------------------------


def rank_documents(scores: dict[str, float]) -> list[str]:
    """As trec_eval does: by the score as a float32, of equal scores the greater id first."""
    return sorted(scores, key=lambda name: (np.float32(scores[name]), name), reverse=True)


def discounted_gain(gains: list[int]) -> float:
    """DCG@10 with linear gain: the sum of gain / log2(rank + 1)."""
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains[:10], 1))


def measure(grades: dict[str, int], scores: dict[str, float]) -> dict[str, float]:
    """trec_eval's numbers for one query. A grade above 0 is relevant; without results all are 0.

    grades: {document: grade}, the judgements. scores: {document: score}, what was found.
    """
    gains = [max(0, grades.get(name, 0)) for name in rank_documents(scores)]
    ideal_gains = sorted((grade for grade in grades.values() if grade > 0), reverse=True)
    ranks = [rank for rank, gain in enumerate(gains, 1) if gain > 0]  # of relevant documents
    n_relevant = max(1, len(ideal_gains))  # if there are none, all that follows is 0 anyway
    ideal = discounted_gain(ideal_gains)
    values = {
        "nDCG@10": discounted_gain(gains) / ideal if ideal > 0 else 0.0,
        "MRR@10": 1 / ranks[0] if ranks and ranks[0] <= 10 else 0.0,
    }
    for depth in (10, 100, 1000):
        values[f"Recall@{depth}"] = sum(rank <= depth for rank in ranks) / n_relevant
    # The precision at the rank of each relevant document; those not found add 0.
    precisions = [found / rank for found, rank in enumerate(ranks, 1) if rank <= 1000]
    values["MAP@1000"] = sum(precisions) / n_relevant
    return values


def mean(table: dict[str, dict[str, float]]) -> dict[str, float]:
    """{name: {metric: value}} -> {metric: mean over the names}."""
    first = next(iter(table.values()))
    return {metric: sum(row[metric] for row in table.values()) / len(table) for metric in first}


# ---- pairs to fine-tune on -----------------------------------------------------------------------

Run = dict[str, dict[str, float]]  # query: {document: score}, best first


def mine_pairs(args, queries: Texts, corpus: Texts, qrels: Qrels, run: Run) -> list[dict]:
    """Rows {"query", "pos", "neg"}: the relevant documents, and hard negatives out of the run.

    A negative stands at one of the ranks --ranks, is not judged relevant, and its text is not that
    of a positive. The very first ranks are left out, as unjudged answers are often among them.
    """
    first, last = args.ranks
    rows = []
    for number, (query, found) in enumerate(run.items()):
        positives = [name for name, grade in qrels[query].items() if grade > 0]
        pos = [corpus.text(corpus.row_of[name]) for name in positives if name in corpus.row_of]
        pos = [text for text in pos if text]
        if not pos:
            continue
        candidates = [name for name in list(found)[first - 1 : last] if name not in positives]
        random = np.random.default_rng([args.seed, number])
        neg: list[str] = []
        for i in random.permutation(len(candidates)):
            text = corpus.text(corpus.row_of[candidates[i]])
            if len(neg) < args.negatives and text and text not in pos and text not in neg:
                neg.append(text)
        rows.append({"query": queries.text(queries.row_of[query]), "pos": pos, "neg": neg})
    return rows


# ---- main ----------------------------------------------------------------------------------------


def find_oddities(args, folder: Path, queries: Texts, corpus: Texts, qrels: Qrels) -> list[str]:
    """What a reader of the numbers should know about the collection."""
    documents = {name for grades in qrels.values() for name in grades}
    oddities = {
        "judged queries are not in queries.jsonl: they score 0": qrels.keys()
        - queries.row_of.keys(),
        "judged documents are not in corpus.jsonl: never found": documents - corpus.row_of.keys(),
        "texts are empty: searched as they are": set(queries.empty + corpus.empty),
    }
    if not args.skip_identical_ids:
        what = "queries have the id of a document, and may find themselves: --skip-identical-ids?"
        oddities[what] = qrels.keys() & queries.row_of.keys() & corpus.row_of.keys()
    notes = []
    for what, names in oddities.items():
        if names:
            notes.append(f"{folder}: {len(names)} {what} ({', '.join(sorted(names)[:3])} ..)")
    return notes


def retrieve(
    args, encoder: Encoder, queries: Texts, corpus: Texts, qrels: Qrels, folder: Path
) -> Run:
    """The --top-k documents of each judged query."""
    asked = np.array([i for i, name in enumerate(queries.ids) if name in qrels], np.int64)  # (q,)
    if len(asked) == 0:
        raise BadInput(
            f"{queries.rows.paths[0]}: holds none of the queries that are judged in "
            f"qrels/{args.split}.tsv: are they of another collection?"
        )
    vectors = embed_queries(encoder, queries, asked, args.query_prompt, args.query_length)
    files: list[Path] = []
    blocks = corpus_blocks(encoder, corpus, args.passage_length, folder, files)
    # One more, as a query's own document is dropped before the cut to k, and not after.
    k = args.top_k + args.skip_identical_ids
    scores, rows = search_over_ranks(vectors.to(encoder.model.device), blocks, k)
    run: Run = {}
    for i, query_scores, query_rows in zip(asked, scores, rows, strict=True):
        query = queries.ids[i]
        found = {}
        for score, row in zip(query_scores.tolist(), query_rows.tolist(), strict=True):
            if row >= 0 and not (args.skip_identical_ids and corpus.ids[row] == query):
                found[corpus.ids[row]] = score
        run[query] = {name: found[name] for name in rank_documents(found)[: args.top_k]}
    if not args.keep_embeddings:
        for path in files:
            path.unlink(missing_ok=True)
    return run


def evaluate(args, encoder: Encoder, data: Path, folder: Path) -> dict:
    """Searches and scores one collection. Rank 0 writes run.trec, metrics.json and the pairs."""
    qrels = read_qrels(data / "qrels" / f"{args.split}.tsv")
    queries = Texts(data / "queries.jsonl")
    corpus = Texts(data / "corpus.jsonl")
    notes = find_oddities(args, data, queries, corpus, qrels)
    folder.mkdir(parents=True, exist_ok=True)
    if dist.get_rank() == 0:
        for note in notes:
            print(note, flush=True)
    run = retrieve(args, encoder, queries, corpus, qrels, folder)
    per_query = {name: measure(grades, run.get(name, {})) for name, grades in qrels.items()}
    result = {
        "documents": len(corpus.ids),
        "queries": len(qrels),
        "notes": notes,
        "mean": mean(per_query),
        "settings": vars(args),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "per_query": per_query,
    }
    if dist.get_rank() > 0:
        return result
    lines = []
    for query, found in run.items():
        for rank, (name, score) in enumerate(found.items(), 1):
            lines.append(f"{query} Q0 {name} {rank} {score:.9g} llara\n")
    write_aside(folder / "run.trec", "".join(lines))
    write_aside(folder / "metrics.json", json.dumps(result, indent=1, default=str))
    if args.pairs:
        rows = mine_pairs(args, queries, corpus, qrels, run)
        write_aside(args.pairs, "".join(json.dumps(row) + "\n" for row in rows))
        negatives = sum(len(row["neg"]) for row in rows) / max(1, len(rows))
        print(f"{args.pairs}: {len(rows)} rows with {negatives:.1f} negatives each")
    return result


def print_table(results: dict[str, dict]) -> None:
    average = mean({name: result["mean"] for name, result in results.items()})
    print(f"{'':24}" + "".join(f"{name:>12}" for name in ("documents", "queries", *average)))
    for name, result in results.items():
        values = "".join(f"{value:12.4f}" for value in result["mean"].values())
        print(f"{name:24}{result['documents']:12}{result['queries']:12}{values}")
    if len(results) > 1:
        print(f"{'average':48}" + "".join(f"{value:12.4f}" for value in average.values()))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measures a LLaRA model by dot-product retrieval.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", default="out", help="folder or hub name; default: out")
    add("--data", nargs="+", type=Path, help="folders in BEIR layout; default: Python's docstrings")
    add("--split", default="test", help="which qrels; default: test")
    add("--output", type=Path, help="a folder; default: MODEL/eval. Results: OUTPUT/NAME-SPLIT/")
    # What is embedded, and how.
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="CUDA: bfloat16, CPU: float32")
    add("--query-prompt", choices=["next", "self"], default="next", help="not fine-tuned: self")
    add("--query-length", type=int, default=64, help="tokens, with the prompt; default: 64")
    add("--passage-length", type=int, default=160, help="tokens, with the prompt; default: 160")
    add("--batch-size", type=int, default=32, help="texts at a time; default: 32")
    add("--keep-embeddings", action="store_true", help="do not remove them at the end")
    # What is searched.
    add("--top-k", type=int, default=1000, help="documents a query; default: 1000")
    add("--skip-identical-ids", action="store_true", help="for ArguAna and Quora")
    # Pairs to fine-tune on.
    add(
        "--pairs", type=Path, help="write rows of query, positives and mined negatives to this file"
    )
    add("--negatives", type=int, default=8, help="of each query; default: 8")
    add("--ranks", type=int, nargs=2, default=[10, 200], help="draw from these; default: 10 200")
    add("--seed", type=int, default=0, help="of drawing negatives; default: 0")
    return parser.parse_args()


def check_arguments(args) -> None:
    first, last = args.ranks
    if not 1 <= first <= last:
        raise BadInput(f"--ranks {first} {last}: two ranks, the first at least 1")
    for flag in ("top_k", "batch_size", "query_length", "passage_length"):
        if getattr(args, flag) < 1:
            raise BadInput(f"--{flag.replace('_', '-')} {getattr(args, flag)}: 1 at least")
    names = [data.resolve().name for data in args.data or ()]
    if len(set(names)) < len(names):
        raise BadInput("--data: two folders of one name: their results would overwrite each other")
    if args.pairs and len(names) != 1:
        raise BadInput("--pairs needs --data, one collection")
    if args.pairs and args.pairs.exists():
        raise BadInput(f"--pairs {args.pairs}: exists, and is not overwritten")


def main() -> None:
    args = parse_arguments()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # nothing is forked here
    transformers.utils.logging.disable_progress_bar()
    with process_group():
        check_arguments(args)
        model_folder = Path(args.model)
        output = args.output or Path(
            model_folder if model_folder.is_dir() else model_folder.name, "eval"
        )
        encoder = load_encoder(args, pick_device())
        collections = args.data or [output / "python"]
        if not args.data and dist.get_rank() == 0:
            write_python_collection(collections[0])
        dist.barrier()
        results = {}
        for data in collections:
            name = f"{data.resolve().name}-{args.split}"
            results[name] = evaluate(args, encoder, data, output / name)
        if dist.get_rank() == 0:
            print_table(results)


if __name__ == "__main__":
    main()
