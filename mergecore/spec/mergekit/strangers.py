"""Keys of mergekit's form that mergekit passes over: they are taken out, and said aloud.

mergekit reads what it knows and ignores the rest. Recipes of model cards have such keys: parameters beside
`merge_method`, a `layer_range` of a whole model, options of the command line, a card's own keys. A key that looks like
a slip of the pen stays, and so does one of our own form: the schema refuses both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from mergecore.errors import close_to
from mergecore.spec.mergekit.document import (
    Document,
    ModelInput,
    Module,
    OutputSlice,
    SliceInput,
    TokenEntry,
    TokenizerRule,
)
from mergecore.spec.mergekit.methods import ELSEWHERE

INSIDE: dict[type[BaseModel], dict[str, type[BaseModel]]] = {
    Document: {"models": ModelInput, "slices": OutputSlice, "modules": Module, "tokenizer": TokenizerRule},
    Module: {"models": ModelInput, "slices": OutputSlice},
    OutputSlice: {"sources": SliceInput},
    TokenizerRule: {"tokens": TokenEntry},
}
"""What stands behind a key: one, a list of them, or for modules and tokens one by name."""
BY_NAME = ("modules", "tokens")
ELSEWHERE_KEYS = frozenset({*ELSEWHERE, *SliceInput.model_fields, *Document.model_fields, *OutputSlice.model_fields})
"""Keys that are right in another place: no slips, however near they are to a key of this one."""
OURS = ("method", "base", "experts", "select", "stack")
"""Keys of a recipe in our form: who writes both means one of them."""


def known_keys(document: Mapping[str, Any], where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the document with the keys that mergekit reads, and a note about each of the others."""
    notes: list[str] = []
    return _tidied(document, Document, where, notes), tuple(notes)


def _tidied(value: Mapping[str, Any], kind: type[BaseModel], where: str, notes: list[str]) -> dict[str, Any]:
    tidy: dict[str, Any] = {}
    for key, inner in value.items():
        name, place = str(key), f"{where}.{key}"
        if name in kind.model_fields:
            tidy[key] = _inside(inner, INSIDE.get(kind, {}).get(name), name in BY_NAME, place, notes)
        elif name in OURS or (name not in ELSEWHERE_KEYS and close_to(name, kind.model_fields)):
            tidy[key] = inner
        else:
            notes.append(f"{place}: has no effect there, in mergekit neither")
    return tidy


def _inside(value: Any, kind: type[BaseModel] | None, by_name: bool, where: str, notes: list[str]) -> Any:
    if kind is None:
        return value
    if isinstance(value, list):
        return [_inside(item, kind, False, f"{where}.{number}", notes) for number, item in enumerate(value)]
    if not isinstance(value, Mapping):
        return value
    if by_name:
        return {name: _inside(item, kind, False, f"{where}.{name}", notes) for name, item in value.items()}
    return _tidied(value, kind, where, notes)
