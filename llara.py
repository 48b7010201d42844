# SPDX-License-Identifier: MIT
"""LLaRA in one file: a causal language model becomes a text encoder for dense retrieval.

Paper: "Making Large Language Models A Better Foundation For Dense Retrieval", arXiv 2312.15503.
Released code: github.com/FlagOpen/FlagEmbedding, folder research/LLARA, here as of commit 7ed43d67.

The last hidden state of a language model is local: it knows which token comes next. Retrieval needs
a state that is global: it must carry what a whole passage says. LLaRA asks for that directly, on
plain text. After a passage come two prompts, in one sequence, and the model runs once:

    " passage ", summarize the above passage within eight words: <s1>..<s8> ", predict.. <s9>..<s16>
    |         `--------------------- SELF prompt ----------------------'  `----- NEXT prompt -----'
    prefix: the quote, after a BOS if the tokenizer has one

    EBAE  (embedding-based auto-encoding) the states at <s1>..<s8> must predict the set of words of
          the passage itself. No copying: eight states must hold what a thousand tokens say.
    EBAR  (embedding-based auto-regression) those at <s9>..<s16> must predict the set of words of
          the passage that follows it.

Each prompt closes the quote of the passage, and neither prompt sees the other (`joint_mask`).

The embedding of a text is the mean of the eight states, scaled to length 1. Adaptation, as above,
is followed by fine-tuning on pairs of query and passage; search is by dot product: see eval.py.
Passages take the SELF prompt, queries the NEXT prompt, whose states say what the passage after a
text would hold: the passage after a question is its answer. (A model that is not fine-tuned yet
takes SELF for both, as nothing has made the two comparable.)

It needs torch 2.13 and transformers 5. torchrun starts a process, called a rank, for each GPU; on a
CPU or one GPU, python does as well.

    python llara.py --output tiny                             # a tiny model, Python's own docs
    torchrun llara.py --data wiki.jsonl --model HuggingFaceTB/SmolLM2-135M --output out
    torchrun llara.py --stage finetune --model out --data pairs.jsonl --output retriever
    torchrun --nproc-per-node 8 llara.py --data wiki.jsonl --model meta-llama/Llama-2-7b-hf \
        --gradient-checkpointing --output llama
    python llara.py --explain "The llama is a camelid." --model out
"""

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import glob
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
import traceback
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple, TextIO

import numpy as np
import regex
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dcp_state
import torch.nn.functional as F
from safetensors import SafetensorError
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from tqdm import tqdm
from transformers import (
    AddedToken,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

# ==================================================================================================
# THE METHOD. Shapes: B sequences, L tokens each, d wide states, V tokens in the vocabulary, W words
# in the largest bag; 8 special tokens in a prompt.
# ==================================================================================================

# ---- prompts -------------------------------------------------------------------------------------

# A prompt is words, then the special tokens whose states become the embedding. The eight tokens and
# the quotes are those of the authors' released code; the paper has one </s> and no quotes. To have
# that, change these two: all else is derived from them.
SELF_PROMPT = (
    '", summarize the above passage within eight words: ',
    ["<s1>", "<s2>", "<s3>", "<s4>", "<s5>", "<s6>", "<s7>", "<s8>"],
)
NEXT_PROMPT = (
    '", predict the following passage within eight words: ',
    ["<s9>", "<s10>", "<s11>", "<s12>", "<s13>", "<s14>", "<s15>", "<s16>"],
)


class Prompts(NamedTuple):
    """The ids of the tokens around a passage. SELF and NEXT end with the `pooled` special ones."""

    prefix: list[int]
    SELF: list[int]
    NEXT: list[int]
    pooled: int

    def around(self, text_ids: list[int], prompt: str, max_length: int) -> list[int]:
        """The ids to embed a text: prefix, text, then the "self" or the "next" prompt.

        The text is cut so that all of it has at most `max_length` tokens.
        ValueError if the prompt is unknown, or if the length leaves no room for a text.
        """
        if prompt not in ("self", "next"):
            raise ValueError(f'the prompt {prompt!r} is unknown: take "self" or "next"')
        suffix = self.SELF if prompt == "self" else self.NEXT
        room = max_length - len(self.prefix) - len(suffix)
        if room < 1:
            raise ValueError(f"{max_length} tokens: the prompt alone takes {max_length - room}")
        return [*self.prefix, *text_ids[:room], *suffix]


def tokenize(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """The ids of each text. A "<s1>" in a text is plain characters: it cannot forge a prompt."""
    return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True).input_ids


def make_prompts(
    tokenizer, self_prompt=SELF_PROMPT, next_prompt=NEXT_PROMPT, prefix: str = '"', config=None
) -> Prompts:
    """The prompts in the ids of this tokenizer; for Llama-2: 2, 19 and 18 of them.

    config: of a model that is to embed with them. If it notes the prompts that the model was made
    with, as `train` does, they must be these.
    ValueError if not; if a special token is not one token of this tokenizer; if the prompts have
    different numbers of them; or if nothing stands before a passage.
    """
    (self_words, self_tokens), (next_words, next_tokens) = self_prompt, next_prompt
    if len(self_tokens) != len(next_tokens):
        raise ValueError(f"{len(self_tokens)} special tokens in SELF, {len(next_tokens)} in NEXT")
    tokens = [*self_tokens, *next_tokens]
    token_ids = tokenizer.convert_tokens_to_ids(tokens)
    # Of an unknown token the id is that of <unk>; None in a tokenizer without <unk>.
    if tokenizer.unk_token_id in token_ids:
        raise ValueError(f"not one token each, llara.load adds them: {' '.join(tokens)}")
    prefix_ids, self_ids, next_ids = tokenize(tokenizer, [prefix, self_words, next_words])
    # If this tokenizer puts a BOS first, so do we. It is not left to add_special_tokens=True, which
    # in some tokenizers also appends an EOS: that would stand between the quote and the passage.
    if tokenizer(prefix).input_ids[:1] == [tokenizer.bos_token_id]:
        prefix_ids = [tokenizer.bos_token_id, *prefix_ids]
    if not prefix_ids:
        raise ValueError("without a prefix or a BOS, nothing predicts the first token of a passage")
    pooled = len(self_tokens)
    self_ids += token_ids[:pooled]
    next_ids += token_ids[pooled:]
    prompts = Prompts(prefix_ids, self_ids, next_ids, pooled)
    noted = getattr(config, "llara", {}).get("prompts")
    if noted is not None and noted != prompts._asdict():
        theirs = tokenizer.decode(noted["prefix"] + noted["SELF"] + noted["NEXT"])
        ours = tokenizer.decode(prompts.prefix + prompts.SELF + prompts.NEXT)
        raise ValueError(f"the model was made with the prompts {theirs!r}, not with {ours!r}")
    return prompts


# ---- the pretext tasks and the joint sequence ----------------------------------------------------

# The tasks, each with the prompt whose states must predict its bag of words. Another task is a line
# here, its weight in SETTINGS, and its text in `Adaptation.read_windows`.
BAG_TASKS = {"EBAE": "SELF", "EBAR": "NEXT"}

# Beside them the model keeps its own task, AR, so that it forgets nothing: to predict the passage's
# next token. Those of the prompts are no targets: they are always the same.
TASKS = ("AR", *BAG_TASKS)


def joint_mask(self_start: Tensor, self_length: int, length: int) -> tuple[Tensor, Tensor]:
    """Who may see whom in prefix + passage + SELF + NEXT, and where each token stands.

    self_start (B,): the column at which SELF begins. self_length: how many tokens it has.
    length: L. -> mask (B, 1, L, L) bool, True where the row may see the column; positions (B, L).

    With two tokens each of passage p, SELF s and NEXT n (rows look, columns are seen):

               p p s s n n
            p  1 . . . . .
            p  1 1 . . . .
            s  1 1 1 . . .
            s  1 1 1 1 . .
            n  1 1 . . 1 .
            n  1 1 . . 1 1
    positions  0 1 2 3 2 3      NEXT stands where it would without SELF

    So one pass gives what two would, one with SELF alone and one with NEXT alone. By induction over
    the layers: the states of prefix and passage depend on nothing that comes after them; SELF comes
    before NEXT and cannot see it; a NEXT token attends to the same keys at the same positions as it
    would if SELF were not there; and norms and MLPs work on each token by itself.
    Pads stand at the end, where causality hides them.

    transformers takes a mask of four dimensions as it is, and adds none of its own. The price: with
    a mask, attention cannot take the fast kernel for causal attention. It is paid in adaptation
    only: `embed` has one prompt a sequence, and needs no mask.
    """
    column = torch.arange(length, device=self_start.device)  # (L,)
    next_start = self_start + self_length  # (B,)
    is_next = column >= next_start[:, None]  # (B, L), of pads too, which nothing sees
    is_self = (column >= self_start[:, None]) & ~is_next  # (B, L)
    causal = column[:, None] >= column[None, :]  # (L, L)
    next_sees_self = is_next[:, :, None] & is_self[:, None, :]  # (B, L, L)
    mask = causal & ~next_sees_self  # (B, L, L)
    positions = torch.where(is_next, column - self_length, column)  # (B, L)
    return mask[:, None], positions


def pad(rows: Sequence[Sequence[int]], value: int = 0) -> Tensor:
    """Lists of ids -> (B, L) int64, padded on the right, where causal attention never looks."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


# A row of a batch, not padded yet: the ids of the passage, then each bag in the order of BAG_TASKS.
# A bag is a set of ids: those of the words of a text, without stop words and punctuation. They are
# tokenised anew, since "llama" at the start and " llama" behind a space can be different tokens.
Example = tuple[list[int], ...]


def collate(examples: Sequence[Example], prompts: Prompts) -> dict[str, Tensor]:
    """Examples -> the batch that `Llara.forward` takes.

    A passage of 3 tokens, with a prefix of 1 and prompts of 2 words and 1 special token each, is
    input_ids p a b c s s S n n N: self_start 4, SELF_columns [6], NEXT_columns [9].

    input_ids (B, L): prefix + passage + SELF + NEXT. self_start (B,): the column of SELF.
    SELF_columns, NEXT_columns (B, 8): where the special tokens stand.
    EBAE, EBAR (B, W): ids of the target words, padded with -100.
    counts (3,): `Llara.forward` divides the sums of the three losses by them. For AR it is the
    number of tokens of passages, for EBAE and EBAR that of examples with target words.
    """
    passages, *bags = zip(*examples, strict=True)
    sequences = [[*prompts.prefix, *ids, *prompts.SELF, *prompts.NEXT] for ids in passages]
    passage_lengths = torch.tensor([len(ids) for ids in passages])  # (B,)
    self_start = len(prompts.prefix) + passage_lengths  # (B,)
    self_end = self_start + len(prompts.SELF)  # (B,)
    next_end = self_end + len(prompts.NEXT)  # (B,)
    from_the_end = torch.arange(-prompts.pooled, 0)  # (8,)
    batch = {
        "input_ids": pad(sequences),  # (B, L)
        "self_start": self_start,
        "SELF_columns": self_end[:, None] + from_the_end,  # (B, 8)
        "NEXT_columns": next_end[:, None] + from_the_end,  # (B, 8)
    }
    counts = [int(passage_lengths.sum())]
    for task, bag in zip(BAG_TASKS, bags, strict=True):
        batch[task] = pad(bag, -100)  # (B, W)
        counts.append(sum(len(ids) > 0 for ids in bag))
    batch["counts"] = torch.tensor(counts)  # (3,)
    return batch


# ---- losses --------------------------------------------------------------------------------------


def next_token_loss(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """AR: the sum over N tokens of -log_softmax(states @ weight.T)[target].

    states (N, d), weight (V, d) of the head, targets (N,) -> scalar, float32.
    All logits, (N, V) in float32, are what fills the memory of the released code. Here they exist
    512 rows at a time, and are not kept for backward.
    """
    # With "sum" PyTorch works out a chunk's gradients while it has its logits, but adds up losses
    # in the type of the states: in bfloat16 half a per cent off. With "none" we add up in float32,
    # and backward makes the logits once more.
    reduction = "sum" if states.dtype == torch.float32 else "none"
    # For speed alone: in which type it adds up products. "auto" is four times slower on a CPU.
    policy = "auto" if states.is_cuda else "accurate"
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=512, acc_policy=policy)
    losses = F.linear_cross_entropy(states, weight, targets, reduction=reduction, options=options)
    return losses.float().sum()


def bag_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """EBAE and EBAR: the sum over rows of -mean_w log_softmax(max_8 z)[w], w its target words.

    logits z (B, 8, V): at the special tokens. targets (B, W): ids without repetition, padded with
    -100; a row without any adds nothing. -> scalar, in at least float32. Paper: section 3.2.

    A bag, because retrieval asks which words are there, and not for their order. The maximum over
    the eight, because then a word is named as soon as one of the states names it: they can share
    the work, where a mean would ask every state for every word. (Why eight, the paper does not say;
    it has one.) The embedding, by contrast, is a mean, and of states, not of logits: what each of
    them holds is still in it, and two texts are compared by one dot product.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (B, 8, V)
    log_probs = logits.amax(dim=1).log_softmax(dim=-1)  # (B, V)
    is_target = targets >= 0  # (B, W)
    target_log_probs = log_probs.gather(1, targets.clamp(min=0))  # (B, W)
    row_sums = target_log_probs.masked_fill(~is_target, 0.0).sum(dim=1)  # (B,)
    return -(row_sums / is_target.sum(dim=1).clamp(min=1)).sum()


def total_loss(losses: Tensor, weights: Sequence[float]) -> Tensor:
    """L = the weighted sum of AR, EBAE and EBAR. losses (3,), weights (3,) -> scalar.

    The released code has AR + 0.1 times the mean of the other two, so weights 1, 0.05, 0.05: a
    pretrained model must not forget what it knows.
    """
    return (losses * torch.tensor(weights, dtype=losses.dtype, device=losses.device)).sum()


def contrastive_loss(
    queries: Tensor, passages: Tensor, excluded: Tensor, temperature: float = 0.01
) -> tuple[Tensor, Tensor]:
    """InfoNCE, the loss of fine-tuning: the mean over queries of -log softmax_p(q . p / T)[p+].

    queries (Q, d), passages (P, d): unit rows; passage i is the positive of query i, all others are
    negatives. excluded (Q, P) bool: True where another passage answers the query too, and so is no
    negative; never True for its own passage, at [i, i]. The temperature is the released code's:
    dot products of unit vectors lie close together, and 0.01 spreads them over [-100, 100].
    -> the loss, and the share of queries that score their own passage highest, both scalars.
    """
    scores = queries @ passages.T / temperature  # (Q, P)
    scores = scores.masked_fill(excluded, -torch.inf)
    own_passage = torch.arange(len(queries), device=queries.device)  # (Q,)
    loss = F.cross_entropy(scores, own_passage)
    accuracy = (scores.argmax(dim=1) == own_passage).float().mean()
    return loss, accuracy


# ---- the model -----------------------------------------------------------------------------------


def max_positions(config, joint: bool = False) -> float:
    """The longest sequence that a model was made for, in tokens; infinity if it does not say.

    That is its number of positions. With LongRoPE and dynamic RoPE it is the original number:
    beyond that, the angles follow the longest text of a batch, and so would the embeddings of the
    other texts in it.

    joint: for adaptation, also its attention window. A model with a sliding window, or one that
    attends to its best keys alone (DeepSeek-V3.2, Doge), does so by a mask of its own. In `embed`
    it does, at any length. `joint_mask` replaces that mask, and is the same up to the window.
    """
    config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or math.inf
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):
        limit = rope.get("original_max_position_embeddings") or limit
    if joint:
        windows = ["index_topk", "keep_window_size"]
        # A window in the configuration counts if some layer has it; older ones do not list layers.
        if "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"]):
            windows.append("sliding_window")
        limit = min(limit, *(getattr(config, name, None) or math.inf for name in windows))
    return limit


def embed(model: nn.Module, input_ids: Tensor, lengths: Tensor, pooled: int) -> Tensor:
    """Embeds sequences prefix + text + prompt: the mean of the states at the special tokens.

    input_ids (B, L), padded on the right; lengths (B,), without pads; pooled: the number of special
    tokens, with which each sequence ends -> (B, d) float32, unit rows.
    There is no mask: causality hides the pads, and the fast kernel for causal attention runs.
    """
    # The body without the head, whose logits would take more memory than all layers.
    body = model.get_decoder()
    hidden = body(input_ids=input_ids, use_cache=False).last_hidden_state  # (B, L, d), normed
    columns = lengths[:, None] + torch.arange(-pooled, 0, device=lengths.device)  # (B, 8)
    # Unlike gather, this broadcasts: one column, all of d.
    states = hidden.take_along_dim(columns[:, :, None], dim=1)  # (B, 8, d)
    return F.normalize(states.float().mean(dim=1), dim=-1)  # (B, d)


@torch.inference_mode()
def encode(
    model: nn.Module,
    tokenizer,
    texts: str | Sequence[str],
    prompt: str = "self",
    max_length: int | None = None,
    batch_size: int = 32,
) -> np.ndarray:
    """Embeds texts: (n, d) float32 unit rows, in the order of the texts; one string -> (d,).

    model: an AutoModel or AutoModelForCausalLM of transformers, also with LoRA by peft, also
    compiled in place; of any dtype, on any device. prompt: "self" for passages, "next" for queries
    (but "self" before fine-tuning). max_length: in tokens, with the prompt; by default 512, as most
    passages of retrieval collections are shorter, or the model's limit if that is less. The result
    does not depend on the batch, but for rounding.
    ValueError: see `make_prompts` and `Prompts.around`; also if max_length is beyond the model.
    FloatingPointError if an embedding is not finite.

    To copy it, take SELF_PROMPT, NEXT_PROMPT, Prompts, make_prompts, tokenize, max_positions and
    embed with it, and of the imports: math, Sequence, NamedTuple, numpy, torch, F, Tensor and nn.
    """
    limit = max_positions(model.config)
    if max_length is None:
        max_length = int(min(512, limit))
    if max_length > limit:
        raise ValueError(f"a length of {max_length} tokens: the model was made for {limit}")
    prompts = make_prompts(tokenizer, config=model.config)
    if isinstance(texts, str):
        return encode(model, tokenizer, [texts], prompt, max_length, batch_size)[0]
    if len(texts) == 0:
        return np.empty((0, model.get_input_embeddings().embedding_dim), np.float32)
    # A tokenizer's own truncation is state that two threads would share: we cut the ids instead.
    sequences = [prompts.around(ids, prompt, max_length) for ids in tokenize(tokenizer, texts)]
    # Texts of like length together: little padding.
    longest_first = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    device = model.get_input_embeddings().weight.device
    parts = []
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(sequences), batch_size):
            rows = longest_first[start : start + batch_size]
            # As `pad` does, which need not be copied for this.
            tensors = [torch.tensor(sequences[row]) for row in rows]
            input_ids = nn.utils.rnn.pad_sequence(tensors, batch_first=True)  # (b, L)
            lengths = torch.tensor([len(tensor) for tensor in tensors])  # (b,)
            vectors = embed(model, input_ids.to(device), lengths.to(device), prompts.pooled)
            parts.append(vectors.cpu().numpy())  # (b, d)
    finally:
        model.train(was_training)
    sorted_embeddings = np.concatenate(parts)  # (n, d)
    embeddings = np.empty_like(sorted_embeddings)  # (n, d)
    embeddings[longest_first] = sorted_embeddings
    if not np.isfinite(embeddings).all():
        raise FloatingPointError("an embedding is not finite: take bfloat16 or float32 weights")
    return embeddings


class Llara(nn.Module):
    """A causal language model with the pretext tasks on top. It adds no weights."""

    def __init__(self, lm: nn.Module, prompts: Prompts):
        super().__init__()
        self.lm = lm
        self.prompts = prompts

    def forward(self, batch: dict[str, Tensor], tasks: Iterable[str] = TASKS) -> Tensor:
        """A batch of `collate` -> (3,): AR, EBAE, EBAR; 0 for a task that is not in `tasks`.

        Each is a sum over the batch, divided by batch["counts"]: as `collate` counts, those of this
        batch; `Adaptation.step` puts those of all that a step sees in their place.

        The head is applied here and not by the caller, since FSDP, which slices the weights over
        the GPUs (see `shard`), puts them together for the duration of forward alone; and only where
        a loss needs it, since logits are what costs memory.
        """
        input_ids = batch["input_ids"]  # (B, L)
        self_start = batch["self_start"]  # (B,)
        mask, positions = joint_mask(self_start, len(self.prompts.SELF), input_ids.shape[1])
        body = self.lm.get_decoder()
        output = body(
            input_ids=input_ids, attention_mask=mask, position_ids=positions, use_cache=False
        )
        hidden = output.last_hidden_state  # (B, L, d), after the last norm
        head = self.lm.get_output_embeddings()
        zero = torch.zeros((), dtype=torch.float32, device=hidden.device)
        losses = dict.fromkeys(TASKS, zero)

        if "AR" in tasks:
            # A state predicts the token of the next column. Those of the passage are targets: in
            # p a b c s s S n n N, p predicts a, a predicts b, b predicts c.
            states = hidden[:, :-1]  # (B, L-1, d)
            next_ids = input_ids[:, 1:]  # (B, L-1)
            next_column = torch.arange(1, input_ids.shape[1], device=input_ids.device)  # (L-1,)
            after_prefix = next_column >= len(self.prompts.prefix)  # (L-1,)
            is_target = after_prefix & (next_column < self_start[:, None])  # (B, L-1)
            losses["AR"] = next_token_loss(states[is_target], head.weight, next_ids[is_target])
        for task, prompt in BAG_TASKS.items():
            if task in tasks:
                columns = batch[f"{prompt}_columns"]  # (B, 8)
                states = hidden.take_along_dim(columns[:, :, None], dim=1)  # (B, 8, d)
                losses[task] = bag_loss(head(states), batch[task])  # of logits (B, 8, V)
        return torch.stack([losses[task] for task in TASKS]) / batch["counts"].clamp(min=1)

    def embed(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """`embed` as a method, for which FSDP can gather the weights: (B, L), (B,) -> (B, d)."""
        return embed(self.lm, input_ids, lengths, self.prompts.pooled)


@torch.inference_mode()
def explain(lm: nn.Module, tokenizer, text: str, k: int = 10) -> dict[str, list[str]]:
    """What an embedding says: the k likeliest tokens of the SELF and of the NEXT states of a text.

    -> {"SELF, max": [words], "SELF, mean": .., "NEXT, max": .., "NEXT, mean": ..}: "max" as the
    losses have it, "mean" the direction of the embedding itself.
    """
    prompts = make_prompts(tokenizer, config=lm.config)
    head = lm.get_output_embeddings()
    (text_ids,) = tokenize(tokenizer, [text])
    said = {}
    for prompt in ("self", "next"):
        ids = prompts.around(text_ids, prompt, int(min(512, max_positions(lm.config))))
        input_ids = torch.tensor([ids], device=head.weight.device)  # (1, L)
        hidden = lm.get_decoder()(input_ids, use_cache=False).last_hidden_state  # (1, L, d)
        states = hidden[0, -prompts.pooled :]  # (8, d)
        logits = {"max": head(states).amax(dim=0), "mean": head(states.mean(dim=0))}  # (V,) each
        for name, scores in logits.items():
            words = [tokenizer.decode(i) for i in scores.topk(k).indices.tolist()]
            # A blank token is shown in quotes.
            said[f"{prompt.upper()}, {name}"] = [word.strip() or repr(word) for word in words]
    return said


# ==================================================================================================
# THE METHOD ENDS HERE. What follows brings models and text to it, and runs it on many GPUs.
# ==================================================================================================

# ---- to load and to save a model -----------------------------------------------------------------


class BadInput(ValueError):
    """A mistake in what the user gave. The command line shows its sentence, without a traceback."""


def read_model(kind, name: str | Path, dtype="auto", **hub) -> tuple[nn.Module, Any]:
    """A model of the class `kind` and its tokenizer, from a folder or a hub name.

    dtype: of the weights; "auto" is what the file has. hub: what transformers takes to find the
    files: revision, token, cache_dir, subfolder. Only safetensors and JSON are read, no code.
    Attention is sdpa: eager adds a boolean mask as 0 and 1, flash attention takes no mask.
    BadInput, with what transformers says, if it cannot be read.
    """
    folder = Path(name, hub.get("subfolder", ""))
    if folder.is_dir() and not (folder / "config.json").exists():
        begun = (folder / "run.json").exists()
        advice = "; the run in it is not done: give its command with --resume" if begun else ""
        raise BadInput(f"{name}: holds no finished model, no config.json{advice}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **hub)
        model, info = kind.from_pretrained(
            name,
            dtype=dtype,
            attn_implementation="sdpa",
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            **hub,
        )
    except Exception as error:  # transformers, tokenizers and safetensors each raise their own
        where = "" if folder.is_dir() else "no folder of that name; of the hub: "
        raise BadInput(f"{name}: {where}{type(error).__name__}: {error}") from error
    if info["missing_keys"]:  # their weights would be random
        raise BadInput(f"{name}: its files lack {sorted(info['missing_keys'])[:3]}")
    if getattr(model, "_hf_peft_config_loaded", False):  # peft is installed, and has read them
        raise BadInput(f"{name}: LoRA adapters, which would be trained alone: merge them first")
    # An added token without a row is one that no text has: Gemma 3 1B's token of an image.
    n_rows = model.get_input_embeddings().num_embeddings
    ids_of_text = tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()
    if max(tokenizer.convert_tokens_to_ids(list(ids_of_text))) >= n_rows:
        raise BadInput(f"{name}: its tokenizer has ids beyond the model's {n_rows} embeddings")
    return model, tokenizer


def load(name: str | Path) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer, ready for `Llara`, in the file's own type.

    name: a folder or a hub name. The prompts' special tokens are added if need be. To train it,
    make it float32: in bfloat16, a step of 1e-5 on a weight of 0.02 is rounded away.
    BadInput if the model cannot be read, or cannot work.
    """
    lm, tokenizer = read_model(AutoModelForCausalLM, name)
    try:
        check_one_pass(lm)
    except Exception as error:  # of ours, or of a model that takes no mask
        raise BadInput(f"{name}: {type(lm).__name__}: {type(error).__name__}: {error}") from error
    embeddings, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    # A file can hold a head of its own although its configuration says tied. What the file has is
    # what counts; saving goes by this flag.
    lm.config.tie_word_embeddings = head.weight is embeddings.weight

    # New tokens. The rows of the embeddings, by ids, are then
    #     | of the text's tokens: trained | to spare, in some models | new ones, if need be |
    known = tokenizer.get_vocab()
    new = [token for token in dict.fromkeys(SELF_PROMPT[1] + NEXT_PROMPT[1]) if token not in known]
    added = [AddedToken(token, special=True, normalized=False) for token in new]
    tokenizer.add_tokens(added, special_tokens=True)
    new_ids = tokenizer.convert_tokens_to_ids(new)
    # `tokenizers` counts the entries to find a new id. With a gap among the ids, 0 1 2 4, that is
    # 4: a real token's, whose trained row would be lost below.
    if not set(new_ids).isdisjoint(known.values()):
        raise BadInput(f"{name}: its vocabulary has gaps: the id of {new[0]} is a real token's")
    n_old = embeddings.num_embeddings
    n_trained = min(n_old, max(known.values()) + 1)
    n_rows = max(n_old, *(i + 1 for i in (*known.values(), *new_ids)))
    lm.resize_token_embeddings(n_rows, mean_resizing=False)
    # They start from the mean of the trained ones: a random row in the head stands apart and takes
    # probability from real tokens. All start as one and the same: position tells them apart.
    untrained = sorted({*new_ids, *range(n_old, n_rows)})
    with torch.no_grad():
        for layer in (lm.get_input_embeddings(), lm.get_output_embeddings()):
            mean = layer.weight[:n_trained].float().mean(dim=0)  # (d,), summed in float32
            layer.weight[untrained] = mean.to(layer.weight.dtype)
    if not hasattr(lm.config, "llara"):
        prompts = make_prompts(tokenizer)
        lm.config.llara = {"query_prompt": "self", "prompts": prompts._asdict()}
    return lm, tokenizer


@torch.no_grad()
def check_one_pass(lm: nn.Module) -> None:
    """ValueError if one pass is not two on this model, or if `next_token_loss` is not its own loss.

    What `joint_mask` promises holds if attention honours a mask and positions of our own, and if
    nothing but attention looks at other tokens. So it is tried, on 4 + 4 + 4 tokens.
    """
    ids = torch.arange(12)[None]  # (1, 12), as if passage, SELF and NEXT had four tokens each
    without_self = [0, 1, 2, 3, 8, 9, 10, 11]
    mask, positions = joint_mask(torch.tensor([4]), 4, 12)
    body, head = lm.get_decoder(), lm.get_output_embeddings()
    joint = body(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
    joint = joint.last_hidden_state[:, without_self]  # (1, 8, d)
    alone = body(input_ids=ids[:, without_self], use_cache=False).last_hidden_state  # (1, 8, d)
    tolerance = 1e-3 if lm.dtype == torch.float32 else 0.05  # in bfloat16 rounding is 0.004
    if (joint - alone).norm() > tolerance * alone.norm():
        raise ValueError(
            "it sees later tokens, or ignores the mask or the positions (an encoder, ALiBi, a "
            "recurrent state): one pass would not equal two"
        )
    logits = lm(input_ids=ids[:, without_self], use_cache=False).logits  # (1, 8, V)
    difference = alone @ head.weight.T - logits  # (1, 8, V)
    if head.bias is not None or difference.norm() > tolerance * logits.norm():
        raise ValueError("it scales or caps its logits, or has a bias on them: not supported")


def query_prompt_of(config) -> str:
    """ "self" or "next": what queries take.

    `load` and `train` note it in config.json, so that it goes where the model goes. The released
    models have no such entry: they are fine-tuned, and take "next".
    """
    return getattr(config, "llara", {}).get("query_prompt", "next")


def write_aside(path: Path, content: str) -> None:
    """Aside, then renamed: nobody ever sees half of it."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(content, encoding="utf-8")
    os.replace(aside, path)


def save(lm: nn.Module, tokenizer, folder: str | Path, card: str = "", state_dict=None) -> None:
    """Writes an ordinary folder of transformers; `card`, if given, becomes its README.md."""
    try:
        lm.save_pretrained(folder, state_dict=state_dict)
    except SafetensorError as error:  # a full disk, say
        raise OSError(f"{folder}: {error}") from error
    tokenizer.save_pretrained(folder)
    if card:
        Path(folder, "README.md").write_text(card, encoding="utf-8")
    # With this, SentenceTransformer(folder) calls Sentences.load, or refuses if llara.py is not to
    # be found. Without it, it would pool the last token, and say nothing.
    modules = [{"idx": 0, "name": "0", "path": "", "type": "llara.Sentences"}]
    Path(folder, "modules.json").write_text(json.dumps(modules))


class Sentences(nn.Module):
    """A saved model for sentence-transformers: SentenceTransformer(modules=[Sentences("out")]).

    The embeddings are those of `encode`. All methods are what that library calls.
    """

    def __init__(self, name: str, max_length: int | None = None, dtype=torch.float32, **hub):
        super().__init__()
        self.model, self.tokenizer = read_model(AutoModel, name, dtype, **hub)
        config = self.model.config
        self.prompts = make_prompts(self.tokenizer, config=config)
        max_length = max_length or getattr(config, "llara", {}).get("max_length", 512)
        self.max_seq_length = int(min(max_length, max_positions(config)))

    @classmethod
    def load(cls, name, subfolder="", cache_folder=None, model_kwargs=None, **kwargs):
        names = ("revision", "token", "local_files_only")
        hub = {name: kwargs[name] for name in names if name in kwargs}
        dtype = (model_kwargs or {}).get("dtype", torch.float32)
        return cls(name, dtype=dtype, subfolder=subfolder, cache_dir=cache_folder, **hub)

    def save(self, folder: str, *args, **kwargs) -> None:
        config = self.model.config
        config.llara = getattr(config, "llara", {}) | {"max_length": self.max_seq_length}
        save(self.model, self.tokenizer, folder)

    def get_embedding_dimension(self) -> int:
        return self.model.get_input_embeddings().embedding_dim

    get_sentence_embedding_dimension = get_embedding_dimension

    def preprocess(self, inputs: list[str], prompt: str | None = None, **kwargs):
        if prompt:
            raise ValueError("the prompts are LLaRA's own: give none")
        is_query = kwargs.get("task") == "query"
        kind = query_prompt_of(self.model.config) if is_query else "self"
        text_ids = tokenize(self.tokenizer, inputs)
        rows = [self.prompts.around(ids, kind, self.max_seq_length) for ids in text_ids]
        return {"input_ids": pad(rows), "lengths": torch.tensor([len(row) for row in rows])}

    def forward(self, features: dict[str, Tensor], **kwargs) -> dict[str, Tensor]:
        input_ids, lengths = features["input_ids"], features["lengths"]  # (B, L), (B,)
        vectors = embed(self.model, input_ids, lengths, self.prompts.pooled)  # (B, d)
        return features | {"sentence_embedding": vectors}


MODEL_CARD = """---
library_name: transformers
tags: [llara, dense-retrieval]
---
A text encoder made with LLaRA ([arXiv 2312.15503](https://arxiv.org/abs/2312.15503)) from {base}:
{args.steps} steps of `--stage {args.stage}`, {args.batch_size} examples each. Only this way of
embedding is right: prefix, text, prompt; the mean of the last {prompts.pooled} states. To load it
takes torch >= 2.6 and transformers >= 5: version 4 reads this folder without an error, and ignores
its `rope_parameters`.

```python
import torch
from transformers import AutoModel, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModel.from_pretrained(".")
PREFIX = {prompts.prefix}
SELF = {prompts.SELF}
NEXT = {prompts.NEXT}
def embed(text, prompt):  # of this model: SELF for passages, {query_prompt} for queries
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    ids = ids[:{max_length} - len(PREFIX + prompt)]
    states = model(torch.tensor([PREFIX + ids + prompt])).last_hidden_state[0, -{prompts.pooled}:]
    return torch.nn.functional.normalize(states.float().mean(0), dim=-1)
print(embed("A llama is a camelid.", SELF) @ embed("What is a llama?", {query_prompt}))
```
"""


# ---- rows ----------------------------------------------------------------------------------------

# A row is a line of a .jsonl file, of one of three kinds:
#     an article         {"title", "text"}, of which passages are taken; a title may be missing
#     as released        {"input", "output_summarize", "output_predict"}: a passage and the texts
#                        whose words EBAE and EBAR ask for, ready made
#     to fine-tune       {"query", "pos", "neg"}: a text, two lists of texts; "neg" may be missing


def data_files(path: Path) -> list[Path]:
    """A file as it is; of a folder all *.jsonl and WikiExtractor's wiki_00 .., at any depth."""
    if not path.is_dir():
        return [path]
    names = regex.compile(r".*\.jsonl|wiki_\d+")
    # glob follows links, and leaves out hidden files: Jupyter keeps copies in .ipynb_checkpoints.
    found = sorted(glob.glob("**", root_dir=path, recursive=True))
    return [path / name for name in found if names.fullmatch(Path(name).name)]


class Rows:
    """Random access to the lines of .jsonl files. Held in memory: 32 bytes a line, not the text.

    paths: files and folders, see `data_files`; a file is read once, however many links lead to it.
    Lines of white space do not count. BadInput if there is no line.
    """

    def __init__(self, paths: Iterable[str | Path]):
        found: dict[Path, Path] = {}
        for path in paths:
            for file in data_files(Path(path)):
                found.setdefault(file.resolve(), file)
        self.paths = list(found.values())
        places = array("q")  # 64 bits wide: a file can have more than 2^31 bytes
        for file_number, path in enumerate(self.paths):
            start = 0
            with open(path, "rb") as file:
                if not file.seekable():
                    raise BadInput(f"{path}: a pipe, not a regular file: rows are read at random")
                for line_number, line in enumerate(file, 1):
                    if not line.isspace():
                        places.extend((file_number, line_number, start, len(line)))
                    start += len(line)
        if not places:
            raise BadInput(f"{', '.join(map(str, paths))}: no rows in there")
        # (n, 4): file, line, first byte, number of bytes
        self.places = np.frombuffer(places, np.int64).reshape(-1, 4)
        self.lengths = self.places[:, 3]  # (n,) bytes
        # To open a file takes longer than to read a row, above all on a network disk. But a process
        # may have some 1,000 files open, and a Wikipedia from WikiExtractor has more.
        self.open_file = functools.lru_cache(maxsize=100)(functools.partial(open, mode="rb"))

    def __len__(self) -> int:
        return len(self.lengths)

    def digest(self) -> str:
        """Of the rows' lengths in their order: tells other data, or another order, from these.

        Only an edit that keeps the length of each line goes unnoticed.
        """
        return f"{len(self)} rows, {hashlib.sha256(self.lengths.tobytes()).hexdigest()[:16]}"

    @contextlib.contextmanager
    def row(self, i: int) -> Iterator[dict[str, Any]]:
        """`with rows.row(i) as row:`; whatever goes wrong in there names the file and the line."""
        file_number, line_number, start, length = self.places[i].tolist()
        path = self.paths[file_number]
        row: Any = None
        try:
            row = json.loads(os.pread(self.open_file(path).fileno(), length, start))
            if not isinstance(row, dict):
                raise TypeError(f"should be a JSON object, is {type(row).__name__}")
            yield row
        except Exception as error:
            keys = f"; there are {', '.join(row)}" if isinstance(error, KeyError) else ""
            reason = f"{type(error).__name__}: {error}{keys}"
            raise BadInput(f"{path}:{line_number}: {reason}") from error


def check_texts(*texts: str) -> None:
    """TypeError or ValueError if one is no text, or none that a tokenizer takes."""
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"should be a text: {json.dumps(text)[:60]}")
        text.encode()  # half of a surrogate pair (\ud800) fails here


def read_article(row: dict[str, Any]) -> str:
    """Title and text, "" of a blank page."""
    if "query" in row:
        raise ValueError("a pair of query and passages: for --stage finetune")
    title, text = row.get("title") or "", row["text"]
    check_texts(title, text)
    text = text.strip()
    return f"{title.strip()}\n{text}".strip() if text else ""


# ---- what both stages share ----------------------------------------------------------------------


class Batches(NamedTuple):
    """What is in the batches of a step: pure functions of these settings and the step.

    The learning rate and the seed of dropout follow from them, too. So a killed run needs weights,
    moments and a step number to go on as if nothing had happened. On another number of ranks the
    data are the same; dropout is not.
    """

    batch_size: int  # examples, or queries, over all ranks
    micro_batch_size: int
    seed: int = 0
    rank: int = 0
    world: int = 1

    def global_batch(self, step: int, n: int) -> list[tuple[int, int]]:
        """(epoch, index) of n examples: a new permutation each epoch, without a gap."""
        pairs = []
        for number in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, i = divmod(number, n)
            pairs.append((epoch, int(epoch_order(self.seed, epoch, n)[i])))
        return pairs

    def n_micro_batches(self, n: int) -> int:
        """Into how many micro-batches each rank splits its part of n sequences.

        The same number on every rank, as under FSDP a forward is a meeting of all (see `shard`);
        and none of them empty: 9 sequences on 8 ranks, one at a time, are one micro-batch a rank,
        of which one has two sequences.
        """
        as_they_fit = math.ceil(n / (self.micro_batch_size * self.world))
        return min(as_they_fit, n // self.world)


@functools.lru_cache(maxsize=4)  # the last epoch and this one, also of held-out rows
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def split_by_length(lengths: Sequence[int], count: int) -> list[np.ndarray]:
    """Indices in `count` groups of like length, the longest first: too long fails at once."""
    order = np.argsort([-length for length in lengths], kind="stable")
    return np.array_split(order, count)


# The two stages, `Adaptation` and `FineTuning`, have the same three methods:
#     read(step) -> Item      what this rank needs for a step: "micro_batches" and their "tokens"
#     step(model, item, ..) -> Losses    forward; backward if `train`, which leaves the gradient
#                                        of the global batch in the model
#     yardstick(vocab_size) -> Losses    to compare with
Item = dict[str, Any]
Losses = dict[str, float]  # by name, of the global batch

# ---- to adapt ------------------------------------------------------------------------------------

# To be searched from the right. \A: the start of a text is the start of a sentence, too.
SENTENCE_END = regex.compile(
    r"""[.!?]["')\]]*\s+|[。！？।؟]\s*|\n|\A""",  # noqa: RUF001
    regex.REVERSE,
)
SPACE = regex.compile(r"\s", regex.REVERSE)


def sentence_start(text: str, place: int, reach: int) -> int:
    """Where the sentence at this character begins, or else the word; at most `reach` back."""
    first = max(0, place - reach)
    found = SENTENCE_END.search(text, first, place) or SPACE.search(text, first, place)
    return found.end() if found else place


# The English stop words of NLTK, as the released code has them. Those with an apostrophe are left
# out: none can occur once punctuation is gone.
STOP_WORDS = frozenset(
    """i me my myself we our ours ourselves you your yours yourself yourselves he him his himself
    she her hers herself it its itself they them their theirs themselves what which who whom this
    that these those am is are was were be been being have has had having do does did doing a an the
    and but if or because as until while of at by for with about against between into through
    during before after above below to from up down in out on off over under again further then
    once here there when where why how all any both each few more most other some such no nor not
    only own same so than too very s t can will just don should now d ll m o re ve y ain aren
    couldn didn doesn hadn hasn haven isn ma mightn mustn needn shan shouldn wasn weren won wouldn
    """.split()  # noqa: SIM905 (shorter than a list)
)
# Letters and digits, with the marks and joiners among them, as in Hindi, Thai or Persian.
WORD = regex.compile(r"[\p{L}\p{N}][\p{L}\p{N}\p{M}\u200c\u200d]*")


def content_words(text: str) -> str:
    r"""The words of a target: without [\W_]+ and English stop words, as in the released recipe."""
    return " ".join(word for word in WORD.findall(text) if word.lower() not in STOP_WORDS)


Window = tuple[list[int], str]  # some tokens of a text: their ids, and their part of the text


def cut(texts: Sequence[str], encoded, k: int, start: int, end: int) -> Window:
    """The tokens start .. end - 1 of text k, or as many as there are."""
    ids = encoded.input_ids[k][start:end]
    if not ids:
        return [], ""
    first, last = (encoded.token_to_chars(k, i) for i in (start, start + len(ids) - 1))
    return ids, texts[k][first.start : last.end]


# Shifts by this share of a slot, one epoch after the other, fill the slot evenly, however many.
GOLDEN_RATIO = 0.6180339887


@dataclasses.dataclass
class Adaptation:
    """The pretext tasks on rows of text.

    A row as released is an example. Of articles, an example is a place in the bytes of all rows:

        all rows   |-----------|------|------------------------------|---|    one place in each slot
        article                       |------------|=======|---------|        by its share, a piece
        piece                                      |--pppfff|                 by its share, windows

    The passage p and what follows it, f, are two windows of `room` tokens each: what --max-length
    leaves beside the prompts. An epoch has as many places as bytes / (4 * room): English has four
    bytes a token, so that is each token once. That number is all that rests on such a guess: the
    piece has tokens enough for the windows, and they move in it by its true number of tokens.
    """

    rows: Rows
    tokenizer: Any
    prompts: Prompts
    batches: Batches
    max_length: int  # of a joint sequence, in tokens
    weights: Sequence[float] = (1.0, 0.05, 0.05)  # of AR, EBAE, EBAR

    def __post_init__(self):
        self.special_ids = set(self.tokenizer.all_special_ids)
        n_prompt_tokens = len(self.prompts.prefix + self.prompts.SELF + self.prompts.NEXT)
        self.room = self.max_length - n_prompt_tokens
        if self.room < 1:
            raise BadInput(f"--max-length {self.max_length}: the prompts take {n_prompt_tokens}")
        with self.rows.row(0) as row:
            self.is_released = "input" in row
        self.ends = np.cumsum(self.rows.lengths)  # (n,) bytes up to and including each row
        n_slots = math.ceil(self.ends[-1] / (4 * self.room))
        self.n_examples = len(self.rows) if self.is_released else n_slots
        self.first_shift = np.random.default_rng(self.batches.seed).random()

    def place(self, epoch: int, i: int) -> tuple[int, float]:
        """-> the row of example i, and how far into it: 0 is its start, 1 its last two windows."""
        slot = self.ends[-1] / self.n_examples  # bytes
        shift = (self.first_shift + epoch * GOLDEN_RATIO) % 1
        place = (i + shift) * slot
        row = int(np.searchsorted(self.ends, place, side="right"))
        length = self.rows.lengths[row]
        share = 1 - (self.ends[row] - place) / length
        # The first place of an epoch in a row goes to its very start, the last one to its very end,
        # or else these would be read more seldom than the middle. Of a row of ten slots, the shares
        # 0 to 0.1 become 0, those of 0.9 to 1 become 1, and what is between is stretched. A row
        # shorter than a slot has a place in some epochs: at either end, this is a quarter of it.
        margin = min(0.25, slot / length)
        stretched = (share - margin) / (1 - 2 * margin)
        return row, min(1.0, max(0.0, stretched))

    def read_windows(self, places: Sequence[tuple[int, int]]) -> list[list[Window]]:
        """Of each (epoch, index): the passage, then the target of each task."""
        if self.is_released:
            texts = []
            for _, i in places:
                with self.rows.row(i) as row:
                    three = row["input"], row["output_summarize"], row["output_predict"]
                    check_texts(*three)
                texts += three
            encoded = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)
            windows = [cut(texts, encoded, k, 0, self.room) for k in range(len(texts))]
            return [windows[k : k + 3] for k in range(0, len(windows), 3)]

        pieces, shares = [], []
        reach = 4 * self.room  # characters: about a passage
        for epoch, i in places:
            row_number, share = self.place(epoch, i)
            with self.rows.row(row_number) as row:
                text = read_article(row)
            # First by characters: the piece. Three windows of English; in another script characters
            # have more bytes, and more tokens.
            n_bytes = max(1, len(text.encode()))
            size = math.ceil(12 * self.room * len(text) / n_bytes)  # characters
            place = int(share * max(0, len(text) - size))
            pieces.append(text[sentence_start(text, place, reach) : place + size])
            shares.append(share)
        # One call for all: the tokenizer has threads of its own.
        encoded = self.tokenizer(pieces, add_special_tokens=False, split_special_tokens=True)
        examples = []
        for k, (piece, share) in enumerate(zip(pieces, shares, strict=True)):
            # Then by tokens: the windows in it.
            n_tokens = len(encoded.input_ids[k])
            start = int(share * max(0, n_tokens - 2 * self.room))
            if start > 0 and share < 1:
                place = sentence_start(piece, encoded.token_to_chars(k, start).start, reach)
                token = encoded.char_to_token(k, place)
                start = start if token is None else token  # None: a character that became no token
            # Of a text that is too short for two windows, its halves.
            half = min(self.room, math.ceil(n_tokens / 2))
            passage = cut(pieces, encoded, k, start, start + half)
            following = cut(pieces, encoded, k, start + half, start + 2 * half)
            examples.append([passage, passage, following])
        return examples

    def read_examples(self, places: Sequence[tuple[int, int]]) -> list[Example]:
        """Of each (epoch, index) the passage and the bags.

        A passage "The llama, a camelid" asks for the words "llama camelid"; a word can be several
        tokens.
        """
        windows = self.read_windows(places)
        words = [content_words(text) for _, *targets in windows for _, text in targets]
        # One call for all of them; then they are handed out in the same order.
        bags = iter(tokenize(self.tokenizer, words))
        examples = []
        for (passage_ids, _), *targets in windows:
            own_bags = [sorted(set(next(bags)) - self.special_ids) for _ in targets]
            examples.append((passage_ids, *own_bags))
        return examples

    def read(self, step: int) -> Item:
        """Micro-batches are batches of `collate`."""
        batches = self.batches
        everyone = batches.global_batch(step, self.n_examples)
        examples = self.read_examples(everyone[batches.rank :: batches.world])
        lengths = [len(passage) for passage, *_ in examples]
        groups = split_by_length(lengths, batches.n_micro_batches(batches.batch_size))
        micro_batches = [collate([examples[i] for i in group], self.prompts) for group in groups]
        n_prompt_tokens = self.max_length - self.room
        n_tokens = sum(lengths) + len(examples) * n_prompt_tokens
        return {"micro_batches": micro_batches, "tokens": n_tokens}

    def step(self, model: Llara, item: Item, device: torch.device, seed: int, train=True) -> Losses:
        """A task of weight 0 is not computed.

        A mean of the micro-batches' means would weigh tokens and rows unequally. So each
        micro-batch divides its sums by the counts of the whole global batch: then losses and
        gradients add up, over micro-batches and over ranks. FSDP takes the mean over ranks; times
        `world` it is the sum.
        """
        torch.manual_seed(seed)
        world = dist.get_world_size()
        tasks = [task for task, weight in zip(TASKS, self.weights, strict=True) if weight != 0]
        # Integers, as FSDP casts what it hands to forward: floats would be rounded to bfloat16.
        counts = torch.stack([batch["counts"] for batch in item["micro_batches"]]).sum(dim=0)
        dist.all_reduce(counts)  # (3,) int64, of all ranks; on the CPU, by gloo
        losses = torch.zeros(len(TASKS), device=device)
        for batch in item["micro_batches"]:
            batch = {key: value.to(device) for key, value in (batch | {"counts": counts}).items()}
            terms = model(batch, tasks)  # (3,)
            if train:
                (total_loss(terms, self.weights) * world).backward()
            losses += terms.detach()
        dist.all_reduce(losses)
        named = {"loss": total_loss(losses, self.weights).item()}
        for task, loss, count in zip(TASKS, losses.tolist(), counts, strict=True):
            if task in tasks and count > 0:  # a batch without any target says nothing of a task
                named[task] = loss
        return named

    def yardstick(self, vocab_size: int) -> Losses:
        """Per task, the loss of knowing only how frequent each token is: its unigram level.

        What to expect: SmolLM2-135M begins at 10.2 for EBAE and 10.6 for EBAR; after 80 steps of 16
        passages it is at 6.7 and 8.4, where the levels are 8.8.
        """
        order = epoch_order(self.batches.seed, 0, self.n_examples)[:2048]
        counts = np.zeros((len(TASKS), vocab_size))
        for passage, *bags in self.read_examples([(0, i) for i in order]):
            np.add.at(counts[0], passage, 1)  # a token can occur more than once
            for task_counts, bag in zip(counts[1:], bags, strict=True):
                # A row weighs the same in the loss, however many words it has.
                task_counts[bag] += 1 / max(1, len(bag))
        n_targets = counts.sum(axis=1, keepdims=True)  # (3, 1)
        if not n_targets.any():
            raise BadInput("--data: no text in these rows")
        frequencies = counts / np.maximum(n_targets, 1)  # (3, V); 0 / 1 if a task has no targets
        levels = -(frequencies * np.log(frequencies.clip(1e-30))).sum(axis=1)  # (3,)
        return dict(zip(TASKS, levels.tolist(), strict=True))


# ---- to fine-tune --------------------------------------------------------------------------------


@dataclasses.dataclass
class FineTuning:
    """InfoNCE on pairs of query and passage.

    Every query draws one of its positives and group_size - 1 of its negatives, if it has any, anew
    each epoch. All ranks read the global batch, to know which passages are true for whom, and each
    takes its part of the micro-batches.
    """

    rows: Rows
    tokenizer: Any
    prompts: Prompts
    batches: Batches
    query_length: int = 64  # in tokens, with the prompt
    passage_length: int = 160
    query_prompt: str = "next"
    group_size: int = 16  # passages of a query: a positive, and hard negatives
    temperature: float = 0.01

    def __post_init__(self):
        self.n_examples = len(self.rows)

    def draw(self, step: int) -> tuple[list[str], list[str], np.ndarray]:
        """-> Q queries, P passages, excluded (Q, P): what answers a query is not its negative."""
        queries, own, hard = [], [], []
        # What is no negative of a query: the positives of all its rows in the batch, and itself, as
        # in pairs of duplicate questions, where each is the other's positive.
        not_negative: dict[str, set[str]] = {}
        for epoch, i in self.batches.global_batch(step, self.n_examples):
            random = np.random.default_rng([self.batches.seed, epoch, i])
            with self.rows.row(i) as row:
                if "text" in row or "input" in row:
                    raise ValueError("a text, no pair of query and passages: for --stage adapt")
                query, positives, negatives = row["query"], row["pos"], row.get("neg") or []
                for texts in ([query], positives, negatives):
                    if not isinstance(texts, list) or "" in texts:
                        raise ValueError('"pos" and "neg" should be lists of texts, none empty')
                    check_texts(*texts)
                if not positives:
                    raise ValueError('"pos" is empty')
                own.append(positives[random.integers(len(positives))])
            queries.append(query)
            if negatives:
                # np.resize cuts them, or repeats them if they are too few.
                chosen = np.resize(random.permutation(len(negatives)), self.group_size - 1)
                hard += [negatives[j] for j in chosen]
            not_negative.setdefault(query, {query}).update(positives)
        passages = own + hard
        excluded = np.array(
            [[passage in not_negative[query] for passage in passages] for query in queries]
        )
        np.fill_diagonal(excluded, False)  # passage i is the positive of query i
        if ((~excluded).sum(axis=1) == 1).all():
            raise BadInput('no query has a negative: raise --batch-size, or give rows "neg"')
        return queries, passages, excluded

    def read(self, step: int) -> Item:
        """Micro-batches are (slots (b,), (input_ids (b, L), lengths (b,))).

        Slots 0..Q-1 are the queries of the global batch, Q..Q+P-1 its passages, the first Q of
        which are the positives. With two queries and one hard negative each: 0 and 1 are the
        queries, 2 and 3 their positives, 4 and 5 their negatives.
        """
        queries, passages, excluded = self.draw(step)
        query_ids = tokenize(self.tokenizer, queries)
        passage_ids = tokenize(self.tokenizer, passages)
        around, batches = self.prompts.around, self.batches
        sequences = [around(ids, self.query_prompt, self.query_length) for ids in query_ids]
        sequences += [around(ids, "self", self.passage_length) for ids in passage_ids]
        count = batches.n_micro_batches(len(sequences)) * batches.world
        groups = split_by_length([len(ids) for ids in sequences], count)
        micro_batches = []
        for group in groups[batches.rank :: batches.world]:  # so ranks have like lengths, too
            rows = [sequences[slot] for slot in group]
            lengths = torch.tensor([len(ids) for ids in rows])  # (b,)
            micro_batches.append((torch.from_numpy(group), (pad(rows), lengths)))
        n_tokens = sum(int(lengths.sum()) for _, (_, lengths) in micro_batches)
        excluded = torch.from_numpy(excluded)  # (Q, P)
        return {"micro_batches": micro_batches, "excluded": excluded, "tokens": n_tokens}

    def step(self, model: Llara, item: Item, device: torch.device, seed: int, train=True) -> Losses:
        micro_batches = [
            (slots.to(device), (input_ids.to(device), lengths.to(device)))
            for slots, (input_ids, lengths) in item["micro_batches"]
        ]
        loss, accuracy = contrastive_step(
            model.embed, micro_batches, item["excluded"].to(device), self.temperature, seed, train
        )
        return {"loss": loss, "accuracy": accuracy}

    def yardstick(self, vocab_size: int) -> Losses:
        """The loss of knowing nothing: all passages that are not excluded are equally likely."""
        _, _, excluded = self.draw(0)
        return {"loss": float(np.log((~excluded).sum(axis=1)).mean())}


def contrastive_step(
    embed: Callable[..., Tensor],
    micro_batches: Sequence[tuple[Tensor, tuple[Tensor, ...]]],
    excluded: Tensor,
    temperature: float = 0.01,
    seed: int = 0,
    train: bool = True,
) -> tuple[float, float]:
    """`contrastive_loss`, forward and backward, in the memory of one micro-batch.

    It knows nothing of LLaRA, and works for any encoder.

    embed: inputs -> (b, d), differentiable; wrapped by FSDP or DDP if there are several ranks.
    micro_batches: of this rank, (slots, inputs): inputs are what `embed` takes; slots (b,) where
    they belong among the Q queries and P passages of all ranks. excluded (Q, P): see
    `contrastive_loss`.
    -> the loss and the accuracy over the global batch.

    Gradient caching (arXiv 2101.06983): embed everything without a graph; the loss then gives a
    gradient for each embedding; embed again, a micro-batch at a time, and go back from there. As
    every rank has all embeddings, each gradient is the true one, over the negatives of all ranks.
    """
    n_queries, n_passages = excluded.shape
    world = dist.get_world_size() if dist.is_initialized() else 1
    devices = [excluded.device] if excluded.is_cuda else []

    def embed_seeded(i: int) -> Tensor:
        # Dropout must be the same both times; the caller's generator is left as it was.
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed + i)
            return embed(*micro_batches[i][1])

    with torch.no_grad():
        parts = [embed_seeded(i) for i in range(len(micro_batches))]  # each (b, d)
        vectors = parts[0].new_zeros(n_queries + n_passages, parts[0].shape[1])  # (Q + P, d)
        for (slots, _), part in zip(micro_batches, parts, strict=True):
            vectors[slots] = part
        if world > 1:
            dist.all_reduce(vectors)  # a sum: the slots of other ranks are 0 here
    vectors.requires_grad_(train)
    queries, passages = vectors.split([n_queries, n_passages])  # (Q, d), (P, d)
    loss, accuracy = contrastive_loss(queries, passages, excluded, temperature)
    if train:
        loss.backward()
        for i, (slots, _) in enumerate(micro_batches):
            # g = vectors.grad is a constant here. The gradient of sum(embedding * g) is the sum of
            # g * (gradient of embedding), by the chain rule the part of the loss's gradient that
            # flows through these embeddings. Over all micro-batches the parts add up to it.
            surrogate = (embed_seeded(i) * vectors.grad[slots]).sum()
            (surrogate * world).backward()  # FSDP and DDP take the mean over ranks
    return loss.item(), accuracy.item()


# ---- default model -------------------------------------------------------------------------------


def make_small_model(texts: Iterable[str], folder: Path, vocab_size: int = 2048) -> None:
    """Writes a Llama of 2 layers with random weights, and a byte-level BPE tokenizer of the texts.

    The embeddings are tied and of length 1 or so: then a state near a word's embedding predicts
    that word, and EBAE is learnt in minutes.
    """
    tokens = SELF_PROMPT[1] + NEXT_PROMPT[1]
    special = list(dict.fromkeys(["</s>", *tokens]))
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size, special_tokens=special, show_progress=False)
    PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token="</s>", extra_special_tokens=tokens
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=bpe.get_vocab_size(),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=2048,
        initializer_range=128**-0.5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


# ---- many processes ------------------------------------------------------------------------------


def pick_device(dtype: str | None = None) -> tuple[torch.device, torch.dtype]:
    """Where to compute, and in what: by default bfloat16 on GPUs that have it, else float32."""
    device = torch.device("cpu")
    default = "float32"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        # cuDNN's attention plans anew for each new (B, L), seconds each, and its backward is
        # reported to give NaN under a mask (pytorch issue 196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            default = "bfloat16"
    return device, getattr(torch, dtype or default)


def say(text: str) -> None:
    """Rank 0 prints. A reader that went away (| head) must not end a run."""
    if dist.get_rank() == 0:
        try:
            print(text, flush=True)
        except OSError:
            sys.stdout = None  # print then does nothing


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Starts torch.distributed, under torchrun or without it, and ends the process.

    A mistake of the user ends it with one sentence, any other error with its traceback: at once, as
    to leave in order would wait for ranks in the middle of a step, which torchrun then ends.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: was closed
        stream.reconfigure(errors="replace")  # a terminal without accents must not end a run
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:  # schedulers set RANK alone, too
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    several = dist.get_world_size() > 1
    code = 0
    try:
        yield
    except SystemExit as end:
        code = end.code
    except (BadInput, OSError, FloatingPointError) as error:
        sentence = " ".join(str(error).split())[:600]  # those of libraries can have many lines
        print(f"{Path(sys.argv[0]).name}: {sentence}", file=sys.stderr, flush=True)
        code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    if code == 0 or not several:
        dist.destroy_process_group()
    if several:
        # Python's own way out destroys threads of gloo, which aborts some two processes in a
        # hundred (PyTorch 2.13), and torchrun would report a finished run as failed.
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def shard(
    model: Llara, device: torch.device, dtype: torch.dtype, compile_layers: bool = False
) -> None:
    """FSDP2 on any number of ranks, one included: float32 weights, arithmetic in `dtype`.

    Each rank holds a slice of every weight (a DTensor: it knows the whole's shape), of its gradient
    and of AdamW's moments, so the optimizer is made after this. Around the forward and the backward
    of a decoder layer its weights are whole: an all-gather, in which every rank sends its slice to
    all others. After its backward a reduce-scatter takes the mean of the gradients over the ranks,
    of which each gets its slice. These are collectives: all ranks must call them, and equally
    often. nanoGPT skips the averaging until the last micro-batch; here that would need whole
    gradients, 27 GB for 7B. Only `forward` and registered methods gather. The layers are wrapped
    first. What is left then, the embeddings and the head, which can be one tensor, is gathered for
    all of forward.
    """
    world = dist.get_world_size()
    mesh = dist.init_device_mesh(device.type, (world,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    layer_names = model.lm._no_split_modules or ()
    for module in list(model.modules()):
        if type(module).__name__ in layer_names:
            if compile_layers:
                module.compile(dynamic=True)
            # One rank has all slices, and need not drop what it put together.
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=world > 1)
    fully_shard(model, mesh=mesh, mp_policy=policy)  # moves the slices to the device
    model.float()  # casts the slices: the whole model was never in float32
    register_fsdp_forward_method(model, "embed")


# ---- to stop and to go on ------------------------------------------------------------------------

# A run's folder has log.jsonl, a line a step; checkpoint-STEP; and run.json: its settings, its
# yardstick, and how many of its steps are safe. In this order:
#     a step is done, and its line is written to the log
#     all ranks write their slices to checkpoint-STEP
#     rank 0 replaces run.json, at once: from now on, STEP is where a killed run goes on
#     other checkpoints are removed, and when a run goes on, the log's lines from STEP on


def open_alone(path: Path) -> TextIO:
    """Opens a file for this process alone: the lock goes with the process, however it ends.

    BadInput if another process has it.
    """
    file = open(path, "a+")  # noqa: SIM115 (open for as long as the run)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(f"{path.parent}: another run writes to it") from None
    except OSError:  # a file system that knows no locks
        pass
    return file


def open_log(output: Path, resume: bool) -> TextIO:
    """Opens output/log.jsonl, and so claims the folder.

    BadInput if it holds anything but a run to `resume`, or if another process has that.
    """
    path = output / "log.jsonl"
    held = [file for file in output.glob("*") if file != path]
    begun = path.exists() and path.stat().st_size > 0
    if (held or begun) and not (resume and path.exists()):
        raise BadInput(f"--output {output}: is not empty: name another, or --resume the run in it")
    output.mkdir(parents=True, exist_ok=True)
    return open_alone(path)


def checkpoint_folder(output: Path, step: int | str) -> Path:
    return output / f"checkpoint-{step:08}"


def find_run(output: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What run.json says; None if there is none yet.

    BadInput if it has other settings than these, or no checkpoint to go on from.
    """
    file = output / "run.json"
    if not file.exists():
        if list(output.glob("checkpoint-*")):
            raise BadInput(f"--output {output}: has checkpoints, but no run.json to say of what")
        return None
    try:
        run = json.loads(file.read_text())
        before, step = run["settings"], run["step"]
        changed = [name for name in settings if before[name] != settings[name]]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{file}: is not of this program: {type(error).__name__}: {error}") from None
    for name in changed:
        raise BadInput(
            f"--{name.replace('_', '-')} is {settings[name]}, but it was {before[name]}: give the "
            f"same; or edit {file}, if the run should go on with this"
        )
    checkpoint = checkpoint_folder(output, step)
    if 0 < step < settings["steps"] and not checkpoint.exists():
        raise BadInput(f"{checkpoint}: is gone, and {file} says to go on from there")
    return run


def mark_safe(output: Path, run: dict[str, Any]) -> None:
    """Notes in run.json that run["step"] steps are safe. Then checkpoints of other steps go."""
    write_aside(output / "run.json", json.dumps(run, indent=1))
    for folder in output.glob(f"checkpoint-{'[0-9]' * 8}"):  # a user's copy has another name
        if folder != checkpoint_folder(output, run["step"]):
            shutil.rmtree(folder)


def save_checkpoint(model: Llara, optimizer, folder: Path) -> None:
    """All ranks write their slices; when this returns, all have."""
    # A slice of each weight, and of both its moments.
    model_state, optimizer_state = dcp_state.get_state_dict(model, optimizer)
    try:
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    except dcp.api.CheckpointException as error:  # {rank: (error, stack)}
        reason, _ = next(iter(error.failures.values()))
        raise BadInput(f"{folder}: cannot be written: {reason}") from error


def load_checkpoint(model: Llara, optimizer, folder: Path) -> None:
    """Restores what any number of ranks wrote."""
    # A new optimizer has no moments yet: get_state_dict makes them, and they are then filled.
    model_state, optimizer_state = dcp_state.get_state_dict(model, optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    dcp_state.set_state_dict(
        model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state
    )


# ---- training ------------------------------------------------------------------------------------


def get_lr(step: int, steps: int, peak: float, warmup: float) -> float:
    """Of a step 0 .. steps - 1: up to the peak over the share `warmup`, then down towards 0."""
    warmup_steps = max(1.0, warmup * steps)
    if step + 1 < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (steps - step) / (steps - warmup_steps + 1)


@torch.no_grad()
def held_out_losses(
    model: Llara, stage: Adaptation | FineTuning, items: Sequence[Item], device: torch.device
) -> Losses:
    """The same losses, means over steps of held-out rows."""
    model.eval()
    rows = [stage.step(model, item, device, seed=0, train=False) for item in items]
    model.train()
    return {
        f"valid_{name}": float(np.mean([row[name] for row in rows if name in row]))
        for name in sorted({name for row in rows for name in row})
    }


def train(args) -> None:  # noqa: C901 (a run from top to bottom)
    """The whole of a run, of either stage. Every rank runs it.

    Four parts: the folder, its text and model; the run, a new one or one that goes on; the loop;
    the end. Rank 0 alone writes to the folder, but for its slices of checkpoints.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    output = Path(args.output)
    device, dtype = pick_device(args.dtype)
    args.dtype = str(dtype).removeprefix("torch.")
    if args.micro_batch_size is None:
        # Enough tokens for a GPU not to wait for its next order; on a CPU, for FSDP's own work.
        tokens = 16_384 if device.type == "cuda" else 4_096
        args.micro_batch_size = max(1, tokens // (args.max_length or args.passage_length))
    if args.batch_size < world:
        raise BadInput(f"--batch-size {args.batch_size}: less than one for each of {world} ranks")

    # The folder, the text and the model as it was. For want of them: Python's language reference,
    # and a small model from scratch, which are whole when there is a run.json.
    log = open_log(output, args.resume) if rank == 0 else None
    data, base = args.data or [output / "python-docs.jsonl"], args.model or output / "base"
    if rank == 0 and not (output / "run.json").exists():
        if not args.data:
            articles = [{"title": title, "text": text} for title, text in topics.items()]
            data[0].write_text("".join(json.dumps(article) + "\n" for article in articles))
        if not args.model:
            torch.manual_seed(args.seed)
            make_small_model(sample_texts(Rows(data)), base)
    # Machines without a common disk would each have a part of every checkpoint. All look for a file
    # of a new name: for one of an old name, a network disk may show what it was.
    from_rank_0: list[Any] = [f".started-{time.time_ns()}"]
    dist.broadcast_object_list(from_rank_0)
    started_file = output / from_rank_0[0]
    if rank == 0:
        started_file.touch()
    dist.barrier()
    if not started_file.exists():
        raise BadInput(f"--output {output}: is not shared: rank {rank} sees not what rank 0 wrote")
    dist.barrier()
    if rank == 0:
        started_file.unlink()
    rows = Rows(data)
    lm, tokenizer = load(base)  # on each rank all of it: for 7B in bfloat16 13.5 GB of host memory

    # The stage: what a step sees, and what it does.
    is_adapting = args.stage == "adapt"
    longest = args.max_length or max(args.query_length, args.passage_length)
    limit = max_positions(lm.config, joint=is_adapting)
    if longest > limit:
        where = "its positions or its attention window" if is_adapting else "its positions"
        raise BadInput(f"{longest} tokens a sequence: the model was made for {limit}, {where}")
    try:
        prompts = make_prompts(tokenizer, config=None if is_adapting else lm.config)
    except ValueError as error:
        raise BadInput(f"{base}: {error}") from error
    batches = Batches(args.batch_size, args.micro_batch_size, args.seed, rank, world)
    if is_adapting:
        weights = [getattr(args, f"{task.lower()}_weight") for task in TASKS]
        stage = Adaptation(rows, tokenizer, prompts, batches, args.max_length, weights)
    else:
        of_pairs = args.query_length, args.passage_length, args.query_prompt, args.group_size
        stage = FineTuning(rows, tokenizer, prompts, batches, *of_pairs, args.temperature)
    # In place of what `load` noted, which is what the model was made with before.
    lm.config.llara = {"query_prompt": args.query_prompt or "self", "prompts": prompts._asdict()}
    if args.steps is None:  # one pass over the data; 10,000 steps are the paper's
        args.steps = min(10_000, math.ceil(stage.n_examples / args.batch_size))
    save_every = args.save_every or min(500, math.ceil(args.steps / 10))
    held_out_items = []
    if args.valid:  # some 256 examples, always the same ones
        held_out = dataclasses.replace(stage, rows=Rows(args.valid))
        n_steps = max(1, min(held_out.n_examples, 256) // args.batch_size)
        held_out_items = [held_out.read(step) for step in range(n_steps)]

    # The run: a new one, or one that goes on, for which all that shapes it must be the same. Rank 0
    # decides: on a network disk, others could still see an older run.json.
    run: Any = None
    if rank == 0:
        settings = {"data": rows.digest(), "prompts": prompts._asdict()}
        settings |= {name: getattr(args, name) for name in ("stage", "model", "dtype", *SETTINGS)}
        run = find_run(output, settings)
        if run is None:
            levels = stage.yardstick(lm.get_input_embeddings().num_embeddings)
            run = {"settings": settings, "yardstick": levels, "step": 0}
        mark_safe(output, run)  # also removes what a killed run has left
    from_rank_0 = [run]
    dist.broadcast_object_list(from_rank_0)
    (run,) = from_rank_0
    first_step, levels = run["step"], run["yardstick"]
    if first_step == args.steps:
        say(f"--output {output}: that run is finished, there is nothing to resume")
        return
    epochs = args.steps * args.batch_size / stage.n_examples
    shown_levels = " ".join(f"{name} {level:.3f}" for name, level in levels.items())
    say(
        f"model      {args.model or 'from scratch'}: {lm.num_parameters():,} parameters\n"
        f"data       {len(rows):,} rows in {len(rows.paths)} files\n"
        f"run        {args.steps} steps of {args.batch_size} examples, {epochs:.2f} epochs"
        f"{f'; goes on at step {first_step}' if args.resume else ''}\n"
        f"device     {world} x {device.type}, computes in {args.dtype}\n"
        f"yardstick  losses without a look at the text: {shown_levels}"
    )

    # The model, sharded over the ranks, and its optimizer.
    n_weights = lm.num_parameters()
    if args.gradient_checkpointing:
        try:
            lm.activation_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise BadInput(f"--gradient-checkpointing: {error}") from error
    if args.stage == "finetune" and not lm.config.tie_word_embeddings:
        lm.get_output_embeddings().requires_grad_(False)  # it takes no part
    model = Llara(lm, prompts).train()
    shard(model, device, dtype, args.compile)
    # No weight decay, and gradients clipped to 1 below: as in the released code, by its Trainer.
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.0, fused=True)
    if first_step:
        load_checkpoint(model, optimizer, checkpoint_folder(output, first_step))
    if log:  # what a killed run wrote after its last checkpoint is cut off: a line is a step
        log.seek(0)
        for _ in range(first_step):
            log.readline()
        log.truncate(log.tell())

    # Ctrl-C, or a scheduler's SIGTERM: the step is finished and saved. So it is if torchrun dies
    # and leaves its ranks behind: they would hold their GPUs, and the folder, to the last step.
    torchrun = os.getppid() if dist.is_torchelastic_launched() else None
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signals.append(number))

    # The loop: a step, a line in the log, from time to time a checkpoint. A thread reads and
    # tokenises the next step's data meanwhile: a step's data follow from the settings and its
    # number alone, so a killed run needs no more than that number to go on with the same data.
    reader = ThreadPoolExecutor(1)
    next_item = reader.submit(stage.read, first_step)
    bar = tqdm(
        range(first_step, args.steps), total=args.steps, initial=first_step, disable=rank > 0
    )
    started = time.perf_counter()
    for step in bar:
        item = next_item.result()
        done = step + 1
        if done < args.steps:
            next_item = reader.submit(stage.read, done)
        lr = get_lr(step, args.steps, args.lr, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # Of dropout: no two steps or ranks alike. Python's hash of integers is the same in every
        # process, unlike that of strings.
        seed = hash((args.seed, step, rank)) % 2**62
        losses = stage.step(model, item, device, seed)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor().item()
        if not math.isfinite(losses["loss"] + norm):
            raise BadInput(f"step {step}: the loss or its gradient is not finite: try a lower --lr")
        optimizer.step()
        optimizer.zero_grad()

        # As a sum, a signal to any rank stops all of them after the same step.
        orphaned = torchrun is not None and os.getppid() != torchrun
        totals = torch.tensor([item["tokens"], len(signals) + orphaned])
        dist.all_reduce(totals)
        n_tokens, n_signals = totals.tolist()
        rate = n_tokens / (time.perf_counter() - started)
        row = {"step": step, **losses, "lr": lr, "grad_norm": norm, "tokens/s": rate}
        if device.type == "cuda":
            row["GiB"] = torch.cuda.max_memory_allocated() / 2**30
            # 6 a weight and token; without attention's, and without what checkpointing repeats.
            row["TFLOP/s"] = 6 * n_weights * rate / world / 1e12
        is_saved = done % save_every == 0 or n_signals > 0
        if held_out_items and not n_signals and (is_saved or done == args.steps):
            row |= held_out_losses(model, stage, held_out_items, device)
        if log:
            log.write(json.dumps(row) + "\n")
            log.flush()
        shown = [f"{name} {row[name]:.2f}" for name in (*levels, "accuracy") if name in row]
        bar.set_postfix_str(" ".join([*shown, f"{rate:.0f} tokens/s"]))
        if is_saved and done < args.steps:
            save_checkpoint(model, optimizer, checkpoint_folder(output, done))
            if rank == 0:
                mark_safe(output, run | {"step": done})
            if n_signals:
                bar.close()
                say(f"interrupted after step {step}, saved in {output}: --resume goes on")
                sys.exit(1)
        started = time.perf_counter()

    # The end: an ordinary model. Then, what came of it: the mean of the last tenth of the steps,
    # and what two embeddings say.
    save_trained(model, tokenizer, args)
    if rank > 0:
        return
    mark_safe(output, run | {"step": args.steps})
    log.seek(0)
    last_rows = [json.loads(line) for line in log][-math.ceil(args.steps / 10) :]
    for name, level in levels.items():
        values = [row[name] for row in last_rows if name in row]
        if values:
            verdict = "below" if np.mean(values) < level else "NOT below"
            say(f"{name} {np.mean(values):.2f}, yardstick {level:.2f}: {verdict}")
    if args.stage == "adapt":
        lm, tokenizer = read_model(AutoModelForCausalLM, output)
        some = [(0, stage.n_examples // 3), (0, 2 * stage.n_examples // 3)]
        for (_, passage), *_ in stage.read_windows(some):
            print_explanation(lm, tokenizer, passage)
    say(f"saved to {output}; {output / 'README.md'} says how to embed with it")


def sample_texts(rows: Rows) -> Iterator[str]:
    """The beginnings of some 2,000 articles, or passages as released."""
    for i in range(0, len(rows), len(rows) // 2000 + 1):
        with rows.row(i) as row:
            yield row["input"] if "input" in row else read_article(row)[:5000]


def save_trained(model: Llara, tokenizer, args) -> None:
    """An ordinary model with its card, in --output. All ranks gather it; rank 0 writes it."""
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = dcp_state.get_model_state_dict(model.lm, options=options)
    if dist.get_rank() > 0:
        return
    if model.lm.config.tie_word_embeddings:
        for name in model.lm._tied_weights_keys or ():
            state.pop(name, None)  # or the embeddings are written twice
    card = MODEL_CARD.format(
        args=args,
        base=args.model or "random weights",
        prompts=model.prompts,
        query_prompt=query_prompt_of(model.lm.config).upper(),
        max_length=int(min(512, max_positions(model.lm.config))),  # as `encode` has it
    )
    save(model.lm, tokenizer, args.output, card, state)


def print_explanation(lm: nn.Module, tokenizer, text: str) -> None:
    say(f"\n{' '.join(text.split())[:300]}")
    for state, words in explain(lm, tokenizer, text).items():
        say(f"  {state + ':':11} {' '.join(words)}")


# ---- command line --------------------------------------------------------------------------------

# Name: defaults without --model, with it, and with --stage finetune; range; help. A None among the
# defaults: not of that stage, or worked out when the run begins. The small model has nothing to
# forget and only minutes to learn: its pretext tasks weigh ten times as much as the paper's.
SETTINGS = {
    "steps": ((600, None, None), (1, 10**9), "with --model, default: one pass, 10000 at most"),
    "batch_size": ((32, 256, 128), (1, 10**6), "examples, or queries, a step over all ranks"),
    "lr": ((5e-3, 1e-5, 1e-5), (1e-12, 1.0), "peak of the learning rate"),
    "warmup": ((0.1, 0.1, 0.1), (0.0, 1.0), "share of the steps; then the rate falls to 0"),
    "seed": ((0, 0, 0), (0, 2**62), "of the order of the data, and of a model from scratch"),
    "max_length": ((96, 1024, None), (1, 10**6), "tokens of a joint sequence, with prompts"),
    "ar_weight": ((1.0, 1.0, None), (0.0, 1e6), "weight of AR; 0 turns a task off"),
    "ebae_weight": ((0.5, 0.05, None), (0.0, 1e6), "weight of EBAE"),
    "ebar_weight": ((0.5, 0.05, None), (0.0, 1e6), "weight of EBAR"),
    "query_length": ((None, None, 64), (1, 10**6), "tokens of a query, prompt included"),
    "passage_length": ((None, None, 160), (1, 10**6), "tokens of a passage, prompt included"),
    "query_prompt": ((None, None, "next"), None, "prompt of queries"),
    "group_size": ((None, None, 16), (1, 10**4), "passages a query: one positive, and negatives"),
    "temperature": ((None, None, 0.01), (1e-4, 100.0), "of the softmax over the passages"),
}


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """For argparse: an int or a float from low to high, both included."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:  # nan is not, either
            raise argparse.ArgumentTypeError(f"{text}: should be from {low} to {high}")
        return value

    parse.__name__ = kind.__name__  # as argparse shows it: "invalid float value"
    return parse


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What was not given is filled from SETTINGS."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="[a, b, c]: the defaults without --model, with it, and with --stage finetune.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--stage", choices=["adapt", "finetune"], default="adapt", help="default: adapt")
    add("--data", nargs="+", help=".jsonl files or folders; default: Python's documentation")
    add("--valid", nargs="+", help="held-out files, for valid_.. losses at each --save-every")
    add("--model", help="folder or hub name; default: a small Llama from scratch")
    add("--output", default="out", help="folder for log, checkpoints and model; default: out")
    add("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    add("--explain", nargs="+", metavar="TEXT", help="what embeddings of --model, or --output, say")
    for name, (defaults, limits, text) in SETTINGS.items():
        shown = ", ".join("-" if value is None else str(value) for value in defaults)
        flag = f"--{name.replace('_', '-')}"
        if limits:
            add(flag, type=number(type(limits[0]), *limits), help=f"{text} [{shown}]")
        else:
            add(flag, choices=["next", "self"], help=f"{text} [{shown}]")
    size = number(int, 1, 10**6)
    add("--dtype", choices=["float32", "bfloat16"], help="to compute in; CUDA: bfloat16")
    add("--micro-batch-size", type=size, help="sequences in a forward: memory, not results")
    add("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    add("--compile", action="store_true", help="compile each layer: faster on a GPU, after a while")
    add("--save-every", type=size, help="steps; default: a tenth of the run, 500 at most")
    args = parser.parse_args(argv)

    column = 2 if args.stage == "finetune" else 1 if args.model else 0
    for name, (defaults, *_) in SETTINGS.items():
        if getattr(args, name) is None:
            setattr(args, name, defaults[column])
        elif defaults[column] is None and name != "steps":
            parser.error(f"--{name.replace('_', '-')} means nothing with --stage {args.stage}")
    weights = [getattr(args, f"{task.lower()}_weight") for task in TASKS]
    if args.stage == "adapt" and not any(weights):
        parser.error("the weights of AR, EBAE and EBAR are all 0: nothing to learn")
    if args.stage == "finetune" and not (args.model and args.data):
        parser.error("--stage finetune needs --model, what adaptation has saved, and --data")
    return args


def main() -> None:
    args = parse_arguments()
    transformers_logging.disable_progress_bar()
    with process_group():
        if args.explain:
            lm, tokenizer = load(args.model or args.output)
            lm.to(pick_device()[0])
            for text in args.explain:
                print_explanation(lm, tokenizer, text)
        else:
            train(args)


if __name__ == "__main__":
    main()
