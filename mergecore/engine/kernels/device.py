"""A loop for a CUDA device, built by NVRTC from the same source."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


@functools.cache
def device_function(text: str) -> Callable[..., None] | None:
    """Return the loop of a source for the current CUDA device; None where this torch cannot build it.

    It has no fused multiply-add, divides with correct rounding and keeps subnormal numbers.
    """
    build = getattr(torch.cuda, "_compile_kernel", None)
    if build is None:
        return None
    try:
        function: Callable[..., None] = build(
            text, "run", nvcc_options=["--fmad=false", "--prec-div=true", "--ftz=false"]
        )
    except (RuntimeError, OSError, ImportError, AttributeError):
        return None
    return function
