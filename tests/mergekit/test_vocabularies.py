"""Recipes of mergekit's over models whose vocabularies differ: row by row against what mergekit 0.1.5 made of them.

Rows are compared by their tokens: the ids of the tokens that a union adds are in no order there.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mergecore.engine.executor import InProcess
from mergecore.events import silent
from mergecore.recipes.merge_file import merge_file
from tests.mergekit.make_results import VOCABULARIES, vocabulary_recipes
from tests.mergekit.models import HIDDEN, shapes, write_models_of_vocabularies
from tests.recipe_files import find

OVER_TOKENS = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models_of_vocabularies(folder)
    return folder


def stored(recipe: str) -> tuple[dict[str, Tensor], dict[str, int]]:
    """mergekit's tensors by name, and its tokens."""
    with safe_open(VOCABULARIES, "pt") as file:
        flat, tokens = file.get_tensor(recipe), json.loads(file.metadata()[recipe])
    fixed = {name: shape for name, shape in shapes(1).items() if name not in OVER_TOKENS}
    rows = (flat.numel() - sum(torch.Size(shape).numel() for shape in fixed.values())) // (2 * HIDDEN)
    sizes = sorted({**fixed, **dict.fromkeys(OVER_TOKENS, (rows, HIDDEN))}.items())
    pieces = flat.split([torch.Size(shape).numel() for _, shape in sizes])
    return {name: piece.reshape(shape) for (name, shape), piece in zip(sizes, pieces, strict=True)}, tokens


@pytest.mark.parametrize("recipe", [path.stem for path in vocabulary_recipes()])
def test_the_same_as_mergekit(recipe: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    out = tmp_path / "out"
    merge_file(Path(__file__).parent / "vocabularies" / f"{recipe}.yml", out, find, InProcess(), silent)
    merged, (wanted, theirs) = load_file(out / "model.safetensors"), stored(recipe)
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    ours = {**tokenizer["model"]["vocab"], **{token["content"]: token["id"] for token in tokenizer["added_tokens"]}}
    assert ours.keys() == theirs.keys() and merged.keys() == wanted.keys()
    for name, value in wanted.items():
        assert merged[name].shape == value.shape
        if name not in OVER_TOKENS:
            torch.testing.assert_close(merged[name], value, rtol=0, atol=2e-6)
            continue
        mine = torch.stack([merged[name][ours[token]] for token in theirs])
        yours = torch.stack([value[theirs[token]] for token in theirs])
        torch.testing.assert_close(mine, yours, rtol=0, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}")


def test_results_are_there_for_every_recipe() -> None:
    with safe_open(VOCABULARIES, "pt") as file:
        assert set(file.keys()) == {path.stem for path in vocabulary_recipes()}
        assert file.metadata()["mergekit"] == "0.1.5"
