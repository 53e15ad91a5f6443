"""Checkpoints, tasks and specs so small that what a sweep of them costs is the orchestration alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

FACTORY = "tiny_world:stack"
"""What a spec's `evaluate.model` says; this file's folder must be on the path of whoever scores (see `ENVIRONMENT`)."""
ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).resolve().parent), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

EXPERTS, HELD_OUT, WIDTH, LAYERS, ITEMS = 8, 3, 16, 12, 32
GRIDS = {
    "task_arithmetic": {"scale": [round(0.1 * step, 1) for step in range(1, 11)]},
    "ties": {"density": [0.1, 0.2, 0.3, 0.4, 0.5], "scale": [0.5, 0.75, 1.0, 1.25, 1.5, 2.0]},
    "dare_ties": {"density": [0.1, 0.2, 0.3, 0.4, 0.5], "scale": [0.5, 0.75, 1.0, 1.25, 1.5, 2.0]},
}
"""With average: 71 values for every subset of experts."""


def stack(config: Mapping[str, Any]) -> nn.Module:
    """Linear layers of one width; the first numbers that come out are the classes."""
    return nn.Sequential(*(nn.Linear(config["width"], config["width"]) for _ in range(config["layers"])))


def write_world(folder: Path) -> None:
    """`folder`/base, expert-1 … and tasks: normal weights, changes of a tenth of them, labels at random."""
    draw = torch.Generator().manual_seed(0)
    shapes = {name: tensor.shape for name, tensor in stack({"width": WIDTH, "layers": LAYERS}).state_dict().items()}
    base = {name: torch.randn(shape, generator=draw) * 0.25 for name, shape in shapes.items()}
    for number in range(EXPERTS + 1):
        target = folder / ("base" if number == 0 else f"expert-{number}")
        target.mkdir(parents=True)
        change = {name: 0.025 * (number > 0) * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
        tensors = {name: base[name] + change[name] for name in base}
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        (target / "config.json").write_text(json.dumps({"model_type": "tiny", "width": WIDTH, "layers": LAYERS}))
    tasks = folder / "tasks"
    tasks.mkdir()
    numbers = np.random.default_rng(0)
    for name in [f"task-{number}" for number in range(1, EXPERTS + 1)] + held_out():
        arrays: dict[str, Any] = {}
        for split in ("train", "validation", "test"):
            arrays[f"{split}.inputs"] = numbers.standard_normal((ITEMS, WIDTH)).astype(np.float32)
            arrays[f"{split}.labels"] = numbers.integers(0, 4, ITEMS)
        np.savez(tasks / f"{name}.npz", **arrays)


def held_out() -> list[str]:
    """Names of the tasks no expert is said to know."""
    return [f"other-{number}" for number in range(1, HELD_OUT + 1)]


def every_method() -> list[dict[str, Any]]:
    """Average, task arithmetic, TIES and DARE-TIES with their grids."""
    grids = {name: {key: {"grid": values} for key, values in held.items()} for name, held in GRIDS.items()}
    dropped = {"label": "dare_ties", **grids["dare_ties"], "drop": {"rate": 0.5, "seed": 0}}
    return [
        {"method": "average"},
        {"method": "task_arithmetic", **grids["task_arithmetic"]},
        {"method": "ties", **grids["ties"]},
        {"method": "ties", **dropped},
    ]


def write_spec(folder: Path, name: str, methods: list[dict[str, Any]], counts: list[int], subsets: int) -> Path:
    """`folder`/<name>.yaml over the world in `folder`, its store `folder`/<name>; validation items choose."""
    numbers = range(1, EXPERTS + 1)
    spec = {
        "name": name,
        "base": str(folder / "base"),
        "experts": [{"name": f"e{n}", "source": str(folder / f"expert-{n}"), "tasks": [f"task-{n}"]} for n in numbers],
        "methods": methods,
        "counts": counts,
        "subsets": {"per_count": subsets, "seed": 0},
        "evaluate": {
            "evaluator": "classification",
            "model": FACTORY,
            "path": str(folder / "tasks"),
            "held_in": {f"skill-{n}": [f"task-{n}"] for n in numbers},
            "held_out": {"other": held_out()},
            "validation": {"limit": ITEMS},
        },
        "output": {"store": str(folder / name), "register": {"name": name, "by": "held_in"}},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    return path
