"""Tiny Llama-shaped checkpoints, the same numbers on every machine: mergekit and we merge them and are compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, INNER, VOCABULARY, LAYERS = 4, 6, 8, 4
LAYER = {
    "input_layernorm.weight": (HIDDEN,),
    "mlp.down_proj.weight": (HIDDEN, INNER),
    "mlp.gate_proj.weight": (INNER, HIDDEN),
    "mlp.up_proj.weight": (INNER, HIDDEN),
    "post_attention_layernorm.weight": (HIDDEN,),
    "self_attn.k_proj.weight": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
    "self_attn.v_proj.weight": (HIDDEN // 2, HIDDEN),
}
DEPTHS = {"base": LAYERS, "a": LAYERS, "b": LAYERS, "c": LAYERS, "deep": 6}
RANK, ALPHA = 2, 4


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model of so many layers."""
    held = {f"model.layers.{n}.{name}": shape for n in range(layers) for name, shape in LAYER.items()}
    ends = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    return {**held, **ends, "model.norm.weight": (HIDDEN,)}


def numbers(seed: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers between −1 and 1 by a hash, no two of equal magnitude: nothing depends on how equal ones are ordered."""
    count = torch.Size(shape).numel()
    words = (hashlib.sha256(f"{seed} {position}".encode()).digest() for position in range(count))
    signed = [(int.from_bytes(word[:3], "big") / (1 << 23) - 1.0) for word in words]
    return torch.tensor(signed, dtype=torch.float32).reshape(shape)


def weights(model: str) -> dict[str, Tensor]:
    """A model's tensors: the base's, and for the experts of its shape a change of a third of their size added."""
    own = {name: numbers(f"{model} {name}", shape) for name, shape in shapes(DEPTHS[model]).items()}
    if model in ("base", "deep"):
        return own
    base = {name: numbers(f"base {name}", shape) for name, shape in shapes(DEPTHS[model]).items()}
    return {name: base[name] + 0.3 * own[name] for name in own}


def adapter() -> dict[str, Tensor]:
    """A LoRA adapter of the base's query and down projections."""
    held = {}
    for name, (rows, columns) in ((n, s) for n, s in shapes(LAYERS).items() if "q_proj" in n or "down_proj" in n):
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        held[f"{stem}.lora_A.weight"] = numbers(f"down {name}", (RANK, columns))
        held[f"{stem}.lora_B.weight"] = numbers(f"up {name}", (rows, RANK))
    return held


def write_models(folder: Path) -> None:
    """Every checkpoint as a folder named like it, and the adapter as `lora`."""
    for model, layers in DEPTHS.items():
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
            "intermediate_size": INNER, "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 1,
            "vocab_size": VOCABULARY, "tie_word_embeddings": False, "torch_dtype": "float32",
        }  # fmt: skip
        _write(folder / model, "model.safetensors", weights(model), "config.json", config)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "r": RANK,
        "lora_alpha": ALPHA, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.0, "bias": "none",
    }  # fmt: skip
    _write(folder / "lora", "adapter_model.safetensors", adapter(), "adapter_config.json", config)


def _write(folder: Path, file: str, tensors: Mapping[str, Tensor], config_file: str, config: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / file, {"format": "pt"})
    (folder / config_file).write_text(json.dumps(config))
