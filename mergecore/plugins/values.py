"""Turns pydantic's errors about a plug-in's values into sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from mergecore.errors import nearest

PLAIN = {
    "Input should be a valid tuple": "must be a list",
    "Input should be a valid dictionary": "must be a mapping of keys",
    "Input should be": "must be",
    "valid string": "text",
    "valid number": "number",
    "valid integer": "whole number",
}
"""pydantic's words, and what a person who writes YAML calls the same."""
FORMS = ("(one)", "(each)", "(layers)", "(table)")
"""Tags of the forms that a parameter may have; they are no part of a place."""


def explained(error: ValidationError, model: type[Any], where: str, beside: Iterable[str] = ()) -> str:
    """Return a pydantic error as sentences: the key, what is wrong with it, and for an unknown key the nearest one."""
    said = []
    errors = error.errors(include_url=False)
    for problem in errors:
        if problem["type"] == "too_short" and any(_inside(other["loc"], problem["loc"]) for other in errors):
            continue  # a list counts as empty once what is in it is wrong
        place = ".".join([where, *(str(part) for part in problem["loc"] if part not in FORMS)])
        if problem["type"] == "extra_forbidden":
            parent, key = list(problem["loc"][:-1]), str(problem["loc"][-1])
            said.append(f"{place}: unknown key; {nearest(key, {*_keys(model, parent), *(() if parent else beside)})}")
        elif problem["type"] == "missing":
            said.append(f"{place}: must be given")
        elif problem["type"] in ("model_type", "dict_type"):
            said.append(f"{place}: {_mapping(model, problem)}{_given(problem['input'])}")
        else:
            said.append(f"{place}: {_message(problem)}{_given(problem['input'])}")
    return "; ".join(said)


def _inside(place: Sequence[int | str], other: Sequence[int | str]) -> bool:
    """Return whether one location of an error lies within another."""
    return len(place) > len(other) and tuple(place[: len(other)]) == tuple(other)


def _mapping(model: Any, problem: Mapping[str, Any]) -> str:
    """Return what must stand where something stands that is no mapping."""
    kind = _model_at(model, problem["loc"])
    if problem["type"] == "dict_type" or kind is None:
        return "must be a mapping of keys"
    implied = {"kind"} if "kind" in kind.model_fields and not kind.model_fields["kind"].is_required() else set()
    keys = " and ".join(", ".join(key for key in _names(kind) if key not in implied).rsplit(", ", 1))
    return f"must be a mapping with {keys}" + (", or text" if hasattr(kind, "_from_text") else "")


def _message(problem: Mapping[str, Any]) -> str:
    message = str(problem["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if isinstance(problem["input"], Mapping) and set(problem["input"]) == {"grid"}:
        return "a grid may stand in the methods of a sweep's spec only; write one value"
    for theirs, ours in PLAIN.items():
        message = message.replace(theirs, ours)
    return message


def _given(value: Any) -> str:
    """Return the value in brackets, where it is short enough to help."""
    text = repr(value)
    return f" (given: {text})" if len(text) <= 80 else ""


def _keys(model: Any, path: Sequence[Any]) -> list[str]:
    """Return the known keys, as people write them, of the (nested) model that `path` leads to."""
    return _names(_model_at(model, path) or model)


def _names(model: Any) -> list[str]:
    return [info.alias or name for name, info in getattr(model, "model_fields", {}).items()]


def _model_at(model: Any, path: Sequence[Any]) -> Any:
    """Return the (nested) model that `path` leads to; None where it leads to none below the model itself."""
    inner = None
    for part in path:
        fields = {info.alias or name: info for name, info in getattr(inner or model, "model_fields", {}).items()}
        if part in fields:
            inner = next(iter(_models(fields[part].annotation)), inner)
    return inner


def _models(annotation: Any) -> list[Any]:
    if hasattr(annotation, "model_fields"):
        return [annotation]
    return [kind for part in getattr(annotation, "__args__", ()) for kind in _models(part)]
