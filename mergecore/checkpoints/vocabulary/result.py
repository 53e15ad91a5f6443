"""The tokenizer of the result: the base's, an expert's, or the union of all, with the tokens that a recipe adds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergecore.checkpoints.vocabulary.rules import TokenizerRules, TokenOf
from mergecore.checkpoints.vocabulary.tokenizer import FLAGS, Tokenizer, check_kinds, few, loader_ids
from mergecore.errors import MismatchError

PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
"""Settings of a token that is added by its text alone."""


@dataclass(frozen=True)
class ResultTokenizer:
    """The result's tokens with their ids.

    owner: the model whose files, special tokens and chat template the result has.
    content: tokenizer.json where it differs from the owner's file, else None.
    dropped: tokens of the owner's tokenizer that no model has a row for.
    """

    owner: Tokenizer
    tokens: Mapping[str, int]
    content: Mapping[str, Any] | None
    added: Mapping[str, Mapping[str, Any]]
    dropped: tuple[str, ...]


class Draft:
    """A tokenizer under change. Ids that are there stay."""

    def __init__(self, owner: Tokenizer, wanted: set[str]) -> None:
        """wanted: tokens that some model has a row for, or that a rule gives one."""
        self.owner = owner
        whole = {**owner.content, "added_tokens": owner.content.get("added_tokens") or []}
        ids, pieces = loader_ids(whole)
        self.dropped = tuple(sorted(owner.beyond - wanted))
        self.pieces = {token: number for token, number in pieces.items() if token not in self.dropped}
        if len(self.pieces) < len(pieces):
            raise MismatchError(
                f"{owner.owner}: no model has a row for {few(token for token in pieces if token in self.dropped)} of "
                "its tokenizer; give each one: tokenizer: {tokens: {…: {source: {kind: zero}}}}"
            )
        entries = sorted(whole["added_tokens"], key=lambda entry: int(entry["id"]))
        self.added = {entry["content"]: dict(entry) for entry in entries if entry["content"] not in self.dropped}
        self.tokens = {token: number for token, number in ids.items() if token not in self.dropped}
        self.merges = list(owner.merges)
        self.scores = owner.scores
        self.changed = bool(self.dropped)

    def _next(self) -> int:
        self.changed = True
        return max(self.tokens.values(), default=-1) + 1

    def add_piece(self, token: str) -> None:
        """Add a token of the model, which finds it in text by itself. An added token that becomes one keeps its id."""
        self.pieces[token] = self.tokens[token] = self.tokens[token] if token in self.tokens else self._next()
        self.changed = True

    def add_token(self, token: str, settings: Mapping[str, Any]) -> None:
        """Add a token that is looked for in the text before the model sees it; or settings for one of the
        model's own.
        """
        if token not in self.tokens:
            self.tokens[token] = self._next()
        self.changed = True
        flags = {flag: settings.get(flag, PLAIN[flag]) for flag in FLAGS}
        self.added[token] = {"id": self.tokens[token], "content": token, **flags}

    def add_merges(self, merges: Sequence[tuple[str, str]]) -> None:
        """Add pairs that are joined after those that are there, as far as the model has their tokens."""
        known, prefix = set(self.merges), str(self.owner.model.get("continuing_subword_prefix") or "")
        for left, right in merges:
            tokens = (left, right, left + right.removeprefix(prefix))
            if (left, right) not in known and all(token in self.pieces for token in tokens):
                self.merges.append((left, right))

    def content(self) -> dict[str, Any]:
        """Return tokenizer.json."""
        model, pieces = dict(self.owner.model), sorted(self.pieces.items(), key=lambda entry: entry[1])
        if isinstance(model.get("vocab"), list):
            model["vocab"] = [[piece, self.scores[piece]] for piece, _ in pieces]
        else:
            model["vocab"] = dict(pieces)
        raw = model.get("merges") or []
        if len(self.merges) > len(raw):
            as_text = all(isinstance(merge, str) for merge in raw) and not any(" " in p for m in self.merges for p in m)
            model["merges"] = [" ".join(merge) if as_text else list(merge) for merge in self.merges]
        added = sorted(self.added.values(), key=lambda entry: int(entry["id"]))
        content = {**self.owner.content, "added_tokens": added, "model": model}
        if loader_ids(content)[0] != self.tokens:
            # A loader numbers added tokens after the model's own; where they stand between, they must be its own too.
            vocabulary = {**self.pieces, **{token: int(entry["id"]) for token, entry in self.added.items()}}
            model["vocab"] = dict(sorted(vocabulary.items(), key=lambda entry: entry[1]))
        return content


def result_tokenizer(
    owner: Tokenizer, models: Mapping[str, Tokenizer], rules: TokenizerRules, union: bool
) -> tuple[ResultTokenizer, list[str]]:
    """Return the tokenizer, and the contradictions in it. models: by name, the base first. union: of all of them.

    Raises MismatchError for one of its tokens that no model has a row for.
    """
    known = {token for model in models.values() for token in model.tokens}
    chosen = {token for token, rule in rules.tokens.items() if rule.source is not None}
    draft = Draft(owner, known | chosen)
    reasons: list[str] = []
    others = [model for model in models.values() if union and model.content != owner.content]
    foreign = []
    for model in others:
        conflicts = _join_pieces(draft, model)
        reasons += conflicts
        foreign += [model] if conflicts else []
    for model in others:
        reasons += _join_added(draft, model)
    for token in (token for model in foreign for token in model.pieces if token not in draft.tokens):
        draft.add_token(token, PLAIN)
    for token, rule in rules.tokens.items():
        if token not in draft.tokens:
            if token not in known and rule.source is None:
                raise MismatchError(
                    f"tokenizer.tokens: no model has the token {token!r}; say where its row comes from: "
                    "a token of a model {model: …, token: …}, or {kind: zero}"
                )
            source = rule.source.model if isinstance(rule.source, TokenOf) else rule.source
            first = [models[source]] if isinstance(source, str) and source in models else []
            settings = next((model.added[token] for model in [*first, *models.values()] if token in model.added), PLAIN)
            draft.add_token(token, settings)
    content = draft.content() if draft.changed else None
    return ResultTokenizer(owner, draft.tokens, content, draft.added, draft.dropped), reasons


def _join_pieces(draft: Draft, other: Tokenizer) -> list[str]:
    """Add another tokenizer's own tokens. Return the reasons why they cannot be added as own tokens."""
    owner = draft.owner
    new = [token for token in other.pieces if token not in draft.tokens]
    if kinds := check_kinds([owner, other]):
        return kinds
    reasons = []
    ours, theirs = owner.merges, other.merges
    differing = next((n for n, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
    if differing is not None:
        reasons.append(
            f"merge {differing} is {' + '.join(ours[differing])} in {owner.owner} and {' + '.join(theirs[differing])} "
            f"in {other.owner}, which has {len(new)} tokens of its own ({few(new)})"
        )
    own = {token: other.scores.get(token, 0.0) for token in other.pieces if token not in draft.pieces}
    for token in other.added:  # what is special is looked for in the text before; it comes with the added tokens
        if other.added[token].get("special") and token not in draft.tokens:
            own.pop(token, None)
    if owner.kind[0] == "Unigram":
        reasons += _unlike_scores(draft, other, own)
    if not reasons:
        draft.scores.update(own)
        for token in own:
            draft.add_piece(token)
        if len(theirs) > len(ours):
            draft.add_merges(theirs[len(ours) :])
    return reasons


def _unlike_scores(draft: Draft, other: Tokenizer, own: Mapping[str, float]) -> list[str]:
    """Return the reasons why another Unigram model's pieces cannot be added with their scores.

    Where none of the new pieces occurs in a text, the best way to split it must stay what it is.
    """
    ours, reasons = draft.scores, list[str]()
    differing = [piece for piece, score in other.scores.items() if ours.get(piece, score) != score]
    if differing:
        reasons.append(
            f"{few(differing)} {'has' if len(differing) == 1 else 'have'} other scores in {other.owner} than before: "
            "it takes text apart in another way"
        )
    if own and bool(draft.owner.model.get("byte_fallback")) != bool(other.model.get("byte_fallback")):
        reasons.append(f"{other.owner} does not spell unknown characters as {draft.owner.owner} does (byte_fallback)")
    # A character that no piece has costs 10 more than the costliest piece.
    if low := [piece for piece, score in own.items() if score < min(ours.values(), default=0.0)]:
        reasons.append(
            f"{other.owner} has {few(low)} with lower scores than any before, by which unknown characters go"
        )
    # A piece's id is its place in the list; tokens that were added to it stand behind.
    if own and max(draft.tokens.values()) >= len(draft.pieces):
        reasons.append(f"{other.owner} has {few(own)} of its own, where {draft.owner.owner} has its added tokens")
    return reasons


def _join_added(draft: Draft, other: Tokenizer) -> list[str]:
    """Add another tokenizer's added tokens. Return those that have other settings than the same token has already."""
    reasons = []
    for token, entry in other.added.items():
        known = draft.added.get(token)
        if known is None and token in draft.tokens and entry.get("special"):
            reasons.append(f"{token!r} is special in {other.owner} and an ordinary token before")
        elif known is None:
            draft.add_token(token, entry)
        else:
            differing = [flag for flag in FLAGS if bool(known.get(flag)) != bool(entry.get(flag))]
            if differing:
                flag = "special" if "special" in differing else differing[0]
                ways = "is" if entry.get(flag) else "is not"
                reasons.append(f"{token!r} {ways} {flag} in {other.owner}, unlike before")
    return reasons
