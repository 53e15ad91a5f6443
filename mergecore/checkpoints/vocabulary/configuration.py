"""The parts of a configuration that refer to tokens: at its top, and in `text_config` where a model takes images as
well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

TEXT = "text_config"
"""The part of a configuration that is the language model's own."""
COUNT = "vocab_size"
MORE_IDS = ("suppress_tokens", "begin_suppress_tokens")


def counts_in(config: Mapping[str, Any]) -> dict[str, int]:
    """Return {key with its part: number of rows}: none, one or both of `vocab_size` and `text_config.vocab_size`."""
    counts = {prefix + COUNT: part.get(COUNT) for prefix, part in _parts(config)}
    return {key: count for key, count in counts.items() if count is not None}


def with_count(config: Mapping[str, Any], rows: int) -> dict[str, Any] | None:
    """Return the configuration with another number of rows wherever it states one; None where it has no place for one.

    A `text_config` without a number means its class's default, so there the number must be written.
    """
    counts = counts_in(config) or ({f"{TEXT}.{COUNT}": rows} if _text(config) else {})
    changed = dict(config)
    if COUNT in counts:
        changed[COUNT] = rows
    if f"{TEXT}.{COUNT}" in counts:
        changed[TEXT] = {**_text(config), COUNT: rows}
    return changed if counts else None


def ids_in(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield (key with its part, id) of every token that a configuration refers to."""
    for prefix, part in _parts(config):
        for key, value in part.items():
            for number in value if isinstance(value, list) else [value]:
                if _is_id(key) and isinstance(number, int) and not isinstance(number, bool) and number >= 0:
                    yield prefix + key, number


def ends_in(config: Mapping[str, Any]) -> set[int]:
    """Return the ids of the tokens that end a text."""
    return {number for key, number in ids_in(config) if key.rpartition(".")[2] == "eos_token_id"}


def config_with(config: Mapping[str, Any], owner: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the owner's special tokens, each where the owner has it."""
    changed = _with_ids(config, owner)
    if _text(config):
        changed[TEXT] = _with_ids(_text(config), _text(owner))
    return changed


def _with_ids(config: Mapping[str, Any], owner: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if not _is_id(key)}
    return {**kept, **{key: value for key, value in owner.items() if _is_id(key)}}


def plain_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the special tokens of a configuration by key. Those at the top win over those of `text_config`."""
    return {
        key: value
        for part in (_text(config), config)
        for key, value in part.items()
        if _is_id(key) and value is not None
    }


def _is_id(key: str) -> bool:
    """Return whether a key holds ids of tokens; `image_token_index` and similar keys do."""
    return key.endswith(("_token_id", "_token_ids", "_token_index")) or key in MORE_IDS


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    part = config.get(TEXT)
    return part if isinstance(part, Mapping) else {}


def _parts(config: Mapping[str, Any]) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    return ("", config), (f"{TEXT}.", _text(config))
