"""The tokenizer that lies with a checkpoint: its tokens and ids, and what it says of them; from its files alone."""

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
    """tokens: each with its id, as far as the model has rows for them; `beyond` are those for which it has none.

    owner: how messages call the model. held: tokenizer.json; settings: tokenizer_config.json.
    """

    owner: str
    held: Mapping[str, Any]
    settings: Mapping[str, Any]
    tokens: Mapping[str, int]
    beyond: frozenset[str]
    template: str | None

    @property
    def model(self) -> Mapping[str, Any]:
        """What splits text into tokens."""
        found: Mapping[str, Any] = self.held.get("model") or {}
        return found

    @property
    def added(self) -> dict[str, Mapping[str, Any]]:
        """Tokens that are looked for in the text before the model sees it, with their settings, by id."""
        held = sorted(self.held.get("added_tokens") or (), key=lambda entry: int(entry["id"]))
        return {entry["content"]: entry for entry in held if entry["content"] not in self.beyond}

    @property
    def pieces(self) -> dict[str, int]:
        """The model's own tokens that have rows."""
        return {token: number for token, number in pieces_of(self.model).items() if token not in self.beyond}

    @property
    def merges(self) -> list[tuple[str, str]]:
        """Of a byte-pair encoding: the pairs that are joined, in order."""
        return [_pair(merge) for merge in self.model.get("merges") or ()]

    @property
    def scores(self) -> dict[str, float]:
        """Of a Unigram model: what each piece adds to the score of a way of taking text apart."""
        held = self.model.get("vocab")
        return {str(piece): float(score) for piece, score in held} if isinstance(held, list) else {}

    @property
    def kind(self) -> tuple[str, str]:
        """How text becomes tokens, and how a token spells its text: only between equal kinds is a token a name."""
        model = self.model
        name = str(model.get("type") or _type(model))
        text = json.dumps(
            [self.held.get(part) for part in ("pre_tokenizer", "decoder", "normalizer")], ensure_ascii=False
        )
        spelling = "bytes" if '"ByteLevel"' in text else "▁ for blanks" if "▁" in text else "plain text"
        return name, f"{model['continuing_subword_prefix']}…" if model.get("continuing_subword_prefix") else spelling

    @property
    def roles(self) -> dict[str, frozenset[str]]:
        """{token: what it is said to be: bos_token, eos_token …}."""
        found: dict[str, set[str]] = {}
        for role in ROLES:
            held = self.settings.get(role)
            token = held.get("content") if isinstance(held, Mapping) else held
            if isinstance(token, str):
                found.setdefault(token, set()).add(role)
        return {token: frozenset(roles) for token, roles in found.items()}


Known = dict[str, tuple[dict[str, Any], dict[str, int]]]
"""Files by their SHA-256, with every token's id: a pool mostly has one tokenizer many times."""


def read_tokenizer(snapshot: Snapshot, rows: int, owner: str, known: Known) -> Tokenizer | None:
    """The tokenizer of a checkpoint whose embedding has so many rows; None where there is none beside it. known: grows.

    Raises SourceError for files that say no ids, or that no loader would read as they are meant.
    """
    files = snapshot.source.files
    # Older checkpoints name their special tokens in a file of its own.
    settings = {n: v for file in (MAP, SETTINGS) if file in files for n, v in read_json(snapshot.source, file).items()}
    if TOKENIZER not in files:
        slow = [name for name in SLOW if name in files]
        if slow:
            raise SourceError(
                f"{owner}: {snapshot.source.uri} has {slow[0]} and no {TOKENIZER}: which token has which row cannot be read; "
                "write one with AutoTokenizer.from_pretrained(folder, use_fast=True).save_pretrained(folder)"
            )
        return None
    where = f"{snapshot.source.uri}/{TOKENIZER}"
    sha256 = files[TOKENIZER].sha256 or where
    if sha256 not in known:
        held = read_json(snapshot.source, TOKENIZER)
        known[sha256] = held, _ids(held, where)
    held, tokens = known[sha256]
    beyond = frozenset(token for token, number in tokens.items() if number >= rows)
    usable = {token: number for token, number in tokens.items() if number < rows} if beyond else tokens
    return Tokenizer(owner, held, settings, usable, beyond, template_of(snapshot))


def _ids(held: Mapping[str, Any], where: str) -> dict[str, int]:
    """Every token's id, as a loader gives them. Raises SourceError where the file says otherwise, or two have one id."""
    try:
        found, _ = given_ids(held)
        for entry in held.get("added_tokens") or ():
            token, said = str(entry["content"]), int(entry["id"])
            if found[token] != said:
                raise SourceError(
                    f"{where}: its added token {token!r} has id {said}, which a loader would take for {found[token]}; load "
                    "it, look, and save it again"
                )
        by_id: dict[int, str] = {}
        for token, number in found.items():
            if number in by_id or number < 0:
                raise SourceError(f"{where}: {by_id.get(number)!r} and {token!r} have one id, {number}; save it again")
            by_id[number] = token
    except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
        raise SourceError(f"{where} is no tokenizer that can be read ({error}); fetch it again") from error
    return found


def given_ids(held: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
    """The ids that a loader gives to all tokens of a tokenizer.json, and to the model's own among them.

    An added token that is not one of the model's own gets the next number, whatever the file says.
    """
    pieces = {str(token): int(number) for token, number in pieces_of(held.get("model") or {}).items()}
    found, last = dict(pieces), -1
    for entry in held.get("added_tokens") or ():
        token = str(entry["content"])
        found.setdefault(token, max(len(pieces), last + 1))
        last = max(last, found[token])
    return found, pieces


def pieces_of(model: Mapping[str, Any]) -> dict[str, int]:
    """The model's own tokens with their ids, from the `model` of a tokenizer.json."""
    held = model.get("vocab") or {}
    return dict(held) if isinstance(held, Mapping) else {entry[0]: number for number, entry in enumerate(held)}


def _type(model: Mapping[str, Any]) -> str:
    """The type of a model that does not say it, as old files do not."""
    if "merges" in model:
        return "BPE"
    return "WordPiece" if "continuing_subword_prefix" in model else "WordLevel"


def _pair(merge: Any) -> tuple[str, str]:
    left, _, right = merge.partition(" ") if isinstance(merge, str) else (merge[0], "", merge[1])
    return left, right


def template_of(model: Snapshot) -> str | None:
    """The chat template that lies with a model's tokenizer."""
    files = model.source.files
    if TEMPLATE in files:
        return model.source.read(TEMPLATE, 0, files[TEMPLATE].size).decode()
    if SETTINGS not in files:
        return None
    template = read_json(model.source, SETTINGS).get("chat_template")
    if isinstance(template, list):
        template = next((one.get("template") for one in template if one.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def few(tokens: Iterable[str]) -> str:
    """The first tokens, and how many more there are."""
    held = list(tokens)
    shown = ", ".join(repr(token) for token in held[:5])
    return shown + (f" and {len(held) - 5} more" if len(held) > 5 else "")


def check_kinds(tokenizers: Iterable[Tokenizer]) -> list[str]:
    """What keeps a token of one from being the same token in another: reasons, none where there are none."""
    first, *others = tokenizers
    found = []
    for other in others:
        if other.kind != first.kind:
            ours, theirs = (" in ".join(one.kind) for one in (first, other))
            only = [token for token in other.tokens if token not in first.tokens]
            found.append(
                f"{other.owner} is tokenized by {theirs}, {first.owner} by {ours}: equal tokens need not be the same text "
                f"({len(only)} tokens stand in one only, like {few(only)})"
            )
    return found


def check_meanings(tokenizers: Iterable[Tokenizer], kept: Mapping[str, int]) -> list[str]:
    """Tokens of the result that mean different things in two models: reasons, none where there are none.

    A pad token is often one of the others as well; that is no contradiction.
    """
    seen: dict[str, tuple[str, frozenset[str]]] = {}
    found = []
    for one in tokenizers:
        for token, roles in one.roles.items():
            said = roles - {"pad_token"}
            if token not in kept or token not in one.tokens or not said:
                continue
            owner, before = seen.setdefault(token, (one.owner, said))
            if not before & said:
                found.append(
                    f"{token!r} is {' and '.join(sorted(before))} of {owner} and {' and '.join(sorted(said))} of {one.owner}"
                )
    return found


def refuse(reasons: list[str], remedy: str) -> None:
    """Raise MismatchError with the reasons, if there are any."""
    if reasons:
        raise MismatchError(f"tokenizers that contradict each other: {'; '.join(reasons)}. {remedy}")
