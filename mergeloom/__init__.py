"""Model merging as a pipeline: the public Python interface.

    import mergeloom

    mergeloom.merge(method, base=base, experts=experts)    one merge in memory: tensors in, tensors out
    mergeloom.methods                                      the classes of the merge methods
    mergeloom.plan("sweep.yaml")                           what a sweep would do, and what that costs
    mergeloom.sweep("sweep.yaml")                          do what is missing
    mergeloom.results("sweep.yaml")                        scores as a pyarrow table

The import is quick: torch is imported when something of this is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergecore import methods as methods
    from mergecore.errors import MergeloomError as MergeloomError
    from mergecore.events import Event as Event
    from mergecore.recipes.in_memory import merge as merge
    from mergecore.spec.sweep import Spec as Spec
    from mergeloom.sweeps import FailedCell as FailedCell
    from mergeloom.sweeps import PlannedCell as PlannedCell
    from mergeloom.sweeps import StepsToDo as StepsToDo
    from mergeloom.sweeps import SweepOutcome as SweepOutcome
    from mergeloom.sweeps import SweepPlan as SweepPlan
    from mergeloom.sweeps import plan as plan
    from mergeloom.sweeps import results as results
    from mergeloom.sweeps import sweep as sweep

__version__ = "0.1.0"

_MODULES = {
    "merge": "mergecore.recipes.in_memory",
    "Spec": "mergecore.spec.sweep",
    "Event": "mergecore.events",
    "MergeloomError": "mergecore.errors",
    **dict.fromkeys(
        ("FailedCell", "PlannedCell", "StepsToDo", "SweepOutcome", "SweepPlan", "plan", "results", "sweep"),
        "mergeloom.sweeps",
    ),
}
"""Public name → the module that defines it."""

__all__ = [
    "Event",
    "FailedCell",
    "MergeloomError",
    "PlannedCell",
    "Spec",
    "StepsToDo",
    "SweepOutcome",
    "SweepPlan",
    "__version__",
    "merge",
    "methods",
    "plan",
    "results",
    "sweep",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for on its first use."""
    if name == "methods":
        return import_module("mergecore.methods")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'mergeloom' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
