"""The build hook: imports of `flows` and `tasks` are rewritten, and what cannot be is refused."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from hatch_build import MOVED, RelocationError, relocate, rewritten
from tests.mergeloom.installed import REPOSITORY

MODULES = frozenset({"flows", "flows.sweep", "flows.cli", "flows.cli.main", "tasks", "tasks.work"})


def changed(source: str) -> str:
    return rewritten(source.encode(), "file.py", MODULES).decode()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from flows import sweep", "from mergeloom.flows import sweep"),
        (
            "from  flows.cli.main import (\n    a,\n    b,\n)",
            "from  mergeloom.flows.cli.main import (\n    a,\n    b,\n)",
        ),
        (
            "def f():\n    from tasks import work  # of flows",
            "def f():\n    from mergeloom.tasks import work  # of flows",
        ),
        ("import os, tasks.work as w, flows as f", "import os, mergeloom.tasks.work as w, mergeloom.flows as f"),
        ("é = 'ü'; from tasks import work", "é = 'ü'; from mergeloom.tasks import work"),
        ("run('-m', 'flows.sweep')", "run('-m', 'mergeloom.flows.sweep')"),
        ('name = r"flows.cli.main:main"', 'name = r"mergeloom.flows.cli.main:main"'),
        ('import_module("tasks")', 'import_module("mergeloom.tasks")'),
        ('importlib.import_module("flows.sweep")', 'importlib.import_module("mergeloom.flows.sweep")'),
    ],
)
def test_names_of_modules_are_rewritten(source: str, expected: str) -> None:
    assert changed(source) == expected


@pytest.mark.parametrize(
    "source",
    [
        '"""See flows/sweep.py, and `python -m flows.sweep` in the repository."""',
        "tasks = spec['tasks']\ntasks.items()\nflows = 3\n",
        "from workflows.sweep import tasks",
        "from .tasks import work",
        "held = {'tasks': names, 'flows': 3}",
        "text = 'all tasks. Then flows. And tasks.'",
        "import subtasks, mergeloom.flows",
    ],
)
def test_everything_else_stays(source: str) -> None:
    assert changed(source) == source


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("import flows.sweep", r"file.py:1: write `from flows.sweep import …` for `import flows.sweep`"),
        ("import tasks", "write `from tasks import"),
        ("\nlogger = f'flows.{name}'", "file.py:2: the name of a module is put together"),
        ("name = 'flows.nothing'", "'flows.nothing' looks like the name of a module, and there is none"),
        ("name = 'flows' '.sweep'", "is written in a way that is not rewritten"),
        ("text = 'python -m flows.cli'", "does not exist in the wheel"),
        ("path = 'flows/sweep.py:sweep'", "does not exist in the wheel"),
        ("text = f'{python} -m tasks.work {x}'", "does not exist in the wheel"),
    ],
)
def test_what_cannot_be_rewritten_fails_the_build(source: str, error: str) -> None:
    with pytest.raises(RelocationError, match=error):
        changed(source)


def test_the_repository_is_relocated_whole(tmp_path: Path) -> None:
    relocate(REPOSITORY, tmp_path / "mergeloom")
    for package in MOVED:
        originals = {path.relative_to(REPOSITORY) for path in (REPOSITORY / package).rglob("*.py")}
        copies = {path.relative_to(tmp_path / "mergeloom") for path in (tmp_path / "mergeloom" / package).rglob("*.py")}
        assert originals == copies
    for path in tmp_path.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert str(node.module).partition(".")[0] not in MOVED, path
            if isinstance(node, ast.Import):
                assert not [alias for alias in node.names if alias.name.partition(".")[0] in MOVED], path


def test_other_files_that_name_a_module_are_refused(tmp_path: Path) -> None:
    for package in ("mergeloom", "mergecore", *MOVED):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    (tmp_path / "flows" / "sweep.py").write_text("from tasks import work\n")
    (tmp_path / "flows" / "notes.txt").write_text("a note\n")
    relocate(tmp_path, tmp_path / "first")
    assert (tmp_path / "first" / "flows" / "notes.txt").read_text() == "a note\n"
    (tmp_path / "flows" / "settings.yaml").write_text("entrypoint: flows.sweep:sweep\n")
    with pytest.raises(RelocationError, match=r"settings.yaml names a module of flows or tasks"):
        relocate(tmp_path, tmp_path / "second")
    (tmp_path / "flows" / "settings.yaml").unlink()
    (tmp_path / "mergecore" / "bad.py").write_text("from flows import sweep\n")
    with pytest.raises(RelocationError, match=r"bad.py names one of the packages"):
        relocate(tmp_path, tmp_path / "third")
