"""What a spec reaches in a store: every kind of step, so that nothing of a finished sweep is taken for rubbish."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergecore.store.store import Store
from mergecore.store.survey import results
from mergecore.sweeps.complete import make
from mergecore.sweeps.exporting import cell_named, export
from mergecore.sweeps.reach import Kept, Why, delete, rubbish, steps_of
from tests import tiny_lm
from tests.digits import digits_tier
from tests.digits_sweep import Swept, digits_spec, opened
from tests.recipe_files import merge_into

METHODS = [
    {"method": "average"},
    {"method": "opcm"},
    {"method": "task_arithmetic", "label": "dare", "scale": {"grid": [0.5, 1.0]}, "drop": {"rate": 0.5}},
    {"method": "tall_masks"},
    {"method": "fisher", "fisher": {"samples": 8}},
    {"method": "average", "label": "soup", "search": {"by": "greedy"}},
]


def spared(swept: Swept) -> list[str]:
    """What of the sweep's store may go by its own spec."""
    keys = {step.key for step in steps_of(swept.frontier)}
    return [piece.path for piece in rubbish(swept.store, results(swept.store), Kept(keys))]


def test_nothing_of_a_finished_sweep_is_rubbish(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    """Chains, random masks, products, statistics on data, a search; a fresh look at the store sees the same."""
    assert pytestconfig.cache is not None
    torch.set_num_threads(1)
    tier = digits_tier(Path(pytestconfig.cache.mkdir("digits")))
    few = {"evaluate__limit": 10, "evaluate__validation": {"limit": 10}, "output__keep": "all"}
    spec = digits_spec(tier, tmp_path / "store", methods=METHODS, counts=[2, 3], **few)
    swept = opened(spec)
    assert not swept.run().failures
    kinds = {path.parent.parent.name for path in swept.store.root.glob("*/*/record.json")}
    names = {path.parent.name.rpartition("-")[0] for path in swept.store.root.glob("*/*/record.json")}
    assert kinds >= {"snapshot", "statistic", "merge", "evaluation", "registration"}
    assert {"tensors", "opcm", "tall_masks", "fisher"} <= names, "each kind of step is there"
    assert spared(swept) == spared(opened(spec)) == []
    fewer = opened(digits_spec(tier, tmp_path / "store", methods=METHODS[:1], counts=[2, 3], **few))
    keys = {step.key for step in steps_of(fewer.frontier)}
    pieces = rubbish(fewer.store, results(fewer.store), Kept(keys))
    assert {piece.why for piece in pieces} == {Why.UNREACHED}
    delete(fewer.store, pieces)
    kept = {path.parent.name.rpartition("-")[0] for path in fewer.store.root.glob("statistic/*/record.json")}
    assert not kept & {"opcm", "fisher"} and spared(fewer) == []


def test_adapters_are_reached_and_exported(tmp_path: Path) -> None:
    """What a sweep measures is the base with an adapter; what it gives away is the adapter, as a recipe makes it."""
    base = tiny_lm.write_base(tmp_path / "base")
    experts = [tiny_lm.write_adapter(base, tmp_path / name, seed) for seed, name in enumerate(("one-a", "two-a"))]
    spec = {
        "name": "adapters",
        "base": {"source": str(base), "known_as": "tiny"},
        "experts": [{"name": path.name, "source": str(path), "tasks": ["tiny_choice"]} for path in experts],
        "methods": [{"method": "lora_linear"}],
        "counts": [2],
        "evaluate": {
            "path": str(tiny_lm.write_tasks(tmp_path / "tasks", items=4)),
            "held_in": {"choice": ["tiny_choice"]},
            "limit": 4,
        },
        "output": {"store": str(tmp_path / "store")},
    }
    swept = opened(spec)
    cell = next(cell for cell in swept.plan.cells if cell.method == "lora_linear")
    done = export(swept.place, swept.frontier, cell_named(swept.frontier, cell.name), tmp_path / "out")
    assert cell.merge is not None and not make(swept.place, swept.frontier, cell.merge).failures
    assert {path.parent.parent.name for path in swept.store.root.glob("*/*/record.json")} >= {"adapter", "merge"}
    assert spared(swept) == []
    recipe = {
        "method": "lora_linear",
        "base": {"source": str(base), "known_as": "tiny"},
        "experts": [{"name": path.name, "source": str(path)} for path in experts],
    }
    written = merge_into(recipe, tmp_path / "merged")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "merged"))
    assert done.digest == written.digest
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("out", "merged")]
    assert configs[0] == configs[1]


def test_a_folder_that_is_not_of_its_name_is_broken(tmp_path: Path) -> None:
    """A copy that somebody made in the store, a stray file, a record of something else."""
    store = Store(tmp_path / "store")
    for name, record in (("mine", "{}"), ("other", '{"key": "x", "step": 3}'), ("list", "[]")):
        (store.root / "merge" / name).mkdir(parents=True)
        (store.root / "merge" / name / "record.json").write_text(record)
    (store.root / "merge" / "note.txt").write_text("mine")
    stored = list(results(store))
    assert [result.state for result in stored] == ["broken"] * 3, "a file is no result"
    assert {piece.path for piece in rubbish(store, stored, Kept())} == {f"merge/{result.name}" for result in stored}
