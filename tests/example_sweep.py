"""A sweep as the store would report it, with scores drawn from a generator: nothing was merged for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mergecore.reporting.scores import CellScores, Kind, Suite, Sweep

EXPERTS = ("addition", "category", "lookup", "mood", "order", "parity", "rhyme", "spelling")
HELD_OUT = ("category_new", "lookup_far")
METHODS: tuple[tuple[str, dict[str, Any], float], ...] = (
    ("average", {}, 0.70),
    ("task_arithmetic", {"scale": 0.5}, 0.76),
    ("task_arithmetic", {"scale": 0.5, "drop": {"kind": "random", "rate": 0.5, "seed": 0}}, 0.74),
    ("ties", {"density": 0.2, "scale": 1.0}, 0.81),
    ("slerp", {"t": 0.5}, 0.72),
)


def suite(experts: Sequence[str] = EXPERTS) -> Suite:
    """One held-in task per expert, each a category of its own, and two held-out tasks."""
    own = {expert: (expert,) for expert in experts}
    return Suite(held_in=own, held_out={task: (task,) for task in HELD_OUT}, trained_for=own)


def items(name: str, level: float, split: str = "test") -> dict[str, dict[str, NDArray[np.float64]]]:
    """Forty right or wrong answers per task, about `level` of them right; the same for the same name."""
    random = np.random.default_rng(sum(map(ord, name + split)))
    tasks = {task: (random.random(40) < level).astype(np.float64) for task in EXPERTS}
    tasks |= {task: (random.random(40) < level - 0.15).astype(np.float64) for task in HELD_OUT}
    return {split: tasks}


def cell(
    name: str,
    kind: Kind,
    level: float,
    method: str = "",
    values: Mapping[str, Any] | None = None,
    count: int = 0,
    **more: Any,
) -> CellScores:
    """A cell that is done unless `more` says otherwise."""
    merge = kind == "merge"
    settings: dict[str, Any] = {
        "cell": f"id-{name}", "kind": kind, "name": name, "method": method, "values": values or {}, "count": count,
        "subset": 0 if merge else -1, "experts": EXPERTS[:count] if merge else (), "status": "done", "reason": "",
        "chosen": True, "model": f"merge/{name}", "digest": f"sha256-of-{name}", "items": items(name, level),
        "measured": {"merge/seconds": 3.25, "eval/seconds": 11.5} if merge else {},
        "lineage": {"recipe": {"method": method, **(values or {})}} if merge else {},
    }  # fmt: skip
    return CellScores(**{**settings, **more})


def baselines() -> list[CellScores]:
    """The base, its experts and the model trained on everything."""
    experts = [cell(expert, "expert", 0.8) for expert in EXPERTS]
    return [cell("base", "base", 0.45), *experts, cell("mixture", "multitask", 0.9)]


def merges(counts: Sequence[int] = (2, 4, 8)) -> list[CellScores]:
    """Every method at every count; each is a little worse with more experts."""
    return [
        cell(
            f"{method}{'+drop' if 'drop' in values else ''}-n{count}",
            "merge",
            level - 0.02 * count,
            method,
            values,
            count,
        )
        for method, values, level in METHODS
        for count in counts
        if method != "slerp" or count == 2
    ]


def refused(count: int = 4) -> CellScores:
    """A merge that cannot be made, and why."""
    reason = f"slerp merges exactly two models, not {count}; take counts: [2] or another method"
    return cell(
        f"slerp-n{count}",
        "merge",
        0.5,
        "slerp",
        {"t": 0.5},
        count,
        status="refused",
        reason=reason,
        items={},
        digest="",
    )


def few() -> list[CellScores]:
    """A base, two experts, a multitask model, and two methods at two counts: enough to show, quick to write."""
    merged = [cell for cell in merges((2, 4)) if cell.method in ("average", "ties")]
    return [cell for cell in baselines() if cell.name in ("base", "mixture", *EXPERTS[:2])] + merged


def sweep(cells: Sequence[CellScores], name: str = "demo", registered: Mapping[str, Any] | None = None) -> Sweep:
    """A sweep of these cells; held-in are the tasks of the experts among them."""
    experts = [cell.name for cell in cells if cell.kind == "expert"]
    spec = f"name: {name}\nmethods: [average]\n"
    return Sweep(name, spec, suite(experts), tuple(cells), "held_in", registered)


def registration(of: CellScores) -> dict[str, str]:
    """The record of a registered cell."""
    return {
        "cell": of.cell, "name": "demo-model", "alias": "champion", "uri": f"mergeloom://store/{of.model}",
        "digest": of.digest, "chosen_on": "test",
    }  # fmt: skip
