"""Memory is projected and kept: the real peak of a merge lies below what was projected, and not far below."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flows.session.machine import available_memory
from mergecore.engine.executor import InProcess
from mergecore.errors import MergeloomError
from mergecore.events import silent
from mergecore.recipes.merge_recipe import merge_recipe
from mergecore.spec.recipe import parse_recipe
from tests.recipe_files import find

PROGRAM = """
import json, re, sys, threading, time
from pathlib import Path
import mergecore.planning.pool, mergecore.recipes.merge_recipe, mergecore.engine.memory as projection
from flows.session.session import resolver
from mergecore.checkpoints.blueprint import blueprint_of
from mergecore.native.library import library_in
from mergecore.engine.executor import InProcess
from mergecore.events import silent
from mergecore.registry import METHODS
from mergecore.checkpoints.sources.digests import DigestCache
from mergecore.spec.recipe import parse_recipe

def held():
    text = open("/proc/self/status").read()
    return sum(int(re.search(name + r":\\s+(\\d+)", text).group(1)) for name in ("RssAnon", "RssShmem")) * 1024

recipes, out, loops, workers = json.loads(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
import mergecore.engine.kernels.run, mergecore.statistics.threshold, torch
torch.ones(8) + 1
blueprint_of({"model_type": "matrices"})  # imports transformers, which a model type that only it knows needs
blocks, original = [], projection.block_bytes

def noted(*given):
    blocks.append(original(*given))
    return blocks[-1]

projection.block_bytes = noted

def measured(number, recipe):
    blocks.clear()
    before, peak, done = held(), [0], threading.Event()
    resolve_pool, planning = mergecore.planning.pool.resolve_pool, []

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], held())

    def resolved(*given):
        pool = resolve_pool(*given)
        planning[:] = [peak[0], held()]
        peak[0] = 0
        return pool

    mergecore.recipes.merge_recipe.resolve_pool = resolved

    watcher = threading.Thread(target=watch)
    watcher.start()
    parsed, executor = parse_recipe(recipe, "recipe"), InProcess(workers)
    library = library_in(loops)
    mergecore.recipes.merge_recipe.merge_recipe(parsed, out / str(number), resolver(DigestCache()), executor, silent, library=library, memory=1 << 30)
    done.set()
    watcher.join()
    at_most, planned = planning
    return {"before": before, "planning": at_most, "planned": planned, "peak": peak[0], "blocks": workers * max(blocks)}

print(json.dumps([measured(number, recipe) for number, recipe in enumerate(recipes)]))
"""
EXPERTS = 8


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small and a large base with eight experts: 1.5 and 30 million parameters in bfloat16."""
    measured_sizes = {}
    for size, layers in (("small", 1), ("large", 20)):
        folder = measured_sizes[size] = tmp_path_factory.mktemp(size)
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
    return measured_sizes


def measured(recipes: list[dict[str, Any]], folder: Path) -> list[dict[str, int]]:
    """Bytes held while each recipe is made, one after the other in a process with two workers: before, at most while it is
    planned, once it is planned, and at most from then on; and what its blocks were projected to take together."""
    (folder / "out").mkdir()
    command = [sys.executable, "-c", PROGRAM, json.dumps(recipes), str(folder / "out"), str(folder / "loops"), "2"]
    measured_sizes: list[dict[str, int]] = json.loads(
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
    )
    return measured_sizes


def test_the_peak_is_below_the_projection_and_not_far_below(pools: dict[str, Path], tmp_path: Path) -> None:
    ties, slerp = {"method": "ties", "density": 0.2}, {"method": "slerp", "t": 0.4}
    cases = [(ties, 2, "small"), (ties, 2, "large"), (ties, 8, "small"), (ties, 8, "large"), (slerp, 2, "small"), (slerp, 2, "large")]  # fmt: skip
    recipes = [
        {**method, "base": str(pools[size] / "0"), "experts": [str(pools[size] / str(n + 1)) for n in range(experts)]}
        for method, experts, size in cases
    ]
    measured_sizes = measured(recipes, tmp_path)
    for case, sizes in zip(cases, measured_sizes, strict=True):
        projected, peak = sizes["before"] + sizes["blocks"], max(sizes["peak"], sizes["planning"])
        assert 0.7 * projected <= peak <= projected, (case, sizes)
        assert sizes["peak"] - sizes["before"] < 1 << 30
    for small, large in zip(
        measured_sizes[::2], measured_sizes[1::2], strict=True
    ):  # twenty times the model is no more memory
        assert large["peak"] - large["before"] < small["peak"] - small["before"] + (24 << 20)


TOKENS, WIDTH = 8_000, 256


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings and heads of 8,000 rows by 256 in bfloat16, and the tokens that these stand for."""
    folder, tokens = tmp_path_factory.mktemp("vocabularies"), [f"token{number}" for number in range(TOKENS)]
    sizes = {
        "base": tokens,
        "more": [*tokens, "<m>"],
        "mixed": random.Random(0).sample(tokens, TOKENS),
        "back": tokens[::-1],
        "thirds": [token for number, token in enumerate(tokens) if number % 3],
    }
    for seed, (name, own) in enumerate(sizes.items()):
        rows = torch.randn(len(own), WIDTH, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
        (folder / name).mkdir()
        tensors = {"model.embed_tokens.weight": rows, "lm_head.weight": rows.flip(0).contiguous()}
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps({"model_type": "matrices", "vocab_size": len(own)}))
        ids = {"type": "WordLevel", "vocab": {token: number for number, token in enumerate(own)}}
        (folder / name / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": ids}))
    return folder


def test_rows_of_other_vocabularies_are_projected_too(vocabularies: Path, tmp_path: Path) -> None:
    """A token more, rows in any order, and rows that are means. Of a method that sees whole tensors only that it stays below:
    what each of these works with is one number for all."""
    union, mean = {"source": "union"}, {"source": "union", "missing": "mean", "pad_to_multiple_of": 1000}
    ties, whole = {"method": "ties", "density": 0.2}, {"method": "model_stock"}
    cases: list[tuple[dict[str, Any], list[str], dict[str, Any]]] = [
        ({"method": "average"}, ["more", "back"], union), (ties, ["mixed", "back"], union),
        (ties, ["thirds", "mixed", "back"], mean), (whole, ["thirds", "mixed", "back"], mean),
    ]  # fmt: skip
    recipes = [
        {
            **method,
            "base": str(vocabularies / "base"),
            "experts": [str(vocabularies / name) for name in names],
            "tokenizer": rules,
        }
        for method, names, rules in cases
    ]
    measured_sizes = measured(recipes, tmp_path)
    for case, sizes in zip(cases, measured_sizes, strict=True):
        projected = sizes["planned"] + sizes["blocks"]
        assert sizes["peak"] <= projected, (case, sizes)
        assert case[0] is whole or sizes["peak"] >= 0.7 * projected, (case, sizes)
    assert measured_sizes[0]["planning"] - measured_sizes[0]["before"] < 500 * 3 * TOKENS, (
        "bytes a token and model, while planning"
    )


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
            lambda e: said.append(e.activity),
            memory=memory,
        ).digest
        for name, memory in (("scarce", 8 << 20), ("ample", None))
    }
    assert len(digests) == 1 and "memory is for 1 of 2 spans at a time" in said


def test_the_page_cache_is_no_memory_that_is_taken(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(
        "MemTotal:  24683656 kB\nMemFree:    1579668 kB\nMemAvailable:   23636856 kB\nHugePages_Total: 0\n"
    )
    assert available_memory(meminfo) == 23_636_856 * 1024
    meminfo.write_text("MemTotal:  24683656 kB\n")  # where nothing is said, what is free
    assert available_memory(meminfo) > 0 and available_memory(tmp_path / "none") > 0
