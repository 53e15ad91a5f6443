"""Fused loops: the same bytes as the plain torch functions they are made of, and what happens where there is none."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mergecore.engine.kernels.source as source
import mergecore.native.library as libraries
from mergecore.arithmetic.transcendental import exponential, tanh
from mergecore.arithmetic.trims import divided
from mergecore.engine.kernels.run import Fused, Window, counts_of, empty_bins, formed, materialised, total_of
from mergecore.engine.kernels.source import LANES
from mergecore.engine.kernels.trace import NotTraceableError, leaves_and_form, trace
from mergecore.identity.draws import words_at
from mergecore.native.library import Library, library_in
from mergecore.plugins.block import Beside, Index, flat_index, read_beside
from mergecore.tensors.memory import MemoryTensors

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    built = library_in(tmp_path_factory.mktemp("loops"))
    assert built.compiler is not None, "these tests need a C++ compiler"
    return built


def awkward(dtype: torch.dtype, count: int, seed: int) -> Tensor:
    """Numbers at which implementations part: zeros of both signs, the smallest and largest, ties, and ordinary ones."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator, dtype=torch.float64) * 10.0 ** torch.randint(
        -9, 3, (count,), generator=generator
    )
    finest = torch.finfo(dtype)
    special = [0.0, -0.0, finest.tiny, -finest.tiny, finest.smallest_normal / 4, 1.0, -1.0, 0.5, 65000.0, 2.0**-24]
    places = torch.randint(0, count, (count // 3,), generator=generator)
    values[places] = torch.tensor(special, dtype=torch.float64)[torch.arange(len(places)) % len(special)]
    return values.to(dtype)


def window_of(dtype: torch.dtype, experts: int = 3, count: int = 5003, start: int = 11) -> Window:
    """A base and experts that share many values with it and with each other."""
    base = awkward(dtype, count, 0)
    stored = [
        torch.where(torch.arange(count) % (n + 3) == 0, base, awkward(dtype, count, n)) for n in range(1, experts + 1)
    ]
    return Window(base, tuple(stored), (False,) * experts, start)


def both(
    library: Library,
    function: Callable[..., Tensor],
    window: Window,
    out: torch.dtype,
    on: Any = "deltas",
    **arguments: Any,
) -> tuple[Tensor, Tensor]:
    """The result by the loop (which must have been used) and by the function itself."""
    based = window.base is not None
    fused, plain = (fused_of(function, on, out, kept, based, wait=True) for kept in (library, None))
    actual, wanted = torch.empty(window.count, dtype=out), torch.empty(window.count, dtype=out)
    assert fused.bind(arguments).store(window, actual) == plain.bind(arguments).store(window, wanted)
    assert not fused.problem and any(fused.checked.values())
    return actual, wanted


def fused_of(
    function: Callable[..., Any], on: Any, out: Any, library: Library | None, based: bool = True, **options: Any
) -> Fused:
    """A function of base, experts and named arguments, to be fused. based: whether there is a base."""

    def of_models(models: Sequence[Tensor], arguments: Mapping[str, Any]) -> Any:
        return function(models[0] if based else None, models[based:], **arguments)

    return Fused(of_models, on, out, library, **options)


def same(actual: Tensor, wanted: Tensor) -> bool:
    return torch.equal(actual.view(torch.uint8), wanted.view(torch.uint8))


OPERATIONS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "arithmetic": lambda b, x, y: b + x * 0.3 - y / 3.0 + (-x) * y,
    "reversed": lambda b, x, y: 2.0 - x + (1.0 - y) * 0.5 + 3 * b,
    "quotients": lambda b, x, y: divided(x, 0.7) + y / (b.abs() + 1.5) + 2.5 / (x.abs() + 0.5) + torch.reciprocal(y.abs() + 3.0),
    "signs": lambda b, x, y: torch.sign(x) * y.abs() + torch.sign(b),
    "comparisons": lambda b, x, y: torch.where((x > y) | (x == b) & (y <= 0.1), x, torch.where(x != y, b, 1.0)),
    "bounds": lambda b, x, y: x.clamp(-0.5, 0.25) + y.clamp(min=0.1) + b.clamp(max=-0.2),
    "extremes": lambda b, x, y: torch.maximum(x, y) - torch.minimum(x.abs(), b.abs()),
    "rounding": lambda b, x, y: torch.round(y * 7.0) + torch.floor(b * 3.0) + torch.square(x) * 1e-6,
    "patterns": lambda b, x, y: ((x.abs().view(torch.int32) >> 3) << 2).view(torch.float32) * 0.25,
    "logic": lambda b, x, y: torch.where(~(x > 0) & torch.logical_not(y > 1.0), 2.0, (x > y).to(torch.float32)),
    "wrapping": lambda b, x, y: ((x.view(torch.int32) * -1640531527 + 77) ^ (y.view(torch.int32) * 3)).to(torch.float32),
    "exponential": lambda b, x, y: exponential(x.clamp(-60.0, 60.0) * 0.5) * 1e-9 + tanh(y) + b,
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_operation_gives_torchs_bytes(library: Library, name: str, dtype: torch.dtype) -> None:
    function = OPERATIONS[name]
    actual, wanted = both(library, lambda base, experts: function(base, *experts[:2]), window_of(dtype), torch.float32)
    assert same(actual, wanted)


@pytest.mark.parametrize(("stored", "out"), list(itertools.product(DTYPES, DTYPES)))
def test_every_dtype_is_widened_and_rounded_as_torch_does(
    library: Library, stored: torch.dtype, out: torch.dtype
) -> None:
    window = window_of(stored)
    limit = 60000.0 if out == torch.float16 else 1e30
    actual, wanted = both(
        library, lambda base, experts: (base + experts[0] * 0.37).clamp(-limit, limit), window, out, "weights"
    )
    assert same(actual, wanted)


def test_all_half_precision_numbers(library: Library) -> None:
    """Each of the 2^16 bit patterns that is finite, read and written back; and float32 numbers around every rounding edge."""
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(1 << 16).to(torch.int32).to(torch.int16).view(dtype)
        every = every[torch.isfinite(every)]
        actual, wanted = both(
            library, lambda base, experts: experts[0] * 1.0, Window(None, (every,), (False,), 0), dtype, "weights"
        )
        assert same(actual, every) and same(actual, wanted)
        middles = ((every[:-1].double() + every[1:].double()) / 2).float()
        edges = torch.cat([torch.nextafter(middles, torch.tensor(side)) for side in (-1e30, 1e30)] + [middles])
        edges = edges[edges.abs() < (65519.0 if dtype == torch.float16 else 1e38)]
        actual, wanted = both(
            library, lambda base, experts: experts[0] * 1.0, Window(None, (edges,), (False,), 0), dtype, "weights"
        )
        assert same(actual, edges.to(dtype)) and same(actual, wanted)


def test_numbers_are_arguments_and_share_a_loop(library: Library) -> None:
    window = window_of(torch.bfloat16)
    texts = set()
    for scale in (0.3, -1.7, 25.0):
        fused = fused_of(lambda base, experts, **arguments: base + experts[0] * scale * arguments["more"], "deltas", torch.float32, library, wait=True)  # fmt: skip
        actual = torch.empty(window.count)
        fused.bind({"more": 1.5 * scale}).store(window, actual)
        (base, *experts), _ = formed(window, "deltas")
        assert same(actual, base + experts[0] * scale * (1.5 * scale))
        texts |= set(fused.checked)
    assert len(texts) == 1


def test_index_keys_and_what_lies_beside(library: Library) -> None:
    window = window_of(torch.bfloat16, start=(1 << 32) - 700)
    weights = torch.rand(1 << 13)
    place = MemoryTensors({"w": weights})

    class Far:
        """The tensor as if it began far along the flat index."""

        tensors = place.tensors

        def read(self, name: str, start: int = 0, stop: int | None = None, space: Tensor | None = None) -> Tensor:
            assert stop is not None
            return place.read(name, start - window.start, stop - window.start)

    def function(base: Tensor, experts: Sequence[Tensor], **arguments: Any) -> Tensor:
        words = words_at(arguments["index"], *arguments["key"])
        return torch.where(
            (words >= arguments["limit"]) & (arguments["index"] <= arguments["last"]),
            experts[0] * arguments["beside"],
            base,
        )

    actual, wanted = both(
        library, function, window, torch.float32, index=Index(), key=(123456789, -987654321), limit=-5, last=(1 << 32) + 900,
        beside=Beside(Far(), "w"), form="text", nothing=None,
    )  # fmt: skip
    assert same(actual, wanted) and 0.1 < float((actual != formed(window, "deltas")[0][0]).float().mean()) < 0.3


def test_adapters_deltas_and_weights(library: Library) -> None:
    full = window_of(torch.bfloat16, 2)
    window = Window(full.base, (full.experts[0], torch.randn(full.count)), (False, True), 0)
    for on in ("weights", "deltas"):
        actual, wanted = both(library, lambda base, experts: experts[0] - experts[1] * 0.5, window, torch.bfloat16, on)
        (_, *experts), _ = formed(window, on)
        assert same(actual, wanted) and same(actual, (experts[0] - experts[1] * 0.5).to(torch.bfloat16))


@pytest.mark.parametrize("windows", [(), (0x3C80,), (0x3C80, 0x3F00, 0x1234)])
def test_counts_are_those_of_a_sort(library: Library, windows: tuple[int, ...]) -> None:
    window = window_of(torch.bfloat16)

    def patterns(base: Tensor, experts: Sequence[Tensor]) -> list[Tensor]:
        return [expert.abs().view(torch.int32) for expert in experts[1:]]

    fused = fused_of(patterns, "deltas", "counts", library, wait=True, slots=len(windows))
    bins = empty_bins(2, len(windows))
    for _ in range(2):
        assert not fused.bind({}).count(window, windows * 2, bins)
    assert any(fused.checked.values())
    expected = []
    for delta in formed(window, "deltas")[0][2:]:
        bits = delta.numpy().view(np.uint32) & 0x7FFFFFFF
        parts = [bits[bits >> 16 == window] & 0xFFFF for window in windows] or [(bits >> 16) + (1 << 15)]
        expected += [np.bincount(part, minlength=1 << 16) for part in parts]
    actual = np.concatenate(counts_of(bins, len(windows)))
    assert np.array_equal(actual, 2 * np.concatenate(expected)) and actual.sum() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_are_the_same_fused_or_not_and_right(library: Library, dtype: torch.dtype) -> None:
    window = window_of(dtype)

    def values(base: Tensor, experts: Sequence[Tensor], half: float) -> list[Tensor]:
        return [experts[1].abs(), experts[1] * half - experts[2], experts[1].double() * experts[2].double()]

    actual = []
    for kept, cut in ((library, window.count), (None, window.count), (library, 256 * 5)):
        lanes = np.zeros((3, LANES))
        loop = fused_of(values, "deltas", "sums", kept, wait=True).bind({"half": 0.5})
        for _, _, part in window.parts(cut):
            assert not loop.sum(part, lanes)
        assert kept is None or any(loop.fused.checked.values())
        actual.append(total_of(lanes))
    assert actual[0] == actual[1] == actual[2]
    (_, *experts), _ = formed(window, "deltas")
    expected = values(experts[0], experts, 0.5)
    for wanted_sum, total in zip(expected, actual[0], strict=True):
        assert total == pytest.approx(fsum(wanted_sum.tolist()), rel=1e-12, abs=1e-12)
    window.experts[1][300] = float("inf")
    assert fused_of(values, "deltas", "sums", library, wait=True).bind({"half": 0.5}).sum(window, np.zeros((3, LANES)))


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_float64_on_the_way_is_torchs(library: Library, stored: torch.dtype, out: torch.dtype) -> None:
    """Numbers are float64 beside float64 values, also those that float32 does not hold."""

    def joined(base: Tensor, experts: Sequence[Tensor], share: float) -> Tensor:
        return (experts[0].double() * share + experts[1].double() * 0.1 - base.double() * (-1.0)).float()

    window, actual = window_of(stored), []
    for kept in (library, None):
        loop = fused_of(joined, "weights", out, kept, wait=True).bind({"share": 1 / 3})
        actual.append(torch.empty(window.count, dtype=out))
        assert loop.store(window, actual[-1]) == (False, False)
        assert kept is None or all(loop.fused.checked.values())
    assert torch.equal(*actual)
    (base, *experts), _ = formed(window, "weights")
    exact = experts[0].double() * (1 / 3) + experts[1].double() * 0.1 + base.double()
    assert torch.equal(actual[0], exact.float().to(out))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_told(library: Library, bad: float) -> None:
    for dtype, place in itertools.product(DTYPES, (-1, 0, 2)):
        window = window_of(dtype)
        (window.base if place < 0 else window.experts[place])[4096] = bad  # type: ignore[index]
        fused = fused_of(lambda base, experts: base + experts[1], "deltas", torch.float32, library, wait=True)
        target = torch.empty(window.count)
        assert fused.bind({}).store(window, target)[0]
        counting = fused_of(
            lambda base, experts: [experts[0].abs().view(torch.int32)], "deltas", "counts", library, wait=True
        )
        bins = empty_bins(1, 0)
        assert counting.bind({}).count(window, (), bins) and not bins.any()
    window = window_of(torch.float32)
    fused = fused_of(lambda base, experts: experts[1] * 1e38 * 1e9 + 1.0, "deltas", torch.float16, library, wait=True)
    assert fused.bind({}).store(window, torch.empty(window.count, dtype=torch.float16)) == (False, True)


UNKNOWN: dict[str, Callable[..., Any]] = {
    "a reduction": lambda base, experts: base * experts[0].sum(),
    "a square root": lambda base, experts: torch.sqrt(base.abs()),
    "a sort": lambda base, experts: torch.stack(list(experts)).median(0).values,
    "in place": lambda base, experts: (base + 1.0).add_(experts[0]),
    "a branch on a value": lambda base, experts: base if experts[0].sum() > 0 else experts[0],
    "a tensor of its own": lambda base, experts: base * torch.tensor([2.0]),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_no_loop_runs_as_it_is_and_says_why(library: Library, name: str) -> None:
    window = window_of(torch.float32, count=100)
    fused = fused_of(UNKNOWN[name], "deltas", torch.float32, library, wait=True)
    actual = torch.empty(100)
    fused.bind({}).store(window, actual)
    (base, *experts), _ = formed(window, "deltas")
    assert same(actual, UNKNOWN[name](base, experts)) and fused.problem


def test_numbers_alone_belong_into_the_arguments() -> None:
    """Eagerly they would be computed in float64, in a loop in float32."""
    with pytest.raises(NotTraceableError, match="arguments"):
        trace(lambda models, numbers: models[0] * (numbers["a"] / numbers["b"]), 2, {"a": 1.0, "b": 3.0})


def test_a_loop_that_gives_other_bytes_is_not_used(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(source._UNCOMMON, "floor", lambda operands, dtype: f"ceilf({operands[0]})")
    fused = fused_of(lambda base, experts: torch.floor(experts[0]), "deltas", torch.float32, library, wait=True)
    window = window_of(torch.float32)
    for _ in range(2):
        actual = torch.empty(window.count)
        fused.bind({}).store(window, actual)
        assert same(actual, torch.floor(formed(window, "deltas")[0][1])) and "other bytes" in fused.problem


def test_while_a_loop_is_built_work_goes_on(tmp_path: Path) -> None:
    library = library_in(tmp_path)
    fused = fused_of(lambda base, experts: base - experts[0] * 0.125, "deltas", torch.float32, library)
    window, target = window_of(torch.bfloat16), torch.empty(5003)
    fused.bind({}).store(window, target)
    assert not fused.checked  # the first window went the plain way
    before = target.clone()
    libraries._building[library.name_of(fused.loops[next(iter(fused.loops))].text)].join()  # type: ignore[union-attr]
    fused.bind({}).store(window, target)
    assert fused.checked and same(before, target)


def test_a_library_cut_short_is_built_again(tmp_path: Path) -> None:
    library, window, target = library_in(tmp_path), window_of(torch.bfloat16), torch.empty(5003)
    fused = fused_of(
        lambda base, experts: base * 0.25 + experts[0], "deltas", torch.float32, library, build=False, wait=True
    )
    loop = fused.loop(window, fused.bind({}))
    assert loop is not None
    path = tmp_path / f"{library.name_of(loop.text)}.so"
    path.write_bytes(b"\x7fELF cut short")
    fused.build = True
    fused.bind({}).store(window, target)
    assert fused.checked and path.stat().st_size > 1000


def test_without_a_compiler_everything_runs_as_it_is(tmp_path: Path) -> None:
    window, target = window_of(torch.bfloat16), torch.empty(5003)
    fused = fused_of(
        lambda base, experts: base + experts[0], "deltas", torch.float32, Library(tmp_path, None), wait=True
    )
    fused.bind({}).store(window, target)
    (base, *experts), _ = formed(window, "deltas")
    assert same(target, base + experts[0]) and not list(tmp_path.iterdir())
    broken = fused_of(
        lambda base, experts: base + experts[0], "deltas", torch.float32, Library(tmp_path, "/bin/false"), wait=True
    )
    broken.bind({}).store(window, target)
    assert same(target, base + experts[0])


@dataclass(frozen=True)
class Inner:
    number: float
    text: str | None


@dataclass(frozen=True)
class Outer:
    index: Tensor
    parts: Sequence[Any]
    inner: Inner
    nothing: Inner | None = None


def arguments(number: float = 0.5, text: str | None = None) -> Outer:
    beside = read_beside(MemoryTensors({"w": torch.arange(9.0)}), "w")
    return Outer(flat_index(), [beside, 3, "x", None], Inner(number, text))


def test_stand_ins_among_the_arguments_become_tensors() -> None:
    filled = materialised(arguments(), 2, 4, "cpu")
    assert filled.index.tolist() == [2, 3, 4, 5] and filled.parts[0].tolist() == [2, 3, 4, 5]
    assert filled.parts[1:] == [3, "x", None] and filled.inner == Inner(0.5, None) and filled.nothing is None


def test_numbers_are_leaves_and_the_rest_is_the_form() -> None:
    leaves, form = leaves_and_form(arguments())
    assert [type(leaf) for leaf in leaves] == [Index, Beside, int, float] and leaves[2:] == [3, 0.5]
    assert leaves_and_form(arguments(0.25))[1] == form != leaves_and_form(arguments(text="y"))[1]
    assert leaves_and_form({"a": 1.0})[1] != leaves_and_form({"b": 1.0})[1]


def test_a_function_is_not_handed_a_base_that_only_deltas_need(library: Library) -> None:
    window, results = window_of(torch.bfloat16), []
    for kept in (library, None):
        fused = Fused(lambda models, _: models[0] * 0.5, "deltas", torch.float32, kept, wait=True, with_base=False)
        results.append(torch.empty(window.count))
        fused.bind(()).store(window, results[-1])
    assert same(*results) and same(results[0], formed(window, "deltas")[0][1] * 0.5)
