"""Memory is projected and kept: the real peak of a merge lies below what was projected, and not far below."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flows.budget import sensible_memory
from mergecore.errors import MergeloomError
from mergecore.events import silent
from mergecore.merging import InProcess
from mergecore.single import merge_recipe
from mergecore.spec import parse_recipe
from tests.recipes import find

PROGRAM = """
import json, re, sys, threading, time
from pathlib import Path
import mergecore.single, mergecore.projection as projection
from flows.startup import digest_cache
from flows.session import resolver
from mergecore.kernels.library import library_in
from mergecore.merging import InProcess
from mergecore.events import silent
from mergecore.registry import METHODS
from mergecore.sources.digests import DigestCache
from mergecore.spec import parse_recipe

def held():
    text = open("/proc/self/status").read()
    return sum(int(re.search(name + r":\\s+(\\d+)", text).group(1)) for name in ("RssAnon", "RssShmem")) * 1024

recipes, out, loops, workers = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
import mergecore.kernels.run, mergecore.statistics.threshold, torch
torch.ones(8) + 1
blocks, original = [], projection.block_bytes

def noted(*given):
    blocks.append(original(*given))
    return blocks[-1]

projection.block_bytes = noted

def measured(number, recipe):
    blocks.clear()
    before, peak, done = held(), [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], held())

    watcher = threading.Thread(target=watch)
    watcher.start()
    parsed, executor = parse_recipe(recipe, "recipe"), InProcess(workers)
    library = library_in(loops)
    mergecore.single.merge_recipe(parsed, out / str(number), resolver(DigestCache()), executor, silent, library=library, memory=1 << 30)
    done.set()
    watcher.join()
    return {"before": before, "peak": peak[0], "projected": before + workers * max(blocks)}

print(json.dumps([measured(number, recipe) for number, recipe in enumerate(recipes)]))
"""
EXPERTS = 8


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small and a large base with eight experts: 1.5 and 30 million parameters in bfloat16."""
    found = {}
    for size, layers in (("small", 1), ("large", 20)):
        folder = found[size] = tmp_path_factory.mktemp(size)
        for number in range(EXPERTS + 1):
            generator = torch.Generator().manual_seed(number)
            tensors = {
                f"layers.{layer}.w": torch.randn(1500, 1000, generator=generator, dtype=torch.float32).to(
                    torch.bfloat16
                )
                for layer in range(layers)
            }
            (folder / str(number)).mkdir()
            save_file(tensors, folder / str(number) / "model.safetensors", metadata={"format": "pt"})
            (folder / str(number) / "config.json").write_text(json.dumps({"model_type": "matrices"}))
    return found


def test_the_peak_is_below_the_projection_and_not_far_below(pools: dict[str, Path], tmp_path: Path) -> None:
    ties, slerp = {"method": "ties", "density": 0.2}, {"method": "slerp", "t": 0.4}
    cases = [(ties, 2, "small"), (ties, 2, "large"), (ties, 8, "small"), (ties, 8, "large"), (slerp, 2, "small"), (slerp, 2, "large")]  # fmt: skip
    recipes = [
        {**method, "base": str(pools[size] / "0"), "experts": [str(pools[size] / str(n + 1)) for n in range(experts)]}
        for method, experts, size in cases
    ]
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", PROGRAM, json.dumps(recipes), str(tmp_path / "out"), str(tmp_path / "loops"), "2"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    for case, held in zip(cases, found, strict=True):
        assert 0.7 * held["projected"] <= held["peak"] <= held["projected"], (case, held)
        assert held["peak"] - held["before"] < 1 << 30
    for small, large in zip(found[::2], found[1::2], strict=True):  # twenty times the model is no more memory
        assert large["peak"] - large["before"] < small["peak"] - small["before"] + (24 << 20)


def test_a_budget_too_small_for_one_block_is_refused_by_name(pools: dict[str, Path], tmp_path: Path) -> None:
    recipe = {"method": "ties", "base": str(pools["small"] / "0"), "experts": [str(pools["small"] / "1")]}
    with pytest.raises(MergeloomError, match=r"one block of .* takes [\d,]+ bytes of memory and 100,000 may be used"):
        merge_recipe(parse_recipe(recipe, "recipe"), tmp_path / "out", find, InProcess(2), silent, memory=100_000)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()


def test_memory_for_one_block_means_one_at_a_time_and_the_same_bytes(pools: dict[str, Path], tmp_path: Path) -> None:
    recipe = {"method": "average", "base": str(pools["small"] / "0"), "experts": [str(pools["small"] / "1")]}
    said: list[str] = []
    digests = {
        merge_recipe(
            parse_recipe(recipe, "recipe"),
            tmp_path / name,
            find,
            InProcess(2),
            lambda e: said.append(e.what),
            memory=memory,
        ).digest
        for name, memory in (("scarce", 6 << 20), ("ample", None))
    }
    assert len(digests) == 1 and "memory is for 1 of 2 spans at a time" in said


def test_the_page_cache_is_no_memory_that_is_taken(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(
        "MemTotal:  24683656 kB\nMemFree:    1579668 kB\nMemAvailable:   23636856 kB\nHugePages_Total: 0\n"
    )
    assert sensible_memory(meminfo) == 23_636_856 * 1024 // 2
    meminfo.write_text("MemTotal:  24683656 kB\n")  # where nothing is said, what is free
    assert sensible_memory(meminfo) > 0 and sensible_memory(tmp_path / "none") > 0
