"""How the small files of two checkpoints differ: configuration, tokenizer, chat template and the rest. No weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mergecore.checkpoints.snapshot import Snapshot, read_json
from mergecore.checkpoints.sources import is_companion
from mergecore.checkpoints.vocabulary.companions import GENERATION
from mergecore.checkpoints.vocabulary.tokenizer import SETTINGS, TOKENIZER, Tokenizer, read_tokenizer, template_of
from mergecore.errors import SourceError

MOST_ROWS = 1 << 40
"""More rows than an embedding has: every token of a tokenizer counts here."""
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding")
"""The parts of a tokenizer.json beside its tokens."""
ABSENT = "not there"


@dataclass(frozen=True)
class Entry:
    """A value that differs. first, second: as they are; ABSENT where one side has none."""

    key: str
    first: Any
    second: Any


@dataclass(frozen=True)
class TokenDifferences:
    """How two tokenizers differ. shared: tokens that both have with one id. moved: {token: both ids} of those with two
    ids. only_first, only_second: tokens of one side, by id. entries: rules and settings that differ.
    """

    shared: int
    moved: Mapping[str, tuple[int, int]]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    entries: tuple[Entry, ...]

    def __bool__(self) -> bool:
        return bool(self.moved or self.only_first or self.only_second or self.entries)


@dataclass(frozen=True)
class SmallFiles:
    """How the files beside the weights differ. config: of config.json (of an adapter: adapter_config.json).

    generation: of generation_config.json. tokens: None where neither side has a tokenizer that can be read, with the
    reason in `unread`. files: names of files that differ; only_first, only_second: of files that one side has.
    """

    config: tuple[Entry, ...]
    generation: tuple[Entry, ...]
    tokens: TokenDifferences | None
    unread: str
    files: tuple[str, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]


def small_files(first: Snapshot, second: Snapshot) -> SmallFiles:
    """Return how the files beside the weights of two checkpoints differ. Raises SourceError for JSON that is none."""
    ours, theirs = ({n: f for n, f in model.source.files.items() if is_companion(n)} for model in (first, second))
    tokens, unread = None, ""
    try:
        tokens = token_differences(first, second)
    except SourceError as error:
        unread = str(error)
    return SmallFiles(
        config=entries(first.config, second.config),
        generation=entries(*(_json(model, GENERATION) for model in (first, second))),
        tokens=tokens,
        unread=unread,
        files=tuple(sorted(n for n in ours.keys() & theirs.keys() if ours[n].sha256 != theirs[n].sha256)),
        only_first=tuple(sorted(ours.keys() - theirs.keys())),
        only_second=tuple(sorted(theirs.keys() - ours.keys())),
    )


def entries(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[Entry, ...]:
    """Return what differs between two objects of JSON, by dotted key, sorted. Lists are compared as a whole."""
    ours, theirs = _leaves(first, ""), _leaves(second, "")
    keys = sorted(ours.keys() | theirs.keys())
    pairs = [Entry(key, ours.get(key, ABSENT), theirs.get(key, ABSENT)) for key in keys]
    return tuple(pair for pair in pairs if not _same(pair.first, pair.second))


def _same(first: Any, second: Any) -> bool:
    """Return whether two values of JSON are the same; true is not 1."""
    return first == second and isinstance(first, bool) == isinstance(second, bool)


def _leaves(value: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            leaves |= _leaves(inner, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = inner
    return leaves


def token_differences(first: Snapshot, second: Snapshot) -> TokenDifferences | None:
    """Return how the tokenizers differ; None where neither checkpoint has one.

    Raises SourceError for one that cannot be read.
    """
    sides = [read_tokenizer(model, MOST_ROWS, model.source.uri, {}) for model in (first, second)]
    if sides == [None, None]:
        return None
    ours, theirs = ({} if side is None else side.tokens for side in sides)
    both = ours.keys() & theirs.keys()
    rules = [_rules(side, template_of(model)) for side, model in zip(sides, (first, second), strict=True)]
    return TokenDifferences(
        shared=sum(ours[token] == theirs[token] for token in both),
        moved={token: (ours[token], theirs[token]) for token in sorted(both) if ours[token] != theirs[token]},
        only_first=tuple(sorted(ours.keys() - theirs.keys(), key=ours.__getitem__)),
        only_second=tuple(sorted(theirs.keys() - ours.keys(), key=theirs.__getitem__)),
        entries=entries(*rules),
    )


def _rules(tokenizer: Tokenizer | None, template: str | None) -> dict[str, Any]:
    """Return what decides, beside the tokens, how text becomes ids."""
    if tokenizer is None:
        return {TOKENIZER: ABSENT}
    settings = _without(tokenizer.settings, ("added_tokens_decoder", "chat_template"))
    flags = {token: _without(entry, ("id",)) for token, entry in tokenizer.added.items()}
    rules: dict[str, Any] = {
        "model": _without(tokenizer.model, ("vocab", "merges")),
        "merges": [" ".join(pair) for pair in tokenizer.merges],
        "scores": tokenizer.scores,
        "added_tokens": flags,
        **{part: tokenizer.content.get(part) for part in PARTS},
    }
    return {TOKENIZER: rules, SETTINGS: settings} | ({"chat_template": template} if template is not None else {})


def _without(values: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def _json(snapshot: Snapshot, name: str) -> Mapping[str, Any]:
    return read_json(snapshot.source, name) if name in snapshot.source.files else {}
