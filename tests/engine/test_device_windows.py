"""A pass whose windows travel to a device and back: on 'cpu:0' without a GPU, on 'cuda' where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mergecore.engine.device_windows as staging
import mergecore.engine.merges as merges
from mergecore.checkpoints.experts import FullExpert
from mergecore.engine.executor import InProcess
from mergecore.engine.kernels.device import device_function
from mergecore.engine.kernels.run import Fused, Window
from mergecore.engine.pass_plan import MergeJob, PassPlan, plan_spans
from mergecore.engine.run_pass import run_pass
from mergecore.errors import CapacityError, NonFiniteError
from mergecore.events import silent
from mergecore.identity.draws import random_key, random_words
from mergecore.native.library import Library, library_in
from mergecore.plugins.block import Block, Per
from mergecore.plugins.method import Method
from mergecore.recipes.in_memory import find_statistics
from mergecore.registry import METHODS
from mergecore.tensors.memory import MemoryTensors
from mergecore.tensors.sinks import MemorySink

DEVICES = ["cpu:0", *(["cuda"] if torch.cuda.is_available() else [])]
COUNT = 5000
METHODS_TRIED: list[tuple[str, dict[str, Any]]] = [
    ("average", {}),
    ("task_arithmetic", {"scale": 0.4, "drop": {"rate": 0.5}}),
    ("ties", {"density": 0.3, "scope": "tensor", "count": "exact"}),
    ("pcb", {"density": 0.3}),
]


def models(count: int = COUNT) -> tuple[MemoryTensors, tuple[FullExpert, ...]]:
    def drawn(name: str, scale: float) -> torch.Tensor:
        return random_words(random_key(0, "staging", name), 0, count).float() * (scale / 2**31)

    base = drawn("base", 1.0).to(torch.bfloat16)
    experts = [
        FullExpert(name, name, MemoryTensors({"w": (base.float() + drawn(name, 0.05)).to(torch.bfloat16)}))
        for name in ("a", "b", "c")
    ]
    return MemoryTensors({"w": base}), tuple(experts)


def merged(method: Method, device: str, base_id: str = "", library: Library | None = None) -> torch.Tensor:
    base, experts = models()
    sink = MemorySink(base.tensors)
    known = find_statistics(method, base, experts, base.tensors, {}, silent)
    job = MergeJob("k", method, (0, 1, 2), frozenset(["w"]), base.tensors, known, sink)
    spans = plan_spans(base.tensors, Per.ELEMENT)
    run_pass(PassPlan(base, experts, (job,), (), spans, device, library, None, base_id), InProcess(), silent)
    return sink.values["w"]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merges, "ON_DEVICE", 700)
    merges._stages.__dict__.clear()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("name", "values"), METHODS_TRIED)
def test_the_same_bytes_on_a_device(device: str, name: str, values: dict[str, Any], tmp_path: Any) -> None:
    method = METHODS[name].model_validate(values)
    assert torch.equal(merged(method, "cpu"), merged(method, device, library=library_in(tmp_path)))


@pytest.mark.parametrize("device", DEVICES)
def test_what_fits_stays_for_the_next_cell_of_the_pool(device: str) -> None:
    method = METHODS["average"]()
    stage = merges._stages.__dict__.setdefault(str(torch.device(device)), staging.Stage(torch.device(device)))
    stage.room = 2 * staging.SPARE
    first = merged(method, device, "digest of the base")
    assert len(stage.kept) == 3 * 8  # three experts, eight windows; an average needs no base
    for key, values in stage.kept.items():
        if key[1] == "a":
            with torch.inference_mode():
                values.zero_()  # what is kept is what is used: no second copy was made
    assert not torch.equal(first, merged(method, device, "digest of the base"))
    assert torch.equal(first, merged(method, device, "another base")) and torch.equal(first, merged(method, device))


def test_out_of_memory_means_smaller_windows_and_then_a_sentence() -> None:
    tried: list[int] = []

    def work(size: int) -> None:
        tried.append(size)
        if size > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    stage = staging.Stage(torch.device("cpu:0"))
    stage.kept["key"] = torch.zeros(3)
    limit = 1 << 15
    staging.in_smaller_windows(work, 1 << 17, stage)
    assert tried == [1 << 17, 1 << 17, 1 << 16, 1 << 15] and not stage.kept  # first without what was kept there
    limit = 0
    with pytest.raises(CapacityError, match="cpu:0 has too little free memory for a window of"):
        staging.in_smaller_windows(work, 1 << 17, stage)


@pytest.mark.parametrize("device", DEVICES)
def test_a_merge_that_ran_out_of_memory_in_the_middle_is_right_in_the_end(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = METHODS["average"]()
    launch, failures = staging.Stage.launch, [0]
    monkeypatch.setattr(staging, "SMALLEST", 8)

    def failing(self: staging.Stage, loop: Any, window: Window, dtype: torch.dtype, host: torch.Tensor) -> Any:
        failures[0] += 1
        if failures[0] == 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return launch(self, loop, window, dtype, host)

    monkeypatch.setattr(staging.Stage, "launch", failing)
    assert torch.equal(merged(method, device), merged(method, "cpu")) and failures[0] > 8


@pytest.mark.parametrize("device", DEVICES)
def test_values_that_are_not_finite_are_refused_by_name(device: str) -> None:
    with pytest.raises(NonFiniteError, match="task_arithmetic"):
        merged(METHODS["task_arithmetic"](scale=1e38 * 30), device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_loop_on_a_device_gives_the_processors_bytes(tmp_path: Any) -> None:
    base, experts = models(1 << 16)
    here = Window(base.read("w"), tuple(expert.stored.read("w") for expert in experts), (False,) * 3, 0)
    for name, values in METHODS_TRIED[:2]:
        method = METHODS[name].model_validate(values)
        fused = Fused(method.merge_models, "deltas", torch.bfloat16, library_in(tmp_path), wait=True)
        block = Block("w", (1 << 16,), 0, 1 << 16, None, (), ("a", "b", "c"))
        loop = fused.bind(method.arguments(block, {}))
        wanted = torch.empty(1 << 16, dtype=torch.bfloat16)
        loop.store(here, wanted)
        there = Window(here.base.cuda(), tuple(expert.cuda() for expert in here.experts), here.deltas, 0)  # type: ignore[union-attr]
        target = torch.empty(1 << 16, dtype=torch.bfloat16, device="cuda")
        assert loop.launch(there, target).tolist() == [0, 0] and torch.equal(target.cpu(), wanted)
        assert device_function(fused.loop(there, loop).text) is not None  # type: ignore[union-attr]
