"""The dtypes of safetensors, torch and people."""

from __future__ import annotations

from typing import Literal

import torch

from mergecore.tensors.source import TensorInfo

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MERGED = {"F64", "F32", "F16", "BF16"}
"""The dtypes that can be merged; every other tensor is copied."""

Dtype = Literal["float32", "float16", "bfloat16"]
SAFETENSORS_DTYPE: dict[str, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""The dtypes in which a merged tensor can be written."""
DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""How a person writes a dtype, and safetensors."""

TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def stored_as(info: TensorInfo, dtype: str) -> TensorInfo:
    """The tensor as it is written: floating-point ones in `dtype`, others as they are."""
    return TensorInfo(dtype, info.shape) if info.dtype in MERGED else info
