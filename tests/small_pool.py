"""A base and experts of a few seeded tensors on disk, and the place and plans to merge them: for tests of the store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mergecore.checkpoints.sources.resolve import resolve
from mergecore.engine.executor import Executor, InProcess
from mergecore.events import Report, silent
from mergecore.execution.fetch import fetch
from mergecore.execution.place import Place, snapshots_of
from mergecore.planning.cells import Plan
from mergecore.planning.merge_builder import MergeBuilder
from mergecore.planning.planner import make_plan
from mergecore.planning.pool import Member, Pool, resolve_pool
from mergecore.planning.work import MergeWork
from mergecore.registry import method_from
from mergecore.spec.sources import BaseSpec, ExpertSpec
from mergecore.spec.sweep import parse_spec
from mergecore.store.store import Store

EXPERTS = 3
NAMES = [f"expert-{number}" for number in range(EXPERTS)]


def write_pool(folder: Path, tensors: int = 8, elements: int = 1000) -> Path:
    """`folder`/base and `folder`/expert-0 … with `tensors` float32 vectors of `elements` each."""
    draw = torch.Generator().manual_seed(0)
    base = {f"layer.{number}": torch.randn(elements, generator=draw) for number in range(tensors)}
    _write(folder / "base", base)
    for expert in range(EXPERTS):
        change = {name: 0.1 * torch.randn(elements, generator=draw) for name in base}
        _write(folder / f"expert-{expert}", {name: base[name] + change[name] for name in base})
    return folder


def _write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "vectors"}))


def open_pool(folder: Path) -> Pool:
    """The checkpoints under `folder`, resolved."""
    experts = [
        ExpertSpec(name=f"expert-{number}", source=str(folder / f"expert-{number}")) for number in range(EXPERTS)
    ]
    return resolve_pool(
        BaseSpec(source=str(folder / "base")), experts, None, lambda source: resolve(source.source), silent
    )


def place_in(store: Path, pool: Pool, report: Report = silent, executor: Executor | None = None) -> Place:
    """A place over `store` whose checkpoints are at hand; two tensors of the default size fit into a shard."""
    place = Place(pool, Store(store), executor or InProcess(), report, shard_size=8000)
    for snapshot in snapshots_of(pool):
        fetch(place, snapshot)
    return place


def merge_plan(pool: Pool, method: str = "average", **values: Any) -> MergeWork:
    """The merge of all experts by a method."""
    return MergeBuilder(pool, (), None, _no_data).build(
        method_from(method, values, "test"), list(pool.experts.values())
    )


def _no_data(member: Member, statistic: object) -> dict[str, Any]:
    raise AssertionError("no statistic on data here")


def planned(folder: Path, *methods: Any, **changes: Any) -> Plan:
    """The plan of a sweep over all experts, each with a task of its name (in `folder`/tasks), and a held-out task
    'other'; validation items choose. changes: as `changed` takes them."""
    values = {
        "name": "pool",
        "base": str(folder / "base"),
        "experts": [{"name": name, "source": str(folder / name), "tasks": [name]} for name in NAMES],
        "methods": list(methods),
        "counts": [EXPERTS],
        "evaluate": {
            "evaluator": "classification",
            "model": "tests.small_pool:never_run",
            "path": "tasks",
            "held_in": {name: [name] for name in NAMES},
            "held_out": {"other": ["other"]},
            "validation": {"limit": 4},
            "recalibrate": "none",
        },
        "output": {"keep": "none"},
    }
    spec = parse_spec(changed(values, changes), "test")
    return make_plan(
        spec, resolve_pool(spec.base, spec.experts, None, lambda source: resolve(source.source), silent), folder
    )


def changed(spec: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A spec with other values at its top, or with two underscores one below it (`output__keep`, `evaluate__limit`)."""
    changed = dict(spec)
    for name, value in changes.items():
        part, _, inner = name.rpartition("__")
        if part:
            changed[part] = {**changed[part], inner: value}
        else:
            changed[inner] = value
    return changed


def files_below(folder: Path) -> dict[str, bytes]:
    """{relative path: content} of every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def never_run(config: Mapping[str, Any]) -> torch.nn.Module:
    """The module that plans of this pool name; nothing is scored."""
    return torch.nn.Module()
