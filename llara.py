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

    a row sees:          prefix + passage    SELF       NEXT
    prefix + passage         causal           -          -
    SELF                      yes           causal       -
    NEXT                      yes             no       causal

"-" comes later, so causality hides it; "no" comes earlier, and is hidden by our own mask. Each
prompt closes the quote of the passage, and neither sees the other.

The embedding of a text is the mean of the eight states, scaled to length 1. Adaptation, as above,
is followed by fine-tuning on pairs of query and passage; search is by dot product. Passages take
the SELF prompt. Queries take the NEXT prompt, whose states say what the passage after a text would
hold: the passage after a question is its answer. But before fine-tuning queries take SELF as well:
until then, nothing has made SELF and NEXT embeddings comparable.

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
import datetime
import functools
import json
import math
import os
import re
import resource
import shutil
import sys
import sysconfig
import time
import unicodedata
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dcp_state
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import (
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from tqdm import tqdm
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

# ==================================================================================================
# THE METHOD. Shapes: B sequences, L tokens each, d wide states, V tokens in the vocabulary, W words
# in the largest bag; 8 special tokens in a prompt.
# ==================================================================================================

# ---- prompts -------------------------------------------------------------------------------------

# Each prompt ends with its special tokens: the states there become the embedding. The eight tokens
# and the quotes are those of the authors' released code; the paper has one </s> and no quotes. To
# have that, change these texts: all else is derived from them.
PREFIX = '"'
SELF_PROMPT = '", summarize the above passage within eight words: <s1><s2><s3><s4><s5><s6><s7><s8>'
NEXT_PROMPT = (
    '", predict the following passage within eight words: <s9><s10><s11><s12><s13><s14><s15><s16>'
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
            raise ValueError(
                f"a length of {max_length} tokens leaves no room for text: the prompt takes "
                f"{max_length - room}"
            )
        return [*self.prefix, *text_ids[:room], *suffix]


def make_prompts(
    tokenizer,
    self_prompt: str = SELF_PROMPT,
    next_prompt: str = NEXT_PROMPT,
    prefix: str = PREFIX,
) -> Prompts:
    """The prompts in the ids of this tokenizer; for Llama-2: 2, 19 and 18 of them.

    ValueError if a special token at the end of a prompt is not one token of this tokenizer, or if
    nothing stands before a passage.
    """
    special_token = r"<[^<>\s]+>"

    # split_special_tokens=True makes a "<s1>" in a text plain characters: a text cannot forge a
    # prompt. The prompt's own are cut off first, and their ids appended.
    def prompt_ids(prompt):
        words = re.sub(special_token, "", prompt)
        word_ids = tokenizer(words, add_special_tokens=False, split_special_tokens=True).input_ids
        tokens = re.findall(special_token, prompt)
        if not tokens or not prompt.endswith("".join(tokens)):
            raise ValueError(f"{prompt!r} does not end with its special tokens")
        token_ids = tokenizer.convert_tokens_to_ids(tokens)
        if tokenizer.unk_token_id in token_ids:  # an unknown one gets this id, which can be None
            raise ValueError(
                f"{' '.join(tokens)} are not one token each in this tokenizer: llara.load adds them"
            )
        return word_ids + token_ids, len(tokens)

    self_ids, self_pooled = prompt_ids(self_prompt)
    next_ids, next_pooled = prompt_ids(next_prompt)
    if self_pooled != next_pooled:
        raise ValueError(f"SELF ends with {self_pooled} special tokens, NEXT with {next_pooled}")
    prefix_ids = tokenizer(prefix, add_special_tokens=False, split_special_tokens=True).input_ids
    # If this tokenizer puts a BOS first, so do we. It is not left to add_special_tokens=True, which
    # in some tokenizers also appends an EOS: that would stand between the quote and the passage.
    with_all_it_adds = tokenizer(prefix, split_special_tokens=True).input_ids
    if with_all_it_adds[:1] == [tokenizer.bos_token_id]:
        prefix_ids = [tokenizer.bos_token_id, *prefix_ids]
    if not prefix_ids:
        raise ValueError("without a prefix or a BOS, nothing predicts the first token of a passage")
    return Prompts(prefix_ids, self_ids, next_ids, self_pooled)


# ---- the pretext tasks ---------------------------------------------------------------------------

# The tasks, each with the prompt whose states must predict its bag of words. Another task is a line
# here, its weight below, and its words in `Adaptation.read_examples`. One less: --ebar-weight 0.
BAG_TASKS = {"EBAE": "SELF", "EBAR": "NEXT"}

# Beside them the model keeps its own task, AR: to predict the next token of the passage.
TASKS = ("AR", *BAG_TASKS)

# The loss is a weighted sum: of AR, a mean over tokens, and of EBAE and EBAR, means over passages.
# The released code has AR + 0.1 times the mean of the other two: a pretrained model must not forget
# what it knows. The small model of the default has nothing to forget and only minutes to learn, so
# its pretext tasks weigh ten times as much: together, as much as AR.
PAPER_WEIGHTS = {"AR": 1.0, "EBAE": 0.05, "EBAR": 0.05}
SMALL_WEIGHTS = {"AR": 1.0} | {task: 10 * PAPER_WEIGHTS[task] for task in BAG_TASKS}

# ---- the joint sequence --------------------------------------------------------------------------


def joint_mask(self_start: Tensor, self_length: int, length: int) -> tuple[Tensor, Tensor]:
    """Who may see whom in prefix + passage + SELF + NEXT, and where each token stands.

    self_start (B,): the column at which SELF begins. self_length: how many tokens it has.
    length: L. -> mask (B, 1, L, L) bool, True where the row may see the column; positions (B, L).

    So one pass gives what two would, one with SELF alone and one with NEXT alone. By induction over
    the layers: the states of prefix and passage depend on nothing that comes after them; SELF comes
    before NEXT and cannot see it; a NEXT token attends to the same keys at the same positions as it
    would if SELF were not there; and norms and MLPs work on each token by itself.
    Pads stand at the end, where causality hides them.

    The price: with a mask of its own, attention cannot take the fast kernel for causal attention.
    It is paid in adaptation only. `embed` has one prompt a sequence, and needs no mask.
    """
    column = torch.arange(length, device=self_start.device)  # (L,)
    next_start = self_start + self_length  # (B,)
    is_next = column >= next_start[:, None]  # (B, L), of pads too, which nothing sees
    is_self = (column >= self_start[:, None]) & ~is_next  # (B, L)
    causal = column[:, None] >= column[None, :]  # (L, L)
    next_sees_self = is_next[:, :, None] & is_self[:, None, :]  # (B, L, L)
    mask = causal & ~next_sees_self  # (B, L, L)
    # NEXT stands where it would if SELF were not there.
    positions = torch.where(is_next, column - self_length, column)  # (B, L)
    return mask[:, None], positions


def pad(rows: Sequence[Sequence[int]], value: int = 0) -> Tensor:
    """Lists of ids -> (B, L) int64, padded on the right, where causal attention never looks."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


# A row of a batch, not padded yet: the ids of the passage, then each bag, ordered as BAG_TASKS: the
# words of the passage (EBAE), those of the following passage (EBAR). A bag is the set of token ids
# of a text's words, without stop words and punctuation, tokenised anew (`Adaptation.bags`): a word
# of three tokens gives three ids.
Example = tuple[list[int], ...]


def collate(examples: Sequence[Example], prompts: Prompts) -> dict[str, Tensor]:
    """Examples -> the batch that `Llara.forward` takes.

    input_ids (B, L): prefix + passage + SELF + NEXT. self_start (B,): the column of SELF.
    SELF_columns, NEXT_columns (B, 8): where the special tokens stand.
    EBAE, EBAR (B, W): ids of the target words, padded with -100.
    counts (3,): what each loss is a mean over: tokens of passages, rows with words, rows with
    following words. ValueError if a pooled column does not hold its special token.
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
    for name, prompt in (("SELF", prompts.SELF), ("NEXT", prompts.NEXT)):
        pooled_ids = batch["input_ids"].gather(1, batch[f"{name}_columns"])  # (B, 8)
        if (pooled_ids != torch.tensor(prompt[-prompts.pooled :])).any():
            raise ValueError("a pooled column does not hold its special token")
    counts = [int(passage_lengths.sum())]
    for task, bag in zip(BAG_TASKS, bags, strict=True):
        batch[task] = pad(bag, -100)  # (B, W)
        counts.append(sum(len(ids) > 0 for ids in bag))
    batch["counts"] = torch.tensor(counts)  # (3,)
    return batch


# ---- losses --------------------------------------------------------------------------------------


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
    """L = the weighted sum of AR, EBAE and EBAR. losses (3,), weights (3,) -> scalar."""
    return (losses * torch.tensor(weights, dtype=losses.dtype, device=losses.device)).sum()


def contrastive_loss(
    queries: Tensor, passages: Tensor, excluded: Tensor, temperature: float = 0.01
) -> tuple[Tensor, Tensor]:
    """InfoNCE, the loss of fine-tuning: the mean over queries of -log softmax_p(q . p / T)[p+].

    queries (Q, d), passages (P, d): unit rows; passage i is the positive of query i, all others are
    negatives. excluded (Q, P) bool: True where another passage answers the query too, and so is no
    negative; never True for its own passage, at [i, i].
    -> the loss, and the share of queries that score their own passage highest, both scalars.
    """
    scores = queries @ passages.T / temperature  # (Q, P)
    scores = scores.masked_fill(excluded, -torch.inf)
    own_passage = torch.arange(len(queries), device=queries.device)  # (Q,)
    loss = F.cross_entropy(scores, own_passage)
    accuracy = (scores.argmax(dim=1) == own_passage).float().mean()
    return loss, accuracy


# ---- the model -----------------------------------------------------------------------------------


def embed(model: nn.Module, input_ids: Tensor, lengths: Tensor, pooled: int) -> Tensor:
    """Embeds sequences prefix + text + prompt: the mean of the states at the special tokens.

    input_ids (B, L), padded on the right; lengths (B,), without pads; pooled: the number of special
    tokens, with which each sequence ends -> (B, d) float32, unit rows.
    There is no mask: causality hides the pads, and the fast kernel for causal attention runs.
    """
    hidden = final_states(model, input_ids=input_ids)  # (B, L, d), after the last norm
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
    compiled; of any dtype, on any device. prompt: "self" for passages, "next" for queries (but
    "self" before fine-tuning). max_length: in tokens, with the prompt; by default 512, or the
    positions of the model if these are fewer. The result does not depend on the batch, but for
    rounding.
    ValueError: see `make_prompts` and `Prompts.around`; also if max_length is more than the model
    has positions. FloatingPointError if an embedding is not finite.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    if max_length is None:
        max_length = min(512, positions)
    if max_length > positions:
        raise ValueError(f"a length of {max_length} tokens: the model has {positions} positions")
    prompts = make_prompts(tokenizer)
    if isinstance(texts, str):
        return encode(model, tokenizer, [texts], prompt, max_length, batch_size)[0]
    # A tokenizer's own truncation is state that two threads would share: we cut the ids instead.
    # Special tokens in a text stay text: a row that says "<s1>" must not forge a prompt.
    text_ids = []
    if texts:
        text_ids = tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True
        ).input_ids
    sequences = [prompts.around(ids, prompt, max_length) for ids in text_ids]
    # Texts of like length together: little padding.
    longest_first = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    device = model.get_input_embeddings().weight.device
    embeddings = np.empty((len(sequences), model.config.hidden_size), np.float32)
    was_training = model.training
    model.train(False)
    try:
        for start in range(0, len(sequences), batch_size):
            rows = longest_first[start : start + batch_size]
            tensors = [torch.tensor(sequences[row]) for row in rows]
            # This is `pad`, written out so that encode can be copied into another project. It also
            # needs PREFIX, SELF_PROMPT, NEXT_PROMPT, Prompts, make_prompts, final_states and embed.
            input_ids = nn.utils.rnn.pad_sequence(tensors, batch_first=True)  # (b, L)
            lengths = torch.tensor([len(tensor) for tensor in tensors])  # (b,)
            input_ids, lengths = input_ids.to(device), lengths.to(device)
            vectors = embed(model, input_ids, lengths, prompts.pooled)  # (b, d)
            embeddings[rows] = vectors.cpu().numpy()
    finally:
        model.train(was_training)
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

        Each is a sum over the batch, divided by batch["counts"]. `collate` sets these to the counts
        of this micro-batch; `adaptation_step` overwrites them with those of the global batch. So
        the results of all micro-batches and ranks add up to the losses of the step.

        The head is applied here and not by the caller, since FSDP gathers its weights for the
        duration of forward; and only where a loss needs it, since logits are what costs memory.
        """
        input_ids = batch["input_ids"]  # (B, L)
        self_start = batch["self_start"]  # (B,)
        mask, positions = joint_mask(self_start, len(self.prompts.SELF), input_ids.shape[1])
        # (B, L, d):
        hidden = final_states(
            self.lm, input_ids=input_ids, attention_mask=mask, position_ids=positions
        )
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
            is_target = after_prefix & (next_column < self_start[:, None])  # (B, L-1)
            # F.cross_entropy(states @ head.weight.T, next_ids, reduction="sum") of the N targets,
            # in less memory:
            losses["AR"] = chunked_cross_entropy(
                states[is_target],  # (N, d)
                head.weight,
                next_ids[is_target],  # (N,)
            )
        for task, prompt in BAG_TASKS.items():
            if task in tasks:
                columns = batch[f"{prompt}_columns"]  # (B, 8)
                states = hidden.take_along_dim(columns[:, :, None], dim=1)  # (B, 8, d)
                losses[task] = bag_loss(head(states), batch[task])  # of logits (B, 8, V)
        return torch.stack([losses[task] for task in TASKS]) / batch["counts"].clamp(min=1)

    def embed(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """`embed` as a method, for which FSDP can gather the weights: (B, L), (B,) -> (B, d)."""
        return embed(self.lm, input_ids, lengths, self.prompts.pooled)

    def top_tokens(self, input_ids: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k tokens that the pooled states of a sequence predict: (L,) -> (k,), (k,).

        First by the maximum over the states, as trained; then by their mean. The embedding is this
        mean scaled to length 1, and scaling does not change the order of the logits.
        """
        hidden = final_states(self.lm, input_ids=input_ids[None])  # (1, L, d)
        states = hidden[0, -self.prompts.pooled :]  # (8, d)
        head = self.lm.get_output_embeddings()
        by_max = head(states).amax(dim=0)  # (V,)
        by_mean = head(states.mean(dim=0))  # (V,)
        return by_max.topk(k).indices, by_mean.topk(k).indices


# ==================================================================================================
# THE METHOD ENDS HERE. What follows brings models and text to it, and runs it on many GPUs.
# ==================================================================================================

# ---- what the method stands on -------------------------------------------------------------------


def final_states(model: nn.Module, **inputs) -> Tensor:
    """(B, L, d): the hidden states after the last norm, without the logits where that is possible.

    model: an AutoModel or AutoModelForCausalLM of transformers, also with LoRA by peft, also
    compiled. The head is left out because logits of all tokens take more memory than all layers.
    """
    # torch.compile(model) wraps the model, model.compile() leaves its mark in it.
    compiled = isinstance(model, torch._dynamo.OptimizedModule) or model._compiled_call_impl
    if compiled:
        # To reach into it for its body would run that uncompiled.
        output = model(**inputs, use_cache=False, output_hidden_states=True)
        return output.hidden_states[-1]  # this one is after the last norm
    if hasattr(model, "get_base_model"):
        # From peft: this is the model of transformers, with the adapters inside.
        model = model.get_base_model()
    body = model.base_model  # a causal model without its head; an AutoModel is its own body
    return body(**inputs, use_cache=False).last_hidden_state


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int = 512
) -> Tensor:
    """AR: the sum of -log_softmax(hidden @ weight.T)[target] over N tokens, in little memory.

    hidden (N, d), weight (V, d), targets (N,) -> scalar, in at least float32.
    ValueError if hidden and targets differ in length.

    All logits, (N, V) in float32, are what fills the memory of the released code. Here they exist
    `chunk` rows at a time, and the gradients are made while a chunk's logits are at hand. That
    takes three matrix products: logits, gradient of hidden, gradient of weight. To compute the
    logits once more in the backward pass, as checkpointing would, takes a fourth.
    """
    if len(hidden) != len(targets):
        raise ValueError(f"{len(hidden)} states for {len(targets)} targets")
    return ChunkedCrossEntropy.apply(hidden, weight, targets, chunk)


class ChunkedCrossEntropy(torch.autograd.Function):
    """See `chunked_cross_entropy`. The gradients are made in forward; backward only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk):
        hidden_needs_grad, weight_needs_grad = ctx.needs_input_grad[:2]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        loss = torch.zeros((), dtype=dtype, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if hidden_needs_grad else None  # (N, d)
        d_weight = torch.zeros_like(weight, dtype=dtype) if weight_needs_grad else None  # (V, d)
        # The same memory for each chunk: to allocate it anew takes longer than the softmax itself.
        logits_memory = hidden.new_empty(min(chunk, len(targets)), len(weight))  # (c, V)
        probs_memory = torch.empty_like(logits_memory, dtype=dtype)  # (c, V)
        for start in range(0, len(targets), chunk):
            h = hidden[start : start + chunk]  # (c, d)
            target = targets[start : start + chunk, None]  # (c, 1)
            logits = torch.mm(h, weight.T, out=logits_memory[: len(h)])  # (c, V)
            # One piece of memory holds in turn log p, p, and p - onehot. The loss is read first.
            log_probs = torch.log_softmax(logits, -1, dtype=dtype, out=probs_memory[: len(h)])
            loss -= log_probs.gather(1, target).sum()
            if not (hidden_needs_grad or weight_needs_grad):
                continue
            probs = log_probs.exp_()  # (c, V)
            # d loss / d logits = softmax - onehot
            d_logits = probs.scatter_add_(1, target, probs.new_full(target.shape, -1.0))
            d_logits = d_logits.to(h.dtype)  # (c, V)
            if hidden_needs_grad:
                d_hidden[start : start + chunk] = d_logits @ weight  # (c, d)
            if weight_needs_grad:
                d_weight += d_logits.T @ h  # (V, d)
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable  # a second derivative would silently be wrong: it is refused instead
    def backward(ctx, d_loss):
        d_hidden, d_weight = ctx.saved_tensors
        d_hidden = None if d_hidden is None else d_hidden * d_loss
        d_weight = None if d_weight is None else d_weight * d_loss
        return d_hidden, d_weight, None, None


# ---- what an embedding says ----------------------------------------------------------------------


@torch.inference_mode()
def explain(
    model: Llara, tokenizer, text: str, k: int = 10, max_length: int = 512
) -> dict[str, list[str]]:
    """What an embedding says: the k likeliest tokens of the SELF and of the NEXT states of a text.

    -> {"SELF, max": [words], "SELF, mean": .., "NEXT, max": .., "NEXT, mean": ..}: "max" as the
    losses have it, "mean" the direction of the embedding itself. The text is cut so that text and
    prompt have max_length tokens, or as many as the model has positions.
    """
    positions = getattr(model.lm.config, "max_position_embeddings", None)
    max_length = min(max_length, positions or max_length)
    device = model.lm.get_input_embeddings().weight.device
    text_ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    said = {}
    for prompt in ("self", "next"):
        sequence = model.prompts.around(text_ids, prompt, max_length)
        by_max, by_mean = model.top_tokens(torch.tensor(sequence, device=device), k)  # (k,), (k,)
        said[f"{prompt.upper()}, max"] = [tokenizer.decode(i).strip() for i in by_max.tolist()]
        said[f"{prompt.upper()}, mean"] = [tokenizer.decode(i).strip() for i in by_mean.tolist()]
    return said


# ---- mistakes of the user ------------------------------------------------------------------------


class BadInput(ValueError):
    """A mistake in what the user gave. The command line shows its sentence, without a traceback."""

    def __str__(self) -> str:
        # An error in a worker of a DataLoader comes out of it with the worker's whole traceback as
        # its text, which ends in "llara.BadInput: the sentence". The sentence is kept.
        return super().__str__().split("BadInput: ")[-1].strip()


def first_line(error: Exception) -> str:
    """What a library says of its error, for a sentence of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---- to load and to save a model -----------------------------------------------------------------


def load(name: str | Path) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer, ready for `Llara`.

    name: a folder or a hub name. Weights become float32, whatever the file holds: in bfloat16, a
    step of 1e-5 on a weight of 0.02 is rounded away. The prompts' special tokens are added if need
    be. BadInput if the model cannot be read, or cannot work.
    """
    lm, tokenizer = read_pretrained(AutoModelForCausalLM, name)
    check_architecture(name, lm)
    # A file can hold a head of its own although its configuration says tied. What the file has is
    # what counts; training and saving go by this flag.
    lm.config.tie_word_embeddings = (
        lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    )
    tokens = re.findall(r"<[^<>\s]+>", SELF_PROMPT + NEXT_PROMPT)
    known = tokenizer.get_vocab()
    new = [token for token in dict.fromkeys(tokens) if token not in known]
    n_rows = lm.get_input_embeddings().num_embeddings
    n_trained = min(len(tokenizer), n_rows)  # some models have rows to spare
    added = [AddedToken(token, special=True, normalized=False) for token in new]
    tokenizer.add_tokens(added, special_tokens=True)
    if len(tokenizer) > n_rows:
        lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    check_vocabulary(name, lm, tokenizer)
    # Rows without a trained value are those of the tokens added here, perhaps among rows to spare,
    # and those that the resize appended. They start from the mean of the others: a random row in
    # the head stands apart and takes probability from real tokens.
    new_ids = {*tokenizer.convert_tokens_to_ids(new), *range(n_rows, len(tokenizer))}
    with torch.no_grad():
        for layer in (lm.get_input_embeddings(), lm.get_output_embeddings()):
            layer.weight[sorted(new_ids)] = layer.weight[:n_trained].mean(dim=0)
    return lm, tokenizer


def check_vocabulary(name: str | Path, model: nn.Module, tokenizer) -> None:
    """BadInput if the tokenizer has an id for which the model has no embedding.

    After `load` has made room for len(tokenizer) of them, that is one whose ids have gaps.
    """
    n_embeddings = model.get_input_embeddings().num_embeddings
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= n_embeddings:
        raise BadInput(
            f"{name}: {token!r} has the id {largest}, but the model has {n_embeddings} embeddings: "
            "its tokenizer is another model's"
        )


def check_architecture(name: str | Path, lm: nn.Module) -> None:
    """Is one pass equal to two on this model? BadInput with the reason if not.

    What `joint_mask` promises holds if attention honours a mask and positions of our own, and if
    nothing but attention looks at other tokens. So it is tried, on 4 + 4 + 4 tokens.
    """
    kind = type(lm).__name__
    head = lm.get_output_embeddings()
    if type(head) is not nn.Linear or head.bias is not None:
        raise BadInput(f"{name}: the head of {kind} is not a plain matrix (bias?): not supported")
    ids = torch.arange(12)[None]  # (1, 12), as if a passage, SELF and NEXT had four tokens each
    mask, positions = joint_mask(torch.tensor([4]), 4, 12)
    without_self = torch.cat([ids[:, :4], ids[:, 8:]], dim=1)  # (1, 8)
    close = functools.partial(torch.allclose, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        try:
            joint = final_states(lm, input_ids=ids, attention_mask=mask, position_ids=positions)
            alone = final_states(lm, input_ids=without_self)
            cut = final_states(lm, input_ids=without_self[:, :6])
            logits = lm(input_ids=without_self, use_cache=False).logits
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
            reason = first_line(error)
            raise BadInput(
                f"{name}: {kind} takes no mask and positions of ours: {reason}"
            ) from error
        if alone.shape[-1] != head.in_features:
            raise BadInput(
                f"{name}: {kind} has states of {alone.shape[-1]}, but its head takes "
                f"{head.in_features} numbers: not supported"
            )
        if not alone.isfinite().all():
            raise BadInput(f"{name}: its states are not finite: a damaged checkpoint")
        if not close(alone[:, :6], cut):
            raise BadInput(f"{name}: {kind} sees later tokens: an encoder, not a causal model")
        if not close(joint[:, 8:], alone[:, 4:]):
            raise BadInput(
                f"{name}: {kind} ignores the mask or the positions (ALiBi, a recurrent state): "
                "one pass would not equal two"
            )
        if not close(head(alone), logits):
            raise BadInput(f"{name}: {kind} scales or caps its logits: not supported")


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
    Path(folder, "modules.json").write_text(json.dumps(modules))


def is_only_adapted(folder: str | Path) -> bool:
    """Is this what adaptation has saved, not fine-tuned yet? Then queries do better with SELF."""
    run = Path(folder, "run.json")
    return run.exists() and json.loads(run.read_text())["settings"]["stage"] == "adapt"


class Sentences(nn.Module):
    """A saved model for sentence-transformers: SentenceTransformer(modules=[Sentences("out")]).

    Then encode_document takes the SELF prompt, and encode_query the NEXT prompt; SELF if the folder
    holds a model that is only adapted. The embeddings are those of `encode`. That library calls
    load, preprocess and forward, and asks for max_seq_length.
    """

    def __init__(self, folder: str, max_length: int = 512):
        super().__init__()
        self.query_prompt = "self" if is_only_adapted(folder) else "next"
        self.model, self.tokenizer = read_pretrained(AutoModel, folder)
        self.prompts = make_prompts(self.tokenizer)
        positions = getattr(self.model.config, "max_position_embeddings", None)
        self.max_seq_length = min(max_length, positions or max_length)

    @classmethod
    def load(cls, folder: str, **kwargs) -> "Sentences":
        return cls(folder)

    def preprocess(self, inputs: list[str], prompt: str | None = None, **kwargs):
        if prompt:
            raise ValueError("the prompts are LLaRA's own: give none")
        kind = self.query_prompt if kwargs.get("task") == "query" else "self"
        encoded = self.tokenizer(inputs, add_special_tokens=False, split_special_tokens=True)
        rows = [self.prompts.around(ids, kind, self.max_seq_length) for ids in encoded.input_ids]
        return {"input_ids": pad(rows), "lengths": torch.tensor([len(row) for row in rows])}

    def forward(self, features: dict[str, Tensor], **kwargs) -> dict[str, Tensor]:
        input_ids, lengths = features["input_ids"], features["lengths"]  # (B, L), (B,)
        vectors = embed(self.model, input_ids, lengths, self.prompts.pooled)  # (B, d)
        return features | {"sentence_embedding": vectors}


def read_pretrained(kind, name: str | Path, dtype: torch.dtype = torch.float32):
    """A model of the class `kind` and its tokenizer, from a folder or a hub name.

    Only safetensors and JSON are read; no code and no pickle. Attention is sdpa: eager adds a
    boolean mask as 0 and 1, flash attention takes no mask. BadInput says why a model is unusable.
    """
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise BadInput(f"{name}: holds LoRA adapters alone: merge them into their model first")
        if list(folder.glob("*.gguf")):
            raise BadInput(f"{name}: holds a GGUF file: take the safetensors checkpoint instead")
        raise BadInput(f"{name}: has no config.json: not a model of transformers")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        refuse_config(name, config)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        tokenizer("A damaged one fails here.")
        model, info = kind.from_pretrained(
            name,
            dtype=dtype,
            attn_implementation="sdpa",
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except BadInput:
        raise
    except Exception as error:  # transformers, tokenizers and safetensors each raise their own
        reason = first_line(error)
        raise BadInput(f"{name}: {kind.__name__} cannot read it: {reason}") from error
    refuse_number_formats(name)
    if info["missing_keys"]:
        raise BadInput(f"{name}: its files lack {sorted(info['missing_keys'])[:3]}")
    surplus = [key for key in info["unexpected_keys"] if not key.startswith("lm_head.")]
    if surplus:
        raise BadInput(
            f"{name}: {type(model).__name__} has no place for {sorted(surplus)[:3]} of its files: "
            "quantised, or another architecture; take the full-precision checkpoint"
        )
    if not tokenizer.is_fast:
        raise BadInput(f"{name}: has no fast tokenizer (tokenizer.json)")
    return model, tokenizer


def refuse_config(name: str | Path, config) -> None:
    """BadInput if the configuration tells already that the model cannot be used."""
    quantised = getattr(config, "quantization_config", None)
    if quantised:
        method = dict(quantised).get("quant_method", "?")
        raise BadInput(f"{name}: quantised ({method}): take the full-precision checkpoint")
    if config.is_encoder_decoder:
        raise BadInput(f"{name}: an encoder-decoder: take a causal language model")


def refuse_number_formats(name: str | Path) -> None:
    """BadInput if a file holds weights in 8 bits or as integers: cast, they would be garbage."""
    folder = Path(name)
    if not folder.is_dir():
        folder = Path(cached_file(name, "config.json")).parent  # of the hub's cache
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (it is no dict)
                number_format = tensors.get_slice(key).get_dtype()
                if key.endswith("weight") and number_format not in ("F64", "F32", "F16", "BF16"):
                    raise BadInput(
                        f"{path}: {key} is quantised ({number_format}): take the full-precision "
                        "checkpoint"
                    )


def check_length(name: str | Path, config, max_length: int, flag: str) -> None:
    """BadInput if sequences of `max_length` tokens are beyond the model's positions."""
    positions = getattr(config, "max_position_embeddings", None)
    if positions and max_length > positions:
        raise BadInput(f"{flag} {max_length}: {name} has {positions} positions")


def check_attention_window(name: str | Path, config, max_length: int) -> None:
    """BadInput if joint sequences of `max_length` tokens are beyond the model's sliding window.

    The mask of adaptation replaces the model's own, and so its window. `embed` passes no mask: in
    fine-tuning and in `encode` the window applies. Up to the window's length both are the same.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        window = None  # set in the configuration, used by no layer
    if window and max_length > window:
        raise BadInput(
            f"--max-length {max_length}: {name} has a sliding window of {window} tokens, which "
            f"adaptation does not apply: take --max-length {window} at most"
        )


# ---- rows and passages ---------------------------------------------------------------------------

# A row is a line of a .jsonl file, of one of three kinds:
#     an article         {"title", "text"}, cut into passages here; a title may be missing
#     as released        {"input", "output_summarize", "output_predict"}: a passage and the texts
#                        whose words EBAE and EBAR ask for, ready made
#     to fine-tune       {"query", "pos", "neg"}: see `FineTuning.read_pair`

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
SENTENCE_END = re.compile(r"""[.!?]["')\]]*\s+|[。！？।؟]\s*|\n""")  # noqa: RUF001
# An article is cut into n = ceil(tokens / (PLANNED_SHARE * room)) windows of about equal length.
# Each window is a passage. The tokens are estimated from bytes (`tokens_per_row`), and room is what
# --max-length leaves besides the prompts. With a share of 0.9, few windows exceed the room.
PLANNED_SHARE = 0.9


# A word: letters and digits, and the marks among them, as in Hindi, Thai or vocalised Arabic.
# Python's \w does not know marks, nor the joiners of Indic scripts and Persian, U+200C and U+200D.
CHARACTERS = [chr(code) for code in range(0x300, 0x1F000)]  # where marks are found
MARKS = "".join(c for c in CHARACTERS if unicodedata.category(c).startswith("M"))
# A lookahead before the class of some 2,000 marks, for speed alone: no mark is ASCII, so at an
# ASCII character the class need not be searched.
NOT_ASCII = r"(?=[^\x00-\x7f])"
WORD = re.compile(rf"[^\W_]+(?:{NOT_ASCII}[{MARKS}\u200c\u200d]+[^\W_]*)*")


def content_words(text: str) -> str:
    r"""The words of a target: without [\W_]+ and English stop words, as in the released recipe."""
    return " ".join(word for word in WORD.findall(text) if word.lower() not in STOP_WORDS)


def data_files(path: str | Path) -> list[Path]:
    """A file as it is; of a folder and its sub-folders, *.jsonl and WikiExtractor's wiki_00 .."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    files = [
        file
        for file in sorted(path.rglob("*"))
        if file.is_file() and (file.suffix == ".jsonl" or re.fullmatch(r"wiki_\d+", file.name))
    ]
    if not files:
        raise BadInput(f"{path}: no file *.jsonl or wiki_00, wiki_01 .. in there")
    return files


class Rows:
    """Random access to the lines of .jsonl files. Held in memory: 40 bytes a line, not the text.

    paths: files and folders, see `data_files`. Lines of white space do not count. BadInput if there
    is no line; OSError if a file cannot be read.
    """

    def __init__(self, paths: Iterable[str | Path]):
        self.paths = [file for path in paths for file in data_files(path)]
        # Positions and lengths are 64 bits wide: a file can have more than 2^31 bytes.
        file_numbers, line_numbers, starts = array("q"), array("q"), array("q")
        lengths = array("q")
        foreign = array("q")  # bytes of characters that are not ASCII, for `tokens_per_row`
        for file_number, path in enumerate(self.paths):
            start = 0
            with open(path, "rb") as file:
                for line_number, line in enumerate(file, 1):
                    if start == 0 and line.startswith(b"\x1f\x8b"):
                        raise BadInput(f"{path}: compressed: gunzip it first")
                    if not line.isspace():
                        file_numbers.append(file_number)
                        line_numbers.append(line_number)
                        starts.append(start)
                        lengths.append(len(line))
                        foreign.append(count_foreign_bytes(line))
                    start += len(line)
        if not lengths:
            raise BadInput(f"{', '.join(map(str, self.paths))}: no rows in there")
        self.file_numbers = np.array(file_numbers)
        self.line_numbers = np.array(line_numbers)
        self.starts = np.array(starts)
        self.lengths = np.array(lengths)  # (n,) bytes
        self.foreign = np.array(foreign)  # (n,) bytes

    def __len__(self) -> int:
        return len(self.lengths)

    def place(self, i: int) -> str:
        """ "file:line", for messages."""
        return f"{self.paths[self.file_numbers[i]]}:{self.line_numbers[i]}"

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Row i. BadInput if its line is not a JSON object."""
        # Opened anew for each read: a process may have some 1,000 open files, and a Wikipedia from
        # WikiExtractor has more.
        with open(self.paths[self.file_numbers[i]], "rb") as file:
            file.seek(self.starts[i])
            line = file.read(self.lengths[i])
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{self.place(i)}: not JSON ({error})") from None
        if not isinstance(row, dict):
            raise BadInput(f"{self.place(i)}: not a JSON object")
        return row


def count_foreign_bytes(line: bytes) -> int:
    """How many bytes are spent on characters that are not ASCII, raw or written as \\uXXXX."""
    escaped = 6 * line.count(b"\\u")
    if line.isascii():
        return escaped
    return escaped + len(line) - len(line.decode("ascii", errors="ignore"))


def check_text(value: Any, name: str, place: str) -> str:
    """`value`, if it is a text. BadInput if not, or if it cannot be written as UTF-8."""
    if not isinstance(value, str):
        raise BadInput(f"{place}: {name} should be a text, not {json.dumps(value)[:60]}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadInput(f"{place}: {name} holds half of a surrogate pair (\\ud800 ..)") from None
    return value


RELEASED_KEYS = ("input", "output_summarize", "output_predict")


def is_released_row(row: dict[str, Any]) -> bool:
    return "input" in row


def read_text(rows: Rows, i: int) -> str:
    """What a model reads of a row: an article, or a passage as released."""
    if is_released_row(rows[0]):
        return read_released(rows, i)[0]
    return read_article(rows, i)


def read_article(rows: Rows, i: int) -> str:
    """Title and text of a row {"text": .., "title": ..}; "" of a blank page."""
    row, place = rows[i], rows.place(i)
    if "text" not in row:
        raise BadInput(
            f'{place}: has no "text" (nor does its file start with rows of "input"); its keys are '
            f"{sorted(row)[:5]}"
        )
    text = check_text(row["text"], '"text"', place).strip()
    title = check_text(row.get("title") or "", '"title"', place).strip()
    if title and text:
        return f"{title}\n{text}"
    return text


def read_released(rows: Rows, i: int) -> list[str]:
    """The three texts of a row of the released format: passage, EBAE's target, EBAR's target."""
    row, place = rows[i], rows.place(i)
    missing = [key for key in RELEASED_KEYS if key not in row]
    if missing:
        raise BadInput(f"{place}: has no {missing}; the first row of the data has {RELEASED_KEYS}")
    texts = [check_text(row[key], f'"{key}"', place) for key in RELEASED_KEYS]
    if not texts[0].strip():
        raise BadInput(f'{place}: "input" is empty')
    return texts


def boundary(text: str, k: int, n: int) -> int:
    """Where window k of n begins: at the sentence end next to k/n of the text, else after a space.

    It moves by less than half a window, so that neighbours cannot cross.
    """
    target = len(text) * k // n
    if k == 0 or k == n:
        return target
    reach = len(text) // (2 * n)
    ends = [match.end() for match in SENTENCE_END.finditer(text, target - reach, target + reach)]
    if ends:
        return min(ends, key=lambda end: abs(end - target))
    space = text.find(" ", target, target + reach)
    if space >= 0:
        return space + 1
    return target


def tokens_per_row(rows: Rows, tokenizer, sample: int = 128) -> np.ndarray:
    """(n,) float64: about how many tokens each article holds, from its bytes alone.

    So the passages of a corpus can be counted before it is tokenised. A byte of a foreign script
    can take three times the tokens of an English one: so tokens = a * ASCII bytes + b * others,
    where a and b are fitted to a sample of rows by least squares.
    """
    picked = np.linspace(0, len(rows) - 1, min(sample, len(rows))).astype(np.int64)
    plain = (rows.lengths - rows.foreign).astype(np.float64)  # (n,)
    foreign = rows.foreign.astype(np.float64)  # (n,)
    features = []
    tokens = []
    for i in picked:
        text = read_article(rows, i)
        # Only the head is tokenised. It stands for the same share of the row's bytes, of which some
        # are keys and quotes, here as in the rows that are not sampled.
        head = text[:20_000]
        share = len(head) / max(1, len(text))
        ids = tokenizer(head, add_special_tokens=False, split_special_tokens=True).input_ids
        features.append([plain[i] * share, foreign[i] * share])
        tokens.append(len(ids))
    fit, *_ = np.linalg.lstsq(np.array(features), np.array(tokens, np.float64))
    tokens_per_plain_byte, tokens_per_foreign_byte = fit.clip(0.02, 2.0)
    return plain * tokens_per_plain_byte + foreign * tokens_per_foreign_byte


def cut_to_tokens(tokenizer, texts: list[str], room: int) -> list[tuple[list[int], int]]:
    """Of each text, its first `room` token ids, and how many characters these cover."""
    encoded = tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    )
    cut = []
    for text, ids, offsets in zip(texts, encoded.input_ids, encoded.offset_mapping, strict=True):
        covered = offsets[room - 1][1] if len(ids) > room else len(text)
        cut.append((ids[:room], covered))
    return cut


# ---- what one step sees --------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)  # the last epoch and this one
def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def global_batch(step: int, batch_size: int, seed: int, n: int) -> list[tuple[int, int]]:
    """The (epoch, index) of the examples of a step: a new permutation each epoch, without a gap.

    A pure function, so a run can go on at any step, on any number of ranks.
    """
    pairs = []
    for number in range(step * batch_size, (step + 1) * batch_size):
        epoch, i = divmod(number, n)
        pairs.append((epoch, int(epoch_order(seed, epoch, n)[i])))
    return pairs


def micro_batch_count(n: int, micro_batch_size: int, world: int) -> int:
    """How many micro-batches each rank runs for n sequences.

    The same number on every rank, as FSDP needs it, and none of them empty. A rank with n // world
    sequences can fill n // world micro-batches, so the number is capped there; a micro-batch can
    then be larger than asked for. 9 sequences on 8 ranks, one at a time: ceil(9 / 8) = 2, capped
    to 1. Seven ranks run one sequence, one rank runs two at once.
    """
    return min(math.ceil(n / (micro_batch_size * world)), n // world)


def split_by_length(lengths: Sequence[int], count: int) -> list[np.ndarray]:
    """Indices in `count` groups of like length, the longest of this step first."""
    order = np.argsort([-length for length in lengths], kind="stable")
    return np.array_split(order, count)


class Adaptation(torch.utils.data.Dataset):
    """Item `step` is what this rank needs for a step: its micro-batches, lists of `Example`.

    An article of n windows gives n - 1 examples: a passage and the one that follows it. Items are
    lists of numbers and not tensors: a worker sends each tensor by a file descriptor, of which a
    process may have few.
    """

    def __init__(
        self, rows: Rows, tokenizer, prompts: Prompts, args, rank: int = 0, world: int = 1
    ):
        self.rows = rows
        self.tokenizer = tokenizer
        self.args = args
        self.rank = rank
        self.world = world
        self.room = args.max_length - len(prompts.prefix) - len(prompts.SELF) - len(prompts.NEXT)
        if self.room < 1:
            raise BadInput(
                f"--max-length {args.max_length}: the prompts take {args.max_length - self.room}"
            )
        decoder = tokenizer.added_tokens_decoder
        self.special_ids = {i for i, token in decoder.items() if token.special}
        if is_released_row(rows[0]):
            examples_per_row = np.ones(len(rows), np.int64)
        else:
            windows = np.ceil(tokens_per_row(rows, tokenizer) / (PLANNED_SHARE * self.room))
            examples_per_row = np.maximum(windows.astype(np.int64) - 1, 0)
        self.ends = np.cumsum(examples_per_row)  # (n,) examples up to and including each row
        self.n_examples = int(self.ends[-1])
        if self.n_examples == 0:
            raise BadInput(
                f"{', '.join(map(str, rows.paths))}: no text is longer than a passage of "
                f"{self.room} tokens, so none has a following one; lower --max-length"
            )

    def find_windows(self, number: int) -> tuple[str, str]:
        """Of an example: two texts with the same start: the passage; it and the next window.

        Example k of a row is made of its windows k and k + 1. The passage is later cut to `room`
        tokens. The following text is the second text without the part that was kept: it begins
        with what was cut off, and is then cut to `room` itself.
        """
        row = int(np.searchsorted(self.ends, number, side="right"))
        first = int(self.ends[row - 1]) if row else 0
        n_windows = int(self.ends[row]) - first + 1
        k = number - first
        text = read_article(self.rows, row)
        start = boundary(text, k, n_windows)
        end = boundary(text, k + 1, n_windows)
        next_end = boundary(text, k + 2, n_windows)
        return text[start:end].rstrip(), text[start:next_end]

    def read_examples(self, numbers: Sequence[int]) -> list[Example]:
        """Reads and tokenises: of each example the passage, and the bags in BAG_TASKS' order."""
        if is_released_row(self.rows[0]):
            passages, own_texts, next_texts = self.read_ready_made(numbers)
        else:
            passages, own_texts, next_texts = self.read_windows(numbers)
        bags = {"EBAE": self.bags(own_texts), "EBAR": self.bags(next_texts)}
        return list(zip(passages, *(bags[task] for task in BAG_TASKS), strict=True))

    def read_ready_made(self, numbers: Sequence[int]) -> tuple[list, list[str], list[str]]:
        """-> ids of passages, their own texts, the following ones: of rows as released.

        All three are cut to the room of a passage.
        """
        texts = [read_released(self.rows, i) for i in numbers]
        cuts = cut_to_tokens(self.tokenizer, [passage for passage, _, _ in texts], self.room)
        own_texts = self.cut_texts([own_text for _, own_text, _ in texts])
        next_texts = self.cut_texts([next_text for _, _, next_text in texts])
        return [ids for ids, _ in cuts], own_texts, next_texts

    def read_windows(self, numbers: Sequence[int]) -> tuple[list, list[str], list[str]]:
        """-> ids of passages, their own texts, the following ones: of articles.

        The own text is the part of the passage that the model reads, the room of a passage at most,
        and the following text begins where that part ends.
        """
        windows = [self.find_windows(number) for number in numbers]
        cuts = cut_to_tokens(self.tokenizer, [passage for passage, _ in windows], self.room)
        own_texts = []
        next_texts = []
        for (passage, both), (_, n_covered) in zip(windows, cuts, strict=True):
            own_texts.append(passage[:n_covered])
            next_texts.append(both[n_covered:].strip())
        return [ids for ids, _ in cuts], own_texts, self.cut_texts(next_texts)

    def cut_texts(self, texts: list[str]) -> list[str]:
        """The part of each text that would fit the room of a passage."""
        cuts = cut_to_tokens(self.tokenizer, texts, self.room)
        return [text[:n_covered] for text, (_, n_covered) in zip(texts, cuts, strict=True)]

    def bags(self, texts: list[str]) -> list[list[int]]:
        """The set of ids of each text's words, tokenised anew."""
        words = [content_words(text) for text in texts]
        encoded = self.tokenizer(words, add_special_tokens=False, split_special_tokens=True)
        return [sorted(set(ids) - self.special_ids) for ids in encoded.input_ids]

    def __getitem__(self, step: int) -> list[list[Example]]:
        args = self.args
        everyone = global_batch(step, args.batch_size, args.seed, self.n_examples)
        mine = [example for _, example in everyone[self.rank :: self.world]]
        examples = self.read_examples(mine)
        count = micro_batch_count(args.batch_size, args.micro_batch_size, self.world)
        groups = split_by_length([len(passage) for passage, *_ in examples], count)
        return [[examples[i] for i in group] for group in groups]

    def yardstick(self, vocab_size: int) -> str:
        """The losses of knowing nothing, and of knowing only how frequent each token is."""
        order = epoch_order(self.args.seed, 0, self.n_examples)[:2048]
        levels = unigram_levels(self.read_examples(order.tolist()), vocab_size)
        named = " ".join(f"{task} {level:.3f}" for task, level in zip(TASKS, levels, strict=True))
        return f"ln V = {math.log(vocab_size):.3f} knows nothing; unigram level: {named}"


def unigram_levels(examples: Sequence[Example], vocab_size: int) -> np.ndarray:
    """(3,): the losses, in the order of TASKS, of always predicting the targets' frequencies."""
    counts = np.zeros((len(TASKS), vocab_size))
    for passage, *bags in examples:
        np.add.at(counts[0], passage, 1)  # a token can occur more than once
        for task_counts, bag in zip(counts[1:], bags, strict=True):
            # A row weighs the same in the loss, however many words it has.
            task_counts[bag] += 1 / max(1, len(bag))
    n_targets = counts.sum(axis=1, keepdims=True)  # (3, 1)
    frequencies = counts / np.maximum(n_targets, 1)  # (3, V); 0 / 1 if there are no targets at all
    return -(frequencies * np.log(frequencies.clip(1e-30))).sum(axis=1)


class FineTuning(torch.utils.data.Dataset):
    """Item `step`: {"micro_batches": of this rank, "excluded": (Q, P) bool}.

    A micro-batch is a list of (slot, ids), where the slot is 0..Q-1 for a query and Q..Q+P-1 for a
    passage of the global batch; the first Q passages are the positives. Every query draws one of
    its positives and group_size - 1 of its negatives, if it has any, anew each epoch. All ranks
    read the global batch, to know which passages are true for whom; each tokenises only its own.
    """

    def __init__(
        self, rows: Rows, tokenizer, prompts: Prompts, args, rank: int = 0, world: int = 1
    ):
        self.rows = rows
        self.tokenizer = tokenizer
        self.prompts = prompts
        self.args = args
        self.rank = rank
        self.world = world
        self.n_examples = len(rows)
        shortest = len(prompts.prefix) + 1 + max(len(prompts.SELF), len(prompts.NEXT))
        if min(args.query_length, args.passage_length) < shortest:
            raise BadInput(f"--query-length and --passage-length: {shortest} tokens at least")

    def read_pair(self, i: int) -> tuple[str, list[str], list[str]]:
        """A row {"query": "..", "pos": ["..", ..], "neg": ["..", ..]}; "neg" may be missing."""
        row, place = self.rows[i], self.rows.place(i)
        if "query" not in row or "pos" not in row:
            raise BadInput(f'{place}: needs "query" and "pos"; its keys are {sorted(row)[:5]}')
        query = check_text(row["query"], '"query"', place)
        lists = []
        for key in ("pos", "neg"):
            texts = row.get(key, [])
            if not isinstance(texts, list):
                raise BadInput(f'{place}: "{key}" should be a list of texts')
            lists.append([check_text(text, f'an item of "{key}"', place) for text in texts])
        positives, negatives = lists
        if not positives:
            raise BadInput(f'{place}: "pos" is empty')
        if not all(text.strip() for text in [query, *positives, *negatives]):
            raise BadInput(f"{place}: holds an empty text")
        return query, positives, negatives

    def draw(self, step: int) -> tuple[list[str], list[str], np.ndarray]:
        """-> Q queries, P passages, excluded (Q, P): what answers a query is not its negative."""
        args = self.args
        queries, own, hard = [], [], []
        true_passages: dict[str, set[str]] = {}  # of all rows of the batch with this query
        for epoch, i in global_batch(step, args.batch_size, args.seed, self.n_examples):
            query, positives, negatives = self.read_pair(i)
            random = np.random.default_rng([args.seed, epoch, i])
            queries.append(query)
            own.append(positives[random.integers(len(positives))])
            if negatives:
                # np.resize repeats them if they are too few.
                chosen = np.resize(random.permutation(len(negatives)), args.group_size - 1)
                hard += [negatives[j] for j in chosen]
            true_passages.setdefault(query, set()).update(positives)
        passages = own + hard
        excluded = np.array(
            [[passage in true_passages[query] for passage in passages] for query in queries]
        )
        np.fill_diagonal(excluded, False)
        if ((~excluded).sum(axis=1) == 1).all():
            raise BadInput(
                f'step {step}: no query has a negative: raise --batch-size, or give rows "neg"'
            )
        return queries, passages, excluded

    def __getitem__(self, step: int) -> dict[str, Any]:
        args = self.args
        queries, passages, excluded = self.draw(step)
        texts = queries + passages
        # Grouped before anything is tokenised, by lengths in characters: about five to a token.
        # What is beyond the cut does not count.
        limit = 5 * max(args.query_length, args.passage_length)
        lengths = [min(len(text), limit) for text in texts]
        count = micro_batch_count(len(texts), args.micro_batch_size, self.world)
        groups = split_by_length(lengths, count * self.world)
        micro_batches = []
        for group in groups[self.rank :: self.world]:  # so ranks have groups of like length too
            encoded = self.tokenizer(
                [texts[slot] for slot in group],
                add_special_tokens=False,
                split_special_tokens=True,
            )
            micro_batch = []
            for slot, ids in zip(group.tolist(), encoded.input_ids, strict=True):
                if slot < len(queries):
                    ids = self.prompts.around(ids, "next", args.query_length)
                else:
                    ids = self.prompts.around(ids, "self", args.passage_length)
                micro_batch.append((slot, ids))
            micro_batches.append(micro_batch)
        return {"micro_batches": micro_batches, "excluded": excluded}

    def yardstick(self, vocab_size: int) -> str:
        _, passages, excluded = self.draw(0)
        level = np.log((~excluded).sum(axis=1)).mean()
        return f"{level:.3f} knows nothing: all of ~{len(passages)} passages are equally likely"


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
    tokens = re.findall(r"<[^<>\s]+>", SELF_PROMPT + NEXT_PROMPT)
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


def pick_device() -> torch.device:
    if not torch.cuda.is_available():
        if Path("/dev/nvidia0").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
            print(
                f"This runs on the CPU: there is a GPU, but PyTorch {torch.__version__} cannot use "
                "it. Its driver is too old for it, or this PyTorch was built without CUDA.",
                file=sys.stderr,
            )
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    # cuDNN's attention plans anew for each new (B, L), seconds each, and its backward is reported
    # to give NaN under a mask (pytorch issue 196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device("cuda", torch.cuda.current_device())


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The type to compute in: by default bfloat16 on CUDA, float32 on CPU."""
    if name is None:
        name = "bfloat16" if device.type == "cuda" else "float32"
    if name == "bfloat16" and device.type == "cuda" and torch.cuda.get_device_capability()[0] < 8:
        raise BadInput("--dtype bfloat16: this GPU is older than Ampere: take --dtype float32")
    return getattr(torch, name)


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Starts torch.distributed, under torchrun or without it.

    In here a mistake of the user ends the process with one sentence and exit code 1; a mistake of
    ours keeps its traceback.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = datetime.timedelta(minutes=30)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    try:
        yield
    except (BadInput, OSError, FloatingPointError) as error:
        script = Path(sys.argv[0]).name
        rank = f" (rank {dist.get_rank()})" if dist.get_world_size() > 1 else ""
        print(f"{script}{rank}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    finally:
        # After an error the other ranks may be in the middle of a step, and to leave the group
        # would wait for them.
        failed = sys.exc_info()[0] is not None  # the SystemExit of above included
        several = dist.get_world_size() > 1
        if not failed or not several:
            dist.destroy_process_group()
    if several:
        # The work is done, and the interpreter is left here. Its own way out destroys threads of
        # gloo, which aborts some two processes in a hundred ("terminate called without an active
        # exception", PyTorch 2.13): torchrun would report a finished run as failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def sum_over_ranks(values: Sequence[float]) -> list[float]:
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def from_rank_0(value: Any) -> Any:
    """The `value` of rank 0: ranks that look at a shared disk by themselves can disagree."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def shard(model: Llara, device: torch.device, dtype: torch.dtype) -> None:
    """FSDP2 on any number of ranks, one included.

    `fully_shard` moves tensors to the device; those on the meta device have no numbers yet. Each
    decoder layer is gathered by itself. What is in no layer stays in the root's group: the
    embeddings and the head, which can be one and the same tensor.

    Weights, gradients and moments are float32. bfloat16 has the range of float32, so the loss needs
    no scaling; gradients are summed in float32.
    """
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    if dtype == torch.float32:
        policy = MixedPrecisionPolicy()
    layer_names = model.lm._no_split_modules or ()
    for module in list(model.modules()):
        if type(module).__name__ in layer_names:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, "embed")
    register_fsdp_forward_method(model, "top_tokens")


def load_on_rank_0(name: str | Path) -> tuple[nn.Module, Any]:
    """`load` on rank 0; on the others the same model without weights, on the meta device.

    So a node holds the weights once, 27 GB for 7B, and not once a rank. `fill_from_rank_0` follows.
    """
    lm, tokenizer, config = None, None, None
    if dist.get_rank() == 0:
        lm, tokenizer = load(name)
        config = lm.config
    config, tokenizer = from_rank_0((config, tokenizer))
    if lm is not None:
        return lm, tokenizer
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa"
        )
    return lm, tokenizer


def fill_from_rank_0(model: Llara, weights: dict[str, Tensor], device: torch.device) -> None:
    """Gives each rank its shards. model: sharded; weights: all of them on rank 0, {} on others.

    The order, in `make_model`: `load_on_rank_0`; rank 0's state_dict, while it is whole; `shard`;
    this.
    """
    if dist.get_rank() > 0:
        model.to_empty(device=device)
    options = dcp_state.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    dcp_state.set_model_state_dict(model, weights, options=options)
    for buffer in model.buffers():  # such as the frequencies of RoPE, which no file holds
        dist.broadcast(buffer, src=0)


def checkpoints(output: Path) -> list[Path]:
    return sorted(output.glob("checkpoint-*"))


def check_room(folder: Path, model: nn.Module, numbers_per_weight: int) -> None:
    """BadInput if the disk is too full for this many float32 numbers a weight.

    PyTorch's own error in the middle of a file does not say that the disk is full.
    """
    needed = 4 * numbers_per_weight * sum(weight.numel() for weight in model.parameters())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise BadInput(
            f"{folder}: saving takes {needed / 1e9:.3f} GB, and {free / 1e9:.3f} are free: nothing "
            "was written; make room, then --resume"
        )


def save_checkpoint(model: Llara, optimizer, output: Path, run: dict[str, Any]) -> None:
    """Writes output/checkpoint-STEP: aside, renamed when whole; then older ones are deleted."""
    old = checkpoints(output)
    aside = output / "unfinished"
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed while saving
        check_room(output, model, 3)  # the weight, and AdamW's two moments
    dist.barrier()
    model_state, optimizer_state = dcp_state.get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=aside)
    if dist.get_rank() == 0:
        (aside / "run.json").write_text(json.dumps(run, indent=1))
        aside.rename(output / f"checkpoint-{run['step']:08d}")
        for folder in old:
            shutil.rmtree(folder)
    dist.barrier()


def load_checkpoint(model: Llara, optimizer, folder: Path) -> None:
    """Restores what any number of ranks wrote."""
    model_state, optimizer_state = dcp_state.get_state_dict(model, optimizer)
    state = {"model": model_state, "optimizer": optimizer_state}
    dcp.load(state, checkpoint_id=folder)
    dcp_state.set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )


# ---- one step ------------------------------------------------------------------------------------


def adaptation_step(
    model: Llara,
    micro_batches: list[list[Example]],
    weights: Sequence[float],
    device: torch.device,
    train: bool = True,
) -> tuple[Tensor, Tensor]:
    """Forward, and backward if `train`: leaves the gradient of the global batch in the model.

    -> losses (3,) and counts (3,) of the global batch. A task of weight 0 is not computed.
    """
    tasks = [task for task, weight in zip(TASKS, weights, strict=True) if weight != 0]
    batches = [collate(examples, model.prompts) for examples in micro_batches]
    # A mean of the micro-batches' means would weigh tokens and rows unequally: each micro-batch is
    # divided by the counts of the whole global batch instead.
    own_counts = torch.stack([batch["counts"] for batch in batches]).sum(dim=0)  # (3,)
    # Integers, as FSDP casts what it hands to forward: floats would be rounded to bfloat16.
    counts = torch.tensor(sum_over_ranks(own_counts.tolist()), dtype=torch.long)  # (3,)
    losses = torch.zeros(len(TASKS), device=device)
    for batch in batches:
        batch["counts"] = counts
        on_device = {key: value.to(device) for key, value in batch.items()}
        terms = model(on_device, tasks)  # (3,)
        if train:
            # FSDP takes the mean of the ranks' gradients; the sum is due.
            (total_loss(terms, weights) * dist.get_world_size()).backward()
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


def fine_tuning_step(
    model: Llara,
    item: dict[str, Any],
    temperature: float,
    device: torch.device,
    seed: int,
    train: bool,
) -> tuple[float, float]:
    """`contrastive_step` on an item of `FineTuning`."""
    micro_batches = []
    for micro_batch in item["micro_batches"]:
        slots = torch.tensor([slot for slot, _ in micro_batch], device=device)  # (b,)
        input_ids = pad([ids for _, ids in micro_batch]).to(device)  # (b, L)
        lengths = torch.tensor([len(ids) for _, ids in micro_batch], device=device)  # (b,)
        micro_batches.append((slots, (input_ids, lengths)))
    excluded = torch.from_numpy(item["excluded"]).to(device)  # (Q, P)
    return contrastive_step(model.embed, micro_batches, excluded, temperature, seed, train)


def run_step(
    model: Llara, item: Any, args, device: torch.device, step: int, train: bool = True
) -> tuple[dict[str, float], dict[str, float]]:
    """A step of either stage -> two dicts with the same keys: its losses, and how many items each
    is a mean over: tokens for AR, rows for EBAE and EBAR, one step for the others.

    `held_out_losses` needs the second to take a mean over several batches.
    """
    sequence = np.random.SeedSequence([args.seed, step, dist.get_rank()])
    # For dropout: no two forwards alike. 62 bits: `contrastive_step` adds the number of a
    # micro-batch, and the sum must fit 63.
    seed = int(sequence.generate_state(1, np.uint64)[0] >> 2)
    if args.stage == "finetune":
        loss, accuracy = fine_tuning_step(model, item, args.temperature, device, seed, train)
        return {"loss": loss, "accuracy": accuracy}, {"loss": 1.0, "accuracy": 1.0}
    weights = [getattr(args, f"{task.lower()}_weight") for task in TASKS]
    torch.manual_seed(seed)
    losses, counts = adaptation_step(model, item, weights, device, train)
    named = {"loss": total_loss(losses, weights).item()}
    step_counts = {"loss": 1.0}
    for task, weight, loss, count in zip(TASKS, weights, losses, counts, strict=True):
        if weight != 0 and count > 0:  # a batch without any target says nothing of a task
            named[task] = loss.item()
            step_counts[task] = count.item()
    return named, step_counts


@torch.no_grad()
def held_out_losses(model: Llara, dataset, args, device: torch.device) -> dict[str, float]:
    """The same losses on held-out rows, always the same ones: as many batches as fit in
    VALID_EXAMPLES examples, and at least one (rows that are too few for it repeat)."""
    steps = max(1, min(dataset.n_examples, VALID_EXAMPLES) // args.batch_size)
    sums: dict[str, float] = {}
    totals: dict[str, float] = {}
    model.eval()
    for step in range(steps):
        losses, counts = run_step(model, dataset[step], args, device, step, train=False)
        for name, loss in losses.items():
            sums[name] = sums.get(name, 0.0) + loss * counts[name]
            totals[name] = totals.get(name, 0.0) + counts[name]
    model.train()
    return {f"valid_{name}": sums[name] / max(1.0, totals[name]) for name in sums}


# ---- training ------------------------------------------------------------------------------------

ADAM_BETAS = (0.9, 0.999)
WEIGHT_DECAY = 0.0
CLIP_NORM = 1.0
VALID_EXAMPLES = 256  # see `held_out_losses`: each costs a forward
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}


def get_lr(step: int, steps: int, peak: float, warmup: float) -> float:
    """The rate of a step: linear up over the share `warmup` of the steps, then linear down.

    It would be 0 at step -1, has its peak at step warmup_steps - 1, and would be 0 again at step
    `steps`, the first that is not run.
    """
    warmup_steps = max(1.0, warmup * steps)
    if step + 1 < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (steps - step) / (steps - warmup_steps + 1)


def text_sizes(item: Any, prompts: Prompts) -> list[float]:
    """Of this rank's item: its tokens; the sum over sequences of length squared, which is what
    attention costs; its tokens and pads."""
    if isinstance(item, dict):  # of `FineTuning`
        groups = [[len(ids) for _, ids in micro_batch] for micro_batch in item["micro_batches"]]
    else:
        extra = len(prompts.prefix) + len(prompts.SELF) + len(prompts.NEXT)
        groups = [[len(passage) + extra for passage, *_ in micro_batch] for micro_batch in item]
    tokens = sum(sum(lengths) for lengths in groups)
    squares = sum(length**2 for lengths in groups for length in lengths)
    padded = sum(max(lengths) * len(lengths) for lengths in groups)
    return [tokens, squares, padded]


def peak_memory() -> float:
    """In GiB: of the device on CUDA, of this process on CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def is_finished(output: Path) -> bool:
    """`finish` writes run.json when the model is whole, and then removes the checkpoints."""
    return (output / "run.json").exists() and not checkpoints(output)


def claim_output(args, output: Path) -> tuple[Path | None, str]:
    """-> the checkpoint to go on from, if any; what is wrong with the folder, if anything.

    During a run the folder holds log.jsonl; checkpoint-STEP/, with the run's settings and its step
    in run.json; "unfinished" while a checkpoint or the model is written; by default base/ and
    python-docs.jsonl, the small model before training and its text. At the end it holds the model,
    and run.json, which marks it as finished. Without --resume any checkpoint or log is a reason to
    refuse. Left-overs of a run that failed before its first step do not block the next one.
    """
    found = checkpoints(output)
    if args.resume and found:
        return found[-1], ""
    if output.exists() and not output.is_dir():
        return None, f"--output {output}: is a file"
    # Left by a run that did not get far: they do not block this one, which writes them anew.
    harmless = {"base", "python-docs.jsonl", "unfinished"}
    if args.resume:
        harmless.add("log.jsonl")  # killed before its first checkpoint: start again
    for path in output.iterdir() if output.exists() else ():
        empty_log = path.name == "log.jsonl" and path.stat().st_size == 0
        if path.name not in harmless and not empty_log:
            return None, (
                f"--output {output}: holds {path.name}, and nothing is overwritten: --resume goes "
                "on with a run; else name another folder, or delete this one"
            )
    output.mkdir(parents=True, exist_ok=True)
    return None, ""


def run_settings(args, paths: Sequence[Path]) -> dict[str, Any]:
    """The settings with which alone a run may be resumed; those in `free` may change."""
    free = ("output", "resume", "save_every", "workers", "micro_batch_size", "valid", "explain")
    free += ("gradient_checkpointing",)
    settings = {name: value for name, value in vars(args).items() if name not in free}
    settings["data"] = {str(path): path.stat().st_size for path in paths}  # in bytes
    settings["prompts"] = [PREFIX, SELF_PROMPT, NEXT_PROMPT]
    return settings


def prepare(args, output: Path) -> tuple[nn.Module, Any, Rows]:
    """The language model, its tokenizer and the rows, after making the default ones if need be."""
    rank = dist.get_rank()
    docs = output / "python-docs.jsonl"
    if not args.data and rank == 0:
        write_python_docs(docs)
    dist.barrier()
    rows = Rows(args.data or [docs])
    base = output / "base"
    if not args.model and rank == 0:
        torch.manual_seed(args.seed)
        every = len(rows) // 2000 + 1
        make_small_model((read_text(rows, i)[:5000] for i in range(0, len(rows), every)), base)
    dist.barrier()
    lm, tokenizer = load_on_rank_0(args.model or base)
    return lm, tokenizer, rows


def refuse_other_settings(now: dict[str, Any], before: dict[str, Any], folder: Path) -> None:
    """BadInput names a setting that is not what it was in the run that `folder` holds."""
    for name in now.keys() | before.keys():
        if now.get(name) != before.get(name):
            setting = f"--{name.replace('_', '-')}"
            if name == "prompts":
                setting = "PREFIX, SELF_PROMPT, NEXT_PROMPT"
            raise BadInput(
                f"{setting} is {now.get(name)}, but it was {before.get(name)} in {folder}: give "
                "the same, or name another --output"
            )


def where_to_begin(checkpoint: Path | None, settings: dict[str, Any]) -> int:
    """The step to go on with. BadInput if the run of the checkpoint had other settings."""
    if checkpoint is None:
        return 0
    before = json.loads((checkpoint / "run.json").read_text())
    refuse_other_settings(settings, before["settings"], checkpoint)
    return before["step"]


def report_finished(args, output: Path) -> None:
    """Says so: no mistake, as a script can give its command until it succeeds.

    BadInput if the finished run had other settings than those that are asked for now.
    """
    before = json.loads((output / "run.json").read_text())["settings"]
    data = args.data or [output / "python-docs.jsonl"]
    settings = run_settings(args, [file for path in data for file in data_files(path)])
    for name in ("steps", "dtype"):  # worked out as a run begins, unless they are given
        if settings[name] is None:
            settings[name] = before[name]
    refuse_other_settings(settings, before, output)
    if dist.get_rank() == 0:
        print(f"--output {output}: that run is finished, there is nothing to resume")


def make_datasets(args, rows: Rows, tokenizer, prompts: Prompts):
    """The rows to train on, and those held out (or None), as this rank sees them."""
    kind = FineTuning if args.stage == "finetune" else Adaptation
    ranks = (dist.get_rank(), dist.get_world_size())
    dataset = kind(rows, tokenizer, prompts, args, *ranks)
    if not args.valid:
        return dataset, None
    return dataset, kind(Rows(args.valid), tokenizer, prompts, args, *ranks)


def check_run(args, lm: nn.Module) -> None:
    """BadInput if lengths or batch do not fit the model or the ranks."""
    name = args.model or "the small model"
    for flag in ("max_length", "query_length", "passage_length"):
        length = getattr(args, flag)
        if length is not None:
            check_length(name, lm.config, length, f"--{flag.replace('_', '-')}")
    if args.stage == "adapt":
        check_attention_window(name, lm.config, args.max_length)
    world = dist.get_world_size()
    if args.batch_size < world:
        raise BadInput(f"--batch-size {args.batch_size} leaves some of {world} ranks without work")


def start_workers(dataset, args, first_step: int) -> Iterator[Any]:
    """The items of the steps that are left, prepared ahead of the device."""
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=None,  # an item is a whole step already
        sampler=range(first_step, args.steps),
        num_workers=args.workers,
        collate_fn=lambda item: item,
        multiprocessing_context="fork" if args.workers else None,  # they share the index
    )
    return iter(loader)


def enable_checkpointing(lm: nn.Module) -> None:
    """Activations of a layer are computed again in the backward pass, and not kept."""
    # Renamed in transformers 5.23; the old name goes in 6.
    enable = getattr(lm, "activation_checkpointing_enable", None)
    enable = enable or lm.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def make_model(args, lm: nn.Module, prompts: Prompts, device: torch.device, dtype: torch.dtype):
    """The model, sharded over the ranks, and its optimizer."""
    if args.gradient_checkpointing:
        enable_checkpointing(lm)
    if args.stage == "finetune" and not lm.config.tie_word_embeddings:
        lm.get_output_embeddings().requires_grad_(False)  # it takes no part
    model = Llara(lm, prompts).train()
    if dist.get_world_size() == 1:
        shard(model, device, dtype)  # has its weights already
    else:
        weights = model.state_dict() if dist.get_rank() == 0 else {}
        shard(model, device, dtype)
        fill_from_rank_0(model, weights, device)
    optimizer = torch.optim.AdamW(
        model.parameters(), args.lr, betas=ADAM_BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    return model, optimizer


def update(model: Llara, optimizer, item: Any, args, device: torch.device, step: int):
    """One step: the gradient of the global batch, then AdamW. -> what to log of it."""
    lr = get_lr(step, args.steps, args.lr, args.warmup)
    for group in optimizer.param_groups:
        group["lr"] = lr
    losses, _ = run_step(model, item, args, device, step)
    norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM).full_tensor().item()
    if not math.isfinite(losses["loss"] + norm):
        raise BadInput(
            f"step {step}: the loss or its gradient is not finite; nothing was updated. A lower "
            "--lr, with another --output, may help; --resume repeats this step"
        )
    optimizer.step()
    optimizer.zero_grad()
    return {"step": step, **losses, "lr": lr, "grad_norm": norm}


def count_weights_per_token(lm: nn.Module, stage: str) -> int:
    """How many weights multiply each token: all layers, and in adaptation the head.

    The head is counted for all tokens, although it sees none of the prompts' plain words.
    """
    in_head = lm.get_input_embeddings().weight.numel()  # the embeddings have as many
    in_layers = lm.num_parameters() - in_head
    if not lm.config.tie_word_embeddings:
        in_layers -= in_head
    if stage == "adapt":
        return in_layers + in_head
    return in_layers


def cost(model: Llara, item: Any, n_weights: int, seconds: float) -> dict[str, float]:
    """Throughput and memory of a step. n_weights: those that multiply each token."""
    tokens, squares, padded = sum_over_ranks(text_sizes(item, model.prompts))
    row = {"tokens/s": tokens / seconds, "padding": 1 - tokens / padded, "GiB": peak_memory()}
    if torch.cuda.is_available():
        config = model.lm.config
        # 2 FLOPs a weight and token; 2 d L^2 a layer for attention, 4 d L^2 halved by causality.
        attention = 2 * config.num_hidden_layers * config.hidden_size * squares
        forward = 2 * n_weights * tokens + attention
        flops = 3 * forward  # backward takes two; recomputed activations do not count
        for card, peak in PEAK_FLOPS.items():
            if card in torch.cuda.get_device_name():
                row["MFU"] = flops / seconds / peak / dist.get_world_size()
    return row


def train(args) -> None:
    """The whole of a run, of either stage. Every rank runs it."""
    rank = dist.get_rank()
    output = Path(args.output)
    device = pick_device()
    dtype = choose_dtype(args.dtype, device)
    args.dtype = str(dtype).removeprefix("torch.")
    checkpoint, complaint = from_rank_0(claim_output(args, output) if rank == 0 else None)
    if complaint:
        raise BadInput(complaint)

    # The model as it was, the data, and the first step.
    lm, tokenizer, rows = prepare(args, output)
    check_run(args, lm)
    prompts = make_prompts(tokenizer)
    dataset, held_out = make_datasets(args, rows, tokenizer, prompts)
    if args.steps is None:
        args.steps = math.ceil(dataset.n_examples / args.batch_size)  # one epoch
    settings = run_settings(args, rows.paths)
    first_step = where_to_begin(checkpoint, settings)
    items = start_workers(dataset, args, first_step)  # forked before a tensor is on a GPU
    if rank == 0:
        print(
            f"model      {args.model or 'from scratch'}: {lm.num_parameters():,} parameters\n"
            f"data       {len(rows):,} rows in {len(rows.paths)} files, "
            f"{dataset.n_examples:,} examples\n"
            f"run        {args.steps} steps of {args.batch_size} examples, "
            f"{args.steps * args.batch_size / dataset.n_examples:.2f} epochs\n"
            f"device     {dist.get_world_size()} x {device.type}, computes in {args.dtype}\n"
            f"yardstick  {dataset.yardstick(lm.config.vocab_size)}",
            flush=True,
        )

    # The model.
    n_weights = count_weights_per_token(lm, args.stage)
    model, optimizer = make_model(args, lm, prompts, device, dtype)
    if checkpoint:
        load_checkpoint(model, optimizer, checkpoint)

    # The loop: a step, a line in the log, from time to time a checkpoint.
    log = Log(output / "log.jsonl", first_step) if rank == 0 else None
    with tqdm(initial=first_step, total=args.steps, unit="step", disable=rank > 0) as bar:
        started = time.perf_counter()
        for step in range(first_step, args.steps):
            item = next(items)
            row = update(model, optimizer, item, args, device, step)
            row.update(cost(model, item, n_weights, time.perf_counter() - started))
            is_last = step + 1 == args.steps
            is_saved = (step + 1) % args.save_every == 0
            if held_out and (is_saved or is_last):
                row.update(held_out_losses(model, held_out, args, device))
            if log:
                log.write(row)
            shown = [key for key in row if key not in ("step", "padding", "GiB")]
            bar.set_postfix_str(" ".join(f"{key} {row[key]:.4g}" for key in shown))
            bar.update()
            if is_saved and not is_last:
                save_checkpoint(model, optimizer, output, {"step": step + 1, "settings": settings})
            started = time.perf_counter()
    finish(model, tokenizer, dataset, args, settings)


class Log:
    """log.jsonl: a line a step. What a killed run wrote after its last checkpoint is cut off."""

    def __init__(self, path: Path, first_step: int):
        lines = path.read_bytes().splitlines(keepends=True)[:first_step] if path.exists() else []
        path.write_bytes(b"".join(lines))
        self.file = open(path, "a", buffering=1)  # noqa: SIM115 (open for the whole run)

    def write(self, row: dict[str, float]) -> None:
        self.file.write(json.dumps(row) + "\n")


def finish(model: Llara, tokenizer, dataset, args, settings: dict[str, Any]) -> None:
    """Saves the model, removes the checkpoints, and shows what an embedding says."""
    output = Path(args.output)
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = dcp_state.get_model_state_dict(model.lm, options=options)
    if dist.get_rank() == 0:
        check_room(output, model, 1)
        if model.lm.config.tie_word_embeddings:
            for name in model.lm._tied_weights_keys or ():
                state.pop(name, None)  # or the embeddings are written twice
        aside = output / "unfinished"
        shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed while saving
        save(model.lm, tokenizer, aside, model_card(args, model.lm, model.prompts), state)
        (aside / "run.json").write_text(json.dumps({"settings": settings}, indent=1))
        # Last of all run.json, which marks the run as finished.
        for path in sorted(aside.iterdir(), key=lambda path: path.name == "run.json"):
            path.rename(output / path.name)
        aside.rmdir()
        for folder in checkpoints(output):
            shutil.rmtree(folder)
    if args.stage == "adapt":
        numbers = [dataset.n_examples // 3, 2 * dataset.n_examples // 3]
        model.eval()
        for passage, *_ in dataset.read_examples(numbers):
            text = tokenizer.decode(passage)
            said = explain(model, tokenizer, text, max_length=args.max_length)
            if dist.get_rank() == 0:
                print_explanation(text, said)
    if dist.get_rank() == 0:
        print(f"saved to {output}; {output / 'README.md'} says how to embed with it")


def print_explanation(text: str, said: dict[str, list[str]]) -> None:
    print(f"\n{' '.join(text.split())[:300]}")
    for state, predicted in said.items():
        print(f"  {state + ':':11} {' '.join(predicted)}")


MODEL_CARD = """---
library_name: transformers
tags: [llara, dense-retrieval]
---
A text encoder made with LLaRA ([arXiv 2312.15503](https://arxiv.org/abs/2312.15503)) from {base}:
{steps} steps of `--stage {stage}`, {batch_size} examples each. Only this way of embedding is right:
prefix, text, prompt; the mean of the last {pooled} states.

```python
import torch
from transformers import AutoModel, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModel.from_pretrained(".")
PREFIX = {prefix}
SELF = {self_ids}
NEXT = {next_ids}
def embed(text, prompt):  # of this model: SELF for passages, {query_prompt} for queries
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    ids = ids[:{max_length} - len(PREFIX + prompt)]
    states = model(torch.tensor([PREFIX + ids + prompt])).last_hidden_state[0, -{pooled}:]
    return torch.nn.functional.normalize(states.float().mean(0), dim=-1)
print(embed("A llama is a camelid.", SELF) @ embed("What is a llama?", {query_prompt}))
```
"""


def model_card(args, lm: nn.Module, prompts: Prompts) -> str:
    positions = getattr(lm.config, "max_position_embeddings", None)
    return MODEL_CARD.format(
        max_length=min(512, positions or 512),  # as `encode` has it
        base=args.model or "random weights",
        steps=args.steps,
        stage=args.stage,
        batch_size=args.batch_size,
        pooled=prompts.pooled,
        query_prompt="NEXT" if args.stage == "finetune" else "SELF",
        prefix=prompts.prefix,
        self_ids=prompts.SELF,
        next_ids=prompts.NEXT,
    )


# ---- command line --------------------------------------------------------------------------------

COMMON = {"warmup": 0.1, "save_every": 500, "workers": 1, "seed": 0}
SMALL_MODEL = COMMON | {
    "steps": 600,
    "batch_size": 32,
    "micro_batch_size": 8,
    "max_length": 96,
    "lr": 5e-3,
}
PAPER = COMMON | {
    "steps": 10_000,
    "batch_size": 256,
    "micro_batch_size": 8,
    "max_length": 1024,
    "lr": 1e-5,
}
for task in TASKS:
    SMALL_MODEL[f"{task.lower()}_weight"] = SMALL_WEIGHTS[task]
    PAPER[f"{task.lower()}_weight"] = PAPER_WEIGHTS[task]
FINE_TUNING = COMMON | {
    "steps": None,  # one epoch
    "batch_size": 128,
    "micro_batch_size": 32,
    "lr": 1e-5,
    "query_length": 64,
    "passage_length": 160,
    "group_size": 16,
    "temperature": 0.01,
}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """What was not given is filled from SMALL_MODEL, PAPER (with --model) or FINE_TUNING."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog=f"Defaults without --model: {SMALL_MODEL}. With --model: {PAPER}. "
        f"With --stage finetune: {FINE_TUNING}.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--stage", choices=["adapt", "finetune"], default="adapt", help="default: adapt")
    add("--data", nargs="+", help=".jsonl files or folders; default: Python's documentation")
    add("--valid", nargs="+", help="held-out files, for valid_.. losses at each --save-every")
    add("--model", help="folder or hub name; default: a small Llama from scratch")
    add("--output", default="out", help="folder for log, checkpoints and model; default: out")
    add("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    add(
        "--explain",
        nargs="+",
        metavar="TEXT",
        help="print what --model's embeddings say; no training",
    )
    # What the run does.
    add("--steps", type=int, help="updates; to fine-tune, one epoch by default")
    add("--batch-size", type=int, help="examples, or queries, a step over all ranks")
    add("--lr", type=float, help="peak of the learning rate")
    add("--warmup", type=float, help="share of the steps; then the rate falls linearly to 0")
    add("--seed", type=int, help="of the order of the data, and of a model from scratch")
    # Adaptation.
    add("--max-length", type=int, help="tokens of a joint sequence, prompts included")
    for task in TASKS:
        add(f"--{task.lower()}-weight", type=float, help=f"weight of {task}; 0 turns it off")
    # Fine-tuning.
    add("--query-length", type=int, help="tokens of a query, prompt included")
    add("--passage-length", type=int, help="tokens of a passage, prompt included")
    add("--group-size", type=int, help="passages a query: one positive, the rest negatives")
    add("--temperature", type=float, help="of the softmax over the passages")
    # What it costs.
    add(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="to compute in; CUDA: bfloat16, CPU: float32",
    )
    add("--micro-batch-size", type=int, help="sequences in a forward: memory, not results")
    add("--gradient-checkpointing", action="store_true", help="less memory, a third more time")
    add("--save-every", type=int, help="steps between checkpoints")
    add("--workers", type=int, help="tokenising processes a rank")
    args = parser.parse_args(argv)

    defaults = PAPER if args.model else SMALL_MODEL
    if args.stage == "finetune":
        defaults = FINE_TUNING
    # All names of settings are in one of these two; those that this stage lacks must not be given.
    for name in (SMALL_MODEL | FINE_TUNING).keys() - defaults.keys():
        if getattr(args, name) is not None:
            parser.error(f"--{name.replace('_', '-')} means nothing with --stage {args.stage}")
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    check_arguments(parser, args)
    return args


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    smallest = {
        "batch_size": 1,
        "micro_batch_size": 1,
        "group_size": 1,
        "save_every": 1,
        "steps": 1,
    }
    for name, least in (smallest | {"workers": 0, "seed": 0}).items():
        value = getattr(args, name, None)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} {value}: {least} at least")
    if args.stage == "finetune" and not (args.model and args.data) and not args.explain:
        parser.error("--stage finetune needs --model, what adaptation has saved, and --data")
    if args.explain and not args.model:
        parser.error("--explain needs --model")
    weights = [getattr(args, f"{task.lower()}_weight") for task in TASKS]
    if args.stage == "adapt" and not any(weights):
        parser.error("all weights are 0: there is nothing to learn")
    if args.stage == "finetune" and not args.temperature > 0:
        parser.error(f"--temperature {args.temperature}: must be above 0")


def main() -> None:
    args = parse_arguments()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would not survive a fork
    transformers_logging.disable_progress_bar()
    with process_group():
        if args.explain:
            lm, tokenizer = load(args.model)
            model = Llara(lm, make_prompts(tokenizer)).eval()
            for text in args.explain if dist.get_rank() == 0 else ():
                print_explanation(text, explain(model, tokenizer, text))
        elif args.resume and from_rank_0(is_finished(Path(args.output))):
            report_finished(args, Path(args.output))
        else:
            train(args)


if __name__ == "__main__":
    main()
