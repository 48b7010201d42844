# SPDX-License-Identifier: MIT
"""How fast llara is, as ratios to what it cannot be faster than: one table in a few minutes.

python .ci/bench.py        # on the CPU: step, encode, search, data
python .ci/bench.py gpu    # on a GPU: the shapes of the README's table "how long", in five minutes
python .ci/bench.py scale  # on the CPU: llara.py and eval.py at the sizes that they are made for

What is compared runs in turns in one process, and the least time of each counts: other work on the
machine can only add to it. faiss stands beside where it is installed.

`scale` is a rehearsal with tiny models and made-up data: 8 ranks and steps of 256 x 1,024 tokens
that are killed and go on, two nodes on one machine, an index of 2 GB, and a million passages. It
takes some 40 minutes on two cores and 5 GB of disk; --tenth is a tenth of the size. A promise that
did not hold is a line FAILED, and the exit code is then 1.
"""

import argparse
import contextlib
import importlib.util
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

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
    item = {"micro_batches": [llara.collate(examples, PROMPTS) for examples in micro_batches]}
    llara.Adaptation.step(SimpleNamespace(weights=WEIGHTS), model, item, device, seed=0)


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
    size = evaluation.CHUNK
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
    """Reading at the paper's length; and what the thread that reads costs a step beside it."""
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        llara.make_small_model(topics.values(), Path(folder), V)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        path = Path(folder, "articles.jsonl")
        write_articles(path, 2**30)
        start = time.perf_counter()
        prompts, batches = llara.make_prompts(tokenizer), llara.Batches(64, 8)
        data = llara.Adaptation(llara.Rows([path]), tokenizer, prompts, batches, 1024)
        report("start-up on 1 GiB of articles: seconds", f"{time.perf_counter() - start:.1f}")
        data.read(0)
        start = time.process_time()
        n_tokens = sum(data.read(step)["tokens"] for step in range(1, 11))
        rate = n_tokens / (time.process_time() - start)
        report("data: tokens a CPU second, 64 examples of 1,024 tokens a step", f"{rate:,.0f}")

        model, examples = make_model("reference", device), make_examples("reference")
        with ThreadPoolExecutor(1) as reader:
            reading: list = []

            def beside() -> None:
                reading.append(reader.submit(data.read, 0))
                ours(model, [examples], device)

            def rest() -> None:  # of the reading, if the step was shorter
                reading.pop().result()

            alone, with_reading, _ = in_turns(
                lambda: ours(model, [examples], device), beside, rest, turns=3
            )
        report(
            "step alone, beside the thread that reads: seconds", f"{alone:.2f}, {with_reading:.2f}"
        )


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


# ---- scale: a rehearsal at the size that it is made for ------------------------------------------

FAILED: list[str] = []
EVERYBODY = range(-1, 8)  # torchrun and its ranks
N_STEPS = 12
MS_MARCO, DEV, TRAIN = 8_841_823, 6_980, 502_939  # passages, queries of dev, queries of train
BOUNDS = {"dev": (2.5, 1.5), "mining": (8.0, 5.0)}  # GB, of rank 0 and of the others


def promise(what: str, holds: bool, value: str = "") -> None:
    report(what, value or ("yes" if holds else "no"))
    if not holds:
        FAILED.append(f"{what} {value}".strip())


def start(folder: Path, script: str, ranks: int, flags: list[str], *nodes: str) -> subprocess.Popen:
    """Runs llara.py or eval.py in `folder`, on one rank without torchrun, and adds to said.txt."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *nodes]
    path = Path(llara.__file__).with_name(script)
    command = [sys.executable, *(launcher if ranks > 1 else []), path, *flags]
    with open(folder / "said.txt", "ab") as said:
        return subprocess.Popen(command, cwd=folder, stdout=said, stderr=said)


def processes(folder: Path) -> dict[int, int]:
    """{process: its rank, -1 for torchrun} of all that work in `folder`, orphans included."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if not (entry / "cwd").readlink().is_relative_to(folder):
                continue
            rank = re.search(rb"\0RANK=(\d+)", (entry / "environ").read_bytes())
            is_torchrun = b"torch.distributed.run" in (entry / "cmdline").read_bytes()
        except OSError:  # it has ended, or belongs to somebody else
            continue
        found[int(entry.name)] = -1 if is_torchrun else int(rank[1]) if rank else 0
    return found


def kill(folder: Path, ranks: Iterable[int], number: int = signal.SIGKILL) -> None:
    """Signals the processes of these ranks, in any order."""
    for process, rank in processes(folder).items():
        if rank in ranks:
            os.kill(process, number)


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def exit_code(process: subprocess.Popen, folder: Path, seconds: float = 1800) -> int:
    """When it has ended; what hangs is killed, with all in `folder`, and its code is -9."""
    if not wait_for(lambda: process.poll() is not None, seconds):
        kill(folder, EVERYBODY)
    return process.wait()


def expect_end(what: str, folder: Path, seconds: float) -> None:
    """All processes in `folder` should end by themselves within some seconds."""
    begin = time.monotonic()
    has_ended = wait_for(lambda: not processes(folder), seconds)
    value = f"{time.monotonic() - begin:.1f}" if has_ended else f"not within {seconds:.0f}"
    promise(f"{what}: seconds until no process is left", has_ended, value)
    kill(folder, EVERYBODY)
    wait_for(lambda: not processes(folder), 10)


def run_to_end(what: str, folder: Path, script: str, ranks: int, flags: list[str]) -> float:
    """-> the seconds it took."""
    begin = time.monotonic()
    code = exit_code(start(folder, script, ranks, flags), folder)
    if code:
        lines = (folder / "said.txt").read_text().splitlines()
        own = [line for line in lines if line.startswith(script) or "Error: " in line]
        promise(what, False, f"exit code {code}: {(own or lines)[-1]}")
    return time.monotonic() - begin


def safe_step(output: Path) -> int:
    file = output / "run.json"
    return json.loads(file.read_text())["step"] if file.exists() else 0


def read_log(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def compare_logs(what: str, output: Path, unbroken: Path, tolerance: float) -> None:
    rows, expected = read_log(output), read_log(unbroken)
    steps = [row["step"] for row in rows]
    promise(f"{what}: each step once in the log", steps == list(range(len(expected))))
    differences = [
        abs(row["loss"] - other["loss"]) / abs(other["loss"])
        for row, other in zip(rows, expected, strict=False)
    ]
    value = f"{max(differences):.1e}"
    promise(f"{what}: losses of an unbroken run, relative", max(differences) <= tolerance, value)


def write_wikipedia(path: Path, words: list[str], n_articles: int, words_a_token: float) -> None:
    """Articles of 775 tokens in the mean, most of them shorter, as in Wikipedia."""
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(np.log(775) - 0.5, 1.0, n_articles) * words_a_token
    with open(path, "w", encoding="utf-8") as file:
        for i, length in enumerate(lengths.astype(int) + 1):
            begin = generator.integers(len(words) - min(length, len(words) // 2))
            text = " ".join(words[begin : begin + length])
            file.write(json.dumps({"title": f"Article {i}", "text": text}) + "\n")


def write_pairs(path: Path, words: list[str], n: int) -> None:
    """A query of four words, the passage of eight that has them, and fifteen others."""
    generator = np.random.default_rng(0)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(n):
            positive, *negatives = (
                " ".join(row) for row in generator.choice(words, (16, 8)).tolist()
            )
            query = " ".join(positive.split()[:4])
            file.write(json.dumps({"query": query, "pos": [positive], "neg": negatives}) + "\n")


def rehearse_kills(what: str, folder: Path, flags: list[str]) -> None:
    """A run of 8 ranks, killed in four ways, goes on on 8, 4 and 1, and is what it would have been.

    After each step a checkpoint. The moment is within the next step, or within its checkpoint.
    """
    flags = [*flags, "--steps", str(N_STEPS), "--save-every", "1"]
    unbroken, output = folder / "unbroken", folder / "killed"
    seconds = run_to_end(what, folder, "llara.py", 8, [*flags, "--output", "unbroken"])
    report(
        f"{what}: seconds of {N_STEPS} steps on 8 ranks, start and end included", f"{seconds:.0f}"
    )
    flags += ["--output", "killed", "--resume"]
    for way, ranks, killed, number in (
        ("kill -9 of a rank", 8, [3], signal.SIGKILL),
        ("kill -9 of all", 8, EVERYBODY, signal.SIGKILL),
        ("SIGTERM to torchrun", 8, [-1], signal.SIGTERM),
        ("kill -9 of torchrun", 4, [-1], signal.SIGKILL),
    ):
        before = safe_step(output)
        process = start(folder, "llara.py", ranks, flags)
        went_on = wait_for(lambda before=before: safe_step(output) > before, 300)
        promise(f"{what}, on {ranks} ranks from step {before}: goes on", went_on)
        time.sleep(random.uniform(0, 0.3))
        kill(folder, killed, number)
        expect_end(f"{what}, {way}", folder, 45)  # torchrun itself waits for 30
        code = process.wait()
        promise(f"{what}, {way}: exit code is not 0", code != 0, str(code))
        promise(f"{what}, {way}: ended before the last step", safe_step(output) < N_STEPS)
        if number == signal.SIGTERM:
            is_saved = len(read_log(output)) == safe_step(output)
            promise(f"{what}, {way}: the last step in the log is saved", is_saved)
    run_to_end(f"{what}, resumed on one rank", folder, "llara.py", 1, flags)
    compare_logs(what, output, unbroken, 1e-4)


def rehearse_random_kills(folder: Path, flags: list[str], kills: int) -> None:
    """Killed again and again: at any moment of its start, and soon after a checkpoint, in turns."""
    flags = [*flags, "--steps", "300", "--save-every", "3"]
    for ranks in (1, 2):
        what, output = f"random kills, {ranks} ranks", folder / f"killed-{ranks}"
        unbroken = folder / f"unbroken-{ranks}"
        seconds = run_to_end(what, folder, "llara.py", ranks, [*flags, "--output", unbroken.name])
        resume = [*flags, "--output", output.name, "--resume"]
        lost = 0
        for number in range(kills // 2):
            before = safe_step(output)
            process = start(folder, "llara.py", ranks, resume)
            if number % 2:
                wait_for(lambda out=output, then=before: safe_step(out) > then, 100)
            time.sleep(random.uniform(0, 0.3 if number % 2 else seconds / 2))
            kill(folder, EVERYBODY)
            process.wait()
            wait_for(lambda: not processes(folder), 10)
            step = safe_step(output)
            is_there = step in (0, 300) or (output / f"checkpoint-{step:08d}").is_dir()
            lost += step < before or not is_there
        value = f"{lost} of {kills // 2}, at step {safe_step(output)} of 300"
        promise(f"{what}: kills that lost what was safe", lost == 0, value)
        run_to_end(f"{what}, resumed", folder, "llara.py", ranks, resume)
        compare_logs(what, output, unbroken, 0.0 if ranks == 1 else 1e-4)
        promise(f"{what}: no checkpoint is left", not list(output.glob("checkpoint-*")))


def rehearse_two_nodes(folder: Path, flags: list[str]) -> None:
    """Two torchruns of four ranks on one machine, as two nodes: the README's own command."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    folders = [folder / "node0", folder / "node1"]
    for node in folders:
        node.mkdir()

    def start_both(output: str) -> list[subprocess.Popen]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        nodes = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}"]
        all_flags = [*flags, "--steps", "200", "--save-every", "5", "--output", output, "--resume"]
        return [start(node, "llara.py", 4, all_flags, *nodes) for node in folders]

    codes = [exit_code(process, folder) for process in start_both("../unbroken")]
    promise("two nodes: exit codes", codes == [0, 0], str(codes))
    promise("two nodes: one output", safe_step(folder / "unbroken") == 200)

    # A relative path is another folder on each node.
    both = start_both("out")
    expect_end("two nodes, outputs not shared", folder, 120)
    codes = [process.wait() for process in both]
    said = "".join((node / "said.txt").read_text() for node in folders)
    promise("two nodes, outputs not shared: refused, with a sentence", "not shared" in said)
    promise("two nodes, outputs not shared: exit codes", 0 not in codes, str(codes))

    for killed in (1, 0):  # the second has the rendezvous
        before = safe_step(folder / "killed")
        both = start_both("../killed")
        wait_for(lambda before=before: safe_step(folder / "killed") > before, 200)
        kill(folders[killed], EVERYBODY)
        expect_end(f"two nodes, kill -9 of node {killed}", folder, 60)
    codes = [exit_code(process, folder) for process in start_both("../killed")]
    promise("two nodes, both resumed: exit codes", codes == [0, 0], str(codes))
    compare_logs("two nodes, killed", folder / "killed", folder / "unbroken", 1e-4)


def measure_index(path: Path) -> None:
    """Of a process of its own: what it takes to open `path`, and to read a step of 256 examples."""

    def number(file: str, key: str) -> int:
        return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self", file).read_text())[1])

    size = path.stat().st_size / 1e9
    before, begin = number("status", "VmHWM"), time.monotonic()
    rows = llara.Rows([path])
    seconds, kilobytes = time.monotonic() - begin, number("status", "VmHWM") - before
    label = f"index of {len(rows):,} rows, {size:.2f} GB; 20 GB, extrapolated"
    report(f"{label}: seconds", f"{seconds:.2f}; {seconds * 20 / size:.0f}")
    report(f"{label}: MB", f"{kilobytes / 1e3:.0f}; {kilobytes / 1e3 * 20 / size:.0f}")
    bytes_before, begin = number("io", "rchar"), time.monotonic()
    for i in np.random.default_rng(0).integers(len(rows), size=256):
        with rows.row(int(i)):
            pass
    seconds, n_bytes = time.monotonic() - begin, number("io", "rchar") - bytes_before
    report("a step of 256 rows reads of it: MB, seconds", f"{n_bytes / 1e6:.2f}, {seconds:.4f}")


def rehearse_index(folder: Path, n_rows: int) -> None:
    path = folder / "articles.jsonl"
    text = " ".join(topics.values())
    with open(path, "w", encoding="utf-8") as file:
        for i in range(n_rows):
            begin = 37 * i % (len(text) - 3000)
            file.write(json.dumps({"title": f"Article {i}", "text": text[begin : begin + 3000]}))
            file.write("\n")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(measure_index, (path,))
    path.unlink()


def write_collection(folder: Path, words: list[str], n_passages: int, n_queries: int) -> None:
    """Passages of eight random words. A query is the first six of one of them, which answers it."""
    generator = np.random.default_rng(0)
    folder.mkdir()
    with (
        open(folder / "corpus.jsonl", "w", encoding="utf-8") as corpus,
        open(folder / "queries.jsonl", "w", encoding="utf-8") as queries,
    ):
        for i, row in enumerate(generator.choice(words, (n_passages, 8)).tolist()):
            corpus.write(json.dumps({"_id": f"d{i}", "text": " ".join(row)}) + "\n")
            if i < n_queries:
                queries.write(json.dumps({"_id": f"q{i}", "text": " ".join(row[:6])}) + "\n")


def eval_flags(data: str, kind: str, output: str) -> list[str]:
    flags = ["--model", "../base", "--query-prompt", "self", "--batch-size", "256"]
    if kind == "mining":
        flags += ["--pairs", f"{output}.jsonl", "--ranks", "10", "200", "--top-k", "200"]
    return [*flags, "--data", data, "--split", kind, "--output", output, "--keep-embeddings"]


def evaluate(kind: str, folder: Path, data: str, n: int, n_queries: int, ranks: int) -> np.ndarray:
    """-> (1 + ranks,): seconds, then GB at the peak of each rank, which the kernel keeps: VmHWM."""
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in range(n_queries))]
    (folder / data / "qrels").mkdir(exist_ok=True)
    (folder / data / "qrels" / f"{kind}.tsv").write_text("\n".join(lines))
    (folder / f"results-{ranks}.jsonl").unlink(missing_ok=True)
    values = np.zeros(1 + ranks)
    begin = time.monotonic()
    process = start(folder, "eval.py", ranks, eval_flags(data, kind, f"results-{ranks}"))
    while process.poll() is None:
        for number, rank in processes(folder).items():
            with contextlib.suppress(OSError):  # it has just ended
                peak = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{number}/status").read_text())
                if peak and rank >= 0:
                    values[1 + rank] = max(values[1 + rank], int(peak[1]) * 1024 / 1e9)
        time.sleep(0.2)
    values[0] = time.monotonic() - begin
    label = f"eval, {kind}, {n:,} passages x {n_queries:,} queries, {ranks} ranks: seconds; GB each"
    shown = f"{values[0]:.0f}; {', '.join(f'{gb:.2f}' for gb in values[1:])}"
    promise(label, process.returncode == 0, shown)
    return values


def extrapolated(kind: str, values: np.ndarray, ranks: int, n_queries: int, is_full: bool) -> None:
    label = f"eval, {kind}, {MS_MARCO:,} x {n_queries:,}, {ranks} ranks, extrapolated"
    report(f"{label}: hours, at most", f"{values[0] / 3600:.1f}")
    for rank, peak in enumerate(values[1:]):
        bound = BOUNDS[kind][min(rank, 1)]
        # Of less than a million passages, noise of 10 MB would be extrapolated to GB.
        holds = peak <= bound or not is_full
        promise(f"{label}: GB of rank {rank}", holds, f"{peak:.2f}, at most {bound}")
    # The tiny model's vectors are short: what those of 7B would add, on each rank.
    report(f"{label}: GB more at 4,096 wide", f"{n_queries * (4096 - 32) * 4 / 1e9:.1f}")


def means(folder: Path, results: str) -> dict[str, float]:
    return json.loads((folder / results / "metrics.json").read_text())["mean"]


def rehearse_eval(folder: Path, words: list[str], n: int) -> None:
    """n passages and n / 10 queries, and a tenth of each; from them MS MARCO's numbers.

    Memory is taken to be linear in passages plus linear in queries; seconds in passages, and, of
    mining, where the search is most of it, also in queries.
    """
    tenth, dev = n // 10, min(DEV, n // 10)
    write_collection(folder / "big", words, n, tenth)
    write_collection(folder / "small", words, tenth, tenth)
    for ranks in (1, 2):
        few = evaluate("dev", folder, "small", tenth, dev, ranks)
        many = evaluate("dev", folder, "big", n, dev, ranks)
        a_passage = (many - few) / (n - tenth)  # (1 + ranks,)
        values = many + (MS_MARCO - n) * a_passage
        extrapolated("dev", values, ranks, DEV, n >= 1_000_000)

        few = evaluate("mining", folder, "big", n, tenth // 10, ranks)
        many = evaluate("mining", folder, "small", tenth, tenth, ranks)
        if ranks == 2:  # what was fitted is measured too
            evaluate("mining", folder, "big", n, tenth, ranks)
        a_query = (many + (n - tenth) * a_passage - few) / (tenth - tenth // 10)
        values = many + (MS_MARCO - tenth) * a_passage + (TRAIN - tenth) * a_query
        values[0] = many[0] * MS_MARCO / tenth * TRAIN / tenth
        extrapolated("mining", values, ranks, TRAIN, n >= 1_000_000)
    one, two = (means(folder, f"results-{ranks}/big-dev") for ranks in (1, 2))
    difference = max(abs(one[metric] - two[metric]) for metric in one)
    value = f"{difference:.1e}; nDCG@10 {one['nDCG@10']:.4f}"
    promise("eval: means of two ranks less those of one", difference <= 1e-5, value)

    # Killed in the middle, it goes on: what was embedded is not embedded again.
    flags = eval_flags("small", "dev", "killed")

    def chunks() -> dict[Path, float]:
        return {file: file.stat().st_mtime for file in folder.glob("killed/*/*/0*.npy")}

    process = start(folder, "eval.py", 2, flags)
    wait_for(lambda: process.poll() is not None or len(chunks()) > 1, 300)
    kill(folder, EVERYBODY)
    process.wait()
    safe = chunks()
    run_to_end("eval, killed: goes on", folder, "eval.py", 2, flags)
    is_kept = bool(safe) and safe.items() <= chunks().items()
    promise(f"eval, killed: {len(safe)} chunks that were embedded are kept", is_kept)
    same = means(folder, "killed/small-dev") == means(folder, "results-2/small-dev")
    promise("eval, killed: the same means", same)


def rehearse(size: float, text: str | None, only: str | None) -> None:
    begin = time.monotonic()
    texts = list(topics.values())
    if text:
        rows = llara.Rows([text])
        texts = []
        for i in range(min(2000, len(rows))):
            with rows.row(i) as row:
                texts.append(row["text"])
    words = " ".join(texts).split()
    with tempfile.TemporaryDirectory(prefix="llara-scale-") as name:
        folder = Path(name).resolve()
        os.environ["TMPDIR"] = name  # a torchrun that is killed leaves its own files
        base = folder / "base"
        llara.make_small_model(texts, base, 2048)
        tokenizer = AutoTokenizer.from_pretrained(base)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=1,
            max_position_embeddings=2048,
            bos_token_id=None,
            eos_token_id=0,
        )
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(base)
        sample = words[:10_000]
        words_a_token = len(sample) / len(llara.tokenize(tokenizer, [" ".join(sample)])[0])
        write_wikipedia(folder / "wiki.jsonl", words, max(100, int(2000 * size)), words_a_token)
        write_pairs(folder / "pairs.jsonl", words, max(100, int(2000 * size)))

        examples, queries = max(16, int(256 * size)), max(16, int(128 * size))
        model = ["--model", str(base), "--lr", "1e-3"]
        adapt = [*model, "--data", str(folder / "wiki.jsonl"), "--batch-size"]
        tune = [*model, "--data", str(folder / "pairs.jsonl"), "--stage", "finetune"]
        small = [*adapt, "8", "--max-length", "96"]
        parts = {
            "adapt": lambda at: rehearse_kills("adapt", at, [*adapt, str(examples)]),
            "tune": lambda at: rehearse_kills("tune", at, [*tune, "--batch-size", str(queries)]),
            "random": lambda at: rehearse_random_kills(at, small, max(4, int(50 * size))),
            "nodes": lambda at: rehearse_two_nodes(at, small),
            "index": lambda at: rehearse_index(at, int(640_000 * size)),
            "eval": lambda at: rehearse_eval(at, words, int(1_000_000 * size)),
        }
        for part, rehearsal in parts.items():
            if only not in (None, part):
                continue
            (folder / part).mkdir()
            try:
                rehearsal(folder / part)
            finally:  # also at Ctrl-C
                kill(folder, EVERYBODY)
            shutil.rmtree(folder / part)
    report("rehearsal: minutes", f"{(time.monotonic() - begin) / 60:.1f}")
    for failure in FAILED:
        print(f"FAILED: {failure}")
    sys.exit(1 if FAILED else 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", nargs="?", choices=["gpu", "scale"], help="default: on the CPU")
    parser.add_argument("--tenth", action="store_true", help="scale: a tenth of the size")
    parser.add_argument("--text", help="scale: .jsonl of articles to take words of")
    parser.add_argument("--only", help="scale: adapt, tune, random, nodes, index or eval")
    parser.add_argument("--size", type=float, default=1.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.mode == "scale":
        rehearse(0.1 if args.tenth else args.size, args.text, args.only)
    gpu = args.mode == "gpu"
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
