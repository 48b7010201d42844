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

Who does what, on each collection (`evaluate`):
1. Process 0 reads ids and judgements, and tells the others what they need of them.
2. Every process encodes a share of the queries. Then all of them get all the vectors.
3. `search` asks for one chunk of passages after the other, and `embed_corpus` encodes it when it
   is asked for. Of each chunk the best for each query are kept, then it is forgotten.
4. The best of all go to process 0. It merges, measures and writes them, one query at a time.
"""

import argparse
import ast
import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import sysconfig
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

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
    encode,
    make_prompts,
    number,
    open_alone,
    pick_device,
    process_group,
    query_prompt_of,
    read_model,
    say,
)

CHUNK = 2048  # passages that are encoded, saved and searched together
QUERIES_AT_ONCE = 1024  # that are searched, or sent to process 0, together
QUERY_BLOCK = 256  # queries that one process encodes together

# ---- read a collection ---------------------------------------------------------------------------


def parse_text(fields: dict[str, Any]) -> tuple[str, str]:
    """A row of corpus.jsonl or queries.jsonl -> its id; its title and text, joined by a space."""
    text_id = fields["_id"]
    title = fields.get("title") or ""
    text = fields["text"]
    if isinstance(text_id, int):
        text_id = str(text_id)  # some collections number their texts
    check_texts(text_id, title, text)
    if text_id.split() != [text_id]:
        raise ValueError(f"the id {text_id!r} is empty or has white space")
    return text_id, f"{title} {text}".strip()


class Texts:
    """corpus.jsonl or queries.jsonl. A text is known by its row, 0 .. n-1, and read when needed.

    BadInput names the line that is malformed.
    """

    def __init__(self, path: Path):
        self.path = path
        self.lines = Rows([path])

    def text(self, row: int) -> str:
        with self.lines.row(row) as fields:
            return parse_text(fields)[1]

    def read_ids(self) -> tuple[np.ndarray, str]:
        """Reads all rows: by process 0 alone, as millions of ids take gigabytes.

        -> lengths (n,) int32 of the texts, in characters; a digest of ids and texts.
        BadInput names the line whose id is no id, or repeats one.
        """
        self.row_of: dict[str, int] = {}  # of an id
        self.n_empty = 0  # texts that are ""
        lengths = array("i")
        digest = hashlib.sha256()
        for row in range(len(self.lines)):
            with self.lines.row(row) as fields:
                text_id, text = parse_text(fields)
                if text_id in self.row_of:
                    raise ValueError(f"the id {text_id!r} stands in an earlier line too")
            self.row_of[text_id] = row
            self.n_empty += not text
            lengths.append(len(text))
            digest.update(f"{text_id}\n{text}\n".encode())
        self.ids = list(self.row_of)  # of each row, as a dict keeps its order
        return np.array(lengths), digest.hexdigest()


Qrels = dict[str, dict[str, int]]  # {query_id: {document_id: grade}}


def read_qrels(path: Path) -> Qrels:
    """qrels/SPLIT.tsv: a header, then query id, document id, grade, with tabs between.

    BadInput names the line that is no judgement.
    """
    qrels: Qrels = {}
    header, *lines = path.read_bytes().splitlines() or [b""]
    if re.search(rb"\s-?\d+\s*$", header):  # a judgement, that would be lost as the header
        raise BadInput(f"{path}:1: should be a header: query-id, corpus-id, score, with tabs")
    for line_number, line in enumerate(lines, 2):
        if not line.strip():
            continue
        place = f"{path}:{line_number}"
        try:
            query_id, document_id, score = (field.strip() for field in line.decode().split("\t"))
            grade = int(score)
        except ValueError as error:
            should = "should be query id, document id, whole number, with tabs between"
            raise BadInput(f"{place}: {should}: {line[:60]!r} ({error})") from None
        if qrels.setdefault(query_id, {}).setdefault(document_id, grade) != grade:
            raise BadInput(f"{place}: {query_id} and {document_id} are judged twice, differently")
    if not qrels:
        raise BadInput(f"{path}: holds no judgement")
    return qrels


def check_files(folders: Iterable[Path], split: str) -> None:
    """BadInput with all that is missing in any of the collections."""
    missing = []
    for data in folders:
        for file in (data / "corpus.jsonl", data / "queries.jsonl"):
            if not file.exists():
                missing.append(f"{file}: no such file")
        splits = sorted(file.stem for file in data.glob("qrels/*.tsv"))
        if split not in splits:
            there = ", ".join(splits) or "none"
            missing.append(f"{data}/qrels/{split}.tsv: no such file; --split can be: {there}")
    if missing:
        raise BadInput("; ".join(missing))


class Collection:
    """What a process needs to know of a folder in BEIR layout.

    judged (q,): rows of the queries to search for, those that are judged. lengths (n,): of the
    passages, in characters. digest: of their ids and texts. Process 0 alone has ids and qrels.
    BadInput names the line that is malformed.
    """

    def __init__(self, folder: Path, split: str):
        self.queries = Texts(folder / "queries.jsonl")
        self.corpus = Texts(folder / "corpus.jsonl")
        files = self.queries.lines.digest(), self.corpus.lines.digest()
        told = [None]  # as a list of one, which the broadcast fills on the other processes
        if dist.get_rank() == 0:
            self.qrels = read_qrels(folder / "qrels" / f"{split}.tsv")
            self.queries.read_ids()
            lengths, digest = self.corpus.read_ids()
            judged = [row for row, i in enumerate(self.queries.ids) if i in self.qrels]
            if not judged:
                raise BadInput(f"{self.queries.path}: holds no query that qrels/{split}.tsv judges")
            told = [(files, np.array(judged), lengths, digest)]
        dist.broadcast_object_list(told)
        files_there, self.judged, self.lengths, self.digest = told[0]
        if files != files_there:
            raise BadInput(f"{folder}: its files here are not those that process 0 reads")

    def oddities(self, skip_identical_ids: bool) -> list[str]:
        """What a reader of the numbers should know. Of process 0."""
        queries = self.queries.row_of.keys()
        corpus = self.corpus.row_of.keys()
        judged = self.qrels.keys()
        documents = set().union(*self.qrels.values())
        # Numbered collections share ids by chance. Where ids are names, a query may find itself.
        shared = [text_id for text_id in judged & queries & corpus if not text_id.isdigit()]
        counts = {
            "judged queries are not in queries.jsonl: score 0": len(judged - queries),
            "judged documents are not in corpus.jsonl": len(documents - corpus),
            "texts are empty: searched as they are": self.queries.n_empty + self.corpus.n_empty,
        }
        if not skip_identical_ids:
            counts["queries have the id of a document: --skip-identical-ids?"] = len(shared)
        return [f"{count} {what}" for what, count in counts.items() if count > 0]


def docstrings() -> Iterator[tuple[str, str]]:
    """The name and the docstring of each class and function in Python's library."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests"} & set(file.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):  # some are made to be wrong
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
                yield node.name, ast.get_docstring(node)


def write_python_collection(folder: Path) -> None:
    """A collection of the docstrings in Python's library, for want of a better one.

    A query is the first paragraph, without the object's own name; its one relevant document is the
    rest. A docstring is left out if it is short, or if its query, or a long line of its rest, is
    also in an earlier one: a query with two answers would have one of them counted as wrong.
    """
    seen: set[str] = set()  # the marks of all docstrings so far, left out or not
    corpus, queries, judgements = [], [], ["query-id\tcorpus-id\tscore"]
    for object_name, text in docstrings():
        summary, _, rest = text.partition("\n\n")
        # Without name and arguments, "open(file, mode) -> a stream" becomes "-> a stream".
        own_name = re.compile(rf"\b{object_name}\b(\(.*?\))?", flags=re.IGNORECASE | re.DOTALL)
        query = " ".join(own_name.sub(" ", summary).split())
        long_lines = {line for line in map(str.strip, rest.splitlines()) if len(line) > 30}
        marks = long_lines | {query.lower()}
        is_long_enough = len(query.split()) > 3 and len(rest.split()) > 15
        if is_long_enough and seen.isdisjoint(marks):
            i = len(corpus)
            passage = " ".join(rest.split())
            corpus.append(json.dumps({"_id": f"d{i}", "text": passage}))
            queries.append(json.dumps({"_id": f"q{i}", "text": query}))
            judgements.append(f"q{i}\td{i}\t1")
        seen.update(marks)
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    (folder / "corpus.jsonl").write_text("\n".join(corpus))
    (folder / "queries.jsonl").write_text("\n".join(queries))
    (folder / "qrels" / "test.tsv").write_text("\n".join(judgements))


# ---- encode --------------------------------------------------------------------------------------


def load_model(args) -> tuple[torch.nn.Module, Any, str]:
    """The model on its device, its tokenizer, and a digest of all that shapes an embedding.

    BadInput if --model is no LLaRA model, or if texts of these lengths are beyond it.
    """
    device, dtype = pick_device(args.dtype)
    model, tokenizer = read_model(transformers.AutoModel, args.model, dtype)
    if args.query_prompt:
        reason = "as --query-prompt says"
    else:
        args.query_prompt = query_prompt_of(model.config)
        reason = "as its config.json says"
        if not getattr(model.config, "llara", None):
            reason = "as with the released models, since its config.json has no entry"
    say(f"{args.model}: queries take the {args.query_prompt.upper()} prompt, {reason}")
    settings = CHUNK, args.passage_length, args.batch_size, str(dtype), device.type
    versions = torch.__version__, transformers.__version__
    digest = hashlib.sha256(repr((model.config.to_json_string(), settings, versions)).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    # All of the weights and not a sample: models can differ in the special tokens' rows alone.
    for weight_name, weight in model.state_dict().items():
        digest.update(weight_name.encode())
        digest.update(weight.contiguous().flatten().view(torch.uint8).numpy().data)
    model = model.to(device).eval()
    try:
        digest.update(repr(make_prompts(tokenizer, config=model.config)).encode())
        # A trial, before hours are spent: `encode` refuses lengths that the model cannot have.
        encode(model, tokenizer, ["a query"], args.query_prompt, args.query_length)
        encode(model, tokenizer, ["a passage"], "self", args.passage_length)
    except ValueError as error:
        raise BadInput(f"{args.model}: {error}") from None
    return model, tokenizer, digest.hexdigest()


def own_share(n: int, block: int, what: str) -> Iterable[int]:
    """Where the blocks of this process begin among n texts, with a bar on process 0."""
    process = dist.get_rank()
    starts = range(0, n, block)
    own_starts = starts[process :: dist.get_world_size()]
    return tqdm(own_starts, what, unit=f" * {block} texts", disable=process > 0)


def embed_queries(args, model, tokenizer, queries: Texts, rows: np.ndarray) -> Tensor:
    """The vectors (q, d) float32 of these rows (q,): on every process all, on its device.

    Each process encodes some blocks. A row is 0 where it was not encoded, so the sum over the
    processes, all-reduce, has them all. Blocks do not depend on the number of processes: two
    compute the same bits as eight.
    """
    width = model.get_input_embeddings().embedding_dim
    vectors = torch.zeros(len(rows), width, device=model.device)  # (q, d)
    for start in own_share(len(rows), QUERY_BLOCK, "queries"):
        texts = [queries.text(row) for row in rows[start : start + QUERY_BLOCK]]
        options = args.query_prompt, args.query_length, args.batch_size
        block = encode(model, tokenizer, texts, *options)  # (b, d)
        vectors[start : start + len(texts)] = torch.from_numpy(block)
    dist.all_reduce(vectors)
    return vectors


# Embeddings (n, d) of a chunk of passages, and their rows in the corpus (n,) int64.
Chunk = tuple[np.ndarray, np.ndarray]


def embed_corpus(
    args, model, tokenizer, corpus: Texts, lengths: np.ndarray, folder: Path
) -> Iterator[Chunk]:
    """This process's chunks of the corpus, each encoded when it is asked for.

    lengths (n,): of the texts, in characters. The longest come first, so that little is padded.
    Chunks do not depend on the number of processes, and batches are made within a chunk: so two
    processes compute the same bits as eight, and can load what eight have saved. A chunk has a file
    in `folder` if an earlier run was killed, or had --keep-embeddings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    longest_first = np.argsort(-lengths, kind="stable")  # (n,)
    for start in own_share(len(longest_first), CHUNK, "corpus"):
        rows = longest_first[start : start + CHUNK]
        file = folder / f"{start:09d}.npy"
        if file.exists():
            yield np.load(file, allow_pickle=False), rows
            continue
        texts = [corpus.text(row) for row in rows]
        embeddings = encode(model, tokenizer, texts, "self", args.passage_length, args.batch_size)
        if model.dtype != torch.float32:
            # Half the room, and finer than the bfloat16 that they were computed in.
            embeddings = embeddings.astype(np.float16)
        aside = file.with_name(f".{os.getpid()}-{file.name}")
        np.save(aside, embeddings)
        os.replace(aside, file)  # so it has its name only when it is whole
        yield embeddings, rows


# ---- search --------------------------------------------------------------------------------------


def best_of(scores: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """For each of b queries, the best k of m candidates: (b, m), (b, m) -> (b, k), (b, k)."""
    best_scores, columns = scores.topk(k)
    return best_scores, rows.gather(1, columns)


def search(queries: Tensor, chunks: Iterable[Chunk], k: int) -> tuple[Tensor, Tensor]:
    """The k passages of the highest dot product for each query, exactly.

    queries (q, d) float32, on the device to use. chunks: an iterator will do, as they are read
    once, in turn.
    -> scores (q, k), best first, and rows (q, k); -inf and -1 where there are fewer than k. Of
    passages that tie at the k-th place, any are taken.
    """
    device = queries.device
    scores = torch.full((len(queries), k), -torch.inf, device=device)  # (q, k)
    rows = torch.full((len(queries), k), -1, device=device)  # (q, k)
    for embeddings, chunk_rows in chunks:
        passages = torch.from_numpy(embeddings).to(device).float()  # (n, d)
        chunk_rows = torch.from_numpy(chunk_rows).to(device)  # (n,)
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            block = slice(start, start + QUERIES_AT_ONCE)  # b queries
            chunk_scores = queries[block] @ passages.T  # (b, n)
            # The candidates: the best k so far, and beside them all of this chunk.
            all_scores = torch.cat([scores[block], chunk_scores], dim=1)  # (b, k + n)
            rows_of_chunk = chunk_rows.expand_as(chunk_scores)  # (b, n), each row the same
            all_rows = torch.cat([rows[block], rows_of_chunk], dim=1)  # (b, k + n)
            scores[block], rows[block] = best_of(all_scores, all_rows, k)
    return scores, rows


def gather_best(scores: Tensor, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Of all that the processes found, the best k of each query in turn: scores (k,), rows (k,).

    scores (q, k), rows (q, k): from `search` in the chunks of this process. All processes must run
    through this, as each sends its lists, a block of queries at a time; only process 0 is given
    anything. Each list is cut at its k-th place, so which of the passages that tie at the last
    place are taken can depend on the number of processes.
    """
    world, k = dist.get_world_size(), scores.shape[1]
    for start in range(0, len(scores), QUERIES_AT_ONCE):
        block = slice(start, start + QUERIES_AT_ONCE)  # b queries
        own_scores = scores[block].cpu()  # (b, k)
        own_rows = rows[block].cpu()  # (b, k)
        if dist.get_rank() > 0:
            dist.gather(own_scores)
            dist.gather(own_rows)
            continue
        parts_of_scores = [torch.empty_like(own_scores) for _ in range(world)]
        parts_of_rows = [torch.empty_like(own_rows) for _ in range(world)]
        dist.gather(own_scores, parts_of_scores)
        dist.gather(own_rows, parts_of_rows)
        all_scores = torch.cat(parts_of_scores, dim=1)  # (b, world * k)
        all_rows = torch.cat(parts_of_rows, dim=1)  # (b, world * k)
        best_scores, best_rows = best_of(all_scores, all_rows, k)  # (b, k), (b, k)
        yield from zip(best_scores, best_rows, strict=True)


# ---- metrics -------------------------------------------------------------------------------------


def best_first(scores: dict[str, float]) -> list[str]:
    """As trec_eval does: by the score as a float32, of equal scores the greater id first."""

    def key(document_id: str) -> tuple[np.float32, str]:
        return np.float32(scores[document_id]), document_id

    return sorted(scores, key=key, reverse=True)


def discounted_gain(gains: list[int]) -> float:
    """DCG@10 with linear gain: the sum of gain / log2(place + 1)."""
    return sum(gain / math.log2(place + 1) for place, gain in enumerate(gains[:10], 1))


def measure(grades: dict[str, int], scores: dict[str, float]) -> dict[str, float]:
    """trec_eval's numbers for one query, MRR as its recip_rank of the first ten.

    grades: {document_id: grade}, the judgements; above 0 is relevant. scores: {document_id: score},
    what was found; with --top-k 100 that is 100 documents, and Recall@1000 then counts no others.
    If nothing is relevant, or nothing was found, all numbers are 0.
    """
    gains = [max(0, grades.get(document_id, 0)) for document_id in best_first(scores)]
    ideal_gains = sorted((grade for grade in grades.values() if grade > 0), reverse=True)
    places = [place for place, gain in enumerate(gains, 1) if gain > 0]  # of relevant documents
    n_relevant = max(1, len(ideal_gains))  # if there are none, all that follows is 0 anyway
    ideal = discounted_gain(ideal_gains)
    values = {
        "nDCG@10": discounted_gain(gains) / ideal if ideal > 0 else 0.0,
        "MRR@10": 1 / places[0] if places and places[0] <= 10 else 0.0,
    }
    for depth in (10, 100, 1000):
        values[f"Recall@{depth}"] = sum(place <= depth for place in places) / n_relevant
    # The relevant document number i stands at `place`: the precision there is i / place. Relevant
    # documents that were not found add 0.
    precisions = [i / place for i, place in enumerate(places, 1) if place <= 1000]
    values["MAP@1000"] = sum(precisions) / n_relevant
    return values


def mean(table: dict[str, dict[str, float]]) -> dict[str, float]:
    """{row: {metric: value}} -> {metric: mean over the rows}."""
    rows = list(table.values())
    return {metric: sum(row[metric] for row in rows) / len(rows) for metric in rows[0]}


# ---- pairs to fine-tune on -----------------------------------------------------------------------


class Miner:
    """Makes rows {"query", "pos", "neg"}: relevant documents, and hard negatives out of a ranking.

    A negative stands at one of the places FIRST to LAST of --ranks, both included. It is not judged
    relevant, and its text is not that of a positive or of the query. Two queries of one text have
    their answers in common. The very first places are left out by default, as answers that nobody
    has judged are often among them.
    """

    def __init__(self, args, collection: Collection):
        self.queries, self.corpus = collection.queries, collection.corpus
        self.first, self.last = args.ranks
        self.n_negatives = args.negatives
        self.random = np.random.default_rng(args.seed)
        # {text of a query: ids of relevant documents}; a dict instead of a set keeps their order
        self.relevant: dict[str, dict[str, None]] = {}
        for row in collection.judged:
            grades = collection.qrels[self.queries.ids[row]]
            relevant = self.relevant.setdefault(self.queries.text(row), {})
            for document_id, grade in grades.items():
                if grade > 0:
                    relevant[document_id] = None

    def document(self, document_id: str) -> str:
        return self.corpus.text(self.corpus.row_of[document_id])

    def pair(self, query_row: int, ranking: list[str]) -> dict[str, Any] | None:
        """A row. None if the query is empty, or has no positive that is in the corpus with a text.

        ranking: ids of documents, best first. "neg" can be empty: fine-tuning then has in-batch
        negatives alone for this query.
        """
        query = self.queries.text(query_row)
        relevant = self.relevant[query]
        there = [i for i in relevant if i in self.corpus.row_of]
        pos = [text for text in map(self.document, there) if text]
        if not pos or not query:
            return None
        in_range = ranking[self.first - 1 : self.last]
        candidates = [i for i in in_range if i not in relevant]
        neg: list[str] = []
        for i in self.random.permutation(len(candidates)):
            if len(neg) == self.n_negatives:
                break
            negative = self.document(candidates[i])
            if negative and negative not in [query, *pos, *neg]:
                neg.append(negative)
        return {"query": query, "pos": pos, "neg": neg}


# ---- main ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def written_aside(path: Path) -> Iterator[TextIO]:
    """A file to write to. It gets its name when it is whole."""
    aside = path.with_name(f".{path.name}")
    with open(aside, "w", encoding="utf-8") as file:
        yield file
    os.replace(aside, path)


def write_results(
    args, collection: Collection, hits: Iterable[tuple[Tensor, Tensor]], output: Path
) -> dict[str, dict[str, float]]:
    """Measures one query after the other, and writes run.trec and --pairs on the way.

    hits: for each of the judged queries, scores (k,) and rows (k,) of documents.
    -> {query_id: {metric: value}} in the order of qrels.
    """
    queries, corpus, qrels = collection.queries, collection.corpus, collection.qrels
    per_query = dict.fromkeys(qrels, measure({}, {}))  # a query without a result counts as 0
    n_pairs = n_negatives = 0
    with contextlib.ExitStack() as files:
        run_file = files.enter_context(written_aside(output / "run.trec"))
        if args.pairs:
            pairs_file = files.enter_context(written_aside(args.pairs))
            miner = Miner(args, collection)
        bar = tqdm(collection.judged, "results", unit=" queries")
        for query_row, (scores, rows) in zip(bar, hits, strict=True):
            query_id = queries.ids[query_row]
            found = {}
            for row, score in zip(rows.tolist(), scores.tolist(), strict=True):
                if row >= 0:
                    found[corpus.ids[row]] = score
            if args.skip_identical_ids:
                found.pop(query_id, None)
            # Sorted again: `search` leaves equal scores in any order, trec_eval does not.
            ranking = best_first(found)[: args.top_k]
            found = {document_id: found[document_id] for document_id in ranking}
            per_query[query_id] = measure(qrels[query_id], found)
            for place, (document_id, score) in enumerate(found.items(), 1):
                run_file.write(f"{query_id} Q0 {document_id} {place} {score:.9g} llara\n")
            pair = miner.pair(query_row, ranking) if args.pairs else None
            if pair:
                pairs_file.write(json.dumps(pair) + "\n")
                n_pairs += 1
                n_negatives += len(pair["neg"])
    if args.pairs:
        each = n_negatives / max(1, n_pairs)
        say(f"{args.pairs}: {n_pairs} rows, {each:.1f} negatives each")
    return per_query


def evaluate(
    args, model, tokenizer, model_digest: str, data: Path, output: Path
) -> dict[str, float]:
    """Searches a collection and writes the results. -> the means on process 0, {} elsewhere."""
    is_first = dist.get_rank() == 0
    collection = Collection(data, args.split)
    notes = collection.oddities(args.skip_identical_ids) if is_first else []
    for note in notes:
        say(f"{data}: {note}")
    queries, corpus = collection.queries, collection.corpus
    vectors = embed_queries(args, model, tokenizer, queries, collection.judged)  # (q, d)
    both = hashlib.sha256((model_digest + collection.digest).encode())
    folder = output / f"embeddings-{both.hexdigest()[:32]}"
    chunks = embed_corpus(args, model, tokenizer, corpus, collection.lengths, folder)
    # A query that finds itself loses that one, and should still have --top-k.
    k = args.top_k + 1 if args.skip_identical_ids else args.top_k
    # `search` runs here, and with it, chunk by chunk, `embed_corpus`. `gather_best` is a generator:
    # it runs as its hits are asked for, a block of queries at a time.
    hits = gather_best(*search(vectors, chunks, k))
    if not is_first:
        list(hits)  # it is empty: only so does this process send what it has found
        return {}

    per_query = write_results(args, collection, hits, output)
    report = {
        "documents": len(corpus.ids),
        "queries": len(collection.qrels),
        "notes": notes,
        "mean": mean(per_query),
        "settings": vars(args),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "per_query": per_query,
    }
    with written_aside(output / "metrics.json") as file:
        json.dump(report, file, indent=1, default=str)
    if not args.keep_embeddings:
        shutil.rmtree(folder)  # no process still reads there: all have sent what they found
    return report["mean"]


def print_table(table: dict[str, dict[str, float]]) -> None:
    if len(table) > 1:
        table = table | {"average": mean(table)}
    metrics = next(iter(table.values()))
    head = "".join(f"{metric:>12}" for metric in metrics)
    say(f"{'':24}{head}")
    for collection, row in table.items():
        cells = "".join(f"{value:12.4f}" for value in row.values())
        say(f"{collection:24}{cells}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measures a LLaRA model by dot-product retrieval.", allow_abbrev=False
    )
    add = parser.add_argument
    at_least_0 = number(int, 0, math.inf)
    at_least_1 = number(int, 1, math.inf)
    add("--model", default="out", help="folder or hub name; default: out")
    add("--data", nargs="+", type=Path, help="folders in BEIR layout; default: Python's docstrings")
    add("--split", default="test", help="which qrels; grades above 0 are relevant; default: test")
    where = "results go to OUTPUT/FOLDER-SPLIT/; default: MODEL/eval, / of a hub name becomes --"
    add("--output", type=Path, help=where)
    # What is embedded, and how.
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="default: bfloat16 on CUDA")
    add("--query-prompt", choices=["next", "self"], help="default: as its config.json says")
    add("--query-length", type=at_least_1, default=64, help="tokens, with the prompt; default: 64")
    add("--passage-length", type=at_least_1, default=160, help="the same of passages; default: 160")
    add("--batch-size", type=at_least_1, default=32, help="texts at a time; default: 32")
    add("--keep-embeddings", action="store_true", help="do not remove them at the end")
    # What is searched.
    depth = "documents a query; default: 1000, with --pairs LAST of --ranks"
    add("--top-k", type=at_least_1, help=depth)
    own = "a query does not find the document of its own id (ArguAna, Quora)"
    add("--skip-identical-ids", action="store_true", help=own)
    # Pairs to fine-tune on.
    add("--pairs", type=Path, help="write rows of query, positives and mined negatives to it")
    add("--negatives", type=at_least_0, default=8, help="of each query, at most; default: 8")
    places = "draw negatives from these places, FIRST and LAST included; default: 10 200"
    names = ("FIRST", "LAST")
    add("--ranks", type=at_least_1, nargs=2, default=[10, 200], metavar=names, help=places)
    add("--seed", type=at_least_0, default=0, help="of drawing negatives; default: 0")
    args = parser.parse_args()
    first, last = args.ranks
    if args.top_k is None:
        args.top_k = last if args.pairs else 1000
    # What would be found only after hours, or would be silently wrong.
    folders = [data.resolve().name for data in args.data or ()]
    if len(set(folders)) < len(folders):
        parser.error("--data: two folders of one name: their results would overwrite each other")
    if args.pairs:
        if not first <= last <= args.top_k:
            parser.error(f"--ranks {first} {last}: should be within 1 and --top-k {args.top_k}")
        if len(folders) != 1:
            parser.error("--pairs needs --data, one collection")
        if args.pairs.exists() or not args.pairs.parent.is_dir():
            parser.error(f"--pairs {args.pairs}: exists already, or is in no folder")
    return args


def main() -> None:
    args = parse_arguments()
    transformers.utils.logging.disable_progress_bar()
    # Without torchrun, a group of this one process. A BadInput ends it with its sentence alone.
    with process_group(), contextlib.ExitStack() as locks:
        is_first = dist.get_rank() == 0
        if is_first:
            check_files(args.data or [], args.split)
        model, tokenizer, digest = load_model(args)
        home = Path(args.model)
        if not home.is_dir():  # a hub name
            home = Path(args.model.replace("/", "--"))
        output = args.output or home / "eval"
        collections = args.data or [output / "python"]
        outputs = [output / f"{data.resolve().name}-{args.split}" for data in collections]
        if is_first:
            for folder in outputs:  # a second evaluation would write the same files
                folder.mkdir(parents=True, exist_ok=True)
                locks.enter_context(open_alone(folder / ".lock"))
            if not args.data:
                write_python_collection(collections[0])
        dist.barrier()  # the others wait until all is there
        table = {}
        for data, folder in zip(collections, outputs, strict=True):
            table[folder.name] = evaluate(args, model, tokenizer, digest, data, folder)
        if is_first:
            print_table(table)


if __name__ == "__main__":
    main()
