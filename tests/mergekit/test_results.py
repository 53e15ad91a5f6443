"""mergekit's recipes as they are: what we make of them, tensor by tensor against what mergekit 0.1.5 made of them.

make_results.py makes the stored results anew. Both compute in float32; sums are formed in another order.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from mergecore.engine.executor import InProcess
from mergecore.events import silent
from mergecore.recipes.merge_file import merge_file
from mergecore.spec.mergekit.methods import MERGEKIT_METHODS
from tests.mergekit.make_results import RESULTS, recipes
from tests.mergekit.models import HIDDEN, VOCABULARY, shapes, weights, write_models
from tests.recipe_files import find

PLAIN = [recipe.stem for recipe in recipes() if not recipe.stem.startswith("random")]
FLOAT32 = 2e-6
"""What float32 sums may differ by, of numbers of about 1."""
TOLERANCE = {
    "bfloat16": 2**-8,  # half a step of bfloat16 at 1: mergekit rounds as we do, a sum may fall on the other side
    "bfloat16_throughout": 4 * 2**-7,  # its rounding, in numbers up to 2, of both inputs, of a sum and of the result
    "karcher": 2e-5,  # an iteration that stops where a step is shorter than 1e-6
    "breadcrumbs_crowded": 1e-5,  # a rescaling by norms
    "ties_rescaled": 1e-5,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture(autouse=True)
def _beside_the_models(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in a recipe start where the command is run."""
    monkeypatch.chdir(models)


def merged_by(recipe: str, out: Path) -> dict[str, Tensor]:
    """What we make of a recipe."""
    merge_file(Path(__file__).parent / "recipes" / f"{recipe}.yml", out, find, InProcess(), silent)
    return load_file(out / "model.safetensors")


def stored(recipe: str) -> dict[str, Tensor]:
    """What mergekit made of it, by name."""
    with safe_open(RESULTS, "pt") as file:
        flat = file.get_tensor(recipe)
    layers = next(
        n for n in range(1, 20) if sum(torch.Size(shape).numel() for shape in shapes(n).values()) == flat.numel()
    )
    sizes = sorted(shapes(layers).items())
    pieces = flat.split([torch.Size(shape).numel() for _, shape in sizes])
    return {name: piece.reshape(shape) for (name, shape), piece in zip(sizes, pieces, strict=True)}


def merge_method(recipe: str) -> str:
    """mergekit's name of the method of a recipe."""
    text = (Path(__file__).parent / "recipes" / f"{recipe}.yml").read_text()
    return re.findall(r"merge_method: (\w+)", text)[-1]


@pytest.mark.parametrize("recipe", PLAIN)
def test_the_same_as_mergekit(recipe: str, tmp_path: Path) -> None:
    merged, wanted = merged_by(recipe, tmp_path / "out"), stored(recipe)
    assert merged.keys() == wanted.keys()
    tolerance = TOLERANCE.get(recipe, FLOAT32)
    for name, value in wanted.items():
        assert merged[name].dtype == (torch.bfloat16 if "bfloat16" in recipe else torch.float32)
        torch.testing.assert_close(
            merged[name].float(), value, rtol=0, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == len(
        wanted.keys() & {f"model.layers.{n}.mlp.up_proj.weight" for n in range(20)}
    )


def test_every_method_of_mergekit_has_a_recipe() -> None:
    assert {merge_method(recipe.stem) for recipe in recipes()} == set(MERGEKIT_METHODS)


def test_results_are_there_for_every_recipe() -> None:
    """And nothing else is: a recipe without a result, or a result without a recipe, compares nothing."""
    with safe_open(RESULTS, "pt") as file:
        assert sorted(file.keys()) == sorted(recipe.stem for recipe in recipes())
        assert file.metadata() == {"mergekit": "0.1.5"}


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "breadcrumbs_ties", "della_linear"])
def test_negative_weights_divide_as_mergekit_does(method: str, tmp_path: Path) -> None:
    """Its divisor is the sum of the weights that take part, with their signs: Σ w τ / Σ w, numpy in float64."""
    heavy = {"a": 1.0, "b": -0.25, "c": -0.9}
    models = "".join(
        f"  - {{model: ./{name}, parameters: {{weight: {weight}, density: 1, gamma: 0, epsilon: 0}}}}\n"
        for name, weight in heavy.items()
    )
    recipe = tmp_path / "recipe.yml"
    shared = "parameters: {normalize: true, rescale: false}\nbase_model: ./base\ndtype: float32\n"
    recipe.write_text(f"models:\n{models}merge_method: {method}\n{shared}")
    merge_file(recipe, tmp_path / "out", find, InProcess(), silent)
    merged, base = load_file(tmp_path / "out" / "model.safetensors"), weights("base")
    for name, value in base.items():
        deltas = [weight * (weights(expert)[name] - value).double() for expert, weight in heavy.items()]
        total = sum(deltas, torch.zeros_like(value).double())
        sign = torch.where(total >= 0, 1.0, -1.0) if "ties" in method else torch.ones_like(total)
        joins = [torch.ones_like(sign).bool() if "ties" not in method else delta * sign > 0 for delta in deltas]
        above = sum(torch.where(join, delta, 0.0) for join, delta in zip(joins, deltas, strict=True))
        below = sum(torch.where(join, weight, 0.0) for join, weight in zip(joins, heavy.values(), strict=True))
        torch.testing.assert_close((merged[name] - value).double(), above / below, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("recipe", "factor", "rescaled"),
    [
        ("random_dare_linear", 0.8 * 1.5, True),
        ("random_della_linear", 0.8 * 1.5, True),
        ("random_dare_ties", 0.8, False),
    ],
)
def test_random_masks(recipe: str, factor: float, rescaled: bool, tmp_path: Path) -> None:
    """Which elements are kept is drawn otherwise; in mergekit's result and in ours as many are, and count the same."""
    base, expert = weights("base"), weights("a")
    kept = []
    for result in (merged_by(recipe, tmp_path / "out"), stored(recipe)):
        count = total = 0
        for name, value in result.items():
            change, delta = value - base[name], expert[name] - base[name]
            mask = change.abs() > 1e-6
            scale = float(delta.abs().sum() / delta[mask].abs().sum()) if rescaled and mask.any() else 1.0
            torch.testing.assert_close(change, torch.where(mask, delta * factor * scale, 0.0), rtol=0, atol=1e-5)
            count, total = count + int(mask.sum()), total + mask.numel()
        kept.append(count / total)
    spread = 4 * (0.6 * 0.4 / sum(value.numel() for value in base.values())) ** 0.5
    assert all(abs(share - 0.6) < spread for share in kept), kept


def test_shapes_of_the_models_are_what_the_comparison_takes_them_for() -> None:
    assert weights("deep").keys() == shapes(6).keys()
    assert weights("a")["lm_head.weight"].shape == (VOCABULARY, HIDDEN)
