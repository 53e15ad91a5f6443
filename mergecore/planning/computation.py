"""What the configurations of two checkpoints say about the computation: what must be equal, and what may differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from typing import Any

from mergecore.checkpoints.config_classes import with_defaults
from mergecore.errors import MismatchError

SILENT = (
    # What the checkpoint is called, and which library wrote it.
    "_*", "name_or_path", "transformers_version", "*dtype", "architectures", "auto_map", "tokenizer_class",
    "unsloth_*", "model_type", "use_cache", "gradient_checkpointing", "return_dict", "use_return_dict", "torchscript",
    "output_attentions", "output_hidden_states", "output_router_logits", "attn_implementation",
    "pretraining_tp", "chunk_size_feed_forward",
    "use_bfloat16", "tf_legacy_loss",
    # What only training reads.
    "*dropout*", "*pdrop", "*layerdrop*", "*_drop", "drop_path*", "initializer*", "*init_std", "*_init*", "init_*",
    "*_loss*", "*aux_loss*", "*loss_coef*", "mask_time_*", "mask_feature_*", "apply_spec_augment", "ctc_*",
    "router_jitter_noise", "jitter_noise", "rescale_prenorm_residual",
    # What a task's head or a generation reads, and what is checked elsewhere.
    "id2label", "label2id", "num_labels", "finetuning_task", "task_specific_params", "prefix",
    "pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "mask_token_id", "unk_token_id", "*token_ids",
    "suppress_tokens", "begin_suppress_tokens",
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "temperature",
    "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "bad_words_ids",
    "num_return_sequences", "remove_invalid_values", "diversity_penalty", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "return_dict_in_generate",
    "tie_word_embeddings", "vocab_size", "quantization_config",
)  # fmt: skip
"""Patterns of keys that may differ without a word."""

REFUSED = (
    "*num_heads", "*_heads", "n_head", "n_heads", "num_kv", "*head_dim", "d_kv", "*kv_channels", "multi_query*",
    "*num_query_groups", "new_decoder_architecture", "position_embedding_type", "position_embeddings_type", "alibi",
    "rotary_pct", "rotary_dim", "partial_rotary_factor", "rope_interleave*", "interleaved*", "*parallel_residual",
    "parallel_attn", "do_layer_norm_before", "apply_residual_connection_post_layernorm", 
    "*post_norm*", "*pre_norm*", "*prenorm*", "*postnorm*", "norm_first", "do_stable_layer_norm", "use_qk_norm",
    "qk_norm*", "qk_layer*norm*", "*normalize_before", "*norm_before*", "norm_after", "norm_type", "normalization_type",
    "use_sandwich_norm", "use_rotary*", "positional_encoding_type", "no_rope_layers",
    "gelu_activation",
    "feed_forward_proj", "is_gated_act", "*patch_size", "conv_stride", "conv_kernel",
)  # fmt: skip
"""Patterns of keys in which the models must agree: with another value the same numbers are other parts of the model."""

ACTIVATIONS = ("*act", "*activation", "*activation_function", "*act_fn", "*activations")
GELUS = frozenset({"gelu", "gelu_new", "gelu_fast", "gelu_python", "gelu_pytorch_tanh", "gelu_accurate", "gelu_10"})
"""Ways to work out one function."""
KINDS = ("layer_types",)
ATTENTIONS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds of layers with the same tensors. They differ in how far they look."""


def check_computation(base: Mapping[str, Any], expert: Mapping[str, Any], where: str) -> str:
    """Return what is to be said of an expert whose config.json computes otherwise than the base's; '' for nothing.

    Raises MismatchError where its weights cannot mean the same in the base's computation.
    """
    _check_labels(base, expert, where)
    differing = differences(base, expert)
    refused = [key for key, (ours, theirs) in differing.items() if _must_agree(key, ours, theirs)]
    if refused:
        raise MismatchError(
            f"{where}: its config.json says {_told(differing, refused)}: the same numbers are other parts of the model "
            "there, so that a merge means nothing; give experts that were trained from this base, or correct the file"
        )
    if not differing:
        return ""
    return f"its config.json says {_told(differing, list(differing))}; the result computes as the base's says"


def _check_labels(base: Mapping[str, Any], expert: Mapping[str, Any], where: str) -> None:
    """Raise MismatchError where the rows of two heads are the same classes in another order."""
    ours, theirs = _labels(base), _labels(expert)
    if ours != theirs and sorted(ours.values()) == sorted(theirs.values()) and len(set(ours.values())) == len(ours):
        place = next(place for place in sorted(ours) if ours[place] != theirs.get(place))
        raise MismatchError(
            f"{where}: its config.json numbers the same labels in another order (id2label: {place} is "
            f"'{theirs.get(place)}' where the base's is '{ours[place]}'): the rows of its head are other classes; put "
            "the rows of its head, and id2label and label2id, into the base's order"
        )


def _labels(config: Mapping[str, Any]) -> dict[str, str]:
    labels = config.get("id2label")
    return {str(place): str(label) for place, label in labels.items()} if isinstance(labels, Mapping) else {}


def _told(differing: Mapping[str, tuple[Any, Any]], keys: list[str]) -> str:
    entries = (
        f"{key} {_short(differing[key][1])} where the base's has {_short(differing[key][0])}" for key in sorted(keys)
    )
    return ", ".join(entries)


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def differences(base: Mapping[str, Any], expert: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return {key: (the base's value, the expert's)} of the settings that change what a model computes.

    Parts are joined by dots. A key that one file lacks has the default of its class in transformers; what transformers
    does not know, or reads in another way, is compared as it stands.
    """
    differing = _compared(base, expert)
    if not differing:
        return {}
    ours, theirs = with_defaults(base), with_defaults(expert)
    if ours is None or theirs is None:
        return {key: values for key, values in differing.items() if {*map(str, values)} - {"None", "False"}}
    return _compared(ours, theirs)


def _compared(base: Mapping[str, Any], expert: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    ours, theirs = dict(_flat(base)), dict(_flat(expert))
    return {
        key: (ours.get(key), theirs.get(key))
        for key in sorted(ours.keys() | theirs.keys())
        if (key in ours) != (key in theirs) or ours.get(key) != theirs.get(key)
    }


def _flat(config: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if any(fnmatch(str(key), pattern) for pattern in SILENT):
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _must_agree(key: str, ours: Any, theirs: Any) -> bool:
    """Return whether two values of a key cannot stand in models whose weights mean the same."""
    name = key.rpartition(".")[2]
    if ours is None or theirs is None:  # the default is not known here
        return False
    if any(fnmatch(name, pattern) for pattern in ACTIVATIONS) and isinstance(ours, str) and isinstance(theirs, str):
        return not {ours, theirs} <= GELUS
    if name in KINDS and isinstance(ours, list) and isinstance(theirs, list):
        pairs = zip(ours, theirs, strict=False)
        return any(our != their and not {our, their} <= ATTENTIONS for our, their in pairs)
    return not name.endswith("eps") and any(fnmatch(name, pattern) for pattern in REFUSED)
