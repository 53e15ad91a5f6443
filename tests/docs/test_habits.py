"""The version comes from one place, the changelog knows it, and a commit's subject is short."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import mergeloom

REPOSITORY = Path(__file__).parents[2]
CHECK = REPOSITORY / ".ci" / "check_subject.py"
TARGETS = {"setup", "check", "test", "coverage", "docs"}


def test_the_version_stands_in_one_place() -> None:
    version = mergeloom.__version__
    command = [Path(sys.executable).with_name("mergeloom"), "--version"]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=True).stdout
    assert printed.split()[-1] == importlib.metadata.version("mergeloom") == version
    code = [path for name in ("mergecore", "tasks", "flows", "mergeloom") for path in (REPOSITORY / name).rglob("*.py")]
    literal = re.compile(rf"[\"']{re.escape(version)}[\"']")
    holders = [path for path in [*code, REPOSITORY / "pyproject.toml"] if literal.search(path.read_text())]
    assert holders == [REPOSITORY / "mergeloom" / "__init__.py"]


def test_the_changelog_has_a_section_for_the_version() -> None:
    sections = re.findall(r"^## (\S+)", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert sections[0] == "Unreleased" and mergeloom.__version__ in sections


@pytest.mark.parametrize(
    ("message", "right"),
    [
        ("Keep schedules people made\n\nThey were switched off by a deploy.\n", True),
        ("Keep schedules people made", True),
        ("x" * 72, True),
        ("x" * 73, False),
        ("Keep schedules.", False),
        ("Keep schedules\npeople made", False),
        ("", False),
        ("# a comment of git's\nKeep schedules", True),
        (f"Merge branch '{'x' * 80}'", True),
    ],
)
def test_subjects_of_commits(tmp_path: Path, message: str, right: bool) -> None:
    file = tmp_path / "message"
    file.write_text(message)
    result = subprocess.run([sys.executable, CHECK, file], capture_output=True, text=True, check=False)
    assert result.returncode == (0 if right else 1), result.stderr
    assert bool(result.stderr) is not right


def test_the_workflow_and_ci_call_targets_that_the_makefile_has() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text())
    commands = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    called = {command.removeprefix("make ") for command in commands if command.startswith("make ")}
    assert called == TARGETS
    local = re.findall(r"^make (\w+)$", (REPOSITORY / ".ci" / "run").read_text(), re.MULTILINE)
    assert sorted(local) == ["check", "test"], "each of them once"
    for target in {*called, *local}:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_hooks_run_what_the_environment_has() -> None:
    config = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repository in config["repos"] for hook in repository["hooks"]]
    assert {repository["repo"] for repository in config["repos"]} == {"local"}
    assert {hook["language"] for hook in hooks} == {"system"}
    for hook in hooks:
        program = hook["entry"].split()[0]
        assert program == "git" or (REPOSITORY / program).exists(), program
