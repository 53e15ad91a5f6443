"""Model merging, computed: methods, statistics and the engine. Knows nothing of Prefect, Dask or MLflow."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergecore.recipes.in_memory import merge as merge

__all__ = ["merge", "methods"]


def __getattr__(name: str) -> Any:
    """`merge` and `methods` on first use, so that help and errors do not wait for torch."""
    if name == "merge":
        return import_module("mergecore.recipes.in_memory").merge
    if name == "methods":
        return import_module("mergecore.methods")
    raise AttributeError(f"module 'mergecore' has no attribute '{name}'")
