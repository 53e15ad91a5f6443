"""A loop for a CUDA device, built by NVRTC from the same source."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


@functools.cache
def device_function(text: str) -> Callable[..., None] | None:
    """The same source for the current CUDA device, built by NVRTC: no fused multiply-add, correctly rounded division, subnormal
    numbers kept. None where this torch cannot build it."""
    build = getattr(torch.cuda, "_compile_kernel", None)
    if build is None:
        return None
    try:
        found: Callable[..., None] = build(text, "run", nvcc_options=["--fmad=false", "--prec-div=true", "--ftz=false"])
    except (RuntimeError, OSError, ImportError, AttributeError):
        return None
    return found
