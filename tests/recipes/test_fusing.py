"""Fusing (Choshen et al. 2022): an average of bodies without the tasks' heads, to fine-tune from; and task arithmetic
by analogy, with weights of either sign."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergecore import merge, methods
from mergecore.checkpoints.select import SelectRule
from mergecore.errors import MergeloomError, MismatchError, SpecError
from mergecore.spec.sweep import parse_spec
from tests.recipe_files import command

FUSING = [{"names": "classifier.*", "take": "drop"}, {}]


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A BERT with a head of 2 classes, and fine-tunes of it with heads of 2, 3 and 5."""
    from transformers import BertConfig, BertForSequenceClassification

    folder = tmp_path_factory.mktemp("classifiers")
    config = BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=20,
    )  # fmt: skip
    torch.manual_seed(0)
    base = BertForSequenceClassification(config)
    base.save_pretrained(folder / "base")
    for number, classes in enumerate((2, 3, 5)):
        config.num_labels = classes
        expert = BertForSequenceClassification(config)
        body = {n: v + 0.02 * torch.randn_like(v) for n, v in base.state_dict().items() if "classifier" not in n}
        expert.load_state_dict({**expert.state_dict(), **body})
        expert.save_pretrained(folder / f"e{number}")
    return folder / "base", [folder / f"e{number}" for number in range(3)]


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def test_bodies_are_averaged_and_heads_dropped(classifiers: tuple[Path, list[Path]], tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForSequenceClassification

    base, experts = classifiers
    result = command(tmp_path, {"method": "average", "base": base, "experts": experts, "select": FUSING})
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    merged, bodies = weights(out), [weights(expert) for expert in experts]
    assert set(merged) == {name for name in weights(base) if not name.startswith("classifier")}
    for name, value in merged.items():
        torch.testing.assert_close(value, sum(body[name] for body in bodies) / 3, rtol=1e-6, atol=1e-7)
    _, told = AutoModel.from_pretrained(out, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    _, told = AutoModelForSequenceClassification.from_pretrained(out, num_labels=7, output_loading_info=True)
    assert set(told["missing_keys"]) == {"classifier.weight", "classifier.bias"}, "a new head, and nothing else"
    assert json.loads((out / "config.json").read_text())["model_type"] == "bert"


def test_a_head_that_only_experts_have_is_dropped_too(classifiers: tuple[Path, list[Path]], tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    base, experts = classifiers
    bare = tmp_path / "bare"
    model = AutoModelForSequenceClassification.from_pretrained(base)
    body = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("classifier")}
    model.save_pretrained(bare, state_dict=body)
    recipe = {"method": "task_arithmetic", "scale": 0.3, "base": bare, "experts": experts, "select": FUSING}
    assert command(tmp_path, recipe).exit_code == 0
    assert set(weights(tmp_path / "out")) == set(body)


def test_heads_that_do_not_fit_are_refused_unless_dropped(classifiers: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, experts = classifiers
    result = command(tmp_path, {"method": "average", "base": base, "experts": experts})
    assert result.exit_code == 1 and "'classifier.bias' has shape [3], in the base [2]" in result.output
    misspelt = [{"names": "clasifier.*", "take": "drop"}, {}]
    result = command(tmp_path, {"method": "average", "base": base, "experts": experts[:1], "select": misspelt})
    assert result.exit_code == 1 and "drops no tensor of the base or of an expert" in result.output


def test_a_rule_drops_in_memory() -> None:
    base, expert = {"body": torch.zeros(3), "head": torch.zeros(2)}, {"body": torch.ones(3), "head": torch.ones(4)}
    rules = [SelectRule(names="head", take="drop"), SelectRule()]
    assert merge(methods.Average(), base=base, experts=[expert], select=rules).keys() == {"body"}
    with pytest.raises(MismatchError, match="'head'"):
        merge(methods.Average(), base=base, experts=[expert])
    with pytest.raises(SpecError, match="drops no tensor"):
        merge(
            methods.Average(), base=base, experts=[base], select=[SelectRule(names="tail", take="drop"), SelectRule()]
        )


def test_heads_are_dropped_where_layers_are_made_in_other_ways(
    classifiers: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    """A rule that drops beside one with values of its own, one that copies from an expert, and one for the rest."""
    base, experts = classifiers
    select = [
        {"names": "classifier.*", "take": "drop"}, {"layers": [0, 0], "weights": [1, 2, 1]},
        {"layers": [1, 1], "take": "copy", "of": "e1"}, {},
    ]  # fmt: skip
    named = [{"name": expert.name, "source": str(expert)} for expert in experts]
    result = command(tmp_path, {"method": "average", "base": base, "experts": named, "select": select})
    assert result.exit_code == 0, result.output
    merged, bodies = weights(tmp_path / "out"), [weights(expert) for expert in experts]
    assert set(merged) == {name for name in weights(base) if not name.startswith("classifier")}
    for name, value in merged.items():
        first, second, third = (body[name] for body in bodies)
        wanted = (first + 2 * second + third) / 4 if ".layer.0." in name else (first + second + third) / 3
        torch.testing.assert_close(value, second if ".layer.1." in name else wanted, rtol=1e-6, atol=1e-7)
    for strange, said in (({"t": 1}, "'take: drop' not to"), ({"of": "e1"}, "'of' says whom to copy from")):
        select[0] = {"names": "classifier.*", "take": "drop", **strange}
        result = command(tmp_path, {"method": "average", "base": base, "experts": named, "select": select})
        assert result.exit_code == 1 and said in result.output


def test_a_product_is_not_made_by_rules(classifiers: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, experts = classifiers
    for recipe in (
        {"method": "average", "select": [{"layers": [0, 0], "method": "emr"}, {}]},
        {"method": "emr", "select": [{"layers": [0, 0], "take": "copy", "of": experts[0].name}]},
    ):
        recipe |= {"base": base, "experts": experts[:1]}
        result = command(tmp_path, recipe)
        assert result.exit_code == 1 and "'emr' makes a product of masks" in result.output, result.output


def test_a_sweep_does_not_measure_models_without_heads() -> None:
    spec = {
        "name": "s", "base": "b", "experts": ["a"], "methods": [], "counts": [1], "select": FUSING,
        "evaluate": {"held_in": {"x": ["y"]}},
    }  # fmt: skip
    with pytest.raises(MergeloomError, match=r"'take: drop' is for `mergeloom merge`"):
        parse_spec(spec, "spec")


# --- task arithmetic, beyond one scale ------------------------------------------------------------------------------


def test_analogy_and_negation() -> None:
    """A is to B as C is to D: domain and task are directions of their own, so D = C + (B − A)."""
    draw = torch.Generator().manual_seed(3)
    base, domain, task = (torch.randn(50, generator=draw) for _ in range(3))
    start, two, three = {"w": base}, {"w": base + task}, {"w": base + domain}
    by_analogy = methods.TaskArithmetic(scale=1, weights=(1, 1, -1))
    experts = [{"w": base + domain + 0.5}, {"w": base + task + 0.5}, {"w": base + 0.5}]
    merged = merge(by_analogy, base=start, experts=experts)["w"]
    torch.testing.assert_close(merged, base + domain + task + 0.5)
    ids = ["c", "b", "a"]
    assert torch.equal(
        merge(by_analogy, base=start, experts=experts, ids=ids)["w"],
        merge(methods.TaskArithmetic(scale=1, weights=(-1, 1, 1)), base=start, experts=experts[::-1], ids=ids[::-1])[
            "w"
        ],
    ), "weights go along"
    forgotten = merge(methods.TaskArithmetic(scale=-1), base=start, experts=[two])["w"]
    torch.testing.assert_close(forgotten, base - task)
    mixed = merge(methods.TaskArithmetic(scale=0.5, weights=(2, -1)), base=start, experts=[three, two])["w"]
    torch.testing.assert_close(mixed, base + domain - 0.5 * task)
