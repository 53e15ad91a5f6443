"""Unigram models, as sentencepiece makes them: pieces of an expert beside those of the base, and what is refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from mergecore.errors import MergeloomError
from tests.recipe_files import merge_into
from tests.vocabularies import EMBEDDING, Made, pieces, rows_by_token, write_model

BASE = {
    "▁": -3.0,
    "▁a": -2.0,
    "a": -2.5,
    "b": -2.6,
    "c": -3.5,
    "d": -3.6,
    "ab": -3.2,
    "bc": -4.5,
    "abc": -5.5,
    "cd": -5.0,
}
LONGER = {**BASE, "bcd": -4.0, "▁ab": -3.1, "dd": -4.2}
OTHER = {**BASE, "ca": -4.1, "dd": -4.2}
TEXTS = ["".join(random.Random(seed).choices("aabbccdde ", k=4 + seed % 12)).strip() for seed in range(400)]


def read(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def written(folder: Path, **models: Any) -> dict[str, Made]:
    """The base and experts with random rows; a model is its scores, or (scores, values for `write_model`)."""
    written: dict[str, Made] = {}
    for seed, (name, pieces_of) in enumerate(models.items()):
        scores, values = pieces_of if isinstance(pieces_of, tuple) else (pieces_of, {})
        options = {"tied": True, "special": ("<s>", "</s>"), **values}
        tokenizer = (
            scores if isinstance(scores, Tokenizer) else pieces({**dict.fromkeys(options["special"], 0.0), **scores})
        )
        written[name] = write_model(folder / name, tokenizer, seed=seed, base=written.get("base"), **options)
    return written


def merged(models: dict[str, Made], out: Path, **rules: Any) -> Tokenizer:
    experts = [{"name": name, "source": model.folder} for name, model in models.items() if name != "base"]
    rules = {"source": "union", **rules}
    merge_into({"method": "average", "base": models["base"].folder, "experts": experts, "tokenizer": rules}, out)
    return read(out)


def test_pieces_of_an_expert_are_found_in_text_as_the_expert_finds_them(tmp_path: Path) -> None:
    """With one expert the result takes every text apart as that expert does; ids of the base stay, rows go by token."""
    models = written(tmp_path, base=BASE, longer=(LONGER, {"special": ("<s>", "<m>", "</s>")}))
    result, base, longer = merged(models, tmp_path / "out"), read(models["base"].folder), read(models["longer"].folder)
    tokens = result.get_vocab()
    assert tokens.items() >= base.get_vocab().items() and set(tokens) == set(longer.get_vocab())
    assert sorted(tokens.values()) == list(range(len(tokens)))
    for text in [*TEXTS, "ab <m>cd", "<s>bcd</s>"]:
        assert result.encode(text).tokens == longer.encode(text).tokens
        assert result.decode(result.encode(text).ids) == longer.decode(longer.encode(text).ids)
    assert any(result.encode(text).tokens != base.encode(text).tokens for text in TEXTS)
    _, expert = rows_by_token(list(models.values()), EMBEDDING["llama"], tokens, len(tokens))
    torch.testing.assert_close(load_file(tmp_path / "out" / "model.safetensors")[EMBEDDING["llama"]], expert)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, loaded = (kind.from_pretrained(tmp_path / "out") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert loaded.get_vocab() == tokens and model.config.vocab_size == len(tokens)
    assert loaded.tokenize("abcd bcd") == longer.encode("abcd bcd").tokens


def test_texts_without_new_pieces_are_taken_apart_as_before(tmp_path: Path) -> None:
    """Two experts with pieces of their own, one of which both have; 'e' is a character that nobody knows."""
    models = written(tmp_path, base=BASE, longer=LONGER, other=OTHER)
    result, base = merged(models, tmp_path / "out"), read(models["base"].folder)
    new = {piece.replace("▁", " ") for piece in set(result.get_vocab()) - set(base.get_vocab())}
    assert new == {"bcd", " ab", "dd", "ca"}
    untouched = [text for text in TEXTS if not any(piece in f" {text}" for piece in new)]
    assert len(untouched) > 20 and any("e" in text for text in untouched)
    for text in untouched:
        assert result.encode(text).ids == base.encode(text).ids


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"x": {**LONGER, "ab": -3.0}}, "'ab' has other scores in expert 'x' than before"),
        ({"x": {piece: score for piece, score in BASE.items() if piece != "cd"} | {"a": -1.0}}, "'a' has other scores"),
        ({"x": LONGER, "y": {**BASE, "dd": -4.3}}, "'dd' has other scores in expert 'y' than before"),
        ({"x": {**BASE, "dd": -5.6}}, "'dd' with lower scores than any before"),
        (
            {"x": (pieces({"<s>": 0.0, "</s>": 0.0, **LONGER}, True), {})},
            "does not spell unknown characters .*byte_fallback",
        ),
        (
            {"base": (BASE, {"added": ["<u>"]}), "x": LONGER},
            "'bcd', '▁ab', 'dd' of its own, where the base has its added tokens",
        ),
    ],
)  # fmt: skip
def test_pieces_that_would_change_more_are_refused(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    models = written(tmp_path, **{"base": BASE, **changes})
    with pytest.raises(MergeloomError, match=f"(?s){said}.*conflicts: first"):
        merged(models, tmp_path / "out")
    result, base = merged(models, tmp_path / "out", conflicts="first"), read(models["base"].folder)
    everything = set().union(*(model.tokens for model in models.values()))
    assert set(result.get_vocab()) == everything and result.get_vocab().items() >= base.get_vocab().items()
