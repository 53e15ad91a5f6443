"""Tiny Llama- and GPT-2-shaped checkpoints with tokenizers of their own, and what their rows must become, token by
token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LETTERS = [*"abcdefgh", "<unk>"]
MERGES = [("a", "b"), ("c", "d"), ("ab", "cd")]
EMBEDDING = {"llama": "model.embed_tokens.weight", "gpt2": "transformer.wte.weight"}
HEAD = "lm_head.weight"
SPECIAL = ("<s>", "</s>")
IMAGE = "<image>"


@dataclass(frozen=True)
class Made:
    """A written checkpoint: its folder, the tokens its tokenizer has, and its tensors."""

    folder: Path
    tokens: Mapping[str, int]
    tensors: Mapping[str, Tensor]


def byte_pairs(merges: Sequence[tuple[str, str]] = MERGES, letters: Sequence[str] = LETTERS) -> Any:
    """A byte-pair encoding of letters, words told apart by blanks."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {token: number for number, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def pieces(scores: Mapping[str, float], byte_fallback: bool = False) -> Any:
    """A Unigram model, as sentencepiece has them; blanks are ▁."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = [("<unk>", 0.0), *scores.items()]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=byte_fallback))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return tokenizer


def words(tokens: Sequence[str]) -> Any:
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate([*tokens, "<unk>"])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def write_model(
    folder: Path,
    tokenizer: Any,
    *,
    special: Sequence[str] = SPECIAL,
    added: Sequence[str] = (),
    shape: str = "llama",
    tied: bool = False,
    padding: int = 0,
    seed: int = 0,
    base: Made | None = None,
    dtype: torch.dtype = torch.float32,
    template: str | None = None,
) -> Made:
    """A checkpoint with random rows for every token and `padding` more; other weights are the base's with a change.

    special: tokens added as special ones, the first begins texts, the last ends them. added: plain ones.
    """
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False) for token in added])
    tokens = tokenizer.get_vocab()
    begin, end = tokens[special[0]], tokens[special[-1]]
    ids = {"bos_token_id": begin, "eos_token_id": end, "pad_token_id": end, "tie_word_embeddings": tied}
    rows = max(tokens.values()) + 1 + padding
    torch.manual_seed(seed)
    network(shape, rows, ids, tokens.get(IMAGE, end)).to(dtype).save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[-1],
        pad_token=special[-1],
        unk_token="<unk>",
    )
    if template is not None:
        wrapped.chat_template = template
    wrapped.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    if base is not None:  # a fine-tune: a small change, but rows of its own
        for name in tensors:
            if name in base.tensors and tensors[name].shape == base.tensors[name].shape:
                tensors[name] = (base.tensors[name].float() + 0.1 * tensors[name].float()).to(dtype)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return Made(folder, tokens, tensors)


def network(shape: str, rows: int, ids: Mapping[str, int], image: int) -> Any:
    """A tiny model with random weights. image: the token that stands for a patch of an image, where it takes images."""
    import transformers

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    eyes = {**sizes, "image_size": 8, "patch_size": 4}
    if shape == "llama":
        config = transformers.LlamaConfig(vocab_size=rows, initializer_range=0.5, **sizes, **ids)
        return transformers.LlamaForCausalLM(config)
    if shape == "gpt2":
        config = transformers.GPT2Config(vocab_size=rows, n_embd=8, n_layer=1, n_head=2, n_positions=32, **ids)
        return transformers.GPT2LMHeadModel(config)
    tied = ids["tie_word_embeddings"]
    if shape == "gemma3":
        text = {"vocab_size": rows, "num_key_value_heads": 1, "head_dim": 4, **sizes, **ids}
        ends = {"boi_token_index": ids["bos_token_id"], "eoi_token_index": ids["eos_token_id"]}
        parts = {"text_config": text, "vision_config": eyes, "mm_tokens_per_image": 4}
        config = transformers.Gemma3Config(**parts, **ends, image_token_index=image, tie_word_embeddings=tied)
        model = transformers.Gemma3ForConditionalGeneration(config)
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)  # zeros would hide images
        return model
    assert shape == "llava"
    text = {"model_type": "llama", "vocab_size": rows, **sizes, **ids}
    eyes |= {"model_type": "clip_vision_model", "projection_dim": 8}
    parts = {"text_config": text, "vision_config": eyes, "vision_feature_layer": -1}
    config = transformers.LlavaConfig(**parts, image_token_index=image, tie_word_embeddings=tied)
    return transformers.LlavaForConditionalGeneration(config)


def rewritten(written: Made, file: str, **changes: Any) -> Made:
    """The same checkpoint with other values in a JSON file."""
    path = written.folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return written


def rows_by_token(
    models: Sequence[Made], name: str, tokens: Mapping[str, int], count: int, mean: bool = False
) -> list[Tensor]:
    """Every model's rows for these tokens, in float32, worked out token by token. The first model is the base.

    mean: a token that a model lacks gets the mean of the experts that have it; else the base's row where it has one.
    """
    aligned = [torch.zeros(count, models[0].tensors[name].shape[1]) for _ in models]
    for token, row in tokens.items():
        having = [model.tensors[name].float()[model.tokens[token]] for model in models[1:] if token in model.tokens]
        if token in models[0].tokens and not (mean and having):
            default = models[0].tensors[name].float()[models[0].tokens[token]]
        else:
            default = sum(having[1:], having[0]) / len(having)
        for rows, model in zip(aligned, models, strict=True):
            rows[row] = model.tensors[name].float()[model.tokens[token]] if token in model.tokens else default
    empty = [row for row in range(count) if row not in tokens.values()]
    for rows, model in zip(aligned, models, strict=True):
        of_tokens = torch.stack([rows[row] for row in sorted(tokens.values())]).double().mean(0).float()
        for row in empty:
            own = row < len(model.tensors[name]) and row not in model.tokens.values()
            rows[row] = model.tensors[name].float()[row] if own else of_tokens
    return aligned
