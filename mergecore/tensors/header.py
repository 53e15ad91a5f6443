"""The header of a safetensors file, read by the rules of the library `safetensors`, or stricter.

What that library refuses is refused here as well: a file that is read in half is worse than no file. A name that stands
twice is refused too; the library takes the last one.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from typing import Any

from mergecore.errors import SourceError
from mergecore.tensors.dtypes import ELEMENT_TYPES
from mergecore.tensors.source import TensorInfo

LARGEST = 100_000_000
"""Bytes of a header at most, as in the library."""
MOST_BYTES = 1 << 63
"""No file and no tensor is that large."""
MOST_DIMENSIONS = 64
REMEDY = "fetch or write it again"


class _Refused(ValueError):
    """What is wrong with a header, as half a sentence."""


def parse_header(read: Callable[[int, int], bytes], size: int, where: str) -> dict[str, tuple[TensorInfo, int]]:
    """Return {tensor: (info, offset in the file)} from the header of a safetensors file.

    read: (start, length) → bytes. size: of the whole file. Raises SourceError where the header is damaged, a dtype is
    unknown, tensors overlap or leave bytes between them, or the file is shorter or longer than they are.
    """
    if size < 8:
        raise SourceError(f"{where} has {size} bytes: not a safetensors file; {REMEDY}")
    length = int.from_bytes(read(0, 8), "little")
    if length > min(size - 8, LARGEST):
        raise SourceError(
            f"{where} is no safetensors file, or is truncated (header of {length:,} bytes in {size:,}); fetch it again"
        )
    try:
        entries = {tensor: _entry(tensor, entry) for tensor, entry in _tensors(read(8, length)).items()}
    except (_Refused, UnicodeDecodeError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise SourceError(f"{where} has a header that cannot be read ({reason}); {REMEDY}") from error
    _check_order({tensor: places for tensor, (_, places) in entries.items()}, size - 8 - length, where)
    return {tensor: (info, 8 + length + start) for tensor, (info, (start, _)) in entries.items()}


def _tensors(text: bytes) -> dict[str, Any]:
    """Return the entries of the tensors, unchecked. Raises _Refused, UnicodeDecodeError and RecursionError."""
    if not text.startswith(b"{"):
        raise _Refused("it does not begin with '{'")
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise _Refused(f"no JSON: {error}") from error
    except ValueError as error:  # a number of more digits than Python reads
        raise _Refused(str(error).partition(";")[0]) from error
    metadata = header.pop("__metadata__", None)
    plain = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if metadata is not None and not plain:
        raise _Refused("__metadata__ must be a mapping of text to text")
    return dict(header)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Refused(f"'{twice}' stands there twice")
    return entries


def _no_constant(word: str) -> None:
    raise _Refused(f"no JSON: {word} is no number")


def _entry(tensor: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    """Return a tensor's dtype and shape, and its first and last byte in the data."""
    if not isinstance(entry, Mapping):
        raise _Refused(f"tensor '{tensor}' is no mapping")
    if any(0xD800 <= ord(letter) <= 0xDFFF for letter in tensor):
        raise _Refused(f"the name {tensor!a} is no Unicode text")
    for key in ("dtype", "shape", "data_offsets"):
        if key not in entry:
            raise _Refused(f"tensor '{tensor}' has no '{key}'")
    dtype, shape, places = entry["dtype"], _numbers(tensor, entry, "shape"), _numbers(tensor, entry, "data_offsets")
    if dtype not in ELEMENT_TYPES if isinstance(dtype, str) else True:
        raise _Refused(
            f"tensor '{tensor}' has dtype {dtype!s:.20}, which cannot be read; give the checkpoint in float32, float16 "
            "or bfloat16"
        )
    if len(shape) > MOST_DIMENSIONS:
        raise _Refused(f"tensor '{tensor}' has {len(shape)} dimensions")
    info = TensorInfo(dtype, shape)
    if len(places) != 2 or places[0] > places[1]:
        raise _Refused(f"tensor '{tensor}' has data_offsets {list(places)}: first and last byte are meant")
    if info.size >= MOST_BYTES or places[1] - places[0] != info.size:
        raise _Refused(f"tensor '{tensor}' has {places[1] - places[0]} bytes for shape {list(shape)} of {dtype}")
    return info, (places[0], places[1])


def _numbers(tensor: str, entry: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """Return a list of whole numbers from 0 on. A Boolean is no number, nor is 2.0 a whole one."""
    values = entry[key]
    if not isinstance(values, list) or not all(type(value) is int and 0 <= value < MOST_BYTES for value in values):
        raise _Refused(f"tensor '{tensor}' has {key} {values!s:.60}: whole numbers from 0 on are meant")
    return tuple(values)


def _check_order(places: Mapping[str, tuple[int, int]], size: int, where: str) -> None:
    """Raise SourceError where the tensors do not follow each other from the first byte of the data to the last.

    places: first byte and end of each in the data. size: bytes of the data.
    """
    ordered = sorted(places, key=lambda tensor: places[tensor])
    for tensor in ordered:
        if places[tensor][1] > size:
            raise SourceError(
                f"{where} is truncated: tensor '{tensor}' ends after the file's last byte; fetch it again"
            )
    if ordered and places[ordered[0]][0] > 0:
        raise SourceError(_gap(where, places[ordered[0]][0], f"before tensor '{ordered[0]}'"))
    for before, after in itertools.pairwise(ordered):
        gap = places[after][0] - places[before][1]
        if gap < 0:
            raise SourceError(f"{where}: tensors '{before}' and '{after}' overlap by {-gap:,} bytes; {REMEDY}")
        if gap > 0:
            raise SourceError(_gap(where, gap, f"between tensors '{before}' and '{after}'"))
    end = places[ordered[-1]][1] if ordered else 0
    if end < size:
        last = f"after its last tensor '{ordered[-1]}'" if ordered else "and no tensor"
        raise SourceError(_gap(where, size - end, last))


def _gap(where: str, count: int, place: str) -> str:
    return f"{where} has {count:,} bytes {place} that belong to none: it is damaged or not written to its end; {REMEDY}"
