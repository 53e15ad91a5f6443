"""Tied tensors that a checkpoint's files hold twice: whether the two are the same bytes, and what follows."""

from __future__ import annotations

from mergecore.checkpoints.layout import tied_names
from mergecore.checkpoints.snapshot import Snapshot
from mergecore.checkpoints.vocabulary.snapshot import with_companions
from mergecore.errors import MismatchError

_PIECE = 1 << 22
"""Bytes compared at a time."""
_SAMPLES, _SAMPLE = 16, 1 << 16
"""Of files that are still on a hub so many pieces of so many bytes are compared; the rest once they are fetched."""


def differ(snapshot: Snapshot, first: str, second: str) -> bool:
    """Return whether two tensors of the files differ: dtype, shape or any byte. Tensors formed while read count as
    different.
    """
    places = [snapshot.contents.stored_at.get(name) for name in (first, second)]
    info, other = snapshot.tensors[first], snapshot.tensors[second]
    if None in places or info != other:
        return True
    (file, start), (other_file, other_start) = (place for place in places if place is not None)
    source = snapshot.source
    if source.at_hand(file) and source.at_hand(other_file):
        pieces = [(at, min(_PIECE, info.size - at)) for at in range(0, info.size, _PIECE)]
    else:
        step = max(info.size // _SAMPLES, _SAMPLE)
        pieces = [(at, min(_SAMPLE, info.size - at)) for at in range(0, info.size, step)]
    return any(
        source.read(file, start + at, length) != source.read(other_file, other_start + at, length)
        for at, length in pieces
    )


def differing(snapshot: Snapshot) -> dict[str, str]:
    """Return {name: owner} of the tied tensors that the files hold twice with other values."""
    tied = tied_names(snapshot.tensors, snapshot.config)
    return {name: owner for name, owner in tied.items() if name in snapshot.tensors and differ(snapshot, name, owner)}


def untied(base: Snapshot) -> tuple[Snapshot, tuple[str, ...]]:
    """Return the base as transformers loads it, and what is to be said of it.

    Tied tensors that differ are loaded apart. The configuration then says so, and so does that of the result. Raises
    MismatchError where the configuration cannot say it.
    """
    apart = differing(base)
    if not apart:
        return base, ()
    config = {**base.config, "tie_word_embeddings": False}
    still = tied_names(base.tensors, config)
    told = ", ".join(f"'{name}' and '{owner}'" for name, owner in apart.items())
    if any(name in still for name in apart):
        raise MismatchError(
            f"base ({base.source.uri}): {told} are one tensor in its architecture, and differ in its files; leave one "
            "of them out of the files"
        )
    warning = (
        f"base ({base.source.uri}): its config.json ties {told}, which differ in its files: they stay two tensors, as "
        "transformers loads them, and the result's config.json says tie_word_embeddings: false"
    )
    return with_companions(base, {}, config), (warning,)


def check_fetched(snapshot: Snapshot) -> None:
    """Raise MismatchError where tied tensors differ that looked alike before all of their bytes were there."""
    if snapshot.source.revision is None:
        return  # local files were compared whole
    stored = snapshot.contents.stored_at
    for name, owner in differing(snapshot).items():
        if name not in stored or owner not in stored:
            continue  # formed while they are read
        raise MismatchError(
            f"{snapshot.source.uri}: '{name}' and '{owner}' are tied by its config.json, and some of their values "
            "differ; all files are here now, so start again and they are told apart"
        )
