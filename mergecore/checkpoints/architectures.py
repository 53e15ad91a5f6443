"""What tensor names mean, as data: how layers are numbered and which tensors are tied, for the common families."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeVar

LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|block|blocks|resblocks|encoder\.layer)\.(\d+)\.")
"""The number of a layer as Llama, GPT-2, BERT, T5, ViT and CLIP write it in tensor names."""

TIED: tuple[tuple[str, str], ...] = (
    ("model.embed_tokens.weight", "lm_head.weight"),
    ("transformer.wte.weight", "lm_head.weight"),
    ("shared.weight", "lm_head.weight"),
    ("shared.weight", "encoder.embed_tokens.weight"),
    ("shared.weight", "decoder.embed_tokens.weight"),
    ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
)
"""(owner, name that is the same tensor where the config ties word embeddings)."""

ALWAYS_TIED = frozenset(name for owner, name in TIED if owner == "shared.weight" and name != "lm_head.weight")
"""T5's stacks read the shared embeddings whatever the config says; there it speaks of the head."""

STATED: tuple[str, ...] = (
    "llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "olmo", "olmo2", "granite", "gpt2",
)  # fmt: skip
"""Model types of which TIED and a tie_word_embeddings in config.json say all. Of others transformers is asked."""

HEAD_APART: tuple[str, ...] = ("mt5", "umt5")
"""Model types whose head is a tensor of its own, though transformers 5 writes tie_word_embeddings: true for them."""

EMBEDDINGS: tuple[str, ...] = (
    "*embedding*", "*embed_tokens*", "*embed_in*", "*embed_positions*", "*wte*", "*wpe*", "*shared.weight",
    "*relative_attention_bias*",
)  # fmt: skip
"""Shell patterns of tables that are looked up by row: two dimensions, but no linear layer (GPT-NeoX's embed_out is)."""

VOCABULARY = re.compile(
    r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|tok_embeddings|embed_in|shared)\.weight$"
    r"|(?:^|\.)(?:lm_head|embed_out|cls\.predictions|vocab_projector)(?:\.decoder)?\.(?:weight|bias)$"
    r"|^(?:output\.weight|decoder\.(?:weight|bias))$"
)
"""Tensors that have a row (a bias: an element) for each token: input embeddings, output heads and their biases."""

PER_LAYER_TOKENS = re.compile(r"(?:^|\.)embed_tokens_per_layer\.weight$")
"""Tables that have rows for some of the tokens (Gemma 3n): what a token beyond them means is no matter of names."""

HEADS: tuple[str, ...] = ("*lm_head*", "*text_projection*", "*visual_projection*", "*classifier*", "*score.weight")
"""Shell patterns of what reads the last layer: linear maps, but none of attention or MLP."""

STACKED: tuple[str, ...] = (
    "*experts*", "*gate_up_proj", "*gate_proj", "*up_proj", "*down_proj", "*input_linear.weight",
    "*output_linear.weight",
)  # fmt: skip
"""Shell patterns of tensors that, with three dimensions, are one matrix per expert: a mixture of experts, fused."""

TRANSPOSED: dict[str, tuple[str, ...]] = dict.fromkeys(
    ("gpt2", "openai-gpt", "imagegpt", "decision_transformer"),
    ("*c_attn.weight", "*c_proj.weight", "*c_fc.weight", "*q_attn.weight"),
)
"""Model types whose linear layers are kept as (in, out), and shell patterns of these (transformers' Conv1D)."""

BUFFER = re.compile(
    r"(?:^|\.)(?:rotary_emb\.inv_freq|attn\.(?:masked_)?bias|attention\.(?:masked_)?bias|position_ids)$"
)
"""Constants that some versions of a library save with a checkpoint and others do not: never merged, never missed."""

Layers = Sequence[int | None]
"""For each layer of a result the layer of the model that it is; None where the model has no part in it."""
Value = TypeVar("Value")
Outside = Literal["embeddings", "norm", "head"]
EMBEDDING = re.compile(
    r"embed(?!_out)|(?:^|\.)(?:wte|wpe|shared)\.|_token$|pre_layrnorm|ln_pre|encoder\.conv\d|feature_(?:extractor|projection)"
)
"""What stands before the layers: tables of tokens and places, patches, a norm of these."""
FINAL_NORM = re.compile(r"^(?!.*(?:lm_head|cls\.|classifier|vocab_)).*(?:norm|(?:^|\.)ln_)", re.IGNORECASE)
"""A norm behind the layers that is no part of a head."""


def layer_of(name: str) -> int | None:
    """Return the layer that a tensor belongs to; None for embeddings, heads and final norms."""
    match = LAYER.search(name)
    return int(match.group(1)) if match else None


def at_layer(name: str, layer: int) -> str:
    """Return the name of the same tensor in another layer."""
    match = LAYER.search(name)
    return name if match is None else name[: match.start(1)] + str(layer) + name[match.end(1) :]


def at_layers(values: Mapping[str, Value], layers: Layers) -> dict[str, Value]:
    """Return the values under the result's names. Layer i is what layer `layers[i]` was; what belongs to no layer
    stays.
    """
    renamed = {name: value for name, value in values.items() if layer_of(name) is None}
    by_layer: dict[int, list[str]] = {}
    for name in values:
        layer = layer_of(name)
        if layer is not None:
            by_layer.setdefault(layer, []).append(name)
    for number, layer in enumerate(layers):
        for name in by_layer.get(layer, ()) if layer is not None else ():
            renamed[at_layer(name, number)] = values[name]
    return renamed


def depths(names: Iterable[str]) -> dict[str, int]:
    """Return {stem: number of layers} of every stack. Most models have one; encoder-decoders have two."""
    counts: dict[str, int] = {}
    for name in names:
        match = LAYER.search(name)
        if match is not None:
            stem = name[: match.start(1)]
            counts[stem] = max(counts.get(stem, 0), int(match[1]) + 1)
    return counts


def outside(name: str) -> Outside:
    """Return what a tensor that belongs to no layer is: embeddings, a final norm, or the head, which is all the
    rest.
    """
    if EMBEDDING.search(name):
        return "embeddings"
    return "norm" if FINAL_NORM.search(name) else "head"
