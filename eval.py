# SPDX-License-Identifier: MIT
"""Measures a LLaRA model by dot-product retrieval on collections in BEIR layout, with the numbers of trec_eval.

    FOLDER/corpus.jsonl    {"_id", "title", "text"}  -> SELF prompt -> (n, d) on disk, a file per rank -.
    FOLDER/queries.jsonl   {"_id", "text"}           -> NEXT prompt -> (q, d) -> exact top k by blocks <'
    FOLDER/qrels/test.tsv  query-id, corpus-id, score                         -> nDCG, MRR, recall, MAP

    python eval.py                          # ./out on docstrings of the installed Python; --model out/base: untrained
    torchrun --nproc-per-node 8 eval.py --model BAAI/LLARA-passage --dtype bfloat16 --data msmarco --split dev
"""
import argparse, hashlib, json, math, os, re, sys
from pathlib import Path
import numpy as np
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm
from llara import (BadInput, Lines, check_links, docstrings, embed, make_prompts, pad, pretrained, process_group,
                   sequences)

# ---- read a collection ---------------------------------------------------------------------------------------------
class Texts(Lines):
    """corpus.jsonl or queries.jsonl: ids in memory, texts read when needed. BadInput names a bad line."""
    def __init__(self, path):
        super().__init__([path])
        self.ids, self.empty, self.digest, first = [], [], hashlib.sha256(), {}
        for line in self.full:
            name, text = self[line]
            if first.setdefault(name, line) != line:
                raise BadInput(f"{self.place(line)[1]}: the id {name!r} is also that of {self.place(first[name])[1]}")
            self.ids.append(name)
            self.empty += [] if text else [self.place(line)[1]]
            self.digest.update(f"{name}\n{text}\n".encode())
        self.by_id = sorted(range(len(self.ids)), key=self.ids.__getitem__, reverse=True)  # trec_eval's order of ties

    def parse(self, row):  # -> id, title and text joined by one space
        '{"_id": "..", "text": ".."[, "title": ".."]}'
        name, text = str(row["_id"]), f'{row.get("title") or ""} {row["text"] + ""}'.strip()
        if name.split() != [name]:
            raise ValueError(f"the id {name!r} is empty or has white space, which no TREC run can hold")
        (name + text).encode()  # a lone surrogate cannot be tokenised
        return name, text

def read_qrels(path):
    """-> {query: {document: grade}}. BadInput names file and line of what is neither header nor judgement."""
    try:
        lines, qrels = path.read_text(encoding="utf-8").splitlines(), {}
    except (OSError, ValueError) as e:
        raise BadInput(f"{path}: cannot be read ({e}); splits: {[p.stem for p in path.parent.glob('*.tsv')]}") from None
    for number, line in enumerate(lines, 1):
        graded = re.fullmatch(r"(\S+)\t(\S+)\t(-?\d{1,9})\s*", line)
        if line.count("\t") != 2 or bool(graded) == (number == 1):
            what = "a header: query-id, corpus-id, score" if number == 1 else "query id, document id, whole number"
            raise BadInput(f"{path}:{number}: {line[:60]!r} should be {what}, with tabs (not spaces) between")
        if graded:
            qrels.setdefault(graded[1], {})[graded[2]] = int(graded[3])
    if not qrels:
        raise BadInput(f"{path}: holds no judgement")
    return qrels

def python_collection(folder):
    """Writes a collection made of the docstrings in the installed Python's library. Query: the summary, less the
    object's own name; the one relevant document: the rest. Left out: what is short, or repeats a line of another."""
    seen, rows = set(), []
    for _, name, text in docstrings():
        summary, _, rest = text.partition("\n\n")
        query = " ".join(re.sub(rf"\b{name}\b(\(.*?\))?", " ", summary, flags=re.I | re.S).split())
        lines = {query.lower(), *(line.strip() for line in rest.splitlines() if len(line) > 30)}
        if name and len(query.split()) > 3 and len(rest.split()) > 15 and seen.isdisjoint(lines):
            rows.append((query, " ".join(rest.split())))
        seen |= lines
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for file, side in ("queries.jsonl", 0), ("corpus.jsonl", 1):
        (folder / file).write_text("".join(json.dumps({"_id": i, "text": r[side]}) + "\n" for i, r in enumerate(rows)))
    judged = ["query-id\tcorpus-id\tscore", *(f"{i}\t{i}\t1" for i in range(len(rows)))]
    (folder / "qrels/test.tsv").write_text("\n".join(judged))

# ---- encode --------------------------------------------------------------------------------------------------------
def load(name, dtype, device):
    """-> the body of a HF causal LM, its tokenizer, a digest of both. BadInput if it is no LLaRA model (head aside)."""
    model, tokenizer = pretrained(transformers.AutoModel, name, dtype)
    if max(map(max, make_prompts(tokenizer))) >= model.get_input_embeddings().num_embeddings:
        raise BadInput(f"{name}: lacks embeddings of <s1>..<s16>")
    digest = hashlib.sha256((model.config.to_json_string() + tokenizer.backend_tokenizer.to_str()).encode())
    for key, weight in model.state_dict().items():  # all of it: two models may differ in the rows of <s1>..<s16> alone
        digest.update(key.encode() + weight.contiguous().flatten().view(torch.uint8).numpy().data)
    return model.to(device).eval(), tokenizer, digest.hexdigest()

@torch.inference_mode()
def encode(model, tokenizer, digest, texts, rows, prompt, max_length, path, rank=0, world=1, budget=4096, chunk=512):
    """Embeds texts[rows] (of their chunks every world-th), streamed to a file `path`-.. of raw float32 or float16. Its
    name tells all that shapes an embedding, `digest` stands for the model; whole chunks found there are kept. In
    tokens: max_length of a text and its prompt, "self" or "next"; budget of a batch. -> indices (m,) of the texts in
    the file, in order; the file as an array (m, d). FloatingPointError if an embedding is not finite."""
    prompts = make_prompts(tokenizer)
    rows = np.array(rows)[np.argsort(-texts.lengths[texts.full[rows]], kind="stable")]  # (n,) longest first, by bytes
    chunks = [rows[i:i + chunk] for i in range(0, len(rows), chunk)][rank::world]
    rows, d = np.concatenate([rows[:0], *chunks]), model.config.hidden_size          # (m,)
    dtype = torch.float32 if model.dtype == torch.float32 else torch.float16
    made_of = (digest, texts.digest.hexdigest(), hashlib.sha256(rows).hexdigest(), prompt, max_length, budget, chunk,
               model.dtype, model.device.type, torch.__version__, transformers.__version__)
    path = Path(f"{path}-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:32]}.{rank}-of-{world}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as f, tqdm(total=len(rows), unit="text", desc=texts.paths[0].stem, disable=rank > 0) as bar:
        size = d * dtype.itemsize                                                    # of an embedding, in bytes
        kept = len(rows) if f.tell() == len(rows) * size else f.tell() // (chunk * size) * chunk
        f.truncate(kept * size), bar.update(kept)  # half a chunk is made again, in the same batches
        # Chunks are the same for any number of ranks, and so are batches, embeddings and (chunk by chunk) scores.
        for some in chunks[math.ceil(kept / chunk):]:
            ids = sequences(tokenizer, [texts[texts.full[i]][1] for i in some], prompts, prompt.upper(), max_length)
            order, out = np.argsort([-len(i) for i in ids], kind="stable"), torch.empty(len(ids), d, dtype=dtype)
            while len(order):
                some, order = np.split(order, [max(1, budget // len(ids[order[0]]))])  # (B,), the rest
                batch, lengths = pad([ids[i] for i in some]), torch.tensor([len(ids[i]) for i in some])  # (B, L), (B,)
                out[some] = embed(model, batch.to(model.device), lengths.to(model.device)).to("cpu", dtype)  # (B, d)
                bar.update(len(some))
            if not out.isfinite().all():
                raise FloatingPointError(f"embeddings overflow in {model.dtype}: take --dtype bfloat16 or float32")
            f.write(out.numpy().data)
    return rows, np.memmap(path, str(dtype)[6:], "c", shape=(len(rows), d)) if len(rows) else np.empty((0, d), "f4")

# ---- search --------------------------------------------------------------------------------------------------------
def pack(scores, keys):
    """float32 scores and keys (below 2^32) -> int64 that sort by score and, of equal scores, by smaller key first."""
    bits = (scores + 0.0).view(torch.int32).long()  # sorts as the floats do, but negative ones; + 0.0: no -0.0
    return (bits ^ (bits < 0) * 0x7FFFFFFF) * 2**32 + (2**32 - 1 - keys)

def unpack(packed):
    bits = packed >> 32
    return (bits ^ (bits < 0) * 0x7FFFFFFF).int().view(torch.float32), 2**32 - 1 - packed % 2**32

def search(queries, passages, keys, k, block=4096, rank=0):  # block: passages at a time, a multiple of 64
    """Exact top k by dot product in float32. queries (q, d): tensor, on the device to use; passages (n, d): array, read
    once; keys (n,): of equal scores the smaller key wins. -> packed (q, k), best first; -inf where there is none."""
    q, device = len(queries), queries.device
    none = int(pack(torch.tensor(-torch.inf), torch.tensor(2**32 - 1)))
    found = torch.full((q, 2 * k + block), none, device=device)                      # (q, w) candidates, packed
    counts = torch.zeros(q, dtype=torch.int64, device=device)                        # (q,) how many
    floors = torch.full((q, 1), torch.finfo(torch.float32).min, device=device)       # (q, 1) the score to reach
    buffer = torch.empty(min(q, 1024), block, device=device)  # always the same memory: fresh pages cost time
    # Passages come sorted by length, which scores may depend on. In random order the floor rises soonest.
    for start in tqdm(np.random.default_rng(0).permutation(range(0, len(passages), block)), "search", disable=rank > 0):
        part, key = (torch.from_numpy(x[start:start + block]).to(device) for x in (passages, keys))  # (c, d), (c,)
        for b in (slice(i, min(q, i + 1024)) for i in range(0, q, 1024)):
            count, floor, scores = counts[b], floors[b], buffer[:len(counts[b])]     # (b,), (b, 1), (b, block)
            scores[:, len(key):] = -torch.inf  # the scores of a fuller block are still there
            for p, out in zip(part.split(512), scores.split(512, 1)):  # one large product would not fit in the cache
                torch.mm(queries[b], p.float().T, out=out[:, :len(p)])               # (b, 512)
            if len(key) >= k and not count.any():  # the first block: no more than its k best
                floor.clamp_(min=scores.topk(k).values[:, -1:])
            tiles = scores.view(len(count), -1, 64)                                  # (b, block / 64, 64)
            row, tile = (tiles.amax(2) >= floor).nonzero().T                         # (t,) few, once the floor is high
            some = tiles[row, tile]                                                  # (t, 64)
            i, column = (some >= floor[row]).nonzero().T                             # (h,)
            row, packed = row[i], pack(some[i, column], key[64 * tile[i] + column])  # (h,)
            more = row.bincount(minlength=len(count))                                # (b,)
            place = count[row] + torch.arange(len(row), device=device) - (more.cumsum(0) - more)[row]  # (h,)
            found[b][row, place] = packed
            if (used := int(count.add_(more).max())) > 2 * k:  # else there is room for another block
                found[b, :k] = found[b, :used].topk(k).values
                found[b, k:] = none
                floor.clamp_(min=unpack(found[b, k - 1:k])[0])
                count.clamp_(max=k)
    return found[:, :2 * k].topk(k).values

# ---- metrics -------------------------------------------------------------------------------------------------------
def measure(grades, scores):
    """trec_eval's numbers for a query: {document: whole number}, {document: score} -> {metric: value}. Scores count as
    float32, ties go by id, descending; a grade above 0 is relevant and is the gain; without results all is 0."""
    ranked = sorted(scores, key=lambda name: (np.float32(scores[name]), name), reverse=True)
    gains = [max(0, grades.get(name, 0)) for name in ranked]
    ideal = sorted((grade for grade in grades.values() if grade > 0), reverse=True)
    ranks, total = [rank for rank, gain in enumerate(gains, 1) if gain], max(1, len(ideal))
    dcg, most = (sum(gain / math.log2(rank + 1) for rank, gain in enumerate(g[:10], 1)) for g in (gains, ideal))
    return {"nDCG@10": dcg / (most or 1), "MRR@10": sum(1 / rank for rank in ranks[:1] if rank <= 10),
            **{f"Recall@{k}": sum(rank <= k for rank in ranks) / total for k in (10, 100, 1000)},
            "MAP@1000": sum(n / rank for n, rank in enumerate(ranks, 1) if rank <= 1000) / total}

def mean(table):  # {name: {metric: value}}
    return {metric: sum(row[metric] for row in table.values()) / len(table) for metric in next(iter(table.values()))}

# ---- main ----------------------------------------------------------------------------------------------------------
def evaluate(args, folder, output, loaded):
    """Encodes, searches and scores one collection; rank 0 writes output/run.trec. -> its part of metrics.json."""
    rank, world, qrels = dist.get_rank(), dist.get_world_size(), read_qrels(folder / "qrels" / f"{args.split}.tsv")
    queries, corpus = (Texts(folder / file) for file in ("queries.jsonl", "corpus.jsonl"))
    odd = {"judged queries are not in queries.jsonl: they score 0": qrels.keys() - queries.ids,
           "judged documents are not in corpus.jsonl: never found": set().union(*qrels.values()).difference(corpus.ids),
           "texts are empty: searched as they are": queries.empty + corpus.empty}
    notes = [f"{folder}: {len(v)} {what} ({', '.join(sorted(v)[:3])} ..)" for what, v in odd.items() if v]
    print(*(note + "\n" for note in notes if rank == 0), sep="", end="", flush=True)
    asked = np.array([i for i, name in enumerate(queries.ids) if name in qrels], np.int64)  # (q,)
    how = rank, world, 4096 if loaded[0].device.type == "cpu" else 16384
    mine, part = encode(*loaded, queries, asked, args.query_prompt, args.query_length, output / "queries", *how)
    embedded = torch.zeros(len(queries.ids), part.shape[1])                          # (all queries, d)
    embedded[mine] = torch.from_numpy(part).float()
    dist.all_reduce(embedded)
    keys, k = np.argsort(corpus.by_id), args.top_k + args.skip_identical_ids         # (n,) places in trec_eval's order
    mine, passages = encode(*loaded, corpus, range(len(keys)), "self", args.passage_length, output / "corpus", *how)
    part = search(embedded[asked].to(loaded[0].device), passages, keys[mine], k, rank=rank).cpu()
    dist.all_gather(parts := [torch.empty_like(part) for _ in range(world)], part)
    scores, found = unpack(torch.cat(parts, 1).topk(k).values)                       # (q, k)
    per_query = {name: measure(grades, {}) for name, grades in qrels.items()}
    with open(output / "run.trec" if rank == 0 else os.devnull, "w", encoding="utf-8") as run:
        for name, *row in zip((queries.ids[i] for i in asked), scores.tolist(), found.tolist()):
            hits = [(corpus.ids[corpus.by_id[key]], score) for score, key in zip(*row) if score > -math.inf]
            result = dict([hit for hit in hits if not args.skip_identical_ids or hit[0] != name][:args.top_k])
            run.writelines(f"{name} Q0 {i} {n} {result[i]:.9g} llara\n" for n, i in enumerate(result, 1))
            per_query[name] = measure(qrels[name], result)
    return dict(documents=len(keys), queries=len(qrels), notes=notes, mean=mean(per_query), per_query=per_query)

def main():
    parser = argparse.ArgumentParser(description="Measure a LLaRA model by dot-product retrieval.")
    add = parser.add_argument
    add("--model", default="out", help="hub name or folder (default: out)")
    add("--data", nargs="+", type=Path, help="folders in BEIR layout (default: one made of Python's docstrings)")
    add("--split", default="test", help="which qrels (default: test)")
    add("--output", type=Path, help="folder for metrics.json, run.trec and the embeddings (default: MODEL/eval)")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="default: float32")
    add("--query-prompt", default="next", choices=["next", "self"], help="passages always take SELF (default: next)")
    add("--query-length", type=int, default=64, help="in tokens, with the prompt (default: 64)")
    add("--passage-length", type=int, default=160, help="in tokens, with the prompt (default: 160)")
    add("--top-k", type=int, default=1000, help="documents a query (default: 1000)")
    add("--skip-identical-ids", action="store_true", help="no query finds the document of its own id (ArguAna, Quora)")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # nothing forks here
    with process_group("gloo"):  # only queries and their results travel, from CPU to CPU
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
        output = args.output or Path(args.model if os.path.isdir(args.model) else os.path.basename(args.model)) / "eval"
        check_links(output)
        loaded, folders = load(args.model, getattr(torch, args.dtype), device), args.data or [output / "python"]
        if not args.data and dist.get_rank() == 0:
            python_collection(folders[0])
        dist.barrier()
        names = {folder.resolve().name: folder for folder in folders}
        if len(names) < len(folders) or args.top_k < 1:
            raise BadInput("--data needs folders of different names, --top-k at least 1")
        results = {n: evaluate(args, f, output / n if len(names) > 1 else output, loaded) for n, f in names.items()}
        if dist.get_rank() == 0:
            average = mean({n: r["mean"] for n, r in results.items()})
            report = {"settings": vars(args), "average": average, "collections": results, "versions":
                      {"python": sys.version, **{m.__name__: m.__version__ for m in (torch, transformers, np)}}}
            (output / "metrics.json").write_text(json.dumps(report, indent=1, default=str))
            print(f"{'':20}" + "".join(f"{name:>12}" for name in ("documents", "queries", *average)))
            for name, r in (results | {"average": {"mean": average}} if len(names) > 1 else results).items():
                print(f"{name:20}{r.get('documents', ''):>12}{r.get('queries', ''):>12}"
                      + "".join(f"{value:12.4f}" for value in r["mean"].values()))

if __name__ == "__main__":
    main()
