# SPDX-License-Identifier: MIT
"""How fast llara is, as ratios to what it cannot be faster than: one table in a few minutes.

python .ci/bench.py          # needs nothing but llara's own packages
python .ci/bench.py search   # some rows alone: step, encode, search, data, dtype, start, gpu

What is compared runs in turns in one process, and the least time of each counts: other work on the
machine can only add to it. Where they are installed, sentence-transformers and faiss stand beside.
"""

import importlib.util
import json
import multiprocessing
import os
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

import eval as evaluation
import llara

VOCABULARY = 32016
LENGTHS = [100, 159, 218, 277, 335, 394, 453, 512]  # of eight passages
PROMPTS = llara.Prompts(
    [1, 5], [*range(60, 71), *range(100, 108)], [*range(71, 81), *range(108, 116)], 8
)
WEIGHTS = (1.0, 0.5, 0.5)
CPU = torch.device("cpu")


def report(what: str, value: str) -> None:
    print(f"{what:78} {value}", flush=True)


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def in_turns(*functions: Callable, turns: int = 5) -> list[float]:
    """The least seconds of each, after a first turn that does not count."""
    least = [float("inf")] * len(functions)
    for turn in range(turns + 1):
        for i, function in enumerate(functions):
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn > 0:
                least[i] = min(least[i], time.perf_counter() - start)
    return least


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def peak_mb() -> float:
    """Of this process. getrusage would give the parent's, if that was larger when it forked."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status).group(1)) / 2**10


def in_new_process(function: Callable, *args):
    """Its memory is then nothing but its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


# ---- a step of adaptation ------------------------------------------------------------------------


def reference_model(checkpointing: bool = False) -> llara.Llara:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    lm = LlamaForCausalLM(config)
    if checkpointing:
        llara.enable_checkpointing(lm)
    return llara.Llara(lm, PROMPTS).train()


def reference_examples() -> list[llara.Example]:
    random = np.random.default_rng(0)
    examples = []
    for length in LENGTHS:
        passage = random.integers(200, VOCABULARY, length).tolist()
        examples.append((passage, sorted(set(passage[:150])), sorted(set(passage[-150:]))))
    return examples


def ours(model: llara.Llara, micro_batches: list[list[llara.Example]]) -> None:
    model.zero_grad()
    llara.adaptation_step(model, micro_batches, WEIGHTS, CPU)


def floor(model: llara.Llara, examples: list[llara.Example]) -> None:
    """The body forward and backward on the same batch, and three head products for its passages."""
    model.zero_grad()
    batch = llara.collate(examples, PROMPTS)
    mask, positions = llara.joint_mask(
        batch["self_start"], len(PROMPTS.SELF), batch["input_ids"].shape[1]
    )
    hidden = model.lm.model(
        input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state  # (B, L, d)
    hidden.sum().backward()
    with torch.no_grad():
        weight = model.lm.lm_head.weight  # (V, d)
        states = hidden.flatten(0, 1)[: sum(LENGTHS)]  # (N, d)
        for start in range(0, len(states), 512):
            part = states[start : start + 512]  # (c, d)
            logits = part @ weight.T  # (c, V)
            logits @ weight
            logits.T @ part


def memory_of(step: Callable, checkpointing: bool, batch) -> float:
    """MB at the peak of a step, gradients included, above the process that holds the model."""
    torch.set_num_threads(1)
    model = reference_model(checkpointing)
    with llara.process_group():
        before = resident_mb()
        step(model, batch)
        return peak_mb() - before


def bench_step() -> None:
    examples = reference_examples()
    pairs = [examples[i : i + 2] for i in range(0, len(examples), 2)]
    for checkpointing in (False, True):
        model = reference_model(checkpointing)
        one, four, least = in_turns(
            lambda model=model: ours(model, [examples]),
            lambda model=model: ours(model, pairs),
            lambda model=model: floor(model, examples),
        )
        name = "adaptation step" + (", checkpointing" if checkpointing else "")
        report(f"{name}: same batch / floor", f"{one / least:.2f} ({one:.2f} s)")
        report(f"{name}: micro-batches of like lengths / floor", f"{four / least:.2f}")
        whole = in_new_process(memory_of, ours, checkpointing, [examples])
        parts = in_new_process(memory_of, ours, checkpointing, pairs)
        bare = in_new_process(memory_of, floor, checkpointing, examples)
        report(f"{name}: MB above the model, same batch / floor", f"{whole:.0f} / {bare:.0f}")
        report(f"{name}: MB above the model, micro-batches of two", f"{parts:.0f}")


# ---- encoding ------------------------------------------------------------------------------------


def texts_of_python(n: int) -> list[str]:
    """Of 5 to 200 words each."""
    words = " ".join(topics.values()).split()
    random = np.random.default_rng(0)
    starts = random.integers(0, len(words) - 200, n)
    return [" ".join(words[start : start + random.integers(5, 200)]) for start in starts]


def save_reference(folder: Path) -> AutoTokenizer:
    """A folder with the reference model, and a tokenizer of Python's documentation."""
    llara.make_small_model(topics.values(), folder, VOCABULARY)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lm = reference_model().lm
    llara.save(lm, tokenizer, folder)
    return tokenizer


def bench_encode() -> None:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = save_reference(Path(folder))
        model = reference_model().lm.eval()
        texts = texts_of_python(256)
        prompts = llara.make_prompts(tokenizer)
        ids = tokenizer(texts, add_special_tokens=False, split_special_tokens=True).input_ids
        rows = sorted((prompts.around(row, "self", 512) for row in ids), key=len, reverse=True)
        batches = [llara.pad(rows[i : i + 32]) for i in range(0, len(rows), 32)]
        one = llara.pad([prompts.around(ids[0][:12], "next", 64)])
        query = tokenizer.decode(ids[0][:12])

        @torch.inference_mode()
        def bare(batches):
            for batch in batches:
                model.model(input_ids=batch, use_cache=False)

        functions = [
            lambda: llara.encode(model, tokenizer, texts),
            lambda: bare(batches),
        ]
        if installed("sentence_transformers"):
            from sentence_transformers import SentenceTransformer

            theirs = SentenceTransformer(modules=[llara.Sentences(folder)], device="cpu")
            functions.append(lambda: theirs.encode_document(texts))
        encoded, forward, *others = in_turns(*functions, turns=3)
        report("encode, 256 texts of 5 to 200 words / bare forward", f"{encoded / forward:.2f}")
        for seconds in others:
            report("sentence-transformers / encode, same texts", f"{seconds / encoded:.2f}")
        encoded, forward = in_turns(
            lambda: llara.encode(model, tokenizer, query, "next", 64),
            lambda: bare([one]),
            turns=50,
        )
        report("encode, one query / bare forward", f"{encoded / forward:.2f}")


# ---- search --------------------------------------------------------------------------------------


def bench_search() -> None:
    for width in (384, 1024):
        for k in (100, 1000):
            compare_search(200_000, width, k)


def compare_search(n: int, width: int, k: int) -> None:
    random = np.random.default_rng(0)
    passages = random.standard_normal((n, width), dtype=np.float32)
    queries = torch.from_numpy(random.standard_normal((1000, width), dtype=np.float32))
    size = evaluation.BLOCK * evaluation.CHUNK
    blocks = [
        (passages[start : start + size], np.arange(start, min(n, start + size)))
        for start in range(0, n, size)
    ]

    def multiply():
        for embeddings, _ in blocks:
            queries @ torch.from_numpy(embeddings).T

    functions = [lambda: evaluation.search(queries, blocks, k), multiply]
    if installed("faiss"):
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatIP(width)
        index.add(passages)
        functions.append(lambda: index.search(queries.numpy(), k))
    searched, multiplied, *others = in_turns(*functions, turns=3)
    name = f"search, {n:,} x {width}, 1,000 queries, top {k}"
    report(f"{name} / bare product", f"{searched / multiplied:.2f}")
    for seconds in others:
        report(f"{name} / faiss IndexFlatIP", f"{searched / seconds:.2f}")


# ---- data ----------------------------------------------------------------------------------------


def write_articles(path: Path, size: int) -> None:
    """`size` bytes of articles of 20,000 characters or so."""
    text = " ".join(topics.values())
    with open(path, "w", encoding="utf-8") as file:
        written = 0
        while written < size:
            start = written % (len(text) - 20_000)
            row = {"title": f"Article {written}", "text": text[start : start + 20_000]}
            written += file.write(json.dumps(row) + "\n")


def open_articles(path: Path, folder: str) -> llara.Adaptation:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    args = SimpleNamespace(max_length=512, batch_size=32, micro_batch_size=8, seed=0)
    return llara.Adaptation(llara.Rows([path]), tokenizer, llara.make_prompts(tokenizer), args)


class TimedTokenizer:
    """The tokenizer, and the seconds spent in it."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.seconds = 0.0

    def __call__(self, *args, **kwargs):
        start = time.perf_counter()
        encoded = self.tokenizer(*args, **kwargs)
        self.seconds += time.perf_counter() - start
        return encoded


def bench_data() -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_reference(Path(folder))
        path = Path(folder, "articles.jsonl")
        write_articles(path, 20_000_000)
        dataset = open_articles(path, folder)
        timed = TimedTokenizer(dataset.tokenizer)
        dataset.tokenizer = timed
        dataset[0]
        timed.seconds = 0.0
        start = time.perf_counter()
        for step in range(1, 21):
            dataset[step]
        seconds = time.perf_counter() - start
        report("data: examples of 512 tokens a second, one worker", f"{20 * 32 / seconds:.0f}")
        report(
            "data: share of its time outside the tokenizer", f"{1 - timed.seconds / seconds:.0%}"
        )


def startup(path: Path, folder: str) -> tuple[float, float]:
    """Seconds, and MB above the process that has imported all."""
    AutoTokenizer.from_pretrained(folder)
    before = resident_mb()
    start = time.perf_counter()
    open_articles(path, folder)
    return time.perf_counter() - start, peak_mb() - before


def bench_start() -> None:
    with tempfile.TemporaryDirectory() as folder:
        save_reference(Path(folder))
        path = Path(folder, "articles.jsonl")
        write_articles(path, 2**30)
        seconds, memory = in_new_process(startup, path, folder)
        report("start-up on 1 GiB of articles", f"{seconds:.1f} s, {memory:.0f} MB")


# ---- number formats ------------------------------------------------------------------------------


def bench_dtype() -> None:
    examples = reference_examples()
    single, half = reference_model(), reference_model().to(torch.bfloat16)
    seconds = in_turns(
        lambda: ours(single, [examples]),
        lambda: ours(half, [examples]),
        turns=3,
    )
    report("adaptation step: float32 / bfloat16 on this CPU", f"{seconds[0] / seconds[1]:.2f}")


# ---- on a GPU ------------------------------------------------------------------------------------


def bench_gpu() -> None:
    """A slice of LLaMA-2-7B: 4 of its 32 layers, 1,024 tokens, checkpointing, bfloat16."""
    device = llara.pick_device()
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=4,
        num_attention_heads=32,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        dtype=torch.bfloat16,
    )
    with device:
        lm = LlamaForCausalLM(config).to(torch.bfloat16)
    llara.enable_checkpointing(lm)
    model = llara.Llara(lm, PROMPTS).train()
    n_weights = llara.count_weights_per_token(lm, "adapt")
    room = 1024 - len(PROMPTS.prefix) - len(PROMPTS.SELF) - len(PROMPTS.NEXT)
    passage = np.random.default_rng(0).integers(200, VOCABULARY, room).tolist()
    example = (passage, sorted(set(passage)), sorted(set(passage)))
    size = 1
    while True:
        micro_batch = [example] * size

        def step(micro_batch=micro_batch):
            model.zero_grad()
            llara.adaptation_step(model, [micro_batch], WEIGHTS, device)

        try:
            (seconds,) = in_turns(step, turns=3)
        except torch.OutOfMemoryError:
            report("7B slice: largest micro-batch of 1,024 tokens", f"{size // 2}")
            return
        tokens = size * 1024
        attention = config.num_hidden_layers * config.hidden_size * size * 1024**2
        flops = 6 * (n_weights * tokens + attention) / seconds
        name = torch.cuda.get_device_name()
        peaks = [peak for card, peak in llara.PEAK_FLOPS.items() if card in name]
        mfu = f", MFU {flops / peaks[0]:.0%}" if peaks else ""
        memory = torch.cuda.max_memory_allocated() / 2**30
        report(
            f"7B slice on {name}, micro-batch {size}",
            f"{tokens / seconds:.0f} tokens/s{mfu}, {memory:.1f} GiB",
        )
        size *= 2


BENCHES = {
    "step": bench_step,
    "encode": bench_encode,
    "search": bench_search,
    "data": bench_data,
    "dtype": bench_dtype,
    "start": bench_start,
}
if torch.cuda.is_available():
    BENCHES["gpu"] = bench_gpu


def main() -> None:
    unknown = set(sys.argv[1:]) - BENCHES.keys()
    if unknown:
        sys.exit(f"no such rows: {sorted(unknown)}; there are {list(BENCHES)}")
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    report("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    with llara.process_group():
        for name, bench in BENCHES.items():
            if name in (sys.argv[1:] or BENCHES):
                bench()


if __name__ == "__main__":
    main()
