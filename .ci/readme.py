# SPDX-License-Identifier: MIT
"""Runs all code of README.md in order, as a new user would: in an empty folder, in a fresh
environment, each block on what the ones before it left.

    python .ci/readme.py [FOLDER]    # default: a temporary one, removed at the end

What cannot be had here has a small stand-in (REPLACED, STAND_INS), and runs are shortened. What is
not run is named (LEFT_OUT). A block that fails ends it, with its line in README.md.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Pattern, what stands for it. In this order, on every block.
REPLACED = [
    (r"HuggingFaceTB/SmolLM2-135M-Instruct|Qwen/Qwen3-0\.6B", "small"),
    (r"^torchrun llara\.py$", "torchrun llara.py --steps 20"),
    (r"--steps 80", "--steps 4"),
    (r"(--max-length 512)( --gradient-checkpointing)", r"\1 --steps 2 --batch-size 4\2"),
    (r"--collections .*$", "--collections newwiki:test cranfield:test scifact:test --quick"),
]

# What a block holds, why it is not run.
LEFT_OUT = [
    ("pytest", "the tests: .ci/run runs them"),
    ("--nproc-per-node 8", "eight GPUs, and two machines of eight"),
]

# Run in the folder as soon as there is an environment.
STAND_INS = """
import json
from pathlib import Path
from pydoc_data.topics import topics
import llara

llara.make_small_model(topics.values(), Path("small"))

def write(path, rows):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\\n" for row in rows))

write("wiki.jsonl", [{"title": title, "text": text} for title, text in topics.items()])
parts = [text.strip().partition("\\n\\n")[2].strip() for text in topics.values()]
parts = [part for part in parts if len(part) > 400]
documents = [{"_id": f"d{i}", "text": part[200:]} for i, part in enumerate(parts)]
queries = [{"_id": f"q{i}", "text": part[:200]} for i, part in enumerate(parts)]
header = "query-id\\tcorpus-id\\tscore\\n"
judgements = header + "".join(f"q{i}\\td{i}\\t1\\n" for i in range(len(parts)))
for name in ("newwiki", "cranfield", "scifact"):
    write(f"{name}/corpus.jsonl", documents)
    write(f"{name}/queries.jsonl", queries)
    for split in ("train", "test"):
        Path(name, "qrels").mkdir(exist_ok=True)
        Path(name, "qrels", f"{split}.tsv").write_text(judgements)
write("newwiki-train.jsonl", [{"query": part[:200], "pos": [part[200:]]} for part in parts])
"""


def code_blocks(text: str) -> list[tuple[int, str, str]]:
    """-> (line in README.md, language, code) of each block that names its language."""
    blocks = []
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, match.start()) + 1
        blocks.append((line, match[1], match[2]))
    return blocks


def shortened(code: str) -> str:
    for pattern, replacement in REPLACED:
        code = re.sub(pattern, replacement, code, flags=re.MULTILINE)
    return code


def make_script(folder: Path) -> str:
    """One script of bash for all blocks, so that variables and the environment last.

    Python blocks are files of the folder. The stand-ins follow the first block, which makes the
    environment.
    """
    script = [
        "set -eE -o pipefail",
        "trap 'echo \"README.md:$LINE: failed\"' ERR",
        "LINE=1",
    ]
    is_first = True
    for line, language, code in code_blocks((folder / "README.md").read_text()):
        reasons = [reason for what, reason in LEFT_OUT if what in code]
        if language not in ("bash", "python") or reasons:
            print(f"README.md:{line}: not run: {(reasons or [language])[0]}", flush=True)
            continue
        script.append(f'LINE={line}; echo; echo "===== README.md:{line}, $SECONDS s"')
        if language == "python":
            (folder / f"block-{line}.py").write_text(shortened(code))
            script.append(f"python block-{line}.py")
        else:
            script.append(shortened(code))
        if is_first:
            (folder / "stand_ins.py").write_text(STAND_INS)
            script.append("python stand_ins.py")
            is_first = False
    return "\n".join([*script, 'echo; echo "all of README.md ran, $SECONDS s"'])


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        folder.mkdir(exist_ok=True)
        if any(folder.iterdir()):
            sys.exit(f"{folder}: is not empty")
        for file in ("llara.py", "eval.py", "test_llara.py", "requirements.txt", "README.md"):
            shutil.copy(ROOT / file, folder)
        shutil.copytree(ROOT / ".ci", folder / ".ci")
        (folder / "blocks.sh").write_text(make_script(folder))
        sys.exit(subprocess.run(["bash", "blocks.sh"], cwd=folder).returncode)


if __name__ == "__main__":
    main()
