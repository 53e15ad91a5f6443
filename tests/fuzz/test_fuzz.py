"""Whatever stands in a file: it is read, or refused by an error of ours; nothing is left over, memory is bounded.

The suite draws the same few examples in every run. `make fuzz` draws others for as long as one likes.
"""

from __future__ import annotations

import json
import resource
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from flows.cli.main import main
from mergecore.checkpoints.experts import adapter_factors
from mergecore.checkpoints.snapshot import read_snapshot
from mergecore.checkpoints.sources.digests import DigestCache
from mergecore.checkpoints.sources.local import LocalSource
from mergecore.checkpoints.sources.selection import weight_map
from mergecore.checkpoints.vocabulary.tokenizer import _ids
from mergecore.errors import EvaluationError, MergeloomError, MismatchError, SourceError, SpecError
from mergecore.evaluators.lm_tasks import read_yaml as read_task
from mergecore.spec.recipe import parse_recipe
from mergecore.spec.recipe_documents import Translator, read_orders
from mergecore.spec.sweep import parse_spec
from mergecore.spec.yaml_files import read_documents
from mergecore.tensors.header import parse_header
from mergecore.tensors.source import TensorInfo
from tests.fuzz.inputs import budget, damaged, mutated, plain
from tests.recipe_files import find

LARGEST_GROWTH = 1 << 20
"""Kilobytes by which this process may grow."""


@pytest.fixture(scope="module", autouse=True)
def _memory() -> Iterator[None]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < LARGEST_GROWTH


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two experts and an adapter of four tensors each; the current folder of what is run."""
    folder = tmp_path_factory.mktemp("models")
    draw = torch.Generator().manual_seed(0)
    shapes = {f"model.layers.{layer}.mlp.up.weight": (4, 6) for layer in (0, 1)} | {
        "model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,)
    }  # fmt: skip
    for name in ("base", "e1", "e2"):
        (folder / name).mkdir()
        save_file(
            {key: torch.randn(shape, generator=draw) for key, shape in shapes.items()},
            folder / name / "model.safetensors",
        )
        (folder / name / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2}')
    (folder / "lora").mkdir()
    module = "base_model.model.model.layers.0.mlp.up"
    save_file({f"{module}.lora_A.weight": torch.ones(2, 6), f"{module}.lora_B.weight": torch.ones(4, 2)},
              folder / "lora" / "adapter_model.safetensors")  # fmt: skip
    (folder / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 2}')
    return folder


@pytest.fixture(autouse=True)
def _here(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(models)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))


# --- files of checkpoints -----------------------------------------------------------------------------------------

HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
}
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 6, 2**40, -1, 1.0, True]), max_size=3)
OFFSETS = st.lists(st.sampled_from([0, 8, 16, 24, 32, 40, 41, 2**64, -8, 8.0, True]), max_size=3)


@budget(600)
@given(
    header=mutated(HEADER, ["a", "b", "d", "dtype", "shape", "data_offsets", "__metadata__"]),
    shape=st.none() | SHAPES,
    offsets=st.none() | OFFSETS,
    data=st.sampled_from([40, 40, 40, 39, 41, 0, 24, 32]),
    spoil=st.none() | st.integers(0, 10**6),
)
def test_headers(header: dict[str, Any], shape: Any, offsets: Any, data: int, spoil: int | None) -> None:
    """What the library refuses is refused; what is read is what the library reads."""
    if isinstance(header.get("b"), dict):
        header["b"] |= {key: value for key, value in (("shape", shape), ("data_offsets", offsets)) if value is not None}
    text = bytearray(json.dumps(header).encode())
    if spoil is not None:
        text[spoil % len(text)] = spoil % 251
    content = struct.pack("<Q", len(text)) + bytes(text) + bytes(data)
    try:
        entries = parse_header(lambda start, size: content[start : start + size], len(content), "file")
    except SourceError as error:
        assert str(error).startswith("file")
        return
    read = dict(safetensors.deserialize(content))
    assert {name: (info.dtype, list(info.shape)) for name, (info, _) in entries.items()} == {
        name: (tensor["dtype"], list(tensor["shape"])) for name, tensor in read.items()
    }
    assert all(offset + info.size <= len(content) for info, offset in entries.values())


INDEX = {"metadata": {"total_size": 8}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}


@budget(150)
@given(index=mutated(INDEX, ["weight_map", "a", "c"]) | plain, spoil=st.none() | st.data())
def test_indexes(index: Any, spoil: Any, models: Path) -> None:
    content = json.dumps(index).encode()
    content = content if spoil is None else spoil.draw(damaged(content))
    try:
        files = weight_map(content, "index")
        assert all(isinstance(file, str) for file in files.values())
    except SourceError as error:
        assert "index is not an index" in str(error)
    folder = models / "sharded"
    folder.mkdir(exist_ok=True)
    for number, name in ((1, "a"), (2, "b")):
        if not (folder / f"model-{number}.safetensors").exists():
            save_file({name: torch.zeros(1)}, folder / f"model-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_bytes(content)
    try:
        assert set(read_snapshot(LocalSource(folder, DigestCache())).tensors) <= {"a", "b"}
    except SourceError:
        pass


ADAPTER = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {"m": 8, ".*up": 2}, "use_rslora": False,
    "fan_in_fan_out": False, "bias": "none", "target_modules": ["m"], "init_lora_weights": True,
}  # fmt: skip
SIDES = st.sampled_from([(2, 6), (4, 2), (0, 6), (4, 0), (), (2,), (2, 6, 1), (1, 6), (4, 1)])


@budget(400)
@given(
    config=mutated(ADAPTER, ["use_dora", "modules_to_save", "rank_pattern", "lora_bias", "m", "("]),
    down=SIDES,
    up=SIDES,
)
def test_adapters(config: dict[str, Any], down: tuple[int, ...], up: tuple[int, ...]) -> None:
    base = {"m.weight": TensorInfo("F32", (4, 6))}
    tensors = {"m.lora_A.weight": TensorInfo("F32", down), "m.lora_B.weight": TensorInfo("F32", up)}
    try:
        factors = adapter_factors(tensors, config, base, "adapter 'x'", {})
    except MismatchError as error:
        assert str(error).startswith("adapter 'x'")
        return
    assert set(factors) == set(base)


TOKENIZER = {
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]},
    "added_tokens": [{"id": 3, "content": "<s>", "special": True}],
    "pre_tokenizer": {"type": "ByteLevel"},
}


@budget(200)
@given(content=mutated(TOKENIZER, ["vocab", "merges", "id", "content"]))
def test_tokenizers(content: Any) -> None:
    try:
        assert all(isinstance(number, int) for number in _ids(content, "tokenizer.json").values())
    except SourceError as error:
        assert str(error).startswith("tokenizer.json")


# --- recipes and specs --------------------------------------------------------------------------------------------

RECIPE = {
    "method": "ties", "density": 0.2, "scale": 1.0, "drop": {"rate": 0.5, "seed": 0}, "base": "base",
    "experts": ["e1", {"name": "two", "source": "e2"}], "dtype": "float32", "shard_size": "5GB",
    "select": [{"names": "*mlp*", "layers": [0, 1], "density": 0.5}, {"names": "/norm/", "take": "copy"}, {}],
}  # fmt: skip
RECIPE_KEYS = [
    "weights",
    "method",
    "base",
    "experts",
    "stack",
    "tokenizer",
    "chat_template",
    "take",
    "of",
    "names",
    "layers",
]
SPEC = {
    "name": "tried", "base": "base", "experts": [{"name": "a", "source": "e1", "tasks": ["t"]}, "e2"], "counts": [1, 2],
    "methods": [{"method": "average"}, {"method": "ties", "density": {"grid": [0.2, 0.5]}},
                {"method": "task_arithmetic", "search": {"by": "grid", "over": [{"parameter": "scale", "values": [0.3, 1]}]}}],
    "select": [{"names": "*"}], "subsets": {"per_count": 2, "seed": 0},
    "evaluate": {"evaluator": "lm_eval", "held_in": {"c": ["t"]}, "held_out": {}, "validation": {"limit": 3}},
    "output": {"keep": "none", "shard_size": "1GB"}, "run": {"workers": 2, "memory": "1GB", "most_cells": 1000},
}  # fmt: skip
SPEC_KEYS = ["method", "grid", "search", "by", "over", "counts", "select", "label", "per_count", "multitask", "budget"]
MERGEKIT = {
    "merge_method": "ties", "base_model": "base", "dtype": "float32", "parameters": {"normalize": True, "density": 0.5},
    "models": [{"model": "e1", "parameters": {"weight": [0, 0.5, 1]}},
               {"model": "base+lora", "parameters": {"weight": [{"filter": "mlp", "value": 0.5}, {"value": 1}]}}],
}  # fmt: skip
SLICES = {
    "merge_method": "passthrough", "dtype": "float32",
    "slices": [{"sources": [{"model": "e1", "layer_range": [0, 1]}]}, {"sources": [{"model": "e2", "layer_range": [1, 2]}]}],
}  # fmt: skip
MERGEKIT_KEYS = ["models", "slices", "modules", "tokenizer", "tokenizer_source", "weight", "density", "lambda", "filter",
                 "value", "layer_range", "out_dtype", "name", "chat_template"]  # fmt: skip


@budget(300)
@given(document=mutated(RECIPE, RECIPE_KEYS))
def test_recipes(document: dict[str, Any]) -> None:
    try:
        parse_recipe(document, "recipe").built()
    except MergeloomError as error:
        assert "s3cret" not in str(error)


@budget(250)
@given(document=mutated(SPEC, SPEC_KEYS))
def test_specs(document: dict[str, Any]) -> None:
    try:
        spec = parse_spec(document, "spec")
    except MergeloomError as error:
        assert "s3cret" not in str(error)
        return
    cells = sum(len(variant.counts) for variant in spec.variants if variant.label != "average") * spec.subsets.per_count
    assert cells <= spec.run.most_cells


@budget(250)
@given(document=mutated(MERGEKIT, MERGEKIT_KEYS) | mutated(SLICES, MERGEKIT_KEYS))
def test_recipes_in_mergekits_form(document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "mergekit.yml"
    path.write_text(yaml.safe_dump(document, allow_unicode=True))
    try:
        orders = read_orders(path)
        translator = Translator(find)
        for order in orders:
            translator.recipe(order, {order.name: Path("somewhere") for order in orders})
    except MergeloomError as error:
        assert "s3cret" not in str(error)


@budget(250)
@given(
    content=st.sampled_from([RECIPE, SPEC, MERGEKIT]).flatmap(
        lambda document: damaged(yaml.safe_dump(document).encode())
    )
)
def test_texts(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "text.yml"
    path.write_bytes(content)
    try:
        assert all(isinstance(document, dict) for document in read_documents(path))
    except SpecError as error:
        assert str(error).startswith(str(path))
    try:
        read_task(path)
    except EvaluationError:
        pass


@budget(60)
@given(document=mutated(RECIPE, RECIPE_KEYS) | mutated(MERGEKIT, MERGEKIT_KEYS))
def test_whole_merges_leave_a_model_or_nothing(document: dict[str, Any], models: Path) -> None:
    """As a person runs it: a model and nothing beside it, or one message and nothing at all."""
    (models / "recipe.yml").write_text(yaml.safe_dump(document, allow_unicode=True))
    before = {path.name for path in models.iterdir()}
    result = CliRunner().invoke(main, ["merge", "recipe.yml", "out", "--workers", "1"])
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.output and "s3cret" not in result.output
    new = {path.name for path in models.iterdir()} - before
    assert new == ({"out"} if result.exit_code == 0 else set()), result.output
    if new:
        assert set(read_snapshot(LocalSource(models / "out", DigestCache())).tensors)
        for path in sorted((models / "out").rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        (models / "out").rmdir()
