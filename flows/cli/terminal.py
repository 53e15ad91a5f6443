"""What a person sees on the terminal: progress on standard error, tables on standard output."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from mergecore.events import Event, Report

QUIET_SECONDS = 5.0
"""Without a terminal a line is written at most this often."""


@contextlib.contextmanager
def progress() -> Iterator[Report]:
    """A `report` that draws a bar on a terminal and writes a line now and then elsewhere (a log, CI)."""
    if sys.stderr.isatty():
        with _bars() as report:
            yield report
    else:
        yield _lines()


def _lines() -> Report:
    last = [0.0]
    lock = threading.Lock()

    def report(event: Event) -> None:
        with lock:
            now = time.monotonic()
            if event.done >= event.total or now - last[0] >= QUIET_SECONDS:
                last[0] = now
                print(described(event), file=sys.stderr, flush=True)

    return report


@contextlib.contextmanager
def _bars() -> Iterator[Report]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[share]}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        bars: dict[str, TaskID] = {}
        lock = threading.Lock()

        def report(event: Event) -> None:
            name = event.what.partition(":")[0]
            with lock:
                if not event.total:
                    shown.console.print(event.what)
                    return
                if name not in bars:
                    bars[name] = shown.add_task(name)
                shown.update(
                    bars[name], description=event.what, completed=event.done, total=event.total, share=_share(event)
                )
                if event.done >= event.total:
                    shown.remove_task(bars.pop(name))

        yield report


def described(event: Event) -> str:
    """An event as one line."""
    return event.what if not event.total else f"{event.what}  {_share(event)}"


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
