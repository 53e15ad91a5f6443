"""What a person sees on the terminal: progress on standard error, tables on standard output."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING

from mergecore.events import Event, Report

if TYPE_CHECKING:
    from rich.table import Table

QUIET_SECONDS = 5.0
"""Where no bars are drawn, a line is written at most this often."""

STOPPING = "stopping; what is under way has to end first"

FRAMES_PER_SECOND = 8
SHARE_COLUMNS, TIME_COLUMNS = 14, 7
ECHO_COLUMNS = 4
"""Left free at the end of a line: a terminal writes `^C` where the cursor stands, and must not begin a new line for
it.
"""
MOST_BAR_COLUMNS, MOST_TEXT_COLUMNS = 40, 64


@contextlib.contextmanager
def progress() -> Iterator[Report]:
    """A `report` that draws bars on a terminal, and writes a line now and then elsewhere (a log, CI, TERM=dumb)."""
    if not sys.stderr.isatty():
        yield _lines(None)
    elif os.environ.get("TERM", "").lower() in ("", "dumb", "unknown"):
        yield _lines(_columns())
    else:
        with _bars() as report:
            yield report


def _columns() -> int:
    """The width of the terminal of standard error; 80 where it does not say."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80


def _lines(columns: int | None) -> Report:
    last = [time.monotonic()]
    lock = threading.Lock()

    def report(event: Event) -> None:
        # A file that has been read is no news: a checkpoint has many, and most are small.
        ended = event.done >= event.total and event.unit != "bytes"
        with lock:
            now = time.monotonic()
            if ended or now - last[0] >= QUIET_SECONDS:
                last[0] = now
                print(described(event, columns), file=sys.stderr, flush=True)

    return report


@dataclass
class _Bar:
    """A kind of work that is under way: what was last told of it, and since when it goes on."""

    event: Event
    began: float = field(default_factory=time.monotonic)


@contextlib.contextmanager
def _bars() -> Iterator[Report]:
    """One bar for each kind of work, which is what stands before the colon of an event's text."""
    from rich.console import Console
    from rich.live import Live

    console = Console(stderr=True, highlight=False, markup=False, emoji=False)
    bars: dict[str, _Bar] = {}
    lock = threading.Lock()
    stopping = threading.Event()

    def drawn() -> Table | str:
        if stopping.is_set():
            return STOPPING
        with lock:
            return _drawn(list(bars.values()), console.width)

    def report(event: Event) -> None:
        name = event.activity.partition(":")[0]
        if not event.total:
            console.print(_wrapped(event.activity, console.width), soft_wrap=True)
            return
        with lock:
            if event.done >= event.total:
                bars.pop(name, None)
            elif name in bars:
                bars[name].event = event
            else:
                bars[name] = _Bar(event)

    live = Live(
        console=console, get_renderable=drawn, transient=True, refresh_per_second=FRAMES_PER_SECOND,
        redirect_stdout=sys.stdout.isatty(),
    )  # fmt: skip
    with (
        live,
        _noting_interrupts(stopping),
    ):
        try:
            yield report
        finally:
            with lock:
                bars.clear()


@contextlib.contextmanager
def _noting_interrupts(noted: threading.Event) -> Iterator[None]:
    """Set `noted` at Ctrl-C, which then does what it always does. Where we are not in the main thread it is not
    seen.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return

    def interrupted(number: int, frame: FrameType | None) -> None:
        noted.set()
        before(number, frame)

    signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _drawn(bars: list[_Bar], columns: int) -> Table:
    """Text, bar, share and time of each, in columns that stay where they are while the texts change."""
    from rich.progress_bar import ProgressBar
    from rich.table import Column, Table

    bar_columns = max(10, min(MOST_BAR_COLUMNS, columns // 4))
    text_columns = max(
        10, min(MOST_TEXT_COLUMNS, columns - bar_columns - SHARE_COLUMNS - TIME_COLUMNS - 3 - ECHO_COLUMNS)
    )
    table = Table.grid(
        Column(width=text_columns, no_wrap=True, overflow="ellipsis"),
        Column(width=bar_columns),
        Column(width=SHARE_COLUMNS, no_wrap=True, justify="right"),
        Column(width=TIME_COLUMNS, no_wrap=True, justify="right"),
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for bar in bars:
        minutes, seconds = divmod(int(time.monotonic() - bar.began), 60)
        progressed = ProgressBar(total=bar.event.total, completed=bar.event.done, width=bar_columns)
        table.add_row(bar.event.activity, progressed, _share(bar.event), f"{minutes}:{seconds:02d}")
    return table


def described(event: Event, columns: int | None = None) -> str:
    """An event as one line; as a message where there is no amount. columns: the text is shortened or wrapped to
    that.
    """
    if not event.total:
        return event.activity if columns is None else _wrapped(event.activity, columns)
    share = _share(event)
    what = event.activity if columns is None else _shortened(event.activity, columns - len(share) - 2)
    return f"{what}  {share}"


def _shortened(text: str, columns: int) -> str:
    return text if len(text) <= columns else text[: max(1, columns - 1)] + "…"


def _wrapped(text: str, columns: int) -> str:
    """Lines no longer than that, broken between words: a path or an address stays whole, so that it can be copied."""
    broken = (
        textwrap.wrap(line, columns, break_long_words=False, break_on_hyphens=False) for line in text.splitlines()
    )
    return "\n".join("\n".join(lines) for lines in broken)


def _share(event: Event) -> str:
    if event.unit in ("elements", "bytes"):
        return f"{event.done / event.total:.0%}"
    return f"{event.done:g}/{event.total:g} {event.unit}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """Aligned columns; numbers to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]

    def line(row: list[str]) -> str:
        cells = [
            text.rjust(width) if _numeric(text) else text.ljust(width) for text, width in zip(row, widths, strict=True)
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(head), "  ".join("-" * width for width in widths), *(line(row) for row in rows)])


def _numeric(text: str) -> bool:
    return bool(text) and text[0] in "0123456789-+.−" and any(letter.isdigit() for letter in text)
