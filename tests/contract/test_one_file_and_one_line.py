"""A method of this repository is one file and one line: a copy of the repository is given one."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PULLED = '''
"""The mean of the task vectors, pulled towards the base."""

from collections.abc import Sequence
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from mergecore.plugins.examples import Examples
from mergecore.plugins.method import DeltaMethod, NoArguments


class Pulled(DeltaMethod[NoArguments]):
    """θ_0 + (1 − pull) · mean of τ_t."""

    name: ClassVar[str] = "pulled"
    paper: ClassVar[str] = "an example of a test"

    pull: Annotated[float, Field(ge=0, le=1, description="share of the base in the result")]

    @classmethod
    def examples(cls) -> Examples:
        return Examples(golden=[{"pull": 0.5}], others=[{"pull": 0.25}])

    @property
    def idempotent(self) -> bool:
        return False

    def merge(self, base: Tensor, deltas: Sequence[Tensor], arguments: NoArguments) -> Tensor:
        total = deltas[0]
        for delta in deltas[1:]:
            total = total + delta
        return base + total * ((1 - self.pull) / len(deltas))
'''
COPIED = ("mergecore", "mergeloom", "flows", "tasks", "tests", "docs", "pyproject.toml")


def digests(folder: Path) -> dict[str, str]:
    """Return every file's path and SHA-256, without what running leaves behind."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not {"__pycache__", ".pytest_cache"} & set(path.parts)
    }


def run(folder: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.timeout(900)
def test_a_method_is_one_file_and_one_line(tmp_path: Path) -> None:
    for name in COPIED:
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, tmp_path / name)
    before = digests(tmp_path)
    shelf = tmp_path / "mergecore" / "methods"
    (shelf / "pulled.py").write_text(PULLED)
    with (shelf / "__init__.py").open("a") as listed:
        listed.write("from mergecore.methods.pulled import Pulled as Pulled\n")

    run(tmp_path, "-m", "tests.golden.golden")
    page = run(tmp_path, "-m", "mergeloom", "methods", "--markdown")
    (tmp_path / "docs" / "methods.md").write_text(page)
    after = digests(tmp_path)
    changed = {path for path in after if after[path] != before.get(path)}
    assert changed == {
        "mergecore/methods/pulled.py", "mergecore/methods/__init__.py", "tests/golden/golden.json", "docs/methods.md",
    }  # fmt: skip
    assert "\n## pulled\n" in page

    tests = ["tests/contract/test_methods.py", "tests/contract/test_edges.py", "tests/golden"]
    said = run(tmp_path, "-m", "pytest", "-p", "no:cacheprovider", *tests, "-k", "pulled or small")
    passed = re.search(r"(\d+) passed", said)
    assert passed and int(passed[1]) >= 20, said
    code = "import mergecore; print(mergecore.methods.Pulled.__module__)"
    assert run(tmp_path, "-c", code).strip() == "mergecore.methods.pulled"
