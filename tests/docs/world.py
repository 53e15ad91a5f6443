"""What the documentation's examples stand on: a folder with small models, tasks and recipes under the names that pages
use.

models/base, models/science, models/facts    a language model of a megabyte, a full fine-tune, a LoRA adapter
tasks/                                        tasks with the names of lm-eval's own: sciq, openbookqa, arc_challenge
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests import tiny_lm

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
TASKS = ("sciq", "openbookqa", "arc_challenge")
SHELLS = ("sh", "bash", "console")
FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[\w-]*)(?P<rest>[^\n]*)\n(?P<text>.*?)^(?P=indent)```\s*$",
    re.MULTILINE | re.DOTALL,
)
FILE = re.compile(r"^# (?P<path>[\w./-]+\.(?:yaml|yml|py|toml))\b")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, its text, the line it begins at, and the file that its first line
    names.
    """

    language: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The path in a first line such as `# recipe.yaml`; None where there is none."""
        match = FILE.match(self.text)
        return match["path"] if match else None

    @property
    def commands(self) -> list[str]:
        """The commands of a block for the shell: a line each, continued lines joined, comments left out."""
        if self.language not in SHELLS:
            return []
        lines = self.text.replace("\\\n", " ").splitlines()
        plain = (re.sub(r"(^|\s)#.*$", "", line).strip() for line in lines)
        return [line for line in plain if line]


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page, in order, with the indentation of their fence taken away."""
    text = page.read_text(encoding="utf-8")
    for match in FENCE.finditer(text):
        indent = match["indent"]
        body = "\n".join(line.removeprefix(indent) for line in match["text"].splitlines()) + "\n"
        yield Block(match["language"], body, text.count("\n", 0, match.start()) + 1)


def write_world(folder: Path) -> Path:
    """Write models and tasks into `folder`; return it."""
    base = tiny_lm.write_base(folder / "models" / "base")
    tiny_lm.write_expert(base, folder / "models" / "science", seed=1)
    tiny_lm.write_adapter(base, folder / "models" / "facts", seed=2)
    tasks = tiny_lm.write_tasks(folder / "tasks", items=12)
    for name in TASKS:
        (tasks / f"{name}.yaml").write_text(tiny_lm.CHOICE.lstrip().replace("tiny_choice", name))
    # Three tasks with the same items would be one task with three names: each has its own.
    for number, name in enumerate(TASKS):
        path = tasks / f"{name}.yaml"
        path.write_text(path.read_text().replace("data/choice", f"data/{name}"))
        for split in ("train", "validation", "test"):
            lines = (tasks / "data" / f"choice.{split}.jsonl").read_text().splitlines()
            items = [json.loads(line) for line in lines]
            for item in items:
                item["question"] = f"{name} {number}: {item['question']}"
            (tasks / "data" / f"{name}.{split}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


def user(folder: Path) -> Mapping[str, str]:
    """The variables of a user who has activated the environment and works in `folder`, offline."""
    return {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),
        "PREFECT_HOME": str(folder / "prefect"),
    }


def run(command: str, folder: Path, *packages: Path, seconds: float = 600) -> str:
    """Run a command of a page in `folder` as a shell does; return what it printed. Raises AssertionError if it fails.

    packages: folders of packages that count as installed.
    """
    environment = {**user(folder), "PYTHONPATH": os.pathsep.join(map(str, [REPOSITORY, *packages]))}
    result = subprocess.run(
        [shutil.which("bash") or "bash", "-c", command], cwd=folder, env=environment, capture_output=True,
        text=True, timeout=seconds, check=False,
    )  # fmt: skip
    assert result.returncode == 0, f"`{command}` ended with {result.returncode}:\n{result.stdout}\n{result.stderr}"
    return result.stdout + result.stderr
