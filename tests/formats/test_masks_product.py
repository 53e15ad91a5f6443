"""A product of masks: its directory, the models unpacked from it, and how a sweep measures it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file
from torch import Tensor

from flows.cli.main import main
from mergecore.errors import SourceError
from mergecore.products.masks import open_product
from mergecore.store.results import ITEMS
from tests.digits import DigitsTier
from tests.digits_sweep import digits_spec, opened
from tests.recipe_files import command, merge_into
from tests.tiny_lm import write_base, write_expert


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("models")
    base = write_base(folder / "base")
    return base, [write_expert(base, folder / f"e{number}", number) for number in (1, 2, 3)]


@pytest.fixture(scope="module")
def product(models: tuple[Path, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("product") / "out"
    base, experts = models
    merge_into({"method": "tall_masks", "mask_scale": [0.3, 0.6, 0.4], "base": base, "experts": experts}, out)
    return out


def weights(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def unpacking(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["unpack", *(str(argument) for argument in arguments)])


def by_hand(base: dict[str, Tensor], experts: list[dict[str, Tensor]], task: int, scale: float) -> dict[str, Tensor]:
    """θ_0 + M_t ⊙ Σ τ, from the formula alone."""
    models = {}
    for name, origin in base.items():
        deltas = [expert[name] - origin for expert in experts]
        together = deltas[0] + deltas[1] + deltas[2]
        models[name] = origin + torch.where(deltas[task].abs() > scale * (together - deltas[task]).abs(), together, 0.0)
    return models


def test_the_directory_says_what_it_is(models: tuple[Path, list[Path]], product: Path) -> None:
    base, experts = models
    names = {path.name for path in product.iterdir()}
    assert names >= {
        "product.json",
        "masks.safetensors",
        "config.json",
        "tokenizer.json",
        "README.md",
        "mergeloom.yaml",
    }
    assert not any(name.startswith("model") for name in names), "a loader must not take the base for the product"
    record = json.loads((product / "product.json").read_text())
    assert record["format"] == "mergeloom masks" and record["version"] == 1 and record["method"] == "tall_masks"
    assert {task["name"] for task in record["tasks"]} == {"e1", "e2", "e3"}
    size = sum(tensor.nbytes for tensor in weights(base).values())
    merged = sum(-(-tensor.numel() // 8) for tensor in weights(base).values())
    assert record["bytes"] == {"product": 2 * size + 3 * merged, "models": 3 * size}
    card = (product / "README.md").read_text()
    assert "mergeloom unpack" in card and f"{2 * size + 3 * merged:,} bytes" in card
    record = open_product(product).record
    for task, scale in (("e1", 0.3), ("e2", 0.6), ("e3", 0.4)):
        number = int(task[1]) - 1
        model = by_hand(weights(base), [weights(expert) for expert in experts], number, scale)
        changed = sum(int((model[name] != value).sum()) for name, value in weights(base).items())
        kept = record.tasks[record.row(task)].kept * sum(value.numel() for value in model.values())
        assert kept == pytest.approx(changed, rel=1e-3)


@pytest.mark.parametrize("task", [1, 2, 3])
def test_transformers_loads_the_model_of_a_task(
    models: tuple[Path, list[Path]], product: Path, tmp_path: Path, task: int
) -> None:
    from transformers import AutoModelForCausalLM

    base, experts = models
    outcome = unpacking(product, f"e{task}", tmp_path / "out")
    assert outcome.exit_code == 0, outcome.output
    wanted = by_hand(weights(base), [weights(expert) for expert in experts], task - 1, (0.3, 0.6, 0.4)[task - 1])
    unpacked = weights(tmp_path / "out")
    for name in wanted:
        torch.testing.assert_close(unpacked[name], wanted[name], rtol=1e-6, atol=1e-6)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(
        model.state_dict()["model.layers.1.mlp.up_proj.weight"], unpacked["model.layers.1.mlp.up_proj.weight"]
    )
    left = {path.name for path in base.iterdir()} | {"README.md"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == left


def test_a_product_read_in_memory_is_what_is_unpacked(product: Path, tmp_path: Path) -> None:
    assert unpacking(product, "e2", tmp_path / "out", "--shard-size", "100kB").exit_code == 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    model = open_product(product).load("e2")
    for name, value in weights(tmp_path / "out").items():
        assert torch.equal(model.read(name).view(value.shape), value)


def test_a_single_expert_comes_back_and_dtypes_are_kept(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, experts = models
    recipe = {"method": "emr", "vector": "bfloat16", "dtype": "bfloat16", "base": base, "experts": experts[:2]}
    result = command(tmp_path, recipe, out="product")
    assert result.exit_code == 0 and "a product of masks for" in result.output, result.output
    assert {tensor.dtype for name, tensor in weights(tmp_path / "product").items() if "/" not in name} == {
        torch.float32
    }
    assert unpacking(tmp_path / "product", "e1", tmp_path / "narrow").exit_code == 0
    assert {tensor.dtype for tensor in weights(tmp_path / "narrow").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "narrow" / "config.json").read_text())["dtype"] == "bfloat16"
    assert unpacking(tmp_path / "product", "e1", tmp_path / "wide", "--dtype", "float32").exit_code == 0
    assert {tensor.dtype for tensor in weights(tmp_path / "wide").values()} == {torch.float32}
    merge_into({"method": "tall_masks", "base": base, "experts": experts[:1]}, tmp_path / "one")
    assert unpacking(tmp_path / "one", "e1", tmp_path / "same").exit_code == 0
    for name, value in weights(experts[0]).items():
        torch.testing.assert_close(weights(tmp_path / "same")[name], value, rtol=1e-6, atol=1e-7)


def test_what_cannot_be_unpacked_is_refused(product: Path, models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    result = unpacking(product, "e11", tmp_path / "out")
    assert result.exit_code == 1 and "no task 'e11'" in result.output and "'e1'" in result.output
    result = unpacking(models[0], "e1", tmp_path / "out")
    assert result.exit_code == 1 and "holds no product.json" in result.output
    result = unpacking(product, "e1", product)
    assert result.exit_code == 1 and "exists already" in result.output
    assert not list(tmp_path.iterdir())
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "product.json").write_text((product / "product.json").read_text())
    with pytest.raises(SourceError, match=r"lacks masks.safetensors"):
        open_product(broken)
    (broken / "product.json").write_text('{"format": "something else"}')
    with pytest.raises(SourceError, match=r"product.json cannot be read"):
        open_product(broken)


# --- in a sweep -----------------------------------------------------------------------------------------------------


def test_a_sweep_measures_each_task_on_the_model_that_is_loaded_for_it(tier: DigitsTier, tmp_path: Path) -> None:
    spec = digits_spec(
        tier, tmp_path, counts=[2], evaluate__validation=None, evaluate__limit=40, output__keep="all",
        methods=[{"method": "tall_masks", "mask_scale": 0.4}],
    )  # fmt: skip
    swept = opened(spec)
    assert not swept.run().failures
    cell = swept.cell("tall_masks(mask_scale=0.4) n2 s0")
    assert set(cell.tasks) == set(cell.experts), "held-out tasks belong to no expert"
    average = swept.cell("average n2 s0")
    shares = {}
    for task in cell.tasks:
        record = swept.store.record(swept.plan.evaluation(cell, "test", task))
        own = swept.store.record(swept.plan.evaluation(average, "test", task))
        assert record is not None and own is not None
        shares[task] = record.result["score"] - own.result["score"]
    assert min(shares.values()) > 0, f"a task's own mask beats the average of two: {shares}"
    scores = swept.scores().cells
    row = next(scored for scored in scores if scored.cell == cell.id)
    assert row.status == "done" and set(row.items["test"]) == set(cell.tasks)
    assert (swept.store.folder(swept.plan.evaluation(cell, "test", cell.tasks[0])) / ITEMS).exists()
    registered = swept.registered()
    assert registered is not None and registered["cell"] == cell.id
    folder = Path(registered["uri"].removeprefix("file://"))
    assert open_product(folder).record.row(cell.tasks[0]) in (0, 1)


def test_a_product_of_experts_without_tasks_is_refused(tier: DigitsTier, tmp_path: Path) -> None:
    spec = digits_spec(tier, tmp_path, counts=[2], methods=[{"method": "emr"}])
    spec["experts"] = [{**expert, "tasks": []} for expert in spec["experts"]]
    refused = [cell.refused for cell in opened(spec).plan.cells if cell.method == "emr"]
    assert refused and all("names none" in reason for reason in refused)
