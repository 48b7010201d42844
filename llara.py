# SPDX-License-Identifier: MIT
"""LLaRA in one file: a causal language model becomes a text encoder for dense retrieval (arXiv 2312.15503).

A passage is followed by two prompts, in one sequence, and the model is run once:

    " passage ", summarize the above passage within eight words: <s1>..<s8> ", predict the following passage ..: <s9>..<s16>
    prefix    `------------------------- SELF ---------------------------'  `----------------------- NEXT -----------------'

    may look at ->   prefix+passage   SELF     NEXT        EBAE: the hidden states at <s1>..<s8> predict the set of
    prefix+passage       causal                            tokens of the passage itself.
    SELF                  yes        causal                EBAR: those at <s9>..<s16> predict the set of tokens of
    NEXT                  yes          no     causal       the passage that follows it.

NEXT never sees SELF and its positions start where SELF's start, so one pass equals two. The embedding of a text is the mean
of the last hidden states at its eight tokens, L2-normalised; passages use SELF, queries use NEXT.

    python llara.py                                                     # a tiny model on Python's own documentation, minutes
    torchrun llara.py --data wiki.jsonl                                 # the same on your text
    torchrun --nproc-per-node 8 llara.py --data wiki.jsonl --model meta-llama/Llama-2-7b-hf --gradient-checkpointing
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 llara.py ...      # on both nodes
"""
import argparse
import ast
import contextlib
import gzip
import json
import math
import os
import re
import resource
import shutil
import sys
import sysconfig
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers are the parallelism; both at once deadlock on fork
import numpy as np
import tokenizers
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_state_dict, set_model_state_dict, set_state_dict)
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from tqdm import tqdm
from transformers import (
    AddedToken, AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast)


class BadInput(Exception):
    """A mistake in what the user gave: shown as one sentence, without a traceback."""


# ---- prompts ---------------------------------------------------------------------------------------------------------

PREFIX = '"'
SPECIAL = [f"<s{i}>" for i in range(1, 17)]
SELF = '", summarize the above passage within eight words: ' + "".join(SPECIAL[:8])
NEXT = '", predict the following passage within eight words: ' + "".join(SPECIAL[8:])


class Prompts(NamedTuple):
    """Token ids of the three fixed parts of a sequence; SELF and NEXT end with their eight special tokens."""
    prefix: list
    SELF: list
    NEXT: list


def make_prompts(tokenizer):
    """The prompts in this tokenizer's ids: (2, 19, 18) of them for Llama-2, other numbers elsewhere.

    Raises BadInput if <s1>..<s16> are not one token each."""
    prompts = Prompts(tokenizer(PREFIX)["input_ids"], *(tokenizer(p, add_special_tokens=False)["input_ids"] for p in (SELF, NEXT)))
    for ids, special in (prompts.SELF, SPECIAL[:8]), (prompts.NEXT, SPECIAL[8:]):
        if ids[-8:] != tokenizer.convert_tokens_to_ids(special) or tokenizer.unk_token_id in ids[-8:]:
            raise BadInput(f"the tokenizer does not hold {special[0]}..{special[-1]} as one token each; load the model with llara.load")
    return prompts


# ---- data: lines -> passages -> examples -> steps ----------------------------------------------------------------------

# The English stop words of NLTK, as in the released code; those with an apostrophe cannot occur once [\W_]+ is gone.
STOP_WORDS = frozenset("""i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers
herself it its itself they them their theirs themselves what which who whom this that these those am is are was were be been
being have has had having do does did doing a an the and but if or because as until while of at by for with about against
between into through during before after above below to from up down in out on off over under again further then once here
there when where why how all any both each few more most other some such no nor not only own same so than too very s t can
will just don should now d ll m o re ve y ain aren couldn didn doesn hadn hasn haven isn ma mightn mustn needn shan shouldn
wasn weren won wouldn""".split())
SENTENCE_END = re.compile(r"""[.!?]["')\]]*\s+|[。！？]|\n""")


def content_words(text):
    """What is left of a target text without [\\W_]+ and stop words (the released recipe's --remove_stop_words)."""
    return " ".join(w for w in re.sub(r"[\W_]+", " ", text).split() if w.lower() not in STOP_WORDS)


def boundary(text, k, n):
    """Where passage k of n begins: at the sentence end nearest to k/n of the text, or else at a space, or else just there."""
    at, reach = len(text) * k // n, len(text) // (2 * n)  # half a window: neighbouring boundaries cannot cross
    if k in (0, n):
        return at
    ends = [m.end() for m in SENTENCE_END.finditer(text, at - reach, at + reach)]
    return min(ends, key=lambda end: abs(end - at)) if ends else text.find(" ", at, at + reach) + 1 or at


class Lines:
    """Random access to the lines of .jsonl files. Only byte offsets are held in memory: 8 bytes a line.

    The number of examples of a line follows from its length in bytes alone, so that nothing is parsed or tokenised before
    step 0: an article of n windows (`window` bytes each) has n - 1 adjacent pairs of passages; a row of the released format
    is one example. `self.ends[i]` counts the examples up to and including line i."""

    def __init__(self, paths):
        self.paths, self.first, starts, lengths = paths, [0], [], []
        for path in paths:
            with open(path, "rb") as f:
                lengths.append(np.fromiter(map(len, f), np.int64))
            starts.append(np.cumsum(lengths[-1]) - lengths[-1])
            self.first.append(self.first[-1] + len(starts[-1]))
        self.starts, self.lengths = np.concatenate(starts), np.concatenate(lengths)

    def count_examples(self, window):
        counts = np.maximum(-(-self.lengths // window) - 1, 0)
        for i, j in zip(self.first, self.first[1:]):
            if i < j and "input" in self.row(i):  # a file is of one format: that of its first row
                counts[i:j] = self.lengths[i:j] > 2  # 2: an empty line, "\r\n"
        self.ends = np.cumsum(counts)
        return int(self.ends[-1]) if len(counts) else 0

    def name(self, i):
        file = np.searchsorted(self.first, i, side="right") - 1
        return f"{self.paths[file]}:{i - self.first[file] + 1}"

    def row(self, i):
        """Line i as a dict, its texts checked; BadInput names the file and line of a malformed one."""
        with open(self.paths[np.searchsorted(self.first, i, side="right") - 1], "rb") as f:
            f.seek(self.starts[i])
            line = f.read(self.lengths[i])
        try:
            row = json.loads(line)
            texts = [row[key] for key in (("input", "output_summarize", "output_predict") if "input" in row else ("text",))]
            "".join([*texts, row.get("title") or ""]).encode()  # a lone surrogate cannot be tokenised
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            raise BadInput(f'{self.name(i)}: not a row {{"text": ..}} or {{"input": .., "output_summarize": .., "output_predict": '
                           f'..}} of UTF-8 strings ({type(e).__name__}: {e}); mend or remove the line') from None
        if not texts[0].strip():
            raise BadInput(f"{self.name(i)}: the text is empty; remove the line")
        return row

    def example(self, i):
        """Example i: (line, passage, text whose tokens EBAE predicts, text whose tokens EBAR predicts)."""
        line = int(np.searchsorted(self.ends, i, side="right"))
        row, n = self.row(line), int(self.ends[line] - (self.ends[line - 1] if line else 0)) + 1
        if "input" in row:
            return line, row["input"], row["output_summarize"], row["output_predict"]
        text, k = article(row), int(i - self.ends[line]) + n - 1
        a, b, c = (boundary(text, j, n) for j in (k, k + 1, k + 2))
        return line, text[a:b].strip(), text[a:b].strip(), text[b:c].strip()


def article(row):
    """The text of a row, with its title in front unless it begins with it."""
    text, title = row.get("text", row.get("input")), row.get("title") or ""
    return text if text.startswith(title) else f"{title}\n{text}"


def collate(examples, prompts):
    """Lists of ids (passage, EBAE targets, EBAR targets) -> one right-padded batch.

    input_ids (B, L); lengths (B,) of the passages; self_targets (B, U) and next_targets (B, U'), padded with -100; counts (3,):
    the passage tokens, the rows with any EBAE and those with any EBAR target, by which the three losses are divided."""
    def pad(rows, value):
        out = torch.full((len(rows), max(map(len, rows))), value)
        for i, row in enumerate(rows):
            out[i, :len(row)] = torch.tensor(row, dtype=torch.long)
        return out

    passages, targets, following = zip(*examples)
    return {"input_ids": pad([[*prompts.prefix, *p, *prompts.SELF, *prompts.NEXT] for p in passages], 0),  # pads are never seen
            "lengths": torch.tensor([len(p) for p in passages]),
            "self_targets": pad(targets, -100), "next_targets": pad(following, -100),
            "counts": torch.tensor([sum(map(len, passages)), sum(map(bool, targets)), sum(map(bool, following))])}


class Steps(torch.utils.data.Dataset):
    """Item i is all that one rank needs for step i: a list of micro-batches, which a worker prepares ahead of the device.

    The examples of a step are a pure function of (seed, epoch, step): a fresh permutation of all examples each epoch, cut
    into global batches. Only *within* a global batch are they sorted by length and cut into micro-batches; the update does
    not depend on that split, so padding is saved at no cost in randomness. For it every rank tokenises the whole global
    batch (a worker's time, not the device's), and so knows the global counts without asking the other ranks."""

    def __init__(self, lines, tokenizer, prompts, args, rank=0, world=1):
        self.lines, self.tokenizer, self.prompts, self.args, self.rank, self.world = lines, tokenizer, prompts, args, rank, world
        self.room = args.max_length - sum(map(len, prompts))  # tokens left for the passage
        self.special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special} | set(tokenizer.all_special_ids)
        self.epoch, self.order = -1, None

    def __len__(self):
        return self.args.steps

    def tokenise(self, texts):
        """-> ids cut to one window, and the part of each text that they cover. "<s1>" in a text is text, not our token."""
        out = self.tokenizer(texts, add_special_tokens=False, truncation=True, max_length=self.room, split_special_tokens=True,
                             return_offsets_mapping=True)
        return out["input_ids"], [t[:o[-1][1]] if o else "" for t, o in zip(texts, out["offset_mapping"])]

    def examples(self, indices):
        """-> [(line, passage ids, EBAE target ids, EBAR target ids)]; a passage and its target are cut by the same window."""
        lines, *texts = zip(*map(self.lines.example, indices))
        passages, _ = self.tokenise(texts[0])
        bags = []
        for column in texts[1:]:
            words = [content_words(t) for t in self.tokenise(column)[1]]
            bags.append([sorted(set(ids) - self.special) for ids in self.tokenizer(
                words, add_special_tokens=False, split_special_tokens=True)["input_ids"]])
        return list(zip(lines, passages, *bags))

    def indices(self, step):
        """Which examples make the global batch of a step."""
        n, size = int(self.lines.ends[-1]), self.args.batch_size
        for position in range(step * size, (step + 1) * size):
            if position // n != self.epoch:
                self.epoch = position // n
                self.order = np.random.default_rng([self.args.seed, self.epoch]).permutation(n)
            yield self.order[position % n]

    def __getitem__(self, step):
        try:
            examples = self.examples(list(self.indices(step)))
        except BadInput as e:
            return e  # handed over, for an exception raised in a worker would arrive as a traceback
        examples.sort(key=lambda e: -len(e[1]))  # longest first: too large a micro-batch shows in the first step
        size = self.args.micro_batch_size
        parts = [examples[i:i + size] for i in range(0, len(examples), size)]
        micros = [collate([e[1:] for e in part], self.prompts) for part in parts]
        counts = sum(m["counts"] for m in micros)
        lengths = [sum(map(len, self.prompts)) + len(e[1]) for e in examples]
        return {"micros": [{**m, "counts": counts} for m in micros[self.rank::self.world]],  # ranks run like lengths together
                "lines": [[self.lines.name(e[0]) for e in part] for part in parts], "lengths": lengths,
                "padding": 1 - sum(lengths) / sum(m["input_ids"].numel() for m in micros)}


def python_docs(path):
    """Writes the documentation that every Python carries as articles: the language reference, one docstring a paragraph."""
    from pydoc_data.topics import topics
    root, articles = Path(sysconfig.get_path("stdlib")), dict(topics)
    for file in sorted(root.rglob("*.py")):
        if not {"site-packages", "test", "tests"} & set(file.relative_to(root).parts):
            with contextlib.suppress(SyntaxError, ValueError):
                nodes = [n for n in ast.walk(ast.parse(file.read_bytes()))
                         if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))]
                articles[".".join(file.relative_to(root).with_suffix("").parts)] = "\n\n".join(filter(None, map(ast.get_docstring, nodes)))
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(json.dumps({"title": k, "text": v}) + "\n" for k, v in articles.items() if v.strip())


# ---- the joint sequence and its mask -----------------------------------------------------------------------------------

def joint_mask(start, n_self, length):
    """Who may look at whom, and where each token stands. start (B,): the column where SELF begins; it is n_self long.

    Returns a boolean mask (B, 1, L, L), True = may look, and position_ids (B, L). Causal, but NEXT does not see SELF, and
    NEXT's positions begin again at SELF's, as if SELF were not there (the released code's 4D mask, paper section 3.2).
    Pads come last: causality hides them, and what they themselves see is of no interest."""
    column = torch.arange(length, device=start.device)                                 # (L,)
    start = start[:, None]                                                             # (B, 1)
    is_next = column >= start + n_self                                                 # (B, L)
    is_self = (column >= start) & ~is_next                                             # (B, L)
    causal = column[:, None] >= column                                                 # (L, L)
    mask = causal & ~(is_next[:, :, None] & is_self[:, None, :])                       # (B, L, L)
    return mask[:, None], column - n_self * is_next                                    # (B, 1, L, L), (B, L)


def last8(hidden, ends):
    """The states of the eight tokens before column `ends` (B,): hidden (B, L, d) -> (B, 8, d)."""
    columns = ends[:, None] + torch.arange(-8, 0, device=ends.device)                  # (B, 8)
    return hidden[torch.arange(len(ends), device=ends.device)[:, None], columns]       # (B, 8, d)


def pool(hidden, ends):
    """Embedding: the mean of the eight states, in float32, L2-normalised: (B, L, d), (B,) -> (B, d)."""
    return F.normalize(last8(hidden, ends).float().mean(1), dim=-1)


# ---- losses ----------------------------------------------------------------------------------------------------------

class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum over N tokens of -log_softmax(hidden @ weight.T)[target], without ever holding the (N, V) logits.

    hidden (N, d), weight (V, d), targets (N,) -> scalar, float32. Both gradients are made in the forward pass, while a chunk's
    logits are at hand: three matrix products instead of the four that recomputing takes. d loss / d logits = softmax - onehot."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk=512):
        total = torch.zeros((), device=hidden.device)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        for i in range(0, len(hidden), chunk):
            h, y = hidden[i:i + chunk], targets[i:i + chunk, None]                     # (c, d), (c, 1)
            logp = F.log_softmax((h @ weight.T).float(), dim=-1)                       # (c, V)
            total -= logp.gather(1, y).sum()
            if any(ctx.needs_input_grad):
                grad = logp.exp_().scatter_add_(1, y, logp.new_full(y.shape, -1)).to(h.dtype)  # (c, V) softmax - onehot
                grad_hidden[i:i + chunk] = grad @ weight
                grad_weight += grad.T @ h
            del logp
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None, None


def bag_loss(logits, targets):
    """Sum over rows of -mean_{v in U} log_softmax(max over the eight positions)[v] (paper eq. 4; max and mean as released).

    logits (B, 8, V); targets (B, U): each row's unique target ids, padded with -100; a row without any adds nothing.
    Divide by the number of rows with a target for the released mean."""
    logp = logits.float().max(1).values.log_softmax(-1)                                # (B, V)
    real = targets >= 0                                                                # (B, U)
    picked = logp.gather(1, targets.clamp(min=0)) * real                               # (B, U)
    return -(picked.sum(1) / real.sum(1).clamp(min=1)).sum()


def total_loss(losses, counts, ar_weight=1.0, bow_weight=0.1):
    """L = L_AR + 0.1 mean(L_EBAE, L_EBAR), of the two only those with a target in the batch. losses, counts (3,) -> scalar."""
    ar, ebae, ebar = losses
    return ar_weight * ar + bow_weight * (ebae + ebar) / (counts[1:] > 0).sum().clamp(min=1)


# ---- model -----------------------------------------------------------------------------------------------------------

class Llara(nn.Module):
    """Any HF causal language model with the two pretext tasks on top; it adds no weights. lm: the model; prompts: its Prompts."""

    def __init__(self, lm, prompts):
        super().__init__()
        self.lm, self.prompts = lm, prompts

    def hidden(self, **inputs):
        """Last hidden states, after the final norm: (B, L) ids -> (B, L, d). `base_model` is the decoder without its head."""
        return self.lm.base_model(**inputs, use_cache=False).last_hidden_state

    def forward(self, batch):
        """A batch of `collate` -> its share of (L_AR, L_EBAE, L_EBAR), a (3,) float32 tensor.

        Each is a sum over the batch divided by batch["counts"]. With the counts of a global batch in every micro-batch, the
        shares add up to the loss of the global batch, however it is split. The head is applied where a loss needs it and
        nowhere else; it happens in here because FSDP gathers its weights for the forward of the root module alone."""
        ids, lengths, counts = batch["input_ids"], batch["lengths"], batch["counts"].clamp(min=1)
        n, head = len(self.prompts.prefix), self.lm.get_output_embeddings()
        start = n + lengths                                                            # (B,) where SELF begins
        mask, positions = joint_mask(start, len(self.prompts.SELF), ids.shape[1])
        hidden = self.hidden(input_ids=ids, attention_mask=mask, position_ids=positions)  # (B, L, d)

        column = torch.arange(1, ids.shape[1], device=ids.device)                      # (L-1,) a token is predicted one before
        of_passage = (column >= n) & (column < start[:, None])                         # (B, L-1)
        ar = ChunkedCrossEntropy.apply(hidden[:, :-1][of_passage], head.weight, ids[:, 1:][of_passage])

        end = start + len(self.prompts.SELF)                                           # (B,) where NEXT begins
        ebae = bag_loss(head(last8(hidden, end)), batch["self_targets"])               # (B, 8, V) logits
        ebar = bag_loss(head(last8(hidden, end + len(self.prompts.NEXT))), batch["next_targets"])
        return torch.stack([ar, ebae, ebar]) / counts

    def embed(self, input_ids, lengths):
        """Embeddings (B, d), float32, unit rows, of sequences prefix + text + prompt, right-padded: ids (B, L), lengths (B,).

        No mask: causality hides the pads, and without one the fast attention kernels run."""
        return pool(self.hidden(input_ids=input_ids), lengths)


def add_special_tokens(lm, tokenizer):
    """Adds what is missing of <s1>..<s16>. The new rows start from the mean of the old ones: a random row would stand apart
    from all others, draw attention to itself and, in the head, take probability from every real token (Hewitt, 2021)."""
    new, old = [t for t in SPECIAL if t not in tokenizer.get_vocab()], len(tokenizer)
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in new], special_tokens=True)
    if len(tokenizer) > lm.get_input_embeddings().num_embeddings:  # some models bring spare rows
        lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        for layer in (lm.get_input_embeddings(), lm.get_output_embeddings()):
            layer.weight[tokenizer.convert_tokens_to_ids(new)] = layer.weight[:old].mean(0)


def check(model):
    """Raises BadInput if this architecture cannot be trained here: if its head is more than a matrix product (bias, scaling,
    capping), or if the joint pass is not what two passes give (positions or the 4D mask ignored). Takes a second, not a night."""
    p, device = model.prompts, model.lm.device
    passages = [[p.SELF[-1 - i] for i in range(n)] for n in (3, 8)]  # any ids do
    batch = collate([(ids, [], []) for ids in passages], p)
    start = len(p.prefix) + batch["lengths"]
    with torch.no_grad():
        mask, positions = joint_mask(start, len(p.SELF), batch["input_ids"].shape[1])
        joint = model.hidden(input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions)
        end = start + len(p.SELF)
        for ends, prompt in (end, p.SELF), (end + len(p.NEXT), p.NEXT):
            for i, ids in enumerate(passages):
                alone = torch.tensor([[*p.prefix, *ids, *prompt]], device=device)
                if not torch.allclose(pool(joint, ends)[i], model.embed(alone, torch.tensor([alone.shape[1]]))[0], atol=1e-4):
                    raise BadInput(f"{type(model.lm).__name__}: one pass over both prompts differs from two; the architecture ignores "
                                   "position_ids or the attention mask and cannot be adapted by this script")
        head = model.lm.get_output_embeddings()
        if not torch.allclose(model.lm(input_ids=alone).logits, model.hidden(input_ids=alone) @ head.weight.T, atol=1e-4):
            raise BadInput(f"{type(model.lm).__name__}: its logits are more than hidden states @ head.weight; not supported")


def load(name):
    """A causal language model (hub name or folder) with float32 weights, and its tokenizer, with <s1>..<s16> in both.

    float32 whatever the file holds: in bfloat16 a step of 1e-5 on a weight of 0.02 is rounded away. sdpa because eager adds a
    boolean mask as 0/1 and flash attention takes none. No code from the folder is run. Raises BadInput."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        lm, info = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, attn_implementation="sdpa",
                                                        trust_remote_code=False, output_loading_info=True)
    except (OSError, ValueError) as e:
        raise BadInput(f"--model {name} cannot be loaded as a causal language model: {str(e).strip().splitlines()[0]}") from e
    if info["missing_keys"]:
        raise BadInput(f"--model {name} lacks {', '.join(sorted(info['missing_keys'])[:3])}: it is no complete causal language model")
    if not tokenizer.is_fast:
        raise BadInput(f"--model {name} has a slow tokenizer, which gives no offsets; convert it to a tokenizer.json first")
    add_special_tokens(lm, tokenizer)
    return lm, tokenizer


def small_model(texts, vocab_size=4096):
    """A Llama of 2 layers and a byte-level BPE tokenizer trained on `texts`, from scratch: it runs anywhere in minutes.

    Tied embeddings, for then a state that is near a word's embedding already predicts that word, and EBAE learns soonest."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<s>", "</s>", *SPECIAL], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    bpe.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=256, intermediate_size=704, num_hidden_layers=2, num_attention_heads=4,
                         max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32), tokenizer


MODEL_CARD = """---
library_name: transformers
tags: [llara, dense-retrieval]
---
# A LLaRA text encoder

A causal language model adapted by EBAE and EBAR ([Llama2Vec / LLaRA](https://arxiv.org/abs/2312.15503)). Search by dot product:

```python
import torch
from transformers import AutoModel, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModel.from_pretrained(".")
SELF, NEXT = {SELF!r}, \\
             {NEXT!r}
def embed(text, prompt):                    # passages: SELF, queries: NEXT; of an adapted, not fine-tuned model: SELF for both
    ids = tokenizer('"').input_ids
    for part in (text, prompt): ids += tokenizer(part, add_special_tokens=False).input_ids
    with torch.no_grad(): hidden = model(torch.tensor([ids])).last_hidden_state    # (1, length, d)
    return torch.nn.functional.normalize(hidden[0, -8:].mean(0), dim=-1)
print(embed("A llama is a camelid.", SELF) @ embed("What is a llama?", NEXT))
```

Base model: {base}. Adapted on: {data}. {steps} steps, batch {batch_size}, length {max_length}, lr {lr}.
"""


def save(lm, tokenizer, folder, card="", state_dict=None):
    """An ordinary HF folder: safetensors, config, tokenizer, and `card` as its README.md. Each file is written aside and
    then renamed, so that a reader (or a crash) never meets half a file; the folder's other files stay."""
    folder, aside = Path(folder), Path(folder) / "saving.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    lm.save_pretrained(aside, state_dict=state_dict)
    tokenizer.save_pretrained(aside)
    (aside / "README.md").write_text(card, encoding="utf-8")
    for file in aside.iterdir():
        os.replace(file, folder / file.name)
    aside.rmdir()


@torch.inference_mode()
def encode(model, tokenizer, texts, prompt="self", max_length=512, batch_size=32):
    """Embeds texts: -> (n, d) float32 numpy, unit rows. prompt: "self" for passages, "next" for queries.

    model: what AutoModel or AutoModelForCausalLM loads, any dtype and device. max_length counts the prompts, in tokens. The
    result does not depend on the batch: right-padded, and causal attention never looks to the right."""
    prompts = make_prompts(tokenizer)
    prompt = {"self": prompts.SELF, "next": prompts.NEXT}[prompt]
    room = max_length - len(prompts.prefix) - len(prompt)
    ids = tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=room, split_special_tokens=True)["input_ids"] \
        if len(texts) else []
    ids = [[*prompts.prefix, *i, *prompt] for i in ids]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))  # like lengths together: little padding
    out = np.empty((len(ids), model.config.hidden_size), np.float32)
    for i in range(0, len(order), batch_size):
        rows = order[i:i + batch_size]
        lengths = torch.tensor([len(ids[r]) for r in rows])
        batch = torch.zeros(len(rows), int(lengths[0]), dtype=torch.long)              # (b, L)
        for j, r in enumerate(rows):
            batch[j, :len(ids[r])] = torch.tensor(ids[r])
        hidden = model.base_model(input_ids=batch.to(model.device), use_cache=False).last_hidden_state  # (b, L, d)
        out[rows] = pool(hidden, lengths.to(model.device)).cpu().numpy()
    return out


# ---- training --------------------------------------------------------------------------------------------------------

PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12, "A10": 125e12}  # dense bf16


def on_rank0(function, *args):
    """The result of function(*args), run on rank 0, on every rank; so is its BadInput, that no rank be left waiting."""
    box = [None]
    if dist.get_rank() == 0:
        try:
            box[0] = function(*args)
        except BadInput as e:
            box[0] = e
    dist.broadcast_object_list(box)
    if isinstance(box[0], BadInput):
        raise box[0]
    return box[0]


def prepare_output(args):
    """Makes args.output ready; -> (data files, newest checkpoint or None). An output in use is not overwritten untold."""
    out, files = Path(args.output), []
    if args.resume and not sorted(out.glob("checkpoint-*")):
        raise BadInput(f"--resume: there is no checkpoint in {out}" + (", its run is complete" if (out / "README.md").exists() else ""))
    if not args.resume and out.exists() and any(out.iterdir()):
        if not args.overwrite:
            raise BadInput(f"--output {out} is in use: continue it with --resume, replace it with --overwrite, or name another folder")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    if not args.data:
        python_docs(out / "python-docs.jsonl")
    for name in map(Path, args.data or [out / "python-docs.jsonl"]):
        found = sorted(p for p in name.iterdir() if re.search(r"\.jsonl(\.gz)?$", p.name)) if name.is_dir() else [name]
        if not found or not name.exists():
            raise BadInput(f"--data {name}: " + ("no .jsonl or .jsonl.gz file in this folder" if found == [] else "no such file"))
        files += found
    for i, file in enumerate(files):
        if file.suffix == ".gz":  # gzip has no random access: the price is a plain copy on disk while the run lasts
            files[i] = out / f"unpacked-{i}.jsonl"
            try:
                with gzip.open(file) as packed, open(files[i], "wb") as plain:
                    shutil.copyfileobj(packed, plain)
            except (gzip.BadGzipFile, EOFError) as e:
                raise BadInput(f"{file}: {e}; is it complete?") from None
    return [str(f) for f in files], max((str(p) for p in out.glob("checkpoint-*")), default=None)


def window_bytes(lines, tokenizer, room):
    """Bytes of a line that `room` tokens take, from 64 lines of the data; a tenth less, that few passages be cut short."""
    size = tokens = 0
    for i in np.unique(np.linspace(0, len(lines.lengths) - 1, 64).astype(int)):
        if lines.lengths[i] > 2:
            text = article(lines.row(i))
            part = text[:20000]
            size += lines.lengths[i] * len(part) / len(text)
            tokens += len(tokenizer(part, add_special_tokens=False)["input_ids"])
    return max(1, int(0.9 * room * size / max(tokens, 1)))


def unigram_levels(examples, vocab_size):
    """(3,) the three losses of a model that always predicts the targets' frequencies, whatever it reads: their entropies."""
    counts = np.zeros((3, vocab_size))
    for _, passage, *bags in examples:
        np.add.at(counts[0], passage, 1)
        for row, bag in zip(counts[1:], bags):
            row[bag] += 1 / max(len(bag), 1)  # bag_loss gives each row, not each target, the same weight
    p = counts / counts.sum(1, keepdims=True).clip(1e-9)
    return -(p * np.log(p.clip(1e-30))).sum(1)


def shard(model, device):
    """FSDP2, each decoder layer and then the rest, on any number of ranks, one included: float32 shards; on CUDA bfloat16
    compute (its exponent is float32's, so no loss scaling), gradients reduced in float32. Embeddings and head stay in the
    root group, which keeps tied ones together."""
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if device.type == "cuda" else MixedPrecisionPolicy()
    for module in list(model.modules()):
        if type(module).__name__ in (model.lm._no_split_modules or ()):
            fully_shard(module, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def save_checkpoint(model, optimizer, step, args):
    """Everything --resume needs, as output/checkpoint-STEP: written aside, renamed when whole, and only then is the older one removed."""
    out = Path(args.output)
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=out / "checkpoint.tmp")  # every rank writes its shards
    if dist.get_rank() == 0:
        old = list(out.glob("checkpoint-*"))
        (out / "checkpoint.tmp" / "run.json").write_text(json.dumps({"step": step, "args": vars(args)}, indent=1))
        os.rename(out / "checkpoint.tmp", out / f"checkpoint-{step:08d}")
        for folder in old:
            shutil.rmtree(folder)
    dist.barrier()


def adapt(model, micros, first, world, args):
    """Forward and backward of one step's micro-batches -> their losses (micro-batches, 3), the gradients in .grad."""
    losses = []
    for micro in micros:
        micro = {k: v.to(model.lm.device, non_blocking=True) for k, v in micro.items()}
        losses.append(model(micro))
        loss = total_loss(losses[-1], micro["counts"], args.ar_weight, args.bow_weight)
        (loss * world).backward()  # FSDP takes the mean over ranks, the loss is a sum over them
    return torch.stack(losses).detach()


def train(args):
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    say = print if rank == 0 else lambda *_: None
    out = Path(args.output)
    files, checkpoint = on_rank0(prepare_output, args)
    lines = Lines(files)
    if checkpoint:
        run = json.loads((Path(checkpoint) / "run.json").read_text())
        for key, value in vars(args).items():
            if key not in ("output", "resume", "overwrite", "save_every", "micro_batch_size", "workers") and run["args"][key] != value:
                raise BadInput(f"--resume continues the run as it was begun: --{key.replace('_', '-')} was {run['args'][key]}, not {value}")

    # The model: rank 0 reads it, the others get their shards from there, so that a node holds one copy and not eight.
    lm = None
    def read_model():
        nonlocal lm
        if checkpoint:
            tokenizer = AutoTokenizer.from_pretrained(out)
            lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(out), dtype=torch.float32, attn_implementation="sdpa")
        elif args.model:
            lm, tokenizer = load(args.model)
        else:
            torch.manual_seed(args.seed)
            every = max(1, len(lines.lengths) // 2000)
            lm, tokenizer = small_model(article(lines.row(i))[:5000] for i in range(0, len(lines.lengths), every) if lines.lengths[i] > 2)
        check(Llara(lm, make_prompts(tokenizer)))
        lm.config.save_pretrained(out), tokenizer.save_pretrained(out)
        return lm.config, tokenizer
    config, tokenizer = on_rank0(read_model)
    weights, buffers = (lm.state_dict(), dict(lm.named_buffers())) if rank == 0 else ({}, {})
    with torch.device("meta"):
        model = Llara(AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa"), make_prompts(tokenizer))
    if args.gradient_checkpointing:  # renamed in transformers 5.23
        enable = getattr(model.lm, "activation_checkpointing_enable", None) or model.lm.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    shard(model, device).to_empty(device=device)
    model.lm.tie_weights()
    set_model_state_dict(model.lm, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for name, buffer in model.lm.named_buffers():  # rotary frequencies, which no state dict holds
        if rank == 0:
            buffer.copy_(buffers[name])
        dist.broadcast(buffer, 0)
    model.train()
    lm = weights = None
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.0, fused=True)
    start = 0
    if checkpoint:
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments}
        dcp.load(state, checkpoint_id=checkpoint)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        start = run["step"]

    # The data.
    steps = Steps(lines, tokenizer, model.prompts, args, rank, world)
    if steps.room < 8:
        raise BadInput(f"--max-length {args.max_length} leaves {steps.room} tokens beside {args.max_length - steps.room} of prompts")
    n = lines.count_examples(window_bytes(lines, tokenizer, steps.room))
    if n == 0:
        raise BadInput(f"--data {files[0]}: no article is long enough for two passages of {steps.room} tokens; lower --max-length")
    loader = torch.utils.data.DataLoader(steps, batch_size=None, sampler=range(start, args.steps), num_workers=args.workers,
                                         prefetch_factor=4 if args.workers else None)
    sample = steps.examples(np.random.default_rng(args.seed).permutation(n)[:2048])
    levels = unigram_levels(sample, config.vocab_size)
    n_all, n_embed = sum(p.numel() for p in model.parameters()), model.lm.get_input_embeddings().weight.numel()
    n_body = n_all - n_embed * (1 if config.tie_word_embeddings else 2)
    say(f"model      {args.model or 'a small Llama from scratch (pass --model for a real one)'}: {n_all / 1e6:.1f} M parameters")
    say(f"data       {', '.join(files)}: {len(lines.lengths):,} lines, {n:,} examples of {steps.room} tokens")
    say(f"step       {args.batch_size} examples in micro-batches of {args.micro_batch_size} on {world} x {device.type}, "
        f"~{np.mean([len(e[1]) for e in sample]) * args.batch_size:,.0f} passage tokens; {args.steps} steps = "
        f"{args.steps * args.batch_size / n:.2f} epochs")
    say("yardstick  ln V {:.3f} knows nothing; unigram level AR {:.3f} EBAE {:.3f} EBAR {:.3f}, what word frequencies alone score"
        .format(math.log(config.vocab_size), *levels))
    if rank == 0:
        old = (out / "log.jsonl").read_text().splitlines(True)[:start] if start else []  # one line a step
        (out / "log.tmp").write_text("".join(old))
        os.replace(out / "log.tmp", out / "log.jsonl")
    log = open(out / "log.jsonl", "a", buffering=1) if rank == 0 else None

    peak = next((f for name, f in PEAK_FLOPS.items() if device.type == "cuda" and name in torch.cuda.get_device_name()), None)
    bar = tqdm(loader, initial=start, total=args.steps, disable=rank != 0, unit="step", dynamic_ncols=True)
    last = time.perf_counter()
    for step, item in enumerate(bar, start):
        if isinstance(item, BadInput):
            save_checkpoint(model, optimizer, step, args)
            raise BadInput(f"{item} (saved at step {step}; go on with --resume)")
        torch.manual_seed(args.seed + step * world + rank)  # for models with dropout: the same after --resume
        lr = args.lr * min((step + 1) / max(1, args.warmup * args.steps), (args.steps - step) / max(1, args.steps * (1 - args.warmup)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses = torch.zeros(len(item["lines"]), 3, device=device)                     # (micro-batches of all ranks, 3)
        losses[rank::world] = adapt(model, item["micros"], step, world, args)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()
        dist.all_reduce(losses)
        bad = ~losses.isfinite().all(1)
        if bad.any() or not norm.isfinite():
            rows = [line for part, b in zip(item["lines"], bad.tolist()) if b or not bad.any() for line in part]
            raise BadInput(f"step {step}: the {'loss' if bad.any() else 'gradient'} is not finite, before the update; it came of "
                           f"{', '.join(rows)}; look at these lines, or lower --lr (the last checkpoint is untouched)")
        optimizer.step()
        optimizer.zero_grad()

        (ar, ebae, ebar), now = losses.sum(0).tolist(), time.perf_counter()
        tokens, squares = sum(item["lengths"]), sum(n * n for n in item["lengths"])
        heads = tokens - len(item["lengths"]) * (sum(map(len, model.prompts)) - 16)  # positions to which the head is applied
        # 6 FLOPs a parameter a token, and causal attention (half of 12 d L^2 a layer); what is recomputed does not count
        flops = 6 * (n_body * tokens + n_embed * heads + config.num_hidden_layers * config.hidden_size * squares)
        memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        row = {"step": step, "loss": args.ar_weight * ar + args.bow_weight * (ebae + ebar) / 2, "AR": ar, "EBAE": ebae, "EBAR": ebar,
               "lr": lr, "grad_norm": norm.item(), "tokens_per_s": tokens / (now - last), "padding": item["padding"],
               "mfu": peak and flops / (now - last) / peak / world, "memory_gb": memory / 2**30}
        last = now
        if log:
            log.write(json.dumps(row) + "\n")
            bar.set_postfix_str(f"loss {row['loss']:.3f} AR {ar:.3f} EBAE {ebae:.3f} EBAR {ebar:.3f} lr {lr:.1e} norm {row['grad_norm']:.2f} "
                                f"{row['tokens_per_s']:,.0f} tok/s {row['memory_gb']:.1f} GB" + (f" MFU {row['mfu']:.0%}" if peak else ""))
        if args.save_every and (step + 1) % args.save_every == 0 and step + 1 < args.steps:
            save_checkpoint(model, optimizer, step + 1, args)

    weights = get_model_state_dict(model.lm, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        card = MODEL_CARD.format(**{**vars(args), "SELF": SELF, "NEXT": NEXT, "base": args.model or "from scratch",
                                    "data": ", ".join(Path(f).name for f in files)})
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config)
        save(lm, tokenizer, out, card, weights)
        for leftover in (*out.glob("checkpoint*"), *out.glob("unpacked-*")):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        print(f"saved to {out}: AutoModel.from_pretrained('{out}'), README.md there says how to embed; python eval.py --model {out}")


SMALL = dict(steps=400, batch_size=64, micro_batch_size=16, max_length=112, lr=2e-3, bow_weight=1.0)  # without --model
PAPER = dict(steps=10000, batch_size=256, micro_batch_size=8, max_length=1024, lr=1e-5, bow_weight=0.1)


def arguments(argv=None):
    parser = argparse.ArgumentParser(description="Adapt a causal language model to dense retrieval with EBAE and EBAR.",
                                     epilog="Two defaults: for the small model from scratch / with --model (the paper's).")
    both = {k: f"(default: {SMALL[k]:g} / {PAPER[k]:g})" for k in SMALL}
    group = parser.add_argument_group("what")
    group.add_argument("--data", nargs="+", help='.jsonl or .jsonl.gz files or folders; rows {"text"[, "title"]} or the released '
                       '{"input", "output_summarize", "output_predict"} (default: the documentation of Python itself)')
    group.add_argument("--model", help="hub name or folder of a causal language model (default: a small Llama from scratch)")
    group.add_argument("--output", default="out", help="folder for checkpoints, log.jsonl and at last the model (default: out)")
    group.add_argument("--resume", action="store_true", help="continue from the last checkpoint in --output")
    group.add_argument("--overwrite", action="store_true", help="empty --output first if it is in use")
    group = parser.add_argument_group("how much")
    group.add_argument("--steps", type=int, help=both["steps"])
    group.add_argument("--batch-size", type=int, help=f"examples a step, over all ranks {both['batch_size']}")
    group.add_argument("--micro-batch-size", type=int, help=f"examples in one forward; memory, not result {both['micro_batch_size']}")
    group.add_argument("--max-length", type=int, help=f"tokens of the joint sequence, prompts included {both['max_length']}")
    group.add_argument("--save-every", type=int, default=500, help="steps between checkpoints, 0: none (default: 500)")
    group.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations: less memory, a third more time")
    group.add_argument("--workers", type=int, default=1, help="tokenising processes a rank (default: 1)")
    group = parser.add_argument_group("optimisation")
    group.add_argument("--lr", type=float, help=f"peak {both['lr']}")
    group.add_argument("--warmup", type=float, default=0.1, help="share of the steps (default: 0.1); linear decay follows")
    group.add_argument("--ar-weight", type=float, default=1.0, help="weight of the language-model loss (default: 1)")
    group.add_argument("--bow-weight", type=float, help=f"weight of the mean of EBAE and EBAR {both['bow_weight']}")
    group.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    for key, value in (PAPER if args.model else SMALL).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    return args


def main():
    args = arguments()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if "RANK" in os.environ:  # torchrun's
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    ranks = dist.get_world_size()
    args.micro_batch_size = min(args.micro_batch_size, max(1, args.batch_size // ranks))
    try:
        if args.batch_size % (args.micro_batch_size * ranks):
            raise BadInput(f"--batch-size {args.batch_size} is no multiple of --micro-batch-size {args.micro_batch_size} x {ranks} ranks")
        train(args)
    except BadInput as e:
        sys.exit(f"llara.py: {e}" if dist.get_rank() == 0 else 1)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
