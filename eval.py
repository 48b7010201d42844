# SPDX-License-Identifier: MIT
"""Measures a LLaRA model by dot-product retrieval on collections in BEIR layout.

    FOLDER/corpus.jsonl    {"_id", "title", "text"}   a title may be missing
    FOLDER/queries.jsonl   {"_id", "text"}
    FOLDER/qrels/test.tsv  query-id, corpus-id, score

Passages are embedded with the SELF prompt (" summarize the above passage .."), queries with the
NEXT prompt (" predict the following passage ..") or, if the model was only adapted or fine-tuned
so, with SELF too: see llara.py. Each query then gets the passages of the highest dot product, and
nDCG, MRR, recall and MAP say, as trec_eval does, how good they are. --pairs writes pairs to
fine-tune on, with hard negatives out of what was found.

    python eval.py                                    # ./out, on docstrings of Python's library
    python eval.py --model retriever --data data/scifact data/cranfield
    python eval.py --model out --data data/scifact --split train --pairs pairs.jsonl
    torchrun --nproc-per-node 8 eval.py --model retriever --data data/msmarco --split dev
"""

import argparse
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
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
    check_texts,
    docstrings,
    encode,
    make_prompts,
    pick_device,
    positive,
    process_group,
    query_prompt_of,
    read_model,
    say,
)

CHUNK = 1024  # passages that are encoded, and saved, together
BLOCK = 8  # chunks that are searched together
QUERIES_AT_ONCE = 1024  # with a block, 1024 * 8 * 1024 scores: 34 MB

# ---- read a collection ---------------------------------------------------------------------------


class Texts:
    """corpus.jsonl or queries.jsonl. Ids are held in memory, texts are read when they are needed.

    A text is known by its row, 0 .. n-1. BadInput names the line that is malformed, or whose id is
    no id, or that repeats one.
    """

    def __init__(self, path: Path):
        self.path = path
        self.lines = Rows([path])
        self.ids: list[str] = []
        self.row_of: dict[str, int] = {}  # of an id
        self.empty: list[str] = []  # ids of texts that are ""
        digest = hashlib.sha256()
        for row in range(len(self.lines)):
            name, text = self.read(row)
            self.row_of[name] = row
            self.ids.append(name)
            if not text:
                self.empty.append(name)
            digest.update(f"{name}\n{text}\n".encode())
        self.digest = digest.hexdigest()

    def read(self, row: int) -> tuple[str, str]:
        """-> the id of a row; its title and text, joined by a space."""
        with self.lines.row(row) as fields:
            name, title, text = fields["_id"], fields.get("title") or "", fields["text"]
            if isinstance(name, int):
                name = str(name)  # some collections number their texts
            check_texts(name, title, text)
            if name.split() != [name]:
                raise ValueError(f"the id {name!r} is empty or has white space")
            if self.row_of.get(name, row) != row:  # its own row, once all are known
                raise ValueError(f"the id {name!r} stands in an earlier line too")
        return name, f"{title} {text}".strip()

    def text(self, row: int) -> str:
        return self.read(row)[1]


Qrels = dict[str, dict[str, int]]  # query: {document: grade}


def read_qrels(path: Path) -> Qrels:
    """qrels/SPLIT.tsv: a header, then query id, document id, grade, with tabs between.

    BadInput names the line that is no judgement.
    """
    qrels: Qrels = {}
    header, *lines = path.read_bytes().splitlines() or [b""]
    if re.search(rb"\s-?\d+\s*$", header):  # a judgement, that would be lost as the header
        raise BadInput(f"{path}:1: should be a header: query-id, corpus-id, score, with tabs")
    for number, line in enumerate(lines, 2):
        if not line.strip():
            continue
        try:
            query, document, score = (field.strip() for field in line.decode().split("\t"))
            grade = int(score)
        except ValueError as error:
            should = "should be query id, document id, whole number, with tabs between"
            raise BadInput(f"{path}:{number}: {should}: {line[:60]!r} ({error})") from None
        if qrels.setdefault(query, {}).setdefault(document, grade) != grade:
            raise BadInput(f"{path}:{number}: {query} and {document} are judged twice, differently")
    if not qrels:
        raise BadInput(f"{path}: holds no judgement")
    return qrels


def write_aside(path: Path, content: str) -> None:
    """Writes a file so that nobody ever sees half of it."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(content, encoding="utf-8")
    os.replace(aside, path)


def write_python_collection(folder: Path) -> None:
    """A collection of the docstrings in Python's library, for want of a better one.

    A query is the first paragraph, without the object's own name; its one relevant document is the
    rest. A docstring is left out if it is short, or if its query, or a long line of its rest, is
    also in an earlier one: a query with two answers would have one of them counted as wrong.
    """
    seen: set[str] = set()  # the marks of all docstrings so far, left out or not
    corpus, queries, judgements = [], [], ["query-id\tcorpus-id\tscore"]
    for _, name, text in docstrings():
        summary, _, rest = text.partition("\n\n")
        # Without name and arguments, "open(file, mode) -> a stream" becomes "-> a stream".
        own_name = re.compile(rf"\b{name}\b(\(.*?\))?", flags=re.IGNORECASE | re.DOTALL)
        query = " ".join(own_name.sub(" ", summary).split())
        long_lines = {line for line in map(str.strip, rest.splitlines()) if len(line) > 30}
        marks = long_lines | {query.lower()}
        is_long_enough = len(query.split()) > 3 and len(rest.split()) > 15
        # Docstrings of modules, whose name is "", make no query.
        if name and is_long_enough and seen.isdisjoint(marks):
            number = len(corpus)
            corpus.append(json.dumps({"_id": f"d{number}", "text": " ".join(rest.split())}))
            queries.append(json.dumps({"_id": f"q{number}", "text": query}))
            judgements.append(f"q{number}\td{number}\t1")
        seen.update(marks)
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    write_aside(folder / "corpus.jsonl", "\n".join(corpus))
    write_aside(folder / "queries.jsonl", "\n".join(queries))
    write_aside(folder / "qrels" / "test.tsv", "\n".join(judgements))


# ---- encode --------------------------------------------------------------------------------------


class Encoder(NamedTuple):
    """A model with its tokenizer, and how to use it."""

    model: torch.nn.Module
    tokenizer: object
    digest: str  # of all that shapes the embedding of a passage
    query_prompt: str
    query_length: int
    passage_length: int
    batch_size: int

    def embed(self, texts: list[str], prompt: str, max_length: int) -> np.ndarray:
        """(n, d) float32, unit rows."""
        return encode(self.model, self.tokenizer, texts, prompt, max_length, self.batch_size)


def load_encoder(args) -> Encoder:
    """BadInput if --model is no LLaRA model, or if texts of these lengths are beyond it."""
    device, dtype = pick_device(args.dtype)
    model, tokenizer = read_model(transformers.AutoModel, args.model, dtype)
    query_prompt = args.query_prompt or query_prompt_of(args.model)
    settings = CHUNK, args.passage_length, args.batch_size, str(dtype), device.type
    try:
        digest = fingerprint(model, tokenizer, settings)
        model = model.to(device).eval()
        # A trial, before hours are spent: `encode` refuses lengths that the model cannot have.
        encode(model, tokenizer, ["a query"], query_prompt, args.query_length)
        encode(model, tokenizer, ["a passage"], "self", args.passage_length)
    except ValueError as error:
        raise BadInput(f"{args.model}: {error}") from None
    lengths = args.query_length, args.passage_length
    return Encoder(model, tokenizer, digest, query_prompt, *lengths, args.batch_size)


def fingerprint(model: torch.nn.Module, tokenizer, settings: Sequence) -> str:
    """Of all that shapes the embedding of a passage; the model is on the CPU."""
    config, prompts = model.config.to_json_string(), make_prompts(tokenizer)
    versions = torch.__version__, transformers.__version__
    digest = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(repr((config, prompts, versions, settings)).encode())
    # All of the weights and not a sample: models can differ in the special tokens' rows alone.
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def cut_into_chunks(lengths: np.ndarray) -> list[np.ndarray]:
    """Lengths of texts (n,), in bytes -> their positions 0 .. n-1 in chunks of CHUNK.

    The longest come first, so that little is padded. Chunks do not depend on the number of ranks,
    and batches are made within a chunk: so two ranks compute the same bits as eight, and can load
    what eight have saved.
    """
    longest_first = np.argsort(-lengths, kind="stable")  # (n,)
    return [longest_first[start : start + CHUNK] for start in range(0, len(lengths), CHUNK)]


def embed_chunk(encoder: Encoder, corpus: Texts, rows: np.ndarray, file: Path) -> np.ndarray:
    """The embeddings (n, d) of rows (n,) of the corpus: from `file`, or made and saved there.

    The file is there if an earlier run was killed, or had --keep-embeddings. The folder's name
    tells what shaped it, and a file has its name only when it is whole.
    """
    if file.exists():
        return np.load(file, allow_pickle=False)
    texts = [corpus.text(row) for row in rows]
    embeddings = encoder.embed(texts, "self", encoder.passage_length)
    if encoder.model.dtype != torch.float32:
        # Half the room, and finer than the bfloat16 that they were computed in.
        embeddings = embeddings.astype(np.float16)
    aside = file.with_name(f".{os.getpid()}-{file.name}")
    np.save(aside, embeddings)
    os.replace(aside, file)
    return embeddings


def corpus_blocks(
    encoder: Encoder, corpus: Texts, folder: Path
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Embeddings (n, d) and rows (n,) of this rank's chunks, BLOCK at a time: for `search`."""
    folder.mkdir(parents=True, exist_ok=True)
    chunks = list(enumerate(cut_into_chunks(corpus.lines.lengths)))
    mine = chunks[dist.get_rank() :: dist.get_world_size()]
    total = sum(len(rows) for _, rows in mine)
    with tqdm(total=total, unit="text", desc="corpus", disable=dist.get_rank() > 0) as bar:
        for start in range(0, len(mine), BLOCK):
            embeddings = []
            for number, rows in mine[start : start + BLOCK]:
                file = folder / f"{number:06d}.npy"
                embeddings.append(embed_chunk(encoder, corpus, rows, file))
                bar.update(len(rows))
            block_rows = [rows for _, rows in mine[start : start + BLOCK]]
            yield np.concatenate(embeddings), np.concatenate(block_rows)


# ---- search --------------------------------------------------------------------------------------


def search(
    queries: Tensor, blocks: Iterable[tuple[np.ndarray, np.ndarray]], k: int
) -> tuple[Tensor, Tensor]:
    """The k passages of the highest dot product for each query, exactly.

    queries (q, d) float32, on the device to use. blocks: embeddings (n, d) of some passages, and
    their rows in the corpus (n,) int64. An iterator will do: they are read once, in turn.
    -> scores (q, k), best first, and rows (q, k); -inf and -1 where there are fewer than k. Of
    passages that tie at the k-th place, any are taken.
    """
    scores = torch.full((len(queries), k), -torch.inf, device=queries.device)  # (q, k)
    rows = torch.full((len(queries), k), -1, device=queries.device)  # (q, k)
    for embeddings, block_rows in blocks:
        passages = torch.from_numpy(embeddings).to(queries.device).float()  # (n, d)
        block_rows = torch.from_numpy(block_rows).to(queries.device)  # (n,)
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            some = slice(start, start + QUERIES_AT_ONCE)  # b of the queries
            new, columns = (queries[some] @ passages.T).topk(min(k, len(passages)))  # (b, c)
            # The best k so far beside the best of this block; of both, the best k.
            scores[some], order = torch.cat([scores[some], new], dim=1).topk(k)  # (b, k)
            rows[some] = torch.cat([rows[some], block_rows[columns]], dim=1).gather(1, order)
    return scores, rows


def search_over_ranks(
    queries: Tensor, blocks: Iterable[tuple[np.ndarray, np.ndarray]], k: int
) -> tuple[Tensor, Tensor]:
    """`search`, each rank in blocks of its own; every rank gets the best of all, on the CPU."""
    scores, rows = (result.cpu() for result in search(queries, blocks, k))  # (q, k), (q, k)
    scores_of_ranks = [torch.empty_like(scores) for _ in range(dist.get_world_size())]
    rows_of_ranks = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(scores_of_ranks, scores)
    dist.all_gather(rows_of_ranks, rows)
    scores, order = torch.cat(scores_of_ranks, dim=1).topk(k)  # (q, k)
    return scores, torch.cat(rows_of_ranks, dim=1).gather(1, order)


# ---- metrics -------------------------------------------------------------------------------------


def rank_documents(scores: dict[str, float]) -> list[str]:
    """As trec_eval does: by the score as a float32, of equal scores the greater id first."""
    return sorted(scores, key=lambda name: (np.float32(scores[name]), name), reverse=True)


def discounted_gain(gains: list[int]) -> float:
    """DCG@10 with linear gain: the sum of gain / log2(rank + 1)."""
    return sum(gain / math.log2(rank + 1) for rank, gain in enumerate(gains[:10], 1))


def measure(grades: dict[str, int], scores: dict[str, float]) -> dict[str, float]:
    """trec_eval's numbers for one query, MRR as its recip_rank of the first ten.

    grades: {document: grade}, the judgements; above 0 is relevant. scores: {document: score}, what
    was found; with --top-k 100 that is 100 documents, and Recall@1000 then counts no others. If
    nothing is relevant, or nothing was found, all numbers are 0.
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
    # The relevant document number n_found is at `rank`: the precision there is n_found / rank.
    # Those that were not found add 0.
    precisions = [n_found / rank for n_found, rank in enumerate(ranks, 1) if rank <= 1000]
    values["MAP@1000"] = sum(precisions) / n_relevant
    return values


def mean(table: dict[str, dict[str, float]]) -> dict[str, float]:
    """{name: {metric: value}} -> {metric: mean over the names}."""
    first = next(iter(table.values()))
    return {metric: sum(row[metric] for row in table.values()) / len(table) for metric in first}


# ---- pairs to fine-tune on -----------------------------------------------------------------------

# query: {document: score}, best first; of queries that are judged and in queries.jsonl
Run = dict[str, dict[str, float]]


def mine_pairs(args, queries: Texts, corpus: Texts, qrels: Qrels, run: Run) -> list[dict]:
    """Rows {"query", "pos", "neg"}: the relevant documents, and hard negatives out of the run.

    A negative has one of the ranks FIRST to LAST of --ranks, both included, is not judged relevant,
    and its text is not that of a positive or of the query. The very first ranks are left out by
    default, as answers that nobody has judged are often among them. "neg" can be empty: fine-tuning
    then has in-batch negatives alone for this query.
    """
    first, last = args.ranks
    random = np.random.default_rng(args.seed)
    pairs = []
    for query, found in run.items():
        positives = [name for name, grade in qrels[query].items() if grade > 0]
        pos = [corpus.text(corpus.row_of[name]) for name in positives if name in corpus.row_of]
        pos = [text for text in pos if text]
        text = queries.text(queries.row_of[query])
        if not pos or not text:
            continue
        names = [name for name in list(found)[first - 1 : last] if name not in positives]
        neg: list[str] = []
        for i in random.permutation(len(names)):
            if len(neg) >= args.negatives:
                break
            negative = corpus.text(corpus.row_of[names[i]])
            if negative and negative not in [text, *pos, *neg]:
                neg.append(negative)
        pairs.append({"query": text, "pos": pos, "neg": neg})
    return pairs


# ---- main ----------------------------------------------------------------------------------------


def describe_oddities(queries: Texts, corpus: Texts, qrels: Qrels, skipped: bool) -> list[str]:
    """What a reader of the numbers should know about the collection."""
    documents = {name for grades in qrels.values() for name in grades}
    same_ids = qrels.keys() & queries.row_of.keys() & corpus.row_of.keys()
    # Numbered collections share ids by chance; where ids are names, a query may find itself.
    same_ids = set() if skipped else {name for name in same_ids if not name.isdigit()}
    oddities = [
        (qrels.keys() - queries.row_of.keys(), "judged queries are not in queries.jsonl: score 0"),
        (documents - corpus.row_of.keys(), "judged documents are not in corpus.jsonl"),
        (queries.empty + corpus.empty, "texts are empty: searched as they are"),
        (same_ids, "queries have the id of a document: --skip-identical-ids?"),
    ]
    return [f"{len(names)} {what}" for names, what in oddities if names]


def retrieve(
    args, encoder: Encoder, queries: Texts, corpus: Texts, qrels: Qrels, folder: Path
) -> Run:
    """The --top-k documents of each judged query. Embeddings of the corpus lie in `folder`."""
    judged = [row for row, name in enumerate(queries.ids) if name in qrels]  # q of them
    if not judged:
        raise BadInput(f"{queries.path}: holds no query that qrels/{args.split}.tsv judges")
    texts = [queries.text(row) for row in judged]
    vectors = encoder.embed(texts, encoder.query_prompt, encoder.query_length)  # (q, d)
    on_device = torch.from_numpy(vectors).to(encoder.model.device)  # (q, d), on every rank the same
    blocks = corpus_blocks(encoder, corpus, folder)  # encodes when `search` asks for the next
    # A query that finds itself loses that one, and should still have --top-k.
    k = args.top_k + 1 if args.skip_identical_ids else args.top_k
    scores, rows = search_over_ranks(on_device, blocks, k)  # (q, k), (q, k)
    run: Run = {}
    for i, query_row in enumerate(judged):
        query = queries.ids[query_row]
        hits = zip(rows[i].tolist(), scores[i].tolist(), strict=True)
        found = {corpus.ids[row]: score for row, score in hits if row >= 0}
        if args.skip_identical_ids:
            found.pop(query, None)
        # Sorted again: `search` leaves equal scores in any order, trec_eval does not.
        run[query] = {name: found[name] for name in rank_documents(found)[: args.top_k]}
    return run


def evaluate(args, encoder: Encoder, data: Path, output: Path) -> dict:
    """Searches and scores one collection. Rank 0 writes run.trec, metrics.json and the pairs."""
    qrels = read_qrels(data / "qrels" / f"{args.split}.tsv")
    queries = Texts(data / "queries.jsonl")
    corpus = Texts(data / "corpus.jsonl")
    notes = describe_oddities(queries, corpus, qrels, args.skip_identical_ids)
    for note in notes:
        say(f"{data}: {note}")
    name = hashlib.sha256(f"{encoder.digest}{corpus.digest}".encode()).hexdigest()[:32]
    output.mkdir(parents=True, exist_ok=True)
    folder = output / f"embeddings-{name}"
    run = retrieve(args, encoder, queries, corpus, qrels, folder)
    per_query = {name: measure(grades, run.get(name, {})) for name, grades in qrels.items()}
    result = {
        "documents": len(corpus.ids),
        "queries": len(qrels),
        "notes": notes,
        "mean": mean(per_query),
        "settings": vars(args) | {"query_prompt": encoder.query_prompt},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "per_query": per_query,
    }
    if dist.get_rank() > 0:
        return result
    lines = []
    for query, found in run.items():
        for rank, (name, score) in enumerate(found.items(), 1):
            lines.append(f"{query} Q0 {name} {rank} {score:.9g} llara\n")
    write_aside(output / "run.trec", "".join(lines))
    write_aside(output / "metrics.json", json.dumps(result, indent=1, default=str))
    if args.pairs:
        pairs = mine_pairs(args, queries, corpus, qrels, run)
        write_aside(args.pairs, "".join(json.dumps(pair) + "\n" for pair in pairs))
        negatives = sum(len(pair["neg"]) for pair in pairs) / max(1, len(pairs))
        say(f"{args.pairs}: {len(pairs)} rows with {negatives:.1f} negatives each")
    if not args.keep_embeddings:
        shutil.rmtree(folder)  # no rank still reads: `search_over_ranks` has heard from all
    return result


def print_table(results: dict[str, dict]) -> None:
    rows = {name: result["mean"] for name, result in results.items()}
    if len(rows) > 1:
        rows["average"] = mean(rows)
    metrics = next(iter(rows.values()))
    say(f"{'':24}" + "".join(f"{metric:>12}" for metric in metrics))
    for name, row in rows.items():
        say(f"{name:24}" + "".join(f"{value:12.4f}" for value in row.values()))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measures a LLaRA model by dot-product retrieval.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", default="out", help="folder or hub name; default: out")
    add("--data", nargs="+", type=Path, help="folders in BEIR layout; default: Python's docstrings")
    add("--split", default="test", help="which qrels; grades above 0 are relevant; default: test")
    add("--output", type=Path, help="results go to OUTPUT/FOLDER-SPLIT/; default: MODEL/eval")
    # What is embedded, and how.
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on CUDA")
    add("--query-prompt", choices=["next", "self"], help="default: as in the model's run.json")
    add("--query-length", type=positive, default=64, help="tokens, with the prompt; default: 64")
    add("--passage-length", type=positive, default=160, help="the same of passages; default: 160")
    add("--batch-size", type=positive, default=32, help="texts at a time; default: 32")
    add("--keep-embeddings", action="store_true", help="do not remove them at the end")
    # What is searched.
    add("--top-k", type=positive, default=1000, help="documents a query; default: 1000")
    own = "a query does not find the document of its own id (ArguAna, Quora)"
    add("--skip-identical-ids", action="store_true", help=own)
    # Pairs to fine-tune on.
    add("--pairs", type=Path, help="write rows of query, positives and mined negatives to it")
    add("--negatives", type=int, default=8, help="of each query; default: 8")
    ranks = "draw negatives from these ranks, FIRST and LAST included; default: 10 200"
    add("--ranks", type=int, nargs=2, default=[10, 200], metavar=("FIRST", "LAST"), help=ranks)
    add("--seed", type=int, default=0, help="of drawing negatives; default: 0")
    return parser.parse_args()


def check_arguments(args) -> None:
    """BadInput for what would be found only after hours, or would be silently wrong."""
    names = [data.resolve().name for data in args.data or ()]
    if len(set(names)) < len(names):
        raise BadInput("--data: two folders of one name: their results would overwrite each other")
    if args.pairs:
        first, last = args.ranks
        if not 1 <= first <= last <= args.top_k:
            raise BadInput(f"--ranks {first} {last}: should be within 1 and --top-k {args.top_k}")
        if len(names) != 1:
            raise BadInput("--pairs needs --data, one collection")
        if args.pairs.exists() or not args.pairs.parent.is_dir():
            raise BadInput(f"--pairs {args.pairs}: exists already, or is in no folder")


def main() -> None:
    args = parse_arguments()
    # Tokenizers may use threads. In llara.py they may not: it forks workers, where they would hang.
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    transformers.utils.logging.disable_progress_bar()
    # Without torchrun, a group of this one process. A BadInput ends it with its sentence alone.
    with process_group():
        check_arguments(args)
        folder = Path(args.model)  # for a hub name ORGANISATION/NAME: NAME/eval, in this folder
        output = args.output or Path(folder if folder.is_dir() else folder.name, "eval")
        encoder = load_encoder(args)
        collections = args.data or [output / "python"]
        if not args.data and dist.get_rank() == 0:
            write_python_collection(collections[0])
        dist.barrier()
        results = {}
        for data in collections:
            name = f"{data.resolve().name}-{args.split}"
            results[name] = evaluate(args, encoder, data, output / name)
        print_table(results)


if __name__ == "__main__":
    main()
