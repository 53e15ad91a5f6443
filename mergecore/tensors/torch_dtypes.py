"""The table of dtypes in torch's own types."""

from __future__ import annotations

import torch

from mergecore.tensors.dtypes import ELEMENT_TYPES

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, kind.torch_name) for name, kind in ELEMENT_TYPES.items()}
"""Safetensors' name → torch's dtype."""
DTYPE_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}
"""Torch's dtype → safetensors' name."""
