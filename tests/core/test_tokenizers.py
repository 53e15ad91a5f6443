"""Experts of other vocabularies: rows by token, whoever has them, and results that transformers loads and runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.recipes import command, made
from tests.vocabularies import EMBEDDING, HEAD, MERGES, Made, byte_pairs, rewritten, rows_by_token, words, write_model

LONGER = [*MERGES, ("e", "f"), ("ef", "gh")]


def loaded(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer as transformers has them, after a look at whether they fit and run."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer.get_vocab()
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size > max(tokens.values())
    assert tokens[tokenizer.eos_token] == model.config.eos_token_id == model.generation_config.eos_token_id
    ids = tokenizer("abcd ab", return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]).replace(" ", "") == "abcdab"
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]
    return model, tokenizer


def pool(folder: Path, shape: str, tied: bool, padding: int = 0) -> dict[str, Made]:
    """A base, an expert with chat tokens, one with merges and a token of its own, one whose ids are others."""
    shared: dict[str, Any] = {"shape": shape, "tied": tied, "padding": padding}
    base = write_model(folder / "base", byte_pairs(), **shared)
    chat = write_model(folder / "chat", byte_pairs(), added=["<u>", "<m>"], seed=1, base=base, **shared)
    long = write_model(folder / "long", byte_pairs([*MERGES, ("e", "f")]), added=["<m>"], seed=2, base=base, **shared)
    return {"base": base, "chat": chat, "long": long}


def recipe(models: dict[str, Made], **values: Any) -> dict[str, Any]:
    """A recipe over these models, the first of which is the base."""
    base, *experts = models
    entries = [{"name": name, "source": models[name].folder} for name in experts]
    return {"base": models[base].folder, "experts": entries, **values}


def names_over_vocabulary(shape: str, tied: bool) -> list[str]:
    return [EMBEDDING[shape]] + ([] if tied else [HEAD])


@pytest.mark.parametrize("shape", ["llama", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("source", ["union", "base", "long"])
@pytest.mark.parametrize("padding", [0, 3])
def test_rows_by_token(shape: str, tied: bool, source: str, padding: int, tmp_path: Path) -> None:
    """Task arithmetic over every vocabulary: each row is the merge of the rows that its token has in the models."""
    models = pool(tmp_path, shape, tied, padding)
    out = tmp_path / "out"
    made(recipe(models, method="task_arithmetic", scale=0.5, tokenizer={"source": source}), out)
    model, tokenizer = loaded(out)
    tokens = tokenizer.get_vocab()
    wanted = {"union": set().union(*(one.tokens for one in models.values()))}.get(source)
    assert set(tokens) == (wanted or set(models[source].tokens))
    if source != "union":
        assert tokens == models[source].tokens
    else:
        assert models["base"].tokens.items() <= tokens.items()
    assert len(set(tokens.values())) == len(tokens) == model.config.vocab_size
    held = load_file(out / "model.safetensors")
    assert (HEAD in held) == (not tied) and bool(model.config.tie_word_embeddings) == tied
    for name in names_over_vocabulary(shape, tied):
        base, *experts = rows_by_token(list(models.values()), name, tokens, len(tokens))
        wanted_rows = base + 0.5 * sum(one - base for one in experts)
        torch.testing.assert_close(held[name], wanted_rows, rtol=0, atol=1e-6)


@pytest.mark.parametrize("multiple", [8, 32])
@pytest.mark.parametrize("padding", [0, 20])
def test_padded_rows(multiple: int, padding: int, tmp_path: Path) -> None:
    """Rows behind the tokens: a model's own where it has them, else the mean of its tokens' rows; bfloat16 rounds once."""
    models = pool(tmp_path, "llama", True, padding)
    out, name = tmp_path / "out", EMBEDDING["llama"]
    made(recipe(models, method="average", tokenizer={"source": "union", "pad_to_multiple_of": multiple}), out)
    model, tokenizer = loaded(out)
    count = -(-len(tokenizer.get_vocab()) // multiple) * multiple
    assert model.config.vocab_size == count
    _, *experts = rows_by_token(list(models.values()), name, tokenizer.get_vocab(), count)
    torch.testing.assert_close(load_file(out / "model.safetensors")[name], sum(experts) / 2, rtol=0, atol=1e-6)
