"""Where each row of a model's embeddings and head comes from, once all models have the result's vocabulary."""

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
    """The rows of one model's embedding, and the row of each of its tokens. copies: names of the adapters on it."""

    name: str
    rows: int
    tokens: Mapping[str, int]
    copies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Indices:
    """The models' rows in the order of the result's rows.

    index: for each model, the row that every row of the result is there; −1 where it has none.
    stands: which rows of the result stand for a token.
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
        indices = []
        for model in self.models:
            there = np.full(self.count, -1, dtype=np.int32)
            there[ids] = np.fromiter(map(model.tokens.get, names, repeat(-1)), dtype=np.int32, count=len(names))
            indices.append(there)
        object.__setattr__(self, "index", tuple(indices))
        object.__setattr__(self, "stands", stands)

    def padding(self, model: int) -> Index:
        """Return the rows that stand for no token, neither in the result nor in the model, and that the model has."""
        vocabulary = self.models[model]
        own = np.zeros(max(self.count, vocabulary.rows), dtype=bool)
        own[: vocabulary.rows] = True
        own[np.fromiter(vocabulary.tokens.values(), dtype=np.int64, count=len(vocabulary.tokens))] = False
        return np.flatnonzero(~self.stands & own[: self.count]).astype(np.int32)


@dataclass(frozen=True)
class ChosenRow:
    """One token's row by a rule. source: the model; None for zeros. there: the row there. everyone: replaces a model's
    own.
    """

    row: int
    source: int | None
    there: int
    everyone: bool


def chosen_rows(indices: Indices, rules: TokenizerRules) -> list[ChosenRow]:
    """Return the rows that the rules for single tokens choose. Raises SpecError and MismatchError naming the token."""
    numbers = {model.name: number for number, model in enumerate(indices.models)}
    adapters = {name for model in indices.models for name in model.copies}
    rows = []
    for token, rule in rules.tokens.items():
        where, row, everyone = f"tokenizer.tokens.{token}", indices.tokens[token], rule.to == "all"
        if rule.source is None:
            continue
        if isinstance(rule.source, NoRow):
            rows.append(ChosenRow(row, None, -1, everyone))
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
            rows.append(ChosenRow(row, numbers[name], rule.source.token_id, everyone))
            continue
        assert wanted is not None
        if wanted not in model.tokens:
            raise MismatchError(f"{where}: '{name}' has no row for the token {wanted!r}; name a model that has")
        rows.append(ChosenRow(row, numbers[name], model.tokens[wanted], everyone))
    return rows


def model_rows(indices: Indices, model: int, rules: TokenizerRules, chosen: Sequence[ChosenRow]) -> Rows:
    """Return the rows of one model. Their sources are the model itself, then all models in order (the first is the
    base).

    Raises MismatchError for tokens that no model has a row for.
    """
    own, base = indices.index[model].copy(), indices.index[0]
    lacking = indices.stands & (own < 0)
    pairs: list[list[tuple[Index, Index]]] = [[] for _ in range(len(indices.models) + 1)]
    for choice in chosen:
        if choice.everyone or lacking[choice.row]:
            own[choice.row], lacking[choice.row] = -1, False
            if choice.source is not None:
                pairs[choice.source + 1].append((np.array([choice.row], np.int32), np.array([choice.there], np.int32)))
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


def adapter_rows(indices: Indices, chosen: Sequence[ChosenRow]) -> Rows:
    """Return the rows of an adapter's update of the head: the base's rows, and zero where a row is not the
    base's own.
    """
    own = indices.index[0].copy()
    for choice in chosen:
        if choice.everyone:
            own[choice.row] = -1
    padding = indices.padding(0)
    own[padding] = padding
    none = np.zeros(0, dtype=np.int32)
    return rows_of(indices.count, [[_pair(own >= 0, own)]], none)


def _in_fold_order(indices: Indices) -> list[int]:
    """Return the models that a mean is over: the experts, and the base once for every adapter on it."""
    adapters = [0] * len(indices.models[0].copies)
    return adapters + list(range(1, len(indices.models)))


def _pair(chosen: NDArray[np.bool_], index: Index) -> tuple[Index, Index]:
    rows = np.flatnonzero(chosen).astype(np.int32)
    return rows, index[rows]
