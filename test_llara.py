# SPDX-License-Identifier: MIT
"""Tests of llara.py and eval.py, each against something that they did not compute.

python -m pytest -q test_llara.py
"""

import gc
import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from pydoc_data.topics import topics
from unittest import mock

# Tests run on the CPU, where a sum has the same bits each time. Two of them launch processes that
# see a GPU, if there is one (`launch_on_gpu`).
os.environ["GPUS_TO_TEST"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["PYTHONPATH"] = os.path.dirname(os.path.abspath(__file__))

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import eval as evaluation
import llara

torch.set_num_threads(1)  # as in the processes that are launched: they must compute the same bits

# ---- inputs --------------------------------------------------------------------------------------

# The golden case: three passages, of which the second has no following one.
PROMPTS = llara.Prompts(
    prefix=[1, 5],
    SELF=[*range(60, 71), *range(100, 108)],
    NEXT=[*range(71, 81), *range(108, 116)],
    pooled=8,
)
PASSAGES = [
    [(7 * i * i + 11 * j + 3) % 50 + 6 for j in range(n)] for i, n in enumerate((12, 7, 20))
]
FOLLOWING = [[(5 * i + 13 * j + 1) % 50 + 6 for j in range(9)] for i in range(3)]
FOLLOWING[1] = []
EXAMPLES = [
    (passage, sorted(set(passage)), sorted(set(following)))
    for passage, following in zip(PASSAGES, FOLLOWING, strict=True)
]

SENTENCES = re.split(r"(?<=[.:])\s+", topics["assignment"])
# Some targets are empty, and "it is" and "and the" leave nothing once stop words are gone.
ROWS = [
    {
        "input": " ".join(SENTENCES[i : i + 1 + i % 5]),
        "output_summarize": SENTENCES[i] if i % 7 else "it is",
        "output_predict": "and the" if i % 3 else SENTENCES[i + 5],
    }
    for i in range(40)
]
ARTICLES = [{"title": name, "text": topics[name][:1500]} for name in sorted(topics)[:9]]
PAIRS = [  # 0 to 3 negatives; many are another query's positive
    {
        "query": SENTENCES[i],
        "pos": SENTENCES[i + 1 : i + 2 + i % 2],
        "neg": SENTENCES[i + 3 : i + 3 + i % 4],
    }
    for i in range(12)
]


def write_rows(path, rows):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_model(family="llama", tied=False, vocab_size=128, **settings):
    torch.manual_seed(0)
    if family != "falcon":  # whose size of a head follows from the others
        settings["head_dim"] = 8
    config = AutoConfig.for_model(
        family,
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        initializer_range=0.2,
        bos_token_id=0,
        pad_token_id=None,
        tie_word_embeddings=tied,
        **settings,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def assert_same(a, b, atol=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=atol, check_dtype=False)


@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):
    """Every test runs in one folder, with a tiny model of 400 tokens and with data."""
    os.chdir(tmp_path_factory.mktemp("home"))
    torch.manual_seed(0)
    llara.make_small_model((row["input"] for row in ROWS), Path("model"), 400)
    write_rows("rows.jsonl", ROWS)
    write_rows("articles.jsonl", ARTICLES)
    write_rows("pairs.jsonl", PAIRS)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained("model")


# ---- one pass is two -----------------------------------------------------------------------------


def test_mask_is_the_picture():
    """Two rows, by hand: prefix and passage p, SELF s, NEXT n; a line for each that looks."""
    mask, positions = llara.joint_mask(torch.tensor([3, 2]), self_length=2, length=7)
    first = [  # p p p s s n n
        "1000000",
        "1100000",
        "1110000",
        "1111000",
        "1111100",
        "1110010",
        "1110011",
    ]
    second = [  # p p s s n n, and a pad
        "1000000",
        "1100000",
        "1110000",
        "1111000",
        "1100100",
        "1100110",
    ]
    for seen, picture in ((mask[0, 0], first), (mask[1, 0], second)):
        for row, line in zip(seen, picture, strict=False):
            assert "".join(str(int(cell)) for cell in row) == line
    assert positions[0].tolist() == [0, 1, 2, 3, 4, 3, 4]  # NEXT begins where SELF does
    assert positions[1, :6].tolist() == [0, 1, 2, 3, 2, 3]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gpt_neox"])
def test_one_pass_is_two(family, tied):
    """The joint pass gives the states of two passes of the bare model, without our mask."""
    lm = tiny_model(family, tied)
    batch = llara.collate(EXAMPLES, PROMPTS)
    mask, positions = llara.joint_mask(batch["self_start"], 19, batch["input_ids"].shape[1])
    joint = lm.get_decoder()(
        input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    for i, passage in enumerate(PASSAGES):
        for prompt, columns in ((PROMPTS.SELF, "SELF_columns"), (PROMPTS.NEXT, "NEXT_columns")):
            ids = torch.tensor([[*PROMPTS.prefix, *passage, *prompt]])
            alone = lm(ids, output_hidden_states=True).hidden_states[-1]
            assert_same(joint[i, batch[columns][i]], alone[0, -PROMPTS.pooled :])


# ---- the released code's numbers -----------------------------------------------------------------

# From FlagEmbedding's research/LLARA at commit 7ed43d67, transformers 4.41.2, torch 2.5.1, float32.
# In its folder `pretrain`, with the model and the inputs of this file, these lines print the losses
# (its class goes by the lengths of the two prompts, 19 and 18, not by their ids):
#
#     from modeling import PreLlamaModel  # in place of LlamaForCausalLM in `golden_model`
#     def left(rows, value):
#         width = max(map(len, rows))
#         return torch.tensor([[value] * (width - len(row)) + row for row in rows])
#     rows = [PROMPTS.prefix + passage + PROMPTS.SELF + PROMPTS.NEXT for passage in PASSAGES]
#     batch = {"input_ids": left(rows, 0), "attention_mask": left([[1] * len(r) for r in rows], 0)}
#     ar = {"labels": left([[-100] * 2 + passage + [-100] * 37 for passage in PASSAGES], -100)}
#     ebae = {"output_summarize_ids": left(PASSAGES, -100)}
#     ebar = {"output_predict_ids": left(FOLLOWING, -100)}
#     for terms in (ar, ebae, ebar, ar | ebae | ebar):
#         print(model(**batch, **terms).loss.item())
GOLDEN_LOSSES = {  # name: the loss, and the norm of its gradient
    "AR": (5.132088661, 3.322822911),
    "0.1 EBAE": (0.487182558, 0.161732256),
    "0.1 EBAR": (0.485728353, 0.198733825),
    "total": (5.618544102, 3.340850842),
}
GOLDEN_SELF = [
    [-0.09080182, 0.22346915, 0.06946224, -0.00672612],
    [0.24219397, -0.29132545, 0.05200180, -0.06596878],
    [0.12951507, -0.08678233, 0.22707206, -0.21244715],
]
GOLDEN_NEXT = [
    [-0.08184583, -0.00093548, 0.18424950, -0.18297526],
    [-0.30749780, -0.06796909, -0.04357943, -0.28528449],
    [-0.08391397, 0.14070702, 0.11679310, 0.07219057],
]


@pytest.fixture
def golden_model():
    """A Llama whose weights are a formula."""
    lm = tiny_model("llama")
    for k, (name, weight) in enumerate(sorted(lm.named_parameters())):
        i = np.arange(weight.numel(), dtype=np.float64)
        wave = np.sin(0.7 * (k + 1) + i * (0.61803398875 + 0.01 * k))
        values = 1 + 0.1 * wave if "norm" in name else 0.25 * wave
        weight.data = torch.tensor(values, dtype=torch.float32).view(weight.shape)
    return llara.Llara(lm, PROMPTS)


@pytest.mark.parametrize("layout", ["as it is", "with more padding", "in micro-batches"])
def test_losses_are_those_of_the_released_code(golden_model, layout):
    """Losses and gradients, however the batch is padded or split."""
    whole = llara.collate(EXAMPLES, PROMPTS)
    batches = [whole]
    if layout == "with more padding":
        whole["input_ids"] = F.pad(whole["input_ids"], (0, 9), value=3)
    if layout == "in micro-batches":
        batches = [llara.collate([example], PROMPTS) for example in EXAMPLES]
        for batch in batches:
            batch["counts"] = whole["counts"]  # of the global batch
    for name, (loss, norm) in GOLDEN_LOSSES.items():
        golden_model.zero_grad()
        ar, ebae, ebar = losses = sum(golden_model(batch) for batch in batches)
        terms = {"AR": ar, "0.1 EBAE": 0.1 * ebae, "0.1 EBAR": 0.1 * ebar}
        term = terms.get(name, llara.total_loss(losses, [1.0, 0.05, 0.05]))
        term.backward()
        gradient = torch.cat([p.grad.flatten() for p in golden_model.parameters()])
        assert term.item() == pytest.approx(loss, abs=1e-5)
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-5)


def test_bfloat16_does_not_round_the_counts(golden_model, tokenizer):
    """13 copies of a batch have its mean loss. Their 507 tokens are no number of bfloat16."""
    device = torch.device("cpu")
    stage = adaptation(["rows.jsonl"], tokenizer)
    with llara.process_group():
        llara.shard(golden_model, device, torch.bfloat16)
        once, often = (
            stage.step(
                golden_model,
                {"micro_batches": [llara.collate(EXAMPLES * n, PROMPTS)]},
                device,
                seed=0,
                train=False,
            )
            for n in (1, 13)
        )
    for task in llara.TASKS:
        assert often[task] == pytest.approx(once[task], rel=5e-4)


def test_embeddings_are_those_of_the_released_code(golden_model):
    for prompt, golden in ((PROMPTS.SELF, GOLDEN_SELF), (PROMPTS.NEXT, GOLDEN_NEXT)):
        rows = [[*PROMPTS.prefix, *passage, *prompt] for passage in PASSAGES]
        lengths = torch.tensor([len(row) for row in rows])
        embeddings = golden_model.embed(llara.pad(rows), lengths)
        assert_same(embeddings[:, :4], torch.tensor(golden))
        assert_same(embeddings.norm(dim=1), torch.ones(3))


# ---- losses --------------------------------------------------------------------------------------


def test_bag_loss_is_its_formula():
    """Against plain Python: maximum over positions, log softmax, mean over a row's words."""
    logits = torch.randn(3, 8, 10)
    bags = [[1, 4, 9], [], [0]]
    expected = 0.0
    for positions, bag in zip(logits.tolist(), bags, strict=True):
        highest = [max(position[v] for position in positions) for v in range(10)]
        log_sum = math.log(sum(math.exp(z) for z in highest))
        if bag:
            expected += sum(log_sum - highest[v] for v in bag) / len(bag)
    assert llara.bag_loss(logits, llara.pad(bags, -100)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("n", [0, 7, 1030])
def test_next_token_loss_is_cross_entropy(n):
    """Loss and both gradients are PyTorch's, with fewer tokens than a chunk, more, and none."""
    states = torch.randn(n, 8, requires_grad=True)
    weight = torch.randn(20, 8, requires_grad=True)
    targets = torch.arange(n) % 20
    ours = llara.next_token_loss(states, weight, targets)
    theirs = F.cross_entropy(states @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(ours, theirs)
    our_gradients = torch.autograd.grad(3 * ours, (states, weight))
    their_gradients = torch.autograd.grad(3 * theirs, (states, weight))
    torch.testing.assert_close(our_gradients, their_gradients, rtol=1e-4, atol=1e-4)


def test_next_token_loss_in_bfloat16_adds_up_in_float32():
    """A sum in bfloat16 would be off by half a per cent; so would a head that is rounded."""
    states = torch.randn(3000, 16).bfloat16()
    weight = torch.randn(50, 16).bfloat16()
    targets = torch.arange(3000) % 50
    ours = llara.next_token_loss(states, weight, targets)
    exact = F.cross_entropy(states.float() @ weight.float().T, targets, reduction="sum")
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(exact.item(), rel=1e-3)


def test_a_task_that_is_off_is_not_computed(golden_model):
    batch = llara.collate(EXAMPLES, PROMPTS)
    with mock.patch.object(llara, "bag_loss", side_effect=AssertionError("computed")):
        losses = golden_model(batch, tasks=["AR"])
    assert losses[0].item() == pytest.approx(5.132088661, abs=1e-5)
    assert losses[1:].tolist() == [0.0, 0.0]


def test_contrastive_loss_is_its_formula():
    """Against plain Python, with a passage excluded for two of three queries."""
    queries = F.normalize(torch.randn(3, 6), dim=1)
    passages = F.normalize(torch.randn(7, 6), dim=1)
    excluded = torch.zeros(3, 7, dtype=torch.bool)
    excluded[1, 6] = excluded[0, 1] = True
    expected = 0.0
    hits = 0
    for i in range(3):
        scores = {j: float(queries[i] @ passages[j]) / 0.05 for j in range(7) if not excluded[i, j]}
        log_sum = math.log(sum(math.exp(score) for score in scores.values()))
        expected += (log_sum - scores[i]) / 3
        hits += max(scores, key=scores.get) == i
    loss, accuracy = llara.contrastive_loss(queries, passages, excluded, 0.05)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert accuracy.item() == pytest.approx(hits / 3)


class MeanPooled(nn.Module):
    """Any encoder will do for `contrastive_step`: this one is not ours. It has dropout."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 6)

    def forward(self, ids):
        return F.normalize(F.dropout(self.table(ids), 0.3).mean(dim=1), dim=1)


def test_contrastive_step_is_one_graph_of_everything():
    """Cached gradients equal direct ones, dropout included; the caller's generator is untouched."""
    model = MeanPooled()
    ids = torch.randint(0, 30, (7, 5))  # 3 queries, 4 passages
    excluded = torch.zeros(3, 4, dtype=torch.bool)
    rows = [torch.tensor([0, 4]), torch.tensor([5, 1, 6]), torch.tensor([2, 3])]
    before = torch.get_rng_state()
    step_loss, _ = llara.contrastive_step(
        model, [(some, (ids[some],)) for some in rows], excluded, 0.1, seed=5
    )
    assert torch.equal(before, torch.get_rng_state())
    cached = model.table.weight.grad.clone()
    model.zero_grad()
    vectors = [None] * 7
    for i, some in enumerate(rows):
        torch.manual_seed(5 + i)
        for row, vector in zip(some.tolist(), model(ids[some]), strict=True):
            vectors[row] = vector
    vectors = torch.stack(vectors)
    loss, _ = llara.contrastive_loss(vectors[:3], vectors[3:], excluded, 0.1)
    loss.backward()
    assert step_loss == pytest.approx(loss.item(), abs=1e-5)
    assert_same(cached, model.table.weight.grad)


def test_unigram_levels_by_hand(tokenizer):
    """AR: 3 of 4 tokens are 0. EBAE: half and all of two bags: 3/4 as well. EBAR: one bag."""
    examples = [([0, 0, 1], [0, 1], [2, 3]), ([0], [0], [])]
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    stage = adaptation(["rows.jsonl"], tokenizer)
    with mock.patch.object(stage, "read_examples", return_value=examples):
        levels = stage.yardstick(vocab_size=5)
    assert levels == pytest.approx({"AR": entropy, "EBAE": entropy, "EBAR": math.log(2)})


def test_learning_rate():
    """Up over the first tenth, down to nearly 0, and never 0 at a step."""
    rates = [llara.get_lr(step, steps=20, peak=1.0, warmup=0.1) for step in range(20)]
    assert rates[:3] == [0.5, 1.0, pytest.approx(18 / 19)]
    assert rates[-1] == pytest.approx(1 / 19)


# ---- prompts and words ---------------------------------------------------------------------------


def test_pooling_follows_the_prompts(tokenizer):
    """Four tokens, or one </s>, instead of eight: the number is derived from the prompt."""
    assert llara.make_prompts(tokenizer).pooled == 8
    four = llara.make_prompts(
        tokenizer,
        ('", so: ', ["<s1>", "<s2>", "<s3>", "<s4>"]),
        ('", then: ', ["<s5>", "<s6>", "<s7>", "<s8>"]),
    )
    assert four.pooled == 4
    assert four.NEXT[-4:] == tokenizer.convert_tokens_to_ids(["<s5>", "<s6>", "<s7>", "<s8>"])
    one = llara.make_prompts(tokenizer, ('", same: ', ["</s>"]), ('", next: ', ["</s>"]))
    assert one.pooled == 1 and one.SELF[-1] == tokenizer.eos_token_id
    columns = llara.collate([([7, 8], [7], [])], four)["SELF_columns"]
    assert columns.shape == (1, 4)


def test_half_changed_prompts_are_refused(tokenizer):
    with pytest.raises(ValueError, match="2 special tokens in SELF, 8 in NEXT"):
        llara.make_prompts(tokenizer, ('", so: ', ["<s1>", "<s2>"]))
    with pytest.raises(ValueError, match="not one token each"):
        llara.make_prompts(tokenizer, ('", so: ', ["<s1>", "<s99>"] * 4))


def test_a_passage_stands_behind_something(tokenizer):
    """Its first token could not be predicted, but would be counted."""
    with pytest.raises(ValueError, match="without a prefix or a BOS"):
        llara.make_prompts(tokenizer, prefix="")


def test_prefix_takes_bos_and_never_eos(tokenizer):
    from tokenizers.processors import TemplateProcessing

    special = [("<s1>", tokenizer.convert_tokens_to_ids("<s1>")), ("</s>", 0)]
    quote = tokenizer('"', add_special_tokens=False).input_ids
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=special)
    assert llara.make_prompts(tokenizer).prefix == quote
    tokenizer.bos_token = "<s1>"
    backend.post_processor = TemplateProcessing(single="<s1> $A </s>", special_tokens=special)
    assert llara.make_prompts(tokenizer).prefix == [special[0][1], *quote]


def test_content_words():
    """English as in the released code; marks of other scripts belong to their words."""
    assert llara.content_words("The cat's 2nd_hat -- isn't ON; été.") == "cat 2nd hat été"
    hindi = "हिन्दी में किताब है।"
    assert llara.content_words(hindi) == hindi.removesuffix("।")
    thai = "ภาษาไทย ดีมาก"
    assert llara.content_words(thai) == thai


# ---- rows and passages ---------------------------------------------------------------------------


def batches(rank=0, world=1, batch_size=8, micro_batch_size=2):
    return llara.Batches(batch_size, micro_batch_size, 0, rank, world)


def adaptation(files, tokenizer, max_length=140, **settings):
    prompts = llara.make_prompts(tokenizer)
    return llara.Adaptation(llara.Rows(files), tokenizer, prompts, batches(**settings), max_length)


def test_folders_and_files_are_found():
    """*.jsonl and WikiExtractor's files, in sub-folders too; no back-ups, no empty lines."""
    write_rows("text/AA/wiki_00", ARTICLES[:2])
    write_rows("text/b.jsonl", ARTICLES[2:3])
    write_rows("text/b.jsonl.bak", ARTICLES)
    write_rows("text/wiki_00~", ARTICLES)
    Path("text/c.jsonl").write_text('\n  \n{"text": "third"}\n')
    rows = llara.Rows(["text"])
    places = rows.places[:, :2].tolist()
    assert [f"{rows.paths[file]}:{line}" for file, line in places] == [
        "text/AA/wiki_00:1",
        "text/AA/wiki_00:2",
        "text/b.jsonl:1",
        "text/c.jsonl:3",
    ]
    with rows.row(3) as row:
        assert row == {"text": "third"}


def test_a_row_is_read_once(tmp_path):
    """Behind a link too, but not a second time behind another; no hidden copies of an editor."""
    write_rows(tmp_path / "text/a.jsonl", ARTICLES[:1])
    write_rows(tmp_path / "text/.ipynb_checkpoints/a-checkpoint.jsonl", ARTICLES[:1])
    write_rows(tmp_path / "disk/b.jsonl", ARTICLES[1:2])
    (tmp_path / "text/linked").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/back").symlink_to(tmp_path / "text")
    (tmp_path / "text/c.jsonl").symlink_to(tmp_path / "text/a.jsonl")
    rows = llara.Rows([tmp_path / "text", tmp_path / "disk/b.jsonl"])
    assert sorted(path.name for path in rows.paths) == ["a.jsonl", "b.jsonl"]


def test_more_files_than_a_process_may_open(tmp_path):
    """As WikiExtractor leaves them: a Wikipedia is some 15,000 files."""
    for i in range(150):
        (tmp_path / f"wiki_{i:02}").write_text(json.dumps({"text": f"article {i}"}) + "\n")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    n_open = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (n_open + 120, limits[1]))
    try:
        rows = llara.Rows([tmp_path])
        for path, i in zip(rows.paths, range(150), strict=True):
            with rows.row(i) as row:
                assert path.name == f"wiki_{row['text'].split()[1]:0>2}"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def chinese(n):
    """n characters, of which every twentieth ends a sentence."""
    r = random.Random(n)
    return "".join("。" if i % 20 == 19 else chr(0x4E00 + r.randrange(3000)) for i in range(n))


def english(n):
    """n sentences. Each word is another one."""
    return " ".join(f"Word{i}a word{i}b, word{i}c and word{i}d." for i in range(n))


def windows_of(data, epoch):
    """Of each example of an epoch: its row, where its passage and what follows begin, their ends.

    They are found in the article, so they stand in it as they are, one behind the other.
    """
    texts = []
    for i in range(len(data.rows)):
        with data.rows.row(i) as row:
            texts.append(llara.read_article(row))
    places = [(epoch, i) for i in range(data.n_examples)]
    for place, example in zip(places, data.read_windows(places), strict=True):
        (_, passage), own, (_, following) = example
        assert own == example[0]
        row, _ = data.place(*place)
        text = texts[row]
        for found in re.finditer(re.escape(passage), text):
            # A window can end within a character, as a token of few bytes can; the next has it too.
            middle = text.find(following, max(0, found.end() - 1), found.end() + 1 + len(following))
            if middle >= 0:
                break
        assert middle >= 0
        yield row, found.start(), middle, middle + len(following), text


@pytest.mark.parametrize("script", ["English", "Chinese", "mixed"])
def test_all_text_is_read(script):
    """Articles of any length take part by their bytes: in ten epochs no character is left out.

    Of English, one epoch reads nine tenths. This tokenizer has a token a byte for Chinese.
    """
    llara.make_small_model(topics.values(), Path("english"), 8000)  # 3.6 bytes a token
    tokenizer = AutoTokenizer.from_pretrained("english")
    text = " ".join(topics[name] for name in ("objects", "types", "specialnames", "exprlists"))
    starts = [0, 100, 250, 600, 2000, 8000]
    articles = {
        "English": [text[i:j] for i, j in itertools.pairwise([*starts, len(text)])],
        "Chinese": [chinese(n) for n in (30, 60, 300, 2000, 9000)],
    }
    articles["mixed"] = [*articles["English"][:5], *articles["Chinese"][:4]]
    rows = [{"text": text} for text in (*articles[script], " ")]  # the last is a blank page
    data = adaptation([write_rows(f"{script}.jsonl", rows)], tokenizer)
    is_read = [np.zeros(len(row["text"].strip()), bool) for row in rows]
    for epoch in range(10):
        for row, start, _, end, _ in windows_of(data, epoch):
            is_read[row][start:end] = True
        if epoch == 0 and script == "English":
            assert np.concatenate(is_read).mean() > 0.9
    # Whitespace between sentences belongs to no window where a tokenizer drops it.
    assert [len(part) - part.sum() for part in is_read] == [0] * len(rows)


def test_windows_of_an_article(tokenizer):
    """They begin where a sentence does; the last ones are the end; a short text is halved."""
    write_rows("places.jsonl", [{"text": english(200)}, {"text": "One two three four."}])
    data = adaptation(["places.jsonl"], tokenizer)
    seen = []
    for row, start, middle, end, text in windows_of(data, epoch=0):
        if row == 1:
            assert (start, end) == (0, len(text)) and 0 < middle < end
        else:
            assert text[start:].startswith("Word") or end == len(text)
            seen.append((start, end))
    assert seen == sorted(set(seen)) and seen[0][0] == 0 and seen[-1][1] == len(english(200))
    ((passage, _), _, (following, _)) = data.read_windows([(0, 1)])[0]
    assert len(passage) == len(following) == data.room


def test_examples_follow_from_settings_and_step_alone(tokenizer):
    """Another epoch has other places; the same one has the same, whatever was read before."""
    data = adaptation([write_rows("whole.jsonl", [{"text": english(2000)}])], tokenizer)
    again = data.read_windows([(1, 5)])
    assert again == data.read_windows([(1, 5)]) != data.read_windows([(0, 5)])


def test_words_are_those_that_the_model_reads(tokenizer):
    """EBAE's ids: unique, of the part that was read, no stop words; "<s1>" in a text is text."""
    text = "The parser <s1> and the parser </s> of it. " + "assignment " * 300
    row = {"input": text, "output_summarize": text, "output_predict": "This is THE __ and!"}
    data = adaptation([write_rows("words.jsonl", [row])], tokenizer)
    ((passage, own, following),) = data.read_examples([(0, 0)])
    seen = tokenizer.decode(passage)
    assert len(passage) == data.room and text.startswith(seen) and "<s1>" in seen
    words = " ".join(re.sub(r"\W+|\b(the|and|of|it)\b", " ", seen, flags=re.I).split())
    assert own == sorted(set(tokenizer(words, add_special_tokens=False).input_ids))
    assert following == []
    assert not set(tokenizer.all_special_ids) & {*passage, *own}


def test_formats_are_not_mixed(tokenizer):
    """A row as released among articles would lose its own targets: it is named instead."""
    write_rows("both.jsonl", [ARTICLES[0], ROWS[4]])
    data = adaptation(["both.jsonl"], tokenizer)
    with pytest.raises(llara.BadInput, match=r"both\.jsonl:2: KeyError: 'text'; there are input"):
        data.yardstick(400)


def test_blank_pages_ask_for_nothing(tokenizer):
    blank = {
        "id": "1",
        "url": "https://en.wikipedia.org/wiki?curid=1",
        "title": "Blank",
        "text": "",
    }
    data = adaptation([write_rows("blank.jsonl", [blank] * 9 + ARTICLES)], tokenizer)
    assert data.read_examples([(0, 0)]) == [([], [], [])]
    assert data.yardstick(400)["EBAE"] > 0
    with pytest.raises(llara.BadInput, match="no text in these rows"):
        adaptation([write_rows("blanks.jsonl", [blank] * 3)], tokenizer).yardstick(400)


def test_counts_are_64_bits_wide(tokenizer):
    """Positions in a file, and in all of the text, can be beyond 2^31."""
    data = adaptation(["articles.jsonl"], tokenizer)
    assert data.ends.dtype == data.rows.places.dtype == np.int64


def test_order_of_examples():
    """An epoch is a permutation, another each time; a step is the same whatever came before."""
    steps = [batches().global_batch(step, n=20) for step in range(5)]
    places = [place for step in steps for place in step]
    for epoch in (0, 1):
        assert sorted(i for e, i in places if e == epoch) == list(range(20))
    assert [i for _, i in places[:20]] != [i for _, i in places[20:]]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_a_step(tokenizer, world):
    """Together they have the examples of one rank; none of their micro-batches is empty."""

    def examples_of(ranks):
        items = [
            adaptation(["rows.jsonl"], tokenizer, rank=rank, world=ranks, batch_size=9).read(3)
            for rank in range(ranks)
        ]
        parts = [item["micro_batches"] for item in items]
        assert len({len(part) for part in parts}) == 1  # as FSDP needs it
        assert all(len(batch["input_ids"]) for part in parts for batch in part)
        sequences = []
        for batch in itertools.chain(*parts):
            ends = batch["NEXT_columns"][:, -1] + 1
            columns = batch["input_ids"], ends, batch["EBAE"].tolist(), batch["EBAR"].tolist()
            for ids, end, own, following in zip(*columns, strict=True):
                bags = [[i for i in bag if i >= 0] for bag in (own, following)]
                sequences.append((ids[:end].tolist(), *bags))
        assert sum(item["tokens"] for item in items) == sum(len(ids) for ids, _, _ in sequences)
        return sorted(sequences)

    assert examples_of(world) == examples_of(1)


# ---- pairs ---------------------------------------------------------------------------------------


def fine_tuning(file, tokenizer, batch_size=6):
    prompts = llara.make_prompts(tokenizer)
    some = batches(batch_size=batch_size, micro_batch_size=4)
    return llara.FineTuning(llara.Rows([file]), tokenizer, prompts, some, 50, 80, group_size=3)


def test_pairs_of_a_step(tokenizer):
    """One positive a query, two of its negatives, repeated if too few, drawn anew each epoch."""
    data = fine_tuning("pairs.jsonl", tokenizer)
    draws = []
    for step in range(4):  # two steps are an epoch
        queries, passages, excluded = data.draw(step)
        hard = passages[6:]
        for q, query in enumerate(queries):
            row = next(row for row in PAIRS if row["query"] == query)
            assert passages[q] in row["pos"]
            if row["neg"]:
                mine, hard = hard[:2], hard[2:]
                assert set(mine) <= set(row["neg"])
                assert len(set(mine)) == min(2, len(row["neg"]))
            answers = [*row["pos"], query]  # its own text is no negative, either
            true_for_q = [j != q and passage in answers for j, passage in enumerate(passages)]
            assert excluded[q].tolist() == true_for_q
            draws.append((step // 2, query, passages[q]))
        assert hard == []
    epochs = [{(q, p) for epoch, q, p in draws if epoch == number} for number in (0, 1)]
    assert epochs[0] != epochs[1]


def test_rows_of_one_query_share_their_positives(tokenizer):
    """A true positive is never a negative, though another row of the query names it."""
    rows = [
        {"query": "q", "pos": ["first"]},
        {"query": "q", "pos": ["second"]},
        {"query": "r", "pos": ["third"]},
    ]
    data = fine_tuning(write_rows("twice.jsonl", rows), tokenizer, batch_size=3)
    queries, passages, excluded = data.draw(0)
    for q, query in enumerate(queries):
        for p, passage in enumerate(passages):
            is_true_of_other = query == "q" and passage in ("first", "second") and p != q
            assert excluded[q, p] == is_true_of_other
    assert data.yardstick(0)["loss"] == pytest.approx((2 * math.log(2) + math.log(3)) / 3)


def test_a_query_is_not_its_own_negative(tokenizer):
    """Pairs in both directions, as of duplicate questions."""
    rows = [{"query": "a", "pos": ["b"], "neg": None}, {"query": "b", "pos": ["a"]}]
    rows.append({"query": "c", "pos": ["d"]})
    data = fine_tuning(write_rows("both-ways.jsonl", rows), tokenizer, batch_size=3)
    queries, passages, excluded = data.draw(0)
    for q, query in enumerate(queries):
        negatives = {passage for p, passage in enumerate(passages) if p != q and not excluded[q, p]}
        assert negatives == {"a", "b", "d"} - {passages[q], query}


def test_nothing_to_learn_is_refused(tokenizer):
    data = fine_tuning(
        write_rows("one.jsonl", [{"query": "q", "pos": ["p"]}]), tokenizer, batch_size=1
    )
    with pytest.raises(llara.BadInput, match="no query has a negative"):
        data.read(0)


# ---- load, save, encode --------------------------------------------------------------------------


def save_plain(folder, lm, vocab_size=257):
    """A model and a tokenizer that know nothing of the prompts' tokens."""
    with mock.patch.multiple(llara, SELF_PROMPT=("", []), NEXT_PROMPT=("", [])):
        llara.make_small_model([], Path(folder), vocab_size)
    lm.save_pretrained(folder)
    return folder


def test_load_adds_the_tokens_as_mean_rows():
    """bfloat16 without <s1>..<s16> stays so, with 16 rows more: the mean of the others."""
    plain = tiny_model(vocab_size=257).to(torch.bfloat16)
    lm, tokenizer = llara.load(save_plain("plain", plain))
    assert {p.dtype for p in lm.parameters()} == {torch.bfloat16}
    assert lm.config._attn_implementation == "sdpa"
    for old, new in (
        (plain.model.embed_tokens, lm.model.embed_tokens),
        (plain.lm_head, lm.lm_head),
    ):
        rows = old.weight.float()
        means = rows.mean(0).bfloat16().float().expand(16, -1)
        assert_same(new.weight, torch.cat([rows, means]), atol=0)
    assert tokenizer("<s1><s16>", add_special_tokens=False).input_ids == [257, 272]


@pytest.mark.parametrize("kind", ["tied", "untied", "spare rows", "a head against its config"])
def test_what_is_saved_is_what_was_there(kind):
    lm = tiny_model(
        tied=kind in ("tied", "a head against its config"),
        vocab_size=300 if kind == "spare rows" else 257,
    )
    folder = save_plain(kind, lm)
    if kind == "a head against its config":
        weights = load_file(f"{folder}/model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * 2 + 0.1
        save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
    lm, tokenizer = llara.load(folder)
    if kind == "a head against its config":
        assert_same(lm.lm_head.weight[:257], weights["lm_head.weight"], atol=0)
    llara.save(lm, tokenizer, f"{folder} again")
    again, tokenizer_again = llara.load(f"{folder} again")
    ids = torch.arange(12)[None]
    assert_same(lm(ids).logits, again(ids).logits, atol=0)
    texts = ["A llama.", "<s1> is text"]
    ours, theirs = (
        llara.encode(*pair, texts) for pair in ((lm, tokenizer), (again, tokenizer_again))
    )
    assert (ours == theirs).all()


def edit_config(folder, **settings):
    file = Path(folder, "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize(
    "reason, damage",
    [
        ("Error", {"quantization_config": {"quant_method": "gptq", "bits": 4}}),
        ("Error", "truncated"),
        ("Error", "pointer"),
        ("Error", "bin"),
        ("its files lack", "lacking"),
        ("holds no finished model", "empty"),
        ("its tokenizer has ids beyond", "tokenizer"),
    ],
)
def test_models_that_cannot_be_used(reason, damage, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree("model", folder)
    weights = folder / "model.safetensors"
    if isinstance(damage, dict):
        edit_config(folder, **damage)
    elif damage == "truncated":
        os.truncate(weights, 5000)
    elif damage == "pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    elif damage == "bin":
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
    elif damage == "lacking":
        tensors = load_file(weights)
        del tensors["model.norm.weight"]
        save_file(tensors, weights, {"format": "pt"})
    elif damage == "tokenizer":
        file = folder / "tokenizer.json"
        tokenizer = json.loads(file.read_text())
        tokenizer["model"]["vocab"]["q"] = 99999
        file.write_text(json.dumps(tokenizer))
    elif damage == "empty":
        (folder / "config.json").unlink()
    with pytest.raises(llara.BadInput, match=reason) as refusal:
        llara.load(folder)
    assert str(folder) in str(refusal.value)


@pytest.mark.parametrize(
    "family, reason, settings",
    [
        ("bert", "sees later tokens", {"is_decoder": False}),
        ("phi", "or has a bias on them", {}),
        ("falcon", "it: FalconForCausalLM: .*Error", {"alibi": True}),
        ("cohere", "scales or caps its logits", {}),
    ],
)
def test_architectures_that_cannot_work(family, reason, settings):
    """One pass would not equal two, or the loss not be the model's: said on loading."""
    lm = tiny_model(family, tied=family == "cohere", **settings)
    if family == "bert":
        lm.get_output_embeddings = lambda: nn.Linear(32, 128, bias=False)
    with (
        mock.patch.object(llara, "read_model", return_value=(lm, None)),
        pytest.raises(llara.BadInput, match=reason),
    ):
        llara.load("it")


def test_lengths_that_a_model_was_made_for(capsys):
    """A window ends adaptation, whose mask replaces it, and no more; stretched RoPE ends all."""
    lm = tiny_model("mistral", vocab_size=257, sliding_window=64, max_position_embeddings=128)
    lm, tokenizer = llara.load(save_plain("window", lm))
    assert "made for 64" in refused(capsys, ADAPT + "o1 --model window --max-length 90")
    assert llara.encode(lm, tokenizer, "text", max_length=128).shape == (32,)
    best_keys = tiny_model("deepseek_v3", index_topk=48, max_position_embeddings=128).config
    assert llara.max_positions(best_keys, joint=True) == 48
    stretched = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    stretched["original_max_position_embeddings"] = 64
    lm = tiny_model("llama", vocab_size=257, max_position_embeddings=128, rope_parameters=stretched)
    assert llara.max_positions(lm.config) == 64
    _, tokenizer = llara.load(save_plain("stretched", lm))
    with pytest.raises(ValueError, match="made for 64"):
        llara.encode(lm, tokenizer, "text", max_length=65)


def test_a_token_of_images_gets_a_row():
    """Gemma 3 1B: its tokenizer has one token more than the model has rows; no text has it."""
    save_plain("image", tiny_model(vocab_size=257))
    tokenizer = AutoTokenizer.from_pretrained("image")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained("image")
    lm, tokenizer = llara.load("image")
    ids = tokenizer.convert_tokens_to_ids(["<image>", "<s1>", "<s16>"])
    assert ids == [257, 258, 273] and lm.get_input_embeddings().num_embeddings == 274


def test_gaps_in_a_vocabulary_are_refused(tmp_path):
    """The tokenizers library numbers new tokens from the count of entries: some real token's id."""
    folder = tmp_path / "gaps"
    save_plain(folder, tiny_model(vocab_size=300))
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    entries = tokenizer["model"]["vocab"]
    for token in sorted(entries, key=entries.get)[-20:]:
        entries[token] += 20  # 237..256 are free, 257..276 taken
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(llara.BadInput, match="gaps"):
        llara.load(folder)


def test_encode_is_text_by_text():
    """Any batch size, in the order of the texts, cut to a length: against plain transformers."""
    lm, tokenizer = llara.load("model")
    prompts = llara.make_prompts(tokenizer)
    texts = ["", *(row["input"] for row in ROWS[:8]), ROWS[4]["input"] * 9, "<s1> and </s>"]
    expected = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        ids = [*prompts.prefix, *ids][: 200 - len(prompts.NEXT)] + prompts.NEXT
        states = lm.model(torch.tensor([ids])).last_hidden_state[0, -prompts.pooled :]
        expected.append(F.normalize(states.mean(0), dim=0))
    for model in (lm, lm.model):
        for batch_size in (1, 3, 32):
            ours = llara.encode(model, tokenizer, texts, "next", 200, batch_size)
            assert_same(torch.tensor(ours), torch.stack(expected))


def test_encode_at_its_edges():
    lm, tokenizer = llara.load("model")
    lm.train()
    assert llara.encode(lm, tokenizer, "one text").shape == (128,)
    assert llara.encode(lm, tokenizer, []).shape == (0, 128)
    two = llara.encode(lm, tokenizer, ["one text", "another"])
    assert (llara.encode(lm, tokenizer, np.array(["one text", "another"])) == two).all()
    assert lm.training
    with pytest.raises(ValueError, match="unknown"):
        llara.encode(lm, tokenizer, "a", prompt="passage")
    with pytest.raises(ValueError, match="made for 2048"):
        llara.encode(lm, tokenizer, "a", max_length=2049)
    with pytest.raises(ValueError, match="prompt alone takes"):
        llara.encode(lm, tokenizer, "a", max_length=9)
    lm.model.norm.weight.data[0] = math.inf
    with pytest.raises(FloatingPointError, match="not finite"):
        llara.encode(lm, tokenizer, "a")


def test_encode_in_two_threads():
    lm, tokenizer = llara.load("model")
    lm.eval()
    texts = {"self": ["short <s1>"] * 5, "next": [ROWS[4]["input"] * 3] * 5}
    alone = {prompt: llara.encode(lm, tokenizer, texts[prompt], prompt, 90) for prompt in texts}
    wrong = []

    def work(prompt):
        for _ in range(20):
            if not np.array_equal(
                llara.encode(lm, tokenizer, texts[prompt], prompt, 90), alone[prompt]
            ):
                wrong.append(prompt)

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_encode_runs_a_compiled_model_compiled(tokenizer):
    model = AutoModel.from_pretrained("model")
    plain = llara.encode(model, tokenizer, ["A llama."])
    compiled_graphs = []

    def backend(graph, inputs):
        compiled_graphs.append(graph)
        return graph.forward

    model.compile(backend=backend)
    assert_same(torch.tensor(llara.encode(model, tokenizer, ["A llama."])), torch.tensor(plain))
    assert compiled_graphs


def test_another_prompt_than_the_model_was_made_with_is_refused(unbroken):
    """By encode, Sentences and fine-tuning; both are named. A model without an entry takes any."""
    four = ('", so: ', ["<s1>", "<s2>", "<s3>", "<s4>"]), ('", then: ', ["<s9>"] * 4)
    model, tokenizer = AutoModel.from_pretrained(unbroken), AutoTokenizer.from_pretrained(unbroken)
    noted = llara.make_prompts(tokenizer)._asdict()
    assert model.config.llara == {"query_prompt": "self", "prompts": noted}
    with mock.patch.object(llara.make_prompts, "__defaults__", (*four, '"', None)):
        for call in (
            lambda: llara.encode(model, tokenizer, "a text"),
            lambda: llara.Sentences(unbroken),
        ):
            with pytest.raises(
                ValueError, match=r"made with the prompts .*summarize.*not with .*so"
            ):
                call()
        del model.config.llara
        assert llara.encode(model, tokenizer, "a text").shape == (128,)


def test_explain_names_the_likeliest_tokens(tokenizer):
    """By the maximum over the states and by their mean: against logits of a plain pass."""
    lm, _ = llara.load("model")
    prompts = llara.make_prompts(tokenizer)
    said = llara.explain(lm, tokenizer, "assignment of names", k=3)
    (ids,) = llara.tokenize(tokenizer, ["assignment of names"])
    sequence = torch.tensor([prompts.around(ids, "self", 512)])
    with torch.no_grad():
        logits = lm(sequence).logits[0, -prompts.pooled :]
    for how, scores in (("max", logits.amax(0)), ("mean", logits.mean(0))):
        words = [tokenizer.decode([i]) for i in scores.topk(3).indices.tolist()]
        expected = [word.strip() or repr(word) for word in words]
        assert said[f"SELF, {how}"] == expected


# ---- runs ----------------------------------------------------------------------------------------

ADAPT = (
    "--data rows.jsonl --model model --steps 8 --batch-size 8 --micro-batch-size 8 "
    "--max-length 140 --lr 1e-3 --save-every 3 --output "
)
FINETUNE = (
    "--stage finetune --data pairs.jsonl --model model --steps 4 --batch-size 6 --group-size 3 "
    "--lr 1e-3 --query-length 50 --passage-length 80 --temperature 0.1 --output "
)
# Dies in its second checkpoint: when all is written, and nothing has its name yet.
KILLED = """
import os, llara
save = llara.dcp.save
saved = []
def save_and_die(*args, **kwargs):
    saved.append(save(*args, **kwargs))
    if len(saved) == 2:
        os.kill(os.getpid(), 9)
llara.dcp.save = save_and_die
llara.main()
"""


def run(flags):
    """main() in this process, where Ctrl-C stays pytest's: to launch one costs seconds."""
    with (
        mock.patch.object(sys, "argv", ["llara.py", *flags.split()]),
        mock.patch.object(signal, "signal"),
    ):
        llara.main()


def launch(*command):
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")  # a free port


def two_ranks(*command):
    done = launch(*TORCHRUN, *command)
    assert done.returncode == 0, done.stderr


def launch_on_gpu(*command):
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=os.environ["GPUS_TO_TEST"]):
        return launch(*command)


def refused(capsys, flags):
    """-> the one sentence that a run ends with."""
    with pytest.raises(SystemExit) as end:
        run(flags)
    assert end.value.code == 1
    del end
    gc.collect()  # the lock on its log goes with its frame; in a process of its own, with that
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("llara.py: ")
    return said


def read_log(folder):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def assert_same_run(a, b, tolerance):
    """Step for step, and at the end. tolerance 0: bit for bit."""
    keys = read_log(b)[0].keys() - {"tokens/s", "GiB", "TFLOP/s"}
    for key in keys:
        values = [[row[key] for row in read_log(folder)] for folder in (a, b)]
        np.testing.assert_allclose(*values, rtol=tolerance)
    weights = [load_file(f"{folder}/model.safetensors") for folder in (a, b)]
    differences = [(weights[0][name] - weights[1][name]).abs().flatten() for name in weights[1]]
    apart = torch.cat(differences)
    if tolerance == 0:
        assert apart.max() == 0
    else:
        # AdamW divides by the size of the gradient: where that is nearly 0, rounding shows in full.
        assert (apart > tolerance).float().mean() <= 1e-4
        assert apart.max() <= 20 * tolerance


@pytest.fixture(scope="module")
def unbroken(home):
    run(ADAPT + "unbroken")
    return "unbroken"


def test_micro_batches_change_nothing(unbroken):
    """Lengths differ, and many rows have no target: a mean of means would show."""
    run(ADAPT + "micro --micro-batch-size 1")
    assert_same_run("micro", unbroken, 2e-5)


def test_a_killed_run_goes_on(unbroken):
    """Killed in a save, then --resume: bit for bit the unbroken run; on two ranks, but rounding."""
    assert launch("-c", KILLED, *(ADAPT + "killed").split()).returncode == -signal.SIGKILL
    assert len(read_log("killed")) == 6 and Path("killed/checkpoint-00000003").is_dir()
    shutil.copytree("killed", "ranks")
    run(ADAPT + "killed --resume")
    assert_same_run("killed", unbroken, 0)
    two_ranks(llara.__file__, *(ADAPT + "ranks --resume --micro-batch-size 2").split())
    assert_same_run("ranks", unbroken, 2e-5)


def test_resume_refuses_another_run(unbroken, capsys):
    assert launch("-c", KILLED, *(ADAPT + "other").split()).returncode == -signal.SIGKILL
    assert "--lr is 0.01, but it was 0.001" in refused(capsys, ADAPT + "other --resume --lr 1e-2")
    other_prompt = ('", in other words: ', llara.SELF_PROMPT[1])
    with mock.patch.object(llara, "SELF_PROMPT", other_prompt):
        defaults = (other_prompt, llara.NEXT_PROMPT, '"', None)
        with mock.patch.object(llara.make_prompts, "__defaults__", defaults):
            assert "--prompts is" in refused(capsys, ADAPT + "other --resume")
    write_rows("reversed.jsonl", ROWS[::-1])
    said = refused(capsys, ADAPT + "other --resume --data reversed.jsonl")
    assert "--data is 40 rows" in said
    shutil.rmtree("other/checkpoint-00000003")
    assert "--seed is 1, but it was 0" in refused(capsys, ADAPT + "other --resume --seed 1")
    assert "checkpoint-00000003: is gone" in refused(capsys, ADAPT + "other --resume")
    Path("other/run.json").write_text('{"name": "of another program"}')
    assert "run.json: is not of this program" in refused(capsys, ADAPT + "other --resume")
    Path("other/checkpoint-00000003").mkdir()
    Path("other/run.json").unlink()
    assert "has checkpoints, but no run.json" in refused(capsys, ADAPT + "other --resume")


def test_a_mended_row_does_not_cost_the_run(capsys):
    """The refusal says that run.json may be edited: then the run goes on with the mended data."""
    rows = [row | {"input": row["input"] * 20} for row in ROWS]
    write_rows("mended.jsonl", rows)
    order = llara.epoch_order(0, 0, len(rows))
    bad = int(order[8 * 4])  # of step 4
    write_rows(
        "mended.jsonl", [row | {"input": 5} if i == bad else row for i, row in enumerate(rows)]
    )
    with mock.patch.object(llara.Adaptation, "yardstick", return_value={"AR": 1.0}):
        said = refused(capsys, ADAPT + "mended --data mended.jsonl")
    assert f"mended.jsonl:{bad + 1}: TypeError" in said
    write_rows("mended.jsonl", rows)
    said = refused(capsys, ADAPT + "mended --data mended.jsonl --resume")
    assert said.startswith("llara.py: --data is 40 rows") and "or edit mended/run.json" in said
    run_file = Path("mended/run.json")
    edited = json.loads(run_file.read_text())
    edited["settings"]["data"] = llara.Rows(["mended.jsonl"]).digest()
    run_file.write_text(json.dumps(edited))
    run(ADAPT + "mended --data mended.jsonl --resume")
    assert [row["step"] for row in read_log("mended")] == list(range(8))


# What goes wrong inside of a run: in a step, or in the thread that reads, while rank 0 waits for
# the other in a collective; or the disk is full.
FAILING = """
import sys, llara
where = sys.argv.pop(1)
def fail(self, *args, **kwargs):
    if where == "one-rank" and llara.dist.get_rank() == 0:
        return kept(self, *args, **kwargs)
    raise RuntimeError("of no use to the user")
if where == "read":
    kept, llara.Adaptation.read = llara.Adaptation.read, fail
elif where != "full-disk":
    kept, llara.Adaptation.step = llara.Adaptation.step, fail
llara.main()
"""


@pytest.mark.parametrize("where", ["step", "read", "one-rank", "full-disk"])
def test_a_failed_process_ends(where):
    """With a code that is not 0, and a traceback if the mistake is ours."""
    Path("fail.py").write_text(FAILING)
    torchrun = TORCHRUN if where == "one-rank" else ()
    flags = (ADAPT + f"failed-{where}").split()
    command = [sys.executable, *torchrun, "fail.py", where, *flags]
    if where == "full-disk":  # files of 200 KB at most: less than a checkpoint of this model
        command = ["bash", "-c", 'ulimit -f 400; exec "$@"', "bash", *command]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 1
    if where == "full-disk":
        assert "checkpoint-00000003: cannot be written" in done.stderr
        assert "Traceback" not in done.stderr
    else:
        assert "RuntimeError: of no use to the user" in done.stderr


def test_a_copy_of_a_checkpoint_is_left_alone(unbroken):
    """Only names of eight digits are ours."""
    assert launch("-c", KILLED, *(ADAPT + "kept").split()).returncode == -signal.SIGKILL
    shutil.copytree("kept/checkpoint-00000003", "kept/checkpoint-00000003-keep")
    run(ADAPT + "kept --resume")
    assert [path.name for path in Path("kept").glob("checkpoint*")] == ["checkpoint-00000003-keep"]
    assert_same_run("kept", unbroken, 0)


def test_one_folder_one_run(unbroken, capsys):
    """A second run in the folder of a living one is refused, also with --resume."""
    with llara.open_log(Path("locked"), resume=False):
        assert "another run writes" in refused(capsys, ADAPT + "locked --resume")


@pytest.mark.parametrize("ranks", [1, 2])
def test_asked_to_stop_a_run_saves_and_goes_on(ranks, unbroken):
    """SIGTERM in step 2: the step is finished and saved; then it resumes."""
    folder = f"stopped{ranks}"
    stopped = """
import os, signal, llara
step = llara.Adaptation.step
steps = []
def stop_in_step_2(*args, **kwargs):
    if len(steps) == 2 and llara.dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    steps.append(step(*args, **kwargs))
    return steps[-1]
llara.Adaptation.step = stop_in_step_2
llara.main()
"""
    Path("stop.py").write_text(stopped)
    flags = (ADAPT + folder + " --save-every 100").split()
    torchrun = TORCHRUN if ranks == 2 else ()
    done = launch(*torchrun, "stop.py", *flags)
    assert done.returncode == 1 and "--resume goes on" in done.stdout
    assert Path(folder, "checkpoint-00000003").is_dir() and len(read_log(folder)) == 3
    run(ADAPT + folder + " --resume")
    assert_same_run(folder, unbroken, 0 if ranks == 1 else 2e-5)


def test_killed_before_the_first_step():
    """While the default text or model was written: --resume starts anew."""
    Path("early/base").mkdir(parents=True)
    Path("early/log.jsonl").touch()  # opened before all else
    Path("early/python-docs.jsonl").write_text("cut off")
    Path("early/base/config.json").write_text("cut off")
    run("--output early --resume --steps 1 --batch-size 2")
    assert Path("early/model.safetensors").exists()


def test_killed_while_the_model_is_saved(unbroken):
    """The same command, with --resume, does it again."""
    killed = "import os, llara; llara.save = lambda *_: os.kill(os.getpid(), 9); llara.main()"
    assert launch("-c", killed, *(ADAPT + "half").split()).returncode == -signal.SIGKILL
    Path("half/model.safetensors").write_text("cut off")
    run(ADAPT + "half --resume")
    assert_same_run("half", unbroken, 0)


def test_a_finished_run_is_not_run_again(unbroken, capsys):
    """The same command can be given until it succeeds; another one is refused."""
    before = Path(unbroken, "model.safetensors").stat().st_mtime_ns
    run(ADAPT + unbroken + " --resume")
    assert "that run is finished" in capsys.readouterr().out
    assert "--steps is 9, but it was 8" in refused(capsys, ADAPT + unbroken + " --resume --steps 9")
    assert Path(unbroken, "model.safetensors").stat().st_mtime_ns == before


def test_output_is_never_overwritten(unbroken, capsys):
    """Neither a run nor a strange file; a run that failed at once leaves nothing in the way."""
    before = sorted(Path(unbroken).rglob("*"))
    assert "is not empty: name another" in refused(capsys, ADAPT + unbroken)
    assert sorted(Path(unbroken).rglob("*")) == before
    Path("strange").mkdir()
    Path("strange/thesis.tex").write_text("mine")
    for flags in ("strange", "strange --resume"):
        assert "is not empty: name another" in refused(capsys, ADAPT + flags)
    assert [path.name for path in Path("strange").iterdir()] == ["thesis.tex"]


def test_a_loss_that_is_not_finite_stops_the_run(capsys):
    """The step is named, and nothing was updated."""
    lm, tokenizer = llara.load("model")
    lm.model.norm.weight.data[0] = math.nan
    llara.save(lm, tokenizer, "nan")
    with (
        mock.patch.object(torch.optim.AdamW, "step", side_effect=AssertionError("updated")),
        mock.patch.object(llara, "check_one_pass"),
    ):
        said = refused(capsys, ADAPT + "broken --model nan")
    assert "step 0: the loss or its gradient is not finite" in said


def test_from_text_to_a_model(unbroken):
    """The losses fall; --valid is logged; a task of weight 0 is not; the card's code is right."""
    flags = "--data articles.jsonl --valid articles.jsonl --steps 30 --batch-size 16 --output new"
    run(flags)
    log = read_log("new")
    for key in ("AR", "EBAE", "EBAR"):
        first, last = ([row[key] for row in rows] for rows in (log[:5], log[-5:]))
        assert np.mean(last) < np.mean(first) - 0.1
        # The held-out rows are those of training here.
        assert log[-1][f"valid_{key}"] == pytest.approx(np.mean(last), abs=0.5)
    run(ADAPT + "off --ebar-weight 0 --steps 1")
    assert "EBAE" in read_log("off")[0] and "EBAR" not in read_log("off")[0]
    card = re.search(r"```python\n(.*?)```", Path("new/README.md").read_text(), re.S).group(1)
    names = {}
    exec(card.replace('"."', '"new"'), names)
    model, tokenizer = AutoModel.from_pretrained("new"), AutoTokenizer.from_pretrained("new")
    for text in ("A llama.", "he <s1> said </s> it", "word " * 900):
        for prompt in ("self", "next"):
            ours = llara.encode(model, tokenizer, text, prompt)
            assert_same(torch.tensor(ours), names["embed"](text, names[prompt.upper()]))
    assert json.loads(Path("new/modules.json").read_text())[0]["type"] == "llara.Sentences"


@pytest.mark.parametrize("flags, prompt", [(ADAPT, "self"), (FINETUNE, "next"), (FINETUNE, "self")])
def test_queries_take_the_prompt_of_the_run(flags, prompt):
    """SELF for a model that is only adapted; after fine-tuning what that was told."""
    folder = f"{'adapted' if flags == ADAPT else 'tuned'}-{prompt}"
    told = f" --query-prompt {prompt}" if flags == FINETUNE else ""
    run(flags + folder + " --steps 1" + told)
    assert llara.query_prompt_of(AutoConfig.from_pretrained(folder)) == prompt
    assert f"{prompt.upper()} for queries" in Path(folder, "README.md").read_text()
    sentences = llara.Sentences(folder).eval()
    features = sentences(sentences.preprocess(["A llama.", "b"], task="query"))
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ours = llara.encode(model, tokenizer, ["A llama.", "b"], prompt)
    assert_same(torch.tensor(ours), features["sentence_embedding"])


def test_the_prompt_of_queries_goes_where_the_model_goes(unbroken, tmp_path, monkeypatch):
    """By llara.save, as after LoRA; by sentence-transformers, also of a revision; under a hub name.

    A cache stands for the hub: of two revisions, v1 has another norm.
    """
    llara.save(*llara.load(unbroken), "by-hand")
    assert llara.query_prompt_of(AutoConfig.from_pretrained("by-hand")) == "self"
    repository = tmp_path / "models--somebody--adapted"
    for name, commit in (("main", "0" * 40), ("v1", "1" * 40)):
        shutil.copytree("by-hand", repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    file = repository / "snapshots" / ("1" * 40) / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"model.norm.weight": torch.zeros(128)}, file, {"format": "pt"})
    options = {"cache_folder": str(tmp_path), "model_kwargs": {"dtype": torch.bfloat16}}
    sentences = llara.Sentences.load("somebody/adapted", revision="v1", **options)
    assert sentences.model.dtype == torch.bfloat16 and not sentences.model.norm.weight.any()
    assert llara.query_prompt_of(sentences.model.config) == "self"
    sentences.max_seq_length = 80
    sentences.save("shorter")
    assert llara.Sentences.load("shorter").max_seq_length == 80


def test_from_rows_as_released_to_a_model():
    """The small model is made from their passages, too."""
    run("--data rows.jsonl --steps 1 --max-length 96 --batch-size 2 --output released")
    assert Path("released/model.safetensors").exists()


def test_fine_tuning_on_two_ranks():
    """Two ranks and other micro-batches against one."""
    run(FINETUNE + "tuned --micro-batch-size 50")
    two_ranks(llara.__file__, *(FINETUNE + "tuned2 --micro-batch-size 5").split())
    assert_same_run("tuned2", "tuned", 2e-5)


def test_bfloat16_is_near_float32():
    """On a GPU, if there is one: the losses of a step within 1 %."""
    for dtype in ("float32", "bfloat16"):
        flags = f"{ADAPT}{dtype} --dtype {dtype} --steps 2"
        done = launch_on_gpu(llara.__file__, *flags.split())
        assert done.returncode == 0, done.stderr
    for exact, rounded in zip(read_log("float32"), read_log("bfloat16"), strict=True):
        for task in llara.TASKS:
            assert rounded[task] == pytest.approx(exact[task], rel=0.01)


def test_killed_fine_tuning_goes_on():
    """On a GPU, if there is one. There attention's backward adds up in no fixed order."""
    whole = launch_on_gpu(llara.__file__, *(FINETUNE + "tuned-whole").split())
    assert whole.returncode == 0, whole.stderr
    killed = launch_on_gpu("-c", KILLED, *(FINETUNE + "tuned-killed").split())
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    goes_on = launch_on_gpu(llara.__file__, *(FINETUNE + "tuned-killed --resume").split())
    assert goes_on.returncode == 0 and "goes on at step 1" in goes_on.stdout, goes_on.stderr
    logs = [[row["loss"] for row in read_log(folder)] for folder in ("tuned-whole", "tuned-killed")]
    np.testing.assert_allclose(*logs, rtol=0.02)
    if "cpu" in goes_on.stdout:
        assert_same_run("tuned-killed", "tuned-whole", 0)


BAD_ARTICLES = [
    '{"text": "cut',
    '{"txt": "a"}',
    '{"text": "\\ud800"}',
    '["text"]',
    "7",
    '{"text": 3}',
    '{"text": "a", "title": 3}',
    "[" * 9999,
]


@pytest.mark.parametrize("line", BAD_ARTICLES)
def test_malformed_rows_are_named(line, capsys):
    # Blanks make it long: of a short row, an epoch may have no passage.
    Path("bad.jsonl").write_text('{"text": "good"}\n' + line.ljust(3000) + "\n")
    assert "bad.jsonl:2: " in refused(capsys, ADAPT + "bad --data bad.jsonl")


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--data packed.jsonl", "packed.jsonl:1: UnicodeDecodeError"),
        (
            "--data pairs.jsonl",
            "pairs.jsonl:1: ValueError: a pair of query and passages: for --stage",
        ),
        ("--data void", "void: no rows in there"),
        ("--model nothing", "nothing: no folder of that name; of the hub: OSError"),
        (
            "--model begun",
            "begun: holds no finished model, no config.json; the run in it is not done",
        ),
        ("--data piped", "piped: a pipe, not a regular file"),
        ("--max-length 20", "--max-length 20: the prompts take"),
        ("--max-length 3000", "3000 tokens a sequence: the model was made for 2048"),
    ],
)
def test_other_mistakes_are_named(flags, sentence, capsys):
    Path("packed.jsonl").write_bytes(b"\x1f\x8b\x08packed")
    Path("void").mkdir(exist_ok=True)
    Path("begun").mkdir(exist_ok=True)
    Path("begun/run.json").touch()
    if "piped" in flags:
        os.mkfifo("piped")
        os.open("piped", os.O_RDWR)  # a writer, so that to open it for reading does not wait
    assert sentence in refused(capsys, f"{ADAPT}wrong {flags}")


def test_pairs_that_cannot_be_used_are_named(capsys):
    for row, reason in (
        ({"query": "a", "pos": []}, '"pos" is empty'),
        ({"query": "a", "pos": "b"}, "should be lists of texts"),
        ({"question": "a", "pos": ["b"]}, "KeyError: 'query'; there are question, pos"),
    ):
        write_rows("odd.jsonl", [row] * 12)
        assert reason in refused(capsys, f"{FINETUNE}odd --data odd.jsonl")


@pytest.mark.parametrize(
    "flags",
    ["--warmup 100", "--lr 0", "--lr nan", "--seed -1", "--ebae-weight -1", "--temperature 0"],
)
def test_numbers_have_a_range(flags, capsys):
    """What would train backwards, at a hundredth of the rate, or not at all."""
    stage = FINETUNE if "temperature" in flags else ADAPT
    with pytest.raises(SystemExit):
        llara.parse_arguments(f"{stage}o {flags}".split())
    flag, value = flags.split()
    assert f"argument {flag}: {value}: should be from" in capsys.readouterr().err


def test_weights_that_are_all_0_are_refused(capsys):
    flags = "--ar-weight 0 --ebae-weight 0 --ebar-weight 0"
    with pytest.raises(SystemExit):
        llara.parse_arguments(f"{ADAPT}o {flags}".split())
    assert "are all 0" in capsys.readouterr().err


def test_an_output_that_is_not_shared_is_refused(tmp_path):
    """Two ranks with folders of their own, as two machines without a common disk; also if the
    other has a run in its folder.
    """
    script = "import os, llara\nos.chdir(os.environ['RANK'])\nllara.main()"
    Path("apart.py").write_text(script)
    for rank in "01":
        Path(rank, "apart").mkdir(parents=True)
    Path("1/apart/log.jsonl").touch()
    flags = ADAPT.replace("rows.jsonl", "../rows.jsonl").replace(
        "--model model", "--model ../model"
    )
    done = launch(*TORCHRUN, "apart.py", *(flags + "apart").split())
    assert done.returncode != 0
    assert "--output apart: is not shared: rank 1 sees not what rank 0 wrote" in done.stderr


# ---- eval.py -------------------------------------------------------------------------------------


def trec_cases():
    """Five queries full of ties, negative and zero grades, unjudged and unretrieved documents."""
    r = random.Random(7)
    for q in range(5):
        docs = [f"d{i}" for i in range(30)] + ["D1", "é", "d"]
        found = r.sample(docs, [33, 20, 5, 1, 33][q])
        scores = {d: r.choice([0.5, 0.5 + 1e-9, 0.25, -1.0, 2.0]) for d in found}
        judged = r.sample([*docs, "unseen"], 16)
        yield {d: r.choice([-1, 0, 0, 1, 2, 3]) for d in judged}, scores


TREC_EVAL = [  # nDCG@10, MRR@10, Recall@10, @100, @1000, MAP@1000, as pytrec_eval has them
    (0.1852949, 0.2500000, 0.2500000, 1.0000000, 1.0000000, 0.2059753),
    (0.1977207, 0.3333333, 0.1428571, 0.2857143, 0.2857143, 0.0695971),
    (0.0689358, 0.3333333, 0.1666667, 0.1666667, 0.1666667, 0.0555556),
    (0.3189139, 1.0000000, 0.1428571, 0.1428571, 0.1428571, 0.1428571),
    (0.2400728, 0.5000000, 0.4000000, 1.0000000, 1.0000000, 0.2326944),
]


def test_measure_is_trec_eval():
    for (grades, scores), expected in zip(trec_cases(), TREC_EVAL, strict=True):
        assert list(evaluation.measure(grades, scores).values()) == pytest.approx(
            expected, abs=1e-6
        )
    assert not any(evaluation.measure({"a": 1}, {}).values())
    assert not any(evaluation.measure({"a": 0}, {"a": 1.0}).values())


@pytest.mark.parametrize(
    "n, k, block", [(700, 20, 64), (700, 20, 1024), (5, 20, 64), (300, 1, 320)]
)
def test_search_is_exact(n, k, block):
    """The k best, against sorting all; each name has its score; -1 where there is none."""
    r = np.random.default_rng(n + k)
    queries = r.standard_normal((30, 6)).astype(np.float32)
    passages = r.standard_normal((n, 6)).astype(np.float16)
    names = r.permutation(n)
    blocks = [(passages[i : i + block], names[i : i + block]) for i in range(0, n, block)]
    scores, found = evaluation.search(torch.from_numpy(queries), blocks, k)
    row_of = {name: row for row, name in enumerate(names.tolist())}
    for i in range(30):
        every = passages.astype(np.float32) @ queries[i]
        best = np.sort(every)[::-1][:k]
        np.testing.assert_allclose(scores[i, : len(best)], best, rtol=1e-5)
        for score, name in zip(scores[i].tolist(), found[i].tolist(), strict=True):
            if name >= 0:
                assert score == pytest.approx(every[row_of[name]], rel=1e-5)
        assert (found[i] >= 0).sum() == min(n, k)


def write_collection(folder, corpus, queries, qrels):
    write_rows(folder / "corpus.jsonl", corpus)
    write_rows(folder / "queries.jsonl", queries)
    (folder / "qrels").mkdir(exist_ok=True)
    (folder / "qrels/test.tsv").write_text(qrels)
    return folder


HEADER = "query-id\tcorpus-id\tscore\n"


@pytest.fixture(scope="module")
def collection(tmp_path_factory):
    """700 documents; 40 queries of which 30 are judged, and a judged one that is not there."""
    folder = tmp_path_factory.mktemp("collection") / "data"
    r = random.Random(0)
    words = ["llama", "alpaca", "wool", "hat", "sun", "moon", "tree"]
    texts = [" ".join(r.choices(words, k=r.randint(0, 30))) for _ in range(700)]
    corpus = [
        {"_id": f"d{i}", "title": "T" * (i % 2), "text": text} for i, text in enumerate(texts)
    ]
    queries = [{"_id": f"d{i}", "text": "a hat of wool " + texts[i][:40]} for i in range(40)]
    judged = [f"d{i}\td{i + j}\t{j}\n" for i in range(30) for j in range(3)]
    return write_collection(folder, corpus, queries, HEADER + "".join(judged) + "no\tnone\t1\n\n")


def evaluate(*args):
    with mock.patch.object(sys, "argv", ["eval.py", *map(str, args)]):
        evaluation.main()


SMALL = {"CHUNK": 100, "QUERY_BLOCK": 8, "QUERIES_AT_ONCE": 16}


@pytest.fixture
def small_chunks(monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setattr(evaluation, name, value)


def test_report_and_two_ranks(collection, tmp_path, capsys, small_chunks):
    """In trec_eval's order, the same from two processes; own ids go before the cut to k."""
    flags = ["--model", "model", "--data", collection, "--skip-identical-ids", "--top-k", "50"]
    flags += ["--ranks", "5", "50"]
    evaluate(*flags, "--output", tmp_path / "one", "--pairs", tmp_path / "one.jsonl")
    said = capsys.readouterr().out
    assert "1 judged queries are not in queries.jsonl: score 0" in said
    assert "queries take the NEXT prompt, as with the released models" in said
    report = json.loads((tmp_path / "one/data-test/metrics.json").read_text())
    assert report["queries"] == len(report["per_query"]) == 31
    assert not any(report["per_query"]["no"].values())
    run_file = (tmp_path / "one/data-test/run.trec").read_text()
    lines = [line.split() for line in run_file.splitlines()]
    assert len(lines) == 30 * 50
    assert all(query != document for query, _, document, *_ in lines)
    for a, b in itertools.pairwise(lines):
        if a[0] == b[0]:
            assert (np.float32(a[4]), a[2]) > (np.float32(b[4]), b[2])
    assert not list((tmp_path / "one").rglob("embeddings-*"))

    (tmp_path / "small.py").write_text(f"import eval\nvars(eval).update({SMALL})\neval.main()\n")
    flags += ["--output", tmp_path / "two", "--pairs", tmp_path / "two.jsonl"]
    done = launch(*TORCHRUN, tmp_path / "small.py", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nDCG@10") == 1  # process 0 alone prints
    assert (tmp_path / "two/data-test/run.trec").read_text() == run_file
    assert (tmp_path / "two.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()
    two = json.loads((tmp_path / "two/data-test/metrics.json").read_text())
    assert two["per_query"] == report["per_query"]


def test_best_are_sent_a_block_of_queries_at_a_time(small_chunks):
    """One process gets back what it has found, over the borders of blocks."""
    scores = torch.randn(40, 3).sort(dim=1, descending=True).values
    rows = torch.arange(120).view(40, 3)
    with llara.process_group():
        hits = list(evaluation.gather_best(scores, rows))
    assert_same(torch.stack([hit[0] for hit in hits]), scores, 0)
    assert_same(torch.stack([hit[1] for hit in hits]), rows, 0)


def test_embeddings_of_a_killed_run_are_used(collection, tmp_path, small_chunks):
    """What is whole is used, what is damaged or missing made anew; other settings share nothing.

    Ids and texts decide to whom the embeddings belong, not how they are written in the file.
    """
    data = shutil.copytree(collection, tmp_path / "data")
    common = ["--model", "model", "--data", data, "--output", tmp_path, "--keep-embeddings"]
    evaluate(*common)
    run_file = (tmp_path / "data-test/run.trec").read_bytes()
    files = sorted((tmp_path / "data-test").glob("embeddings-*/*.npy"))
    assert len(files) == 7
    files[0].unlink()
    files[1].rename(files[1].with_suffix(".half"))
    rows = [json.loads(line) for line in (data / "corpus.jsonl").read_text().splitlines()]
    rows = [row | {"url": "x" * (7 * i % 50)} for i, row in enumerate(rows)]
    write_rows(data / "corpus.jsonl", rows)
    with mock.patch.object(evaluation, "encode", side_effect=evaluation.encode) as encode:
        evaluate(*common)
    n_texts = [len(call.args[2]) for call in encode.call_args_list]
    assert n_texts == [1, 1, 8, 8, 8, 6, 100, 100]  # trials, queries, passages
    assert (tmp_path / "data-test/run.trec").read_bytes() == run_file
    evaluate(*common, "--passage-length", "100")
    assert len(list((tmp_path / "data-test").glob("embeddings-*/*.npy"))) == 14


def test_mined_pairs(collection, tmp_path):
    """Positives are judged; negatives come from the places asked for, and are no positives.

    The queries d0 and d1 have one text: what answers one of them is a positive of both.
    """
    data = shutil.copytree(collection, tmp_path / "data")
    queries = [json.loads(line) for line in (data / "queries.jsonl").read_text().splitlines()]
    queries[1]["text"] = queries[0]["text"]
    write_rows(data / "queries.jsonl", queries)
    pairs = tmp_path / "pairs.jsonl"
    flags = ["--negatives", "4", "--ranks", "5", "20", "--pairs", pairs]
    evaluate("--model", "model", "--data", data, "--output", tmp_path, *flags)
    corpus = [json.loads(line) for line in (data / "corpus.jsonl").read_text().splitlines()]
    texts = {row["_id"]: f"{row['title']} {row['text']}".strip() for row in corpus}
    found = {}
    for line in (tmp_path / "data-test/run.trec").read_text().splitlines():
        query, _, document, *_ = line.split()
        found.setdefault(query, []).append(texts[document])
    assert len(found["d0"]) == 20  # no more than the pairs need
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    assert len(rows) == 30
    for i, row in enumerate(rows):
        answers = ["d1", "d2", "d3"] if i < 2 else [f"d{i + 1}", f"d{i + 2}"]  # grades 1 and 2
        positives = [texts[answer] for answer in answers]
        assert row["query"] == queries[i]["text"].strip()
        assert row["pos"] == [text for text in positives if text]
        assert len(row["neg"]) == len(set(row["neg"])) <= 4
        assert set(row["neg"]) <= set(found[f"d{i}"][4:]) - set(positives) - {row["query"]}


ROW = {"_id": "d", "text": "t"}
QUERY = {"_id": "q", "text": "t"}
JUDGED = HEADER + "q\td\t1\n"


@pytest.mark.parametrize(
    "sentence, corpus, queries, qrels",
    [
        (
            "corpus.jsonl:2: ValueError: the id 'd' stands in an earlier",
            [ROW, ROW],
            [QUERY],
            JUDGED,
        ),
        ("corpus.jsonl: no rows in there", [], [QUERY], JUDGED),
        ("corpus.jsonl:1: KeyError", [{"_id": "d"}], [QUERY], JUDGED),
        ("corpus.jsonl:1: TypeError", [{"_id": None, "text": "t"}], [QUERY], JUDGED),
        ("queries.jsonl:1: ValueError: the id 'a b'", [ROW], [QUERY | {"_id": "a b"}], JUDGED),
        ("test.tsv:1: should be a header", [ROW], [QUERY], "q\td\t1\n"),
        ("test.tsv:2: should be query id", [ROW], [QUERY], HEADER + "q d 1\n"),
        ("test.tsv:2: should be query id", [ROW], [QUERY], HEADER + "q 0 d 1\n"),
        ("test.tsv:1: should be a header", [ROW], [QUERY], "q 0 d 1\n"),
        ("test.tsv:2: should be query id", [ROW], [QUERY], "query id\tcorpus id\tscore\nq\td\tx\n"),
        ("test.tsv:2: should be query id", [ROW], [QUERY], HEADER + "q\td\t1.5\n"),
        ("test.tsv:3: q and d are judged twice", [ROW], [QUERY], JUDGED + "q\td\t2\n"),
        ("holds no judgement", [ROW], [QUERY], HEADER),
        ("data/queries.jsonl: holds no query", [ROW], [QUERY], HEADER + "other\td\t1\n"),
    ],
)
def test_malformed_collections_are_named(sentence, corpus, queries, qrels, tmp_path, capsys):
    data = write_collection(tmp_path / "data", corpus, queries, qrels)
    with pytest.raises(SystemExit):
        evaluate("--model", "model", "--data", data, "--output", tmp_path)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("eval.py: ") and sentence in said


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ("--model nowhere/at/all", "nowhere/at/all: "),
        ("--passage-length 9", "9 tokens: the prompt alone takes"),
        ("--top-k 0", "--top-k"),
        ("--negatives -1", "--negatives"),
        ("--seed -1", "--seed"),
        ("--pairs no/folder/pairs.jsonl", "is in no folder"),
        ("--pairs mined.jsonl --top-k 100", "should be within 1 and --top-k 100"),
        ("--model plain", "not one token each"),
        ("--model other-prompts", "prompts"),
    ],
)
def test_mistakes_in_evaluating_are_named(flags, sentence, tmp_path, capsys):
    save_plain("plain", tiny_model(vocab_size=257))
    shutil.copytree("model", "other-prompts", dirs_exist_ok=True)
    noted = {"prefix": [5], "SELF": [6, 7], "NEXT": [8, 9], "pooled": 1}
    edit_config("other-prompts", llara={"query_prompt": "self", "prompts": noted})
    data = write_collection(tmp_path / "data", [ROW], [QUERY], JUDGED)
    with pytest.raises(SystemExit):
        evaluate("--model", "model", "--data", data, "--output", tmp_path, *flags.split())
    assert sentence in capsys.readouterr().err


def test_missing_files_are_named_before_the_model_is_loaded(tmp_path, capsys):
    """Of all collections at once, with the splits that are there."""
    a = write_collection(tmp_path / "a", [ROW], [QUERY], JUDGED)
    shutil.copy(a / "qrels/test.tsv", a / "qrels/train.tsv")
    b = write_collection(tmp_path / "b", [ROW], [QUERY], JUDGED)
    (b / "corpus.jsonl").unlink()
    with pytest.raises(SystemExit):
        evaluate("--model", "no/model", "--data", a, b, "--split", "dev", "--output", tmp_path)
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "a/qrels/dev.tsv: no such file; --split can be: test, train" in said
    assert "b/corpus.jsonl: no such file" in said
    assert "b/qrels/dev.tsv: no such file; --split can be: test" in said


def test_one_evaluation_at_a_time(tmp_path, capsys):
    data = write_collection(tmp_path / "data", [ROW], [QUERY], JUDGED)
    flags = ["--model", "model", "--data", data, "--output", tmp_path]
    (tmp_path / "data-test").mkdir()
    with llara.open_alone(tmp_path / "data-test/.lock"), pytest.raises(SystemExit):
        evaluate(*flags)
    assert "another run" in capsys.readouterr().err
    evaluate(*flags)


def test_a_hub_model_has_results_of_its_own(tmp_path, monkeypatch, capsys):
    """Not those of a local model of the same last name. Its config.json says what queries take."""
    data = write_collection(tmp_path / "data", [ROW], [QUERY], JUDGED)
    shutil.copytree("model", tmp_path / "adapted")
    edit_config(tmp_path / "adapted", llara={"query_prompt": "self"})
    monkeypatch.chdir(tmp_path)

    def read_from_cache(kind, name, *options):
        return llara.read_model(kind, "adapted", *options)

    monkeypatch.setattr(evaluation, "read_model", read_from_cache)
    evaluate("--model", "somebody/adapted", "--data", data)
    assert "queries take the SELF prompt, as its config.json says" in capsys.readouterr().out
    assert Path("somebody--adapted/eval/data-test/metrics.json").exists()
    assert not Path("adapted/eval").exists()


def test_collection_of_docstrings(tmp_path, monkeypatch):
    """The query is the summary, less the object's name; a repeated text is left out."""
    rest = "It has a rest that is long enough, with more than fifteen words, so that it is kept."
    text = f'"""Make f from a thing.\n\n  {rest}"""'
    (tmp_path / "m.py").write_text(f"def f():\n  {text}\ndef g():\n  {text}\n")
    monkeypatch.setattr(evaluation.sysconfig, "get_path", lambda _: str(tmp_path))
    evaluation.write_python_collection(tmp_path / "out")
    assert json.loads((tmp_path / "out/queries.jsonl").read_text())["text"] == "Make from a thing."
    assert json.loads((tmp_path / "out/corpus.jsonl").read_text())["text"] == rest
    assert evaluation.read_qrels(tmp_path / "out/qrels/test.tsv") == {"q0": {"d0": 1}}
