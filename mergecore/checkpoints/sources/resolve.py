"""From `path-or-hub-id@revision`, as people write it, to a source."""

from __future__ import annotations

import re
from pathlib import Path

from mergecore.checkpoints.sources import Source
from mergecore.checkpoints.sources.digests import DigestCache
from mergecore.checkpoints.sources.local import LocalSource, nearest_folder
from mergecore.errors import SourceError
from mergecore.events import Report, silent

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve(
    text: str,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    token: str | None = None,
    offline: bool = False,
    endpoint: str | None = None,
    digests: DigestCache | None = None,
    report: Report = silent,
) -> Source:
    """Return the source that `text` names: a folder that exists, a path (it begins with '.', '/' or '~'), or a hub id.

    An '@' in the name of a folder that exists belongs to the name; elsewhere a revision follows it.
    cache_dir, token, offline, endpoint: for the hub; None for its defaults, and no token.
    digests: remembers what was hashed. report: hears of local files that are hashed.
    Raises SourceError. For a relative path that is missing it says both ways in which the text was read.
    """
    if not text.strip():
        raise SourceError("a checkpoint needs a folder or a hub id (owner/name), not an empty name")
    if "://" in text:
        raise SourceError(
            f"'{text}' is an address; give a folder, or a hub id (owner/name@revision) and the hub by HF_ENDPOINT"
        )
    path = _path(text)
    if path.exists():
        if revision is not None:
            raise SourceError(f"'{text}' is a local folder and has no revision '{revision}'; leave the revision out")
        return LocalSource(text, digests, report)
    name, _, written = text.partition("@")
    if text.startswith((".", "/", "~")) or path.is_absolute():
        if written and Path(name).expanduser().is_dir():
            raise SourceError(f"'{text}' does not exist; '{name}' is a local folder and has no revision: leave it out")
        return LocalSource(text, digests, report)
    if written and revision is not None and written != revision:
        raise SourceError(f"'{text}' says revision '{written}', beside it stands '{revision}'; leave one of them out")
    if not HUB_ID.fullmatch(name):
        raise SourceError(
            f"'{text}' is neither an existing folder nor a hub id (owner/name@revision); {nearest_folder(Path(name))}"
        )
    from mergecore.checkpoints.sources.hub import HubSource  # huggingface_hub is imported only where a hub is asked

    try:
        return HubSource(name, written or revision, cache_dir, token, endpoint, offline=offline, digests=digests)
    except SourceError as error:
        if written or revision is not None:
            raise  # nobody writes a revision behind a path
        problem = str(error)
    raise SourceError(f"{problem}. Read as a hub id, as no folder '{name}' exists here; {nearest_folder(Path(name))}")


def _path(text: str) -> Path:
    """Return the path that a text means. Raises SourceError where no file system could have it."""
    try:
        path = Path(text).expanduser()
        path.exists()
        text.encode()
        if "\0" in text:
            raise ValueError("it holds a zero byte")
    except (OSError, ValueError, RuntimeError) as error:  # too long, not UTF-8, a home that nobody has
        reason = (
            error.strerror if isinstance(error, OSError) else "not UTF-8" if isinstance(error, UnicodeError) else error
        )
        shown = text if len(text) <= 80 else f"{text[:80]}…"
        raise SourceError(f"{shown!a} cannot be the name of a folder or of a model ({reason}); give another") from None
    return path
