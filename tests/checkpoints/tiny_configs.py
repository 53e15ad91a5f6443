"""A tiny configuration of any model type of transformers: the defaults of its class, with every size made small."""

from __future__ import annotations

import re
from typing import Any

VOCABULARY = 128
LARGEST = 4_000_000
"""Elements of a model; one with more is not tiny."""
RULES: tuple[tuple[str, int], ...] = (
    (r"^(?:num_key_value_heads|num_kv_heads|.*_num_key_value_heads|n_kv_heads?|multi_query_group_num)$", 2),
    (r"^num_hash_functions$|^num_hash_buckets$", 8),
    (r"(?:head|heads)$(?<!_dim)", 4),
    (r"(?:layers|layer|depth|blocks|n_layer|stages)$|^num_hidden_layers$|^depth$", 2),
    (r"vocab_size|^vocab(?:ulary)?_|_vocab$", VOCABULARY),
    (r"image_size|img_size|input_size$|crop_size|frame_size", 32),
    (r"patch_size|tubelet", 8),
    (r"(?:num_|n_)(?:local_|routed_|shared_)?experts$|num_experts$|moe_num_experts", 4),
    (r"experts_per_tok|top_?k", 2),
    (r"n_group|topk_group|num_groups?$|groups$", 1),
    (r"head_dim|_head_size|d_kv|d_head|head_width|kv_channels|attention_head_dim|head_hidden_size", 8),
    (r"lora_rank|_rank$|low_rank", 8),
    (r"max_.*position|max_position|n_positions|n_ctx|max_.*length|max_seq|context_length|source_positions|target_positions|max_2d", 64),
    (r"intermediate|ffn|d_ff|mlp_dim|inner_dim|feed_?forward|n_inner|d_inner|hidden_dim", 64),
    (r"window", 4),
    (r"kernel|stride|dilation|conv_size", 3),
    (r"num_queries|num_query_tokens|num_latents|num_.*tokens$", 8),
    (r"num_channels|in_channels|in_chans", 3),
    (r"num_mel_bins|feature_size|n_mels", 16),
    (r"state_size|d_state|ssm_.*size", 8),
    (r"hidden_size|d_model|n_embd|embed_dim|_dim$|^dim$|width$|_size$|channels$|dims?$|d_embed|_features$", 32),
)  # fmt: skip
"""(expression over names of settings, value): the first that matches a setting makes it small, where it is larger."""


OVER: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"]},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "lw_detr": {"projector_scale_factors": [1.0]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mobilebert": {"hidden_size": 64, "embedding_size": 32},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "xlnet": {"d_head": 8},
}
"""Settings that must fit each other in a way that no rule knows."""
KEPT = frozenset({"num_feat_extract_layers"})
"""Lengths of lists."""


def small(name: str, value: Any) -> Any:
    """Return a small value of a setting; the same where no rule knows it."""
    if isinstance(value, bool) or value is None or name in KEPT:
        return value
    if isinstance(value, int):
        if re.search(r"_token(?:_id|_index)?$|_idx$|_id$|_index$", name):
            return value if value < VOCABULARY else 3
        for pattern, least in RULES:
            if re.search(pattern, name):
                return min(value, least) if value > 0 else value
        return value
    if isinstance(value, list | tuple) and value and all(type(item) is int for item in value):
        if re.search(r"depths|layers|blocks", name) and "index" not in name:
            return type(value)(min(item, 1) for item in value)
        return type(value)(small(re.sub(r"s$", "", name), item) for item in value)
    return value


def tiny_config(config_class: Any, **values: Any) -> Any:
    """Return a tiny configuration. values: set as they are, over the small ones. Raise whatever the class raises."""
    return config_class(**{**_settings(config_class), **OVER.get(config_class.model_type, {}), **values})


def _settings(config_class: Any) -> dict[str, Any]:
    """Return the settings of a class that are to be small, those of configurations within it included."""
    default = config_class()
    within = dict(config_class.sub_configs or {})
    changed: dict[str, Any] = {}
    for name, value in default.to_dict().items():
        if name in within:
            inner = getattr(default, name, None)
            inner_class = type(inner) if inner is not None else within[name]
            if inner is None or not hasattr(inner_class, "model_type"):
                continue
            changed[name] = _settings(inner_class) | (
                {"model_type": inner_class.model_type} if inner_class.model_type else {}
            )
        elif (new := small(name, value)) != value:
            changed[name] = new
    return changed
