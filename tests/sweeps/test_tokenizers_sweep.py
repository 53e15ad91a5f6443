"""A sweep over experts of other vocabularies: one vocabulary for all cells, each checkpoint measured as it lies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from mergecore.store.store import State
from mergecore.store.survey import results
from mergecore.sweeps.exporting import cell_named, export
from mergecore.sweeps.lineage import recipe_of
from mergecore.sweeps.reach import Kept, rubbish, steps_of
from tests import tiny_lm
from tests.digits_sweep import Swept, opened, stamps
from tests.recipe_files import merge_into

EMBEDDING = "model.embed_tokens.weight"
TOKENS = 316
"""Of the tiny model, which has four rows more."""


def extended(base: Path, folder: Path, tokens: list[str], seed: int) -> Path:
    """A fine-tune with tokens of its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny_lm.write_expert(base, folder, seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(tokens)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def sweep_in(folder: Path) -> dict[str, Any]:
    """A sweep over two fine-tunes with tokens of their own and an adapter, everything in `folder`."""
    base = tiny_lm.write_base(folder / "base")
    experts = {
        "chat": extended(base, folder / "chat", ["<m>", "<u>"], 1),
        "code": extended(base, folder / "code", ["<c>"], 2),
        "lora": tiny_lm.write_adapter(base, folder / "lora", seed=3),
    }
    return {
        "name": "tokens",
        "base": {"source": str(base), "known_as": "tiny"},
        "experts": [{"name": name, "source": str(path), "tasks": ["tiny_choice"]} for name, path in experts.items()],
        "methods": [{"method": "average"}, {"method": "ties", "density": 0.3}],
        "counts": [2, 3],
        "tokenizer": "union",
        "evaluate": {
            "path": str(tiny_lm.write_tasks(folder / "tasks", items=4)), "held_in": {"choice": ["tiny_choice"]},
            "limit": 4, "batch_size": 4, "dtype": "float32",
        },
        "output": {"store": str(folder / "store"), "keep": "all", "register": {"name": "tokens"}},
    }  # fmt: skip


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    swept = opened(sweep_in(tmp_path_factory.mktemp("sweep")))
    done = swept.run()
    assert not done.failures, done.failures
    return swept


def test_cells_have_the_vocabulary_of_the_whole_pool(swept: Swept) -> None:
    """Also a cell of two: the rows of tokens that none of them has are the third's."""
    cell = swept.cell("average n2 s0")
    embedding = load_file(swept.store.folder(cell.model) / "model.safetensors")[EMBEDDING]
    rows = {name: load_file(_folder(swept, name) / "model.safetensors")[EMBEDDING] for name in ("chat", "code")}
    base = load_file(Path(swept.plan.pool.base.source.uri) / "model.safetensors")[EMBEDDING]
    assert embedding.shape[0] == TOKENS + 3 == swept.plan.pool.base.config["vocab_size"] < len(base)
    torch.testing.assert_close(embedding[TOKENS], rows["chat"][TOKENS], rtol=0, atol=1e-6)
    torch.testing.assert_close(embedding[TOKENS + 2], rows["code"][TOKENS], rtol=0, atol=1e-6)
    wanted = sum(rows.get(name, base)[:TOKENS] for name in cell.experts) / 2
    torch.testing.assert_close(embedding[:TOKENS], wanted, rtol=0, atol=1e-6)


def _folder(swept: Swept, name: str) -> Path:
    return Path(swept.plan.pool.experts[name].snapshot.source.uri)


def test_checkpoints_are_measured_as_they_lie(swept: Swept) -> None:
    """The base and full experts with their own configuration and tokenizer, merges with those of the union."""
    pool = swept.plan.pool
    for cell in swept.plan.cells:
        companions = swept.plan.companions(cell)
        own = pool.base if cell.member is None else cell.member.snapshot
        expected = pool.base if cell.merge is not None else own.as_stored
        assert companions.companions == expected.companions
        assert cell.merge is not None or companions.source.files["tokenizer.json"].sha256 is not None
    assert swept.cell("base").model.inputs["weights"] == pool.base.as_stored.weights != pool.base.weights


def test_the_recipe_of_a_cell_makes_its_bytes(swept: Swept, tmp_path: Path) -> None:
    """A cell of two experts of three, alone: the vocabulary is still that of the pool."""
    for name in ("average n2 s0", "ties(density=0.3) n2 s0", "average n3 s0"):
        cell = swept.cell(name)
        record = swept.store.record(cell.model)
        assert record is not None and swept.store.state(cell.model) is State.PRESENT
        assert merge_into(recipe_of(swept.plan, cell), tmp_path / name).digest == record.digest


def test_the_registered_model_loads_and_a_second_run_does_nothing(swept: Swept) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    registered = swept.registered()
    assert registered is not None
    folder = registered["uri"].removeprefix("file://")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("the dog<c><m>", return_tensors="pt").input_ids
    assert ids[0, -2:].tolist() == [TOKENS + 2, TOKENS] and model.config.vocab_size == TOKENS + 3
    assert model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] > ids.shape[1]
    before = stamps(swept.store)
    assert not swept.run().steps and stamps(swept.store) == before


def test_all_of_it_is_reached_and_any_cell_is_exported(swept: Swept, tmp_path: Path) -> None:
    """Companions that were rewritten are a snapshot too, and go with the model that is taken away."""
    keys = {step.key for step in steps_of(swept.frontier)}
    assert rubbish(swept.store, results(swept.store), Kept(keys)) == []
    name = next(cell.name for cell in swept.plan.cells if cell.kind == "merge" and cell.count == 3)
    export(replace(swept.place, folders={}), swept.frontier, cell_named(swept.frontier, name), tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    rows = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").get_input_embeddings().weight.shape[0]
    assert {"<m>", "<u>", "<c>"} <= set(tokenizer.get_vocab()) and len(tokenizer) <= rows
