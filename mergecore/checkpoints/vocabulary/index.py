"""For every model, where each row of its embeddings and head comes from once all have the result's vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from mergecore.checkpoints.vocabulary.rows import Index, Rows, rows_of
from mergecore.checkpoints.vocabulary.rules import NoRow, TokenizerRules, TokenOf
from mergecore.errors import MismatchError, SpecError, nearest


@dataclass(frozen=True)
class Vocabulary:
    """What one model has: rows of its embedding, and which of them its tokens have. copies: adapters on it, by name."""

    name: str
    rows: int
    tokens: Mapping[str, int]
    copies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Indices:
    """index: for each model the row that every row of the result is there, −1 where it has none.

    stands: which rows of the result stand for a token; padding: the models' own rows that stand for none on either side.
    """

    models: tuple[Vocabulary, ...]
    tokens: Mapping[str, int]
    count: int
    index: tuple[Index, ...] = field(init=False)
    stands: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        names, ids = list(self.tokens), np.fromiter(self.tokens.values(), dtype=np.int64, count=len(self.tokens))
        stands = np.zeros(self.count, dtype=bool)
        stands[ids] = True
        found = []
        for model in self.models:
            held = np.full(self.count, -1, dtype=np.int32)
            held[ids] = np.fromiter(map(model.tokens.get, names, repeat(-1)), dtype=np.int32, count=len(names))
            found.append(held)
        object.__setattr__(self, "index", tuple(found))
        object.__setattr__(self, "stands", stands)

    def padding(self, model: int) -> Index:
        """Rows of the result for no token that the model has a row for, for no token either."""
        one = self.models[model]
        own = np.zeros(max(self.count, one.rows), dtype=bool)
        own[: one.rows] = True
        own[np.fromiter(one.tokens.values(), dtype=np.int64, count=len(one.tokens))] = False
        return np.flatnonzero(~self.stands & own[: self.count]).astype(np.int32)


@dataclass(frozen=True)
class Given:
    """One token's row by a rule: the row of a model, None for zeros. everyone: also where a model has the token."""

    row: int
    source: int | None
    there: int
    everyone: bool


def given_rows(indices: Indices, rules: TokenizerRules) -> list[Given]:
    """What the rules for single tokens come to. Raises SpecError and MismatchError naming the token."""
    numbers = {model.name: number for number, model in enumerate(indices.models)}
    adapters = {name for model in indices.models for name in model.copies}
    found = []
    for token, rule in rules.tokens.items():
        where, row, everyone = f"tokenizer.tokens.{token}", indices.tokens[token], rule.to == "all"
        if rule.source is None:
            continue
        if isinstance(rule.source, NoRow):
            found.append(Given(row, None, -1, everyone))
            continue
        name = rule.source.model if isinstance(rule.source, TokenOf) else rule.source
        if name in adapters:
            raise SpecError(f"{where}: '{name}' is an adapter and has no embeddings of its own; name the base")
        if name not in numbers:
            raise SpecError(f"{where}: no model is called '{name}'; {nearest(name, numbers)}")
        model = indices.models[numbers[name]]
        wanted = rule.source.token if isinstance(rule.source, TokenOf) else token
        if isinstance(rule.source, TokenOf) and rule.source.token_id is not None:
            if rule.source.token_id >= model.rows:
                raise MismatchError(f"{where}: '{name}' has rows 0 to {model.rows - 1}, no {rule.source.token_id}")
            found.append(Given(row, numbers[name], rule.source.token_id, everyone))
            continue
        assert wanted is not None
        if wanted not in model.tokens:
            raise MismatchError(f"{where}: '{name}' has no row for the token {wanted!r}; name a model that has")
        found.append(Given(row, numbers[name], model.tokens[wanted], everyone))
    return found


def model_rows(indices: Indices, model: int, rules: TokenizerRules, given: Sequence[Given]) -> Rows:
    """The rows of one model. Their sources: the model itself, then all models in order (the first is the base).

    Raises MismatchError for tokens that no model has a row for.
    """
    own, base = indices.index[model].copy(), indices.index[0]
    lacking = indices.stands & (own < 0)
    pairs: list[list[tuple[Index, Index]]] = [[] for _ in range(len(indices.models) + 1)]
    for one in given:
        if one.everyone or lacking[one.row]:
            own[one.row], lacking[one.row] = -1, False
            if one.source is not None:
                pairs[one.source + 1].append((np.array([one.row], np.int32), np.array([one.there], np.int32)))
    others = _in_fold_order(indices)
    has = np.zeros(indices.count, dtype=bool)
    for number in others:
        has |= indices.index[number] >= 0
    from_base = lacking & (base >= 0) & (~has if rules.missing == "mean" else True)
    pairs[1].append(_pair(from_base, base))
    for number in others:
        pairs[number + 1].append(_pair(lacking & ~from_base & (indices.index[number] >= 0), indices.index[number]))
    nowhere = lacking & ~from_base & ~has
    if nowhere.any():
        names = [token for token, row in indices.tokens.items() if nowhere[row]]
        raise MismatchError(
            f"no model has a row for {', '.join(map(repr, names[:5]))}; say where it comes from: tokenizer.tokens"
        )
    padding = indices.padding(model)
    rows = np.concatenate([np.flatnonzero(own >= 0).astype(np.int32), padding])
    there = np.concatenate([own[own >= 0], padding])
    order = np.argsort(rows, kind="stable")
    pairs[0].append((rows[order], there[order]))
    filled = ~indices.stands
    filled[padding] = False
    return rows_of(indices.count, pairs, np.flatnonzero(filled).astype(np.int32))


def adapter_rows(indices: Indices, given: Sequence[Given]) -> Rows:
    """The rows of an adapter's update of the head: the base's, nothing where a row is not the base's own."""
    own = indices.index[0].copy()
    for one in given:
        if one.everyone:
            own[one.row] = -1
    padding = indices.padding(0)
    own[padding] = padding
    none = np.zeros(0, dtype=np.int32)
    return rows_of(indices.count, [[_pair(own >= 0, own)]], none)


def _in_fold_order(indices: Indices) -> list[int]:
    """The models that a mean is over: experts, and the base once for every adapter on it."""
    adapters = [0] * len(indices.models[0].copies)
    return adapters + list(range(1, len(indices.models)))


def _pair(chosen: NDArray[np.bool_], index: Index) -> tuple[Index, Index]:
    rows = np.flatnonzero(chosen).astype(np.int32)
    return rows, index[rows]
