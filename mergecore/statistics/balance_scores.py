"""The scores β of parameter competition balancing: how much an expert's change of a coordinate counts (PCB, 2024).

β_i = intra_i ⊙ inter_i. The paper and the three forms in the authors' repository differ in both factors:

    form     intra                            inter                           where
    es       exp(T n_i²)                      Σ_j tanh(ñ_i ñ_j)               vision_source_code/pcb_ES.py
    vision   exp(T n_i²)                      tanh(τ_i Σ_j ñ_j)               vision_source_code/pcb.py
    nlp      exp(T n_i²)                      tanh(τ_i Σ_j τ_j)               nlp_source_code, pcb-merging.py
    paper    Softmax(T Norm(τ_i ⊙ τ_i))       Σ_j Softmax(Norm(τ_i ⊙ τ_j))    §3.2

n_i = Norm(clip |τ_i|), ñ_i = sign(τ_i) n_i; Norm is min–max and Softmax runs over all coordinates of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mergecore.arithmetic.transcendental import exponential, small_tanh, tanh
from mergecore.arithmetic.trims import divided, folded_sum
from mergecore.plugins.statistic import Statistics
from mergecore.statistics.softmax_means import Scaling, normalized, pairs, scaling

Form = Literal["es", "vision", "nlp", "paper"]


@dataclass(frozen=True)
class Ends:
    """Between which magnitudes one expert's changes are clipped, and how they are normalised then."""

    low: float
    high: float
    scaling: Scaling


@dataclass(frozen=True)
class Balancing:
    """What `scores` needs to know of the whole model.

    ends: per expert, of the authors' forms. Of form 'paper': per pair of experts its scaling and the mean that is
    `inter`'s divisor, per expert the mean that is `intra`'s, and 1 where its task vector is not all zeros, else 0.
    """

    form: Form
    ends: Sequence[Ends] = ()
    pairs: Sequence[Scaling] = ()
    inter: Sequence[float] = ()
    intra: Sequence[float] = ()
    alive: Sequence[float] = ()


def balancing(form: Form, count: int, statistics: Statistics) -> Balancing:
    """Return what `scores` needs to know of the whole model, for `count` experts."""
    if form != "paper":
        quantiles = [result.numbers for result in statistics["quantiles"]]
        return Balancing(form, [Ends(q["low"], q["high"], scaling(q["low"], q["high"])) for q in quantiles])
    numbers = statistics["softmax"][0].numbers
    extremes = zip(numbers["low"], numbers["high"], strict=True)
    own = [position for position, (i, j) in enumerate(pairs(count)) if i == j]
    return Balancing(
        form,
        pairs=[scaling(low, high) for low, high in extremes],
        inter=numbers["inter"],
        intra=numbers["intra"],
        alive=[float(numbers["high"][position] > 0) for position in own],
    )


def scores(deltas: Sequence[Tensor], balancing: Balancing) -> list[Tensor]:
    """Return β_i = intra_i ⊙ inter_i. deltas: T flat float32 tensors of one length, parts of the task vectors.

    intra is divided by e^T so that it cannot overflow; every form takes common factors of β out again.
    """
    if balancing.form == "paper":
        return _softmax_scores(deltas, balancing)
    shares = [
        normalized(delta.abs().clamp(ends.low, ends.high), ends.scaling)
        for delta, ends in zip(deltas, balancing.ends, strict=True)
    ]
    signed = [torch.sign(delta) * share for delta, share in zip(deltas, shares, strict=True)]
    if balancing.form == "es":
        inter = _summed(len(deltas), lambda i, j: small_tanh(signed[i] * signed[j]))
    else:
        together = folded_sum(signed if balancing.form == "vision" else deltas)
        inter = [tanh(delta * together) for delta in deltas]
    return [
        exponential(share * share * len(deltas) - len(deltas)) * between
        for share, between in zip(shares, inter, strict=True)
    ]


def _softmax_scores(deltas: Sequence[Tensor], balancing: Balancing) -> list[Tensor]:
    """d² · Softmax(T · Norm(τ_i ⊙ τ_i)) ⊙ Σ_j Softmax(Norm(τ_i ⊙ τ_j)); 0 for a task vector that is all zeros."""
    count = len(deltas)
    numbers = {pair: number for number, pair in enumerate(pairs(count))}

    def share(i: int, j: int) -> Tensor:
        return normalized(deltas[i] * deltas[j], balancing.pairs[numbers[i, j]])

    inter = _summed(count, lambda i, j: divided(exponential(share(i, j)), balancing.inter[numbers[i, j]]))
    intra = [divided(exponential(share(i, i) * count - count), balancing.intra[i]) for i in range(count)]
    return [within * between * alive for within, between, alive in zip(intra, inter, balancing.alive, strict=True)]


def _summed(count: int, term: Callable[[int, int], Tensor]) -> list[Tensor]:
    """Return for each expert i the sum of term(i, j) over all j in ascending order; term(i, j) is term(j, i)."""
    totals: list[Tensor | None] = [None] * count
    for i, j in pairs(count):
        value = term(i, j)
        for expert in {i, j}:
            total = totals[expert]
            totals[expert] = value if total is None else total + value
    return [total for total in totals if total is not None]
