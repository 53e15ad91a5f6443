"""Every command in a terminal: wide, narrow and dumb, to its end and stopped by Ctrl-C."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from pathlib import Path

import psutil
import pytest
import yaml
from click.testing import CliRunner
from rich.cells import cell_len

from flows.cli.main import main
from flows.cli.terminal import described
from flows.services.servers import free_port
from mergecore.engine.journal import write_journal
from mergecore.engine.pass_plan import MergeJob, Span
from mergecore.events import Event
from tests.terminals import CTRL_C, HIDE_CURSOR, Ran, Terminal
from tests.tiny_sweep import write_spec

ENDINGS = {
    "plan": ("plan", "tiny.yaml"),
    "inspect": ("inspect", "base"),
    "methods": ("methods", "ties"),
    "merge": ("merge", "recipe.yaml", "merged"),
    "export": ("export", "tiny.yaml", "average n3 s0", "exported"),
    "diff": ("diff", "base", "experts/expert-0"),
    "unpack": ("unpack", "product", "expert-1", "unpacked"),
    "extract-lora": ("extract-lora", "experts/expert-0", "lora", "--base", "base", "--rank", "2"),
    "transplant-tokenizer": ("transplant-tokenizer", "base", "base", "transplanted"),
}
OUTPUTS = ("merged", "exported", "unpacked", "lora", "transplanted")
"""Folders that a command writes: each call has one of its own."""
ELSEWHERE = {"sweep", "report", "track", "serve", "store"}
"""Commands that the test of a whole sweep runs."""

DRAWING = """
import sys, time
from flows.cli.terminal import progress
from mergecore.events import Event
with progress() as report:
    report(Event("a message [red]in brackets[/red] and /a/path/" + "which-is-long/" * 8 + "end :smile: 1.5"))
    for done in range(4):
        report(Event("models scored: " + "ties(density=0.2, scale=1) " * 9 + "[bold]", done, 5, "models"))
        report(Event("reading", done, 5, "elements"))
        time.sleep(0.3)
    report(Event("hash config.json", 0, 512, "bytes"))
    report(Event("hash config.json", 512, 512, "bytes"))
    report(Event("models scored: " + "average n3 s0 " * 9, 5, 5, "models"))
    print("printed meanwhile")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep's folder with a product of masks beside it."""
    folder = tmp_path_factory.mktemp("terminal")
    write_spec(folder)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    full = {"method": "tall_masks", "base": recipe["base"], "experts": recipe["experts"][:2]}
    (folder / "masks.yaml").write_text(yaml.safe_dump(full))
    check_well(Terminal(folder, 200).mergeloom("merge", "masks.yaml", "product"), 200, "xterm-256color")
    return folder


def check_well(ran: Ran, columns: int, term: str) -> None:
    """It has succeeded, no line of progress is wider than the terminal, and a dumb terminal got text alone."""
    assert ran.code == 0, ran.errors
    check_readable(ran, columns, term)


def check_readable(ran: Ran, columns: int, term: str) -> None:
    assert "Traceback" not in ran.errors + ran.output, ran.errors
    assert max(map(cell_len, ran.lines), default=0) <= columns, ran.lines
    assert ran.cursor_is_visible
    if term == "dumb":
        assert "\x1b" not in ran.errors + ran.output, ran.errors
    else:
        assert "%|" not in ran.errors, "a bar of some library's"
        assert "telemetry" not in ran.errors, "a notice of some library's"


def test_every_command_is_run_here() -> None:
    assert set(main.commands) == set(ENDINGS) | ELSEWHERE


@pytest.mark.parametrize(
    "command, columns, term",
    [
        ("methods", 80, "dumb"),
        ("inspect", 80, "xterm-256color"),
        ("plan", 80, "xterm-256color"),
        ("merge", 80, "xterm-256color"),
        ("merge", 80, "dumb"),
        ("export", 80, "xterm-256color"),
        ("diff", 120, "xterm-256color"),
        ("diff", 120, "dumb"),
        ("unpack", 80, "xterm-256color"),
        ("extract-lora", 200, "xterm-256color"),
        ("extract-lora", 80, "dumb"),
        ("transplant-tokenizer", 80, "xterm-256color"),
    ],
)
def test_a_command_in_a_terminal(folder: Path, command: str, columns: int, term: str) -> None:
    arguments = [f"{word}-{columns}-{term}" if word in OUTPUTS else word for word in ENDINGS[command]]
    ran = Terminal(folder, columns, term).mergeloom(*arguments)
    check_well(ran, columns, term)
    assert ran.output.strip()
    if term == "dumb" and command in ("merge", "extract-lora"):
        assert any(line.endswith("experts") for line in ran.lines), ran.lines


@pytest.mark.parametrize("columns", [80, 200])
def test_bars_stay_in_their_lines(tmp_path: Path, columns: int) -> None:
    ran = Terminal(tmp_path, columns).run("-c", DRAWING)
    assert ran.code == 0 and HIDE_CURSOR in ran.errors and ran.cursor_is_visible
    assert all(cell_len(line) <= columns for line in ran.lines if not line.startswith("/a/path")), ran.lines
    assert "printed meanwhile" in ran.lines, "above the bars"
    scored = [line for line in ran.lines if line.startswith("models scored")]
    assert scored and all("…" in line and re.search(r"\d/5 models +0:0\d$", line) for line in scored), ran.lines
    read = [line for line in ran.lines if line.startswith("reading")]
    assert {line.index("/5") for line in scored} and all(re.search(r"\d+% +0:0\d$", line) for line in read)
    assert len({len(line) for line in [*scored, *read]}) == 1, "columns stay where they are"
    assert len(read[0]) + len("^C") < columns, "an echoed key begins no new line, which would be taken for the bar's"
    assert any("[red]in brackets[/red]" in line for line in ran.lines)
    assert re.search(r"\x1b\[[\d;]*3\d", ran.errors), "in colours"


def test_without_colours(tmp_path: Path) -> None:
    ran = Terminal(tmp_path, variables={"NO_COLOR": "1"}).run("-c", DRAWING)
    assert ran.code == 0 and any(line.startswith("reading") for line in ran.lines)
    codes = {code for sequence in re.findall(r"\x1b\[([\d;]*)m", ran.errors) for code in sequence.split(";") if code}
    assert codes <= {"0", "1", "2", "3", "4", "7"}, "bold and the like at most"


def test_a_dumb_terminal_gets_lines(tmp_path: Path) -> None:
    ran = Terminal(tmp_path, term="dumb").run("-c", DRAWING)
    assert ran.code == 0 and "\x1b" not in ran.errors
    path = next(line for line in ran.lines if line.startswith("/a/path"))
    assert path == "/a/path/" + "which-is-long/" * 8 + "end", "what is copied stays whole"
    assert all(len(line) <= 80 for line in ran.lines if line != path)
    assert any(re.match(r"models scored: average .*…  5/5 models$", line) for line in ran.lines)
    assert not any(line.startswith("hash") for line in ran.lines), "files come and go too fast to be told of"


def test_a_log_gets_whole_lines() -> None:
    assert described(Event("x" * 300, 1, 2, "models")) == "x" * 300 + "  1/2 models"
    assert described(Event("a message " * 30)) == "a message " * 30


def test_a_merge_is_stopped_and_leaves_nothing(folder: Path) -> None:
    before = sorted(folder.iterdir())
    ran = Terminal(folder).run(
        "-m", "tests.slow_merge", "0.4", "merge", "recipe.yaml", "stopped",
        keys=CTRL_C, when=lambda ran: "reading" in ran.errors,
    )  # fmt: skip
    check_readable(ran, 80, "xterm-256color")
    assert (ran.code, ran.lines[-1]) == (130, "interrupted; stopped was not written")
    assert sorted(folder.iterdir()) == before
    assert any(line.startswith("reading") and "%" in line for line in ran.lines), ran.lines


def test_what_is_kept_is_said_and_true(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(folder)
    with monkeypatch.context() as stopped:
        stopped.setattr("mergecore.engine.run_pass.run_span", stop)
        stopped.setattr("mergecore.recipes.extract_lora.extracted", stop)
        stopped.setattr("mergecore.formats.unpack._write", stop)
        stopped.setattr("mergecore.recipes.transplant_tokenizer._new_table", stop)
        for command in ("merge", "unpack", "extract-lora", "transplant-tokenizer"):
            arguments = [word + "-in-vain" if word in OUTPUTS else word for word in ENDINGS[command]]
            result = CliRunner().invoke(main, arguments)
            assert result.exit_code == 130
            assert re.search(r"^interrupted; \S+-in-vain was not written$", result.output, re.M), result.output
        assert not list(folder.glob("*-in-vain*"))

    spans: list[Span] = []

    def second(job: MergeJob, span: Span, digests: Mapping[str, Mapping[int, str]]) -> None:
        if len(spans) == 1 and not again:
            stop()
        spans.append(span)
        write_journal(job, span, digests)

    again: list[bool] = []
    monkeypatch.setattr("mergecore.engine.pass_plan.plan_spans.__defaults__", (20_000,))
    monkeypatch.setattr("mergecore.engine.span.write_journal", second)
    arguments = ["merge", "recipe.yaml", "later", "--store", "kept", "--workers", "1"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 130 and "kept in kept: run the same command again to go on" in result.output
    assert not list(folder.glob("later*")) and len(spans) == 1
    again.append(True)
    assert CliRunner().invoke(main, arguments).exit_code == 0
    assert len(spans) == len(set(spans)) > 1, "the span that had ended was not done again"


@pytest.mark.timeout(1800)
def test_a_sweep_is_stopped_and_gone_on_with(folder: Path) -> None:
    """With services and Ctrl-C in the middle; to its end in one process; then what looks at it."""
    store, others = folder / "store", list[psutil.Process]()

    def busy(ran: Ran) -> bool:
        if not list(store.glob("busy-*")):
            return False
        others.extend(psutil.Process(ran.pid).children(recursive=True))
        return True

    quiet = {"DO_NOT_TRACK": "1"}  # as the command sets it; the slowed one imports Prefect before
    ran = Terminal(folder, variables=quiet).run("-m", "tests.slow_sweep", "tiny.yaml", "0.5", keys=CTRL_C, when=busy)
    check_readable(ran, 80, "xterm-256color")
    last = "interrupted; what is finished is kept, run the same command again to go on"
    assert (ran.code, ran.lines[-1]) == (130, last), ran.errors
    assert len(others) >= 5, "a worker, two servers under their supervisors"
    deadline = time.monotonic() + 30
    while any(map(lives, others)):
        assert time.monotonic() < deadline, [word.cmdline() for word in others if lives(word)]
        time.sleep(0.1)
    assert not list((store / "failures").glob("*")), "nothing has failed"

    ran = Terminal(folder, 80).mergeloom("sweep", "tiny.yaml", "--in-process", "--no-track")
    check_well(ran, 80, "xterm-256color")
    assert "Differences at the same count" in ran.output
    counts = (re.match(r"whole sweep .* (\d+)/8 cells", line) for line in ran.lines)
    cells = {count[1] for count in counts if count}
    assert len(cells) > 1, ran.lines
    assert not list(store.glob("drafts/*")), "what the stopped run left was gone on with"
    check_well(Terminal(folder, 200).mergeloom("report", "tiny.yaml"), 200, "xterm-256color")
    check_well(Terminal(folder, 80).mergeloom("store", "verify", "--store", "store"), 80, "xterm-256color")
    ran = Terminal(folder, 120).mergeloom("store", "gc", "tiny.yaml")
    check_well(ran, 120, "xterm-256color")
    assert "nothing to delete" in ran.output, "a sweep that is done leaves nothing behind"

    tracked: list[Ran] = []

    def serving(ran: Ran) -> bool:
        if "Ctrl-C stops both" not in ran.output:
            return False
        tracked.append(Terminal(folder).mergeloom("track", "tiny.yaml"))
        return True

    ports = "--prefect-port", str(free_port()), "--mlflow-port", str(free_port())
    served = Terminal(folder, 80, "dumb").run(
        "-m", "flows.cli.main", "serve", "--store", "store", *ports, keys=CTRL_C, when=serving
    )
    check_well(served, 80, "dumb")
    check_well(tracked[0], 80, "xterm-256color")
    assert "runs written" in tracked[0].output


def lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
