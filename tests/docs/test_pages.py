"""What the pages of the site say is so: recipes run, specs plan, commands and options exist, links lead somewhere."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from flows.cli.main import main
from tests.docs.world import BIN, FENCE, REPOSITORY, SHELLS, Block, blocks, run, write_world

DOCS = REPOSITORY / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if path.parent.name != "design")
TOP = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
VARIABLE = r"…|'\w+'|\d+(?:\.\d+)*|\b(?:validation|training|test)\b,?"
"""What stands in a message for something else than these words."""
MESSAGES = re.compile(r"^\| `([^`]+)` \|", re.MULTILINE)


def identifier(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def folder(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, fresh, with the models and tasks that pages use."""
    for name in ("models", "tasks"):
        shutil.copytree(world / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def called(command: str) -> str:
    """Call the command line in this process; return what it printed. README's commands run in a shell:
    test_readme.py.
    """
    words = shlex.split(command)
    assert words[0] == "mergeloom"
    result = CliRunner().invoke(main, words[1:])
    assert result.exit_code == 0, f"{command}\n{result.output}\n{result.exception!r}"
    return result.output


def written(page: Path, folder: Path) -> Iterator[Block]:
    """Write the files that a page shows; yield its blocks."""
    for block in blocks(page):
        if block.file:
            path = folder / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
        yield block


def test_every_command_of_one_merge_runs(folder: Path) -> None:
    """All recipes of the page are made: those it has a command for, and those it only shows."""
    page, names = DOCS / "guides" / "one-merge.md", list[str]()
    for block in written(page, folder):
        names += [block.file] if block.file else []
        for command in block.commands:
            called(command)
            names = [name for name in names if name not in command]
    assert "rules.yaml" in names and "stack.yaml" in names
    for name in names:
        called(f"mergeloom merge {name} out-{name}")
        assert list((folder / f"out-{name}").glob("*.safetensors"))


def test_specs_of_the_guides_are_planned(folder: Path) -> None:
    for block in written(DOCS / "guides" / "sweep.md", folder):
        if block.file:
            assert "cells" in called(f"mergeloom plan {block.file}")


def test_a_task_of_ones_own_is_found(folder: Path) -> None:
    page = list(written(DOCS / "guides" / "your-own-tasks.md", folder))
    item = next(block.text for block in page if block.language == "json")
    for split in ("train", "validation", "test"):
        (folder / "tasks" / "data" / f"colours.{split}.jsonl").write_text(item)
    spec = {
        "name": "colours",
        "base": "models/base",
        "experts": [{"name": "science", "source": "models/science", "tasks": ["colours"]}],
        "methods": [{"method": "average"}],
        "counts": [1],
        "evaluate": {"path": "tasks", "held_in": {"language": ["colours"]}, "validation": {}},
    }
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    assert "cells" in called("mergeloom plan spec.yaml")


def test_a_method_of_a_package_is_known_by_its_name(folder: Path) -> None:
    """What the guide's `pyproject.toml` says is installed by hand: `pip install` needs what the package is built with.
    tests/mergeloom builds and installs packages."""
    commands = [
        command for block in written(DOCS / "guides" / "your-own-method.md", folder) for command in block.commands
    ]
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    package = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    package.mkdir()
    (package / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    )
    groups = [
        "\n".join([f"[{group}]", *(f"{name} = {target}" for name, target in entries.items())])
        for group, entries in project["entry-points"].items()
    ]
    (package / "entry_points.txt").write_text("\n".join(groups) + "\n")
    assert commands[0] == "pip install ."
    assert "share of the base in the result" in run(commands[1], folder, folder)
    assert "digest" in run(commands[2], folder, folder)


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=identifier)
def test_python_runs(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All Python of a page, in order, in one folder with the files that the sweep guide shows."""
    monkeypatch.syspath_prepend(str(folder))
    list(written(DOCS / "guides" / "sweep.md", folder))
    for block in written(page, folder):
        if block.language == "python":
            exec(compile(block.text, f"{page.name}:{block.line}", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("page", [*PAGES, *TOP], ids=identifier)
def test_commands_and_their_options_exist(page: Path) -> None:
    for block in blocks(page):
        lines = block.commands if block.language in SHELLS else Block("sh", block.text, block.line).commands
        for command in (part for line in lines for part in line.split("&&")):
            if not command.strip().startswith(("make ", "mergeloom ")):
                continue
            words = shlex.split(command)
            if words[0] == "make":
                makefile = (REPOSITORY / "Makefile").read_text()
                assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), f"{page.name}:{block.line}: {command}"
            if words[0] == "mergeloom":
                _check(words[1:], f"{page.name}:{block.line}: {command}")


def _check(words: list[str], where: str) -> None:
    command = main.commands[words[0]]
    with click.Context(command) as context:
        try:
            command.parse_args(context, list(words[1:]))
        except click.UsageError as error:
            raise AssertionError(f"{where}: {error.message}") from None


@pytest.mark.parametrize("page", [*PAGES, *TOP], ids=identifier)
def test_blocks_are_what_they_say(page: Path) -> None:
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        assert block.language, f"{where}: say what the block is: yaml, python, sh, text …"
        if block.language == "python":
            ast.parse(block.text, where)
        if block.language in ("yaml", "json"):
            list(yaml.safe_load_all(block.text))


@pytest.mark.parametrize("page", TOP, ids=identifier)
def test_links_of_pages_outside_the_site_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if not target.startswith(("http", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_design_notes_are_listed() -> None:
    listed = (DOCS / "design" / "README.md").read_text()
    assert [path.name for path in (DOCS / "design").glob("20*.md") if f"({path.name})" not in listed] == []


def test_the_picture_of_the_packages_has_all_of_them() -> None:
    picture = (DOCS / "images" / "packages.svg").read_text()
    drawn = re.findall(r"600\">(\w+)</tspan>", picture)
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layers = next(contract["layers"] for contract in contracts if contract.get("containers") == ["mergecore"])
    assert drawn == ["flows", "tasks", *(name for layer in layers for name in layer.split(" | "))]


def test_messages_of_the_faq_are_ours() -> None:
    source = "\n".join(
        path.read_text() for name in ("mergecore", "flows", "tasks") for path in (REPOSITORY / name).rglob("*.py")
    )
    plain = re.sub(r"\"\s*\n\s*f?\"", "", source)  # texts that go on in the next line
    for message in MESSAGES.findall((DOCS / "faq.md").read_text()):
        for part in re.split(VARIABLE, message):
            assert part.strip() in plain, f"{message}: no code says '{part.strip()}'"


def test_the_site_is_built_without_a_warning_and_without_other_hosts(tmp_path: Path) -> None:
    command = [BIN / "mkdocs", "build", "--strict", "--quiet", "--site-dir", tmp_path / "site"]
    environment = {"PATH": "/usr/bin:/bin", "NO_MKDOCS_2_WARNING": "1", "HOME": str(tmp_path)}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    for path in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|iframe)[^>]+src=\"(\S+?)\"|<link[^>]+href=\"(\S+?)\"", path.read_text())
        assert not [url for pair in loaded for url in pair if url.startswith(("http", "//"))], path
