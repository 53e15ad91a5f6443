"""A corpus of recipes in the shapes that model cards have: all of them run, and where a formula is short it is checked.

The reference here reads a recipe as mergekit documents it and works in float64; it shares nothing with the translation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from numpy.typing import NDArray
from safetensors.torch import load_file

from flows.cli.main import main
from tests.mergekit.models import ALPHA, RANK, write_models, write_models_of_vocabularies

Array = NDArray[np.float64]
Model = dict[str, Array]
SHAPES: dict[str, str] = yaml.safe_load(Path(__file__).with_name("shapes.yml").read_text())
FORMULAS = {"linear", "slerp", "task_arithmetic", "passthrough"}
NOTES = {
    "slerp_beyond_the_second": "t 1.2 goes on along the arc",
    "slerp_layer_ranges_of_whole_models": "models.0.layer_range: has no effect there",
    "linear_keys_of_a_card": "license: has no effect there",
    "ties_parameters_at_the_root": "normalize: has no effect there",
    "ties_density_above_one": "density 1.2 counts as 1",
    "breadcrumbs_ties": "gamma 1.5 counts as 1",
    "della_linear": "density 1.5 counts as 1",
    "karcher": "tol 0 counts as 1e-08",
    "sce_everything": "select_topk 1.5 counts as 1",
    "ramplus_tl": "epsilon -1 counts every change",
}
"""What must be said aloud of a recipe."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    write_models_of_vocabularies(folder / "v")
    (folder / "c++").symlink_to(folder / "c")
    return folder


@pytest.fixture(autouse=True)
def _beside_the_models(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(models)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def merged(text: str, folder: Path) -> tuple[Path, str]:
    """The folder of the result of a recipe, and what was printed."""
    (folder / "recipe.yml").write_text(text)
    result = CliRunner().invoke(main, ["merge", str(folder / "recipe.yml"), str(folder / "out")])
    assert result.exit_code == 0, result.output
    return folder / "out", result.output


def test_there_are_enough() -> None:
    assert len(SHAPES) >= 60
    assert {re.findall(r"merge_method: (\w+)", text)[-1] for text in SHAPES.values()} >= FORMULAS
    assert NOTES.keys() <= SHAPES.keys()


@pytest.mark.parametrize("shape", SHAPES)
def test_it_runs(shape: str, tmp_path: Path) -> None:
    document = list(yaml.safe_load_all(SHAPES[shape]))[-1]
    out, printed = merged(SHAPES[shape], tmp_path)
    tensors = load_file(out / "model.safetensors")
    slices = document.get("slices")
    layers = sum(s["sources"][0]["layer_range"][1] - s["sources"][0]["layer_range"][0] for s in slices) if slices else 4
    layers = 1 if "./v/" in SHAPES[shape] else layers
    numbers = {int(match[1]) for name in tensors if (match := re.search(r"layers\.(\d+)\.", name))}
    assert numbers == set(range(layers))
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == layers
    dtype = getattr(torch, str(document.get("out_dtype", document["dtype"])).removeprefix("torch."))
    assert {value.dtype for value in tensors.values()} == {dtype}
    assert (
        ("note:" in printed) == (shape in NOTES) or "int8_mask" in SHAPES[shape] or shape.startswith(("token", "chat"))
    )
    assert NOTES.get(shape, "") in " ".join(printed.split())


# --- the reference ------------------------------------------------------------------------------------------------


def weights_of(model: Any) -> Model:
    """A model's tensors, an adapter folded in."""
    if isinstance(model, Mapping):
        path, lora = model["model"]["path"], model.get("lora", {}).get("path")
    else:
        path, _, lora = (model, "", None) if Path(model).exists() else model.partition("+")
    tensors = {name: value.double().numpy() for name, value in load_file(f"{path}/model.safetensors").items()}
    if lora:
        factors = {n: v.double().numpy() for n, v in load_file(f"{lora}/adapter_model.safetensors").items()}
        for name, down in factors.items():
            if name.endswith("lora_A.weight"):
                target = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
                tensors[target] = tensors[target] + factors[name.replace("lora_A", "lora_B")] @ down * (ALPHA / RANK)
    return tensors


def evaluated(setting: Any, name: str, t: float) -> float | None:
    """The value of a setting: a number, anchors over depth, or such behind filters, of which the first that fits holds."""
    if isinstance(setting, list) and isinstance(setting[0], Mapping):
        for case in setting:
            if case.get("filter") in (None, "*") or case["filter"] in name:
                return evaluated(case["value"], name, t)
        return None
    if isinstance(setting, list):
        return float(np.interp(t, np.linspace(0, 1, len(setting)), setting)) if len(setting) > 1 else float(setting[0])
    return None if setting is None else float(setting)


def parts(document: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any], list[tuple[Any, str, Any]], float]]:
    """(name in the result, its slice, (source, name there, model) of every source, depth) of every tensor."""
    inputs = document.get("modules", {}).get("default", document)
    slices = inputs.get("slices")
    if slices is None:
        sources = [{**source, "layer_range": [0, 4]} for source in inputs["models"]]
        base = document.get("base_model")
        sources += (
            [{"model": base, "layer_range": [0, 4]}] if base and base not in [s["model"] for s in sources] else []
        )
        slices = [{"sources": sources}]
    count = 0
    for part in slices:
        first, last = part["sources"][0]["layer_range"]
        for offset in range(last - first):
            names = [n for n in weights_of(part["sources"][0]["model"]) if f".layers.{first + offset}." in n]
            for name in names:
                sources = [(s, re.sub(r"layers\.\d+", f"layers.{s['layer_range'][0] + offset}", name), s["model"])
                           for s in part["sources"]]  # fmt: skip
                depth = offset / (last - first - 1) if last - first > 1 else 1.0
                yield re.sub(r"layers\.\d+", f"layers.{count}", name), part, sources, depth
            count += 1
    for name, part in (
        ("model.embed_tokens.weight", slices[0]),
        ("model.norm.weight", slices[-1]),
        ("lm_head.weight", slices[-1]),
    ):
        yield name, part, [(s, name, s["model"]) for s in part["sources"]], 0.0


def slerped(t: float, first: Array, second: Array) -> Array:
    cosine = float((first / np.linalg.norm(first) * (second / np.linalg.norm(second))).sum())
    if abs(cosine) > 0.9995:
        return (1 - t) * first + t * second
    angle = np.arccos(cosine)
    return np.asarray((np.sin((1 - t) * angle) * first + np.sin(t * angle) * second) / np.sin(angle))


def reference(document: Mapping[str, Any]) -> Model:
    """What mergekit documents of linear, slerp, task_arithmetic and passthrough."""
    method, result = document["merge_method"], Model()
    loaded: dict[str, Model] = {}
    for name, part, sources, depth in parts(document):
        base = part.get("base_model") or document.get("base_model")

        def parameter(key: str, source: Any, at: str, default: float, part: Any = part, depth: float = depth) -> float:
            for place in (source, part, document):
                value = evaluated((place.get("parameters") or {}).get(key), at, depth)
                if value is not None:
                    return value
            return default

        values = [loaded.setdefault(str(model), weights_of(model))[at] for _, at, model in sources]
        if method == "passthrough":
            result[name] = values[0] * parameter("scale", sources[0][0], sources[0][1], 1.0)
        elif method == "slerp":
            order = sorted(range(2), key=lambda number: sources[number][2] != base)
            t = parameter("t", {}, name, 0.0)
            result[name] = slerped(t, *(values[number] for number in order))
        else:
            of = values if method == "linear" else [v for v, s in zip(values, sources, strict=True) if s[2] != base]
            chosen = [s for s in sources if method == "linear" or s[2] != base]
            own = [parameter("weight", source, at, 0.0) for source, at, _ in chosen]
            ground = next((v for v, s in zip(values, sources, strict=True) if s[2] == base), None)
            total = sum(
                w * (v if method == "linear" or ground is None else v - ground) for w, v in zip(own, of, strict=True)
            )
            if parameter("normalize", {}, name, float(method == "linear")):
                total = total / sum(own)
            if method == "task_arithmetic" and ground is not None:
                total = ground + parameter("lambda", {}, name, 1.0) * total
            result[name] = np.asarray(total)
    return result


CHECKED = [
    shape for shape, text in SHAPES.items()
    if yaml.safe_load_all(text) and "---" not in text and "./v/" not in text
    and re.search(r"merge_method: (\w+)", text)[1] in FORMULAS  # type: ignore[index]
]  # fmt: skip


@pytest.mark.parametrize("shape", CHECKED)
def test_it_makes_what_is_documented(shape: str, tmp_path: Path) -> None:
    document = yaml.safe_load(SHAPES[shape])
    tensors = load_file(merged(SHAPES[shape], tmp_path)[0] / "model.safetensors")
    wanted = reference(document)
    assert tensors.keys() == wanted.keys()
    tolerance = 2e-6 if tensors["lm_head.weight"].dtype is torch.float32 else 2**-8
    for name, value in wanted.items():
        np.testing.assert_allclose(tensors[name].double().numpy(), value, rtol=0, atol=tolerance, err_msg=name)
