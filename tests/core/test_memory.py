"""Memory is projected and kept: the real peak of a merge lies below what was projected, and not far below."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mergecore.errors import MergeloomError
from mergecore.merging import InProcess
from mergecore.method import silent
from mergecore.single import merge_recipe
from mergecore.spec import parse_recipe
from tests.recipes import find

PROGRAM = """
import json, re, sys, threading, time
from pathlib import Path
import mergecore.single, mergecore.projection as projection
from flows.session import digest_cache, resolver
from mergecore.kernels.library import library_in
from mergecore.merging import InProcess
from mergecore.method import silent
from mergecore.registry import METHODS
from mergecore.spec import parse_recipe

def held():
    text = open("/proc/self/status").read()
    return sum(int(re.search(name + r":\\s+(\\d+)", text).group(1)) for name in ("RssAnon", "RssShmem")) * 1024

recipe, out, loops, workers = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
import mergecore.kernels.run, mergecore.statistics.threshold, torch
torch.ones(8) + 1
before, peak, done = held(), [0], threading.Event()
blocks, original = [], projection.block_bytes

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], held())

def noted(*given):
    blocks.append(original(*given))
    return blocks[-1]

projection.block_bytes = noted
watcher = threading.Thread(target=watch)
watcher.start()
mergecore.single.merge_recipe(
    parse_recipe(recipe, "recipe"), out, resolver(None), InProcess(workers), silent, library=library_in(loops), memory=1 << 30
)
done.set()
watcher.join()
print(json.dumps({"before": before, "peak": peak[0], "projected": before + workers * max(blocks)}))
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


def measured(pool: Path, experts: int, method: dict[str, Any], tmp_path: Path) -> dict[str, int]:
    recipe = {**method, "base": str(pool / "0"), "experts": [str(pool / str(n)) for n in range(1, experts + 1)]}
    command = [sys.executable, "-c", PROGRAM, json.dumps(recipe), str(tmp_path / f"{pool.name}-{experts}"), str(tmp_path / "loops"), "2"]  # fmt: skip
    found: dict[str, int] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return found


@pytest.mark.parametrize(
    "method", [{"method": "ties", "density": 0.2}, {"method": "average"}, {"method": "slerp", "t": 0.4}]
)
def test_the_peak_is_below_the_projection_and_not_far_below(
    pools: dict[str, Path], method: dict[str, Any], tmp_path: Path
) -> None:
    most = {}
    for size, pool in pools.items():
        for experts in (2,) if method["method"] == "slerp" else (2, EXPERTS):
            found = measured(pool, experts, method, tmp_path)
            assert 0.7 * found["projected"] <= found["peak"] <= found["projected"], (size, experts, found)
            most[size, experts] = found["peak"] - found["before"]
    assert max(most.values()) < 1 << 30
    for (_, experts), above in most.items():  # twenty times the model is no more memory
        assert above < most["small", experts] + (24 << 20)


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
