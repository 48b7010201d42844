# SPDX-License-Identifier: MIT
"""What LLaRA is worth to someone with 128 labelled pairs: the table of the README, by one command.

    python .ci/claim.py --model HuggingFaceTB/SmolLM2-135M-Instruct \
        --text wiki.jsonl --pairs newwiki-train.jsonl \
        --collections squadshifts-newwiki:dev cranfield:test scifact:test

It samples each collection (FOLDER:SPLIT, in BEIR layout), searches the samples with BM25, and runs
llara.py and eval.py by their command lines: the base; the base adapted by language modelling alone;
the base adapted by LLaRA. Each is measured without labels, and again after fine-tuning. Queries
take the SELF prompt everywhere. A seed is one of adaptation and of fine-tuning together.

A killed run goes on when the same command is given again: what is finished is not done again.
What the commands print is in OUTPUT/commands.log.
"""

import argparse
import json
import math
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import eval as evaluation
import llara

# The experiment; --quick shortens it.
SEEDS = [0, 1, 2]
SAMPLE = {"queries": 100, "passages": 300}  # of each collection
ADAPT = {"steps": 24, "batch-size": 16, "max-length": 160, "lr": 2e-4}
TUNE = {"steps": 8, "batch-size": 16, "group-size": 1, "lr": 1e-4}  # group size 1: in-batch alone
LENGTHS = {"query-length": 48, "passage-length": 96}  # tokens with prompts; to tune and to measure
DTYPE = "bfloat16"  # on a CPU without AMX or AVX512-BF16, "float32" is faster
ARMS = {  # name: what the table calls it, weights of EBAE and EBAR; None: not adapted
    "base": ("the base, with its prompts", None),
    "language": ("language modelling alone, same text", 0.0),
    "llara": ("**LLaRA**", 0.5),
}


# ---- samples -------------------------------------------------------------------------------------


def read_rows(path: Path) -> dict[str, dict]:
    """The rows of corpus.jsonl or queries.jsonl by their ids."""
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return {str(row["_id"]): row for row in rows}


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_sample(source: Path, split: str, target: Path) -> None:
    """A collection of some judged queries, all that is relevant to them, and other passages.

    Drawn at random with seed 0, so every run has the same. Its one split is called test.
    """
    pick = random.Random(0)
    relevant: dict[str, dict[str, str]] = {}  # query: {document: grade}
    for line in (source / "qrels" / f"{split}.tsv").read_text().splitlines()[1:]:
        query, document, grade = line.split("\t")
        if int(grade) > 0:
            relevant.setdefault(query, {})[document] = grade
    chosen = pick.sample(sorted(relevant), min(SAMPLE["queries"], len(relevant)))
    corpus, queries = read_rows(source / "corpus.jsonl"), read_rows(source / "queries.jsonl")
    kept = {name for query in chosen for name in relevant[query] if name in corpus}
    others = sorted(corpus.keys() - kept)
    pick.shuffle(others)
    kept.update(others[: max(0, SAMPLE["passages"] - len(kept))])
    qrels = ["query-id\tcorpus-id\tscore\n"]
    for query in chosen:
        for document, grade in relevant[query].items():
            qrels.append(f"{query}\t{document}\t{grade}\n")
    (target / "qrels").mkdir(parents=True, exist_ok=True)
    write_rows(target / "corpus.jsonl", [corpus[name] for name in sorted(kept)])
    write_rows(target / "queries.jsonl", [queries[name] for name in chosen])
    (target / "qrels" / "test.tsv").write_text("".join(qrels))


# ---- BM25 ----------------------------------------------------------------------------------------


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def bm25(sample: Path, k1: float = 0.9, b: float = 0.4) -> float:
    """nDCG@10 of BM25 on title and text: words in lower case, no stemming, no stop words."""
    corpus, queries = read_rows(sample / "corpus.jsonl"), read_rows(sample / "queries.jsonl")
    qrels = evaluation.read_qrels(sample / "qrels" / "test.tsv")
    counts = {
        name: Counter(words(f"{row.get('title') or ''} {row['text']}"))
        for name, row in corpus.items()
    }
    lengths = {name: count.total() for name, count in counts.items()}
    mean_length = sum(lengths.values()) / len(lengths)
    document_frequency = Counter(word for count in counts.values() for word in count)
    values = []
    for query, row in queries.items():
        scores = dict.fromkeys(corpus, 0.0)
        for word in words(row["text"]):
            n = document_frequency[word]
            idf = math.log(1 + (len(corpus) - n + 0.5) / (n + 0.5))
            for name, count in counts.items():
                saturation = k1 * (1 - b + b * lengths[name] / mean_length)
                scores[name] += idf * count[word] / (count[word] + saturation)
        values.append(evaluation.measure(qrels[query], scores)["nDCG@10"])
    return sum(values) / len(values)


# ---- runs ----------------------------------------------------------------------------------------


def run(output: Path, script: str, options: dict) -> None:
    """One of our scripts, as a user starts it. What it prints goes to commands.log."""
    command = [sys.executable, str(Path(llara.__file__).with_name(script))]
    for name, value in options.items():
        values = value if isinstance(value, list) else [value]
        command += [f"--{name}", *map(str, values)]
    if script == "llara.py":
        command.append("--resume")  # a finished run says so and ends
    with open(output / "commands.log", "a") as log:
        log.write(f"\n$ {' '.join(command)}\n")
        log.flush()
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    if code != 0:
        sys.exit(f"exit code {code}: see the end of {output / 'commands.log'}")


def measure(output: Path, model: Path, samples: list[Path]) -> list[float]:
    """nDCG@10 of a model on each sample; from the results of eval.py, if they are there."""
    results = output / "results" / model.name
    files = [results / f"{sample.name}-test" / "metrics.json" for sample in samples]
    if not all(file.exists() for file in files):
        options = {"model": model, "data": samples, "output": results, "dtype": DTYPE}
        run(output, "eval.py", options | {"query-prompt": "self"} | LENGTHS)
    return [json.loads(file.read_text())["mean"]["nDCG@10"] for file in files]


def adapted(args, arm: str, seed: int) -> Path:
    """The folder of an arm's adapted model; that of the base, if the arm has no adaptation."""
    weight = ARMS[arm][1]
    base = args.output / "base"
    if weight is None:
        return base
    model = args.output / f"{arm}-{seed}"
    options = {"model": base, "data": args.text, "output": model, "seed": seed, **ADAPT}
    weights = {"ebae-weight": weight, "ebar-weight": weight}
    run(args.output, "llara.py", options | weights | {"dtype": DTYPE, "save-every": 20})
    return model


def measure_tuned(args, model: Path, arm: str, seed: int, samples: list[Path]) -> list[float]:
    """Fine-tunes a copy of the model, measures it, and removes it: half a gigabyte each."""
    retriever = args.output / f"{arm}-{seed}-tuned"
    if not (args.output / "results" / retriever.name).exists():
        options = {"stage": "finetune", "model": model, "data": args.pairs, "output": retriever}
        options |= {"seed": seed, "query-prompt": "self", "dtype": DTYPE} | TUNE | LENGTHS
        run(args.output, "llara.py", options | {"save-every": TUNE["steps"]})
    values = measure(args.output, retriever, samples)
    shutil.rmtree(retriever, ignore_errors=True)
    return values


# ---- the table -----------------------------------------------------------------------------------


def show(started: float, name: str, values: list[float]) -> None:
    minutes = (time.time() - started) / 60
    numbers = " ".join(f"{value:.4f}" for value in [*values, sum(values) / len(values)])
    print(f"{minutes:6.1f} min  {name:20} {numbers}", flush=True)


def table_row(pairs: str, name: str, runs: list[list[float]]) -> str:
    """runs: nDCG@10 by seed, then by collection. Means, and the spread of the mean over seeds."""
    by_collection = [sum(column) / len(column) for column in zip(*runs, strict=True)]
    by_seed = [sum(values) / len(values) for values in runs]
    cells = [f"{value:.3f}" for value in [*by_collection, sum(by_seed) / len(by_seed)]]
    spread = f"{max(by_seed) - min(by_seed):.3f}" if len(runs) > 1 else ""
    return f"| {pairs} | {name} | {' | '.join(cells)} | {spread} |"


def print_table(samples: list[Path], of_bm25: list[float], plain: dict, tuned: dict) -> None:
    """plain, tuned: {arm: nDCG@10 by seed, then by collection}, before and after fine-tuning."""
    print(f"\n| labelled pairs | model | {' | '.join(s.name for s in samples)} | mean | spread |")
    print("|" + "---|" * (len(samples) + 4))
    print(table_row("none", "BM25, no stemming", [of_bm25]))
    for pairs, runs in (("none", plain), (TUNE["steps"] * TUNE["batch-size"], tuned)):
        for arm, (name, _) in ARMS.items():
            print(table_row(pairs, name, runs[arm]))
    print(f"\nnDCG@10, mean of {len(SEEDS)} seeds; spread: of the seeds' means, max - min")


# ---- main ----------------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--model", required=True, help="folder or hub name of the base")
    add("--text", required=True, help="articles to adapt to, .jsonl")
    add("--pairs", required=True, help="labelled pairs to fine-tune on, .jsonl")
    add("--collections", required=True, nargs="+", metavar="FOLDER:SPLIT", help="BEIR layout")
    add("--output", type=Path, default=Path("claim"), help="default: claim")
    add("--quick", action="store_true", help="shows that all of it runs; numbers mean nothing")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    started = time.time()
    llara.transformers_logging.disable_progress_bar()
    if args.quick:
        SEEDS[:] = [0]
        SAMPLE.update(queries=30, passages=100)
        ADAPT["steps"], TUNE["steps"] = 4, 2

    # A folder with results of other settings would be taken for these.
    args.output.mkdir(parents=True, exist_ok=True)
    settings = [args.model, args.text, args.pairs, args.collections]
    settings += [SEEDS, SAMPLE, ADAPT, TUNE, LENGTHS, DTYPE]
    settings_file = args.output / "settings.json"
    if settings_file.exists() and json.loads(settings_file.read_text()) != settings:
        sys.exit(f"--output {args.output}: was made with other settings: name another")
    settings_file.write_text(json.dumps(settings))

    samples, of_bm25 = [], []
    for collection in args.collections:
        folder, _, split = collection.rpartition(":")
        samples.append(args.output / "samples" / Path(folder).resolve().name)
        write_sample(Path(folder), split, samples[-1])
        of_bm25.append(bm25(samples[-1]))
    show(started, "BM25", of_bm25)

    # The base with its special tokens. It has its name only when it is whole.
    if not (args.output / "base").exists():
        part = args.output / "base-part"
        llara.save(*llara.load(args.model), part)
        part.rename(args.output / "base")

    plain: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    tuned: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    for seed in SEEDS:
        for arm, (_, weight) in ARMS.items():
            model = adapted(args, arm, seed)
            if weight is not None or seed == SEEDS[0]:  # the base as it is has no seed
                plain[arm].append(measure(args.output, model, samples))
                show(started, model.name, plain[arm][-1])
            tuned[arm].append(measure_tuned(args, model, arm, seed, samples))
            show(started, f"{arm}-{seed}-tuned", tuned[arm][-1])
    print_table(samples, of_bm25, plain, tuned)
    print(f"{(time.time() - started) / 60:.0f} minutes", flush=True)


if __name__ == "__main__":
    main()
