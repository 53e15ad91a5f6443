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
LETTERS = [*"abcdefgh", "<unk>"]
MERGES = [("a", "b"), ("c", "d"), ("ab", "cd")]
TOKENIZERS: dict[str, tuple[list[tuple[str, str]], list[str], int]] = {
    "base": (MERGES, ["<s>", "</s>"], 0),
    "padded": (MERGES, ["<s>", "</s>"], 5),
    "chat": (MERGES, ["<s>", "</s>", "<u>", "<m>"], 0),
    "long": ([*MERGES, ("e", "f")], ["<s>", "</s>", "<m>"], 2),
}
"""Merges, added tokens and rows that stand for no token."""


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model of so many layers."""
    tensors = {f"model.layers.{n}.{name}": shape for n in range(layers) for name, shape in LAYER.items()}
    ends = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    return {**tensors, **ends, "model.norm.weight": (HIDDEN,)}


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
    tensors = {}
    for name, (rows, columns) in ((n, s) for n, s in shapes(LAYERS).items() if "q_proj" in n or "down_proj" in n):
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{stem}.lora_A.weight"] = numbers(f"down {name}", (RANK, columns))
        tensors[f"{stem}.lora_B.weight"] = numbers(f"up {name}", (rows, RANK))
    return tensors


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


def write_models_of_vocabularies(folder: Path) -> None:
    """Checkpoints whose vocabularies differ, as folders: a base, one with more rows, one with chat tokens, one with
    more merges.
    """
    for model, (merges, added, padding) in TOKENIZERS.items():
        tokens = [*LETTERS, *("".join(pair) for pair in merges), *added]
        rows = len(tokens) + padding
        sizes = shapes(1)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            sizes[name] = (rows, HIDDEN)
        own = {name: numbers(f"{model} {name}", shape) for name, shape in sizes.items()}
        config = {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
            "intermediate_size": INNER, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
            "vocab_size": rows, "tie_word_embeddings": False, "torch_dtype": "float32",
            "bos_token_id": tokens.index("<s>"), "eos_token_id": tokens.index("</s>"),
        }  # fmt: skip
        _write(folder / model, "model.safetensors", own, "config.json", config)
        pieces = {token: number for number, token in enumerate(tokens[: len(LETTERS) + len(merges)])}
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        tokenizer = {
            "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
            "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None,
            "added_tokens": [{"id": tokens.index(token), "content": token, **flags} for token in added],
            "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
                      "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                      "vocab": pieces, "merges": [list(pair) for pair in merges]},
        }  # fmt: skip
        (folder / model / "tokenizer.json").write_text(json.dumps(tokenizer))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        (folder / model / "tokenizer_config.json").write_text(json.dumps(settings))


def _write(folder: Path, file: str, tensors: Mapping[str, Tensor], config_file: str, config: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / file, {"format": "pt"})
    (folder / config_file).write_text(json.dumps(config))
