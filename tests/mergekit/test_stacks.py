"""Gradients over models of several stacks of layers: depth is counted in each stack by itself, as mergekit's modules do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergecore.engine.executor import InProcess
from mergecore.errors import SpecError
from mergecore.events import silent
from mergecore.recipes.merge_file import merge_file
from mergecore.spec.mergekit.layers import whole_depths
from tests.recipe_files import find

STACKS: dict[str, dict[str, int]] = {
    "qwen2_5_vl": {"model.layers.": 4, "visual.blocks.": 2},
    "qwen3_vl": {"model.language_model.layers.": 5, "model.visual.blocks.": 3},
    "whisper": {"model.encoder.layers.": 4, "model.decoder.layers.": 2},
    "t5": {"encoder.block.": 3, "decoder.block.": 5},
    "gemma3": {"language_model.model.layers.": 3, "vision_tower.vision_model.encoder.layers.": 4},
}
LOOSE = ("model.embed_tokens.weight", "lm_head.weight")


def write(folder: Path, kind: str, fill: float) -> None:
    """A checkpoint of such stacks, two weights in each layer, all of one number."""
    folder.mkdir()
    names = [f"{stem}{n}.{w}" for stem, layers in STACKS[kind].items() for n in range(layers) for w in ("q.w", "mlp.w")]
    tensors = {name: torch.full((2, 2), fill) for name in (*names, *LOOSE)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))


@pytest.fixture(params=STACKS)
def kind(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two checkpoints of a model type in the current folder: a is full of zeros, b of ones."""
    write(tmp_path / "a", request.param, 0.0)
    write(tmp_path / "b", request.param, 1.0)
    monkeypatch.chdir(tmp_path)
    return str(request.param)


DEPTHS = json.loads(Path(__file__).with_name("depths.json").read_text())


@pytest.mark.parametrize("of", [name for name in DEPTHS if name != "mergekit"])
def test_every_tensor_stands_where_mergekit_has_it(of: str) -> None:
    """Depths that mergekit 0.1.5 gave the tensors of tiny models of transformers (make_depths.py)."""
    assert DEPTHS["mergekit"] == "0.1.5"
    assert whole_depths(list(DEPTHS[of]), of) == pytest.approx(DEPTHS[of], abs=1e-6)


def merged(document: dict[str, Any], path: Path) -> dict[str, torch.Tensor]:
    (path / "recipe.yml").write_text(json.dumps(document))
    merge_file(path / "recipe.yml", path / "out", find, InProcess(), silent)
    return load_file(path / "out" / "model.safetensors")


def share_of_b(b: Any, kind: str) -> dict[str, Any]:
    """A linear merge in which b's share goes by depth."""
    value = [{"filter": "mlp", "value": b[::-1]}, {"value": b}]
    other = [{"filter": "mlp", "value": [1 - x for x in b[::-1]]}, {"value": [1 - x for x in b]}]
    models = [{"model": "./a", "parameters": {"weight": other}}, {"model": "./b", "parameters": {"weight": value}}]
    return {"merge_method": "linear", "models": models, "dtype": "float32"}


def depth(layer: int, layers: int) -> float:
    return layer / (layers - 1)


def test_depth_is_counted_in_each_stack(kind: str, tmp_path: Path) -> None:
    result = merged(share_of_b([0.0, 1.0], kind), tmp_path)
    assert set(LOOSE) < set(result)
    for name, value in result.items():
        stem = next((stem for stem in STACKS[kind] if name.startswith(stem)), None)
        if stem is None:
            wanted = 0.0  # what is in no layer stands at depth 0
        else:
            number, weight = name.removeprefix(stem).split(".", 1)
            share = depth(int(number), STACKS[kind][stem])
            wanted = share if weight == "q.w" else 1 - share
        torch.testing.assert_close(value, torch.full((2, 2), wanted), rtol=0, atol=1e-6, msg=name)


def test_slices_of_unequal_stacks_are_refused(kind: str, tmp_path: Path) -> None:
    sources = [{"model": name, "layer_range": [0, 2], "parameters": {"weight": 1}} for name in ("./a", "./b")]
    with pytest.raises(SpecError, match=r"has several stacks of layers, .* list the models under 'models'"):
        merged({"merge_method": "linear", "slices": [{"sources": sources}]}, tmp_path)


@pytest.mark.parametrize(
    ("kind", "module", "own"),
    [
        ("whisper", "encoder", "model.encoder."), ("whisper", "decoder", "model.decoder."), ("t5", "encoder", "encoder."),
        ("qwen2_5_vl", "vision_tower", "visual."), ("qwen3_vl", "text_decoder", "model.language_model."),
        ("gemma3", "vision_tower", "vision_tower."),
    ],
    indirect=["kind"],
)  # fmt: skip
def test_a_module_is_merged_and_the_rest_is_the_base(kind: str, module: str, own: str, tmp_path: Path) -> None:
    models = share_of_b([0.25, 0.75], kind)["models"]
    result = merged({"merge_method": "linear", "modules": {module: {"models": models}}, "dtype": "float32"}, tmp_path)
    for name, value in result.items():
        if not name.startswith(own) and name not in LOOSE:
            assert not value.any(), name
        elif name not in LOOSE:
            assert 0.2 < float(value[0, 0]) < 0.8, name
