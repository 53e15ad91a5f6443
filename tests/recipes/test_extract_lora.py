"""extract-lora: the nearest adapter of a rank and its error, against SVD and PEFT; from files, one tensor at a time."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from flows.cli.main import main
from mergecore.arithmetic.linear_algebra import nearest_low_rank
from mergecore.engine.executor import InProcess
from mergecore.errors import MismatchError, NonFiniteError, SpecError
from mergecore.events import silent
from mergecore.recipes.extract_lora import Extracted, extract_lora
from mergecore.spec.sources import BaseSpec, ExpertSpec
from mergecore.tensors.files import FileTensors
from tests.checkpoints.test_adapters import ATTENTION, FEED_FORWARD, adapted, fresh, weights
from tests.recipe_files import find, merge_into


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """(family, base, an expert all of whose tensors changed)."""
    folder = tmp_path_factory.mktemp(request.param)
    fresh(request.param).save_pretrained(folder / "base")
    model = fresh(request.param)
    torch.manual_seed(7)
    with torch.no_grad():
        for value in model.parameters():
            value += 0.01 * torch.randn(value.shape)
    model.save_pretrained(folder / "expert")
    return request.param, folder / "base", folder / "expert"


def extracted(base: Path, expert: Path, out: Path, workers: int = 1, **values: Any) -> Extracted:
    source = ExpertSpec(source=str(expert), name="expert")
    return extract_lora(source, BaseSpec(source=str(base)), out, find, InProcess(workers), silent, **values)


def folded(family: str, base: Path, adapter: Path) -> dict[str, Tensor]:
    """The base with the adapter folded in by PEFT."""
    model = fresh(family)
    model.load_state_dict(load_file(base / "model.safetensors"), strict=False)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return {name: value.detach() for name, value in merged.state_dict().items()}


def changes(base: Path, expert: Path) -> dict[str, Tensor]:
    before, after = weights(base), weights(expert)
    return {name: (after[name] - before[name]).double() for name in before}


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_nearest_matrix_of_a_rank(shape: tuple[int, int], rank: int) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    up, down = nearest_low_rank(matrix, rank)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(up @ down, left[:, :rank] * values[:rank] @ right[:rank], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(up.norm(dim=0) ** 2, values[:rank])
    torch.testing.assert_close(down.norm(dim=1) ** 2, values[:rank])
    assert not nearest_low_rank(matrix * 0, rank)[0].any()


def test_errors_are_those_of_the_singular_values(pair: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, base, expert = pair
    extraction, deltas = extracted(base, expert, tmp_path / "out", rank=3), changes(base, expert)
    lost = 0.0
    for row in extraction.rows:
        values = torch.linalg.svdvals(deltas[row.tensor])
        assert row.norm == pytest.approx(float(values.norm()), rel=1e-6)
        assert row.lost == pytest.approx(float(values[3:].norm()), rel=1e-5)
        lost += row.lost**2
    left_out = {row.tensor for row in extraction.left_out}
    assert left_out and left_out.isdisjoint(row.tensor for row in extraction.rows)
    assert not any(
        "wte" in name or "embed" in name or "norm" in name for name in {row.tensor for row in extraction.rows}
    )
    whole = sum(float(delta.norm() ** 2) for delta in deltas.values())
    lost += sum(float(deltas[name].norm() ** 2) for name in left_out)
    assert extraction.total_error == pytest.approx((lost / whole) ** 0.5, rel=1e-5)
    record = json.loads((tmp_path / "out/extraction.json").read_text())
    assert (
        record["total_error"] == extraction.total_error and record["error"] == extraction.error < extraction.total_error
    )
    assert record["tensors"][extraction.rows[0].tensor]["error"] == extraction.rows[0].error
    assert set(record["left_out"]) == left_out


def test_peft_and_mergeloom_load_it(pair: tuple[str, Path, Path], tmp_path: Path) -> None:
    """At full rank the layers are the expert's, by PEFT and as an expert of a merge; everything else is the base's."""
    family, base, expert = pair
    extraction = extracted(base, expert, tmp_path / "out", rank=10_000)
    assert extraction.error < 1e-6
    before, after = weights(base), weights(expert)
    merge_into({"method": "average", "base": base, "experts": [tmp_path / "out"]}, tmp_path / "merged")
    for model in (folded(family, base, tmp_path / "out"), weights(tmp_path / "merged")):
        for name in before:
            wanted = after if name in {row.tensor for row in extraction.rows} else before
            torch.testing.assert_close(model[name], wanted[name], rtol=1e-5, atol=1e-6)
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is (family == "gpt2") and config["base_model_name_or_path"].endswith("base")


def test_an_adapter_folded_in_comes_out_again(tmp_path: Path) -> None:
    fresh("llama").save_pretrained(tmp_path / "base")
    adapter, whole = adapted("llama", tmp_path / "base", tmp_path, target_modules=ATTENTION, r=4, lora_alpha=8)
    extraction = extracted(tmp_path / "base", whole, tmp_path / "out", rank=4)
    assert (
        extraction.error < 1e-5
        and extraction.total_error == pytest.approx(extraction.error)
        and not extraction.left_out
    )
    frozen = [row for row in extraction.rows if not any(name in row.tensor for name in ATTENTION)]
    assert frozen and all(row.norm == row.error == 0 for row in frozen)
    again = extracted(tmp_path / "base", adapter, tmp_path / "smaller", rank=2)
    assert {row.rank for row in again.rows} == {2} and 0 < again.error < 1
    assert {row.tensor for row in again.rows} == {row.tensor for row in extraction.rows} - {
        row.tensor for row in frozen
    }


def test_modules(pair: tuple[str, Path, Path], tmp_path: Path) -> None:
    family, base, expert = pair
    if family != "llama":
        return
    names = {row.tensor for row in extracted(base, expert, tmp_path / "a", rank=1, modules=["q_proj", "*layers.1.mlp*"]).rows}  # fmt: skip
    assert names == {
        *(f"model.layers.{n}.self_attn.q_proj.weight" for n in range(2)),
        *(f"model.layers.1.mlp.{leaf}.weight" for leaf in FEED_FORWARD),
    }
    with pytest.raises(SpecError, match=r"'q_prj' is no linear layer.*did you mean 'q_proj'"):
        extracted(base, expert, tmp_path / "b", rank=1, modules=["q_prj"])
    with pytest.raises(SpecError, match="embed_tokens"):
        extracted(base, expert, tmp_path / "b", rank=1, modules=["embed_tokens"])
    assert not (tmp_path / "b").exists() and not (tmp_path / "b.tmp").exists()


FAMILIES = {
    "t5": ("T5Config", "T5ForConditionalGeneration", {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24,
                                                     "num_layers": 2, "num_heads": 4}),
    "bert": ("BertConfig", "BertForSequenceClassification", {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2,
                                                            "num_attention_heads": 2, "intermediate_size": 24}),
    "vit": ("ViTConfig", "ViTForImageClassification", {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
                                                      "intermediate_size": 24, "image_size": 8, "patch_size": 4}),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_other_shapes_of_models(family: str, tmp_path: Path) -> None:
    """Embeddings, position tables, biases and convolutions are no layers of an adapter; all linear layers are."""
    import transformers

    kind, shape, values = FAMILIES[family]
    config = getattr(transformers, kind)(**values)
    torch.manual_seed(0)
    model = getattr(transformers, shape)(config)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for value in model.parameters():
            value += 0.01 * torch.randn(value.shape)
    model.save_pretrained(tmp_path / "expert")
    extraction = extracted(tmp_path / "base", tmp_path / "expert", tmp_path / "out", rank=1000)
    tied = {"lm_head.weight"} if family == "t5" and config.tie_word_embeddings else set()
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    merge_into({"method": "average", "base": tmp_path / "base", "experts": [tmp_path / "out"]}, tmp_path / "merged")
    after, whole = weights(tmp_path / "merged"), weights(tmp_path / "expert")
    for row in extraction.rows:
        torch.testing.assert_close(after[row.tensor], whole[row.tensor], rtol=1e-5, atol=1e-6)
    assert len(extraction.rows) == len(linear - tied)
    # transformers 5 has other names for the modules of a ViT than the files have for their weights; PEFT goes by those.
    assert ({row.tensor for row in extraction.rows} == linear - tied) == (family != "vit")
    before = getattr(transformers, shape).from_pretrained(tmp_path / "base")
    merged = PeftModel.from_pretrained(before, str(tmp_path / "out")).merge_and_unload().state_dict()
    wanted = model.state_dict()
    for name in linear - tied:
        torch.testing.assert_close(merged[name], wanted[name], rtol=1e-5, atol=1e-6)


def test_one_tensor_at_a_time_and_each_once(
    pair: tuple[str, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, base, expert = pair
    read: list[str] = []
    real = FileTensors.read
    monkeypatch.setattr(FileTensors, "read", lambda self, name, *at: read.append(name) or real(self, name, *at))
    extraction = extracted(base, expert, tmp_path / "out", rank=2)
    assert set(Counter(read).values()) == {2}, "of base and expert once"
    assert all(read[at] == read[at + 1] for at in range(0, len(read), 2)), "the two of one tensor together"
    monkeypatch.undo()
    assert extracted(base, expert, tmp_path / "two", rank=2, workers=2).digest == extraction.digest


def test_what_cannot_be_done(pair: tuple[str, Path, Path], tmp_path: Path) -> None:
    family, base, expert = pair
    tensors = weights(expert)
    name = next(
        name for name in sorted(tensors) if name.endswith("c_fc.weight" if family == "gpt2" else "up_proj.weight")
    )
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/config.json").write_text((expert / "config.json").read_text())
    tensors[name][0, 0] = float("nan")
    save_file(tensors, tmp_path / "bad/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=rf"expert 'expert'.*{name}"):
        extracted(base, tmp_path / "bad", tmp_path / "out", rank=1)
    tensors[name] = torch.zeros(3, 3)
    save_file(tensors, tmp_path / "bad/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MismatchError, match=name):
        extracted(base, tmp_path / "bad", tmp_path / "out", rank=1)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()


def test_the_command(pair: tuple[str, Path, Path], tmp_path: Path) -> None:
    _, base, expert = pair
    options = ["--base", str(base), "--rank", "2", "--dtype", "bfloat16", "--durable", "--workers", "1"]
    said = CliRunner().invoke(main, ["extract-lora", str(expert), str(tmp_path / "out"), *options])
    assert said.exit_code == 0, said.output
    record = json.loads((tmp_path / "out/extraction.json").read_text())
    assert f"lost of the whole change: {record['total_error']:.3%}" in said.output
    for name, row in record["tensors"].items():
        assert any(name in line and f"{row['error']:.3%}" in line for line in said.output.splitlines())
    factors = load_file(tmp_path / "out/adapter_model.safetensors")
    assert {value.dtype for value in factors.values()} == {torch.bfloat16}
    assert f"{record['total_error']:.4%}" in (tmp_path / "out/README.md").read_text()
    again = CliRunner().invoke(main, ["extract-lora", str(expert), str(tmp_path / "out"), *options])
    assert again.exit_code == 1 and "exists already" in again.output
