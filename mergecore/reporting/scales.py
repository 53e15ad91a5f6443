"""How the score of a task is shown: items are scored so that higher is better, and a scale gives the metric's number.

The mean over the items of log-likelihoods is −4.77; what people know is the perplexity, 117.1, and lower is better.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

Scale = Literal["mean", "error", "perplexity", "bits"]
"""mean: the mean over items itself. error: items are negated, lower is better. perplexity: items are log-likelihoods in
nats, e to the negated mean. bits: the same in bits, the negated mean over ln 2."""


def shown(scale: Scale, mean: Any) -> Any:
    """Return the metric's number of a mean over items; floats or arrays."""
    if scale == "perplexity":
        return np.exp(-mean)
    if scale == "bits":
        return -mean / np.log(2)
    return -mean if scale == "error" else mean


def higher_is_better(scale: Scale) -> bool:
    """Return the direction of the number that is shown."""
    return scale == "mean"
