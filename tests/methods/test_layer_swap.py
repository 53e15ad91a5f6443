"""Layer swapping: which layer comes from whom, in every family's names, and that what is taken is taken bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergecore import merge
from mergecore.errors import SpecError
from mergecore.methods import LayerSwap
from tests.planning.test_parts import models as models
from tests.planning.test_parts import result

Model = dict[str, Tensor]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {
        "layer": ["model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.input_layernorm.weight"],
        "embeddings": ["model.embed_tokens.weight"], "norm": ["model.norm.weight"], "head": ["lm_head.weight"],
    },
    "gpt2": {
        "layer": ["transformer.h.{}.attn.c_attn.weight", "transformer.h.{}.ln_1.bias"],
        "embeddings": ["transformer.wte.weight", "transformer.wpe.weight"], "norm": ["transformer.ln_f.weight"],
        "head": ["lm_head.weight"],
    },
    "bert": {
        "layer": ["bert.encoder.layer.{}.attention.self.query.weight", "bert.encoder.layer.{}.output.LayerNorm.weight"],
        "embeddings": ["bert.embeddings.word_embeddings.weight", "bert.embeddings.LayerNorm.weight"], "norm": [],
        "head": ["bert.pooler.dense.weight", "cls.predictions.transform.LayerNorm.weight", "classifier.weight"],
    },
    "t5": {
        "layer": [
            "encoder.block.{}.layer.0.SelfAttention.q.weight", "encoder.block.{}.layer.1.layer_norm.weight",
            "decoder.block.{}.layer.2.DenseReluDense.wo.weight",
        ],
        "embeddings": ["shared.weight"], "norm": ["encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"],
        "head": ["lm_head.weight"],
    },
    "vit": {
        "layer": ["vit.encoder.layer.{}.attention.attention.query.weight", "vit.encoder.layer.{}.layernorm_before.bias"],
        "embeddings": ["vit.embeddings.cls_token", "vit.embeddings.patch_embeddings.projection.weight"],
        "norm": ["vit.layernorm.weight"], "head": ["classifier.weight", "classifier.bias"],
    },
    "neox": {
        "layer": ["gpt_neox.layers.{}.attention.dense.weight"], "embeddings": ["gpt_neox.embed_in.weight"],
        "norm": ["gpt_neox.final_layer_norm.weight"], "head": ["embed_out.weight"],
    },
}  # fmt: skip


def pair(family: dict[str, Any], layers: int) -> tuple[Model, Model, Model]:
    """Base, outer and middle expert: every number of them 9, 1 and 2."""
    names = [stem.format(layer) for stem in family["layer"] for layer in range(layers)]
    names += [name for key in ("embeddings", "norm", "head") for name in family[key]]
    base, outer, middle = ({name: torch.full((2, 2), value) for name in names} for value in (9.0, 1.0, 2.0))
    return base, outer, middle


def sources(actual: Model, stem: str, layers: int) -> str:
    """Per layer S (outer), T (middle) or ½."""
    told = {1.0: "S", 2.0: "T", 1.5: "½"}
    return "".join(told[float(actual[stem.format(layer)][0, 0])] for layer in range(layers))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_of_sources_of_32_layers(family: str) -> None:
    """As published: [S×5, ½, T×23, ½, S×2], in each stack of the model; whatever belongs to no layer from S."""
    tensors = FAMILIES[family]
    base, outer, middle = pair(tensors, 32)
    actual = merge(LayerSwap(), base=base, experts=[outer, middle])
    for stem in tensors["layer"]:
        assert sources(actual, stem, 32) == "S" * 5 + "½" + "T" * 23 + "½" + "S" * 2
    for name in base:
        if not any(f".{layer}." in name for layer in range(32)):
            assert torch.equal(actual[name], outer[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_norm_and_head_each_have_a_source_of_their_own(family: str) -> None:
    tensors = FAMILIES[family]
    base, outer, middle = pair(tensors, 2)
    method = LayerSwap(bottom=1, top=0, bottom_transition=0, top_transition=0, embeddings="middle", head="average")
    actual = merge(method, base=base, experts=[outer, middle])
    for key, value in (("embeddings", 2.0), ("norm", 1.0), ("head", 1.5)):
        assert {float(actual[name][0, 0]) for name in tensors[key]} <= {value}, key
    assert sources(actual, tensors["layer"][0], 2) == "ST"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"bottom": 0, "top": 0, "bottom_transition": 0, "top_transition": 0}, "TTTTTT"),
        ({"bottom": 6, "top": 0, "bottom_transition": 0, "top_transition": 0}, "SSSSSS"),
        ({"bottom": 1, "top": 2, "bottom_transition": 2, "top_transition": 0}, "S½½TSS"),
        ({"bottom": 0, "top": 1, "bottom_transition": 0, "top_transition": 3}, "TT½½½S"),
        ({"bottom": 2, "top": 2, "bottom_transition": 1, "top_transition": 1}, "SS½½SS"),
    ],
)
def test_zones_are_counted_from_both_ends(values: dict[str, int], expected: str) -> None:
    tensors = FAMILIES["llama"]
    base, outer, middle = pair(tensors, 6)
    handed: Any = values
    assert sources(merge(LayerSwap(**handed), base=base, experts=[outer, middle]), tensors["layer"][0], 6) == expected
    turned = merge(LayerSwap(**handed, outer="second"), base=base, experts=[middle, outer])
    assert sources(turned, tensors["layer"][0], 6) == expected


def test_a_transition_may_be_weighted() -> None:
    tensors = FAMILIES["llama"]
    base, outer, middle = pair(tensors, 3)
    method = LayerSwap(bottom=1, top=0, bottom_transition=1, top_transition=0, share=0.25)
    actual = merge(method, base=base, experts=[outer, middle])
    assert float(actual[tensors["layer"][0].format(1)][0, 0]) == 0.25 * 1 + 0.75 * 2


def test_what_is_taken_is_taken_bit_for_bit() -> None:
    """Zeros of both signs and the smallest numbers too; 0 · θ of the other expert would add to them."""
    tensors = {"layers.0.w": torch.tensor([-0.0, 0.0, 1e-45, -1e-45, 3.4e38, 0.1])}
    other = {"layers.0.w": torch.tensor([1.0, -3.4e38, 2.0, -0.0, -3.4e38, 7.0])}
    for bottom, wanted in ((1, tensors), (0, other)):
        method = LayerSwap(bottom=bottom, top=0, bottom_transition=0, top_transition=0)
        actual = merge(method, experts=[tensors, other])["layers.0.w"]
        assert torch.equal(actual.view(torch.int32), wanted["layers.0.w"].view(torch.int32))


def test_zones_are_those_of_the_whole_model_whatever_is_selected(models: dict[str, Path], tmp_path: Path) -> None:
    """The top of a part is not the top of the model."""
    zones = {"bottom": 1, "top": 1, "bottom_transition": 0, "top_transition": 1}
    recipe = {"base": models["ground"], "experts": [models["a"], models["b"]]}
    first, _ = result({**recipe, "method": "layer_swap", **zones}, tmp_path / "whole")
    rules = [{"layers": [0, 2], "method": "layer_swap", **zones}, {"take": "copy", "of": "a"}]
    second, _ = result({**recipe, "method": "average", "select": rules}, tmp_path / "part")
    assert first.digest == second.digest


def test_it_is_what_rules_over_layers_make(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = {"base": models["ground"], "experts": [models["a"], models["b"]]}
    swap = {"bottom": 1, "top": 1, "bottom_transition": 1, "top_transition": 0, "share": 0.3, "norm": "average"}
    _, named = result({**recipe, "method": "layer_swap", **swap}, tmp_path / "named")
    rules: list[dict[str, Any]] = [
        {"layers": [1, 1], "weights": [0.3, 0.7]},
        {"layers": [2, 2], "take": "copy", "of": "b"},
        {"names": "model.norm.weight"},
        {"take": "copy", "of": "a"},
    ]
    _, ruled = result({**recipe, "method": "average", "select": rules}, tmp_path / "ruled")
    assert named.keys() == ruled.keys()
    for name, value in named.items():  # an average is formed in float64
        torch.testing.assert_close(value, ruled[name], rtol=2**-22, atol=1e-7, msg=name)


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "zones that meet": ({"bottom": 3, "top": 1}, 2, r"6 layers, 'model\.layers\.' has 5"),
    "three experts": ({"bottom": 1, "top": 1}, 3, "two experts"),
    "one expert": ({"bottom": 1, "top": 1}, 1, "two experts"),
    "another model's stacks": (
        {"bottom": 1, "top": 1, "stacks": [{"stem": "h.", "layers": 5}]}, 2, r"'model\.layers\.' with 5; leave it out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    values, count, pattern = REFUSED[case]
    base, outer, middle = pair(FAMILIES["llama"], 5)
    with pytest.raises(SpecError, match=pattern):
        merge(LayerSwap(**values), base=base, experts=[outer, middle, middle][:count])


def test_a_model_without_layers_is_refused() -> None:
    tensors = {"weight": torch.zeros(2)}
    with pytest.raises(SpecError, match="no numbered layers"):
        merge(LayerSwap(bottom=0, top=0, bottom_transition=0, top_transition=0), experts=[tensors, tensors])
