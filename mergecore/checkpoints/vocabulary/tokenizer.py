"""The tokenizer of a checkpoint: its tokens and ids, and its settings, from its files alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mergecore.checkpoints.snapshot import Snapshot, read_json
from mergecore.errors import MismatchError, SourceError

TOKENIZER = "tokenizer.json"
SETTINGS = "tokenizer_config.json"
TEMPLATE = "chat_template.jinja"
MAP = "special_tokens_map.json"
SLOW = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
"""Files of a tokenizer that say no ids to us."""
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "cls_token", "mask_token", "pad_token")
FLAGS = ("special", "single_word", "lstrip", "rstrip", "normalized")


@dataclass(frozen=True)
class Tokenizer:
    """One model's tokenizer.

    owner: the model's name in messages. content: tokenizer.json. settings: tokenizer_config.json.
    tokens: token → id, of the tokens that the model has rows for. beyond: the tokens for which it has none.
    """

    owner: str
    content: Mapping[str, Any]
    settings: Mapping[str, Any]
    tokens: Mapping[str, int]
    beyond: frozenset[str]
    template: str | None

    @property
    def model(self) -> Mapping[str, Any]:
        """The part of tokenizer.json that splits text into tokens."""
        model: Mapping[str, Any] = self.content.get("model") or {}
        return model

    @property
    def added(self) -> dict[str, Mapping[str, Any]]:
        """The tokens that are looked for in the text before the model sees it, with their settings, by id."""
        entries = sorted(self.content.get("added_tokens") or (), key=lambda entry: int(entry["id"]))
        return {entry["content"]: entry for entry in entries if entry["content"] not in self.beyond}

    @property
    def pieces(self) -> dict[str, int]:
        """The model's own tokens that have rows."""
        return {token: number for token, number in pieces_of(self.model).items() if token not in self.beyond}

    @property
    def merges(self) -> list[tuple[str, str]]:
        """The pairs that a byte-pair encoding joins, in order."""
        return [_pair(merge) for merge in self.model.get("merges") or ()]

    @property
    def scores(self) -> dict[str, float]:
        """The score of each piece of a Unigram model: a way to split a text has the sum of its pieces' scores."""
        pieces = self.model.get("vocab")
        return {str(piece): float(score) for piece, score in pieces} if isinstance(pieces, list) else {}

    @property
    def kind(self) -> tuple[str, str]:
        """How text becomes tokens, and how a token spells its text. Tokens are comparable between equal kinds only."""
        model = self.model
        name = str(model.get("type") or _type(model))
        text = json.dumps(
            [self.content.get(part) for part in ("pre_tokenizer", "decoder", "normalizer")], ensure_ascii=False
        )
        spelling = "bytes" if '"ByteLevel"' in text else "▁ for blanks" if "▁" in text else "plain text"
        return name, f"{model['continuing_subword_prefix']}…" if model.get("continuing_subword_prefix") else spelling

    @property
    def roles(self) -> dict[str, frozenset[str]]:
        """{token: its roles, such as bos_token and eos_token}."""
        by_token: dict[str, set[str]] = {}
        for role in ROLES:
            entry = self.settings.get(role)
            token = entry.get("content") if isinstance(entry, Mapping) else entry
            if isinstance(token, str):
                by_token.setdefault(token, set()).add(role)
        return {token: frozenset(roles) for token, roles in by_token.items()}


Known = dict[str, tuple[dict[str, Any], dict[str, int]]]
"""Files by their SHA-256, with every token's id: a pool mostly has one tokenizer many times."""


def read_tokenizer(snapshot: Snapshot, rows: int, owner: str, known: Known) -> Tokenizer | None:
    """Return the tokenizer of a checkpoint; None where it has none. rows: of its embedding. known: files read; it
    grows.

    Raises SourceError for files that give no ids, or that a loader would read in another way.
    """
    files = snapshot.source.files
    # Older checkpoints name their special tokens in a file of its own.
    settings = {n: v for file in (MAP, SETTINGS) if file in files for n, v in read_json(snapshot.source, file).items()}
    if TOKENIZER not in files:
        slow = [name for name in SLOW if name in files]
        if slow:
            raise SourceError(
                f"{owner}: {snapshot.source.uri} has {slow[0]} and no {TOKENIZER}: which token has which row cannot "
                "be read; write one with AutoTokenizer.from_pretrained(folder, use_fast=True).save_pretrained(folder)"
            )
        return None
    where = f"{snapshot.source.uri}/{TOKENIZER}"
    sha256 = files[TOKENIZER].sha256 or where
    if sha256 not in known:
        content = read_json(snapshot.source, TOKENIZER)
        known[sha256] = content, _ids(content, where)
    content, tokens = known[sha256]
    beyond = frozenset(token for token, number in tokens.items() if number >= rows)
    usable = {token: number for token, number in tokens.items() if number < rows} if beyond else tokens
    return Tokenizer(owner, content, settings, usable, beyond, template_of(snapshot))


def _ids(content: Mapping[str, Any], where: str) -> dict[str, int]:
    """Return every token's id, as a loader gives it.

    Raises SourceError where the file says otherwise, or where two tokens have one id.
    """
    try:
        _check_parts(content.get("model") or {})
        ids, _ = loader_ids(content)
        for entry in content.get("added_tokens") or ():
            token, number_there = str(entry["content"]), int(entry["id"])
            if ids[token] != number_there:
                raise SourceError(
                    f"{where}: its added token {token!r} has id {number_there}, which a loader would take for "
                    f"{ids[token]}; load it, look, and save it again"
                )
        by_id: dict[int, str] = {}
        for token, number in ids.items():
            if number in by_id or number < 0:
                raise SourceError(f"{where}: {by_id.get(number)!r} and {token!r} have one id, {number}; save it again")
            by_id[number] = token
    except (AttributeError, KeyError, TypeError, IndexError, ValueError, OverflowError) as error:
        raise SourceError(f"{where} is no tokenizer that can be read ({error}); fetch it again") from error
    return ids


def _check_parts(model: Mapping[str, Any]) -> None:
    """Raise TypeError or ValueError where merges are no pairs of text, or pieces of a Unigram model have no scores."""
    for merge in model.get("merges") or ():
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if len(pair) < 2 or not all(isinstance(part, str) and part for part in pair[:2]):
            raise ValueError(f"its merge {merge!r:.60} is no pair of tokens")
    pieces = model.get("vocab") or {}
    for entry in pieces if isinstance(pieces, list) else ():
        if len(entry) != 2 or not isinstance(entry[0], str) or not isinstance(entry[1], int | float):
            raise ValueError(f"its piece {entry!r:.60} is no text with a score")


def loader_ids(content: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """Return the ids that a loader gives to all tokens of a tokenizer.json, and those of the model's own tokens.

    An added token that is not one of the model's own gets the next number, whatever the file says.
    """
    pieces = {str(token): int(number) for token, number in pieces_of(content.get("model") or {}).items()}
    ids, last = dict(pieces), -1
    for entry in content.get("added_tokens") or ():
        token = str(entry["content"])
        ids.setdefault(token, max(len(pieces), last + 1))
        last = max(last, ids[token])
    return ids, pieces


def pieces_of(model: Mapping[str, Any]) -> dict[str, int]:
    """Return the model's own tokens with their ids. model: that part of a tokenizer.json."""
    entries = model.get("vocab") or {}
    return dict(entries) if isinstance(entries, Mapping) else {entry[0]: number for number, entry in enumerate(entries)}


def _type(model: Mapping[str, Any]) -> str:
    """Return the type of a model whose file does not say it, as old files do not."""
    if "merges" in model:
        return "BPE"
    return "WordPiece" if "continuing_subword_prefix" in model else "WordLevel"


def _pair(merge: Any) -> tuple[str, str]:
    left, _, right = merge.partition(" ") if isinstance(merge, str) else (merge[0], "", merge[1])
    return left, right


def template_of(model: Snapshot) -> str | None:
    """Return the chat template of a model's tokenizer; None where it has none."""
    files = model.source.files
    if TEMPLATE in files:
        try:
            return model.source.read(TEMPLATE, 0, files[TEMPLATE].size).decode()
        except UnicodeDecodeError as error:
            raise SourceError(f"{model.source.uri}/{TEMPLATE} is no UTF-8 text: {error}") from None
    if SETTINGS not in files:
        return None
    template = read_json(model.source, SETTINGS).get("chat_template")
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, Mapping)]
        template = next((entry.get("template") for entry in entries if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def few(tokens: Iterable[str]) -> str:
    """List the first tokens, and say how many more there are."""
    listed = list(tokens)
    shown = ", ".join(repr(token) for token in listed[:5])
    return shown + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")


def check_kinds(tokenizers: Iterable[Tokenizer]) -> list[str]:
    """Return the reasons why equal tokens may differ in meaning: tokenizers of different kinds."""
    first, *others = tokenizers
    reasons = []
    for other in others:
        if other.kind != first.kind:
            ours, theirs = (" in ".join(tokenizer.kind) for tokenizer in (first, other))
            only = [token for token in other.tokens if token not in first.tokens]
            reasons.append(
                f"{other.owner} is tokenized by {theirs}, {first.owner} by {ours}: equal tokens need not be the same "
                f"text ({len(only)} tokens stand in one only, like {few(only)})"
            )
    return reasons


def check_meanings(tokenizers: Iterable[Tokenizer], kept: Mapping[str, int]) -> list[str]:
    """Return the tokens of the result that have different roles in two models, as reasons.

    A pad token is often another token as well; that is no contradiction.
    """
    seen: dict[str, tuple[str, frozenset[str]]] = {}
    reasons = []
    for tokenizer in tokenizers:
        for token, roles in tokenizer.roles.items():
            meant = roles - {"pad_token"}
            if token not in kept or token not in tokenizer.tokens or not meant:
                continue
            owner, before = seen.setdefault(token, (tokenizer.owner, meant))
            if not before & meant:
                reasons.append(
                    f"{token!r} is {' and '.join(sorted(before))} of {owner} and {' and '.join(sorted(meant))} of "
                    f"{tokenizer.owner}"
                )
    return reasons


def refuse(reasons: list[str], remedy: str) -> None:
    """Raise MismatchError with the reasons, if there are any."""
    if reasons:
        raise MismatchError(f"tokenizers that contradict each other: {'; '.join(reasons)}. {remedy}")
