"""What training leaves in files is refused by file and tensor before anything is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergecore.checkpoints.leftovers import own_name
from mergecore.checkpoints.snapshot import read_snapshot
from mergecore.checkpoints.sources.local import LocalSource
from mergecore.errors import SourceError
from tests.recipe_files import merge_into

NAMES = ("model.embed.weight", "model.layers.0.q_proj.weight", "model.norm.weight")
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def write(folder: Path, tensors: dict[str, Tensor], file: str = "model.safetensors", config: Any = None) -> str:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    name = "adapter_config.json" if file.startswith("adapter") else "config.json"
    (folder / name).write_text(json.dumps(config or {"model_type": "x"}))
    return str(folder)


def model(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(4, 4, generator=draw) for name in NAMES}


def adapter() -> dict[str, Tensor]:
    stem = "base_model.model.model.layers.0.q_proj"
    return {f"{stem}.lora_A.weight": torch.ones(2, 4), f"{stem}.lora_B.weight": torch.ones(4, 2)}


def empty(part: str) -> Change:
    """ZeRO-3: what was on other processes has no elements here."""
    return lambda tensors: {name: torch.zeros(0) if part in name else value for name, value in tensors.items()}


def renamed(change: Callable[[str], str]) -> Change:
    return lambda tensors: {change(name): value for name, value in tensors.items()}


LEFT: dict[str, tuple[Change, str]] = {
    "every tensor empty": (empty(""), r"'\S+' and \d more are empty \(shape \[0\]\).*weights gathered"),
    "one tensor empty": (empty("q_proj"), r"q_proj\S*'( and 1 more are| is) empty \(shape \[0\]\).*ZeRO-3"),
    "bfloat16": (
        lambda tensors: {name: value.bfloat16()[:0].reshape(0) for name, value in tensors.items()},
        r"empty \(shape \[0\]\)",
    ),
    "fsdp": (
        renamed(lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module.")),
        r"'\S+_fsdp_wrapped_module\S+'.*named by a wrapper.*own name is '\S*model\.layers\.0\.q_proj\S*'",
    ),
    "fsdp, checkpointed, compiled": (
        renamed(lambda name: f"_orig_mod._fsdp_wrapped_module._checkpoint_wrapped_module.{name}"),
        r"named by a wrapper.*own name is '(base_model\.)?model\.\w+\.",
    ),
    "compiled": (renamed(lambda name: f"_orig_mod.{name}"), r"'_orig_mod\.\S+'.*named by a wrapper"),
    "parallel": (renamed(lambda name: f"module.{name}"), r"'module\.\S+'.*own name is '(?!module)"),
    "flat": (
        lambda tensors: {**tensors, "model.layers.0._fsdp_wrapped_module._flat_param": torch.ones(32)},
        r"_flat_param' is a flat parameter of FSDP",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT)
@pytest.mark.parametrize("where", ["base", "expert", "both", "adapter", "folded"])
def test_refused_before_anything_is_written(case: str, where: str, tmp_path: Path) -> None:
    change, said = LEFT[case]
    base, expert, factors = model(0), model(1), adapter()
    if where in ("base", "both"):
        base = change(base)
    if where in ("expert", "both"):
        expert = change(expert)
    if where in ("adapter", "folded"):
        factors = change(factors)
    ground = write(tmp_path / "base", base)
    low = write(tmp_path / "low", factors, "adapter_model.safetensors", {"peft_type": "LORA", "lora_alpha": 2})
    experts: list[Any] = [low] if where == "adapter" else [write(tmp_path / "full", expert)]
    if where == "folded":
        experts.append({"name": "folded", "source": ground, "adapter": low})
    file = "adapter_model" if where in ("adapter", "folded") else "model"
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(SourceError, match=rf"/{file}\.safetensors: tensor .*{said}"):
        merge_into({"method": "task_arithmetic", "scale": 1, "base": ground, "experts": experts}, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_the_file_of_the_tensor_is_named(tmp_path: Path) -> None:
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    tensors = model(0)
    write(tmp_path / "m", {NAMES[0]: tensors[NAMES[0]]}, first)
    write(tmp_path / "m", {NAMES[1]: torch.zeros(0), NAMES[2]: tensors[NAMES[2]]}, second)
    index = {"weight_map": {NAMES[0]: first, NAMES[1]: second, NAMES[2]: second}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match=rf"{second}: tensor '{NAMES[1]}' is empty"):
        read_snapshot(LocalSource(tmp_path / "m"))


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": torch.zeros(0, 4), "b": torch.ones(2)}, {"steps": torch.zeros(0, dtype=torch.int64), "b": torch.ones(2)},
        {"module.a": torch.ones(2), "b": torch.ones(2)}, {"model.module.a": torch.ones(2)},
        {"flat_parameters": torch.ones(2)},
    ],
)  # fmt: skip
def test_what_only_looks_alike_is_read(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    folder = write(tmp_path / "m", tensors)
    assert set(read_snapshot(LocalSource(folder)).tensors) == set(load_file(tmp_path / "m" / "model.safetensors"))


def test_names_without_wrappers() -> None:
    assert own_name("_fsdp_wrapped_module.a._fsdp_wrapped_module.b._orig_mod.weight") == "a.b.weight"
    assert own_name("_orig_mod._fsdp_wrapped_module.weight") == "weight"
    assert own_name("model.layers.0.weight") == "model.layers.0.weight"
