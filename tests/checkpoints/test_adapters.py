"""LoRA adapters against PEFT itself, which folds the same factors into the same base."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mergecore import merge
from mergecore.checkpoints.experts import ROWS, AdapterExpert, adapter_factors
from mergecore.engine import pass_plan as passes
from mergecore.engine import windows as reading
from mergecore.errors import MismatchError, SourceError
from mergecore.events import silent
from mergecore.methods import Average
from mergecore.planning.pool import Pool, resolve_pool
from mergecore.registry import METHODS
from mergecore.spec.sources import BaseSpec, ExpertSpec
from mergecore.tensors.source import TensorInfo
from mergeloom.testing.grid import set_grid
from tests.recipe_files import find, merge_into

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ATTENTION, "r": 4, "lora_alpha": 6}),
    "rslora": ("llama", {"target_modules": ATTENTION, "r": 3, "lora_alpha": 5, "use_rslora": True}),
    "ranks": (
        "llama",
        {
            "target_modules": ATTENTION,
            "r": 4,
            "lora_alpha": 8,
            "rank_pattern": {"q_proj": 2, r"layers\.1\..*v_proj": 7},
        },
    ),
    "alphas": (
        "llama",
        {
            "target_modules": [*ATTENTION, *FEED_FORWARD],
            "r": 2,
            "lora_alpha": 4,
            "alpha_pattern": {"o_proj": 1, r"model.layers.0.mlp.down_proj": 16, "proj": 99},
            "rank_pattern": {"down_proj": 5},
            "use_rslora": True,
        },
    ),
    "feed-forward": ("llama", {"target_modules": FEED_FORWARD, "r": 2, "lora_alpha": 8}),
    "some-layers": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "r": 2, "lora_alpha": 8}),
    "head": ("llama", {"target_modules": ["q_proj", "lm_head"], "r": 2, "lora_alpha": 8}),
    "gpt2": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "r": 3, "lora_alpha": 4, "fan_in_fan_out": True}),
    "gpt2-unsaid": ("gpt2", {"target_modules": ["c_fc", "c_proj"], "r": 3, "lora_alpha": 4, "use_rslora": True}),
    "orthogonal": ("llama", {"target_modules": ATTENTION, "r": 4, "init_lora_weights": "orthogonal"}),
}


def fresh(family: str, seed: int = 0) -> nn.Module:
    """A tiny model in float32 whose embeddings are not tied."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=32, n_embd=24, n_layer=2, n_head=2))
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    )


def adapted(family: str, base: Path, folder: Path, seed: int = 1, **values: Any) -> tuple[Path, Path]:
    """(adapter as PEFT saves it, the full checkpoint that PEFT folds it into); both factors are random."""
    torch.manual_seed(seed)
    model = fresh(family)
    model.load_state_dict(load_file(base / "model.safetensors"), strict=False)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **values))
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn(value.shape) * 0.1)
    wrapped.save_pretrained(folder / "adapter", save_embedding_layers=False)
    wrapped.merge_and_unload().save_pretrained(folder / "folded")
    return folder / "adapter", folder / "folded"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved base of each family."""
    folders = {family: tmp_path_factory.mktemp("bases") / family for family in ("llama", "gpt2")}
    for family, folder in folders.items():
        fresh(family).save_pretrained(folder)
    return folders


@pytest.fixture
def llama(bases: dict[str, Path], tmp_path: Path) -> tuple[Path, Path]:
    """The base and a plain adapter that a test may spoil."""
    adapter, _ = adapted("llama", bases["llama"], tmp_path, **KINDS["plain"][1])
    return bases["llama"], adapter


def pooled(base: Path, *experts: Path) -> Pool:
    members = [ExpertSpec(source=str(path), name=f"e{number}") for number, path in enumerate(experts)]
    return resolve_pool(BaseSpec(source=str(base)), members, None, find, silent)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def close(left: dict[str, Tensor], right: dict[str, Tensor], rtol: float = 1e-6, atol: float = 1e-6) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_folded_as_peft_folds(kind: str, bases: dict[str, Path], tmp_path: Path) -> None:
    family, values = KINDS[kind]
    adapter, folded = adapted(family, bases[family], tmp_path, **values)
    merge_into({"method": "average", "base": bases[family], "experts": [adapter]}, tmp_path / "out")
    actual, wanted = weights(tmp_path / "out"), weights(folded)
    close(actual, wanted)
    before = weights(bases[family])
    touched = {name for name in before if not torch.equal(before[name], wanted[name])}
    assert touched == set(pooled(bases[family], adapter).experts["e0"].carried())
    assert all(torch.equal(actual[name], before[name]) for name in before if name not in touched)


def test_names_with_the_adapters_own_name_in_them(llama: tuple[Path, Path], tmp_path: Path) -> None:
    """Some tools save the state dict as it stands in memory, `.default` included."""
    base, adapter = llama
    merge_into({"method": "average", "base": base, "experts": [adapter]}, tmp_path / "before")
    path = adapter / "adapter_model.safetensors"
    stored_tensors = {re.sub(r"(lora_[AB])", r"\1.default", name): value for name, value in load_file(path).items()}
    assert all(".default.weight" in name for name in stored_tensors)
    save_file(stored_tensors, path)
    merge_into({"method": "average", "base": base, "experts": [adapter]}, tmp_path / "after")
    close(weights(tmp_path / "after"), weights(tmp_path / "before"), 0, 0)


METHOD_VALUES: dict[str, list[dict[str, Any]]] = {
    "average": [{}, {"weights": [1, 3, 2]}],
    "task_arithmetic": [{"scale": 0.7}],
    "ties": [{"density": 0.6}, {"density": 0.6, "scope": "tensor", "aggregate": "sum"}],
}


@pytest.mark.parametrize("name", METHOD_VALUES)
def test_merged_adapters_are_merged_checkpoints(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """Targets differ over the experts; a checkpoint stands among the adapters. Only rounding tells them apart.

    A density counts what is selected, and a checkpoint carries more than an adapter: so the targets are selected here.
    """
    base = bases["llama"]
    adapters, folded = zip(
        *(
            adapted("llama", base, tmp_path / kind, seed=seed, **KINDS[kind][1])
            for seed, kind in enumerate(("plain", "alphas", "head"))
        ),
        strict=True,
    )
    select = [
        {"names": name} for name in sorted(set[str]().union(*(m.carried() for m in pooled(base, *adapters).members)))
    ]
    mixed = [adapters[0], folded[1], adapters[2]]
    for number, values in enumerate(METHOD_VALUES[name]):
        actual = []
        for label, experts in (("adapters", adapters), ("mixed", mixed), ("folded", folded)):
            out = tmp_path / f"{label}-{number}"
            experts_named = [{"source": path, "name": f"e{position}"} for position, path in enumerate(experts)]
            merge_into({"method": name, "base": base, "experts": experts_named, "select": select, **values}, out)
            actual.append(weights(out))
        if name != "ties":
            close(actual[0], actual[2])
            close(actual[1], actual[2])
            continue
        # Where the sum of two is next to zero rounding decides the sign, and at the threshold it decides who is kept.
        for adapter_made in actual[:2]:
            differing = sum(
                int((~torch.isclose(adapter_made[n], actual[2][n], rtol=1e-4, atol=1e-6)).sum()) for n in adapter_made
            )
            assert differing <= 0.002 * sum(value.numel() for value in adapter_made.values())


def test_every_method_takes_adapters() -> None:
    assert set(METHOD_VALUES) | {"fisher"} >= set(METHODS) & {"average", "task_arithmetic", "ties", "fisher"}


def test_fixed_blocks_of_rows(tmp_path: Path) -> None:
    """The delta has the same bytes however it is cut: products are formed over blocks of ROWS rows, always the same."""
    rows, columns = 2 * ROWS + 37, 29
    stored_tensors = {
        "a": torch.randn(5, columns),
        "b": torch.randn(rows, 5),
        "c": torch.randn(5, rows),
        "d": torch.randn(columns, 5),
    }
    from mergecore.checkpoints.experts import Factor
    from mergecore.tensors.memory import MemoryTensors

    for factor in (Factor("a", "b", 0.37, False), Factor("c", "d", 0.37, True)):
        expert = AdapterExpert("id", "name", MemoryTensors(stored_tensors), {"w": factor}, {"w": (rows, columns)})
        whole = expert.block("w", 0, rows * columns)
        left, right = (
            (stored_tensors["b"], stored_tensors["a"])
            if not factor.transposed
            else (stored_tensors["c"].T, stored_tensors["d"].T)
        )
        torch.testing.assert_close(whole.view(rows, columns), (left @ right) * 0.37, rtol=1e-5, atol=1e-5)
        for step in (7, columns, 1000, ROWS * columns, ROWS * columns + 1):
            pieces = [expert.block("w", at, min(at + step, rows * columns)) for at in range(0, rows * columns, step)]
            assert torch.equal(torch.cat(pieces), whole)


def test_the_same_bytes_for_any_span_and_grid(
    llama: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = llama
    recipe = {"method": "ties", "density": 0.4, "base": base, "experts": [adapter]}
    first = merge_into(recipe, tmp_path / "first")
    monkeypatch.setattr(passes.plan_spans, "__defaults__", (1,))
    monkeypatch.setattr(reading, "WINDOWS", (17, 17))
    assert merge_into(recipe, tmp_path / "second").digest == first.digest
    set_grid(monkeypatch, 100)
    merge_into(recipe, tmp_path / "third")
    assert (tmp_path / "third/model.safetensors").read_bytes() == (tmp_path / "first/model.safetensors").read_bytes()


# --- refused ------------------------------------------------------------------------------------------------------


def test_embeddings_are_refused_by_name(bases: dict[str, Path], tmp_path: Path) -> None:
    adapter, _ = adapted("llama", bases["llama"], tmp_path, target_modules=["embed_tokens"], r=2)
    with pytest.raises(MismatchError, match=r"e0.*embed_tokens.*merge_and_unload"):
        pooled(bases["llama"], adapter)


def test_a_copy_of_a_base_weight_is_refused_by_name(bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT saves the base's head along with an adapter on it; whether it is still the base's nobody can say."""
    wrapped = get_peft_model(fresh("llama"), LoraConfig(target_modules=["lm_head"], r=2))
    wrapped.save_pretrained(tmp_path / "adapter")
    with pytest.raises(MismatchError, match=r"lm_head\.base_layer\.weight.*merge_and_unload"):
        pooled(bases["llama"], tmp_path / "adapter")


def test_a_target_that_is_tied_is_refused(tmp_path: Path) -> None:
    """The file may hold the head or not: PEFT changes the head, the base has only one tensor for both."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                         num_attention_heads=4, tie_word_embeddings=True)  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    wrapped = get_peft_model(model, LoraConfig(target_modules=["lm_head"], r=2))
    wrapped.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if "lora_" in name}, path)
    for with_head in (False, True):
        if with_head:
            stored_tensors = weights(tmp_path / "base")
            stored_tensors["lm_head.weight"] = stored_tensors["model.embed_tokens.weight"].clone()
            save_file(stored_tensors, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
        with pytest.raises(MismatchError, match=r"lm_head\.weight.*ties.*embed_tokens.*without this target"):
            pooled(tmp_path / "base", tmp_path / "adapter")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"use_dora": True}, r"use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\]"),
        ({"bias": "all"}, r"bias='all'"),
        ({"lora_bias": True}, r"lora_bias=True"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, r"init_lora_weights='olora'"),
        ({"trainable_token_indices": [1, 2]}, r"trainable_token_indices"),
        ({"layer_replication": [[0, 2], [1, 2]]}, r"layer_replication"),
        ({"alora_invocation_tokens": [1, 2]}, r"alora_invocation_tokens"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_more_than_a_low_rank_update_is_refused(
    values: dict[str, Any], said: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2, **values)
    get_peft_model(fresh("llama"), config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(MismatchError, match=rf"expert 'e0'.*{said}.*merge_and_unload"):
        pooled(bases["llama"], tmp_path / "adapter")


def test_the_part_taken_out_of_the_base_really_matters(bases: dict[str, Path], tmp_path: Path) -> None:
    """Why PiSSA is refused: what PEFT folds is not base + factors."""
    torch.manual_seed(0)
    model = fresh("llama")
    model.load_state_dict(weights(bases["llama"]))
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights="pissa"))
    wrapped.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": True}))
    merge_into({"method": "average", "base": bases["llama"], "experts": [tmp_path / "adapter"]}, tmp_path / "out")
    wrapped.merge_and_unload().save_pretrained(tmp_path / "folded")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (weights(tmp_path / "out")[name] - weights(tmp_path / "folded")[name]).abs().max() > 0.01


def test_another_kind_of_adapter_is_refused(llama: tuple[Path, Path]) -> None:
    base, adapter = llama
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LOHA"}))
    with pytest.raises(MismatchError, match=r"LOHA.*fold"):
        pooled(base, adapter)


def spoil(adapter: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file({name: value.contiguous() for name, value in change(load_file(path)).items()}, path)


def test_an_adapter_for_another_base_is_refused(llama: tuple[Path, Path], bases: dict[str, Path]) -> None:
    base, adapter = llama
    with pytest.raises(MismatchError, match=r"q_proj\.weight' is not in the base; is this the adapter's base\?|k_proj"):
        pooled(bases["gpt2"], adapter)
    spoil(
        adapter, lambda stored_tensors: {n: v[:, :-1] if "q_proj.lora_A" in n else v for n, v in stored_tensors.items()}
    )
    with pytest.raises(
        MismatchError, match=r"q_proj\.weight' has shape \[32, 31\], the base has \[32, 32\].*another base"
    ):
        pooled(base, adapter)


def test_an_adapter_that_is_not_whole_is_refused(llama: tuple[Path, Path]) -> None:
    base, adapter = llama
    spoil(
        adapter,
        lambda stored_tensors: {n: v for n, v in stored_tensors.items() if "layers.1.self_attn.v_proj.lora_B" not in n},
    )
    with pytest.raises(MismatchError, match=r"v_proj\.lora_A.*has no.*v_proj\.lora_B.*incomplete"):
        pooled(base, adapter)
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(SourceError, match=r"no adapter_config\.json, which says rank and scaling"):
        pooled(base, adapter)


def test_a_recipe_without_base_needs_a_checkpoint_first(llama: tuple[Path, Path], tmp_path: Path) -> None:
    from mergecore.errors import SpecError

    _, adapter = llama
    with pytest.raises(SpecError, match="is an adapter; give the checkpoint it was trained on"):
        merge_into({"method": "average", "experts": [adapter]}, tmp_path / "out")


def test_in_memory_and_folded_agree(llama: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = llama
    merge_into({"method": "average", "base": base, "experts": [adapter]}, tmp_path / "one")
    stored_tensors = weights(tmp_path / "one")
    close(merge(Average(), experts=[stored_tensors, stored_tensors]), stored_tensors, 0, 0)


BASE_OF_ONE = {"m.weight": TensorInfo("F32", (4, 6))}


@pytest.mark.parametrize(
    ("config", "shapes", "said"),
    [
        (
            {"lora_alpha": "sixteen"},
            ((2, 6), (4, 2)),
            "lora_alpha in its adapter_config.json must be a number .*'sixteen'",
        ),
        ({"lora_alpha": True}, ((2, 6), (4, 2)), "lora_alpha .* must be a number .given: True"),
        ({"lora_alpha": 10**400}, ((2, 6), (4, 2)), "lora_alpha .* must be a number"),
        ({"lora_alpha": None}, ((2, 6), (4, 2)), "lora_alpha .* must be a number"),
        ({"alpha_pattern": {"m": [1]}}, ((2, 6), (4, 2)), "alpha_pattern of 'm' in its .* must be a number"),
        ({"alpha_pattern": ["m"]}, ((2, 6), (4, 2)), "alpha_pattern in its .* must map modules to numbers"),
        ({"alpha_pattern": {"(": 1}}, ((2, 6), (4, 2)), "alpha_pattern in its .*not a regular expression"),
        ({}, ((0, 6), (4, 0)), "'m.lora_A.weight' .0, 6. and 'm.lora_B.weight' .4, 0. are empty"),
        ({}, ((), ()), "'m.lora_A.weight' .. and 'm.lora_B.weight' .. make no matrix product"),
        ({}, ((), (4, 2)), "make no matrix product"),
        ({}, ((2,), (4, 2)), "make no matrix product"),
    ],
)
def test_adapters_that_cannot_be_meant(config: dict[str, Any], shapes: Any, said: str) -> None:
    names = ("m.lora_A.weight", "m.lora_B.weight")
    factors = {name: TensorInfo("F32", shape) for name, shape in zip(names, shapes, strict=True)}
    with pytest.raises(MismatchError, match=f"expert 'e'.*{said}"):
        adapter_factors(factors, config, BASE_OF_ONE, "expert 'e'", {})
