# SPDX-License-Identifier: MIT
"""LLaRA in one file: a causal language model becomes a text encoder for dense retrieval (arXiv 2312.15503).
A passage is followed by two prompts, in one sequence, and the model is run once:

    " passage ", summarize the above passage within eight words: <s1>..<s8> ", predict the following ..: <s9>..<s16>
    prefix    `------------------------ SELF ----------------------------'  `------------------ NEXT --------------'

    may look at ->   prefix+passage   SELF     NEXT       EBAE: the hidden states at <s1>..<s8> predict the set of
    prefix+passage       causal                           tokens of the passage itself.
    SELF                  yes        causal               EBAR: those at <s9>..<s16> predict the set of tokens of
    NEXT                  yes          no     causal      the passage that follows it.

NEXT never sees SELF and its positions start where SELF's start, so one pass equals two. The embedding of a text is the
mean of the last hidden states at its eight tokens, L2-normalised; passages use SELF, queries use NEXT. Two stages:

    python llara.py                                            # a tiny model on Python's own documentation, in minutes
    torchrun llara.py --data wiki.jsonl                        # the same on your text
    torchrun --nproc-per-node 8 llara.py --data wiki.jsonl --model meta-llama/Llama-2-7b-hf --gradient-checkpointing
    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 llara.py ...  # on both nodes
    torchrun llara.py --stage finetune --model out --data pairs.jsonl --output retriever  # then: contrastive learning
"""
import argparse, ast, contextlib, fcntl, functools, gzip, json, math, os, re, resource, shutil, signal, sys
import sysconfig, tempfile, time
from collections import namedtuple
from pathlib import Path
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dcp_state
import torch.nn.functional as F
from safetensors import SafetensorError
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from tqdm import tqdm
from transformers import (AddedToken, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM,
                          PreTrainedTokenizerFast, logging)

class BadInput(Exception):
    """A mistake in what the user gave: main() shows it as one sentence, without a traceback."""
    def __str__(self):
        return super().__str__().split("BadInput: ")[-1].strip()  # less the traceback of a DataLoader's worker

# ---- prompts ---------------------------------------------------------------------------------------------------------
SPECIAL = [f"<s{i}>" for i in range(1, 17)]
PREFIX = '"'
SELF = '", summarize the above passage within eight words: ' + "".join(SPECIAL[:8])
NEXT = '", predict the following passage within eight words: ' + "".join(SPECIAL[8:])
Prompts = namedtuple("Prompts", "prefix SELF NEXT")  # lists of token ids; SELF and NEXT end with their eight tokens
PLAIN = dict(add_special_tokens=False, split_special_tokens=True)  # "<s1>" in a text must not forge a prompt

def make_prompts(tokenizer):
    """The prompts in this tokenizer's ids: 2, 19 and 18 of them for Llama-2. BadInput if an <sN> is not one token."""
    prompts = Prompts(tokenizer(PREFIX).input_ids, *tokenizer([SELF, NEXT], add_special_tokens=False).input_ids)
    if prompts.SELF[-8:] + prompts.NEXT[-8:] != [tokenizer.get_vocab().get(token) for token in SPECIAL]:
        raise BadInput("<s1>..<s16> are not one token each in this tokenizer; llara.load adds them to a causal LM")
    return prompts

def sequences(tokenizer, texts, prompts, kind, max_length):
    """Texts -> lists of ids: prefix, text, and prompt `kind`, "SELF" or "NEXT"; of at most max_length tokens in all."""
    suffix = getattr(prompts, kind)
    room = max_length - len(prompts.prefix) - len(suffix)
    if room < 1:
        raise BadInput(f"a length of {max_length} tokens leaves no room for text: the prompt takes {max_length - room}")
    return [[*prompts.prefix, *ids, *suffix]
            for ids in tokenizer(texts, **PLAIN, truncation=True, max_length=room).input_ids]

# ---- data: lines -> passages -> examples -> steps --------------------------------------------------------------------
# The English stop words of NLTK, as in the released code; those with an apostrophe cannot occur once [\W_]+ is gone.
STOP_WORDS = frozenset("""i me my myself we our ours ourselves you your yours yourself yourselves he him his himself
she her hers herself it its itself they them their theirs themselves what which who whom this that these those am is
are was were be been being have has had having do does did doing a an the and but if or because as until while of at
by for with about against between into through during before after above below to from up down in out on off over
under again further then once here there when where why how all any both each few more most other some such no nor not
only own same so than too very s t can will just don should now d ll m o re ve y ain aren couldn didn doesn hadn hasn
haven isn ma mightn mustn needn shan shouldn wasn weren won wouldn""".split())
SENTENCE_END = re.compile(r"""[.!?]["')\]]*\s+|[。！？]|\n""")

def content_words(text):
    """A target text less [\\W_]+ and stop words (the released recipe's --remove_stop_words)."""
    return " ".join(w for w in re.sub(r"[\W_]+", " ", text).split() if w.lower() not in STOP_WORDS)

def boundary(text, k, n):
    """Where passage k of n begins: at the sentence end nearest to k/n of the text, else at a space, else just there."""
    at, reach = len(text) * k // n, len(text) // (2 * n) * (0 < k < n)  # half a window: neighbours cannot cross
    ends = [m.end() for m in SENTENCE_END.finditer(text, at - reach, at + reach)]
    return min(ends, key=lambda end: abs(end - at)) if ends else text.find(" ", at, at + reach) + 1 or at

class Lines:
    """Random access to the rows of .jsonl files by byte offset: ~30 bytes a line are held. A .gz has no random access:
    it costs an unpacked copy, in an unnamed file in the folder `scratch`, for as long as the process lives."""
    def __init__(self, paths, scratch=None):
        self.paths = sum([sorted(p.glob("*.jsonl*")) if p.is_dir() else [p] for p in map(Path, paths)], [])
        self.files, self.first, sizes = [], [0], [np.zeros(0, np.int32)]
        for path in self.paths:
            try:
                self.files.append(open(path, "rb"))
                if path.suffix == ".gz":
                    packed, self.files[-1] = gzip.open(self.files[-1]), tempfile.TemporaryFile(dir=scratch)
                    shutil.copyfileobj(packed, self.files[-1])
                    self.files[-1].seek(0)
                # One scan for newlines, no parsing. Of an empty line: minus its length.
                sizes.append(np.fromiter((-len(x) if x.isspace() else len(x) for x in self.files[-1]), np.int32))
            except (OSError, EOFError, gzip.zlib.error) as e:
                raise BadInput(f"{path}: {e}") from None
            self.first.append(self.first[-1] + len(sizes[-1]))  # line of the next file
        self.lengths = np.concatenate(sizes)
        self.starts = np.concatenate([abs(s).cumsum(dtype=np.int64) - abs(s) for s in sizes])
        self.full = np.flatnonzero(self.lengths > 0)
        if not len(self.full):
            raise BadInput(f"{' '.join(map(str, paths))}: no rows in there")

    def place(self, i):  # -> the number of its file, "file:line"
        file = np.searchsorted(self.first, i, side="right") - 1
        return file, f"{self.paths[file]}:{i - self.first[file] + 1}"

    def __getitem__(self, i):
        """-> what parse() makes of line i. BadInput names the line if it is none of what parse() takes."""
        file, name = self.place(i)
        try:
            return self.parse(json.loads(os.pread(self.files[file].fileno(), self.lengths[i], self.starts[i])))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
            raise BadInput(f"{name}: not a row {self.parse.__doc__} ({type(e).__name__}: {e})") from None

class Articles(Lines):
    """The text of adaptation, in one of two formats, the first row's. Whatever the format, it is read as examples."""
    released = None

    def parse(self, row):
        '{"text": ..[, "title": ..]} or else {"input": .., "output_summarize": .., "output_predict": ..} throughout'
        self.released = "input" in row if self.released is None else self.released
        texts = [row[k] for k in (("input", "output_summarize", "output_predict") if self.released else ("text",))]
        "".join([row.get("title") or "", *texts]).encode()  # a lone surrogate fails here
        if not texts[0].strip():
            raise ValueError("an empty text")
        return texts if self.released else ["\n".join(filter(None, [row.get("title"), *texts]))]

    def count(self, tokenizer, room):
        """-> the number of examples, from the bytes of each line alone, so that nothing is tokenised before step 0: an
        article of n windows of `room` tokens has n - 1 pairs of adjacent passages, a released row is one example. How
        many bytes a token takes, 64 lines tell."""
        some = [(self.lengths[i], self[i][0]) for i in self.full[::len(self.full) // 64 + 1]]
        size = sum(length * len(text[:20000]) / len(text) for length, text in some)
        tokens = sum(map(len, tokenizer([text[:20000] for _, text in some], **PLAIN).input_ids))
        window = 0.9 * room * size / max(1, tokens)  # in bytes; 0.9: so that few passages are cut
        counts = self.lengths > 0 if self.released else np.maximum(np.ceil(self.lengths / window) - 1, 0)
        self.ends = counts.cumsum(dtype=np.int64)  # the examples up to and including each line
        return int(self.ends[-1])

    def example(self, i):
        """-> "file:line", passage, the text of which EBAE predicts the tokens, and that of which EBAR does."""
        line = np.searchsorted(self.ends, i, side="right")
        (text, *targets), first = self[line], self.ends[line - 1] if line else 0
        if not targets:
            k, n = int(i - first), int(self.ends[line] - first) + 1
            a, b, c = (boundary(text, j, n) for j in (k, k + 1, k + 2))
            text, targets = text[a:b].strip(), [text[a:b].strip(), text[b:c].strip()]
        return self.place(line)[1], text, *targets

class Pairs(Lines):
    """The rows of fine-tuning."""
    def parse(self, row):
        '{"query": .., "pos": [.., ..], "neg": [.., ..]}, all of them texts that are not empty, and at least one "pos"'
        query, positives, negatives = row["query"], row["pos"] + [], row.get("neg", []) + []  # + []: lists, no strings
        texts = [query, *positives, *negatives]
        "".join(texts).encode()
        if not (positives and all(text.strip() for text in texts)):
            raise ValueError("an empty text")
        return query, positives, negatives

def pad(rows, value=0):
    """Lists of ids -> (B, L) tensor, padded on the right."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], True, value)

def collate(examples, prompts):
    """Triples (passage ids, EBAE target ids, EBAR target ids) -> a batch: input_ids (B, L), joint sequences; lengths
    (B,) of the passages; self_targets (B, U), next_targets (B, U'), padded with -100; counts (3,), by which the losses
    are divided: passage tokens, rows with any EBAE target, rows with any EBAR target."""
    passages, targets, following = zip(*examples)
    return {"input_ids": pad([[*prompts.prefix, *p, *prompts.SELF, *prompts.NEXT] for p in passages]),
            "lengths": torch.tensor([len(p) for p in passages]),
            "self_targets": pad(targets, -100), "next_targets": pad(following, -100),
            "counts": torch.tensor([sum(map(len, passages)), sum(map(bool, targets)), sum(map(bool, following))])}

class Steps(torch.utils.data.Dataset):
    """Item i is what one rank needs for step i of adaptation, prepared in a worker, ahead of the device.
    Its examples are a pure function of seed, epoch and step: a new permutation each epoch, cut into global batches.
    Only *within* a global batch are they sorted by length and cut into micro-batches; the update does not depend on
    that cut, so padding is saved at no cost in randomness. To sort, every rank tokenises the whole global batch (a
    worker's time, not the device's), and so knows the counts of the global batch without asking the others."""
    def __init__(self, lines, tokenizer, prompts, args, rank=0, world=1):
        self.lines, self.tokenizer, self.prompts, self.args = lines, tokenizer, prompts, args
        self.rank, self.world, self.size = rank, world, self.count()
        if args.batch_size < world:
            raise BadInput(f"--batch-size {args.batch_size} leaves some of {world} ranks without work")

    def count(self):
        self.special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        self.room = self.args.max_length - sum(map(len, self.prompts))  # tokens of a passage
        if self.room < 1:
            raise BadInput(f"--max-length {self.args.max_length}: the prompts take {self.args.max_length - self.room}")
        return self.lines.count(self.tokenizer, self.room)

    @functools.lru_cache(2)
    def order(self, epoch):
        return np.random.default_rng([self.args.seed, epoch]).permutation(self.size)

    def __getitem__(self, step):
        places = (divmod(i, self.size) for i in range(step * self.args.batch_size, (step + 1) * self.args.batch_size))
        return self.prepare([(epoch, int(self.order(epoch)[i])) for epoch, i in places])

    def examples(self, indices):
        """-> [("file:line", passage ids, EBAE target ids, EBAR target ids)]. One window cuts passage and targets, so
        that EBAE never asks for what the model did not see. Targets: unique, without stop words and special tokens."""
        window = dict(truncation=True, max_length=self.room, return_offsets_mapping=True)
        names, *columns = zip(*map(self.lines.example, indices))
        cuts, bags = [self.tokenizer(texts, **PLAIN, **window) for texts in columns], []
        for texts, cut in zip(columns[1:], cuts[1:]):
            words = [content_words(text[:at[-1][1]] if at else "") for text, at in zip(texts, cut.offset_mapping)]
            bags.append([sorted(set(ids) - self.special) for ids in self.tokenizer(words, **PLAIN).input_ids])
        return list(zip(names, cuts[0].input_ids, *bags))

    def cut(self, lengths):  # (n,)
        """-> the indices of sequences of these lengths, in micro-batches; as many of them for each rank."""
        order = lengths.argsort(descending=True, stable=True)  # too large a micro-batch shows at once
        return order.tensor_split(self.world * math.ceil(len(order) / (self.args.micro_batch_size * self.world)))

    def prepare(self, places):
        examples = self.examples([i for _, i in places])
        lengths = torch.tensor([sum(map(len, self.prompts)) + len(e[1]) for e in examples])  # (B,)
        parts = [[examples[i] for i in rows] for rows in self.cut(lengths)]
        micros = [collate([e[1:] for e in part], self.prompts) for part in parts]
        return {"micros": micros[self.rank::self.world], "counts": sum(m["counts"] for m in micros), "lengths": lengths,
                "lines": [[e[0] for e in part] for part in parts],
                "padding": 1 - lengths.sum().item() / sum(m["input_ids"].numel() for m in micros)}

    def yardstick(self, vocab_size):
        """The losses of a model that knows nothing, and of one that knows word frequencies only."""
        levels = unigram_levels(self.examples(self.order(0)[:2048]), vocab_size)
        return "ln V {:.3f} knows nothing; unigram level AR {:.3f} EBAE {:.3f} EBAR {:.3f}".format(
            math.log(vocab_size), *levels)

class Groups(Steps):
    """The same for fine-tuning: a query, one of its positives and --group-size - 1 of its negatives, drawn again each
    epoch. Queries and passages alike are cut into micro-batches, for the gradient does not depend on the cut."""
    def count(self):
        return len(self.lines.full)

    def prepare(self, places):
        args, queries, own, hard, known, names = self.args, [], [], [], [], []
        for epoch, i in places:
            line = self.lines.full[i]
            query, positives, negatives = self.lines[line]
            draw = np.random.default_rng([args.seed, epoch, line])
            own.append(positives[draw.integers(len(positives))])
            chosen = np.resize(draw.permutation(len(negatives)), (args.group_size - 1) * (len(negatives) > 0))
            hard += [negatives[j] for j in chosen]
            queries.append(query), known.append(set(positives)), names.append(self.lines.place(line)[1])
        excluded = torch.tensor([[p in texts for p in own + hard] for texts in known]).fill_diagonal_(False)  # (Q, P)
        ids = (sequences(self.tokenizer, queries, self.prompts, "NEXT", args.query_length)
               + sequences(self.tokenizer, own + hard, self.prompts, "SELF", args.passage_length))
        lengths = torch.tensor([*map(len, ids)])                                     # (Q + P,)
        micros = [(rows, pad([ids[i] for i in rows]), lengths[rows]) for rows in self.cut(lengths)]
        return {"micros": micros[self.rank::self.world], "excluded": excluded, "lengths": lengths, "lines": names,
                "padding": 1 - lengths.sum().item() / sum(m[1].numel() for m in micros)}

    def yardstick(self, vocab_size):
        passages = self.args.batch_size * self.args.group_size
        return f"ln {passages} = {math.log(passages):.3f} knows nothing: all passages of a batch are equally likely"

# ---- the joint sequence and its mask ---------------------------------------------------------------------------------
def joint_mask(start, n_self, length):
    """Who may look at whom, and where each token stands. start (B,): the column where SELF begins; it is n_self long.
    -> boolean mask (B, 1, L, L), True = may look; position_ids (B, L). Causal, but NEXT does not see SELF, and NEXT's
    positions are those it would have without SELF (as the released code). Pads come last: causality hides them."""
    column, start = torch.arange(length, device=start.device), start[:, None]        # (L,), (B, 1)
    is_next = column >= start + n_self                                               # (B, L)
    is_self = (column >= start) & ~is_next                                           # (B, L)
    mask = (column[:, None] >= column) & ~(is_next[:, :, None] & is_self[:, None])   # (B, L, L)
    return mask[:, None], column - n_self * is_next                                  # (B, 1, L, L), (B, L)

def last8(hidden, ends):
    """The states of the eight tokens before column `ends` (B,): hidden (B, L, d) -> (B, 8, d)."""
    columns = ends[:, None] + torch.arange(-8, 0, device=ends.device)                # (B, 8)
    return hidden[torch.arange(len(ends), device=ends.device)[:, None], columns]     # (B, 8, d)

def embed(lm, input_ids, lengths):
    """Sequences prefix + text + prompt, right-padded: (B, L) ids, (B,) lengths -> (B, d) float32 unit rows, the mean of
    the eight states. No mask: causality hides the pads, and the fast attention kernels run."""
    hidden = lm.base_model(input_ids=input_ids, use_cache=False).last_hidden_state   # (B, L, d), after the last norm
    return F.normalize(last8(hidden, lengths).float().mean(1), dim=-1)               # (B, d)

# ---- losses ----------------------------------------------------------------------------------------------------------
class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum over N tokens of -log_softmax(hidden @ weight.T)[target]: hidden (N, d), weight (V, d), targets (N,) -> ().
    The (N, V) logits never exist as a whole, and both gradients are made in the forward pass, while a chunk's logits
    are at hand: d loss / d logits = softmax - onehot. Three matrix products; recomputing the logits would take four."""
    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk=512):
        total = torch.zeros((), device=hidden.device)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        for h, y, grad_h in zip(hidden.split(chunk), targets[:, None].split(chunk), grad_hidden.split(chunk)):
            grad = F.log_softmax((h @ weight.T).float(), dim=-1)                     # (c, V) log-probabilities
            total -= grad.gather(1, y).sum()
            grad = grad.exp_().scatter_add_(1, y, grad.new_full(y.shape, -1)).to(h.dtype)  # (c, V) softmax - onehot
            grad_h.copy_(grad @ weight)                                              # (c, d)
            grad_weight += grad.T @ h                                                # (V, d)
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, grad):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None, None

def bag_loss(logits, targets):
    """Sum over rows of -mean_{v in U} log_softmax(max over the eight positions)[v], as the released code has it.
    logits (B, 8, V); targets (B, U): a row's unique target ids, padded with -100; a row without any adds nothing."""
    logp = logits.float().max(1).values.log_softmax(-1)                              # (B, V)
    real = targets >= 0                                                              # (B, U)
    picked = logp.gather(1, targets.clamp(min=0)) * real                             # (B, U)
    return -(picked.sum(1) / real.sum(1).clamp(min=1)).sum()

def total_loss(losses, counts, ar_weight=1.0, bow_weight=0.1):
    """L = L_AR + 0.1 mean(L_EBAE, L_EBAR), of these two only those with any target. losses, counts (3,) -> scalar."""
    ar, ebae, ebar = losses
    return ar_weight * ar + bow_weight * (ebae + ebar) / (counts[1:] > 0).sum().clamp(min=1)

def contrastive_loss(queries, passages, excluded, temperature=0.01):
    """InfoNCE: the mean over queries of -log(exp(q.p+ / T) / sum_p exp(q.p / T)), p over all passages but the excluded.
    queries (Q, d), passages (P, d): unit rows, passage i is that of query i; excluded (Q, P) bool: true, so no negative
    of this query. -> the loss; the share of queries with their own passage on top. Both ()."""
    scores = (queries @ passages.T / temperature).masked_fill(excluded, -torch.inf)  # (Q, P)
    own = torch.arange(len(queries), device=queries.device)                          # (Q,)
    return F.cross_entropy(scores, own), (scores.argmax(1) == own).float().mean()

# ---- model -----------------------------------------------------------------------------------------------------------
class Llara(nn.Module):
    """A HF causal language model and its Prompts, with the pretext tasks on top. It adds no weights."""
    def __init__(self, lm, prompts):
        super().__init__()
        self.lm, self.prompts = lm, prompts

    def forward(self, batch):
        """A batch of `collate` -> (3,) float32: L_AR, L_EBAE, L_EBAR, each a sum divided by batch["counts"].
        With the counts of the global batch in each micro-batch, these add up to the global loss, however it is split.
        The head is applied only where a loss needs it, and in here: FSDP gathers its weights for no one else."""
        ids, n, head = batch["input_ids"], len(self.prompts.prefix), self.lm.get_output_embeddings()
        start = n + batch["lengths"]                                                 # (B,) where SELF begins
        end = start + len(self.prompts.SELF)                                         # (B,) where NEXT begins
        mask, positions = joint_mask(start, len(self.prompts.SELF), ids.shape[1])
        hidden = self.lm.base_model(input_ids=ids, attention_mask=mask, position_ids=positions,
                                    use_cache=False).last_hidden_state               # (B, L, d), after the last norm
        column = torch.arange(1, ids.shape[1], device=ids.device)                    # (L-1,) of the token to predict
        passage = (column >= n) & (column < start[:, None])                          # (B, L-1)
        ar = ChunkedCrossEntropy.apply(hidden[:, :-1][passage], head.weight, ids[:, 1:][passage])
        ebae = bag_loss(head(last8(hidden, end)), batch["self_targets"])             # of (B, 8, V) logits
        ebar = bag_loss(head(last8(hidden, end + len(self.prompts.NEXT))), batch["next_targets"])
        return torch.stack([ar, ebae, ebar]) / batch["counts"].clamp(min=1)

    def embed(self, input_ids, lengths):
        """`embed` as a method, which FSDP can gather the weights for: (B, L), (B,) -> (B, d)."""
        return embed(self.lm, input_ids, lengths)

def pretrained(kind, name, dtype=torch.float32):
    """A HF model of the class `kind` and its tokenizer, by hub name or folder; no code from there is run. sdpa: eager
    adds a boolean mask as 0/1, flash attention takes none. BadInput if it cannot be loaded or lacks anything."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model, info = kind.from_pretrained(name, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False,
                                           output_loading_info=True)
    except (OSError, ValueError) as e:
        raise BadInput(f"{name}: cannot be loaded by {kind.__name__}: {str(e).strip().splitlines()[0]}") from e
    if info["missing_keys"] or not tokenizer.is_fast:
        raise BadInput(f"{name}: lacks {sorted(info['missing_keys'])[:3] or 'a fast tokenizer (tokenizer.json)'}")
    return model, tokenizer

def load(name):
    """A causal language model and its tokenizer, ready for `Llara`, with <s1>..<s16> in both. float32 whatever the file
    holds: in bfloat16 a step of 1e-5 on a weight of 0.02 is rounded away. BadInput if it cannot be used."""
    lm, tokenizer = pretrained(AutoModelForCausalLM, name)
    new, old = [token for token in SPECIAL if token not in tokenizer.get_vocab()], len(tokenizer)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in new], special_tokens=True)
    if len(tokenizer) > lm.get_input_embeddings().num_embeddings:  # some models have spare rows
        lm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        # New rows start from the mean of the old: a random one stands apart and takes probability from real tokens.
        for layer in (lm.get_input_embeddings(), lm.get_output_embeddings()):
            layer.weight[tokenizer.convert_tokens_to_ids(new)] = layer.weight[:old].mean(0)
        # Is the joint pass right on this architecture? Of 4 + 4 + 4 tokens, as if a passage, SELF and NEXT:
        ids, (mask, positions) = torch.arange(12)[None], joint_mask(torch.tensor([4]), 4, 12)
        joint = lm(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 8:]
        alone = lm.base_model(input_ids=torch.cat([ids[:, :4], ids[:, 8:]], 1), use_cache=False).last_hidden_state
        if layer.bias is not None or not torch.allclose(joint, layer(alone[:, 4:]), rtol=1e-3, atol=1e-3):
            raise BadInput(f"{name}: {type(lm).__name__} ignores mask or positions, or scales its logits; unsupported")
    return lm, tokenizer

def small_model(texts, folder, vocab_size=2048):
    """Writes a Llama of 2 layers with random weights and a byte-level BPE tokenizer trained on `texts` to a folder.
    Embeddings are tied and of length ~1: a state near a word's embedding then predicts that word, which helps EBAE."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size, special_tokens=["</s>", *SPECIAL], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="</s>").save_pretrained(folder)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=bpe.get_vocab_size(), hidden_size=128, intermediate_size=384, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=2048, initializer_range=128 ** -0.5, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=0)).save_pretrained(folder)

def docstrings():
    """The prose that every Python installation carries, in order: (module, object, docstring)."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        if not {"site-packages", "test", "tests"} & set(file.relative_to(root).parts):
            with contextlib.suppress(SyntaxError, ValueError):
                for node in ast.walk(ast.parse(file.read_bytes())):
                    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
                        yield str(file.relative_to(root)), getattr(node, "name", ""), ast.get_docstring(node)

def python_docs(path):
    """Writes articles, for want of better text: the language reference, and the docstrings of each module."""
    from pydoc_data.topics import topics
    articles = dict(topics)
    for module, _, text in docstrings():
        articles[module] = articles.get(module, "") + text + "\n\n"
    path.write_text("\n".join(json.dumps({"title": title, "text": text}) for title, text in articles.items()))

MODEL_CARD = """---
library_name: transformers
tags: [llara, dense-retrieval]
---
A text encoder made with LLaRA ([arXiv 2312.15503](https://arxiv.org/abs/2312.15503)) from {base}: --stage {stage},
{steps} steps of {batch_size} examples, lr {lr}, on {data}. Embed, and search by dot product:
```python
import torch
from transformers import AutoModel, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModel.from_pretrained(".")
SELF = {SELF!r}
NEXT = {NEXT!r}
def embed(text, prompt):  # passages: SELF; queries: NEXT, or SELF as long as the model is not fine-tuned
    ids = tokenizer('"').input_ids + tokenizer(text, add_special_tokens=False).input_ids
    ids += tokenizer(prompt, add_special_tokens=False).input_ids
    return torch.nn.functional.normalize(model(torch.tensor([ids])).last_hidden_state[0, -8:].mean(0), dim=-1)
print(embed("A llama is a camelid.", SELF) @ embed("What is a llama?", NEXT))
```
"""

def save(lm, tokenizer, folder, card="", state_dict=None):
    """An ordinary HF folder: safetensors, config, tokenizer, and `card` as its README.md."""
    lm.save_pretrained(folder, state_dict=state_dict)
    tokenizer.save_pretrained(folder)
    (Path(folder) / "README.md").write_text(card, encoding="utf-8")

@torch.inference_mode()
def encode(model, tokenizer, texts, prompt="self", max_length=512, batch_size=32):
    """Embeds texts: -> (n, d) float32 numpy, unit rows. prompt: "self" for passages, "next" for queries.
    model: of AutoModel or AutoModelForCausalLM, any dtype, any device. max_length, in tokens, includes the prompt.
    The result does not depend on the batch: padding is on the right, where causal attention never looks."""
    ids = sequences(tokenizer, texts, make_prompts(tokenizer), prompt.upper(), max_length)
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))  # like lengths together: little padding
    out = np.empty((len(ids), model.config.hidden_size), np.float32)
    for rows in (order[i:i + batch_size] for i in range(0, len(order), batch_size)):
        batch, lengths = pad([ids[r] for r in rows]), torch.tensor([len(ids[r]) for r in rows])  # (b, L), (b,)
        out[rows] = embed(model, batch.to(model.device), lengths.to(model.device)).cpu()         # (b, d)
    return out

# ---- training --------------------------------------------------------------------------------------------------------
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}  # dense bf16 FLOP/s

def unigram_levels(examples, vocab_size):
    """(3,) AR, EBAE and EBAR of always predicting the targets' frequencies: what word frequencies alone score."""
    counts = np.zeros((3, vocab_size))
    for _, passage, *bags in examples:
        np.add.at(counts[0], passage, 1)
        for row, bag in zip(counts[1:], bags):
            row[bag] += 1 / max(1, len(bag))  # in the loss each row weighs the same, not each target
    p = counts / counts.sum(1, keepdims=True).clip(1)
    return -(p * np.log(p.clip(1e-30))).sum(1)

def shard(model, device):
    """FSDP2 on any number of ranks, one included: each decoder layer, then the rest, with tied embeddings in one group.
    Weights, gradients, moments: float32. Compute on CUDA: bfloat16, whose range is float32's, so no loss scaling."""
    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    mixed = {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)} if device.type == "cuda" else {}
    for module in [m for m in model.modules() if type(m).__name__ in (model.lm._no_split_modules or ())]:
        fully_shard(module, mesh=mesh, **mixed)
    register_fsdp_forward_method(fully_shard(model, mesh=mesh, **mixed), "embed")

def checkpoints(args):
    return sorted(Path(args.output).glob("checkpoint-*"))

def save_checkpoint(model, optimizer, args, step):
    """What --resume needs, as output/checkpoint-STEP: written aside, renamed when whole; then the older one goes."""
    old, aside, final = checkpoints(args), Path(args.output, "checkpoint.tmp"), f"checkpoint-{step:08d}"
    if final not in [folder.name for folder in old]:
        dcp.save(dict(zip(("model", "optimizer"), dcp_state.get_state_dict(model, optimizer))), checkpoint_id=aside)
        if dist.get_rank() == 0:
            (aside / "run.json").write_text(json.dumps({"step": step, "args": vars(args)}, indent=1))
            aside.rename(aside.with_name(final))
            for folder in old:
                shutil.rmtree(folder)
    dist.barrier()

def load_checkpoint(model, optimizer, args):
    """Restores the newest checkpoint, written on any number of ranks; -> the step to go on with."""
    state = dict(zip(("model", "optimizer"), dcp_state.get_state_dict(model, optimizer)))
    dcp.load(state, checkpoint_id=checkpoints(args)[-1])
    dcp_state.set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return json.loads((checkpoints(args)[-1] / "run.json").read_text())["step"]

def adapt(model, item, args):
    """Leaves the gradient of a step of adaptation in the model. -> terms to log; lines to blame if not finite."""
    rank, world, device = dist.get_rank(), dist.get_world_size(), model.lm.device
    losses = torch.zeros(len(item["lines"]), 3, device=device)                       # (micro-batches of all ranks, 3)
    counts = item["counts"].to(device)
    for i, micro in enumerate(item["micros"]):
        terms = model({**{k: v.to(device) for k, v in micro.items()}, "counts": counts})
        loss = total_loss(terms, counts, args.ar_weight, args.bow_weight)
        (loss * world).backward()  # FSDP will take the mean over the ranks where the sum is due
        losses[rank + i * world] = terms.detach()
    dist.all_reduce(losses)
    suspects = [line for lines, terms in zip(item["lines"], losses) if not terms.isfinite().all() for line in lines]
    ar, ebae, ebar = terms = losses.sum(0)
    loss = total_loss(terms, counts, args.ar_weight, args.bow_weight)
    return {"loss": loss.item(), "AR": ar.item(), "EBAE": ebae.item(), "EBAR": ebar.item()}, suspects or sum(
        item["lines"], [])

def finetune(model, item, args):
    """The same for a step of contrastive learning. Gradient caching (arXiv 2101.06983): embed all without a graph; the
    loss gives a gradient for each embedding; embed again, chunk by chunk, and go back from there. So memory is that of
    a micro-batch, and as every rank has all embeddings, the gradient is the true one of all negatives of all ranks."""
    device, seed = model.lm.device, torch.initial_seed()
    def embed(i):
        torch.manual_seed(seed + i)  # dropout, if any, must be the same both times
        rows, ids, lengths = item["micros"][i]
        return model.embed(ids.to(device), lengths.to(device))                       # (b, d)
    vectors = torch.zeros(len(item["lengths"]), model.lm.config.hidden_size, device=device)  # (Q + P, d)
    with torch.no_grad():
        for i, (rows, *_) in enumerate(item["micros"]):
            vectors[rows] = embed(i)
    dist.all_reduce(vectors)  # others' rows are 0 here
    excluded = item["excluded"].to(device)                                           # (Q, P)
    queries, passages = vectors.requires_grad_().split(excluded.shape)
    loss, accuracy = contrastive_loss(queries, passages, excluded, args.temperature)
    loss.backward()
    for i, (rows, *_) in enumerate(item["micros"]):
        (embed(i) * vectors.grad[rows]).sum().mul(dist.get_world_size()).backward()  # FSDP will take the mean
    return {"loss": loss.item(), "accuracy": accuracy.item()}, item["lines"]

STAGES = {"adapt": (Articles, Steps, adapt), "finetune": (Pairs, Groups, finetune)}

def check_links(folder):
    """BadInput if a symbolic link could lead what is written to this folder out of it."""
    for path in folder.rglob("*"):
        if path.is_symlink():
            raise BadInput(f"{path} is a symbolic link, through which nothing is written: remove it")

def prepare(args, out):
    """Claims the output folder, makes the default data and model, opens all: -> log file of rank 0, lines, language
    model, tokenizer."""
    rank, log = dist.get_rank(), None
    if rank == 0:
        if not (args.resume or args.overwrite) and out.exists() and any(out.iterdir()):
            raise BadInput(f"--output {out} is in use: --resume continues, --overwrite starts anew, or name another")
        out.mkdir(parents=True, exist_ok=True)
        check_links(out)
        log = open(out / "log.jsonl", "a+", buffering=1)
        try:
            fcntl.lockf(log, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends, however it does
        except BlockingIOError:
            raise BadInput(f"--output {out}: another run is writing there") from None
        for old in [out / "checkpoint.tmp"] if args.resume else out.glob("checkpoint*"):
            shutil.rmtree(old, ignore_errors=True)
        if not (args.data or args.resume):
            python_docs(out / "python-docs.jsonl")
    dist.barrier()
    lines = STAGES[args.stage][0](args.data or [out / "python-docs.jsonl"], out)
    if rank == 0 and not (args.model or args.resume):
        torch.manual_seed(args.seed)
        small_model((lines[i][0][:5000] for i in lines.full[::len(lines.full) // 2000 + 1]), out / "base")
    dist.barrier()
    return log, lines, *load(args.model or out / "base")

def train(args):
    rank, world, out = dist.get_rank(), dist.get_world_size(), Path(args.output)
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    log, lines, lm, tokenizer = prepare(args, out)
    model, config, adapting = Llara(lm, make_prompts(tokenizer)), lm.config, args.stage == "adapt"
    _, dataset, stage = STAGES[args.stage]
    steps = dataset(lines, tokenizer, model.prompts, args, rank, world)
    if not steps.size:
        raise BadInput(f"--data: no text is longer than a passage, at this --max-length of {steps.room} tokens")
    args.steps = args.steps or math.ceil(steps.size / args.batch_size)
    if args.gradient_checkpointing:  # renamed in transformers 5.23
        enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if not adapting and not config.tie_word_embeddings:
        lm.get_output_embeddings().requires_grad_(False)  # it takes no part
    # FLOPs: 6 a weight and token, 6 d L^2 a layer for causal attention; recomputing is not counted. A head is as large
    # as the input embeddings, which do none.
    weights = lm.base_model.num_parameters() - lm.get_input_embeddings().weight.numel() * (not adapting)
    peak = next((v for k, v in PEAK.items() if device.type == "cuda" and k in torch.cuda.get_device_name()), None)
    shard(model.train(), device)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=0.0, fused=True)
    step = load_checkpoint(model, optimizer, args) if args.resume else 0
    first = steps[step]
    if rank == 0:
        print(f"model      {args.model or 'from scratch (--model for another)'}: {lm.num_parameters():,} parameters\n"
              f"data       {len(lines.lengths):,} lines in {len(lines.paths)} files, {steps.size:,} examples\n"
              f"step       {args.batch_size} examples, ~{first['lengths'].sum():,} tokens, in micro-batches of "
              f"{args.micro_batch_size} on {world} x {device.type}\n"
              f"run        {args.steps} steps, {args.steps * args.batch_size / steps.size:.2f} epochs\n"
              f"yardstick  {steps.yardstick(config.vocab_size)}", flush=True)
        log.seek(0)
        log.truncate(sum(map(len, log.readlines()[:step])))  # a line a step
    signals, stop = (signal.SIGTERM, signal.SIGINT), []
    loader = torch.utils.data.DataLoader(
        steps, None, sampler=range(step, args.steps), num_workers=args.workers,
        multiprocessing_context="fork" if args.workers else None,  # the open files of the data are inherited
        worker_init_fn=lambda _: [signal.signal(s, signal.SIG_IGN) for s in signals])
    for number in signals:
        signal.signal(number, lambda *_: stop.append(1))
    bar, then = tqdm(initial=step, total=args.steps, unit="step", disable=rank > 0), time.perf_counter()
    try:
        for item in loader:
            halt = torch.tensor(len(stop))
            dist.all_reduce(halt)  # one rank may have been told to stop, and another not
            if halt:
                raise BadInput("stopped by a signal")
            torch.manual_seed(args.seed + step * world + rank)  # for models with dropout: the same after --resume
            warmup = max(args.warmup * args.steps, 1)
            lr = args.lr * min((step + 1) / warmup, (args.steps - step) / (args.steps - warmup + 1e-9))
            optimizer.param_groups[0]["lr"] = lr
            terms, suspects = stage(model, item, args)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor().item()
            if not math.isfinite(sum(terms.values()) + norm):
                raise BadInput(f"step {step}: loss or gradient is not finite, nothing was updated. Look at "
                               f"{', '.join(suspects)}; mend them, or start anew with a lower --lr")
            optimizer.step()
            optimizer.zero_grad()
            lengths, seconds = item["lengths"].numpy(), time.perf_counter() - then
            row = {"step": step, **terms, "lr": lr, "grad_norm": norm, "tokens/s": lengths.sum() / seconds,
                   "padding": item["padding"], "GB": (torch.cuda.max_memory_allocated() / 2**30  # on CPU in KB:
                                                      or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)}
            if peak:
                attention = config.num_hidden_layers * config.hidden_size * (lengths ** 2).sum()
                row["MFU"] = 6 * (weights * lengths.sum() + attention) / seconds / peak / world
            then += seconds
            if rank == 0:
                log.write(json.dumps(row) + "\n")
            bar.set_postfix_str(" ".join(f"{k} {v:.4g}" for k, v in row.items() if k not in ("step", "padding")), False)
            bar.update()
            step += 1
            if step % args.save_every == 0 or step == args.steps:
                save_checkpoint(model, optimizer, args, step)
    except BadInput as e:
        if step == 0:
            raise  # nothing to save: dcp would even make up a first update in the optimizer
        save_checkpoint(model, optimizer, args, step)
        raise BadInput(f"{e}; all before step {step} is saved, --resume continues") from None
    finally:
        bar.close()
    whole = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = dcp_state.get_model_state_dict(model.lm, options=whole)
    if rank == 0:
        for name in (lm._tied_weights_keys or ()) if config.tie_word_embeddings else ():
            state.pop(name, None)  # or the embedding is written twice
        names = {"SELF": SELF, "NEXT": NEXT, "base": args.model or "random weights",
                 "data": ", ".join(path.name for path in lines.paths)}
        save(lm, tokenizer, out, MODEL_CARD.format(**{**vars(args), **names}), state)
        for folder in checkpoints(args):
            shutil.rmtree(folder)
        print(f"saved to {out}; {out}/README.md says how to embed with it")

# ---- arguments -------------------------------------------------------------------------------------------------------
OPTIONS = {  # flag: its defaults for a small model from scratch, with --model (the paper's), to fine-tune; its help
    "steps": (600, 10000, 0, "updates (0: one epoch)"),
    "batch-size": (32, 256, 128, "examples, or queries, a step over all ranks"),
    "micro-batch-size": (8, 8, 32, "sequences in a forward: changes memory, not results"),
    "max-length": (96, 1024, None, "tokens of the joint sequence, prompts included"),
    "query-length": (None, None, 64, "tokens of a query, prompt included"),
    "passage-length": (None, None, 160, "tokens of a passage, prompt included"),
    "group-size": (None, None, 16, "passages a query: one positive, the others negatives"),
    "temperature": (None, None, 0.01, "of the softmax over the passages"),
    "lr": (5e-3, 1e-5, 1e-5, "peak of the learning rate"),
    "warmup": (0.1, 0.1, 0.1, "share of the steps; from there the rate falls linearly to 0"),
    "ar-weight": (1.0, 1.0, None, "weight of the language-model loss"),
    "bow-weight": (1.0, 0.1, None, "weight of the mean of EBAE and EBAR"),
    "save-every": (500, 500, 500, "steps between checkpoints"),
    "workers": (1, 1, 1, "tokenising processes a rank"),
    "seed": (0, 0, 0, "of the order of the data, and of a model from scratch")}

def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], add_help=False, allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--stage", choices=STAGES, default="adapt", help="adapt: EBAE and EBAR; finetune: contrastive learning")
    add("--data", nargs="+", help='.jsonl[.gz] files or folders; rows: {"text"[, "title"]} or {"input", '
        '"output_summarize", "output_predict"}; to finetune {"query", "pos": [..], "neg": [..]} (None: Python\'s docs)')
    add("--model", help="hub name or folder of a causal language model (None: a small Llama from scratch)")
    add("--output", default="out", help="folder for log.jsonl, checkpoints and at last the model")
    add("--resume", action="store_true", help="continue from the last checkpoint in --output; flags are as they were")
    add("--overwrite", action="store_true", help="start anew though --output is in use")
    add("--gradient-checkpointing", action="store_true", help="recompute activations: less memory, a third more time")
    args, _ = parser.parse_known_args(argv)
    saved, restarted = checkpoints(args), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if args.resume and not saved:
        parser.error(f"--resume: no checkpoint in {args.output}")
    if restarted:  # by torchrun --max-restarts
        parser.set_defaults(resume=bool(saved), overwrite=True)
    before = json.loads((saved[-1] / "run.json").read_text())["args"] if saved and (args.resume or restarted) else {}
    parser.set_defaults(**{k: before[k] for k in before.keys() - {"resume", "overwrite"}})
    args, _ = parser.parse_known_args(argv)
    for name, (*defaults, text) in OPTIONS.items():
        default = defaults[2 if args.stage == "finetune" else args.model is not None]
        if default is not None:
            add(f"--{name}", type=type(default), default=before.get(name.replace("-", "_"), default), help=text)
    add("-h", "--help", action="help", help="show this, with the defaults of the --stage and the --model given")
    args = parser.parse_args(argv)
    for name in ("batch_size", "micro_batch_size", "group_size", "save_every"):
        if getattr(args, name, 1) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} is too small")
    if args.stage == "finetune" and not (args.model and args.data):
        parser.error("--stage finetune needs --model, what adaptation has saved, and --data")
    return args

@contextlib.contextmanager
def process_group(backend):
    """With torchrun or without it. In here a mistake of the user, a full disk or memory and Ctrl-C end the process with
    one sentence and exit code 1, on the one rank that should say it; a mistake of ours keeps its traceback."""
    # torchrun keeps its store over --max-restarts: without a prefix, an attempt would take addresses of the last one.
    store, rank, world = next(dist.rendezvous("env://")) if "RANK" in os.environ else (dist.HashStore(), 0, 1)
    store, script = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store), Path(sys.argv[0]).name
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    try:
        yield
    except BadInput as e:
        sys.exit(f"{script}: {e}" if rank == 0 else 1)
    except (OSError, SafetensorError, dcp.api.CheckpointException) as e:
        sys.exit(f"{script}: {str(e).strip().splitlines()[-1]}; a full disk, no right to write, or a "
                 "checkpoint of another model? What is saved is intact")
    except (MemoryError, RuntimeError) as e:
        if "closed by peer" in str(e):
            sys.exit(1)  # another rank has ended, and says why
        if isinstance(e, RuntimeError) and "allocate" not in str(e):
            raise
        sys.exit(f"{script}: out of memory; take smaller micro-batches. What is saved is intact")
    except (KeyboardInterrupt, FloatingPointError) as e:
        sys.exit(f"{script}: {str(e) or 'interrupted'}; what is saved is intact")
    finally:
        dist.destroy_process_group()

def main():
    args, cuda = arguments(), torch.cuda.is_available()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a tokenizer's threads would not survive the fork of the workers
    logging.disable_progress_bar()  # transformers' own
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    with process_group("cpu:gloo,cuda:nccl" if cuda else "gloo"):
        train(args)

if __name__ == "__main__":
    main()
