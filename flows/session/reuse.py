"""Sessions that are open already.

The sweep flow gets the path of a spec, as its form asks for it. Planning takes seconds, so the command line leaves the
session it has opened here, and the flow takes it instead of opening the file again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from flows.session.session import Session
from mergecore.events import Report


@dataclass(frozen=True)
class OpenSession:
    """A session, and where the progress of its work is reported."""

    session: Session
    report: Report


_open_sessions: ContextVar[Mapping[Path, OpenSession]] = ContextVar("open_sessions")
"""Absolute path of a spec → the session opened from it."""


@contextlib.contextmanager
def reusable(path: Path, session: Session, report: Report) -> Iterator[None]:
    """Inside the block, and in this context alone, `open_session_at(path)` returns this session."""
    token = _open_sessions.set({**_open_sessions.get({}), path.absolute(): OpenSession(session, report)})
    try:
        yield
    finally:
        _open_sessions.reset(token)


def open_session_at(path: Path) -> OpenSession | None:
    """Return the session that is open for the spec at this path, or None."""
    return _open_sessions.get({}).get(path.absolute())
