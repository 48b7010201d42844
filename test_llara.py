# SPDX-License-Identifier: MIT
"""Tests of llara.py and eval.py, each against something that they did not compute: python -m pytest -q test_llara.py"""
import fcntl, functools, gzip, json, math, os, random, re, shutil, signal, subprocess, sys
from pathlib import Path
from pydoc_data.topics import topics
from unittest import mock
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.path.dirname(__file__)}
import numpy as np, pytest, torch, torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
import eval as evaluation, llara
torch.set_num_threads(1)  # as OMP_NUM_THREADS says to launched processes: they must compute the same bits

PROMPTS = llara.Prompts([1, 5], [*range(60, 71), *range(100, 108)], [*range(71, 81), *range(108, 116)])
PASSAGES = [[(7 * i * i + 11 * j + 3) % 50 + 6 for j in range(n)] for i, n in enumerate((12, 7, 20))]
FOLLOWING = [[(5 * i + 13 * j + 1) % 50 + 6 for j in range(9)] if i != 1 else [] for i in range(3)]
EXAMPLES = [(p, sorted(set(p)), sorted(set(f))) for p, f in zip(PASSAGES, FOLLOWING)]
SENTENCES = re.split(r"(?<=[.:])\s+", topics["assignment"])  # and of "it is" and "and the", no target is left:
ROWS = [{"input": "§" * (i == 9) + " ".join(SENTENCES[i:i + 1 + i % 5]), "output_summarize": SENTENCES[i] if i % 7 else
         "it is", "output_predict": "and the" if i % 3 else SENTENCES[i + 5]} for i in range(40)]
TEXTS = "无" * 300 + "。" + "句" * 500, "x" * 2000, "word " * 400, "Too short."
ARTICLES = [*({"title": t, "text": topics[t][:1500]} for t in sorted(topics)[:9]), *({"text": t} for t in TEXTS)]
PAIRS = [{"query": SENTENCES[i], "pos": SENTENCES[i + 1:i + 2 + i % 2], "neg": SENTENCES[i + 3:i + 3 + i % 4],
          "answers": 3} for i in range(12)]  # 0 to 3 negatives; many are another query's positive
RUN = ("--data rows.jsonl --model model --steps 8 --batch-size 8 --micro-batch-size 8 --max-length 140 --lr 1e-3 "
       "--save-every 3 --workers 0 --output ")  # the 40 rows are 5 steps
TUNE = ("--stage finetune --data pairs.jsonl --model model --steps 4 --batch-size 6 --group-size 3 --lr 1e-3 "
        "--workers 0 --query-length 50 --passage-length 80 --temperature 0.1 ")
KILL = ("import os, llara; save, n = llara.dcp.save, []; llara.dcp.save = lambda *a, **k: "
        "[n.append(save(*a, **k)), n[1:] and os.kill(os.getpid(), 9)]; llara.main()")  # before the second has its name
launch = lambda flags: subprocess.run([sys.executable, *flags], capture_output=True, text=True)
log = lambda folder: [json.loads(line) for line in open(f"{folder}/log.jsonl")]
same = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-5, check_dtype=False)

def tiny(family, tied=False, vocab_size=128):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(
        family, vocab_size=vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, rms_norm_eps=1e-5, initializer_range=0.2, bos_token_id=0, pad_token_id=None,
        tie_word_embeddings=tied), attn_implementation="sdpa").eval()

def write(file, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    Path(file).write_bytes(gzip.compress(text) if file.endswith(".gz") else text)

@pytest.fixture(scope="module", autouse=True)
def home(tmp_path_factory):  # every test runs in one folder, with a tiny model and with data
    os.chdir(tmp_path_factory.mktemp("home")), torch.manual_seed(0)
    llara.small_model((row["input"] for row in ROWS), "model", 400)
    write("rows.jsonl", ROWS), write("articles.jsonl", ARTICLES), write("pairs.jsonl", PAIRS)

def main(flags):  # in this process: a launch costs seconds
    with mock.patch.object(sys, "argv", ["llara.py", *flags.split()]):
        llara.main()
    signal.signal(signal.SIGINT, signal.default_int_handler)

def two_ranks(*command):
    done = launch(["-m", "torch.distributed.run", "--nproc-per-node=2", *map(str, command)])
    assert done.returncode == 0, done.stderr

def refused(flags):  # -> what main() says. For a str in SystemExit, Python prints it and exits with code 1
    with pytest.raises(SystemExit, match="^llara.py: [^\n]*$") as exit:
        main(flags)
    return exit.value.code

def same_run(a, b, tolerance):  # step for step, and at the end; 0: bit for bit
    for key in log(b)[0].keys() - {"tokens/s", "padding", "GB"}:
        np.testing.assert_allclose([row[key] for row in log(a)], [row[key] for row in log(b)], rtol=tolerance)
    a, b = load_file(f"{a}/model.safetensors"), load_file(f"{b}/model.safetensors")
    apart = torch.cat([(a[name] - b[name]).abs().flatten() for name in a.keys() | b.keys()])
    # AdamW divides by the size of the gradient: where that is nearly 0, for a weight in 10,000, rounding shows in full.
    assert (apart > tolerance).float().mean() <= 1e-4 * (tolerance > 0) and apart.max() <= 20 * tolerance

def steps(data="rows.jsonl", flags="", **ranks):
    adapt = "--max-length 140 --batch-size 8 " if "--stage" not in flags else ""
    args, tokenizer = llara.arguments(f"{adapt}--micro-batch-size 2 {flags}".split()), llara.load("model")[1]
    lines, dataset, _ = llara.STAGES[args.stage]
    return dataset(lines([data]), tokenizer, llara.make_prompts(tokenizer), args, **ranks)

def test_golden():
    """Losses, gradient norms, embeddings: those of the released code. More padding and another split change nothing."""
    lm = tiny("llama")
    for k, (name, p) in enumerate(sorted(lm.named_parameters())):
        i = np.arange(p.numel(), dtype=np.float64)
        w = np.sin(0.7 * (k + 1) + i * (0.61803398875 + 0.01 * k))
        p.data = torch.tensor(1 + 0.1 * w if "norm" in name else 0.25 * w, dtype=torch.float32).view(p.shape)
    model, whole = llara.Llara(lm, PROMPTS), llara.collate(EXAMPLES, PROMPTS)
    split = [{**llara.collate([example], PROMPTS), "counts": whole["counts"]} for example in EXAMPLES]
    golden = 5.132088661, 3.322822911, 0.487182558, 0.161732256, 0.485728353, 0.198733825, 5.618544102, 3.340850842
    for batches in ([whole], [{**whole, "input_ids": F.pad(whole["input_ids"], (0, 9), value=3)}], split):
        for term, (loss, norm) in enumerate(zip(golden[::2], golden[1::2])):
            model.zero_grad()
            losses = sum(map(model, batches))
            value = [*losses * torch.tensor([1, 0.1, 0.1]), llara.total_loss(losses, whole["counts"])][term]
            value.backward()
            assert value.item() == pytest.approx(loss, abs=1e-5)
            assert torch.cat([p.grad.flatten() for p in lm.parameters()]).norm().item() == pytest.approx(norm, rel=1e-5)
    golden = """-0.09080182 0.22346915 0.06946224 -0.00672612   0.24219397 -0.29132545 0.05200180 -0.06596878
                0.12951507 -0.08678233 0.22707206 -0.21244715   -0.08184583 -0.00093548 0.18424950 -0.18297526
                -0.30749780 -0.06796909 -0.04357943 -0.28528449   -0.08391397 0.14070702 0.11679310 0.07219057"""
    rows = [[*PROMPTS.prefix, *passage, *prompt] for prompt in PROMPTS[1:] for passage in PASSAGES]
    embeddings = model.embed(llara.pad(rows), torch.tensor([*map(len, rows)]))
    same(embeddings[:, :4].flatten(), torch.tensor([*map(float, golden.split())]))

@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gpt_neox"])
def test_one_pass_is_two(family, tied):
    """States and logits against separate passes of the bare model, without padding, mask or positions."""
    lm, batch = tiny(family, tied), llara.collate(EXAMPLES, PROMPTS)
    mask, positions = llara.joint_mask(batch["lengths"] + 2, 19, batch["input_ids"].shape[1])
    joint = lm(batch["input_ids"], mask, positions, use_cache=False, output_hidden_states=True)
    for i, passage in enumerate(PASSAGES):
        for prompt, end in zip(PROMPTS[1:], (21 + len(passage), 39 + len(passage))):
            alone = lm(torch.tensor([[*PROMPTS.prefix, *passage, *prompt]]), output_hidden_states=True)
            same(joint.logits[i, end - 8:end], alone.logits[0, -8:])
            same(joint.hidden_states[-1][i, end - 8:end], alone.hidden_states[-1][0, -8:])

def test_mask_cell_by_cell():
    """prefix and passage p, SELF s, NEXT n, pad x: the table is written by hand, a row for each token that looks."""
    mask, positions = llara.joint_mask(torch.tensor([3, 2]), 2, 8)  # ppp ss nn x  and  pp ss nn xx
    for looks, table in zip(mask[:, 0], ("10000000 11000000 11100000 11110000 11111000 11100100 11100110",
                                         "10000000 11000000 11100000 11110000 11001000 11001100")):
        assert looks[:len(table.split())].tolist() == [[cell == "1" for cell in row] for row in table.split()]
    assert positions[0, :7].tolist() == [0, 1, 2, 3, 4, 3, 4] and positions[1, :6].tolist() == [0, 1, 2, 3, 2, 3]

def test_losses():
    """Cross entropy and gradients against PyTorch's; bag and total losses and levels against plain Python."""
    h, w, y = torch.randn(12, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True), torch.arange(12)
    for chunk in (1, 5, 12, 512):
        losses = llara.ChunkedCrossEntropy.apply(h, w, y, chunk), F.cross_entropy(h @ w.T, y, reduction="sum")
        same(*([loss, *torch.autograd.grad(3 * loss, (h, w))] for loss in losses), atol=1e-4)
    z, bags, loss = torch.randn(3, 8, 10), [[1, 4, 9], [], [0]], 0.0
    for row, bag in zip(z.tolist(), bags):
        top = [max(position[v] for position in row) for v in range(10)]
        loss += sum(math.log(sum(map(math.exp, top))) - top[v] for v in bag) / max(1, len(bag))
    assert llara.bag_loss(z, llara.pad(bags, -100)).item() == pytest.approx(loss, rel=1e-5)
    for counts, ebae, ebar, total in ((9, 2, 3), 3., 1., 10.6), ((9, 2, 0), 3., 0., 10.9), ((9, 0, 0), 0., 0., 10.):
        same(llara.total_loss(torch.tensor([5, ebae, ebar]), torch.tensor(counts), 2, 0.3), torch.tensor(total))
    # Unigram levels. AR: 3 of 4 tokens are 0. EBAE: half and all of two bags is 0, 3/4 as well. EBAR: one bag, of two
    levels = llara.unigram_levels([("a:1", [0, 0, 1], [0, 1], [2, 3]), ("a:2", [0], [0], [])], 5)
    np.testing.assert_allclose(levels, [*[-0.75 * math.log(0.75) - 0.25 * math.log(0.25)] * 2, math.log(2)])

def test_targets():
    """Unique, of the window that the model sees, no stop words (against a regular expression); a "<s1>" is text."""
    assert llara.content_words("The cat's 2nd_hat -- isn't ON; été.") == "cat 2nd hat été"
    text = "The parser <s1> and the parser </s> of it. " + "assignment " * 300
    write("targets.jsonl", [{"input": text, "output_summarize": text, "output_predict": "This is THE __ and!"}])
    (_, passage, target, following), = (made := steps("targets.jsonl")).examples([0])
    seen = made.tokenizer.decode(passage)
    assert len(passage) == 140 - sum(map(len, made.prompts)) and text.startswith(seen) and "<s1>" in seen
    words = " ".join(re.sub(r"\W+|\b(the|and|of|it)\b", " ", seen, flags=re.I).split())
    assert target == sorted(set(made.tokenizer(words, add_special_tokens=False).input_ids)) and following == []
    assert not set(made.tokenizer.all_special_ids) & {*passage, *target}

def test_both_formats():
    """Adjacent passages make an example, and joined they are the article; .gz, more files, a folder change nothing."""
    files = {"many/a.jsonl": ARTICLES[:6], "many/b.jsonl.gz": ARTICLES[6:], "rows.jsonl.gz": ROWS}
    Path("many").mkdir(), *(write(*file) for file in files.items())
    many = llara.Articles(["many"], "."), llara.Articles(["rows.jsonl.gz"])
    tokenizer = AutoTokenizer.from_pretrained("model")
    examples = [lines.example(i) for lines in many for i in range(lines.count(tokenizer, 60))]
    for name, row in ((f"{file}:{i}", row) for file, rows in files.items() for i, row in enumerate(rows, 1)):
        mine = [example[1:] for example in examples if example[0] == name]
        if "input" in row or row == ARTICLES[-1]:  # this one is too short for two passages
            assert mine == [tuple(row.values())] * ("input" in row)
        else:
            passages = [mine[0][0], *(following for _, _, following in mine)]
            assert [(a, a, b) for a, b in zip(passages, passages[1:])] == mine
            assert "".join("".join(passages).split()) == "".join((row.get("title", "") + row["text"]).split())
    assert [llara.boundary("One two. Three four. Five six.", k, 3) for k in range(4)] == [0, 9, 21, 30]  # sentence ends

def test_order():
    """1, 2 and 4 ranks do the same micro-batches, of like lengths; each epoch is another permutation of all rows."""
    def micros(*items):
        return sorted(str(m["input_ids"].tolist()) for item in items for m in item["micros"])
    one, wide = steps(), steps(flags="--batch-size 16")  # whose step 2 reaches into the second epoch
    items = [one[step] for step in range(10)]  # 5 steps of 8 are an epoch
    for step, world in ((9, 4), (0, 2), (4, 4)):  # a step does not depend on those before it
        ranks = [steps(rank=rank, world=world)[step] for rank in range(world)]
        assert micros(*ranks) == micros(items[step]) and {len(rank["micros"]) for rank in ranks} == {4 // world}
    for item in items:
        bounds = [f(m["lengths"].tolist()) for m in item["micros"] for f in (max, min)]
        assert bounds == sorted(bounds, reverse=True)
    names = [sum(item["lines"], []) for item in items]
    assert sorted(sum(names[:5], [])) == sorted(sum(names[5:], [])) == sorted(f"rows.jsonl:{i + 1}" for i in range(40))
    assert names[:5] != names[5:]
    assert all(set(sum(wide[i]["lines"], [])) == {*names[2 * i], *names[2 * i + 1]} for i in range(5))

def direct(item, lm, prompts, args):  # all embeddings in one graph
    ids = {int(row): ids[:n].tolist() for micro in item["micros"] for row, ids, n in zip(*micro)}
    vectors = torch.stack([F.normalize(lm.base_model(torch.tensor([ids[i]])).last_hidden_state[0, -8:].mean(0), dim=0)
                           for i in range(len(ids))])
    n = args.batch_size
    scores = (vectors[:n] @ vectors[n:].T / args.temperature).masked_fill(item["excluded"], -math.inf)
    return -scores.log_softmax(1)[range(n), range(n)].mean()

def test_contrastive():
    """The loss against the formula in plain Python; cached gradients against those of a single graph."""
    draw = torch.Generator().manual_seed(0)
    q, p = (F.normalize(torch.randn(n, 6, generator=draw), dim=1) for n in (3, 7))
    excluded, expected, hits = torch.zeros(3, 7, dtype=torch.bool), 0, 0
    excluded[1, 6] = excluded[0, 1] = True
    for i in range(3):
        scores = {j: sum(a * b for a, b in zip(q[i].tolist(), p[j].tolist())) / 0.05 for j in range(7)
                  if not excluded[i, j]}
        expected += (math.log(sum(map(math.exp, scores.values()))) - scores[i]) / 3
        hits += max(scores, key=scores.get) == i
    loss, accuracy = llara.contrastive_loss(q, p, excluded, 0.05)
    assert loss.item() == pytest.approx(expected, rel=1e-5) and accuracy.item() == pytest.approx(hits / 3)
    groups, lm = steps("pairs.jsonl", TUNE), llara.load("model")[0]
    with mock.patch.object(llara, "dist", mock.Mock(**{"get_world_size.return_value": 1})):
        terms, _ = llara.finetune(llara.Llara(lm, groups.prompts), groups[0], groups.args)
    mine = [p.grad.clone() for p in lm.parameters()]
    loss = direct(groups[0], lm, groups.prompts, groups.args)
    lm.zero_grad(), loss.backward()
    same(mine, [p.grad for p in lm.parameters()])
    assert terms["loss"] == pytest.approx(loss.item(), abs=1e-5)

def test_groups():
    """One positive a query, its negatives repeated if few; drawn again each epoch; no true passage is a negative."""
    groups, tokenizer, drawn = steps("pairs.jsonl", TUNE), AutoTokenizer.from_pretrained("model"), []
    for step in range(8):  # two steps are an epoch
        item = groups[step]
        assert str(item) == str(steps("pairs.jsonl", TUNE)[step])
        ids = {int(row): ids[:n].tolist() for micro in item["micros"] for row, ids, n in zip(*micro)}
        row = [PAIRS[int(name.split(":")[1]) - 1] for name in item["lines"]]
        known = {str(llara.sequences(tokenizer, [text], groups.prompts, "SELF", 80)[0]): text for text in SENTENCES}
        passages = [known[str(ids[i])] for i in range(6, len(ids))]
        assert [ids[i] for i in range(6)] == llara.sequences(
            tokenizer, [r["query"] for r in row], groups.prompts, "NEXT", 50)
        drawn.append({})
        for q, (r, own, excluded) in enumerate(zip(row, passages, item["excluded"].tolist())):
            before = 6 + sum(2 for r in row[:q] if r["neg"])  # the passages of queries, then the hard negatives
            hard = passages[before:before + 2 * bool(r["neg"])]
            assert own in r["pos"] and set(hard) <= set(r["neg"]) and len(set(hard)) == min(2, len(r["neg"]))
            assert excluded == [j != q and text in r["pos"] for j, text in enumerate(passages)]
            drawn[-1][r["query"]] = [own, hard]
        assert len(passages) == 6 + sum(2 for r in row if r["neg"])
    assert any(item["excluded"].any() for item in map(groups.__getitem__, range(4)))
    assert {**drawn[0], **drawn[1]} != {**drawn[2], **drawn[3]}

def test_finetune():
    """Two ranks against one, other micro-batches too; a retriever that encode reads."""
    main(TUNE + "--output tuned --micro-batch-size 50")
    two_ranks(llara.__file__, *(TUNE + "--output tuned2 --micro-batch-size 5").split())
    same_run("tuned2", "tuned", 2e-5)

def test_load():
    """bfloat16 without <s1>..<s16> becomes float32 with 16 mean rows; saved and loaded, it stays as it is."""
    with mock.patch.object(llara, "SPECIAL", []):
        llara.small_model([], "plain", 257)
    plain = tiny("llama", vocab_size=257).to(torch.bfloat16)
    plain.save_pretrained("plain")
    lm, tokenizer = llara.load("plain")
    assert {p.dtype for p in lm.parameters()} == {torch.float32} and lm.config._attn_implementation == "sdpa"
    for old, new in (plain.model.embed_tokens, lm.model.embed_tokens), (plain.lm_head, lm.lm_head):
        same(new.weight, torch.cat([old.weight.float(), old.weight.float().mean(0).expand(16, -1)]), atol=1e-7)
    assert tokenizer("<s1><s16>", add_special_tokens=False).input_ids == [257, 272]
    llara.save(lm, tokenizer, "plain")
    same(llara.load("plain")[0].state_dict(), lm.state_dict(), atol=0)

def test_encode():
    """Any batch size, in the order of the texts, cut to a window: against text by text in plain transformers."""
    lm, tokenizer = llara.load("model")
    texts, expected = ["", *(row["input"] for row in ROWS[:8]), ROWS[4]["input"] * 9], []
    for text in texts:
        ids, prompt = (tokenizer(part, add_special_tokens=False).input_ids for part in (text, llara.NEXT))
        ids = [*tokenizer('"').input_ids, *ids][:200 - len(prompt)] + prompt
        expected.append(F.normalize(lm.model(torch.tensor([ids])).last_hidden_state[0, -8:].mean(0), dim=0))
    for size in (1, 3, 32):
        same(torch.tensor(llara.encode(lm, tokenizer, texts, "next", 200, size)), torch.stack(expected))

def test_split_and_interrupted(monkeypatch):
    """Micro-batches, a run killed or told to stop, then resumed (bit for bit), two ranks: against an unbroken run."""
    item = llara.Steps.__getitem__
    main(RUN + "unbroken"), main(RUN + "micro --micro-batch-size 1")  # lengths differ, and many rows have no target
    same_run("micro", "unbroken", 2e-5)
    assert launch(["-c", KILL, *(RUN + "killed").split()]).returncode == -9
    assert len(log("killed")) == 6 and os.listdir("killed").count("checkpoint-00000003") == 1
    shutil.copytree("killed", "ranks")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1"), main(RUN + "killed")  # as torchrun --max-restarts does
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT"), same_run("killed", "unbroken", 0)
    with mock.patch.object(llara.Steps, "__getitem__", lambda self, step: (
            step == 5 and os.kill(os.getpid(), signal.SIGTERM), item(self, step))[1]):
        assert "all before step 5 is saved" in refused(RUN + "terminated")
    main("--resume --output terminated"), same_run("terminated", "unbroken", 0)
    two_ranks(llara.__file__, *(RUN + "ranks --resume --micro-batch-size 2").split())
    same_run("ranks", "unbroken", 2e-5)

def test_not_finite():
    """NaN for a token that only line 10 has: its step stops the run, before the update, and names the line."""
    lm, tokenizer = llara.load("model")
    lm.config.tie_word_embeddings, lm.lm_head.weight = False, torch.nn.Parameter(lm.lm_head.weight.detach().clone())
    lm.model.embed_tokens.weight.data[tokenizer("§").input_ids[-1]] = math.nan
    llara.save(lm, tokenizer, "nan")
    with mock.patch.object(torch.optim.AdamW, "step", autospec=True, side_effect=torch.optim.AdamW.step) as updates:
        said = refused(RUN + "broken --model nan --micro-batch-size 1")
    assert f"step {len(log('broken'))}: " in said and re.findall(r"rows.jsonl:(\d+)", said) == ["10"]
    assert updates.call_count == len(log("broken")) > 0

def test_command_line(monkeypatch):
    """From text to a folder that transformers opens, whose README's Python runs and agrees with encode; losses fall."""
    done, names = launch([llara.__file__, *"--data articles.jsonl --steps 30 --batch-size 16 --output new".split()]), {}
    assert done.returncode == 0 and "ln V" in done.stdout, done.stderr
    assert {"loss", "AR", "EBAE", "EBAR", "lr", "grad_norm", "tokens/s"} < {*(rows := log("new"))[29]}
    for key in ("AR", "EBAE", "EBAR"):
        assert np.mean([row[key] for row in rows[-5:]]) < np.mean([row[key] for row in rows[:5]]) - 0.1
    monkeypatch.chdir("new")
    exec(re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.S).group(1), names)
    for kind, prompt in (AutoModelForCausalLM, "self"), (AutoModel, "next"):
        ours, = llara.encode(kind.from_pretrained("."), AutoTokenizer.from_pretrained("."), ["A llama."], prompt)
        same(torch.tensor(ours), names["embed"]("A llama.", names[prompt.upper()]))

def test_refusals():
    """Whatever is wrong with rows, files or arguments: one sentence that names it, and nothing is overwritten."""
    for line in ('{"text": "cut', '{"text": " "}', '{"txt": "a"}', '{"text": "\\ud800"}', '["text"]', '{"text": 3}',
                 '{"text": "a", "title": 3}', '{"input": "a", "output_predict": "b"}', '{"text": "\xff"}', "[" * 9999):
        Path("bad.jsonl").write_text('{"text": "good"}\n' + line + '\n{"text": "good"}\n', encoding="latin-1")
        assert "bad.jsonl:2: " in refused(RUN + "bad --data bad.jsonl --overwrite")
    Path("void").mkdir(), Path("cut.jsonl.gz").write_bytes(gzip.compress(b"{}" * 999)[:-9])
    for flags, said in (("--data none.jsonl", "none."), ("--data cut.jsonl.gz", "cut."),
                        ("--data void", "void: no rows"), ("--model void", "void: ")):
        assert said in refused(RUN + f"bad --overwrite {flags}")
    with pytest.raises(llara.BadInput, match="--batch-size 8 leaves some of 9 ranks without work"):
        steps(world=9)
    with open("bad/log.jsonl", "a") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        assert "another run" in launch([llara.__file__, *(RUN + "bad --overwrite").split()]).stderr
    os.symlink("../rows.jsonl", "void/metrics.json")
    assert "void/metrics.json is a symbolic link" in refused(RUN + "void --overwrite")
    before = sorted(Path(".").rglob("*"))
    assert "in use" in refused(RUN + ".") and sorted(Path(".").rglob("*")) == before

# ---- eval.py -----------------------------------------------------------------------------------------------------
def trec_cases():
    """Five queries full of ties, negative and zero grades, unjudged and unretrieved documents."""
    r = random.Random(7)
    for q in range(5):
        docs = [f"d{i}" for i in range(30)] + ["D1", "é", "d"]
        scores = {d: r.choice([0.5, 0.5 + 1e-9, 0.25, -1.0, 2.0]) for d in r.sample(docs, [33, 20, 5, 1, 33][q])}
        yield {d: r.choice([-1, 0, 0, 1, 2, 3]) for d in r.sample(docs + ["unseen"], 16)}, scores

TREC_EVAL = [(0.1852949, 0.2500000, 0.2500000, 1.0000000, 1.0000000, 0.2059753),  # as pytrec_eval has them
             (0.1977207, 0.3333333, 0.1428571, 0.2857143, 0.2857143, 0.0695971),
             (0.0689358, 0.3333333, 0.1666667, 0.1666667, 0.1666667, 0.0555556),
             (0.3189139, 1.0000000, 0.1428571, 0.1428571, 0.1428571, 0.1428571),
             (0.2400728, 0.5000000, 0.4000000, 1.0000000, 1.0000000, 0.2326944)]

def test_measure_is_trec_eval():
    for (grades, scores), expected in zip(trec_cases(), TREC_EVAL):
        assert list(evaluation.measure(grades, scores).values()) == pytest.approx(expected, abs=1e-6)
    for grades, scores in ({"a": 1}, {}), ({"a": 0}, {"a": 1}):
        assert not any(evaluation.measure(grades, scores).values())

@pytest.mark.parametrize("n, k, block", [(700, 20, 64), (700, 20, 1024), (5, 20, 64), (300, 200, 64), (300, 1, 320)])
def test_search_is_exact_and_orders_ties(n, k, block):
    r = np.random.default_rng(n + k)
    queries, passages = r.integers(-1, 2, (30, 6)).astype("float32"), r.integers(-1, 2, (n, 6)).astype("float16")
    keys = r.permutation(n)
    scores, found = evaluation.unpack(evaluation.search(torch.from_numpy(queries), passages, keys, k, block))
    for i in range(30):
        every = sorted((-float(queries[i] @ passages[j]), keys[j]) for j in range(n))[:k]
        assert [(-s, key) for s, key in zip(scores[i].tolist(), found[i].tolist()) if s > -np.inf] == every

def write_collection(folder, corpus, queries, qrels, split="test"):
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, rows in ("corpus", corpus), ("queries", queries):
        (folder / f"{name}.jsonl").write_text("".join((r if r == "{" else json.dumps(r)) + "\n" for r in rows))
    (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels if "\n" in qrels else qrels)
    return folder

@pytest.fixture(scope="module")
def collection(tmp_path_factory):  # a tiny random model, and 700 documents: two chunks
    folder, r = tmp_path_factory.mktemp("eval"), random.Random(0)
    texts = [" ".join(r.choices("llama alpaca wool hat sun moon tree".split(), k=r.randint(0, 30))) for _ in range(700)]
    llara.small_model(texts, folder / "model", vocab_size=400)
    corpus = [{"_id": f"d{i}", "title": "T" * (i % 2), "text": t} for i, t in enumerate(texts)]
    queries = [{"_id": f"d{i}", "text": "a hat of wool " + texts[i][:40]} for i in range(0, 40)]
    qrels = [f"d{i}\td{i + j}\t{j}\n" for i in range(30) for j in range(3)] + ["no\tnone\t1\n"]
    write_collection(folder / "data", corpus, queries, "".join(qrels))
    return folder

def evaluate(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, args)])
    evaluation.main()

def test_resume_ranks_and_report(collection, monkeypatch, capsys):
    common = ["--model", collection / "model", "--data", collection / "data", "--skip-identical-ids", "--output"]
    evaluate(monkeypatch, *common, collection / "one")
    report = json.loads((collection / "one/metrics.json").read_text())["collections"]["data"]
    assert "1 judged queries are not in queries.jsonl: they score 0 (no" in capsys.readouterr().out
    assert len(report["per_query"]) == 31 and report["queries"] == 31 and not any(report["per_query"]["no"].values())
    lines = [line.split() for line in (collection / "one/run.trec").read_text().splitlines()]
    assert len(lines) == 30 * 699 and all(q != d for q, _, d, *_ in lines)
    order = [(q, -np.float32(score)) for q, _, _, _, score, _ in lines]
    assert all(a[1] <= b[1] for a, b in zip(order, order[1:]) if a[0] == b[0])
    two_ranks(evaluation.__file__, *common, collection / "two")
    assert (collection / "two/run.trec").read_bytes() == (collection / "one/run.trec").read_bytes()
    whole = (file := next((collection / "one").glob("corpus-*"))).read_bytes()
    os.truncate(file, 600 * 128 * 4 + 5)  # as after a kill: a chunk and a bit
    calls, embed = [], evaluation.embed
    monkeypatch.setattr(evaluation, "embed", lambda lm, ids, n: calls.append(len(n)) or embed(lm, ids, n))
    evaluate(monkeypatch, *common, collection / "one")
    assert file.read_bytes() == whole and sum(calls) == 700 - 512
    evaluate(monkeypatch, *common, collection / "one", "--passage-length", "100", "--top-k", "50")
    assert (collection / "one/run.trec").read_text().count("\n") == 30 * 50  # own ids go before the cut, not after
    assert file.read_bytes() == whole and len(list((collection / "one").glob("corpus-*"))) == 2  # of another setting

def test_encode_is_llara_encode(collection):
    loaded, texts = evaluation.load(collection / "model", torch.float32, "cpu"), evaluation.Texts(
        collection / "data/corpus.jsonl")
    rows, vectors = evaluation.encode(*loaded, texts, range(50), "self", 90, collection / "x", budget=300)
    expected = llara.encode(*loaded[:2], [texts[i][1] for i in rows], "self", 90)
    assert sorted(rows) == list(range(50)) and np.abs(vectors - expected).max() < 1e-5

ROW, QUERY, JUDGED = {"_id": "d", "text": "t"}, {"_id": "q", "text": "t"}, "q\td\t1\n"

@pytest.mark.parametrize("sentence, args, corpus, queries, qrels", [
    ("corpus.jsonl:2: the id 'd' is also that of", "", [ROW, ROW], [QUERY], JUDGED),
    ("corpus.jsonl: no rows in there", "", [], [QUERY], JUDGED),
    ("corpus.jsonl:2: not a row", "", [ROW, "{"], [QUERY], JUDGED),
    ("queries.jsonl:1: not a row", "", [ROW], [{"_id": "a b", "text": ""}], JUDGED),
    ("test.tsv:1: 'q\\td\\t1' should be a header", "", [ROW], [QUERY], "q\td\t1"),
    ("test.tsv:2: 'q d 1' should be", "", [ROW], [QUERY], "q d 1\n"),
    ("test.tsv:2: ", "", [ROW], [QUERY], "q\td\t1.5\n"),
    ("holds no judgement", "", [ROW], [QUERY], "query-id\tcorpus-id\tscore"),
    *((sentence, args, [ROW], [QUERY], JUDGED) for args, sentence in {
        "--split dev": "dev.tsv: cannot be read", "--data nowhere": "nowhere/qrels/test.tsv: cannot be read",
        "--model nowhere/at/all": "cannot be loaded", "--passage-length 9": "leaves no room",
        "--top-k 0": "--top-k at least 1"}.items())])
def test_bad_input_is_a_sentence(collection, tmp_path, monkeypatch, sentence, args, corpus, queries, qrels):
    data = write_collection(tmp_path / "data", corpus, queries, qrels)
    with pytest.raises(SystemExit) as e:
        evaluate(monkeypatch, "--model", collection / "model", "--data", data, "--output", tmp_path, *args.split())
    assert str(e.value).startswith("eval.py: ") and sentence in str(e.value) and "\n" not in str(e.value)

def test_python_collection(tmp_path, monkeypatch):
    long = "It has a rest that is long enough to be worth a search, with more than fifteen words in all, so it is kept."
    (tmp_path / "m.py").write_text("".join(f'def {f}():\n  """Make f from a thing.\n\n  {long}"""\n' for f in "fg"))
    monkeypatch.setattr(llara.sysconfig, "get_path", lambda _: str(tmp_path))
    evaluation.python_collection(tmp_path / "out")
    assert evaluation.Texts(tmp_path / "out/queries.jsonl")[0] == ("0", "Make from a thing.")
    assert evaluation.Texts(tmp_path / "out/corpus.jsonl")[0] == ("0", long)
    assert evaluation.read_qrels(tmp_path / "out/qrels/test.tsv") == {"0": {"0": 1}}

def test_model_without_special_tokens(collection, tmp_path):
    file = shutil.copytree(collection / "model", tmp_path / "other") / "tokenizer.json"
    file.write_text(file.read_text().replace("<s16>", "<x16>"))
    with pytest.raises(llara.BadInput, match="not one token each"):
        evaluation.load(file.parent, torch.float32, "cpu")
