"""What makes two results the same: canonical JSON, digests and step keys.

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

from mergecore.errors import IdentityError

KINDS = ("snapshot", "statistic", "adapter", "merge", "evaluation", "registration")
"""The kinds of steps. Each has a folder of its own in the store."""

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]


def canonical(value: Any) -> bytes:
    """Return the one JSON text that stands for `value`: sorted keys, no white space, UTF-8.

    Raises IdentityError for what has no canonical form (sets, paths, NaN, objects …): it cannot be part of a key.
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
    """Return whether JSON's own encoder writes `value` as `_plain` would. It is asked a million times per plan."""
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
    """Return the SHA-256 (hex) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical(value)).hexdigest()


@dataclass(frozen=True)
class Step:
    """One unit of cached work. Its key is a SHA-256 over exactly these fields.

    kind: one of KINDS. plugin, version: who does it.
    parameters: everything that can change the numbers, defaults included.
    inputs: keys of other steps, or content digests, by role.
    """

    kind: str
    plugin: str
    version: int
    parameters: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {
            "kind": self.kind,
            "plugin": self.plugin,
            "version": self.version,
            "parameters": dict(self.parameters),
            "inputs": dict(self.inputs),
        }

    @cached_property
    def key(self) -> str:
        """64 hex digits. Equal keys mean equal results."""
        return digest(self.as_json())

    @cached_property
    def name(self) -> str:
        """The folder's name in the store: plug-in and the first 12 digits of the key."""
        return f"{self.plugin}-{self.key[:12]}"

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Step) and self.key == other.key
