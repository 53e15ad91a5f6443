"""Sweeps whose models are made in parts: rules with values and grids in them, in the spec or below a method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergecore.checkpoints.select import SelectRule
from mergecore.errors import SpecError
from mergecore.methods import TaskArithmetic, Ties
from mergecore.recipes.in_memory import merge
from mergecore.spec.sweep import parse_spec
from mergecore.spec.variants import expanded, gridded
from mergecore.sweeps.measured import collect
from tests.digits import DigitsTier
from tests.digits_sweep import Swept, digits_spec, opened
from tests.recipe_files import merge_into

PAIR = ("quarter", "mirror")
SWAPPED = {
    "method": "average",
    "label": "swapped",
    "select": [
        {"names": "/^[01]\\./", "take": "copy", "of": "quarter"},
        {"names": "10.*", "method": "task_arithmetic", "scale": {"grid": [0.25, 0.5]}},
        {"weights": {"grid": [[1, 3], [3, 1]]}},
    ],
}


def paired(tier: DigitsTier, store: Path, **changes: Any) -> dict[str, Any]:
    """Two experts, few items: what a sweep in parts takes."""
    experts = [{"name": name, "source": str(tier.experts[name]), "tasks": [name]} for name in PAIR]
    return digits_spec(tier, store, **{
        "experts": experts, "counts": [2], "evaluate__held_in": {name: [name] for name in PAIR}, "evaluate__limit": 20,
        "evaluate__validation": {"limit": 20}, "output__keep": "all", "methods": [SWAPPED], **changes,
    })  # fmt: skip


@pytest.fixture(scope="module")
def swept(tier: DigitsTier, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    swept = opened(paired(tier, tmp_path_factory.mktemp("store")))
    assert not swept.run().failures
    return swept


def weights(swept: Swept, name: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in swept.store.folder(swept.cell(name).model).glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def test_every_combination_is_a_cell_named_by_what_its_grids_came_to(swept: Swept) -> None:
    names = [cell.name for cell in swept.plan.cells if cell.kind == "merge"]
    assert names == ["average n2 s0"] + [
        f"swapped(select.1.scale={scale}, select.2.weights={weights}) n2 s0"
        for scale in (0.25, 0.5)
        for weights in ([1, 3], [3, 1])
    ]


def test_its_models_are_those_of_a_direct_computation(tier: DigitsTier, swept: Swept) -> None:
    base, first, second = (load_file(f / "model.safetensors") for f in (tier.base, *(tier.experts[n] for n in PAIR)))
    for scale, shares in ((0.25, [1, 3]), (0.5, [3, 1])):
        merged = weights(swept, f"swapped(select.1.scale={scale}, select.2.weights={shares}) n2 s0")
        assert merged.keys() == base.keys()
        for name, value in merged.items():
            if name.startswith(("0.", "1.")):
                assert torch.equal(value, first[name]), name
            elif name.startswith("10."):
                wanted = base[name] + scale * ((first[name] - base[name]) + (second[name] - base[name]))
                torch.testing.assert_close(value, wanted if value.is_floating_point() else base[name])
            elif value.is_floating_point():
                torch.testing.assert_close(value, (shares[0] * first[name] + shares[1] * second[name]) / 4)


def test_validation_chooses_one_combination(swept: Swept) -> None:
    cells = [cell for cell in collect(swept.frontier).cells if cell.method == "swapped"]
    assert [cell.status for cell in cells] == ["done"] * 4
    assert [cell.chosen for cell in cells].count(True) == 1
    assert [set(cell.items) == {"validation", "test"} for cell in cells] == [cell.chosen for cell in cells]


def test_the_recipe_of_a_cell_makes_its_model_alone(swept: Swept, tmp_path: Path) -> None:
    cell = next(row for row in collect(swept.frontier).cells if row.method == "swapped" and row.chosen)
    assert merge_into(dict(cell.lineage["recipe"]), tmp_path / "out").digest == cell.digest


def test_rules_of_the_spec_hold_for_methods_without_their_own(tier: DigitsTier, tmp_path: Path) -> None:
    rules = [{"names": "0.*", "take": "copy"}, {"names": "9.*", "method": "ties", "density": {"grid": [0.2, 0.4]}}, {}]
    methods = [{"method": "task_arithmetic", "scale": 0.5}, {"method": "ties", "select": []}]
    swept = opened(paired(tier, tmp_path, select=rules, methods=methods, evaluate__validation=None))
    labels = [cell.name for cell in swept.plan.cells if cell.kind == "merge"]
    assert labels == [
        *(f"average(select.1.density={density}) n2 s0" for density in (0.2, 0.4)),
        *(f"task_arithmetic(scale=0.5, select.1.density={density}) n2 s0" for density in (0.2, 0.4)),
        "ties+select n2 s0",
    ]
    assert not swept.run().failures
    base, *experts = (load_file(f / "model.safetensors") for f in (tier.base, *(tier.experts[n] for n in PAIR)))
    ids = [swept.plan.pool.experts[name].id for name in PAIR]
    merged = weights(swept, labels[2])
    plain = merge(TaskArithmetic(scale=0.5), base=base, experts=experts, ids=ids)
    trimmed = merge(Ties(density=0.2), base=base, experts=experts, ids=ids, select=[SelectRule(names="9.*")])
    for name, value in merged.items():
        wanted = base if name.startswith("0.") else trimmed if name.startswith("9.") else plain
        assert torch.equal(value, wanted[name]), name


def test_experts_are_measured_whole_whatever_the_rules_are(tier: DigitsTier, tmp_path: Path) -> None:
    plain = opened(paired(tier, tmp_path, methods=[{"method": "average"}]))
    ruled = opened(paired(tier, tmp_path, select=[{"names": "0.*"}], methods=[{"method": "average"}]))
    assert [swept_one.cell(name).id for swept_one in (plain, ruled) for name in PAIR] == [
        plain.cell(n).id for n in PAIR
    ] * 2
    assert plain.cell("average n2 s0").id != ruled.cell("average n2 s0").id


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an expert nobody knows": ({"select": [{"take": "copy", "of": "quater"}]}, r"select\.0: .*'quater'.*'quarter'"),
    "a value of no method": ({"select": [{"densty": 0.2}]}, r"methods\[0\]\.select\.0\.densty: unknown key"),
    "a method nobody knows": (
        {"select": [{"method": "tise"}]},
        r"methods\[0\]\.select\.0.*'tise'; did you mean 'ties'",
    ),
    "heads that are dropped": ({"select": [{"take": "drop"}]}, r"select\.0: .* cannot be measured"),
    "an empty grid": ({"select": [{"density": {"grid": []}}]}, r"methods\[0\]\.select.*grid is a list"),
    "no list": ({"select": {"names": "*"}}, r"methods\[0\]\.select: must be a list of rules"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_place(case: str, tier: DigitsTier, tmp_path: Path) -> None:
    changes, pattern = REFUSED[case]
    with pytest.raises(SpecError, match=pattern):
        parse_spec(paired(tier, tmp_path, methods=[{"method": "ties", **changes}]), "spec")


def test_a_value_in_a_rule_of_the_spec_needs_a_method_beside_it(tier: DigitsTier, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"select\.0: 'density' is not a key of a rule.*method's own"):
        parse_spec(paired(tier, tmp_path, select=[{"density": 0.2}]), "spec")


def test_what_grids_came_to() -> None:
    written = [{"a": 1, "b": {"grid": [2, 3]}}, {"c": {"d": {"grid": ["x"]}, "e": 5}}, {"f": [1, {"grid": [7]}]}, {}]
    came = list(expanded(written, "here"))
    assert len(came) == 2
    assert gridded(written, came[1]) == {"0": {"b": 3}, "1": {"c": {"d": "x"}}, "2": {"f": {"1": 7}}}
    assert gridded({"all": {"grid": [[1], [2]]}}, {"all": [2]}) == {"all": [2]}
