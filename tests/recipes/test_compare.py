"""`mergeloom diff`: its numbers are those of whole tensors in torch, and whatever differs is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import astuple
from math import isfinite
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from flows.cli.main import main
from mergecore.checkpoints.differences import ABSENT, entries
from mergecore.engine.executor import InProcess
from mergecore.errors import MismatchError
from mergecore.events import silent
from mergecore.recipes.compare import Comparison, Sums, block_sums, compare
from mergecore.spec.sources import SourceSpec
from mergecore.tensors.files import FileTensors
from mergeloom.testing.grid import set_grid
from tests import tiny_lm
from tests.recipe_files import find

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lm.write_base(tmp_path_factory.mktemp("compare") / "base")


@pytest.fixture
def expert(base: Path, tmp_path: Path) -> Path:
    return tiny_lm.write_expert(base, tmp_path / "expert", 1)


def compared(first: Path, second: Path, workers: int = 1) -> Comparison:
    specs = (SourceSpec(source=str(first)), SourceSpec(source=str(second)))
    return compare(*specs, find, InProcess(workers), silent)


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})
    return folder


def json_changed(folder: Path, name: str, **changes: Any) -> Path:
    values = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps(values))
    return folder


def direct(first: list[Tensor], second: list[Tensor]) -> tuple[float, float, float, float, float, int]:
    """Norms, distance, cosine, largest difference, elements that differ: of all tensors as one vector."""
    a, b = (torch.cat([tensor.flatten().double() for tensor in side]) for side in (first, second))
    cosine = torch.nn.functional.cosine_similarity(a, b, dim=0)
    norms = float(a.norm()), float(b.norm()), float((b - a).norm())
    return *norms, float(cosine), float((b - a).abs().max()), int((a != b).sum())


def numbers(sums: Sums) -> tuple[float, float, float, float | None, float, int]:
    return *sums.norms, sums.distance, sums.cosine, sums.largest, sums.changed


def test_numbers_are_those_of_whole_tensors(base: Path, expert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each tensor, of each layer and of all; for any number of workers the same; never more than a block is read."""
    set_grid(monkeypatch, 1000)
    sizes, read = list[int](), FileTensors.read

    def noted(self: FileTensors, name: str, start: int = 0, stop: int | None = None, space: Any = None) -> Tensor:
        values = read(self, name, start, stop, space)
        sizes.append(values.numel())
        return values

    monkeypatch.setattr(FileTensors, "read", noted)
    result = compared(base, expert)
    assert max(sizes) == 1000
    a, b = load_file(base / WEIGHTS), load_file(expert / WEIGHTS)
    assert [tensor.name for tensor in result.tensors] == sorted(a)
    for tensor in result.tensors:
        assert tensor.sums is not None
        assert numbers(tensor.sums) == pytest.approx(direct([a[tensor.name]], [b[tensor.name]]), rel=1e-9)
    assert numbers(result.total) == pytest.approx(direct(list(a.values()), [b[name] for name in a]), rel=1e-9)
    assert list(result.groups) == ["layer 0", "layer 1", "layer 2", "no layer"]
    own = [name for name in a if ".layers.1." in name]
    wanted = direct([a[name] for name in own], [b[name] for name in own])
    assert numbers(result.groups["layer 1"]) == pytest.approx(wanted, rel=1e-9)
    assert compared(base, expert, workers=3).tensors == result.tensors
    assert not result.files.config and not result.files.tokens and not result.only_first and not result.only_second


def test_a_model_does_not_differ_from_itself(base: Path) -> None:
    total = compared(base, base).total
    assert (total.changed, total.distance, total.relative, total.cosine, total.largest) == (0, 0.0, 0.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("first", "second", "changed", "largest", "odd"),
    [
        ([1.0, 2.0], [1.0, -2.0], 1, 4.0, 0),
        ([0.0, 1.0], [-0.0, 1.0], 0, 0.0, 0),
        ([float("nan"), 1.0, 3.0], [float("nan"), float("inf"), 4.0], 2, 1.0, 2),
    ],
)
def test_elements_that_differ(first: list[float], second: list[float], changed: int, largest: float, odd: int) -> None:
    sums = block_sums(torch.tensor(first), torch.tensor(second))
    assert (sums.changed, sums.largest, sums.not_finite) == (changed, largest, odd)
    assert all(isfinite(value) for value in astuple(sums))


def test_integers_are_compared_as_integers() -> None:
    """2^53 + 1 is no float64."""
    large = torch.tensor([2**53, 5])
    assert block_sums(large, large + torch.tensor([1, 0])).changed == 1
    assert block_sums(torch.tensor([True, False]), torch.tensor([True, True])).changed == 1


def test_an_angle_with_nothing_is_not_defined() -> None:
    sums = block_sums(torch.zeros(3), torch.ones(3))
    assert sums.cosine is None and sums.relative is None and sums.distance == pytest.approx(3**0.5)


def test_other_dtypes_shapes_and_names_are_told(base: Path, expert: Path) -> None:
    name, other, gone = "model.norm.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors |= {name: tensors[name].bfloat16(), other: tensors[other][:-1].contiguous(), "extra": torch.ones(2)}
        return {key: value for key, value in tensors.items() if key != gone}

    result = compared(base, rewritten(expert, change))
    tensors = {tensor.name: tensor for tensor in result.tensors}
    assert (tensors[name].first.dtype, tensors[name].second.dtype) == ("F32", "BF16") and tensors[name].sums is not None
    assert tensors[other].sums is None and tensors[other].second.shape[0] == tensors[other].first.shape[0] - 1
    assert (result.only_first, result.only_second) == ((gone,), ("extra",))


def test_configs_differ_by_dotted_keys() -> None:
    first = {"a": 1, "rope": {"theta": 10, "kind": "x"}, "flag": True, "same": [1], "none": None}
    second = {"a": 1.0, "rope": {"theta": 20, "kind": "x"}, "flag": 1, "same": [1], "new": {}}
    assert [(entry.key, entry.first, entry.second) for entry in entries(first, second)] == [
        ("flag", True, 1),
        ("new", ABSENT, {}),
        ("none", None, ABSENT),
        ("rope.theta", 10, 20),
    ]


def test_tokenizers_differ_by_tokens_ids_and_rules(base: Path, expert: Path) -> None:
    content = json.loads((expert / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    first_free = max(vocabulary.values()) + 1
    new = {**content["added_tokens"][0], "content": "<|new|>", "id": first_free}
    content["added_tokens"].append(new)
    content["pre_tokenizer"]["add_prefix_space"] = True
    (expert / "tokenizer.json").write_text(json.dumps(content))
    (expert / "chat_template.jinja").write_text("{{ messages }}")
    json_changed(expert, "config.json", rms_norm_eps=0.5)
    files = compared(base, expert).files
    assert [(entry.key, entry.second) for entry in files.config] == [("rms_norm_eps", 0.5)]
    tokens = files.tokens
    assert tokens is not None and tokens.moved == {
        "a": (vocabulary["b"], vocabulary["a"]),
        "b": (vocabulary["a"], vocabulary["b"]),
    }
    assert (tokens.only_first, tokens.only_second) == ((), ("<|new|>",))
    assert tokens.shared == len(set(vocabulary) | {"<|end|>"}) - 2
    keys = {entry.key for entry in tokens.entries}
    assert "chat_template" in keys and "tokenizer.json.pre_tokenizer.add_prefix_space" in keys
    assert {"chat_template.jinja", "config.json", "tokenizer.json"} == set(files.files)


def test_names_in_files_are_brought_together(tmp_path: Path) -> None:
    """A GPT-2 as on the hub has no `transformer.` before its names."""
    import transformers

    config = transformers.GPT2Config(vocab_size=96, n_positions=32, n_embd=24, n_layer=2, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    rewritten(tmp_path / "second", lambda old: {name.removeprefix("transformer."): old[name] for name in old})
    result = compared(tmp_path / "first", tmp_path / "second")
    assert result.total.changed == 0 and not result.only_first and not result.only_second
    assert result.total.elements == sum(value.numel() for value in load_file(tmp_path / "first" / WEIGHTS).values())
    assert "have other names there" in result.notes[0]


def test_adapters_are_compared_with_adapters(base: Path, tmp_path: Path) -> None:
    first = tiny_lm.write_adapter(base, tmp_path / "first", 1)
    second = tiny_lm.write_adapter(base, tmp_path / "second", 2, alpha=8.0)
    result = compared(first, second)
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    assert numbers(result.total) == pytest.approx(direct(list(a.values()), [b[name] for name in a]), rel=1e-9)
    assert [(entry.key, entry.first, entry.second) for entry in result.files.config] == [("lora_alpha", 4.0, 8.0)]
    with pytest.raises(MismatchError, match="is an adapter and"):
        compared(base, first)


def test_the_command_prints_tables_and_json(base: Path, expert: Path) -> None:
    json_changed(expert, "config.json", rms_norm_eps=0.5)
    before = {path: path.read_bytes() for path in expert.iterdir()}
    called = [
        CliRunner().invoke(main, ["diff", str(base), str(expert), *more]) for more in ([], ["--each"], ["--json"])
    ]
    short, each, plain = (result.stdout for result in called)
    assert [result.exit_code for result in called] == [0, 0, 0], called[0].output
    result = compared(base, expert)
    values = json.loads(plain, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert values["total"]["cosine"] == result.total.cosine and values["total"]["norms"] == list(result.total.norms)
    assert set(values["tensors"]) == {tensor.name for tensor in result.tensors}
    assert values["config"] == {"rms_norm_eps": [1e-06, 0.5]}
    rows = {line.split("  ")[0]: line for line in short.splitlines()}
    assert f"{result.total.cosine:.6f}" in rows["all"] and f"{result.groups['layer 2'].norms[0]:.6g}" in rows["layer 2"]
    assert "rms_norm_eps: 1e-06 in A, 0.5 in B" in short and "tokenizers: the same" in short
    assert "model.norm.weight" in each and "model.norm.weight" not in short
    assert {path: path.read_bytes() for path in expert.iterdir()} == before


def test_what_is_no_checkpoint_is_refused(base: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["diff", str(base), str(tmp_path / "nowhere")])
    assert result.exit_code == 1 and "nowhere" in result.output and not isinstance(result.exception, FileNotFoundError)
