"""Tensors that are copied are looked at like merged ones: nothing that is not finite is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import mergecore.engine.windows as reading
from mergecore import merge, methods
from mergecore.checkpoints.select import SelectRule
from mergecore.errors import MergeloomError, NonFiniteError
from tests.recipe_files import merge_into

RULES: dict[str, list[SelectRule]] = {
    "unselected": [SelectRule(names="merged")],
    "copied by a rule": [SelectRule(names="copied", take="copy"), SelectRule()],
}


def copying(values: Tensor, rules: str, **more: Any) -> Tensor:
    """The copied tensor of a merge that copies it."""
    model = {"copied": values, "merged": torch.ones(3)}
    return merge(methods.Average(), base=model, experts=[model], select=RULES[rules], **more)["copied"]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_refused(rules: str, bad: float, dtype: torch.dtype) -> None:
    values = torch.zeros(70_000, dtype=dtype)
    values[69_999] = bad
    with pytest.raises(NonFiniteError, match=r"copied: tensor 'copied' holds (nan|-?inf); repair .*take: drop"):
        copying(values, rules)


def test_float8_is_looked_at_too() -> None:
    with pytest.raises(NonFiniteError, match="'copied' holds nan"):
        copying(torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn), "unselected")


@pytest.mark.parametrize("rules", RULES)
def test_what_overflows_the_dtype_of_the_result_is_refused(rules: str) -> None:
    with pytest.raises(NonFiniteError, match=r"'copied' holds inf; it is finite in its checkpoint .* wider dtype"):
        copying(torch.tensor([1.0, 1e6]), rules, dtype=torch.float16)
    assert copying(torch.tensor([1.0, 6e4]), rules, dtype=torch.float16).tolist() == [1.0, 6e4]


def test_a_window_later_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "WINDOWS", (16, 16))
    values = torch.zeros(100)
    values[77] = float("inf")
    with pytest.raises(NonFiniteError, match="'copied' holds inf"):
        copying(values, "unselected")


def test_the_constants_of_a_mask_are_copied_as_they_are() -> None:
    """A causal mask that was saved with the weights holds −∞ by right."""
    mask = torch.full((4, 4), -float("inf")).triu(1)
    model = {"h.0.attn.bias": mask, "merged": torch.ones(3)}
    assert torch.equal(merge(methods.Average(), base=model, experts=[model])["h.0.attn.bias"], mask)


@pytest.mark.parametrize("of", [None, "a"])
def test_a_recipe_leaves_nothing_behind(of: str | None, tmp_path: Path) -> None:
    """Copied from the base, or from an expert."""
    for number, name in enumerate(("base", "a", "b")):
        merged = torch.full((3,), float(number))
        bad = float("nan") if name == (of or "base") else 1.0
        (tmp_path / name).mkdir()
        save_file({"copied": torch.tensor([bad, 1.0]), "merged": merged}, tmp_path / name / "model.safetensors")
    rule = {"names": "copied", "take": "copy", **({"of": of} if of else {})}
    sources = {"base": str(tmp_path / "base"), "experts": [{"name": n, "source": str(tmp_path / n)} for n in "ab"]}
    with pytest.raises(MergeloomError, match="'copied' holds nan"):
        merge_into({"method": "average", **sources, "select": [rule, {}]}, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "base"]
    merge_into({"method": "average", **sources, "select": [{"names": "copied", "take": "drop"}, {}]}, tmp_path / "out")
    assert list(load_file(tmp_path / "out" / "model.safetensors")) == ["merged"]
