"""Weights for checkpoints of one training run: an average in place of the decay of the learning rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from math import cos, pi, sqrt
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from mergecore.identity.numbers import Numbers

Shape = Literal["linear", "cosine", "sqrt"]
DECAYS: Mapping[Shape, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + cos(pi * x)) / 2,
    "sqrt": lambda x: 1 - sqrt(x),
}
"""The learning rate, of a peak of 1, when a share x of the decay is over."""


class Series(Numbers):
    """Weights by place in a series of checkpoints, the oldest first.

    'decay' follows WSM (Tian et al. 2025): checkpoints θ_0 … θ_k of a constant learning rate, averaged with weights
    c_0 = 1 − w_1, c_j = w_j − w_{j+1}, c_k = w_k, are θ_0 with each change θ_i − θ_{i−1} taken w_i times. That is what
    a learning rate that falls by w_1 ≥ … ≥ w_k would have done with the same gradients. We read the decay at
    w_i = f(i / (k + 1)), so that a linear one gives the uniform average.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)

    kind: Annotated[
        Literal["uniform", "rising", "ema", "decay"],
        Field(
            description="'uniform': equal weights (LAWA; SMA of PMA); 'rising': 1, 2, … T (WMA of PMA); 'ema': an "
            "exponential moving average; 'decay': weights that stand for a decay of the learning rate (WSM)"
        ),
    ]
    share: Annotated[float, Field(gt=0, le=1, description="α of 'ema': M ← α θ_t + (1 − α) M, from M = θ_1")] = 0.2
    shape: Annotated[
        Shape,
        Field(description="f of 'decay': 1 − x, (1 + cos πx)/2 or 1 − √x; 'linear' is the uniform average"),
    ] = "linear"

    def weights(self, count: int) -> tuple[float, ...] | None:
        """Return one weight per checkpoint, the oldest first; None for equal ones."""
        if self.kind == "uniform" or (self.kind == "decay" and self.shape == "linear"):
            return None
        if self.kind == "rising":
            return tuple(float(place + 1) for place in range(count))
        if self.kind == "ema":
            rest = 1 - self.share
            return tuple((self.share if place else 1.0) * rest ** (count - 1 - place) for place in range(count))
        taken = [1.0, *(DECAYS[self.shape](place / count) for place in range(1, count)), 0.0]
        return tuple(earlier - later for earlier, later in pairwise(taken))
