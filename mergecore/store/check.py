"""Whether a stored result still is what was written."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from mergecore.checkpoints.sources.digests import file_sha256
from mergecore.errors import MergeloomError
from mergecore.identity.content import GRID, BlockDigests, bytes_of, model_digest, tensor_digest
from mergecore.store.results import ITEMS
from mergecore.store.store import State, Store
from mergecore.store.survey import Stored
from mergecore.store.verified import DIGESTS, REMEDY, verified
from mergecore.tensors.files import open_files
from mergecore.tensors.source import TensorSource

WEIGHTS = ".safetensors"


class Verdict(StrEnum):
    """What a check came to."""

    SOUND = "sound"
    """Every byte that has a digest is as it was written."""
    SIZES = "sizes only"
    """Files have their sizes; what is in them has no digest of its own (small files of a checkpoint)."""
    DROPPED = "dropped"
    """There are no bytes to check."""
    DAMAGED = "damaged"
    """It is not what was written."""


@dataclass(frozen=True)
class Checked:
    """What the check of a result came to. trouble: what is wrong, where, and what to do; '' where nothing is."""

    result: Stored
    verdict: Verdict
    trouble: str = ""


def check(store: Store, result: Stored) -> Checked:
    """Read a result whole and compare it with the digest in its record. Nothing is written."""
    if result.state is State.DROPPED:
        return Checked(result, Verdict.DROPPED)
    if result.state is not State.PRESENT:
        return Checked(result, Verdict.DAMAGED, f"{store.root / result.path}: {_broken(store, result)}; {REMEDY}")
    try:
        return _compared(store, result)
    except (MergeloomError, OSError) as error:
        return Checked(result, Verdict.DAMAGED, str(error))


def _broken(store: Store, result: Stored) -> str:
    """Return what is wrong with the files of a result that is BROKEN."""
    if result.record is None:
        return "its record is not there or cannot be read"
    for name, size in result.record.files.items():
        path = store.root / result.path / name
        if not path.is_file():
            return f"{name} is not there"
        if (now := path.stat().st_size) != size:
            return f"{name} has {now:,} bytes and was written with {size:,}"
    return "its record is of another step"


def _compared(store: Store, result: Stored) -> Checked:
    record, folder = result.record, store.root / result.path
    assert record is not None
    weights = [name for name in record.files if name.endswith(WEIGHTS)]
    if ITEMS in record.files:
        same = file_sha256(folder / ITEMS) == record.digest
        text = f"{folder / ITEMS} is not what was written there; {REMEDY}"
    elif weights and result.kind != "snapshot":
        tensors = open_files(folder, weights)
        # A registered model shares its files with the merge, and has its digest.
        source = verified(tensors, record.files) if DIGESTS in record.files else tensors
        same = digest_of(source) == record.digest
        text = f"{folder}: its tensors are not what was written there; {REMEDY}"
    else:
        return Checked(result, Verdict.SIZES)
    return Checked(result, Verdict.SOUND) if same else Checked(result, Verdict.DAMAGED, text)


def digest_of(tensors: TensorSource) -> str:
    """Return the digest of a model from its tensors, read block by block. Raises StoreError at a block that changed."""
    digests = {}
    for name, info in tensors.tensors.items():
        blocks = BlockDigests(0)
        for start in range(0, info.count, GRID):
            stop = min(start + GRID, info.count)
            blocks.update(bytes_of(tensors.read(name, start, stop)), stop - start)
        digests[name] = (info.dtype, info.shape, tensor_digest(list(blocks.finished().values())))
    return model_digest(digests)
