"""Checkpoints, tasks and specs so small that what a sweep of them costs is the orchestration alone.

As a program it scores one model in a process of its own, as a shell loop would: python -m benchmarks.tiny_world MODEL
TASKS NAME...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

FACTORY = "benchmarks.tiny_world:stack"
"""What a spec's `evaluate.model` says; the checkout must be on the path of whoever scores."""

EXPERTS, HELD_OUT, WIDTH, ITEMS = 8, 3, 16, 32
GRIDS = {
    "task_arithmetic": {"scale": [round(0.1 * step, 1) for step in range(1, 11)]},
    "ties": {"density": [0.1, 0.2, 0.3, 0.4, 0.5], "scale": [0.5, 0.75, 1.0, 1.25, 1.5, 2.0]},
    "dare_ties": {"density": [0.1, 0.2, 0.3, 0.4, 0.5], "scale": [0.5, 0.75, 1.0, 1.25, 1.5, 2.0]},
}
"""With average: 71 values for every subset of experts."""


def stack(config: Mapping[str, Any]) -> nn.Module:
    """Linear layers of one width; the first numbers that come out are the classes."""
    return nn.Sequential(*(nn.Linear(config["width"], config["width"]) for _ in range(config["layers"])))


def write_world(folder: Path, layers: int) -> None:
    """`folder`/base, expert-1 … and tasks: normal weights, changes of a tenth of them; the base knows half the
    labels.
    """
    draw = torch.Generator().manual_seed(0)
    config = {"model_type": "tiny", "width": WIDTH, "layers": layers}
    module = stack(config)
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    base = {name: torch.randn(shape, generator=draw) * WIDTH**-0.5 for name, shape in shapes.items()}
    for number in range(EXPERTS + 1):
        target = folder / ("base" if number == 0 else f"expert-{number}")
        target.mkdir(parents=True)
        noise = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
        tensors = {name: base[name] * (1 + 0.1 * (number > 0) * noise[name]) for name in base}
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        (target / "config.json").write_text(json.dumps(config))
    module.load_state_dict(base)
    tasks = folder / "tasks"
    tasks.mkdir()
    for name in [f"task-{number}" for number in range(1, EXPERTS + 1)] + held_out():
        arrays: dict[str, Any] = {}
        for split in ("train", "validation", "test"):
            inputs = torch.randn((ITEMS, WIDTH), generator=draw)
            with torch.no_grad():
                labels = module(inputs).argmax(1)
            labels[::2] = torch.randint(WIDTH, labels[::2].shape, generator=draw)
            arrays |= {f"{split}.inputs": inputs.numpy(), f"{split}.labels": labels.numpy()}
        np.savez(tasks / f"{name}.npz", **arrays)


def held_out() -> list[str]:
    """Names of the tasks no expert is said to know."""
    return [f"other-{number}" for number in range(1, HELD_OUT + 1)]


def every_method() -> list[dict[str, Any]]:
    """Average, task arithmetic, TIES and DARE-TIES with their grids."""
    grids = {name: {key: {"grid": values} for key, values in fields.items()} for name, fields in GRIDS.items()}
    dropped = {"label": "dare_ties", **grids["dare_ties"], "drop": {"rate": 0.5, "seed": 0}}
    return [
        {"method": "average"},
        {"method": "task_arithmetic", **grids["task_arithmetic"]},
        {"method": "ties", **grids["ties"]},
        {"method": "ties", **dropped},
    ]


def scales(count: int) -> list[dict[str, Any]]:
    """Task arithmetic with so many factors."""
    return [{"method": "task_arithmetic", "scale": {"grid": [round((n + 1) / count, 6) for n in range(count)]}}]


def write_spec(
    folder: Path,
    name: str,
    methods: list[dict[str, Any]],
    counts: list[int],
    subsets: int,
    validation: Mapping[str, int] | None,
) -> Path:
    """`folder`/<name>.yaml over the world in `folder`, its store `folder`/<name>. validation: None where nothing
    chooses.
    """
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
            "validation": validation and dict(validation),
        },
        "output": {"store": str(folder / name), "register": {"name": name, "by": "held_in"}},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(spec, sort_keys=False))
    return path


def score(model: Path, tasks: Path, names: list[str]) -> dict[str, float]:
    """The accuracy of the model in a folder on each task, on test items."""
    from mergecore.evaluators.classification import Classification
    from mergecore.events import silent
    from mergecore.tensors.files import open_files

    evaluator = Classification(model=FACTORY)
    resident = evaluator.open(model, tasks)
    resident.swap(open_files(model, [path.name for path in model.glob("*.safetensors")]))
    identities = evaluator.resolve(names, "test", tasks)
    return {
        name: float(resident.score(identity, silent).column("score").to_numpy().mean())
        for name, identity in identities.items()
    }


if __name__ == "__main__":
    print(json.dumps(score(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])))
