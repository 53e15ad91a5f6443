"""By what random masks are drawn: by the tensors of an expert, not by the files they lie in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergecore.checkpoints.experts import AdapterExpert, Factor, FullExpert
from mergecore.events import silent
from mergecore.execution.tensor_ids import tensors_step
from mergecore.identity.content import model_digest
from mergecore.planning.pool import read_source, resolve_pool
from mergecore.spec.sources import BaseSpec, ExpertSpec, SourceSpec
from mergecore.store.store import Store
from mergecore.tensors.memory import MemoryTensors
from tests.recipe_files import find, merge_into

DROPS: dict[str, dict[str, Any]] = {
    "dare": {"method": "task_arithmetic", "scale": 0.5, "drop": {"rate": 0.5}},
    "dare by norm": {"method": "task_arithmetic", "scale": 0.5, "drop": {"rate": 0.5, "rescale": "l1"}},
    "dare ties": {"method": "ties", "density": 0.6, "drop": {"rate": 0.5, "seed": 3}},
    "dare ties by norm": {"method": "ties", "density": 0.6, "drop": {"rate": [0.5, 0.2], "rescale": "l1"}},
    "average": {"method": "average", "drop": {"rate": 0.5}},
    "della": {"method": "della"},
}
Layout = Callable[[dict[str, Tensor], Path], None]


def tensors(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {f"layers.{number}.weight": torch.randn(30, 20, generator=draw) for number in range(3)}


def one_file(model: dict[str, Tensor], folder: Path, **metadata: str) -> None:
    folder.mkdir()
    save_file(model, folder / "model.safetensors", metadata={"format": "pt", **metadata})
    (folder / "config.json").write_text("{}")


def noted(model: dict[str, Tensor], folder: Path) -> None:
    one_file(model, folder, note="edited")


def shards(model: dict[str, Tensor], folder: Path) -> None:
    folder.mkdir()
    files = {name: f"model-0000{number + 1}-of-00003.safetensors" for number, name in enumerate(reversed(model))}
    for name, file in files.items():
        save_file({name: model[name]}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (folder / "config.json").write_text("{}")


def with_a_constant(model: dict[str, Tensor], folder: Path) -> None:
    """As some versions of transformers save it."""
    one_file({**model, "layers.0.rotary_emb.inv_freq": torch.ones(4)}, folder)


def merged(folder: Path, values: dict[str, Any], layout: Layout, **options: Any) -> dict[str, Tensor]:
    """The merge of two experts, of which the first is laid out so. Sums of two are the same in either order."""
    folder.mkdir()
    base = tensors(0)
    one_file(base, folder / "base")
    layout({name: value + 0.1 * tensors(1)[name] for name, value in base.items()}, folder / "a")
    one_file({name: value + 0.1 * tensors(2)[name] for name, value in base.items()}, folder / "b")
    experts = [{"name": name, "source": folder / name} for name in "ab"]
    merge_into({**values, "base": folder / "base", "experts": experts}, folder / "out", **options)
    return load_file(folder / "out" / "model.safetensors")


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("case", DROPS)
def test_packaging_draws_no_other_masks(case: str, tmp_path: Path) -> None:
    plain = merged(tmp_path / "plain", DROPS[case], one_file)
    for layout in (noted, shards, with_a_constant):
        assert same(merged(tmp_path / layout.__name__, DROPS[case], layout), plain), layout.__name__


@pytest.mark.parametrize("case", ["dare", "dare ties by norm", "della"])
def test_ids_by_files_are_those_of_before(case: str, tmp_path: Path) -> None:
    """`ids: files` draws with the digest of the files: other masks for each way of packing, as in version 0.1.0."""
    values = dict(DROPS[case])
    changed = {"drop": {**values["drop"], "ids": "files"}} if "drop" in values else {"ids": "files"}
    plain = merged(tmp_path / "plain", {**values, **changed}, one_file)
    assert not same(merged(tmp_path / "noted", {**values, **changed}, noted), plain)
    assert not same(merged(tmp_path / "other", values, one_file), plain)
    weights = read_source(SourceSpec(source=str(tmp_path / "plain" / "a")), find, "a").weights
    card = (tmp_path / "plain" / "out" / "README.md").read_text()
    assert "`ids: files`" in card and card.count(f"| a | `{weights}` |") == 1


def test_the_card_says_which_ids_were_drawn_with(tmp_path: Path) -> None:
    told = {}
    for layout in (one_file, shards):
        merged(tmp_path / layout.__name__, DROPS["dare"], layout)
        card = (tmp_path / layout.__name__ / "out" / "README.md").read_text()
        assert "Random masks were drawn with these ids (`ids: tensors`)" in card
        told[layout] = re.findall(r"^\| (a|b) \| `([0-9a-f]{64})` \|$", card, re.MULTILINE)
    assert [name for name, _ in told[one_file]] == ["a", "b"] and len(set(told[one_file])) == 2
    assert told[one_file] == told[shards]
    merged(tmp_path / "none", {"method": "average"}, one_file)
    assert "andom masks" not in (tmp_path / "none" / "out" / "README.md").read_text()


def test_an_id_is_taken_once_and_kept_in_the_store(tmp_path: Path) -> None:
    for number in range(2):
        merged(tmp_path / f"{number}", {**DROPS["dare"], "scale": 0.5 + number}, one_file, store=tmp_path / "store")
    member = ExpertSpec(source=str(tmp_path / "0" / "a"), name="a")
    pool = resolve_pool(BaseSpec(source=str(tmp_path / "0" / "base")), [member], None, find, silent)
    record = Store(tmp_path / "store").record(tensors_step(pool.experts["a"].id, pool))
    assert record is not None
    assert record.digest == pool.experts["a"].open(tmp_path / "0" / "a", pool.base.tensors).identify()
    assert len(list((tmp_path / "store" / "snapshot").glob("tensors-*"))) == 2


def test_a_tied_head_that_is_saved_twice_counts_once(tmp_path: Path) -> None:
    head, tied = "lm_head.weight", '{"tie_word_embeddings": true, "model_type": "llama"}'
    results = []
    for twice in (False, True):

        def layout(model: dict[str, Tensor], folder: Path, twice: bool = twice) -> None:
            named = {"model.embed_tokens.weight": model["layers.0.weight"].clone(), **model}
            one_file({**named, **({head: model["layers.0.weight"].clone()} if twice else {})}, folder)
            (folder / "config.json").write_text(tied)

        folder = tmp_path / f"{twice}"
        folder.mkdir()
        base = tensors(0)
        for number, name in enumerate(("base", "a")):
            layout({tensor: value + number * 0.1 * tensors(1)[tensor] for tensor, value in base.items()}, folder / name)
        recipe = {**DROPS["dare"], "base": folder / "base", "experts": [{"name": "a", "source": folder / "a"}]}
        merge_into(recipe, folder / "out")
        results.append(load_file(folder / "out" / "model.safetensors"))
    assert head not in results[1] and same(*results)


def test_the_id_of_a_merge_is_its_digest(tmp_path: Path) -> None:
    """As its record has it: names, dtypes, shapes and bytes, whatever the shards."""
    done = merge_into(_recipe(tmp_path), tmp_path / "out")
    for size in ("1KB", "5GB"):
        sharded = merge_into({**_recipe(tmp_path / size), "shard_size": size}, tmp_path / size / "out")
        snapshot = read_source(SourceSpec(source=str(sharded.folder)), find, "out")
        assert FullExpert("", "", snapshot.open(sharded.folder)).identify() == done.digest


def _recipe(folder: Path) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    one_file(tensors(0), folder / "a")
    one_file(tensors(1), folder / "b")
    return {"method": "average", "experts": [folder / "a", folder / "b"]}


def test_every_byte_of_a_tensor_counts_and_names_and_dtypes_do() -> None:
    model = {"w": torch.arange(6.0).reshape(2, 3), "n": torch.tensor([1, 2])}
    changes: list[dict[str, Tensor]] = [
        {"w": model["w"].reshape(3, 2)}, {"w": model["w"].half()}, {"n": torch.tensor([1, 3])},
        {"w": torch.where(model["w"] == 5, torch.tensor(5.000001), model["w"])}, {"v": torch.zeros(0)},
    ]  # fmt: skip
    ids = [FullExpert("", "", MemoryTensors({**model, **change})).identify() for change in ({}, *changes)]
    assert len(set(ids)) == len(ids)
    assert ids[0] == FullExpert("other", "name", MemoryTensors(dict(reversed(model.items())))).identify()
    assert ids[0] != model_digest({})


def test_an_adapter_is_its_factors_by_what_they_change() -> None:
    """What PEFT calls them in the file does not matter; their scaling does."""

    def expert(stem: str, scaling: float = 2.0, size: float = 1.0) -> AdapterExpert:
        stored = MemoryTensors({f"{stem}.A": torch.ones(2, 3), f"{stem}.B": torch.full((4, 2), size)})
        return AdapterExpert("", "", stored, {"w": Factor(f"{stem}.A", f"{stem}.B", scaling, False)}, {"w": (4, 3)})

    assert expert("base_model.model.w.default").identify() == expert("w").identify()
    ids = {expert("w").identify(), expert("w", 1.0).identify(), expert("w", size=2.0).identify()}
    assert len(ids) == 3


@pytest.mark.parametrize("method", ["lora_linear", "lora_ties"])
def test_adapters_of_adapters_draw_by_their_factors(method: str, tmp_path: Path) -> None:
    """Other names and metadata in the file, the same factors: the same masks. By files they are others."""
    one_file(tensors(0), tmp_path / "base")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["0", "1", "2"]}
    for name, infix, metadata in (("plain", "", {}), ("packed", ".default", {"note": "edited"}), ("other", "", {})):
        (tmp_path / name).mkdir()
        draw = torch.Generator().manual_seed(6 if name == "other" else 5)
        factors = {}
        for layer in range(3):
            stem = f"base_model.model.layers.{layer}"
            factors[f"{stem}.lora_A{infix}.weight"] = torch.randn(2, 20, generator=draw)
            factors[f"{stem}.lora_B{infix}.weight"] = torch.randn(30, 2, generator=draw)
        save_file(factors, tmp_path / name / "adapter_model.safetensors", metadata={"format": "pt", **metadata})
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(config))
    results = {}
    for ids in ("tensors", "files"):
        for name in ("plain", "packed"):
            out = tmp_path / f"{ids} {name}"
            experts = [{"name": "first", "source": tmp_path / name}, {"name": "second", "source": tmp_path / "other"}]
            drop = {"rate": 0.5, "seed": 1, "ids": ids}
            merge_into({"method": method, "base": tmp_path / "base", "experts": experts, "drop": drop}, out)
            results[ids, name] = load_file(out / "adapter_model.safetensors")
            assert f"`ids: {ids}`" in (out / "README.md").read_text()
    assert same(results["tensors", "plain"], results["tensors", "packed"])
    assert not same(results["files", "plain"], results["files", "packed"])
