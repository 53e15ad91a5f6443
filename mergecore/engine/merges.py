"""What the merges of a pass write in one span: copies, element-wise windows (also on a device), whole tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from mergecore.checkpoints.layout import is_buffer
from mergecore.engine.device_windows import Launched, Stage, in_smaller_windows
from mergecore.engine.kernels.run import BoundFunction, Window
from mergecore.engine.loops import Loops
from mergecore.engine.pass_plan import MergeJob, PassPlan
from mergecore.engine.windows import Reading, Space, cut, space
from mergecore.identity.content import BlockDigests
from mergecore.plugins.block import Per
from mergecore.plugins.method import Method
from mergecore.tensors.finite import DROP, NARROW, TAME, check_copied, check_finite
from mergecore.tensors.torch_dtypes import DTYPES

ON_DEVICE = 1 << 20
"""Elements of a window on a device, where they fit."""


class Merges:
    """The merges of one span that no journal holds yet.

    digests: per merge, tensor and first element of a grid block.
    """

    def __init__(
        self,
        plan: PassPlan,
        loops: Loops,
        jobs: Sequence[MergeJob],
        digests: Mapping[str, dict[str, dict[int, str]]],
    ) -> None:
        self._jobs, self._digests = jobs, digests
        self._by_element = ByElement(loops) if plan.device == "cpu" else ByElementOnDevice(plan, loops)
        self._whole = [job for job in jobs if job.method.per is not Per.ELEMENT]

    def merge(self, reading: Reading) -> None:
        """Write every merge's share of the reading: what is copied, and element-wise methods window by window."""
        copying = [job for job in self._jobs if reading.name in job.outputs and reading.name not in job.merged]
        merging = [job for job in self._jobs if job.method.per is Per.ELEMENT and reading.name in job.merged]
        digests = {job.key: BlockDigests(reading.start) for job in (*copying, *merging)}
        constant = is_buffer(reading.name, reading.info)
        for start, stop in reading.windows() if copying else ():
            raw = reading.raw_base()
            if not constant:
                check_copied(raw, reading.name, DROP.format(name=reading.name))
            for job in copying:
                target = _target(job, reading.name, stop - start)
                target.values.copy_(raw)
                if target.values.dtype != raw.dtype and not constant:
                    check_copied(target.values, reading.name, NARROW)
                _write(job, reading.name, start, target, digests[job.key])
        if merging:
            self._by_element.merge(merging, reading, digests)
        for key, blocks in digests.items():
            self._digests[key].setdefault(reading.name, {}).update(blocks.finished())

    def merge_whole(self, readings: Sequence[Reading]) -> None:
        """Write what methods make of whole tensors: outputs may have other names and shapes than inputs.

        readings: all tensors that must be seen at once.
        """
        for job in self._whole:
            method = job.method
            for reading in readings:
                if reading.name not in job.merged:
                    continue
                reading.window(reading.start, reading.stop)
                block = reading.block(method.on, method.needs_base, job.experts, flat=False)
                for name, values in method.merge_block(block, job.statistics).items():
                    rounded = values.reshape(-1).to("cpu", DTYPES[job.outputs[name].dtype])
                    if rounded.is_floating_point():
                        check_finite(rounded, name, f"method '{method.name}'", TAME)
                    digests = BlockDigests(0)
                    _write(job, name, 0, Space(rounded), digests)
                    self._digests[job.key].setdefault(name, {}).update(digests.finished())


class ByElement:
    """Element-wise methods on the processor."""

    def __init__(self, loops: Loops) -> None:
        self._loops = loops

    def merge(self, jobs: Sequence[MergeJob], reading: Reading, digests: dict[str, BlockDigests]) -> None:
        """Write the reading window by window."""
        loops = {job.key: _loop_of(self._loops, job, reading) for job in jobs}
        for start, stop in reading.windows():
            for job in jobs:
                target = _target(job, reading.name, stop - start)
                window = reading.stored(job.experts, job.method.needs_base)
                _check(job, reading, *loops[job.key].store(window, target.values), target.values)
                _write(job, reading.name, start, target, digests[job.key])


class UnderWay(NamedTuple):
    """A window on a device: its result will be in `host` once `launched` is ready."""

    job: MergeJob
    start: int
    stop: int
    launched: Launched
    host: Space


class ByElementOnDevice:
    """Element-wise methods on a device: one window is written here while the next is worked out there."""

    def __init__(self, plan: PassPlan, loops: Loops) -> None:
        self._plan, self._loops = plan, loops

    def merge(self, jobs: Sequence[MergeJob], reading: Reading, digests: dict[str, BlockDigests]) -> None:
        """Write the reading window by window, in smaller windows where the device's memory does not suffice."""
        loops = {job.key: _loop_of(self._loops, job, reading) for job in jobs}
        stage = _stage(self._plan.device)
        in_smaller_windows(lambda size: self._merge(jobs, reading, loops, digests, stage, size), ON_DEVICE, stage)

    def _merge(
        self,
        jobs: Sequence[MergeJob],
        reading: Reading,
        loops: Mapping[str, BoundFunction],
        digests: dict[str, BlockDigests],
        stage: Stage,
        size: int,
    ) -> None:
        for job in jobs:  # a try in larger windows may have begun
            digests[job.key] = BlockDigests(reading.start)
        under_way: list[UnderWay] = []
        for number, (start, stop) in enumerate(cut(reading.start, reading.stop, size)):
            slot = number % 2
            reading.window(start, stop, slot)
            begun = []
            for job_index, job in enumerate(jobs):
                window = self._on_device(job, reading, stage, start, stop)
                dtype = DTYPES[job.outputs[reading.name].dtype]
                host = space(("write", job_index, slot), stop - start, dtype, stage.device.type == "cuda")
                launched = stage.launch(loops[job.key], window, dtype, host.values)
                begun.append(UnderWay(job, start, stop, launched, host))
            self._land(under_way, reading, digests)
            under_way = begun
        self._land(under_way, reading, digests)

    def _on_device(self, job: MergeJob, reading: Reading, stage: Stage, start: int, stop: int) -> Window:
        keep, experts = self._plan.base_id, self._plan.experts

        def moved(model: str, read: Callable[[], Tensor]) -> Tensor:
            return stage.window((keep, model, reading.name, start) if keep else None, stop - start, read)

        deltas = tuple(not experts[position].complete for position in job.experts)
        needed = job.method.needs_base or any(deltas)
        base = moved("base", reading.raw_base) if needed else None
        stored = [moved(experts[at].id, lambda at=at: reading.raw_expert(at)) for at in job.experts]  # type: ignore[misc]
        return Window(base, tuple(stored), deltas, start)

    def _land(self, under_way: Sequence[UnderWay], reading: Reading, digests: Mapping[str, BlockDigests]) -> None:
        for job, start, stop, launched, host in under_way:
            values, input_lost, result_lost = launched.ready()
            if input_lost or result_lost:
                reading.window(start, stop, 2)
            _check(job, reading, input_lost, result_lost, values)
            _write(job, reading.name, start, host, digests[job.key])


_stages = threading.local()
"""Per thread its way to a device."""


def _stage(device: str) -> Stage:
    stages: dict[str, Stage] = _stages.__dict__
    name = str(torch.device(device))
    if name not in stages:
        stages[name] = Stage(torch.device(name))
    return stages[name]


def _loop_of(loops: Loops, job: MergeJob, reading: Reading) -> BoundFunction:
    """The method's loop with its arguments for the reading."""
    # Links see whole tensors: what is merged element by element is a method.
    whole, dtype = cast("Method[Any]", job.method), DTYPES[job.outputs[reading.name].dtype]
    method = whole.of_tensor(reading.name)
    own = () if method is whole else (str(method),)  # values of its own: one loop in the library, other numbers
    fused = loops.fused(("merge", job.key, dtype, *own), method.merge_models, method.on, dtype, method.needs_base)
    return fused.bind(method.arguments(reading.without_values(job.experts), job.statistics))


def _check(job: MergeJob, reading: Reading, input_lost: bool, result_lost: bool, values: Tensor) -> None:
    """Raise NonFiniteError where a model or the result is not finite, saying which and where."""
    if input_lost:
        reading.block(job.method.on, job.method.needs_base, job.experts, flat=True)
    if result_lost:
        check_finite(values, reading.name, f"method '{job.method.name}'", TAME)


def _target(job: MergeJob, name: str, count: int) -> Space:
    return space("write", count, DTYPES[job.outputs[name].dtype])


def _write(job: MergeJob, name: str, start: int, values: Space, digests: BlockDigests) -> None:
    digests.update(values.bytes, values.count)
    job.sink.write(name, start, values.bytes)
