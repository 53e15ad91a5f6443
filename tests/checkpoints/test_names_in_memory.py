"""Names in files are not names in memory: what transformers and PEFT load together is merged, folded and extracted."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mergecore.checkpoints.blueprint import blueprint_of, in_memory, why_unknown
from mergecore.checkpoints.peft_rules import check_loads, closed
from mergecore.engine.executor import InProcess
from mergecore.errors import MismatchError
from mergecore.events import silent
from mergecore.planning.pool import resolve_pool
from mergecore.recipes.extract_lora import Extracted, extract_lora
from mergecore.spec.sources import BaseSpec, ExpertSpec
from mergecore.tensors.source import TensorInfo
from tests.recipe_files import find, merge_into

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip


def vision_language() -> nn.Module:
    text = {**SIZES, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32,
              "patch_size": 4, "fullatt_block_indexes": [1]}  # fmt: skip
    tokens = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **tokens)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def bert(shape: str) -> nn.Module:
    values = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
              "intermediate_size": 24}  # fmt: skip
    return getattr(transformers, shape)(transformers.BertConfig(**values))


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=96, n_positions=32, n_embd=24, n_layer=2, n_head=2)
    return transformers.GPT2LMHeadModel(config)


def moved(model: nn.Module, seed: int) -> nn.Module:
    """The model with every parameter changed a little."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape, generator=draw) * 0.02)
    return model


def saved(folder: Path, **models: nn.Module) -> list[Path]:
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return [folder / name for name in models]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def loaded(model_class: Any, folder: Path) -> dict[str, Tensor]:
    """The state dict as transformers loads it; every tensor of the model stands in the files."""
    model, report = model_class.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"], report
    return dict(model.state_dict())


def close(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def mean(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: (first[name] + second[name]) / 2 for name in first}


def extracted(base: Path, expert: Path, out: Path, rank: int) -> Extracted:
    source = ExpertSpec(source=str(expert), name="expert")
    return extract_lora(source, BaseSpec(source=str(base)), out, find, InProcess(), silent, rank=rank)


def test_gpt2_as_on_the_hub_with_experts_that_transformers_saved(tmp_path: Path) -> None:
    """The base has no 'transformer.' before its names, and mask buffers; the result is named like the base."""
    base, a, b = saved(tmp_path, base=gpt2(), a=moved(gpt2(), 1), b=moved(gpt2(), 2))
    masks = {f"h.{layer}.attn.bias": torch.tril(torch.ones(1, 1, 32, 32)) for layer in range(2)}
    rewrite(base, {name.removeprefix("transformer."): value for name, value in weights(base).items()} | masks)
    merge_into({"method": "average", "base": base, "experts": [a, b]}, tmp_path / "out")
    assert weights(tmp_path / "out").keys() == weights(base).keys()
    shape = transformers.GPT2LMHeadModel
    close(loaded(shape, tmp_path / "out"), mean(loaded(shape, a), loaded(shape, b)))


def test_an_adapter_and_an_extraction_on_gpt2_as_on_the_hub(tmp_path: Path) -> None:
    """An adapter's names have 'transformer.', the base's have not; a whole expert is the other way round."""
    base, a = saved(tmp_path, base=gpt2(), a=moved(gpt2(), 1))
    lora = LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=True)
    wrapped = get_peft_model(transformers.GPT2LMHeadModel.from_pretrained(base), lora)
    wrapped.save_pretrained(tmp_path / "lora")
    for folder in (base, a):
        rewrite(folder, {name.removeprefix("transformer."): value for name, value in weights(folder).items()})
        assert "h.0.attn.c_attn.weight" in weights(folder)
    shape = transformers.GPT2LMHeadModel
    merge_into({"method": "average", "base": base, "experts": [tmp_path / "lora"]}, tmp_path / "out")
    close(loaded(shape, tmp_path / "out"), wrapped.merge_and_unload().state_dict())
    extracted(base, a, tmp_path / "xl", 100)
    folded = (
        PeftModel.from_pretrained(shape.from_pretrained(base), str(tmp_path / "xl")).merge_and_unload().state_dict()
    )
    after = loaded(shape, a)
    for name in ("transformer.h.1.mlp.c_proj.weight", "transformer.h.0.attn.c_attn.weight"):
        torch.testing.assert_close(folded[name], after[name], rtol=1e-5, atol=1e-6)


def test_a_trunk_as_the_base_of_models_with_heads(tmp_path: Path) -> None:
    """A BertModel as the base; one expert has a head, one has a trunk whose norms are called gamma and beta."""
    heads, other = bert("BertForSequenceClassification"), moved(bert("BertModel"), 2)
    base, a, b = saved(tmp_path, base=bert("BertModel"), a=moved(heads, 1), b=other)
    assert all(name.startswith(("bert.", "classifier.")) for name in weights(a))
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = {}
    for name, value in weights(b).items():
        end = next((end for end in old if name.endswith(end)), "")
        renamed[name.removesuffix(end) + old.get(end, "")] = value
    assert any(name.endswith("gamma") for name in renamed)
    rewrite(b, renamed)
    recipe = {"method": "average", "base": base, "experts": [a, b]}
    with pytest.raises(
        MismatchError, match=r"'classifier\.bias', 'classifier\.weight', unknown to the base; a task's head"
    ):
        merge_into(recipe, tmp_path / "out")
    drop = [{"names": "classifier.*", "take": "drop"}, {}]
    merge_into({**recipe, "select": drop}, tmp_path / "out")
    shape = transformers.BertModel
    trunk = {
        name.removeprefix("bert."): value for name, value in heads.state_dict().items() if name.startswith("bert.")
    }
    close(loaded(shape, tmp_path / "out"), mean(trunk, dict(other.state_dict())))


def test_an_adapter_trained_on_the_trunk(tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=False))
    (base,) = saved(tmp_path, base=model)
    lora = LoraConfig(task_type="FEATURE_EXTRACTION", r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(transformers.AutoModel.from_pretrained(base), lora).save_pretrained(tmp_path / "lora")
    merge_into({"method": "average", "base": base, "experts": [tmp_path / "lora"]}, tmp_path / "out")
    trunk = transformers.AutoModel.from_pretrained(base)
    wanted = PeftModel.from_pretrained(trunk, str(tmp_path / "lora")).merge_and_unload().state_dict()
    result = loaded(transformers.AutoModel, tmp_path / "out")
    close(result, wanted)
    assert not torch.equal(
        result["layers.0.self_attn.q_proj.weight"], weights(base)["model.layers.0.self_attn.q_proj.weight"]
    )


def test_an_adapter_of_a_vision_language_model_is_folded_as_peft_folds_it(tmp_path: Path) -> None:
    (base,) = saved(tmp_path, base=vision_language())
    assert "model.layers.0.self_attn.q_proj.weight" in weights(base)
    shape = transformers.Qwen2_5_VLForConditionalGeneration
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "qkv"], init_lora_weights=False)
    wrapped = get_peft_model(shape.from_pretrained(base), lora)
    wrapped.save_pretrained(tmp_path / "lora")
    merge_into({"method": "average", "base": base, "experts": [tmp_path / "lora"]}, tmp_path / "out")
    result, before = loaded(shape, tmp_path / "out"), loaded(shape, base)
    close(result, wrapped.merge_and_unload().state_dict())
    changed = {name for name in result if not torch.equal(result[name], before[name])}
    assert len(changed) == 2 * 2 + 2 and "model.visual.blocks.1.attn.qkv.weight" in changed


def test_an_adapter_of_adapters_of_a_vision_language_model(tmp_path: Path) -> None:
    """What `lora_arithmetic` makes of one adapter is that adapter, for PEFT and for us."""
    (base,) = saved(tmp_path, base=vision_language())
    shape = transformers.Qwen2_5_VLForConditionalGeneration
    lora = LoraConfig(r=2, target_modules=["q_proj", "qkv"], init_lora_weights=False)
    wrapped = get_peft_model(shape.from_pretrained(base), lora)
    wrapped.save_pretrained(tmp_path / "lora")
    wanted = wrapped.merge_and_unload().state_dict()
    for dtype in ("float32", "float16"):
        recipe = {"method": "lora_arithmetic", "base": base, "experts": [tmp_path / "lora"], "dtype": dtype}
        merge_into(recipe, tmp_path / dtype)
    before = shape.from_pretrained(base)
    close(PeftModel.from_pretrained(before, str(tmp_path / "float32")).merge_and_unload().state_dict(), wanted)
    names = {
        folder: set(load_file(tmp_path / folder / "adapter_model.safetensors"))
        for folder in ("lora", "float32", "float16")
    }
    assert names["lora"] == names["float32"] == names["float16"]
    merge_into({"method": "average", "base": base, "experts": [tmp_path / "float32"]}, tmp_path / "out")
    close(loaded(shape, tmp_path / "out"), wanted)


@pytest.mark.parametrize("rank", [16, 64])
def test_what_is_extracted_of_a_vision_language_model_peft_gives_to_every_module(rank: int, tmp_path: Path) -> None:
    """Names are those in memory, also in rank_pattern, which rank 64 needs: modules are of several sizes."""
    torch.manual_seed(0)
    base, a = saved(tmp_path, base=vision_language(), a=moved(vision_language(), 1))
    extraction = extracted(base, a, tmp_path / "out", rank)
    shape = transformers.Qwen2_5_VLForConditionalGeneration
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of missing keys and of patterns that match nothing
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        folded = PeftModel.from_pretrained(shape.from_pretrained(base), str(tmp_path / "out")).merge_and_unload()
    result, before, after = dict(folded.state_dict()), loaded(shape, base), loaded(shape, a)
    linear = {f"{name}.weight" for name, module in folded.named_modules() if isinstance(module, nn.Linear)}
    assert len(linear) == len(extraction.rows) == 27
    for name in result:
        assert torch.equal(result[name], before[name]) == (name not in linear)
    if rank == 64:
        close({name: result[name] for name in linear}, {name: after[name] for name in linear})
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert all(name == "lm_head" or name.startswith("model\\.") for name in config["rank_pattern"])
    assert bool(config["rank_pattern"]) == (rank == 64)
    merge_into({"method": "average", "base": base, "experts": [tmp_path / "out"]}, tmp_path / "merged")
    close(loaded(shape, tmp_path / "merged"), result)  # we read it back as PEFT does


def test_the_check_of_an_extracted_adapter_knows_pefts_rules() -> None:
    """Each fault that PEFT would pass over with a warning, or with none, is told."""
    config = json.loads(vision_language().config.to_json_string())
    blueprint = blueprint_of({**config, "architectures": ["Qwen2_5_VLForConditionalGeneration"]})
    assert blueprint is not None
    module = "model.language_model.layers.0.self_attn.q_proj"
    stem = f"base_model.model.{module}"
    tensors = {f"{stem}.lora_A.weight": TensorInfo("F32", (2, 32)), f"{stem}.lora_B.weight": TensorInfo("F32", (32, 2))}
    lora: dict[str, Any] = {"r": 2, "rank_pattern": {}, "target_modules": [module]}
    check_loads(lora, tensors, blueprint, "out")
    as_in_files = {name.replace("language_model.", ""): info for name, info in tensors.items()}
    for wrong, names, said in [
        ({"target_modules": ["q_proj"]}, tensors, "lacks .*layers.1.self_attn.q_proj"),
        ({"target_modules": ["k_proj"]}, tensors, "has .*q_proj.* for no module"),
        ({"target_modules": ["norm1"]}, tensors, "'model.visual.blocks.0.norm1'.* no linear layer"),
        ({"rank_pattern": {"q_proj": 3}}, tensors, r"expects .*\[3, 32\]; it has \[2, 32\]"),
        ({}, as_in_files, "which is loaded as .model.language_model"),
    ]:
        with pytest.raises(MismatchError, match=said):
            check_loads({**lora, **wrong}, names, blueprint, "out")


@pytest.mark.parametrize(
    ("config", "module", "why"),
    [
        ({"model_type": "pi0"}, "embed_action_time.action_in_proj", "renames them once more"),
        ({"model_type": "mamba", "num_hidden_layers": 1}, "backbone.layers.0.mixer.out_proj", "Mamba kernel"),
        ({"model_type": "deepseek_v3", "num_hidden_layers": 1}, "model.layers.0.mlp.up_proj", "for the experts"),
    ],
)
def test_layers_that_peft_gives_no_update_of_their_own(config: dict[str, Any], module: str, why: str) -> None:
    shapes = {"pi0": "PI0ForConditionalGeneration", "mamba": "MambaForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}
    blueprint = blueprint_of({**config, "architectures": [shapes[config["model_type"]]]})
    assert blueprint is not None and why in closed(blueprint, [module])[module]
    assert closed(blueprint, ["lm_head"]) == {}
    with pytest.raises(MismatchError, match=why):
        check_loads({"r": 1, "rank_pattern": {}, "target_modules": [module]}, {}, blueprint, "out")


def test_experts_that_a_file_keeps_apart_are_no_layers_of_an_adapter(tmp_path: Path) -> None:
    """A mixture of experts is one tensor in memory: no linear layer, for PEFT either. What is left out is said."""
    values = {**SIZES, "num_local_experts": 2, "num_experts_per_tok": 1, "tie_word_embeddings": False}
    base, a, b = saved(
        tmp_path, **{name: moved(transformers.MixtralForCausalLM(transformers.MixtralConfig(**values)), seed)
                     for seed, name in enumerate(("base", "a", "b"))}
    )  # fmt: skip
    experts = {name for name in weights(base) if ".experts." in name}
    assert len(experts) == 2 * 2 * 3
    merge_into({"method": "average", "base": base, "experts": [a, b]}, tmp_path / "merged")
    shape = transformers.MixtralForCausalLM
    close(loaded(shape, tmp_path / "merged"), mean(loaded(shape, a), loaded(shape, b)))
    extraction = extracted(base, a, tmp_path / "out", 32)
    assert experts <= {row.tensor for row in extraction.left_out}
    folded = PeftModel.from_pretrained(shape.from_pretrained(base), str(tmp_path / "out")).merge_and_unload()
    after = loaded(shape, a)
    for name in ("model.layers.1.self_attn.o_proj.weight", "lm_head.weight"):
        torch.testing.assert_close(folded.state_dict()[name], after[name], rtol=1e-5, atol=1e-6)


def test_a_target_that_is_a_part_of_a_tensor_in_the_files_is_refused(tmp_path: Path) -> None:
    """Where transformers cuts or stacks tensors while it loads them, an adapter's module is no tensor of the files."""
    values = {**SIZES, "num_local_experts": 2, "num_experts_per_tok": 1}
    (base,) = saved(tmp_path, base=transformers.MixtralForCausalLM(transformers.MixtralConfig(**values)))
    config = json.loads((base / "config.json").read_text())
    memory = in_memory(config, weights(base))
    assert memory["model.layers.0.block_sparse_moe.experts.1.w2.weight"] == "model.layers.0.mlp.experts.1.w2.weight"
    adapter = tmp_path / "lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    stem = "base_model.model.model.layers.0.mlp.experts.down_proj"
    factors = {f"{stem}.lora_A.weight": torch.ones(1, 4), f"{stem}.lora_B.weight": torch.ones(4, 1)}
    save_file(factors, adapter / "adapter_model.safetensors")
    with pytest.raises(MismatchError, match=r"'model.layers.0.mlp.experts.down_proj.weight' is not in the base"):
        resolve_pool(BaseSpec(source=str(base)), [ExpertSpec(source=str(adapter), name="e")], None, find, silent)


@pytest.mark.parametrize("whole", ["base", "a"])
def test_experts_kept_apart_in_one_file_and_stacked_in_another_are_refused(whole: str, tmp_path: Path) -> None:
    values = {**SIZES, "num_local_experts": 2, "num_experts_per_tok": 1, "tie_word_embeddings": False}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**values))
    saved(tmp_path, base=model, a=moved(model, 1))
    rewrite(tmp_path / whole, dict(model.state_dict()))
    recipe = {"method": "average", "base": tmp_path / "base", "experts": [{"source": str(tmp_path / "a"), "name": "a"}]}
    said = {
        "base": r"^the base .*gate_up_proj', as .*; expert 'a'",
        "a": r"^expert 'a' .*gate_up_proj', as .*; the base",
    }
    with pytest.raises(
        MismatchError, match=said[whole] + r".* has .*experts\.0\.w1.*save it again with save_pretrained"
    ):
        merge_into(recipe, tmp_path / "out")


def test_two_tensors_of_an_expert_that_are_one_of_the_base(tmp_path: Path) -> None:
    base, a = saved(tmp_path, base=gpt2(), a=moved(gpt2(), 1))
    rewrite(a, weights(a) | {"wpe.weight": weights(a)["transformer.wpe.weight"].clone()})
    with pytest.raises(MismatchError, match=r"expert 'a'.*'transformer\.wpe\.weight' and 'wpe\.weight' are both"):
        merge_into({"method": "average", "base": base, "experts": [{"source": str(a), "name": "a"}]}, tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "names no model type"),
        (
            {"model_type": "of-my-own", "auto_map": {"AutoModel": "modeling.Mine"}},
            "brings no model of type 'of-my-own'",
        ),
        ({"model_type": "llama", "num_hidden_layers": 10**9}, "num_hidden_layers = 1000000000"),
        ({"model_type": "llama", "hidden_size": "wide"}, "cannot build a 'llama'"),
    ],
)
def test_a_model_that_transformers_does_not_build(config: dict[str, Any], said: str) -> None:
    """Names stay as they are; no code of a checkpoint is run."""
    assert blueprint_of(config) is None and said in why_unknown(config)
    assert in_memory(config, ["a.weight"]) == {"a.weight": "a.weight"}


def test_what_a_config_asks_of_hardware_changes_no_name() -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1,
              "_attn_implementation": "flash_attention_2", "quantization_config": {"quant_method": "awq"}}  # fmt: skip
    assert blueprint_of(config) is not None
    assert in_memory(config, ["layers.0.mlp.up_proj.weight"]) == {
        "layers.0.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight"
    }


def test_an_ordinary_merge_does_not_import_transformers(tmp_path: Path) -> None:
    """Its start would take seconds longer. Names are the same, and config.json says what is tied."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    base, a = saved(tmp_path, base=model, a=moved(transformers.LlamaForCausalLM(model.config), 1))
    code = (
        "import sys\nfrom mergecore.planning.pool import resolve_pool\nfrom tests.recipe_files import find\n"
        "from mergecore.events import silent\nfrom mergecore.spec.sources import BaseSpec, ExpertSpec\n"
        f"pool = resolve_pool(BaseSpec(source={str(base)!r}), [ExpertSpec(source={str(a)!r}, name='a')], None, find, silent)\n"
        "from mergecore.checkpoints.layout import lay_out\n"
        "lay_out(pool.base.tensors, pool.base.config, [pool.base.tensors])\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
