"""A sweep over tiny language models that takes seconds: a folder with base, experts, tasks, spec and recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tests import tiny_lm


def write_spec(folder: Path, experts: int = 3, **changes: Any) -> Path:
    """`folder`/tiny.yaml: two methods over two and three experts, four items a task; its store is `folder`/store."""
    base = tiny_lm.write_base(folder / "base")
    sources = tiny_lm.write_experts(base, folder / "experts", experts)
    tasks = tiny_lm.write_tasks(folder / "tasks", items=8)
    spec = {
        "name": "tiny",
        "base": {"source": str(base), "known_as": "tiny"},
        "experts": [
            {"name": source.name, "source": str(source), "tasks": ["tiny_choice"] if number % 2 == 0 else []}
            for number, source in enumerate(sources)
        ],
        "methods": [{"method": "average"}, {"method": "ties", "density": 0.2, "scale": 1.0}],
        "counts": [2, 3],
        "evaluate": {
            "path": str(tasks),
            "held_in": {"choice": ["tiny_choice"]},
            "held_out": {"writing": ["tiny_write"]},
            "limit": 4,
            "batch_size": 4,
            "dtype": "float32",
        },
        "output": {
            "store": str(folder / "store"),
            "register": {"name": "tiny-model", "alias": "champion", "by": "held_in"},
        },
        "run": {"workers": 1},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(spec | changes, sort_keys=False))
    recipe = {"method": "ties", "density": 0.2, "base": spec["base"], "experts": [str(source) for source in sources]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path
