# SPDX-License-Identifier: MIT
"""Measures a LLaRA model by dot-product retrieval on collections in BEIR layout.

    FOLDER/corpus.jsonl    {"_id", "title", "text"}   a title may be missing
    FOLDER/queries.jsonl   {"_id", "text"}
    FOLDER/qrels/test.tsv  query-id, corpus-id, score

Passages are embedded with the SELF prompt (" summarize the above passage .."), queries with the
NEXT prompt (" predict the following passage .."): see llara.py. With a model that was adapted, but
not fine-tuned yet, queries do better with SELF too: --query-prompt self. Each query then gets the
passages of the highest dot product, and nDCG, MRR, recall and MAP say, as trec_eval does, how good
they are. --pairs writes pairs to fine-tune on, with hard negatives out of what was found.

    python eval.py                                    # ./out, on docstrings of Python's library
    python eval.py --model retriever --data data/scifact data/cranfield
    python eval.py --model out --query-prompt self --data data/scifact --split train --pairs p.jsonl
    torchrun --nproc-per-node 8 eval.py --model retriever --data data/msmarco --split dev
"""

import argparse
import hashlib
import io
import json
import math
import os
import re
import uuid
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
    check_vocabulary,
    choose_dtype,
    docstrings,
    encode,
    is_only_adapted,
    make_prompts,
    pick_device,
    process_group,
    read_pretrained,
)

CHUNK = 1024  # passages that are encoded, and saved, together
BLOCK = 8  # chunks that are searched together
QUERIES_AT_ONCE = 1024  # with a block, 1024 * 8 * 1024 scores: 34 MB

# ---- read a collection ---------------------------------------------------------------------------


def is_one_word(name: str) -> bool:
    """Not empty, and without white space."""
    return name.split() == [name]


def is_whole_number(text: str) -> bool:
    return re.fullmatch(r"-?\d{1,9}", text) is not None


class Texts:
    """corpus.jsonl or queries.jsonl. Ids are held in memory, texts are read when they are needed.

    A text is known by its row, 0 .. n-1. BadInput names the line that is malformed, or whose id is
    no id, or that repeats one.
    """

    def __init__(self, path: Path):
        self.path = path
        # lines[row] is a dict, lines.place(row) its "file:line", lines.lengths (n,) are in bytes.
        self.lines = Rows([path])
        self.ids: list[str] = []
        self.row_of: dict[str, int] = {}  # of an id
        self.empty: list[str] = []  # "file:line" of texts that are empty
        digest = hashlib.sha256()
        for row in range(len(self.lines)):
            name, text = self.read(row)
            place = self.lines.place(row)
            if name in self.row_of:
                first = self.lines.place(self.row_of[name])
                raise BadInput(f"{place}: the id {name!r} is also that of {first}")
            self.row_of[name] = row
            self.ids.append(name)
            if not text:
                self.empty.append(place)
            digest.update(f"{name}\n{text}\n".encode())
        self.digest = digest.hexdigest()

    def read(self, row: int) -> tuple[str, str]:
        """-> the id of a row; its title and text, joined by a space."""
        fields, place = self.lines[row], self.lines.place(row)
        if "_id" not in fields or "text" not in fields:
            raise BadInput(f'{place}: needs "_id" and "text"; its keys are {sorted(fields)[:5]}')
        name = fields["_id"]
        if isinstance(name, int) and not isinstance(name, bool):
            name = str(name)  # some collections number their texts
        name = check_text(name, '"_id"', place)
        if not is_one_word(name):
            raise BadInput(
                f"{place}: the id {name!r} is empty or has white space: no TREC run file holds such"
            )
        title = check_text(fields.get("title") or "", '"title"', place)
        text = check_text(fields["text"], '"text"', place)
        return name, f"{title} {text}".strip()

    def text(self, row: int) -> str:
        return self.read(row)[1]


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
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    for i, (number, line) in enumerate(numbered):
        place = f"{path}:{number}"
        is_header = i == 0
        if is_header and is_whole_number(line.split()[-1]):
            raise BadInput(f"{place}: should be a header: query-id, corpus-id, score, with tabs")
        if is_header:
            continue
        query, document, score = split_judgement(line, place)
        if not is_whole_number(score):
            raise BadInput(f"{place}: the score {score[:40]!r} is not a whole number")
        grade = int(score)
        grades = qrels.setdefault(query, {})
        if document in grades and grades[document] != grade:
            raise BadInput(f"{place}: {query} and {document} are judged twice, with other grades")
        grades[document] = grade
    if not qrels:
        raise BadInput(f"{path}: holds no judgement")
    return qrels


def split_judgement(line: str, place: str) -> tuple[str, str, str]:
    """The three fields of a line. BadInput says what the line is instead."""
    fields = [field.strip() for field in line.split("\t")]
    if len(fields) == 3 and all(is_one_word(field) for field in fields):
        return fields[0], fields[1], fields[2]
    if len(fields) == 3:
        raise BadInput(f"{place}: an id is empty or has a space: {line[:60]!r}")
    if len(line.split()) == 4:
        raise BadInput(
            f"{place}: four columns, as in a TREC file; write a header, and query id, document id, "
            "score, with tabs"
        )
    raise BadInput(f"{place}: {line[:60]!r} is not query id, document id, score, with tabs between")


def write_aside(path: Path, content: bytes) -> None:
    """Writes a file so that nobody ever sees half of it, whoever else writes it at this moment."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    aside.write_bytes(content)
    os.replace(aside, path)


def write_python_collection(folder: Path) -> None:
    """A collection of the docstrings in Python's library, for want of a better one.

    A query is the first paragraph, without the object's own name; its one relevant document is the
    rest. A docstring is left out if it is short, or if its query, or a long line of its rest, is
    also in an earlier one: a query with two answers would have one of them counted as wrong.
    """
    seen: set[str] = set()  # queries and long lines of all docstrings so far, left out or not
    corpus, queries, judgements = [], [], ["query-id\tcorpus-id\tscore"]
    for _, name, text in docstrings():
        summary, _, rest = text.partition("\n\n")
        # Without name and arguments, "open(file, mode) -> a stream" becomes "-> a stream".
        own_name = re.compile(rf"\b{name}\b(\(.*?\))?", flags=re.IGNORECASE | re.DOTALL)
        query = " ".join(own_name.sub(" ", summary).split())
        long_lines = {line for line in map(str.strip, rest.splitlines()) if len(line) > 30}
        lines = long_lines | {query.lower()}
        is_long_enough = len(query.split()) > 3 and len(rest.split()) > 15
        # Docstrings of modules, whose name is "", make no query.
        if name and is_long_enough and seen.isdisjoint(lines):
            number = len(corpus)
            corpus.append(json.dumps({"_id": f"d{number}", "text": " ".join(rest.split())}))
            queries.append(json.dumps({"_id": f"q{number}", "text": query}))
            judgements.append(f"q{number}\td{number}\t1")
        seen.update(lines)
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    write_aside(folder / "corpus.jsonl", "\n".join(corpus).encode())
    write_aside(folder / "queries.jsonl", "\n".join(queries).encode())
    write_aside(folder / "qrels" / "test.tsv", "\n".join(judgements).encode())


# ---- encode --------------------------------------------------------------------------------------


class Encoder(NamedTuple):
    """A model with its tokenizer. The digest tells it from any other: see `chunk_file`."""

    model: torch.nn.Module
    tokenizer: object
    digest: str  # of the weights, the configuration and the tokenizer
    batch_size: int

    def embed(self, texts: list[str], prompt: str, max_length: int) -> np.ndarray:
        """(n, d) float32, unit rows."""
        return encode(self.model, self.tokenizer, texts, prompt, max_length, self.batch_size)


def load_encoder(args, device: torch.device) -> Encoder:
    """BadInput if --model is no LLaRA model, or if texts of these lengths are beyond it."""
    dtype = choose_dtype(args.dtype, device)
    model, tokenizer = read_pretrained(transformers.AutoModel, args.model, dtype)
    for flag, length in (("query", args.query_length), ("passage", args.passage_length)):
        check_length(args.model, model.config, length, f"--{flag}-length")
    # Without the special tokens in the tokenizer, it is no LLaRA model.
    try:
        prompts = make_prompts(tokenizer)  # token ids: a text is prefix + text + SELF or NEXT
    except ValueError as error:
        raise BadInput(f"{args.model}: {error}; adapt it with llara.py first") from None
    n_prompt_tokens = len(prompts.prefix) + max(len(prompts.SELF), len(prompts.NEXT))
    if min(args.query_length, args.passage_length) <= n_prompt_tokens:
        raise BadInput(
            f"--query-length and --passage-length: the prompts take {n_prompt_tokens} tokens, so "
            "more than that"
        )
    check_vocabulary(args.model, model, tokenizer)
    digest = hashlib.sha256(model.config.to_json_string().encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    # All of the weights and not a sample: models can differ in the special tokens' rows alone.
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.contiguous().flatten().view(torch.uint8).numpy().data)
    return Encoder(model.to(device).eval(), tokenizer, digest.hexdigest(), args.batch_size)


def cut_into_chunks(lengths: np.ndarray) -> list[np.ndarray]:
    """Lengths of texts (n,), in bytes -> their positions 0 .. n-1 in chunks of CHUNK.

    The longest come first, so that little is padded. Chunks do not depend on the number of ranks,
    and batches are made within a chunk: so two ranks compute the same bits as eight, and can load
    what eight have saved (see `embed_rows`).
    """
    longest_first = np.argsort(-lengths, kind="stable")  # (n,)
    return [longest_first[start : start + CHUNK] for start in range(0, len(lengths), CHUNK)]


def chunk_file(encoder: Encoder, corpus: Texts, rows: np.ndarray, max_length: int, folder: Path):
    """Where the embeddings of these rows of the corpus lie: the name tells all that shapes them."""
    shaped_by = (
        encoder.digest,
        corpus.digest,
        rows.tolist(),
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


def embed_rows(
    encoder: Encoder, corpus: Texts, rows: np.ndarray, max_length: int, file: Path
) -> np.ndarray:
    """The embeddings of rows (n,) of the corpus: (n, d), read from `file`, or made and saved there.

    The file is there if an earlier run was killed, or had --keep-embeddings. It saves time and is
    not relied on: another run may remove it or write it again at any moment, and if it is missing
    or damaged, it is made anew.
    """
    try:
        embeddings = np.load(file, allow_pickle=False)
        is_whole = embeddings.shape == (len(rows), encoder.model.config.hidden_size)
        if is_whole and np.isfinite(embeddings).all():
            return embeddings
    except (OSError, ValueError, EOFError):
        pass  # not there, or damaged
    embeddings = encoder.embed([corpus.text(row) for row in rows], "self", max_length)
    if encoder.model.dtype != torch.float32:
        # Half the room; no coarser than bfloat16, and values from -1 to 1 are within its range.
        embeddings = embeddings.astype(np.float16)
    content = io.BytesIO()
    np.save(content, embeddings)
    write_aside(file, content.getvalue())
    return embeddings


def embed_queries(
    encoder: Encoder, queries: Texts, rows: np.ndarray, prompt: str, max_length: int
) -> Tensor:
    """The embeddings of rows (q,) of the queries: (q, d) float32, all of them on every rank."""
    rank, world = dist.get_rank(), dist.get_world_size()
    vectors = torch.zeros(len(rows), encoder.model.config.hidden_size)  # (q, d), on the CPU
    # Positions are in `rows`, and so in `vectors`.
    for positions in cut_into_chunks(queries.lines.lengths[rows])[rank::world]:
        texts = [queries.text(row) for row in rows[positions]]
        vectors[positions] = torch.from_numpy(encoder.embed(texts, prompt, max_length))
    dist.all_reduce(vectors)  # a sum, by gloo: what other ranks have embedded is 0 here
    return vectors


# ---- search --------------------------------------------------------------------------------------


def search(
    queries: Tensor, blocks: Iterable[tuple[np.ndarray, np.ndarray]], k: int
) -> tuple[Tensor, Tensor]:
    """The k passages of the highest dot product for each query, exactly.

    queries (q, d) float32, on the device to use. blocks: embeddings (n, d) of some passages, and
    their rows in the corpus (n,) int64. An iterator will do: they are read once, in turn.
    -> scores (q, k), best first, and rows (q, k); -inf and -1 where there are fewer than k. Of
    passages that tie at the k-th place, any are taken.
    ValueError if a block has 2^15 passages or more: `candidates` counts in int16.
    """
    device = queries.device
    best_scores = torch.full((len(queries), k), -torch.inf, device=device)  # (q, k)
    best_rows = torch.full((len(queries), k), -1, device=device)  # (q, k)
    for embeddings, block_rows in blocks:
        passages = torch.from_numpy(embeddings).to(device).float()  # (n, d)
        rows = torch.from_numpy(block_rows).to(device)  # (n,)
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            some = slice(start, start + QUERIES_AT_ONCE)  # b of the queries
            scores = queries[some] @ passages.T  # (b, n)
            kth_best = best_scores[some, -1:]  # (b, 1)
            new_scores, columns = candidates(scores, kth_best, k)  # (b, c) each
            best_scores[some], best_rows[some] = merge(
                [best_scores[some], new_scores], [best_rows[some], rows[columns]], k
            )
    return best_scores, best_rows


def candidates(scores: Tensor, kth_best: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of scores (b, n), those that might enter the list of their query, and their columns: (b, c).

    kth_best (b, 1): the worst score in the list of each query; -inf while it is not full. Every
    score that beats it might enter, but no more than k of them. How many beat it differs by query:
    c is the largest of these numbers, or k if that is less. Each query gets its c highest scores:
    all of its own that can enter, and perhaps some that cannot, which `merge` drops. After a few
    blocks c is small, and this much cheaper than the top k.
    """
    n = scores.shape[1]
    if n >= 2**15:
        raise ValueError(f"a block of {n} passages: its counts would not fit int16")
    # By default, truth values are summed in int64, which takes four times as long.
    counts = (scores > kth_best).sum(dim=1, dtype=torch.int16)  # (b,)
    return scores.topk(min(int(counts.max()), k))


def merge(scores: list[Tensor], rows: list[Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Lists of scores (b, some) and of their rows (b, some) -> the k best: (b, k), (b, k)."""
    best_scores, order = torch.cat(scores, dim=1).topk(k)  # (b, k)
    best_rows = torch.cat(rows, dim=1).gather(1, order)  # (b, k)
    return best_scores, best_rows


def search_over_ranks(
    queries: Tensor, blocks: Iterable[tuple[np.ndarray, np.ndarray]], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """`search`, each rank in blocks of its own; every rank gets the best of all."""
    scores, rows = (result.cpu() for result in search(queries, blocks, k))  # (q, k), (q, k)
    scores_of_ranks = [torch.empty_like(scores) for _ in range(dist.get_world_size())]
    rows_of_ranks = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(scores_of_ranks, scores)
    dist.all_gather(rows_of_ranks, rows)
    scores, rows = merge(scores_of_ranks, rows_of_ranks, k)
    return scores.numpy(), rows.numpy()


def corpus_blocks(
    encoder: Encoder,
    corpus: Texts,
    chunks: list[np.ndarray],
    files: list[Path],
    max_length: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """BLOCK chunks at a time, their embeddings (n, d) and rows (n,): the blocks of `search`.

    files: of each chunk, where its embeddings lie or will lie.
    """
    total = sum(len(rows) for rows in chunks)
    with tqdm(total=total, unit="text", desc="corpus", disable=dist.get_rank() > 0) as bar:
        for start in range(0, len(chunks), BLOCK):
            block = chunks[start : start + BLOCK]
            embeddings = []
            for rows, file in zip(block, files[start : start + BLOCK], strict=True):
                embeddings.append(embed_rows(encoder, corpus, rows, max_length, file))
                bar.update(len(rows))
            yield np.concatenate(embeddings), np.concatenate(block)


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
    pairs = []
    for number, (query, found) in enumerate(run.items()):
        positives = [name for name, grade in qrels[query].items() if grade > 0]
        pos = [corpus.text(corpus.row_of[name]) for name in positives if name in corpus.row_of]
        pos = [text for text in pos if text]
        text = queries.text(queries.row_of[query])
        if not pos or not text:
            continue
        names = [name for name in list(found)[first - 1 : last] if name not in positives]
        random = np.random.default_rng([args.seed, number])
        neg: list[str] = []
        for i in random.permutation(len(names)):
            if len(neg) == args.negatives:
                break
            negative = corpus.text(corpus.row_of[names[i]])
            if negative and negative not in [text, *pos, *neg]:
                neg.append(negative)
        pairs.append({"query": text, "pos": pos, "neg": neg})
    return pairs


# ---- main ----------------------------------------------------------------------------------------


def find_oddities(args, data: Path, queries: Texts, corpus: Texts, qrels: Qrels) -> list[str]:
    """What a reader of the numbers should know about the collection."""
    judged = {name for grades in qrels.values() for name in grades}
    no_query = qrels.keys() - queries.row_of.keys()
    no_document = judged - corpus.row_of.keys()
    identical = qrels.keys() & queries.row_of.keys() & corpus.row_of.keys()
    if args.skip_identical_ids:
        identical = set()
    oddities = [
        (no_query, "judged queries are not in queries.jsonl: they score 0"),
        (no_document, "judged documents are not in corpus.jsonl: never found"),
        (queries.empty + corpus.empty, "texts are empty: searched as they are"),
        (
            identical,
            "queries have the id of a document, and may find themselves: --skip-identical-ids?",
        ),
    ]
    return [
        f"{data}: {len(names)} {what} ({', '.join(sorted(names)[:3])} ..)"
        for names, what in oddities
        if names
    ]


def retrieve(
    args, encoder: Encoder, queries: Texts, corpus: Texts, qrels: Qrels, output: Path
) -> Run:
    """The --top-k documents of each judged query. Embeddings lie in `output` until the end."""
    judged = [row for row, name in enumerate(queries.ids) if name in qrels]  # q of them
    if not judged:
        raise BadInput(
            f"{queries.path}: holds none of the queries that are judged in qrels/{args.split}.tsv: "
            "are they of another collection?"
        )
    vectors = embed_queries(
        encoder, queries, np.array(judged), args.query_prompt, args.query_length
    )  # (q, d)
    # All of the corpus is cut, so positions are rows.
    chunks = cut_into_chunks(corpus.lines.lengths)[dist.get_rank() :: dist.get_world_size()]
    files = [chunk_file(encoder, corpus, rows, args.passage_length, output) for rows in chunks]
    blocks = corpus_blocks(encoder, corpus, chunks, files, args.passage_length)
    # A query that finds itself loses that one, and should still have --top-k.
    k = args.top_k + 1 if args.skip_identical_ids else args.top_k
    scores, rows = search_over_ranks(vectors.to(encoder.model.device), blocks, k)  # (q, k)
    run: Run = {}
    for i, query_row in enumerate(judged):
        query = queries.ids[query_row]
        hits = zip(rows[i].tolist(), scores[i].tolist(), strict=True)
        found = {corpus.ids[row]: score for row, score in hits if row >= 0}
        if args.skip_identical_ids:
            found.pop(query, None)
        # Sorted again: `search` leaves equal scores in any order, trec_eval does not.
        run[query] = {name: found[name] for name in rank_documents(found)[: args.top_k]}
    if not args.keep_embeddings:
        for file in files:
            file.unlink(missing_ok=True)
    return run


def evaluate(args, encoder: Encoder, data: Path, output: Path) -> dict:
    """Searches and scores one collection. Rank 0 writes run.trec, metrics.json and the pairs."""
    qrels = read_qrels(data / "qrels" / f"{args.split}.tsv")
    queries = Texts(data / "queries.jsonl")
    corpus = Texts(data / "corpus.jsonl")
    notes = find_oddities(args, data, queries, corpus, qrels)
    output.mkdir(parents=True, exist_ok=True)
    if dist.get_rank() == 0:
        for note in notes:
            print(note, flush=True)
    run = retrieve(args, encoder, queries, corpus, qrels, output)
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
    write_aside(output / "run.trec", "".join(lines).encode())
    write_aside(output / "metrics.json", json.dumps(result, indent=1, default=str).encode())
    if args.pairs:
        pairs = mine_pairs(args, queries, corpus, qrels, run)
        write_aside(args.pairs, "".join(json.dumps(pair) + "\n" for pair in pairs).encode())
        negatives = sum(len(pair["neg"]) for pair in pairs) / max(1, len(pairs))
        print(f"{args.pairs}: {len(pairs)} rows with {negatives:.1f} negatives each")
    return result


def print_table(results: dict[str, dict]) -> None:
    average = mean({name: result["mean"] for name, result in results.items()})
    print(f"{'':24}" + "".join(f"{name:>12}" for name in ("documents", "queries", *average)))
    for name, result in results.items():
        values = "".join(f"{value:12.4f}" for value in result["mean"].values())
        print(f"{name:24}{result['documents']:12}{result['queries']:12}{values}")
    if len(results) > 1:
        values = "".join(f"{value:12.4f}" for value in average.values())
        print(f"{'average':24}{'':12}{'':12}{values}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measures a LLaRA model by dot-product retrieval.", allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", default="out", help="folder or hub name; default: out")
    add("--data", nargs="+", type=Path, help="folders in BEIR layout; default: Python's docstrings")
    add("--split", default="test", help="which qrels; default: test")
    add("--output", type=Path, help="results go to OUTPUT/FOLDER-SPLIT/; default: MODEL/eval")
    # What is embedded, and how.
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on CUDA")
    add(
        "--query-prompt",
        choices=["next", "self"],
        default="next",
        help="self for a model that was adapted but not fine-tuned; default: next",
    )
    add("--query-length", type=int, default=64, help="tokens, with the prompt; default: 64")
    add("--passage-length", type=int, default=160, help="tokens, with the prompt; default: 160")
    add("--batch-size", type=int, default=32, help="texts at a time; default: 32")
    add("--keep-embeddings", action="store_true", help="do not remove them at the end")
    # What is searched.
    add("--top-k", type=int, default=1000, help="documents a query; default: 1000")
    add(
        "--skip-identical-ids",
        action="store_true",
        help="a query does not find the document of its own id (ArguAna, Quora)",
    )
    # Pairs to fine-tune on.
    add("--pairs", type=Path, help="write rows of query, positives and mined negatives to it")
    add("--negatives", type=int, default=8, help="of each query; default: 8")
    add(
        "--ranks",
        type=int,
        nargs=2,
        default=[10, 200],
        metavar=("FIRST", "LAST"),
        help="draw negatives from these, both included; default: 10 200",
    )
    add("--seed", type=int, default=0, help="of drawing negatives; default: 0")
    return parser.parse_args()


def check_arguments(args) -> None:
    first, last = args.ranks
    if not 1 <= first <= last:
        raise BadInput(f"--ranks {first} {last}: two ranks, the first at least 1")
    smallest = {"top_k": 1, "batch_size": 1, "query_length": 1, "passage_length": 1}
    for flag, least in (smallest | {"negatives": 0, "seed": 0}).items():
        if getattr(args, flag) < least:
            raise BadInput(f"--{flag.replace('_', '-')} {getattr(args, flag)}: {least} at least")
    names = [data.resolve().name for data in args.data or ()]
    if len(set(names)) < len(names):
        raise BadInput("--data: two folders of one name: their results would overwrite each other")
    if args.pairs and len(names) != 1:
        raise BadInput("--pairs needs --data, one collection")
    if args.pairs and args.pairs.exists():
        raise BadInput(f"--pairs {args.pairs}: exists, and is not overwritten")
    if args.pairs and not args.pairs.parent.is_dir():
        raise BadInput(f"--pairs {args.pairs}: {args.pairs.parent} is no folder")
    if args.pairs and last > args.top_k:
        raise BadInput(f"--ranks {first} {last}: --top-k {args.top_k} does not reach so far")


def default_output(model: str) -> Path:
    """eval/ in the model's folder; for a hub name ORGANISATION/NAME, NAME/eval in this folder."""
    folder = Path(model)
    return folder / "eval" if folder.is_dir() else Path(folder.name, "eval")


def main() -> None:
    args = parse_arguments()
    # Tokenizers may use threads. In llara.py they may not: it forks workers, where they would hang.
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    transformers.utils.logging.disable_progress_bar()
    # Without torchrun, a group of this one process. In here a BadInput ends it with one sentence.
    with process_group():
        check_arguments(args)
        output = args.output or default_output(args.model)
        encoder = load_encoder(args, pick_device())
        collections = args.data or [output / "python"]
        if not args.data and dist.get_rank() == 0:
            write_python_collection(collections[0])
        if args.query_prompt == "next" and is_only_adapted(args.model) and dist.get_rank() == 0:
            print(f"{args.model} is not fine-tuned: queries do better with --query-prompt self")
        dist.barrier()
        results = {}
        for data in collections:
            name = f"{data.resolve().name}-{args.split}"
            results[name] = evaluate(args, encoder, data, output / name)
        if dist.get_rank() == 0:
            print_table(results)


if __name__ == "__main__":
    main()
