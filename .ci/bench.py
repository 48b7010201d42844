# SPDX-License-Identifier: MIT
"""How fast llara is, as ratios to what it cannot be faster than: one table in a few minutes.

python .ci/bench.py        # on the CPU: step, encode, search, data
python .ci/bench.py gpu    # on a GPU: the shapes of the README's table "how long", in five minutes

What is compared runs in turns in one process, and the least time of each counts: other work on the
machine can only add to it. faiss stands beside where it is installed.
"""

import importlib.util
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import eval as evaluation
import llara

V = 32016
PROMPTS = llara.Prompts(
    [1, 5], [*range(60, 71), *range(100, 108)], [*range(71, 81), *range(108, 116)], 8
)
WEIGHTS = (1.0, 0.5, 0.5)
PEAK_TFLOPS = 989  # of an H100 or H200 in bfloat16, dense
SHAPES = {  # width, inner width, layers, heads, heads of keys; sequences, shortest, longest passage
    "reference": ((384, 1024, 6, 6, 6), (8, 100, 512)),
    "135M": ((576, 1536, 30, 9, 3), (64, 80, 115)),
    "1.1B": ((2048, 5632, 22, 32, 4), (8, 300, 985)),
    "7B, 4 layers": ((4096, 11008, 4, 32, 32), (8, 300, 985)),
    "7B, 8 layers": ((4096, 11008, 8, 32, 32), (8, 300, 985)),
}


def report(what: str, value: str) -> None:
    print(f"{what:78} {value}", flush=True)


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


def config_of(name: str) -> LlamaConfig:
    (width, inner, layers, heads, key_heads), _ = SHAPES[name]
    return LlamaConfig(
        vocab_size=V,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        tie_word_embeddings=False,
    )


def make_model(name: str, device, checkpointing: bool = False) -> llara.Llara:
    torch.manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with device:
        lm = LlamaForCausalLM._from_config(config_of(name), attn_implementation="sdpa", dtype=dtype)
    if checkpointing:
        lm.activation_checkpointing_enable({"use_reentrant": False})
    return llara.Llara(lm, PROMPTS).train()


def make_examples(name: str) -> list[llara.Example]:
    random = np.random.default_rng(0)
    examples = []
    for length in np.linspace(*SHAPES[name][1][1:], SHAPES[name][1][0]).astype(int):
        passage = random.integers(200, V, length).tolist()
        examples.append((passage, sorted(set(passage[:150])), sorted(set(passage[-150:]))))
    return examples


def ours(model: llara.Llara, micro_batches: list[list[llara.Example]], device) -> None:
    model.zero_grad()
    llara.adaptation_step(model, micro_batches, WEIGHTS, device)


def floor(model: llara.Llara, examples: list[llara.Example], device, masked: bool) -> None:
    """The body forward and backward on the same batch, and three head products for its passages.

    masked: with our mask; else with the kernel for causal attention, which no mask allows.
    """
    model.zero_grad()
    batch = {key: value.to(device) for key, value in llara.collate(examples, PROMPTS).items()}
    ids = batch["input_ids"]  # (B, L)
    mask, positions = llara.joint_mask(batch["self_start"], len(PROMPTS.SELF), ids.shape[1])
    inputs = {"attention_mask": mask, "position_ids": positions} if masked else {}
    hidden = model.lm.model(input_ids=ids, use_cache=False, **inputs).last_hidden_state  # (B, L, d)
    hidden.sum().backward()
    with torch.no_grad():
        weight = model.lm.lm_head.weight  # (V, d)
        states = hidden.flatten(0, 1)[: int(batch["counts"][0])]  # (N, d)
        for start in range(0, len(states), 512):
            part = states[start : start + 512]  # (c, d)
            logits = part @ weight.T  # (c, V)
            logits @ weight
            logits.T @ part


def memory_of(is_ours: bool, checkpointing: bool) -> float:
    """MB at the peak of a step on the CPU, above a process that holds the model."""

    def status(key: str) -> float:
        text = Path("/proc/self/status").read_text()
        return int(re.search(rf"{key}:\s+(\d+) kB", text).group(1)) / 2**10

    torch.set_num_threads(1)
    device = torch.device("cpu")
    model, examples = make_model("reference", device, checkpointing), make_examples("reference")
    with llara.process_group():
        before = status("VmRSS")
        if is_ours:
            ours(model, [examples], device)
        else:
            floor(model, examples, device, masked=True)
        return status("VmHWM") - before


def bench_step(name: str, device) -> None:
    examples = make_examples(name)
    n_tokens = sum(len(passage) + 39 for passage, *_ in examples)
    for checkpointing in (False, True):
        model = make_model(name, device, checkpointing)
        one, masked, causal = in_turns(
            lambda model=model: ours(model, [examples], device),
            lambda model=model: floor(model, examples, device, True),
            lambda model=model: floor(model, examples, device, False),
        )
        label = f"step, {name}{', checkpointing' if checkpointing else ''}"
        report(f"{label} / floor with the mask, causal", f"{one / masked:.2f}, {one / causal:.2f}")
        report(f"{label}: seconds, tokens/s", f"{one:.3f}, {n_tokens / one:.0f}")
        if device.type == "cuda":
            report(f"{label}: GiB", f"{torch.cuda.max_memory_allocated() / 2**30:.1f}")
            torch.cuda.reset_peak_memory_stats()
            continue
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            pairs = [(True, checkpointing), (False, checkpointing)]
            peaks = [pool.apply(memory_of, pair) for pair in pairs]
        report(f"{label}: MB above the model / the floor's", "{:.0f} / {:.0f}".format(*peaks))


def bench_encode(name: str, device) -> None:
    words = " ".join(topics.values()).split()
    random = np.random.default_rng(0)
    starts = random.integers(0, len(words) - 200, 256)
    texts = [" ".join(words[start : start + random.integers(5, 200)]) for start in starts]
    with tempfile.TemporaryDirectory() as folder:
        llara.make_small_model(topics.values(), Path(folder), V)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    model = make_model(name, device).lm.eval()
    prompts = llara.make_prompts(tokenizer)
    rows = [prompts.around(ids, "self", 512) for ids in llara.tokenize(tokenizer, texts)]
    rows.sort(key=len, reverse=True)
    batches = [llara.pad(rows[i : i + 32]).to(device) for i in range(0, len(rows), 32)]

    @torch.inference_mode()
    def bare():
        for batch in batches:
            model.model(input_ids=batch, use_cache=False)

    encoded, forward = in_turns(lambda: llara.encode(model, tokenizer, texts), bare, turns=3)
    report(
        f"encode, {name}, 256 texts of 5 to 200 words / bare forward", f"{encoded / forward:.2f}"
    )


def bench_search(n: int, width: int, device) -> None:
    random = np.random.default_rng(0)
    passages = random.standard_normal((n, width), dtype=np.float32)
    queries = torch.from_numpy(random.standard_normal((1000, width), dtype=np.float32))
    size = evaluation.BLOCK * evaluation.CHUNK
    blocks = [(passages[i : i + size], np.arange(i, min(n, i + size))) for i in range(0, n, size)]
    for k in (100, 1000):
        functions = [lambda k=k: evaluation.search(queries.to(device), blocks, k)]
        if device.type == "cpu" and importlib.util.find_spec("faiss"):
            import faiss

            faiss.omp_set_num_threads(torch.get_num_threads())
            index = faiss.IndexFlatIP(width)
            index.add(passages)
            functions.append(lambda k=k, index=index: index.search(queries.numpy(), k))
        seconds, *others = in_turns(*functions, turns=2)
        label = f"search, {n:,} x {width}, 1,000 queries, top {k}"
        report(f"{label}: seconds", f"{seconds:.2f}")
        for other in others:
            report(f"{label} / faiss IndexFlatIP", f"{seconds / other:.2f}")


def write_articles(path: Path, size: int) -> None:
    """`size` bytes of articles of 20,000 characters or so."""
    text = " ".join(topics.values())
    with open(path, "w", encoding="utf-8") as file:
        written = 0
        while written < size:
            start = written % (len(text) - 20_000)
            row = {"title": f"Article {written}", "text": text[start : start + 20_000]}
            written += file.write(json.dumps(row) + "\n")


def bench_data() -> None:
    with tempfile.TemporaryDirectory() as folder:
        llara.make_small_model(topics.values(), Path(folder), V)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        path = Path(folder, "articles.jsonl")
        write_articles(path, 2**30)
        start = time.perf_counter()
        prompts, batches = llara.make_prompts(tokenizer), llara.Batches(32, 8)
        data = llara.Adaptation(llara.Rows([path]), tokenizer, prompts, batches, 512)
        report("start-up on 1 GiB of articles: seconds", f"{time.perf_counter() - start:.1f}")
        data[0]
        start = time.perf_counter()
        for step in range(1, 21):
            data[step]
        seconds = time.perf_counter() - start
        report("data: examples of 512 tokens a second, one worker", f"{20 * 32 / seconds:.0f}")


def bench_train(name: str) -> None:
    """Through all of `train`, by its own log: the median of the later steps."""
    with tempfile.TemporaryDirectory() as folder:
        llara.make_small_model(topics.values(), Path(folder, "base"), V)
        LlamaForCausalLM(config_of(name)).to(torch.bfloat16).save_pretrained(Path(folder, "base"))
        write_articles(Path(folder, "articles.jsonl"), 20_000_000)
        longest = "160" if name == "135M" else "1024"
        batch_size = "64" if torch.cuda.is_available() else "4"
        flags = ["--max-length", longest, "--steps", "12", "--batch-size", batch_size]
        flags += ["--gradient-checkpointing"]
        subprocess.run(
            [sys.executable, llara.__file__, "--data", "articles.jsonl", "--model", "base", *flags],
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        log = Path(folder, "out", "log.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in log[4:]]
    for key in ("tokens/s", "TFLOP/s", "GiB"):
        if key in rows[0]:
            report(f"train, {name}: {key}", f"{np.median([row[key] for row in rows]):.3f}")
    if "TFLOP/s" in rows[0]:
        share = np.median([row["TFLOP/s"] for row in rows]) / PEAK_TFLOPS
        report(f"train, {name}: MFU on an H100 or H200", f"{share:.3f}")


def main() -> None:
    gpu = sys.argv[1:] == ["gpu"]
    with llara.process_group():
        device = llara.pick_device()[0] if gpu else torch.device("cpu")
        card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
        report(f"torch {torch.__version__}", f"{card}, {torch.get_num_threads()} threads")
        # Without a GPU, `gpu` is a dry run with the reference shape alone.
        shapes = list(SHAPES)[1:] if device.type == "cuda" else ["reference"]
        for name in shapes:
            bench_step(name, device)
        bench_encode(shapes[0], device)
        if gpu:
            bench_search(1_000_000 if device.type == "cuda" else 50_000, 1024, device)
            for name in shapes[:2]:
                bench_train(name)
        else:
            bench_search(200_000, 384, device)
            bench_search(200_000, 1024, device)
            bench_data()


if __name__ == "__main__":
    main()
