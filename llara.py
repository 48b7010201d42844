# SPDX-License-Identifier: MIT
"""LLaRA in one file: a causal language model becomes a text encoder for dense retrieval.

Paper: "Making Large Language Models A Better Foundation For Dense Retrieval", arXiv 2312.15503.

The last hidden state of a language model is local: it knows which token comes next. Retrieval needs
a state that is global: it must carry what a whole passage says. LLaRA asks for that directly, on
plain text. After a passage come two prompts, in one sequence, and the model runs once:

    " passage ", summarize the above passage within eight words: <s1>..<s8> ", predict.. <s9>..<s16>
    |         `--------------------- SELF prompt ----------------------'  `----- NEXT prompt -----'
    prefix: the quote, after a BOS if the tokenizer has one

    EBAE  (embedding-based auto-encoding) the states at <s1>..<s8> must predict the set of words of
          the passage itself.
    EBAR  (embedding-based auto-regression) those at <s9>..<s16> must predict the set of words of
          the passage that follows it.

Each prompt closes the quote of the passage, and neither prompt sees the other (`joint_mask`).

The embedding of a text is the mean of the eight states, scaled to length 1. Adaptation, as above,
is followed by fine-tuning on pairs of query and passage; search is by dot product: see eval.py.
Passages take the SELF prompt, queries the NEXT prompt, whose states say what the passage after a
text would hold: the passage after a question is its answer. (A model that is not fine-tuned yet
takes SELF for both, as nothing has made the two comparable.) It needs torch 2.13, transformers 5.

    python llara.py --output tiny                             # a tiny model, Python's own docs
    torchrun llara.py --data wiki.jsonl --model HuggingFaceTB/SmolLM2-135M --output out
    torchrun llara.py --stage finetune --model out --data pairs.jsonl --output retriever
    torchrun --nproc-per-node 8 llara.py --data wiki.jsonl --model meta-llama/Llama-2-7b-hf \
        --gradient-checkpointing --output llama
    python llara.py --explain "The llama is a camelid." --model out
"""

import argparse
import ast
import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import sysconfig
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import regex
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dcp_state
import torch.nn.functional as F
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule,
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
    tokenizer, self_prompt=SELF_PROMPT, next_prompt=NEXT_PROMPT, prefix: str = '"'
) -> Prompts:
    """The prompts in the ids of this tokenizer; for Llama-2: 2, 19 and 18 of them.

    ValueError if a special token is not one token of this tokenizer, if the prompts have different
    numbers of them, or if nothing stands before a passage.
    """
    (self_words, self_tokens), (next_words, next_tokens) = self_prompt, next_prompt
    if len(self_tokens) != len(next_tokens):
        raise ValueError(f"{len(self_tokens)} special tokens in SELF, {len(next_tokens)} in NEXT")
    tokens = [*self_tokens, *next_tokens]
    token_ids = tokenizer.convert_tokens_to_ids(tokens)
    if tokenizer.unk_token_id in token_ids:  # the id of what is unknown, None in some tokenizers
        raise ValueError(f"not one token each, llara.load adds them: {' '.join(tokens)}")
    prefix_ids, self_ids, next_ids = tokenize(tokenizer, [prefix, self_words, next_words])
    # If this tokenizer puts a BOS first, so do we. It is not left to add_special_tokens=True, which
    # in some tokenizers also appends an EOS: that would stand between the quote and the passage.
    if tokenizer(prefix).input_ids[:1] == [tokenizer.bos_token_id]:
        prefix_ids = [tokenizer.bos_token_id, *prefix_ids]
    if not prefix_ids:
        raise ValueError("without a prefix or a BOS, nothing predicts the first token of a passage")
    pooled = len(self_tokens)
    return Prompts(prefix_ids, self_ids + token_ids[:pooled], next_ids + token_ids[pooled:], pooled)


# ---- the pretext tasks and the joint sequence ----------------------------------------------------

# The tasks, each with the prompt whose states must predict its bag of words. Another task is a line
# here, its weight in SETTINGS, and its words in `Adaptation.read_texts`.
BAG_TASKS = {"EBAE": "SELF", "EBAR": "NEXT"}

# Beside them the model keeps its own task, AR: to predict the next token of the passage.
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
# A bag is a set of ids: of the words of a text, tokenised anew (see `Adaptation.read_examples`).
Example = tuple[list[int], ...]


def collate(examples: Sequence[Example], prompts: Prompts) -> dict[str, Tensor]:
    """Examples -> the batch that `Llara.forward` takes.

    A passage of 3 tokens, with a prefix of 1 and prompts of 2 words and 1 special token each, is
    input_ids p a b c s s S n n N: self_start 4, SELF_columns [6], NEXT_columns [9].

    input_ids (B, L): prefix + passage + SELF + NEXT. self_start (B,): the column of SELF.
    SELF_columns, NEXT_columns (B, 8): where the special tokens stand.
    EBAE, EBAR (B, W): ids of the target words, padded with -100.
    counts (3,): by what the sums of the three losses are divided: for AR the number of tokens of
    passages, for EBAE and EBAR that of examples with target words.
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
    512 rows at a time, and are not kept for backward: PyTorch works out a chunk's gradients while
    it has its logits, or makes the logits once more.
    """
    # PyTorch's own sum is in the type of the states. In bfloat16 we sum ourselves, in float32.
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
    the work, where a mean would ask every state for every word. The embedding, by contrast, is a
    mean, and of states, not of logits: what each of them holds is still in it, and two texts are
    compared by one dot product.
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


def max_positions(config) -> float:
    """The longest sequence that a model was made for, in tokens; infinity if it does not say.

    With LongRoPE and dynamic RoPE it is the original number of positions: beyond that, the angles
    follow the longest text of a batch, and so would the embeddings of the other texts in it.
    """
    config = config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):
        original = rope.get("original_max_position_embeddings")
        return original or config.max_position_embeddings
    return getattr(config, "max_position_embeddings", None) or math.inf


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

    To copy it into another project, take SELF_PROMPT, NEXT_PROMPT, Prompts, make_prompts, tokenize,
    max_positions and embed with it.
    """
    limit = max_positions(model.config)
    if max_length is None:
        max_length = int(min(512, limit))
    if max_length > limit:
        raise ValueError(f"a length of {max_length} tokens: the model was made for {limit}")
    prompts = make_prompts(tokenizer)
    if isinstance(texts, str):
        return encode(model, tokenizer, [texts], prompt, max_length, batch_size)[0]
    if not texts:
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
        batch; `adaptation_step` puts those of all that a step sees in their place.

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
            # A state predicts the token of the next column. Those of the passage are targets; the
            # first of them is predicted by the last state of the prefix.
            states = hidden[:, :-1]  # (B, L-1, d)
            next_ids = input_ids[:, 1:]  # (B, L-1)
            next_column = torch.arange(1, input_ids.shape[1], device=input_ids.device)  # (L-1,)
            after_prefix = next_column >= len(self.prompts.prefix)  # (L-1,)
            is_target = after_prefix & (next_column < self_start[:, None])  # (B, L-1), N are True
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
    prompts = make_prompts(tokenizer)
    head = lm.get_output_embeddings()
    (text_ids,) = tokenize(tokenizer, [text])
    said = {}
    for prompt in ("self", "next"):
        ids = prompts.around(text_ids, prompt, int(min(512, max_positions(lm.config))))
        hidden = lm.get_decoder()(torch.tensor([ids]), use_cache=False).last_hidden_state
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

    def __str__(self) -> str:
        # An error in a worker of a DataLoader comes out of it with the worker's whole traceback as
        # its text, which ends in "llara.BadInput: the sentence". The sentence is kept.
        return super().__str__().split("BadInput: ")[-1].strip()


def in_one_line(error: Exception) -> str:
    """What a library says of its error, for a sentence of ours."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def read_model(kind, name: str | Path, dtype="auto") -> tuple[nn.Module, Any]:
    """A model of the class `kind` and its tokenizer, from a folder or a hub name.

    dtype: of the weights; "auto" is what the file has. Only safetensors and JSON are read; no code
    and no pickle. Attention is sdpa: eager adds a boolean mask as 0 and 1, flash attention takes no
    mask. BadInput, with what transformers says, if it cannot be read.
    """
    if not Path(name).is_dir() and Path(name).parent.is_dir():  # on the hub: ORGANISATION/NAME
        raise BadInput(f"{name}: there is no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, info = kind.from_pretrained(
            name,
            dtype=dtype,
            attn_implementation="sdpa",
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # transformers, tokenizers and safetensors each raise their own
        raise BadInput(f"{name}: {in_one_line(error)}") from error
    if info["missing_keys"]:  # their weights would be random
        raise BadInput(f"{name}: its files lack {sorted(info['missing_keys'])[:3]}")
    n_rows = model.get_input_embeddings().num_embeddings
    if max(tokenizer.get_vocab().values()) >= n_rows:
        raise BadInput(f"{name}: its tokenizer has ids beyond the model's {n_rows} embeddings")
    return model, tokenizer


def load(name: str | Path) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer, ready for `Llara`, in the file's own type.

    name: a folder or a hub name. The prompts' special tokens are added if need be. To train it,
    make it float32: in bfloat16, a step of 1e-5 on a weight of 0.02 is rounded away.
    BadInput if the model cannot be read, or cannot work.
    """
    lm, tokenizer = read_model(AutoModelForCausalLM, name)
    check_one_pass(name, lm)
    embeddings, head = lm.get_input_embeddings(), lm.get_output_embeddings()
    # A file can hold a head of its own although its configuration says tied. What the file has is
    # what counts; saving goes by this flag.
    lm.config.tie_word_embeddings = head.weight is embeddings.weight

    known = tokenizer.get_vocab()
    new = [token for token in dict.fromkeys(SELF_PROMPT[1] + NEXT_PROMPT[1]) if token not in known]
    added = [AddedToken(token, special=True, normalized=False) for token in new]
    tokenizer.add_tokens(added, special_tokens=True)
    new_ids = tokenizer.convert_tokens_to_ids(new)
    # `tokenizers` counts the entries to find a new id. With a gap among the ids, 0 1 2 4, that is
    # 4: a real token's, whose trained row would be lost below.
    if not set(new_ids).isdisjoint(known.values()):
        raise BadInput(f"{name}: its vocabulary has gaps: the id of {new[0]} is a real token's")
    n_trained = max(known.values()) + 1
    # Some models have rows to spare: then the new ids need none.
    n_rows = max(embeddings.num_embeddings, *(i + 1 for i in new_ids), n_trained)
    lm.resize_token_embeddings(n_rows, mean_resizing=False)
    # New rows start from the mean of the others: a random row in the head stands apart and takes
    # probability from real tokens. All start as one and the same: position tells them apart.
    with torch.no_grad():
        for layer in (lm.get_input_embeddings(), lm.get_output_embeddings()):
            mean = layer.weight[:n_trained].float().mean(dim=0)  # (d,), summed in float32
            layer.weight[new_ids] = mean.to(layer.weight.dtype)
    return lm, tokenizer


@torch.no_grad()
def check_one_pass(name: str | Path, lm: nn.Module) -> None:
    """BadInput if one pass is not two on this model, or if `next_token_loss` is not its own loss.

    What `joint_mask` promises holds if attention honours a mask and positions of our own, and if
    nothing but attention looks at other tokens. So it is tried, on 4 + 4 + 4 tokens.
    """
    what = f"{name}: {type(lm).__name__}"
    ids = torch.arange(12)[None]  # (1, 12), as if passage, SELF and NEXT had four tokens each
    without_self = torch.cat([ids[:, :4], ids[:, 8:]], dim=1)  # (1, 8)
    mask, positions = joint_mask(torch.tensor([4]), 4, 12)
    body, head = lm.get_decoder(), lm.get_output_embeddings()
    try:
        joint = body(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        alone = body(input_ids=without_self, use_cache=False).last_hidden_state  # (1, 8, d)
        logits = lm(input_ids=without_self, use_cache=False).logits  # (1, 8, V)
        our_logits = alone @ head.weight.T  # (1, 8, V)
    except Exception as error:
        raise BadInput(f"{what} takes no mask and positions: {in_one_line(error)}") from error
    joint = torch.cat([joint.last_hidden_state[:, :4], joint.last_hidden_state[:, 8:]], dim=1)
    tolerance = 1e-3 if lm.dtype == torch.float32 else 0.05  # in bfloat16 rounding is 0.004
    if (joint - alone).norm() > tolerance * alone.norm():
        raise BadInput(
            f"{what} sees later tokens, or ignores the mask or the positions (an encoder, ALiBi, a "
            "recurrent state): one pass would not equal two"
        )
    if head.bias is not None or (our_logits - logits).norm() > tolerance * logits.norm():
        raise BadInput(f"{what} scales or caps its logits, or has a bias on them: not supported")


def write_json(path: Path, value: Any) -> None:
    """Aside, then renamed: nobody ever sees half of it."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(json.dumps(value, indent=1))
    os.replace(aside, path)


def save(
    lm: nn.Module,
    tokenizer,
    folder: str | Path,
    card: str = "",
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Writes an ordinary folder of transformers; `card`, if given, becomes its README.md."""
    lm.save_pretrained(folder, state_dict=state_dict)
    tokenizer.save_pretrained(folder)
    if card:
        Path(folder, "README.md").write_text(card, encoding="utf-8")
    # With this, SentenceTransformer(folder) calls Sentences.load, or refuses if llara.py is not to
    # be found. Without it, it would pool the last token, and say nothing.
    modules = [{"idx": 0, "name": "0", "path": "", "type": "llara.Sentences"}]
    write_json(Path(folder, "modules.json"), modules)


def query_prompt_of(folder: str | Path) -> str:
    """ "self" or "next": what queries of a saved model take. run.json, which `train` writes, says.

    "self" if it is only adapted; after fine-tuning what that was made with, by default "next".
    """
    run = Path(folder, "run.json")
    if not run.exists():
        return "next"
    settings = json.loads(run.read_text())["settings"]
    return "self" if settings["stage"] == "adapt" else settings.get("query_prompt", "next")


class Sentences(nn.Module):
    """A saved model for sentence-transformers: SentenceTransformer(modules=[Sentences("out")]).

    encode_document takes the SELF prompt, encode_query that of `query_prompt_of`; the embeddings
    are those of `encode`. All methods are what that library calls.
    """

    def __init__(self, folder: str, max_length: int = 512):
        super().__init__()
        self.query_prompt = query_prompt_of(folder)
        self.model, self.tokenizer = read_model(AutoModel, folder, torch.float32)
        self.prompts = make_prompts(self.tokenizer)
        self.max_seq_length = int(min(max_length, max_positions(self.model.config)))

    @classmethod
    def load(cls, folder: str, subfolder: str = "", **kwargs) -> "Sentences":
        return cls(str(Path(folder, subfolder)))

    def save(self, folder: str, *args, **kwargs) -> None:
        save(self.model, self.tokenizer, folder)
        settings = {"stage": "finetune", "query_prompt": self.query_prompt}
        write_json(Path(folder, "run.json"), {"settings": settings})

    def get_embedding_dimension(self) -> int:
        return self.model.get_input_embeddings().embedding_dim

    get_sentence_embedding_dimension = get_embedding_dimension

    def preprocess(self, inputs: list[str], prompt: str | None = None, **kwargs):
        if prompt:
            raise ValueError("the prompts are LLaRA's own: give none")
        kind = self.query_prompt if kwargs.get("task") == "query" else "self"
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


# ---- rows and passages ---------------------------------------------------------------------------

# A row is a line of a .jsonl file, of one of three kinds:
#     an article         {"title", "text"}, cut into passages here; a title may be missing
#     as released        {"input", "output_summarize", "output_predict"}: a passage and the texts
#                        whose words EBAE and EBAR ask for, ready made
#     to fine-tune       {"query", "pos", "neg"}: a text, two lists of texts; "neg" may be missing


def data_files(path: str | Path) -> list[Path]:
    """A file as it is; of a folder and its sub-folders, *.jsonl and WikiExtractor's wiki_00 .."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    names = regex.compile(r".*\.jsonl|wiki_\d+")
    files = [file for file in path.rglob("*") if file.is_file() and names.fullmatch(file.name)]
    if not files:
        raise BadInput(f"{path}: no file *.jsonl or wiki_00, wiki_01 .. in there")
    return sorted(files)


class Rows:
    """Random access to the lines of .jsonl files. Held in memory: 32 bytes a line, not the text.

    paths: files and folders, see `data_files`. Lines of white space do not count. BadInput if there
    is no line; OSError if a file cannot be read.
    """

    def __init__(self, paths: Iterable[str | Path]):
        self.paths = [file for path in paths for file in data_files(path)]
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
            raise BadInput(f"{', '.join(map(str, self.paths))}: no rows in there")
        self.places = np.array(places).reshape(-1, 4)  # file, line, first byte, number of bytes
        self.lengths = self.places[:, 3]  # (n,) bytes

    def __len__(self) -> int:
        return len(self.lengths)

    def digest(self) -> str:
        """Of the rows' lengths in their order: tells other data, or another order, from these."""
        return f"{len(self)} rows, {hashlib.sha256(self.lengths.tobytes()).hexdigest()[:16]}"

    @contextlib.contextmanager
    def row(self, i: int) -> Iterator[dict[str, Any]]:
        """`with rows.row(i) as row:`; whatever goes wrong in there names the file and the line."""
        file_number, line_number, start, length = self.places[i]
        path = self.paths[file_number]
        try:
            # Opened anew for each read: a process may have some 1,000 open files, and a Wikipedia
            # from WikiExtractor has more.
            with open(path, "rb") as file:
                file.seek(start)
                line = file.read(length)
            yield json.loads(line)
        except Exception as error:
            raise BadInput(f"{path}:{line_number}: {in_one_line(error)}") from error


def check_texts(*texts: str) -> None:
    """TypeError or ValueError if one is no text, or none that a tokenizer takes."""
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"should be a text: {json.dumps(text)[:60]}")
        text.encode()  # half of a surrogate pair (\ud800) fails here


def read_article(rows: Rows, i: int, key: str = "text") -> str:
    """Title and text of an article, "" of a blank page. key: "input" for a row as released."""
    with rows.row(i) as row:
        if "query" in row:
            raise ValueError("a pair of query and passages: for --stage finetune")
        title, text = row.get("title") or "", row[key]
        check_texts(title, text)
    text = text.strip()
    return f"{title.strip()}\n{text}".strip() if text else ""


SENTENCE_END = regex.compile(r"""[.!?]["')\]]*\s+|[。！？।؟]\s*|\n""")  # noqa: RUF001
SPACE = regex.compile(r"\s")


def boundary(text: str, k: int, n: int) -> int:
    """Where window k of n begins: behind the next sentence end or space after k/n of the text.

    It moves by less than half a window, so that neighbours cannot cross.
    """
    start = len(text) * k // n
    if k in (0, n):
        return start
    limit = start + len(text) // (2 * n)
    found = SENTENCE_END.search(text, start, limit) or SPACE.search(text, start, limit)
    return found.end() if found else start


def tokens_per_byte(rows: Rows, tokenizer, sample: int = 128) -> float:
    """Of articles, from a sample of rows: so passages are counted before anything is tokenised."""
    n_tokens = 0
    n_bytes = 0.0
    for i in np.linspace(0, len(rows) - 1, min(sample, len(rows))).astype(int):
        text = read_article(rows, i)
        head = text[:20_000]  # of a longer text, this part of the row's bytes
        n_tokens += len(tokenize(tokenizer, [head])[0])
        n_bytes += rows.lengths[i] * len(head) / max(1, len(text))
    return n_tokens / max(1.0, n_bytes)


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


# ---- what one step sees --------------------------------------------------------------------------


class Batches(NamedTuple):
    """What is in the batches of a step: pure functions of these settings and the step.

    The learning rate and the seed of dropout, too, follow from the settings and the step. So a
    killed run needs weights, moments and a step number to go on as if nothing had happened. On
    another number of ranks the data are the same; dropout is not.
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
        and none of them empty, so at most as many as the rank with the fewest has sequences. 9
        sequences on 8 ranks: one rank has two, seven have one. So each rank has one micro-batch,
        also with --micro-batch-size 1, and the first rank's has two sequences.
        """
        as_they_fit = math.ceil(n / (self.micro_batch_size * self.world))
        return min(as_they_fit, n // self.world)


@functools.lru_cache(maxsize=2)  # the last epoch and this one
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def split_by_length(lengths: Sequence[int], count: int) -> list[np.ndarray]:
    """Indices in `count` groups of like length, the longest first: too long fails at once."""
    order = np.argsort([-length for length in lengths], kind="stable")
    return np.array_split(order, count)


@dataclasses.dataclass
class Adaptation(torch.utils.data.Dataset):
    """Item `step` is what this rank needs for a step: its micro-batches, lists of `Example`.

    An article of n windows, of about as many tokens as --max-length leaves beside the prompts,
    makes n - 1 examples: a window, as the passage, and the one that follows it. A row as released
    makes one. Items are lists: for each tensor a worker would need an open file.
    """

    rows: Rows
    tokenizer: Any
    prompts: Prompts
    batches: Batches
    max_length: int  # of a joint sequence, in tokens

    def __post_init__(self):
        self.special_ids = set(self.tokenizer.all_special_ids)
        n_prompt_tokens = len(self.prompts.prefix + self.prompts.SELF + self.prompts.NEXT)
        self.room = self.max_length - n_prompt_tokens
        if self.room < 1:
            raise BadInput(f"--max-length {self.max_length}: the prompts take {n_prompt_tokens}")
        with self.rows.row(0) as row:
            self.is_released = "input" in row
        self.per_row = np.ones(len(self.rows), np.int64)  # (n,) examples
        if not self.is_released:
            # Windows are planned at 0.9 of the room, so that few are cut.
            n_tokens = self.rows.lengths * tokens_per_byte(self.rows, self.tokenizer)  # (n,)
            n_windows = np.ceil(n_tokens / (0.9 * self.room)).astype(np.int64)  # (n,)
            self.per_row = (n_windows - 1).clip(min=0)
        self.ends = np.cumsum(self.per_row)  # (n,) examples up to and including each row
        self.n_examples = int(self.ends[-1])
        n_short = int((self.per_row == 0).sum())
        self.left_out = f", {n_short:,} rows too short for two passages" if n_short else ""
        if self.n_examples == 0:
            raise BadInput(
                f"--max-length {self.max_length}: no text is long enough for two passages"
            )

    def read_texts(self, number: int) -> tuple[str, ...]:
        """Of an example: the passage, then whose words the tasks ask for, ordered as BAG_TASKS."""
        i = int(np.searchsorted(self.ends, number, side="right"))  # the row
        if self.is_released:
            with self.rows.row(i) as row:
                texts = row["input"], row["output_summarize"], row["output_predict"]
                check_texts(*texts)
            return texts
        k = number - int(self.ends[i] - self.per_row[i])  # its window
        n_windows = int(self.per_row[i]) + 1
        text = read_article(self.rows, i)
        start, end, next_end = (boundary(text, j, n_windows) for j in (k, k + 1, k + 2))
        passage = text[start:end].rstrip()
        return passage, passage, text[end:next_end].rstrip()

    def read_examples(self, numbers: Sequence[int]) -> list[Example]:
        """Reads, tokenises and cuts: of each example the passage, and the bags.

        A passage "The llama, a camelid" asks for the words "llama camelid", without stop words and
        punctuation. They are tokenised anew, since "llama" at the start of a text and " llama"
        behind a space can be different tokens; a word can be several. A bag has only words that the
        model could read, so they are those of the ids that are left after the cut.
        """
        passages, *targets = zip(*(self.read_texts(number) for number in numbers), strict=True)
        return list(zip(self.cut(passages), *(self.bags(texts) for texts in targets), strict=True))

    def cut(self, texts: Sequence[str]) -> list[list[int]]:
        return [ids[: self.room] for ids in tokenize(self.tokenizer, texts)]

    def bags(self, texts: Sequence[str]) -> list[list[int]]:
        words = [content_words(text) for text in self.tokenizer.batch_decode(self.cut(texts))]
        return [sorted(set(ids) - self.special_ids) for ids in tokenize(self.tokenizer, words)]

    def __getitem__(self, step: int) -> list[list[Example]]:
        batches = self.batches
        everyone = batches.global_batch(step, self.n_examples)
        mine = [example for _, example in everyone[batches.rank :: batches.world]]
        examples = self.read_examples(mine)
        count = batches.n_micro_batches(batches.batch_size)
        groups = split_by_length([len(passage) for passage, *_ in examples], count)
        return [[examples[i] for i in group] for group in groups]

    def yardstick(self, vocab_size: int) -> dict[str, float]:
        """Per task, the loss of knowing only how frequent each token is: its unigram level."""
        order = epoch_order(self.batches.seed, 0, self.n_examples)[:2048]
        return unigram_levels(self.read_examples(order.tolist()), vocab_size)


def unigram_levels(examples: Sequence[Example], vocab_size: int) -> dict[str, float]:
    """Per task, the loss of always predicting the frequencies of its targets."""
    counts = np.zeros((len(TASKS), vocab_size))
    for passage, *bags in examples:
        np.add.at(counts[0], passage, 1)  # a token can occur more than once
        for task_counts, bag in zip(counts[1:], bags, strict=True):
            # A row weighs the same in the loss, however many words it has.
            task_counts[bag] += 1 / max(1, len(bag))
    n_targets = counts.sum(axis=1, keepdims=True)  # (3, 1)
    frequencies = counts / np.maximum(n_targets, 1)  # (3, V); 0 / 1 if there are no targets at all
    levels = -(frequencies * np.log(frequencies.clip(1e-30))).sum(axis=1)  # (3,)
    return dict(zip(TASKS, levels.tolist(), strict=True))


@dataclasses.dataclass
class FineTuning(torch.utils.data.Dataset):
    """Item `step`: {"micro_batches": of this rank, "excluded": (Q, P) bool}.

    A micro-batch is a list of (slot, ids): slots 0..Q-1 are the queries of the global batch,
    Q..Q+P-1 its passages, the first Q of which are the positives. With two queries and one hard
    negative each: 0 and 1 are the queries, 2 and 3 their positives, 4 and 5 their negatives.
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
    left_out = ""

    def __post_init__(self):
        self.n_examples = len(self.rows)
        prompts = self.prompts
        shortest = len(prompts.prefix) + 1 + max(len(prompts.SELF), len(prompts.NEXT))
        if min(self.query_length, self.passage_length) < shortest:
            raise BadInput(f"--query-length and --passage-length: {shortest} tokens at least")

    def draw(self, step: int) -> tuple[list[str], list[str], np.ndarray]:
        """-> Q queries, P passages, excluded (Q, P): what answers a query is not its negative."""
        queries, own, hard = [], [], []
        true_passages: dict[str, set[str]] = {}  # of all rows of the batch with this query
        for epoch, i in self.batches.global_batch(step, self.n_examples):
            random = np.random.default_rng([self.batches.seed, epoch, i])
            with self.rows.row(i) as row:
                if "text" in row or "input" in row:
                    raise ValueError("a text, no pair of query and passages: for --stage adapt")
                query, positives, negatives = row["query"], row["pos"], row.get("neg", [])
                for texts in ([query], positives, negatives):
                    if not isinstance(texts, list) or "" in texts:
                        raise ValueError('"pos" and "neg" should be lists of texts, none empty')
                    check_texts(*texts)
                own.append(positives[random.integers(len(positives))])
            queries.append(query)
            if negatives:
                # np.resize repeats them if they are too few.
                chosen = np.resize(random.permutation(len(negatives)), self.group_size - 1)
                hard += [negatives[j] for j in chosen]
            true_passages.setdefault(query, set()).update(positives)
        passages = own + hard
        excluded = np.array(
            [[passage in true_passages[query] for passage in passages] for query in queries]
        )
        np.fill_diagonal(excluded, False)
        if ((~excluded).sum(axis=1) == 1).all():
            raise BadInput('no query has a negative: raise --batch-size, or give rows "neg"')
        return queries, passages, excluded

    def __getitem__(self, step: int) -> dict[str, Any]:
        queries, passages, excluded = self.draw(step)
        query_ids = tokenize(self.tokenizer, queries)
        passage_ids = tokenize(self.tokenizer, passages)
        around, batches = self.prompts.around, self.batches
        sequences = [around(ids, self.query_prompt, self.query_length) for ids in query_ids]
        sequences += [around(ids, "self", self.passage_length) for ids in passage_ids]
        count = batches.n_micro_batches(len(sequences)) * batches.world
        groups = split_by_length([len(ids) for ids in sequences], count)
        mine = groups[batches.rank :: batches.world]  # so ranks have groups of like length too
        micro_batches = [[(slot, sequences[slot]) for slot in group.tolist()] for group in mine]
        return {"micro_batches": micro_batches, "excluded": excluded}

    def yardstick(self, vocab_size: int) -> dict[str, float]:
        """The loss of knowing nothing: all passages that are not excluded are equally likely."""
        _, _, excluded = self.draw(0)
        return {"loss": float(np.log((~excluded).sum(axis=1)).mean())}


# ---- default text and model ----------------------------------------------------------------------


def docstrings() -> Iterator[tuple[str, str, str]]:
    """(file, object's name, docstring) of Python's library: prose that each installation carries.

    The name is "" for the docstring of a whole module.
    """
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if "site-packages" in parts or "test" in parts or "tests" in parts:
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):  # some are made to be wrong
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                continue
            text = ast.get_docstring(node)
            if text:
                yield str(file.relative_to(root)), getattr(node, "name", ""), text


def write_python_docs(path: Path) -> None:
    """Writes articles, for want of better text: the language reference, and each module's docs."""
    from pydoc_data.topics import topics

    articles = dict(topics)
    for module, _, text in docstrings():
        articles[module] = articles.get(module, "") + text + "\n\n"
    with open(path, "w", encoding="utf-8") as file:
        for title, text in articles.items():
            file.write(json.dumps({"title": title, "text": text}) + "\n")


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


# ---- many processes, checkpoints -----------------------------------------------------------------


def pick_device(dtype: str | None = None) -> tuple[torch.device, torch.dtype]:
    """Where to compute, and in what: by default bfloat16 on GPUs that have it, else float32."""
    device = torch.device("cpu")
    default = "float32"
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise BadInput(f"{local_rank + 1} ranks on this machine: it has fewer GPUs")
        device = torch.device("cuda", local_rank)
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
    """Starts torch.distributed, under torchrun or without it.

    In here a mistake of the user ends the process with one sentence and exit code 1; a mistake of
    ours keeps its traceback. When one rank ends so, torchrun ends the others.
    """
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: was closed
        stream.reconfigure(errors="replace")  # a terminal without accents must not end a run
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:  # schedulers set RANK alone, too
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    several = dist.get_world_size() > 1
    try:
        yield
    except (BadInput, OSError, FloatingPointError, torch._dynamo.exc.TorchDynamoException) as error:
        # The last one: --compile without a compiler on the machine.
        rank = f" (rank {dist.get_rank()})" if several else ""
        sentence = " ".join(str(error).split())[:600]
        print(f"{Path(sys.argv[0]).name}{rank}: {sentence}", file=sys.stderr, flush=True)
        sys.exit(1)
    finally:
        # After an error the other ranks may be in the middle of a step, and to leave the group
        # would wait for them.
        if not several or sys.exc_info()[0] is None:
            dist.destroy_process_group()
    if several:
        # Python's own way out destroys threads of gloo, which aborts some two processes in a
        # hundred (PyTorch 2.13), and torchrun would report a finished run as failed.
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(0)


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def shard(
    model: Llara, device: torch.device, dtype: torch.dtype, compile_layers: bool = False
) -> None:
    """FSDP2 on any number of ranks, one included: float32 weights, arithmetic in `dtype`.

    Each rank holds a slice of every weight (a DTensor: it knows the whole's shape), of its gradient
    and of AdamW's moments, so the optimizer is made after this. The weights of a decoder layer are
    gathered for its forward and again for its backward, and then dropped; its gradients are
    averaged over the ranks and sliced. These are meetings of all ranks, so all must call equally
    often; and only `forward` and registered methods gather. The layers are wrapped first. What is
    left then, the embeddings and the head, which can be one and the same tensor, is gathered
    together for the whole of the model's forward.

    bfloat16 has the range of float32, so the loss needs no scaling.
    """
    world = dist.get_world_size()
    mesh = dist.init_device_mesh(device.type, (world,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    layer_names = model.lm._no_split_modules or ()
    for module in list(model.modules()):
        if type(module).__name__ in layer_names:
            if compile_layers:
                module.compile(dynamic=True)
            # One rank has all the slices, and keeps what it put together: see `meet_on_last`.
            fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=world > 1)
    fully_shard(model, mesh=mesh, mp_policy=policy)  # moves the slices to the device
    model.float()  # a slice at a time: the whole model was never in float32
    register_fsdp_forward_method(model, "embed")


def checkpoints(output: Path) -> list[Path]:
    """Ours have eight digits: a copy that a user made is left alone."""
    return sorted(output.glob(f"checkpoint-{'[0-9]' * 8}"))


def find_checkpoint(output: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from, if any. BadInput if the folder must not be written to.

    the folder holds                    without --resume    with it
    nothing, or an empty log.jsonl      starts              starts
    log.jsonl and a checkpoint          refused             goes on
    log.jsonl and no checkpoint         refused             starts at step 0
    other things, and no log.jsonl      refused             refused: it is no run of ours
    """
    log = output / "log.jsonl"
    held = [path for path in output.glob("*") if path != log or log.stat().st_size]
    if held and not (resume and log.exists()):
        raise BadInput(f"--output {output}: is not empty: name another, or --resume the run in it")
    return max(checkpoints(output), default=None)


def open_log(path: Path) -> TextIO:
    """Opens the log for this run alone: the lock goes with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = open(path, "a+")  # noqa: SIM115 (open for as long as the run)
    try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadInput(f"{path}: another run writes to this folder") from None
    return log


def save_checkpoint(model: Llara, optimizer, output: Path, step: int) -> None:
    """Writes output/checkpoint-STEP: aside, renamed when whole; then older ones are deleted."""
    aside = output / "unfinished"
    old = checkpoints(output)
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed while saving
    dist.barrier()
    model_state, optimizer_state = dcp_state.get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=aside)
    if dist.get_rank() == 0:
        aside.rename(output / f"checkpoint-{step:08d}")
        for folder in old:
            shutil.rmtree(folder)
    dist.barrier()


def load_checkpoint(model: Llara, optimizer, folder: Path) -> None:
    """Restores what any number of ranks wrote."""
    # A new optimizer has no moments yet: get_state_dict makes them, and they are then filled.
    model_state, optimizer_state = dcp_state.get_state_dict(model, optimizer)
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    dcp_state.set_state_dict(
        model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state
    )


# ---- one step ------------------------------------------------------------------------------------


def meet_on_last(model: nn.Module, is_last: bool) -> None:
    """On one rank: gradients are sliced, and weights dropped, once a step alone.

    That saves half of what FSDP costs there. On several ranks a GPU would hold all gradients
    (27 GB for 7B) and all weights (13.5 GB), to save meetings that hide behind the arithmetic of
    large models.
    """
    if isinstance(model, FSDPModule) and dist.get_world_size() == 1:
        model.set_requires_gradient_sync(is_last)  # False: gradients add up, whole
        model.set_reshard_after_backward(is_last)  # False: the next forward finds the weights there


def adaptation_step(
    model: Llara,
    micro_batches: list[list[Example]],
    weights: Sequence[float],
    device: torch.device,
    train: bool = True,
) -> tuple[Tensor, Tensor]:
    """Forward, and backward if `train`: leaves the gradient of the global batch in the model.

    -> losses (3,) and counts (3,) of the global batch. A task of weight 0 is not computed.

    A mean of the micro-batches' means would weigh tokens and rows unequally. So each micro-batch
    divides its sums by the counts of the whole global batch: then losses and gradients add up, over
    micro-batches and over ranks. FSDP takes the mean over ranks; times `world` it is the sum.
    """
    world = dist.get_world_size()
    tasks = [task for task, weight in zip(TASKS, weights, strict=True) if weight != 0]
    batches = [collate(examples, model.prompts) for examples in micro_batches]
    own_counts = torch.stack([batch["counts"] for batch in batches]).sum(dim=0)  # (3,)
    # Integers, as FSDP casts what it hands to forward: floats would be rounded to bfloat16.
    counts = torch.tensor(sum_over_ranks(own_counts.tolist()), dtype=torch.long)  # (3,)
    losses = torch.zeros(len(TASKS), device=device)
    for i, batch in enumerate(batches):
        meet_on_last(model, i == len(batches) - 1)
        batch["counts"] = counts
        on_device = {key: value.to(device) for key, value in batch.items()}
        terms = model(on_device, tasks)  # (3,)
        if train:
            (total_loss(terms, weights) * world).backward()
        losses += terms.detach()
    dist.all_reduce(losses)
    return losses.cpu(), counts


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


def run_step(
    model: Llara, item: Any, args, device: torch.device, step: int, train: bool = True
) -> dict[str, float]:
    """A step of either stage -> its losses by name; leaves the gradient in the model if `train`."""
    # For dropout: no two forwards alike. 62 bits: `contrastive_step` adds the number of a
    # micro-batch, and the sum must fit 63.
    sequence = np.random.SeedSequence([args.seed, step, dist.get_rank()])
    seed = int(sequence.generate_state(1, np.uint64)[0] >> 2)
    if args.stage == "finetune":
        micro_batches = []
        for micro_batch in item["micro_batches"]:
            slots = torch.tensor([slot for slot, _ in micro_batch], device=device)  # (b,)
            input_ids = pad([ids for _, ids in micro_batch]).to(device)  # (b, L)
            lengths = torch.tensor([len(ids) for _, ids in micro_batch], device=device)  # (b,)
            micro_batches.append((slots, (input_ids, lengths)))
        excluded = torch.from_numpy(item["excluded"]).to(device)  # (Q, P)
        loss, accuracy = contrastive_step(
            model.embed, micro_batches, excluded, args.temperature, seed, train
        )
        return {"loss": loss, "accuracy": accuracy}
    torch.manual_seed(seed)
    weights = [getattr(args, f"{task.lower()}_weight") for task in TASKS]
    losses, counts = adaptation_step(model, item, weights, device, train)
    named = {"loss": total_loss(losses, weights).item()}
    for task, weight, loss, count in zip(TASKS, weights, losses, counts, strict=True):
        if weight != 0 and count > 0:  # a batch without any target says nothing of a task
            named[task] = loss.item()
    return named


@torch.no_grad()
def held_out_losses(model: Llara, dataset, args, device: torch.device) -> dict[str, float]:
    """The same losses, means over batches of held-out rows: always the same ones, some 256."""
    steps = max(1, min(dataset.n_examples, 256) // args.batch_size)
    model.eval()
    rows = [
        run_step(model, dataset[step], args, device, step, train=False) for step in range(steps)
    ]
    model.train()
    return {
        f"valid_{name}": float(np.mean([row[name] for row in rows if name in row]))
        for name in rows[0]
    }


def count_tokens(item: Any, prompts: Prompts) -> int:
    """The tokens of this rank's item, without pads."""
    if isinstance(item, dict):  # of `FineTuning`
        return sum(len(ids) for micro_batch in item["micro_batches"] for _, ids in micro_batch)
    extra = len(prompts.prefix) + len(prompts.SELF) + len(prompts.NEXT)
    return sum(len(passage) + extra for micro_batch in item for passage, *_ in micro_batch)


# ---- training ------------------------------------------------------------------------------------


def get_lr(step: int, steps: int, peak: float, warmup: float) -> float:
    """The rate of a step 0 .. steps - 1: up to the peak over the share `warmup`, then down to 0.

    The first and the last step have a rate above 0: the line begins a step before and ends a step
    behind them.
    """
    warmup_steps = max(1.0, warmup * steps)
    if step + 1 < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (steps - step) / (steps - warmup_steps + 1)


def prepare(args, output: Path) -> tuple[nn.Module, Any, Rows]:
    """The language model, its tokenizer and the rows; the default ones are made the first time.

    Aside, then renamed: a run that goes on finds them whole.
    """
    docs, base = output / "python-docs.jsonl", output / "base"
    is_first = dist.get_rank() == 0
    if not args.data and is_first and not docs.exists():
        aside = output / "python-docs.unfinished"
        write_python_docs(aside)
        aside.rename(docs)
    dist.barrier()
    rows = Rows(args.data or [docs])
    if not args.model and is_first and not base.exists():
        torch.manual_seed(args.seed)
        with rows.row(0) as row:
            key = "input" if "input" in row else "text"
        some = range(0, len(rows), len(rows) // 2000 + 1)
        make_small_model((read_article(rows, i, key)[:5000] for i in some), output / "unfinished")
        (output / "unfinished").rename(base)
    dist.barrier()
    return *load(args.model or base), rows


def check_lengths(args, config) -> None:
    """BadInput if sequences are longer than the model was made for."""
    limit = max_positions(config)
    if args.stage == "adapt":
        # The mask of adaptation replaces the model's own, and so its sliding window. In `embed`,
        # without a mask, the window applies. Up to its length both are the same.
        config = config.get_text_config()
        if "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"]):
            limit = min(limit, getattr(config, "sliding_window", None) or math.inf)
    for name in ("max_length", "query_length", "passage_length"):
        length = getattr(args, name) or 0
        if length > limit:
            raise BadInput(
                f"--{name.replace('_', '-')} {length}: the model was made for {limit} tokens "
                "(its positions, the original ones if RoPE was stretched, or its sliding window)"
            )


def open_dataset(rows: Rows, tokenizer, prompts: Prompts, args) -> Adaptation | FineTuning:
    """The rows of either stage, as this rank sees them."""
    world = dist.get_world_size()
    if args.batch_size < world:
        raise BadInput(f"--batch-size {args.batch_size}: less than one for each of {world} ranks")
    batches = Batches(args.batch_size, args.micro_batch_size, args.seed, dist.get_rank(), world)
    if args.stage == "adapt":
        return Adaptation(rows, tokenizer, prompts, batches, args.max_length)
    of_pairs = args.query_length, args.passage_length, args.query_prompt, args.group_size
    return FineTuning(rows, tokenizer, prompts, batches, *of_pairs)


def check_same_run(settings: dict[str, Any], run_file: Path) -> None:
    """BadInput if the run in this folder has other settings, data or prompts."""
    before = json.loads(run_file.read_text())["settings"]
    for name in settings | before:
        now, then = settings.get(name), before.get(name)
        if now != then:
            flag = f"--{name.replace('_', '-')}"
            raise BadInput(f"{flag} is {now}, but it was {then} in {run_file}: give the same")


def train(args) -> None:  # noqa: C901 (a run from top to bottom)
    """The whole of a run, of either stage. Every rank runs it.

    How a killed run goes on: the data of a step, its learning rate and its dropout follow from the
    settings and the step's number (`Batches`). So the newest checkpoint has weights, moments and
    that number, run.json has the settings, which must be the same, and the log is cut to the steps
    that the checkpoint has seen.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    output = Path(args.output)
    device, dtype = pick_device(args.dtype)
    args.dtype = str(dtype).removeprefix("torch.")
    if args.micro_batch_size is None:
        # On a GPU enough tokens for it not to wait for its next order; a CPU never waits.
        tokens = 16_384 if device.type == "cuda" else 1_024
        args.micro_batch_size = max(1, tokens // (args.max_length or args.passage_length))
    checkpoint = find_checkpoint(output, args.resume)
    dist.barrier()  # all have looked; now rank 0 writes
    log = open_log(output / "log.jsonl") if rank == 0 else None

    # The model as it was, the data, and what is worked out from them.
    lm, tokenizer, rows = prepare(args, output)
    check_lengths(args, lm.config)
    prompts = make_prompts(tokenizer)
    dataset = open_dataset(rows, tokenizer, prompts, args)
    held_out = open_dataset(Rows(args.valid), tokenizer, prompts, args) if args.valid else None
    if args.steps is None:  # one pass over the data; 10,000 steps are the paper's
        args.steps = min(10_000, math.ceil(dataset.n_examples / args.batch_size))
    save_every = args.save_every or min(500, math.ceil(args.steps / 10))
    levels = dataset.yardstick(lm.get_input_embeddings().num_embeddings)

    # The settings, on disk from the start: what must be the same when a run goes on.
    settings = {name: getattr(args, name) for name in ("stage", "model", "dtype", *SETTINGS)}
    settings |= {"data": rows.digest(), "prompts": list(prompts)}
    run = {"settings": settings, "yardstick": levels}
    run_file = output / "run.json"
    is_finished = run_file.exists() and "finished" in json.loads(run_file.read_text())
    if checkpoint or run_file.exists():
        check_same_run(settings, run_file)
    if is_finished:
        say(f"--output {output}: that run is finished, there is nothing to resume")
        return
    dist.barrier()  # all have read; now rank 0 writes
    if rank == 0:
        write_json(run_file, run)
    epochs = args.steps * args.batch_size / dataset.n_examples
    shown_levels = " ".join(f"{name} {level:.3f}" for name, level in levels.items())
    say(
        f"model      {args.model or 'from scratch'}: {lm.num_parameters():,} parameters\n"
        f"data       {len(rows):,} rows in {len(rows.paths)} files, "
        f"{dataset.n_examples:,} examples{dataset.left_out}\n"
        f"run        {args.steps} steps of {args.batch_size} examples, {epochs:.2f} epochs"
        f"{': many' if epochs > 10 else ''}\n"
        f"device     {world} x {device.type}, computes in {args.dtype}\n"
        f"yardstick  losses without a look at the text: {shown_levels}"
    )
    slow = device.type == "cpu" and not torch.cpu._is_avx512_bf16_supported()
    if slow and dtype == torch.bfloat16:
        say("           this CPU has no bfloat16 arithmetic: --dtype float32 is far faster")
    first_step = int(checkpoint.name.removeprefix("checkpoint-")) if checkpoint else 0
    if args.resume:
        goes_on = f"goes on at step {first_step} of {checkpoint}"
        say(goes_on if checkpoint else f"no checkpoint in {output} yet: starts at step 0")

    # Item `step` of the data set is all of a step; workers prepare it ahead of the device. They are
    # forked, so that they share the index of the rows. A fork copies no other thread, and what one
    # was doing stays half done; so it happens here, before there is work for a GPU.
    def ignore_signals(worker: int) -> None:  # of Ctrl-C and of schedulers, which all processes get
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        sampler=range(first_step, args.steps),
        num_workers=args.workers,
        collate_fn=lambda item: item,
        multiprocessing_context="fork" if args.workers else None,
        worker_init_fn=ignore_signals,
    )
    items = iter(loader)

    # Ctrl-C, or a scheduler's SIGTERM: the step is finished and saved. A second one ends at once;
    # but torchrun passes on what the terminal has already sent, so it must come a second later.
    asked_to_stop: list[float] = []  # when

    def ask_to_stop(number, frame) -> None:
        if asked_to_stop and time.monotonic() - asked_to_stop[0] > 1:
            os._exit(128 + number)
        asked_to_stop.append(time.monotonic())

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_to_stop)

    # The model, sharded over the ranks, and its optimizer.
    n_weights = lm.num_parameters()
    if args.gradient_checkpointing:
        try:
            lm.activation_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise BadInput(f"--gradient-checkpointing: {in_one_line(error)}") from error
    if args.stage == "finetune" and not lm.config.tie_word_embeddings:
        lm.get_output_embeddings().requires_grad_(False)  # it takes no part
    model = Llara(lm, prompts).train()
    shard(model, device, dtype, args.compile)
    # No weight decay, and gradients clipped to 1 below: as in the released code, by its Trainer.
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.0, fused=True)
    if checkpoint:
        load_checkpoint(model, optimizer, checkpoint)

    # The loop: a step, a line in the log, from time to time a checkpoint.
    if log:  # what a killed run wrote after its last checkpoint is cut off: a line is a step
        log.seek(0)
        for _ in range(first_step):
            log.readline()
        log.truncate(log.tell())
    bar = tqdm(
        initial=first_step,
        total=args.steps,
        disable=rank > 0,
        miniters=0,
        smoothing=0,  # of the time that remains: the mean since the start
        bar_format="{n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
    )
    shown = ""
    forwards = itertools.count(1)

    def show_forward(*_) -> None:  # a step can take minutes
        bar.set_postfix_str(f"{shown} forward {next(forwards)}", refresh=False)
        bar.update(0)

    lm.get_decoder().register_forward_hook(show_forward)
    started = time.perf_counter()
    with bar:  # closed with a line of its own, whatever happens
        for step, item in enumerate(items, first_step):
            lr = get_lr(step, args.steps, args.lr, args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = lr
            losses = run_step(model, item, args, device, step)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor().item()
            if not math.isfinite(losses["loss"] + norm):
                raise BadInput(
                    f"step {step}: the loss or its gradient is not finite; nothing was updated. A "
                    "lower --lr, with another --output, may help"
                )
            optimizer.step()
            optimizer.zero_grad()

            # As a sum, a signal to any rank stops all of them after the same step.
            n_tokens, n_asked = sum_over_ranks([count_tokens(item, prompts), len(asked_to_stop)])
            rate = n_tokens / (time.perf_counter() - started)
            row = {"step": step, **losses, "lr": lr, "grad_norm": norm, "tokens/s": rate}
            if device.type == "cuda":
                row["GiB"] = torch.cuda.max_memory_allocated() / 2**30
                # As nanoGPT has it: without attention, and without what checkpointing repeats.
                row["TFLOP/s"] = 6 * n_weights * rate / world / 1e12
            done = step + 1
            is_saved = done % save_every == 0 or n_asked > 0
            if held_out and (is_saved or done == args.steps):
                row |= held_out_losses(model, held_out, args, device)
            if log:
                log.write(json.dumps(row) + "\n")
                log.flush()
            names = [name for name in (*TASKS, "loss", "accuracy") if name in row][:3]
            shown = " ".join(f"{name} {row[name]:.2f}" for name in names) + f" {rate:.0f} tokens/s"
            forwards = itertools.count(1)
            bar.set_postfix_str(shown, refresh=False)
            bar.update()
            if is_saved and done < args.steps:
                save_checkpoint(model, optimizer, output, done)
            if n_asked and done < args.steps:
                say(f"interrupted after step {step}, saved in {output}: --resume goes on")
                sys.exit(1)
            started = time.perf_counter()

    # The end: an ordinary model, then the mark that it is whole; then the checkpoints go. All ranks
    # meet once more, to gather the weights; rank 0 alone writes them.
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = dcp_state.get_model_state_dict(model.lm, options=options)
    if rank > 0:
        return
    if lm.config.tie_word_embeddings:
        for name in lm._tied_weights_keys or ():
            state.pop(name, None)  # or the embeddings are written twice
    card = MODEL_CARD.format(
        args=args,
        base=args.model or "random weights",
        prompts=prompts,
        query_prompt=query_prompt_of(output).upper(),
        max_length=int(min(512, max_positions(lm.config))),  # as `encode` has it
    )
    save(lm, tokenizer, output, card, state)
    write_json(run_file, run | {"finished": True})
    shutil.rmtree(output / "unfinished", ignore_errors=True)
    for folder in checkpoints(output):
        shutil.rmtree(folder)

    # What came of it: the mean of the last tenth of the steps, and what two embeddings say.
    log.seek(0)
    last_rows = [json.loads(line) for line in log][-math.ceil(args.steps / 10) :]
    for name, level in levels.items():
        values = [row[name] for row in last_rows if name in row]
        if values:
            verdict = "below" if np.mean(values) < level else "NOT below"
            say(f"{name} {np.mean(values):.2f}, yardstick {level:.2f}: {verdict}")
    if args.stage == "adapt":
        lm, tokenizer = read_model(AutoModelForCausalLM, output)
        for number in (dataset.n_examples // 3, 2 * dataset.n_examples // 3):
            print_explanation(lm, tokenizer, dataset.read_texts(number)[0][:1000])
    say(f"saved to {output}; {output / 'README.md'} says how to embed with it")


def print_explanation(lm: nn.Module, tokenizer, text: str) -> None:
    say(f"\n{' '.join(text.split())[:300]}")
    for state, words in explain(lm, tokenizer, text).items():
        say(f"  {state + ':':11} {' '.join(words)}")


# ---- command line --------------------------------------------------------------------------------

# Name: default without --model, with it, with --stage finetune, help. None: not of that stage, or
# worked out when the run begins. The small model has nothing to forget and only minutes to learn:
# its pretext tasks weigh ten times as much as the paper's.
SETTINGS = {
    "steps": (600, None, None, "updates; default with --model: one pass, 10000 at most"),
    "batch_size": (32, 256, 128, "examples, or queries, a step over all ranks"),
    "lr": (5e-3, 1e-5, 1e-5, "peak of the learning rate"),
    "warmup": (0.1, 0.1, 0.1, "share of the steps; then the rate falls linearly to 0"),
    "seed": (0, 0, 0, "of the order of the data, and of a model from scratch"),
    "max_length": (96, 1024, None, "tokens of a joint sequence, prompts included"),
    "ar_weight": (1.0, 1.0, None, "weight of AR; 0 turns a task off"),
    "ebae_weight": (0.5, 0.05, None, "weight of EBAE"),
    "ebar_weight": (0.5, 0.05, None, "weight of EBAR"),
    "query_length": (None, None, 64, "tokens of a query, prompt included"),
    "passage_length": (None, None, 160, "tokens of a passage, prompt included"),
    "query_prompt": (None, None, "next", "prompt of queries: next or self"),
    "group_size": (None, None, 16, "passages a query: one positive, the rest negatives"),
    "temperature": (None, None, 0.01, "of the softmax over the passages"),
}


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1")
    return int(text)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What was not given is filled from SETTINGS."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--stage", choices=["adapt", "finetune"], default="adapt", help="default: adapt")
    add("--data", nargs="+", help=".jsonl files or folders; default: Python's documentation")
    add("--valid", nargs="+", help="held-out files, for valid_.. losses at each --save-every")
    add("--model", help="folder or hub name; default: a small Llama from scratch")
    add("--output", default="out", help="folder for log, checkpoints and model; default: out")
    add("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    add("--explain", nargs="+", metavar="TEXT", help="what --model's embeddings say; no training")
    for name, (small, paper, tuning, text) in SETTINGS.items():
        known = next(value for value in (small, paper, tuning) if value is not None)
        kind = positive if isinstance(known, int) and name != "seed" else type(known)
        defaults = ", ".join("-" if v is None else str(v) for v in (small, paper, tuning))
        add(f"--{name.replace('_', '-')}", type=kind, help=f"{text} [{defaults}]")
    add("--dtype", choices=["float32", "bfloat16"], help="to compute in; CUDA: bfloat16")
    add("--micro-batch-size", type=positive, help="sequences in a forward: memory, not results")
    add("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    add("--compile", action="store_true", help="compile each layer: faster on a GPU, after a while")
    add("--save-every", type=positive, help="steps; default: a tenth of the run, 500 at most")
    add("--workers", type=int, default=1, help="tokenising processes a rank; default: 1")
    args = parser.parse_args(argv)

    column = 2 if args.stage == "finetune" else 1 if args.model else 0
    for name, row in SETTINGS.items():
        if getattr(args, name) is None:
            setattr(args, name, row[column])
        elif row[column] is None and name != "steps":
            parser.error(f"--{name.replace('_', '-')} means nothing with --stage {args.stage}")
    if args.stage == "finetune" and not (args.model and args.data):
        parser.error("--stage finetune needs --model, what adaptation has saved, and --data")
    if args.query_prompt not in (None, "next", "self"):
        parser.error("--query-prompt: next or self")
    if args.explain and not args.model:
        parser.error("--explain needs --model")
    return args


def main() -> None:
    args = parse_arguments()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not survive a fork
    transformers_logging.disable_progress_bar()
    with process_group():
        if args.explain:
            lm, tokenizer = load(args.model)
            for text in args.explain:
                print_explanation(lm, tokenizer, text)
        else:
            train(args)


if __name__ == "__main__":
    main()
