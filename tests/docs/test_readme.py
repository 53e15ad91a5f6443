"""README is true: every file that it shows is written, and every command that it shows is run, word for word and in
order.

Models, tasks and the demo's spec are small stand-ins under the names that README uses. Two commands are not run here,
because a test of one process cannot run them as a reader does; ELSEWHERE names where they are run.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from flows.cli.main import main
from mergecore import merge
from mergecore.registry import METHODS
from tests.docs.world import REPOSITORY, Block, blocks, run, write_world

README = REPOSITORY / "README.md"
LONGEST = 160
"""Lines: what is longer has a page in docs/."""
ELSEWHERE = {
    "make setup": (".ci/run", "make check"),  # the first thing in a fresh clone; `check` depends on `setup`
    "source .venv/bin/activate": (
        "tests/docs/world.py",
        '"PATH": f"{BIN}',
    ),  # what it does is done to every command here
    "make serve": (
        "tests/flows/test_services.py",
        "services.serve(",
    ),  # on free ports; the next test shows that it is this
}
"""Command of README → the file that runs it, and the text there that does."""
SHOWS = {
    "make demo": "everything was found in the store",  # the demo's spec is README's own, and its sweep comes before
    "mergeloom merge recipe.yaml merged": "digest",
    "mergeloom plan sweep.yaml": "8 cells",
    "mergeloom sweep sweep.yaml": "# mine: scores on test items",
    "mergeloom report sweep.yaml": "# mine: scores on test items",
    "mergeloom track sweep.yaml": "runs written",
    "mergeloom merge mergekit.yaml --show": "method: ties",
    "mergeloom merge mergekit.yaml from-mergekit": "digest",
}
"""Command of README → what it must print."""


def shown() -> list[Block]:
    return list(blocks(README))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone as README's reader has it after `make setup`, with a small demo in place of the real one."""
    folder = write_world(tmp_path_factory.mktemp("readme"))
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, folder / name)
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(REPOSITORY / ".venv" / "bin")
    (folder / ".venv" / ".ready").touch()
    for name in ("base/config.json", "tasks/data/items"):
        (folder / "examples" / name).parent.mkdir(parents=True)
        (folder / "examples" / name).touch()
    spec = next(block.text for block in shown() if block.file == "sweep.yaml")
    (folder / "examples" / "demo.yaml").write_text(spec)
    for block in shown():
        if block.file:
            (folder / block.file).write_text(block.text)
    return folder


@pytest.mark.timeout(1800)  # servers and workers are started on two cores that others share
def test_every_command_runs(project: Path) -> None:
    commands = [command for block in shown() for command in block.commands]
    assert len(commands) == len(set(commands))
    assert set(commands) == {*ELSEWHERE, *SHOWS}, (
        "a command of README is run by nothing, or stands in a table here only"
    )
    for command in sorted(SHOWS, key=lambda command: (command == "make demo", commands.index(command))):
        assert SHOWS[command] in run(command, project), command
    assert (project / "merged" / "model.safetensors").exists() and (project / "from-mergekit" / "mergekit.yml").exists()


@pytest.mark.parametrize("command", ELSEWHERE)
def test_what_is_run_elsewhere_is_run_there(command: str) -> None:
    file, text = ELSEWHERE[command]
    assert text in (REPOSITORY / file).read_text()


def test_make_targets_are_what_runs_elsewhere(project: Path) -> None:
    assert re.search(r"^check: setup", (project / "Makefile").read_text(), re.MULTILINE)
    assert run("make --dry-run serve", project).split()[-3:] == ["serve", "--store", ".mergeloom"]


def test_tensors_are_merged_in_python(project: Path) -> None:
    printed = run("python merge_tensors.py", project)
    assert "tensor([2., 3., 0., 0.])" in printed


def test_the_method_is_a_method(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README's class, word for word, merges in memory and by a recipe."""
    median = imported(project / "median_merge.py").Median
    base = {"w": torch.zeros(3)}
    experts = [{"w": torch.tensor(values)} for values in ([1.0, 0.0, 4.0], [2.0, 0.0, 5.0], [9.0, 3.0, 6.0])]
    assert merge(median(), base=base, experts=experts)["w"].tolist() == [2.0, 0.0, 5.0]
    monkeypatch.setitem(METHODS.own, "median", median)
    recipe = (project / "recipe.yaml").read_text().replace("method: ties\ndensity: 0.2", "method: median")
    (project / "median.yaml").write_text(recipe)
    monkeypatch.chdir(project)
    result = CliRunner().invoke(main, ["merge", "median.yaml", "median"])
    assert result.exit_code == 0, result.output
    merged, parts = (load_file(project / name / "model.safetensors") for name in ("median", "models/base"))
    assert merged.keys() == parts.keys() and any(not torch.equal(merged[name].float(), parts[name]) for name in merged)


def test_the_number_of_methods_is_theirs() -> None:
    count = len(METHODS.own)
    assert f"**{count} methods**" in README.read_text()
    assert f"– {count} of them" in (REPOSITORY / "docs" / "index.md").read_text()


def test_it_is_short() -> None:
    assert len(README.read_text().splitlines()) <= LONGEST


def imported(path: Path) -> ModuleType:
    specification = importlib.util.spec_from_file_location(path.stem, path)
    assert specification and specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
