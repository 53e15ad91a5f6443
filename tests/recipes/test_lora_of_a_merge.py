"""A recipe with `lora`: the adapter that is nearest to a merge, against the merge itself and PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergecore.engine.executor import InProcess
from mergecore.errors import MergeloomError, SpecError
from mergecore.events import silent
from mergecore.recipes.make_recipe import make_recipe
from mergecore.recipes.merge_recipe import WrittenModel, merge_recipe
from mergecore.spec.recipe import parse_recipe
from tests.checkpoints.test_adapters import KINDS, adapted, fresh, weights
from tests.recipe_files import command, find, merge_into, plain
from tests.recipes.test_extract_lora import folded


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base and two fine-tunes of all its weights."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    fresh("llama").save_pretrained(folder / "base")
    for number in range(2):
        torch.manual_seed(1)
        model = fresh("llama")
        model.load_state_dict(load_file(folder / "base" / "model.safetensors"), strict=False)
        torch.manual_seed(number)
        with torch.no_grad():
            for value in model.parameters():
                value += 0.01 * torch.randn(value.shape)
        model.save_pretrained(folder / f"expert-{number}")
    return folder / "base", [folder / f"expert-{number}" for number in range(2)]


def made_of(recipe: dict[str, Any], out: Path, **options: Any) -> WrittenModel:
    return make_recipe(parse_recipe(plain(recipe), "recipe"), out, find, InProcess(), silent, **options)


def changes(base: Path, merged: Path) -> dict[str, Tensor]:
    before, after = weights(base), weights(merged)
    return {name: (after[name] - before[name]).double() for name in before}


def test_at_full_rank_it_is_the_merge(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, experts = models
    recipe = {"method": "ties", "density": 0.4, "base": base, "experts": experts}
    merge_into(recipe, tmp_path / "dense")
    made_of({**recipe, "lora": {"rank": 1000}}, tmp_path / "out")
    before, wanted, actual = weights(base), weights(tmp_path / "dense"), folded("llama", base, tmp_path / "out")
    layers = {name for name in before if "proj" in name or "lm_head" in name}
    for name in before:
        torch.testing.assert_close(actual[name], (wanted if name in layers else before)[name], rtol=1e-5, atol=1e-6)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "extraction.json", "mergeloom.yaml",
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"], "the merge itself went"


def test_a_rank_is_the_svd_of_the_merge(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """Of any method and of rules as well; the loss that is said is that of the singular values."""
    base, experts = models
    recipe = {
        "method": "task_arithmetic", "scale": 0.7, "base": base, "experts": experts,
        "select": [{"names": "*layers.1*", "method": "average"}, {"names": "*gate_proj*", "take": "copy"}, {}],
    }  # fmt: skip
    merge_into(recipe, tmp_path / "dense")
    said = made_of({**recipe, "lora": {"rank": 3, "modules": ["q_proj", "gate_proj"]}}, tmp_path / "out")
    deltas, factors = changes(base, tmp_path / "dense"), load_file(tmp_path / "out/adapter_model.safetensors")
    lost = whole = 0.0
    for layer in range(2):
        for module in (f"model.layers.{layer}.self_attn.q_proj", f"model.layers.{layer}.mlp.gate_proj"):
            down, up = (factors[f"base_model.model.{module}.lora_{part}.weight"].double() for part in "AB")
            left, values, right = torch.linalg.svd(deltas[f"{module}.weight"], full_matrices=False)
            torch.testing.assert_close(up @ down, left[:, :3] * values[:3] @ right[:3], rtol=1e-4, atol=1e-6)
            lost, whole = lost + float((values[3:] ** 2).sum()), whole + float((values**2).sum())
    assert not deltas["model.layers.0.mlp.gate_proj.weight"].any() and len(factors) == 8
    record = json.loads((tmp_path / "out/extraction.json").read_text())
    assert record["error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-4)
    assert f"lacks {record['error']:.3%}" in said.warnings[-1]
    assert f"{record['total_error']:.4%}" in (tmp_path / "out/README.md").read_text()


def test_the_merge_is_not_rounded_before_it_is_factorised(tmp_path: Path) -> None:
    """A bfloat16 base of large weights: what a small change leaves of itself in bfloat16 is mostly rounding."""
    draw = torch.Generator().manual_seed(0)
    base = (8 + torch.randn(24, 24, generator=draw)).to(torch.bfloat16)
    down, up = torch.randn(2, 24, generator=draw), 1e-3 * torch.randn(24, 2, generator=draw)
    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "base/config.json").write_text("{}")
    save_file({"q_proj.weight": base}, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    stem = "base_model.model.q_proj.lora_"
    save_file({f"{stem}A.weight": down, f"{stem}B.weight": up}, tmp_path / "adapter/adapter_model.safetensors")
    recipe = {"method": "average", "base": tmp_path / "base", "experts": [tmp_path / "adapter"]}
    made_of({**recipe, "lora": {"rank": 2}}, tmp_path / "out")
    factors = load_file(tmp_path / "out/adapter_model.safetensors")
    torch.testing.assert_close(factors[f"{stem}B.weight"] @ factors[f"{stem}A.weight"], up @ down, rtol=1e-3, atol=1e-6)


def test_the_command_and_the_recipe_that_makes_it_again(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, experts = models
    adapter, _ = adapted("llama", base, tmp_path, **KINDS["plain"][1])
    recipe = {
        "method": "average", "base": base, "experts": [experts[0], {"name": "lora", "source": adapter}],
        "dtype": "bfloat16", "lora": {"rank": 2, "modules": ["*_proj"]},
    }  # fmt: skip
    said = command(tmp_path, recipe)
    assert said.exit_code == 0 and "the adapter of rank 2 lacks" in " ".join(said.output.split())
    factors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {value.dtype for value in factors.values()} == {torch.bfloat16}
    written = yaml.safe_load((tmp_path / "out/mergeloom.yaml").read_text())
    assert written["lora"] == recipe["lora"] and written["dtype"] == "bfloat16"
    card = (tmp_path / "out/README.md").read_text()
    assert "rank: 2" in card and "float32" not in card and str(tmp_path / ".out") not in card
    again = command(tmp_path, (tmp_path / "out/mergeloom.yaml").read_text(), out="again")
    assert again.exit_code == 0, again.output
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "again"))
    assert first == second
    once_more = command(tmp_path, recipe)
    assert once_more.exit_code == 1 and "exists already" in once_more.output


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no base": ({"base": None}, "recipe.base: an adapter .* changes a base"),
    "an adapter": ({"method": "lora_lego"}, "'lora_lego' makes an adapter"),
    "masks": ({"method": "emr"}, "'emr' makes a product of masks|'emr' makes masks"),
    "a stack": ({"stack": [{"layers": [0, 1]}]}, "recipe.stack: an adapter"),
    "a vocabulary": ({"tokenizer": "union"}, "recipe.tokenizer: an adapter"),
    "a tensor left out": ({"select": [{"names": "*q_proj*", "take": "drop"}, {}]}, "recipe.select: an adapter"),
    "a layer that is not there": ({"lora": {"rank": 2, "modules": ["q_prj"]}}, "did you mean 'q_proj'"),
    "no rank": ({"lora": {}}, "lora.rank"),
    "rank 0": ({"lora": {"rank": 0}}, "lora.rank"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_an_adapter_is_refused(case: str, models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, experts = models
    values, said = REFUSED[case]
    recipe = {"method": "average", "base": base, "experts": experts, "lora": {"rank": 2}, **values}
    with pytest.raises(MergeloomError, match=said):
        made_of({key: value for key, value in recipe.items() if value is not None}, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_base_with_an_adapter_folded_in_is_refused(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, experts = models
    adapter, _ = adapted("llama", base, tmp_path, **KINDS["plain"][1])
    ground = {"source": base, "adapter": {"source": adapter}}
    with pytest.raises(SpecError, match="has an adapter folded in"):
        made_of({"method": "average", "base": ground, "experts": experts, "lora": {"rank": 2}}, tmp_path / "out")
    with pytest.raises(SpecError, match="make_recipe"):
        recipe = {"method": "average", "base": base, "experts": experts, "lora": {"rank": 2}}
        merge_recipe(parse_recipe(plain(recipe), "recipe"), tmp_path / "out", find, InProcess(), silent)
