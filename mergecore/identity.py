"""What makes two results the same result: canonical JSON, digests, step keys and the counter-based random.

Nothing here knows what a model is. A `Step` is inert data; where and when it is done is never part of it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import xxhash
from torch import Tensor

from mergecore.errors import IdentityError

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

GRID = 1 << 20
"""Elements of one block: reductions, digests and spans all follow this fixed grid, whatever the chunk size."""


def canonical(value: Any) -> bytes:
    """`value` as the one JSON text that stands for it: sorted keys, no white space, UTF-8.

    Raises IdentityError for anything without a canonical form (sets, paths, NaN, objects …): what cannot be written
    down cannot be part of a key.
    """
    if not _is_plain(value):
        value = _plain(value, "$")
    try:
        return _ENCODER.encode(value).encode()
    except ValueError:  # a number that is not finite
        return _ENCODER.encode(_plain(value, "$")).encode()


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
_SCALARS = frozenset({type(None), bool, int, float, str})


def _is_plain(value: Any) -> bool:
    """Whether JSON's own encoder writes `value` as `_plain` would have it written: ten thousand cells are a million values."""
    kind = type(value)
    if kind is dict:
        if not all(type(key) is str for key in value):
            return False
        value = value.values()
    elif kind is not list and kind is not tuple:
        return kind in _SCALARS
    for item in value:  # noqa: SIM110 — a generator would take twice as long
        if type(item) not in _SCALARS and not _is_plain(item):
            return False
    return True


def _plain(value: Any, where: str) -> Json:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise IdentityError(f"{where} is {value!r}: a key holds finite numbers only")
        return float(value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise IdentityError(f"{where} has a key that is no string; name every entry")
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_plain(item, f"{where}[{position}]") for position, item in enumerate(value)]
    raise IdentityError(f"{where} is a {type(value).__name__}, which has no canonical form; give plain JSON values")


def digest(value: Any) -> str:
    """SHA-256 (hex) over the canonical JSON of `value`."""
    return hashlib.sha256(canonical(value)).hexdigest()


def bytes_of(values: Tensor) -> memoryview:
    """The bytes of a flat tensor on the processor, not copied where it is contiguous."""
    return memoryview(values.contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]


class BlockDigests:
    """XXH3 (128 bits) of each block of `GRID` elements of a tensor that is given piece by piece, in order.

    What is written is compared with itself, never with a stranger's claim: a hash that costs less than the reading does.
    """

    def __init__(self, start: int = 0) -> None:
        self._at, self._found = start, dict[int, str]()
        self._state = xxhash.xxh3_128()

    def update(self, data: memoryview, count: int) -> None:
        """The bytes of the next `count` elements."""
        done, width = 0, len(data) // max(count, 1)
        while done < count:
            size = min(GRID - self._at % GRID, count - done)
            self._state.update(data if size == count else data[done * width : (done + size) * width])
            done += size
            self._at += size
            if self._at % GRID == 0:
                self._close(self._at - GRID)

    def _close(self, start: int) -> None:
        self._found[start] = self._state.hexdigest()
        self._state = xxhash.xxh3_128()

    def finished(self) -> dict[int, str]:
        """{first element: digest}; an empty tensor has one block."""
        if self._at % GRID or not self._found:
            self._close(self._at // GRID * GRID)
        return self._found


def block_digests(values: Tensor) -> dict[int, str]:
    """The digests of all blocks of a flat tensor."""
    held = BlockDigests()
    held.update(bytes_of(values), values.numel())
    return held.finished()


def tensor_digest(block_digests: Sequence[str]) -> str:
    """Digest of a tensor from the digests of its blocks of `GRID` elements, in order."""
    return hashlib.sha256("".join(block_digests).encode()).hexdigest()


def model_digest(tensors: Mapping[str, tuple[str, Sequence[int], str]]) -> str:
    """Digest of a model from {name: (dtype, shape, tensor digest)}: the same for every sharding of the same tensors."""
    return digest([[name, dtype, list(shape), held] for name, (dtype, shape, held) in sorted(tensors.items())])


@dataclass(frozen=True)
class Step:
    """One piece of work as a record: its key is a SHA-256 over exactly these fields.

    kind: snapshot, statistic, merge, evaluation or registration. plugin, version: who does it. parameters: everything
    that can change the numbers, defaults included. inputs: keys of other steps (or content digests), by role.
    """

    kind: str
    plugin: str
    version: int
    parameters: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return {
            "kind": self.kind,
            "plugin": self.plugin,
            "version": self.version,
            "parameters": dict(self.parameters),
            "inputs": dict(self.inputs),
        }

    @cached_property
    def key(self) -> str:
        """64 hex digits: equal keys, equal results."""
        return digest(self.as_json())

    @cached_property
    def name(self) -> str:
        """A short name for people and for the folder in the store: plug-in and the first 12 digits of the key."""
        return f"{self.plugin}-{self.key[:12]}"

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Step) and self.key == other.key


# --- random numbers as a function -----------------------------------------------------------------------------------


def random_key(seed: int, expert: str, tensor: str) -> tuple[int, int]:
    """Two 32-bit words that stand for (seed, expert id, tensor name) in `random_words`."""
    held = hashlib.sha256(canonical([seed, expert, tensor])).digest()
    return int.from_bytes(held[:4], "big"), int.from_bytes(held[4:8], "big")


def _signed(word: int) -> int:
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >= 1 << 31 else word


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Logical (zero-filling) right shift of int32 words, which torch only shifts arithmetically."""
    return (words >> bits) & ((1 << (32 - bits)) - 1)


def random_words(key: tuple[int, int], start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Uniform int32 words for the flat indices start … start+count−1, shape (count,).

    A pure function of key and index, so the same for any chunk, order, worker or device.
    """
    high = start >> 32
    if (start + count - 1) >> 32 != high and count > 0:
        cut = ((high + 1) << 32) - start
        return torch.cat([random_words(key, start, cut, device), random_words(key, start + cut, count - cut, device)])
    index = torch.arange(start, start + count, dtype=torch.int64, device=device)
    return words_at(index, *word_key(key, start))


def word_key(key: tuple[int, int], start: int) -> tuple[int, int]:
    """The two int32 numbers that `words_at` takes for indices from `start` to the next multiple of 2^32.

    Indices beyond 2^32 enter through their high word, which is folded into the key.
    """
    return _signed(key[0] ^ ((start >> 32) * 0x9E3779B9)), _signed(key[1])


def words_at(index: Tensor, first: int, second: int) -> Tensor:
    """Uniform int32 words for int64 flat indices: two keyed rounds of a 32-bit avalanche hash."""
    words = index.to(torch.int32) ^ first
    for salt, (one, other) in ((second, (0x7FEB352D, 0x846CA68B)), (None, (0x21F0AAAD, 0xD35A2D97))):
        words = words ^ _shifted(words, 16)
        words = words * _signed(one)
        words = words ^ _shifted(words, 15)
        words = words * _signed(other)
        words = words ^ _shifted(words, 16)
        if salt is not None:
            words = words + salt
    return words


def drop_limit(rate: float) -> int:
    """The int32 limit L with P(word < L) = rate, to 2^-32: integers are compared, never floats."""
    return _signed_limit(round(rate * (1 << 32)))


def _signed_limit(unsigned: int) -> int:
    return min(max(unsigned, 0), (1 << 32) - 1) - (1 << 31)
