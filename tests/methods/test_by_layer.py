"""A scale that goes by layer (LiNeS): the authors' factors for every tensor, in every method that has a `scale`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mergecore import merge
from mergecore.errors import SpecError
from mergecore.plugins.by_layer import ByLayer
from mergecore.plugins.examples import Values
from mergecore.registry import METHODS, method_from
from mergecore.spec.variants import variants_of

WITH_SCALE: dict[str, Values] = {
    "task_arithmetic": {}, "ties": {"density": 0.5}, "magmax": {}, "breadcrumbs": {}, "della": {}, "consensus": {},
    "star": {}, "subspace_boosting": {}, "iso_c": {}, "iso_cts": {}, "tsv_m": {}, "wudi": {"steps": 3},
}  # fmt: skip
NAMES = ("model.embed.weight", *(f"model.layers.{n}.w" for n in range(5)), "model.norm.weight")


def model(seed: int, around: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(6, 4, generator=generator) for name in NAMES}
    return drawn if around is None else {name: around[name] + drawn[name] / 8 for name in NAMES}


def factor(name: str, alpha: float, beta: float, layers: int) -> float:
    """As the authors' code has it: α + β ℓ/(L − 1) in block ℓ, α everywhere else."""
    block = next((n for n in range(layers) if f".{n}." in name), None)
    return alpha if block is None else alpha + beta * block / (layers - 1)


@pytest.mark.parametrize(("name", "values"), WITH_SCALE.items())
def test_every_scale_may_go_by_layer(name: str, values: Values) -> None:
    base = model(0)
    experts = [model(seed, base) for seed in (1, 2)]

    def merged(scale: Any) -> dict[str, Tensor]:
        return merge(
            METHODS[name].model_validate({**values, "scale": scale}), base=base, experts=experts, ids=["a", "b"]
        )

    whole, layered = merged(1.0), merged({"first": 0.2, "last": 0.9})
    for tensor in NAMES:
        expected = base[tensor] + (whole[tensor] - base[tensor]) * factor(tensor, 0.2, 0.7, 5)
        torch.testing.assert_close(layered[tensor], expected, rtol=1e-5, atol=1e-6)
    single = merged(0.2)
    assert torch.equal(layered["model.embed.weight"], single["model.embed.weight"])
    assert torch.equal(layered["model.layers.0.w"], single["model.layers.0.w"])
    assert torch.equal(layered["model.layers.4.w"], merged(0.9)["model.layers.4.w"])


def test_all_that_have_a_scale_of_one_number_are_tried() -> None:
    have = {name for name in METHODS.own if "ByLayer" in str(METHODS[name].model_fields.get("scale"))}
    assert have == {*WITH_SCALE, "cart"}  # whose scale is that of a part of the change


def test_cart_scales_the_differences_by_layer() -> None:
    base = model(0)
    experts = [model(seed, base) for seed in (1, 2, 3)]

    def merged(scale: Any) -> dict[str, Tensor]:
        return merge(METHODS["cart"].model_validate({"scale": scale, "share": 0.3}), base=base, experts=experts)

    mean, whole, layered = merged(0.0), merged(1.0), merged({"first": 0.2, "last": 0.9})
    for tensor in NAMES:
        expected = mean[tensor] + (whole[tensor] - mean[tensor]) * factor(tensor, 0.2, 0.7, 5)
        torch.testing.assert_close(layered[tensor], expected, rtol=1e-5, atol=1e-6)


def test_factors_by_hand() -> None:
    """Five layers from 0.2 to 1.0: 0.2, 0.4, 0.6, 0.8, 1.0. An encoder of two beside it has 0.2 and 1.0."""
    names = [f"decoder.layers.{n}.w" for n in range(5)] + [f"encoder.layers.{n}.w" for n in range(2)]
    scale = ByLayer(first=0.2, last=1.0, others=0.5).fitted([*names, "head.weight"], "scale")
    assert [round(scale.at(name), 12) for name in names] == [0.2, 0.4, 0.6, 0.8, 1.0, 0.2, 1.0]
    assert scale.at("head.weight") == 0.5
    assert ByLayer(first=0.2, last=1.0).at("head.weight") == 0.2


def test_the_only_layer_is_the_last() -> None:
    scale = ByLayer(first=0.0, last=3.0).fitted(["layers.0.w"], "scale")
    assert scale.at("layers.0.w") == 3.0


def test_a_model_without_layers_is_refused() -> None:
    method = METHODS["task_arithmetic"].model_validate({"scale": {"first": 0.5, "last": 1.0}})
    tensors = {"w": torch.ones(3)}
    with pytest.raises(SpecError, match=r"task_arithmetic\.scale: goes by layer, and the base has no numbered layers"):
        merge(method, base=tensors, experts=[tensors])


def test_stacks_of_another_model_are_refused() -> None:
    scale = ByLayer.model_validate({"first": 0.5, "last": 1.0, "stacks": [{"stem": "layers.", "layers": 3}]})
    with pytest.raises(SpecError, match=r"scale\.stacks: not what the base has, 'layers\.' with 2"):
        scale.fitted(["layers.0.w", "layers.1.w"], "scale")


def test_a_grid_of_scales_makes_variants() -> None:
    entries = [
        {"method": "ties", "scale": {"first": {"grid": [0.2, 0.4]}, "last": 1.0}},
        {"method": "magmax", "scale": {"grid": [0.5, 1]}},
    ]
    variants = [v for v in variants_of(entries, [], ["a", "b"], [2]) if v.method.name != "average"]
    assert [v.method.parameters()["scale"] for v in variants[2:]] == [0.5, 1.0]
    assert [v.method.parameters()["scale"]["first"] for v in variants[:2]] == [0.2, 0.4]
    assert variants[1].values == {"scale": {"first": 0.4, "last": 1.0}}


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        ({"first": 1}, r"scale\.last: must be given"),
        ({"first": 1, "last": 2, "lst": 1}, r"scale\.lst: unknown key; did you mean 'last'\?"),
        ({"grid": [1, 2]}, r"scale: a grid may stand in the methods of a sweep's spec only"),
        ({"first": 1, "last": "x"}, r"scale\.last: must be a number"),
        ("x", r"scale: must be a number"),
        ([1, 2], r"scale: must be a number"),
    ],
)
def test_what_is_no_scale_is_refused(scale: Any, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        method_from("ties", {"scale": scale}, "recipe", ())
