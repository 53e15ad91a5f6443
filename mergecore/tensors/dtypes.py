"""The one table of dtypes: what safetensors, torch and people call them, their size, and whether they are merged.

This module does not import torch: the command line reads the table before torch is there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Dtype = Literal["float32", "float16", "bfloat16"]
"""What people may ask for as the dtype of a result. These are torch's own names."""
DTYPE_CHOICES: tuple[Dtype, ...] = get_args(Dtype)


@dataclass(frozen=True)
class ElementType:
    """One dtype of safetensors files. itemsize: bytes of an element. merged: False where tensors are only copied."""

    torch_name: str
    itemsize: int
    merged: bool = False


ELEMENT_TYPES: dict[str, ElementType] = {
    "F64": ElementType("float64", 8, merged=True),
    "F32": ElementType("float32", 4, merged=True),
    "F16": ElementType("float16", 2, merged=True),
    "BF16": ElementType("bfloat16", 2, merged=True),
    "F8_E4M3": ElementType("float8_e4m3fn", 1),
    "F8_E5M2": ElementType("float8_e5m2", 1),
    "I64": ElementType("int64", 8),
    "I32": ElementType("int32", 4),
    "I16": ElementType("int16", 2),
    "I8": ElementType("int8", 1),
    "U8": ElementType("uint8", 1),
    "U16": ElementType("uint16", 2),
    "U32": ElementType("uint32", 4),
    "U64": ElementType("uint64", 8),
    "BOOL": ElementType("bool", 1),
}
"""By safetensors' name. A dtype that is not here cannot be read."""

MERGED = frozenset(name for name, kind in ELEMENT_TYPES.items() if kind.merged)
"""The dtypes that can be merged, by safetensors' names; every other tensor is copied."""
SAFETENSORS_DTYPE: dict[str, str] = {
    kind.torch_name: name for name, kind in ELEMENT_TYPES.items() if kind.torch_name in DTYPE_CHOICES
}
"""What people write → safetensors' name."""
CONFIG_DTYPE: dict[str, str] = {name: written for written, name in SAFETENSORS_DTYPE.items()}
"""Safetensors' name → what people and a config.json write, for the dtypes that people may ask for."""
