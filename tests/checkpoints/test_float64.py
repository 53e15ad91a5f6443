"""Float64 checkpoints: what a merge keeps of them, and that it says so."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergecore import merge, methods
from mergecore.checkpoints.select import SelectRule
from tests.recipe_files import merge_into

PRECISE = torch.tensor([1.0 + 2.0**-40, 3.0], dtype=torch.float64)


def test_in_memory_a_warning_says_what_is_lost() -> None:
    model = {"w": PRECISE, "v": torch.ones(3)}
    with pytest.warns(UserWarning, match=r"'w' and the like are float64; merges work in float32"):
        result = merge(methods.Average(), experts=[model, model])
    assert result["w"].dtype == torch.float64 and result["w"].tolist() == [1.0, 3.0]


def test_what_is_copied_keeps_its_digits_and_nothing_is_said() -> None:
    model = {"w": PRECISE, "v": torch.ones(3)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = merge(methods.Average(), experts=[model, model], select=[SelectRule(names="v")])
        merge(methods.Average(), experts=[{"w": PRECISE.float()}] * 2)
    assert torch.equal(result["w"], PRECISE)


@pytest.mark.parametrize("precise", ["base", "a"])
def test_a_recipe_says_whose(precise: str, tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "a")):
        values = torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        (tmp_path / name).mkdir()
        tensors = {"w": values if name == precise else values.float()}
        save_file(tensors, tmp_path / name / "model.safetensors")
    recipe = {"method": "task_arithmetic", "scale": 1, "base": tmp_path / "base", "experts": [tmp_path / "a"]}
    done = merge_into(recipe, tmp_path / "out")
    (said,) = [warning for warning in done.warnings if "float64" in warning]
    assert said.startswith("base: " if precise == "base" else "expert 'a' (") and "'w' and the like" in said
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].dtype == (
        torch.float64 if precise == "base" else torch.float32
    )
