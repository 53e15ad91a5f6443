"""A base and two experts that are one matrix each, their tasks as arrays, and statistics on models to be tried."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mergecore.checkpoints.sources.resolve import resolve
from mergecore.engine.executor import Executor, InProcess
from mergecore.evaluators.classification import Classification
from mergecore.events import Report, silent
from mergecore.execution.fetch import fetch
from mergecore.execution.place import Place, snapshots_of
from mergecore.planning.data import ExpertData
from mergecore.planning.merge_builder import MergeBuilder
from mergecore.planning.pool import resolve_pool
from mergecore.planning.work import MergeWork
from mergecore.plugins.any_statistic import AnyStatistic
from mergecore.plugins.block import Block, read_beside
from mergecore.plugins.method import WeightMethod
from mergecore.plugins.model_statistic import Inputs, Kept, Labels, Models, ModelStatistic, Out, Progress, Seen, Use
from mergecore.plugins.statistic import Scope, Statistics
from mergecore.spec.sources import BaseSpec, ExpertSpec
from mergecore.statistics.unified_norms import UnifiedNorms
from mergecore.store.store import Store
from mergecore.tensors.source import TensorInfo

FACTORY = "tests.execution.learned_pool:network"
NAMES = ("first", "second")


def network(config: Mapping[str, Any]) -> nn.Module:
    """Four inputs, three classes."""
    return nn.Linear(4, 3)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_pool(folder: Path, items: int = 12) -> Path:
    """Base, two experts, and a task for each of them in `folder`."""
    base = {"weight": drawn(0, 3, 4), "bias": drawn(1, 3)}
    for number, name in enumerate(("base", *NAMES)):
        (folder / name).mkdir(parents=True)
        change = {
            key: value + (0.1 * drawn(10 * number + 2, *value.shape) if number else 0) for key, value in base.items()
        }
        save_file(change, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps({"model_type": "linear"}))
    (folder / "tasks").mkdir()
    for number, name in enumerate(NAMES):
        arrays = {}
        for position, split in enumerate(("train", "validation", "test")):
            inputs = drawn(100 * number + position, items, 4).numpy()
            arrays |= {f"{split}.inputs": inputs, f"{split}.labels": np.arange(items) % 3}
        np.savez(folder / "tasks" / f"{name}.npz", **arrays)
    return folder


def merge_of(
    folder: Path, method: Any, executor: Executor | None = None, report: Report = silent, **tasks: Any
) -> tuple[Place, MergeWork]:
    """The merge of the two experts, and the place where it can be done. Nothing is done yet."""
    names = {name: tasks.get(name, (name,)) for name in NAMES}
    experts = tuple(ExpertSpec(source=str(folder / name), name=name, tasks=names[name]) for name in NAMES)
    pool = resolve_pool(
        BaseSpec(source=str(folder / "base")), experts, None, lambda source: resolve(source.source), report
    )
    evaluator = Classification(model=FACTORY)
    data = ExpertData(evaluator, folder / "tasks", pool.base.companions)
    merge = MergeBuilder(pool, (), None, data).build(method, list(pool.experts.values()))
    store = Store(folder / "store")
    place = Place(pool, store, executor or InProcess(), report, 1 << 20, evaluator, folder / "tasks")
    for snapshot in snapshots_of(pool):
        fetch(place, snapshot)
    return place, merge


class Entropies(ModelStatistic):
    """Mean entropies of every expert on the inputs of every expert; its tensors are the sums of the task vectors."""

    name: ClassVar[str] = "test_entropies"
    scope: ClassVar[Scope] = Scope.POOL
    shells = "each"

    inputs: Seen = "training"
    items: int = 6
    labels: Labels = "none"
    ask: str = "entropy"

    @property
    def use(self) -> Use:
        return Use(self.inputs, self.items, self.labels, 0)

    def statistics(self) -> Mapping[str, AnyStatistic]:
        return {"norms": UnifiedNorms()}

    def outputs(
        self, selection: Mapping[str, TensorInfo], count: int, config: Mapping[str, Any]
    ) -> Mapping[str, TensorInfo]:
        return {name: TensorInfo("F32", info.shape) for name, info in selection.items()}

    def compute(
        self,
        models: Models,
        inputs: Sequence[Inputs],
        selection: Mapping[str, TensorInfo],
        statistics: Statistics,
        out: Out,
        progress: Progress,
        report: Report,
    ) -> Mapping[str, Any]:
        for name in selection:
            out.write(name, sum((models.delta(t, name) for t in range(len(inputs))), torch.zeros(1)))
        rows = []
        for number, weights in enumerate(models.experts):
            models.shell(number).swap(weights)
        for number in range(len(models.experts)):
            module, row = models.shell(number).module, []
            for own in inputs:
                task = own.tasks[0]
                assert task.classes == 3
                if self.ask == "labels":
                    task.labels(range(len(task)))
                scores = task.logits(module, range(len(task))).log_softmax(-1)
                row.append(float(-(scores.exp() * scores).sum(-1).mean().detach()))
            rows.append(row)
        norms = statistics["norms"][0].numbers["elements"]
        return {"norms": norms, "entropies": rows, "documents": [list(own.tasks[0].documents) for own in inputs]}


class Walk(ModelStatistic):
    """Goes a number of steps, each a function of the last and of a batch; writes one output half-way, one at the end."""

    name: ClassVar[str] = "test_walk"
    scope: ClassVar[Scope] = Scope.POOL
    shells = "none"

    steps: int = 12

    @property
    def use(self) -> Use:
        return Use("training", 8, "none", 0)

    def outputs(
        self, selection: Mapping[str, TensorInfo], count: int, config: Mapping[str, Any]
    ) -> Mapping[str, TensorInfo]:
        return {
            f"{part}/{name}": TensorInfo("F32", info.shape)
            for part in ("half", "end")
            for name, info in selection.items()
        }

    def compute(
        self,
        models: Models,
        inputs: Sequence[Inputs],
        selection: Mapping[str, TensorInfo],
        statistics: Statistics,
        out: Out,
        progress: Progress,
        report: Report,
    ) -> Mapping[str, Any]:
        last = progress.last or Kept(0, {name: models.base.read(name).clone() for name in selection}, {"seen": []})
        state, seen = dict(last.tensors), list(last.numbers["seen"])
        for step in range(last.step, self.steps):
            batch = inputs[step % 2].tasks[0].batch(step, 3, seed=0)
            seen.append(batch)
            state = {name: (value * 1.01 + sum(batch) * 0.001).sin() for name, value in state.items()}
            if step == self.steps // 2:
                for name, value in state.items():
                    out.write(f"half/{name}", value)
            progress.keep(lambda: Kept(step + 1, state, {"seen": seen}))
        for name, value in state.items():
            out.write(f"end/{name}", value)
        return {"seen": seen}


class Moved(WeightMethod[Any]):
    """A method that needs a statistic on models, whatever it is."""

    name: ClassVar[str] = "test_moved"
    statistic: Any = None

    def statistics(self) -> Mapping[str, AnyStatistic]:
        return {"known": self.statistic}

    def arguments(self, block: Block, statistics: Statistics) -> Any:
        source = statistics["known"][0].tensors
        name = block.name if block.name in source.tensors else f"end/{block.name}"
        return [read_beside(source, name)]

    def merge(self, weights: Sequence[Tensor], arguments: Any) -> Tensor:
        return weights[0] + arguments[0]
