"""Tensors whose rows come from several checkpoints: any part of them equals what a loop over rows makes."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mergecore.checkpoints.vocabulary.rows import RowTensors, rows_of, runs_of
from mergecore.errors import SourceError
from mergecore.tensors.files import open_file
from mergecore.tensors.memory import MemoryTensors

COUNT, WIDTH = 60, 7


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sources_tensors = {
        "e": torch.randn(COUNT, WIDTH, generator=generator),
        "bias": torch.randn(COUNT, generator=generator),
    }
    return {name: value.to(dtype) for name, value in sources_tensors.items()}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("in_files", [True, False])
@pytest.mark.parametrize("few", [0, 16])
def test_any_part_is_what_a_loop_over_rows_makes(
    seed: int, in_files: bool, few: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergecore.checkpoints.vocabulary.rows.FEW", few)
    draw = np.random.default_rng(seed)
    count, names = 90, {"e": "e", "bias": "bias"}
    sources_tensors = [
        tensors(seed),
        tensors(seed + 10, torch.bfloat16 if seed % 2 else torch.float32),
        tensors(seed + 20),
    ]
    for number, source_tensors in enumerate(sources_tensors):
        save_file(source_tensors, tmp_path / f"{number}.safetensors")
    sources = tuple(
        open_file(tmp_path / f"{n}.safetensors") if in_files else MemoryTensors(sources_tensors[n]) for n in range(3)
    )
    pairs: list[list[tuple[np.ndarray, np.ndarray]]] = [[], [], []]
    share = {row: draw.choice(3, draw.integers(0, 4), replace=False) for row in range(count - 6)}
    there = draw.integers(0, COUNT, (3, count)).astype(np.int32)
    there[0, 10:40] = np.arange(5, 35)  # a long run
    for source in range(3):
        rows = np.array([row for row, who in share.items() if source in who], dtype=np.int32)
        pairs[source].append((rows, there[source][rows]))
    filled = np.array([*range(count - 6, count - 2)], dtype=np.int32)
    actual = RowTensors(sources, (names,) * 3, rows_of(count, pairs, filled))
    for name in names:
        wanted = torch.zeros(count, *sources_tensors[0][name].shape[1:])
        for row, who in share.items():
            for source in who:
                wanted[row] += sources_tensors[source][name][there[source][row]].float() / len(who)
        wanted[filled] = wanted[[row for row in range(count) if row not in filled]].mean(0)
        assert actual.tensors[name].shape == tuple(wanted.shape) and actual.tensors[name].dtype == "F32"
        whole = actual.read(name)
        torch.testing.assert_close(whole.reshape(wanted.shape), wanted, rtol=0, atol=1e-6)
        flat = whole.numel()
        for _ in range(60):
            start, stop = sorted(draw.integers(0, flat + 1, 2).tolist())
            space = torch.full((stop - start,), float("nan"))
            assert torch.equal(actual.read(name, start, stop, space), whole[start:stop]) and torch.equal(
                space, whole[start:stop]
            )
    again = pickle.loads(pickle.dumps(actual))
    assert torch.equal(again.read("e", 3, 200), actual.read("e", 3, 200))


def test_runs_are_few_where_rows_stand_together() -> None:
    rows = np.arange(1000, dtype=np.int32)
    there = np.concatenate([rows[:400], rows[:600] + 400, []]).astype(np.int32)
    assert len(runs_of(rows, there).first) == 1
    assert len(runs_of(rows, np.roll(there, 5)).first) == 2
    assert len(runs_of(rows[::2], there[::2]).first) == 500


def test_a_tensor_keeps_its_dtype_where_its_rows_are_copies() -> None:
    """Other dtypes and means widen it to float32, padding does not."""
    narrow, wide = MemoryTensors(tensors(0, torch.bfloat16)), MemoryTensors(tensors(1))
    rows = np.arange(COUNT, dtype=np.int32)
    none, names = np.zeros(0, dtype=np.int32), ({"e": "e"},) * 2
    own = rows_of(COUNT + 2, [[(rows, rows)], []], np.array([COUNT, COUNT + 1], dtype=np.int32))
    assert RowTensors((narrow, wide), names, own).tensors["e"].dtype == "BF16"
    borrowed = rows_of(COUNT, [[(rows[1:], rows[1:])], [(rows[:1], rows[:1])]], none)
    assert RowTensors((narrow, wide), names, borrowed).tensors["e"].dtype == "F32"
    assert RowTensors((narrow, narrow), names, borrowed).tensors["e"].dtype == "BF16"
    assert torch.equal(RowTensors((wide, narrow), names, borrowed).read("e", 0, 7), narrow.values["e"][0].float())


def test_a_file_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    save_file(tensors(0), tmp_path / "x.safetensors")
    source = open_file(tmp_path / "x.safetensors")
    rows = np.arange(COUNT, dtype=np.int32)
    actual = RowTensors((source,), ({"e": "e"},), rows_of(COUNT, [[(rows, rows[::-1].copy())]], rows[:0]))
    with (tmp_path / "x.safetensors").open("r+b") as file:
        file.truncate(500)
    with pytest.raises(SourceError, match="ends inside tensor 'e'"):
        actual.read("e")
