"""Where a configuration speaks of tokens: at its top, and in the part about text where a model takes images as well."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

TEXT = "text_config"
"""The part of a configuration that is the language model's own."""
COUNT = "vocab_size"
MORE_IDS = ("suppress_tokens", "begin_suppress_tokens")


def counts_in(config: Mapping[str, Any]) -> dict[str, int]:
    """{key, with its part: how many rows it says}: none, one or both of `vocab_size` and `text_config.vocab_size`."""
    found = {prefix + COUNT: part.get(COUNT) for prefix, part in _parts(config)}
    return {key: said for key, said in found.items() if said is not None}


def with_count(config: Mapping[str, Any], rows: int) -> dict[str, Any] | None:
    """The same with another number of rows wherever one is said; None where nowhere is a place for it.

    A part about text that says none has what its class defaults to, so there it must be said.
    """
    said = counts_in(config) or ({f"{TEXT}.{COUNT}": rows} if _text(config) else {})
    found = dict(config)
    if COUNT in said:
        found[COUNT] = rows
    if f"{TEXT}.{COUNT}" in said:
        found[TEXT] = {**_text(config), COUNT: rows}
    return found if said else None


def ids_in(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """(key, with its part; id) of every token that a configuration speaks of."""
    for prefix, part in _parts(config):
        for key, value in part.items():
            for one in value if isinstance(value, list) else [value]:
                if _is_id(key) and isinstance(one, int) and not isinstance(one, bool) and one >= 0:
                    yield prefix + key, one


def ends_in(config: Mapping[str, Any]) -> set[int]:
    """The ids of tokens that end a text."""
    return {number for key, number in ids_in(config) if key.rpartition(".")[2] == "eos_token_id"}


def config_with(config: Mapping[str, Any], owner: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the special tokens of another, the owner's, each in the place where that has it."""
    found = _with_ids(config, owner)
    if _text(config):
        found[TEXT] = _with_ids(_text(config), _text(owner))
    return found


def _with_ids(config: Mapping[str, Any], owner: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if not _is_id(key)}
    return {**kept, **{key: value for key, value in owner.items() if _is_id(key)}}


def plain_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens of a configuration by key, those at the top before those of its part about text."""
    return {
        key: value
        for part in (_text(config), config)
        for key, value in part.items()
        if _is_id(key) and value is not None
    }


def _is_id(key: str) -> bool:
    """`image_token_index` and its kin are ids as well."""
    return key.endswith(("_token_id", "_token_ids", "_token_index")) or key in MORE_IDS


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    held = config.get(TEXT)
    return held if isinstance(held, Mapping) else {}


def _parts(config: Mapping[str, Any]) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    return ("", config), (f"{TEXT}.", _text(config))
