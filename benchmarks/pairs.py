"""Which merges are compared with which: mergekit's recipes and ours of the same meaning, and further readings of ours
beside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mergecore.registry import METHODS


@dataclass(frozen=True)
class Theirs:
    """A recipe of mergekit: shared parameters and those that each model has. base: which checkpoint is its
    base_model.
    """

    method: str
    shared: Mapping[str, Any] = field(default_factory=dict)
    each: Mapping[str, Any] = field(default_factory=dict)
    base: str | None = "base"

    def recipe(self, folder: Path, experts: int) -> dict[str, Any]:
        """The recipe over the checkpoints in a folder."""
        names = [f"expert-{number}" for number in range(1, experts + 1)]
        models = [{"model": str(folder / name), "parameters": dict(self.each)} for name in names]
        recipe: dict[str, Any] = {"merge_method": self.method, "models": models, "dtype": "bfloat16"}
        if self.base is not None:
            recipe["base_model"] = str(folder / self.base)
        return {**recipe, "parameters": dict(self.shared)} if self.shared else recipe


@dataclass(frozen=True)
class Pair:
    """A merge of mergekit's and ours by name: the first means the same, the others are told beside it. counts: of
    experts.
    """

    theirs: Theirs
    ours: Mapping[str, Mapping[str, Any]]
    counts: range = range(1, 1000)

    @property
    def known(self) -> bool:
        """Whether there are such methods here; those that come later join the table then."""
        return all(values["method"] in METHODS for values in self.ours.values())


def ours_recipe(values: Mapping[str, Any], folder: Path, experts: int) -> dict[str, Any]:
    """A recipe of ours over the checkpoints in a folder."""
    chosen = [str(folder / f"expert-{number}") for number in range(1, experts + 1)]
    return {**values, "base": str(folder / "base"), "experts": chosen, "dtype": "bfloat16"}


AS_MERGEKIT = {"method": "ties", "scope": "tensor", "count": "exact", "zero_sign": "positive"}
"""Ranks within each tensor, keeps exactly as many elements as it says, and takes a sum of exactly 0 for positive."""
DELLA = {"density": 0.5, "window": 0.2, "rescale": "l1"}
DELLA_THEIRS = {"weight": 1.0, "density": 0.5, "epsilon": 0.1}
PAIRS: dict[str, Pair] = {
    "linear": Pair(Theirs("linear", each={"weight": 1.0}, base=None), {"average": {"method": "average"}}),
    "task_arithmetic": Pair(
        Theirs("task_arithmetic", each={"weight": 0.3}),
        {"task_arithmetic": {"method": "task_arithmetic", "scale": 0.3}},
    ),
    "ties": Pair(
        Theirs("ties", each={"weight": 1.0, "density": 0.2}),
        {
            "ties, tensor": {"method": "ties", "density": 0.2, "scope": "tensor", "zero_sign": "positive"},
            "ties, tensor, exact count": {**AS_MERGEKIT, "density": 0.2},
            "ties, whole model": {"method": "ties", "density": 0.2},
        },
    ),
    "dare_ties": Pair(
        Theirs("dare_ties", each={"weight": 1.0, "density": 0.2}),
        {
            "dare_ties, tensor": {
                "method": "ties", "scope": "tensor", "density": 1.0, "aggregate": "sum", "zero_sign": "positive",
                "drop": {"rate": 0.8, "rescale": "l1"},
            },
            "dare_ties, 1/(1-rate)": {
                "method": "ties", "scope": "tensor", "density": 1.0, "aggregate": "sum", "zero_sign": "positive",
                "drop": {"rate": 0.8},
            },
            "dare_ties, and a trim": {"method": "ties", "scope": "tensor", "density": 0.2, "drop": {"rate": 0.5}},
        },
    ),
    "dare_linear": Pair(
        Theirs("dare_linear", each={"weight": 0.3, "density": 0.2}),
        {"dare_linear": {"method": "task_arithmetic", "scale": 0.3, "drop": {"rate": 0.8, "rescale": "l1"}}},
    ),
    "slerp": Pair(
        Theirs("slerp", shared={"t": 0.5}, base="expert-1"), {"slerp": {"method": "slerp", "t": 0.5}}, range(2, 3)
    ),
    "karcher": Pair(Theirs("karcher", base=None), {"karcher": {"method": "karcher"}}),
    "model_stock": Pair(
        Theirs("model_stock"), {"model_stock": {"method": "model_stock", "negative": "extrapolate"}}, range(2, 1000)
    ),
    "sce": Pair(Theirs("sce", shared={"select_topk": 0.5}), {"sce": {"method": "sce", "density": 0.5}}, range(2, 1000)),
    "breadcrumbs": Pair(
        Theirs("breadcrumbs", each={"weight": 0.3, "density": 0.2, "gamma": 0.1}),
        {"breadcrumbs": {"method": "breadcrumbs", "scale": 0.3, "density": 0.2, "outliers": 0.1}},
    ),
    "della": Pair(Theirs("della", each=DELLA_THEIRS), {"della": {"method": "della", **DELLA}}),
    "della_linear": Pair(
        Theirs("della_linear", each=DELLA_THEIRS),
        {"della_linear": {"method": "della", **DELLA, "elect": "none", "aggregate": "sum"}},
    ),
    "nuslerp": Pair(
        Theirs("nuslerp", each={"weight": 1.0}, base=None),
        {"nuslerp": {"method": "nuslerp", "weights": [1.0, 1.0]}},
        range(2, 3),
    ),
    "multislerp": Pair(Theirs("multislerp", each={"weight": 1.0}, base=None), {"multislerp": {"method": "multislerp"}}),
    "ram": Pair(Theirs("ram"), {"ram": {"method": "ram"}}),
    "nearswap": Pair(
        Theirs("nearswap", shared={"t": 0.001}), {"nearswap": {"method": "nearswap", "t": 0.001}}, range(1, 2)
    ),
    "arcee_fusion": Pair(Theirs("arcee_fusion"), {"arcee_fusion": {"method": "arcee_fusion"}}, range(1, 2)),
}  # fmt: skip
