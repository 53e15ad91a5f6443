"""How a command ends that fails or is interrupted: one line, and what it has left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from mergecore.errors import MergeloomError

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def nothing_kept() -> str:
    """Return the text after Ctrl-C of a command that keeps nothing half done."""
    return "run the same command again to start anew"


@contextmanager
def errors(after_interrupt: Callable[[], str] = nothing_kept) -> Iterator[None]:
    """Show a MergeloomError as an error message, and Ctrl-C as a line. Any other error keeps its traceback.

    after_interrupt: returns, after the clean-up, what an interrupted command has left.
    """
    try:
        yield
    except MergeloomError as error:
        raise click.ClickException(str(error)) from None
    except KeyboardInterrupt:
        click.echo(f"interrupted; {after_interrupt()}", err=True)
        sys.exit(INTERRUPTED)


def left_of(out: Path | None, store: Path | None = None, intermediates: Path | None = None) -> str:
    """Return what an interrupted command that writes `out` has left: nothing, whole results, or steps in a store."""
    if out is None:
        return nothing_kept()
    named = sorted(intermediates.iterdir()) if intermediates is not None and intermediates.is_dir() else []
    whole = [str(folder) for folder in (out, *named) if folder.is_dir()]
    texts = [f"{out} was not written"]
    if whole:
        texts = [f"finished results lie in {', '.join(whole)}", "remove them before you run the same command again"]
    if store is not None:
        texts.append(f"what was worked out for it is kept in {store}: run the same command again to go on")
    return ", ".join(texts)
