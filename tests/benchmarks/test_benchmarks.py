"""What the benchmarks measure with: the models they make, the floor, the recipes they compare, and their own checks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from benchmarks import kernels, models, pairs, profile
from benchmarks.floor import digest_seconds, floor_run
from benchmarks.loops import watched_library
from benchmarks.machine import ROOT, command_run
from flows.cli.methods_page import accepts, built
from mergecore.plugins.block import Per
from mergecore.registry import METHODS
from mergecore.spec.recipe import parse_recipe


def values(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(models.weights(path), "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def test_models_are_base_and_small_changes_whoever_is_made_when(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes_of = {
        "model.norm.weight": (256,),
        "lm_head.weight": (50, 256),
        "model.layers.0.mlp.gate_proj.weight": (64, 256),
    }
    monkeypatch.setattr(models, "shapes", lambda billions: shapes_of)
    monkeypatch.setattr(models, "PIECE", 5000)  # a tensor is several pieces
    before = os.umask(0o027)
    try:
        models.write_models(tmp_path / "all", 0.1, 2)
        models.write_models(tmp_path / "one", 0.1, 1)
        models.write_models(tmp_path / "one", 0.1, 2)
    finally:
        os.umask(before)
    base, first, second = (values(path) for path in models.model_folders(tmp_path / "all", 2))
    later = values(tmp_path / "one" / "expert-2")
    for name, shape in shapes_of.items():
        assert base[name].shape == shape and base[name].dtype == torch.bfloat16
        assert torch.equal(second[name], later[name]) and not torch.equal(first[name], second[name])
    change = (first["lm_head.weight"].float() - base["lm_head.weight"].float()).std()
    assert 0.0003 < float(change) < 0.0007
    assert models.weights(tmp_path / "all" / "base").stat().st_mode & 0o777 == 0o640


def test_the_floor_reads_what_it_is_told_and_writes_whole_outputs(tmp_path: Path) -> None:
    inputs = [tmp_path / "a", tmp_path / "b"]
    inputs[0].write_bytes(os.urandom((8 << 20) + 12_345))
    inputs[1].write_bytes(os.urandom(1000))
    outputs = [tmp_path / "x", tmp_path / "y"]
    run = floor_run([inputs, inputs[:1]], outputs, inputs[0].stat().st_size)
    assert run["wall"] > 0
    for path in outputs:  # the last group read is the one that is written from
        assert path.read_bytes() == inputs[0].read_bytes()
    assert digest_seconds(outputs[0]) > 0


def test_a_command_is_told_its_own_memory_and_failures(tmp_path: Path) -> None:
    ballast = bytearray(300 << 20)  # this process is large; that must not count
    ballast[::4096] = b"\1" * len(ballast[::4096])
    run = command_run([sys.executable, "-I", "-c", "import time; a = b'1' * (50 << 20); time.sleep(0.2)"])
    assert 50e6 < run["anonymous"] < 100e6 and 50e6 < run["memory"] < 120e6
    with pytest.raises(SystemExit, match="sorry"):
        command_run([sys.executable, "-I", "-c", "raise SystemExit('sorry')"])


def test_every_recipe_of_a_pair_is_one_and_every_element_wise_method_has_its_speed_measured() -> None:
    for pair in pairs.PAIRS.values():
        for recipe in pair.ours.values() if pair.known else ():
            parse_recipe(pairs.ours_recipe(recipe, Path("models"), pair.counts.start + 1), "recipe")
    wanted = {name for name in METHODS.own if built(METHODS[name]).per is Per.ELEMENT}
    assert {values["method"] for values in kernels.settings().values()} == wanted
    for name, values in kernels.settings().items():  # each can be measured with one of the numbers of experts tried
        fits = [count for count in (1, 2, 8) if accepts(kernels.method_of(name, values), count)]
        assert fits, name


def test_thresholds_are_checked_against_torch(tmp_path: Path) -> None:
    vector, densities = profile.vector_of(40_000), [0.001, 0.2, 0.999]
    answers = profile.scanned(vector, densities, watched_library(tmp_path), 2)
    magnitudes, ranks = vector.magnitudes(), [vector.rank(density) for density in densities]
    others = profile.by_kthvalue(magnitudes, ranks), profile.by_argsort(magnitudes, ranks)
    profile.check(vector, magnitudes, densities, answers, *others)
    value, above, equal = answers[1]
    for wrong in ((value, above + 1, equal), (value * 1.001, above, equal)):
        with pytest.raises(SystemExit, match=r"density 0\.2"):
            profile.check(vector, magnitudes, densities, [answers[0], wrong, answers[2]], *others)


@pytest.mark.parametrize("name", ["merge", "profile"])
def test_a_benchmark_explains_itself(name: str, tmp_path: Path) -> None:
    """Run from anywhere, as a file: the folder's profile.py must not stand in for Python's own."""
    path = ROOT / "benchmarks" / f"{name}.py"
    shown = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert f"benchmarks/{name}.py" in shown.stdout
