"""Models that take images: what their configurations say of tokens in a part of their own, and results that run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergecore.errors import MergeloomError
from tests.recipe_files import merge_into
from tests.vocabularies import IMAGE, Made, byte_pairs, rewritten, rows_by_token, write_model

EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
OURS, THEIRS = ("<s>", IMAGE, "</s>"), ("<u>", "<s>", IMAGE, "<end>")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def said(folder: Path) -> dict[str, Any]:
    """config.json."""
    contents: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return contents


def as_on_a_hub(model: Made, *, counts: int) -> None:
    """Ids of special tokens at the top and not beside the text's sizes; `vocab_size` in none, one or both places."""
    contents = said(model.folder)
    text = contents["text_config"]
    top = {key: text.pop(key) for key in IDS}
    rows = text.pop("vocab_size")
    if counts:
        text["vocab_size"] = rows
    top |= {"vocab_size": rows} if counts == 2 else {}
    rewritten(model, "config.json", **top, text_config=text)


@pytest.mark.parametrize(("shape", "tied"), [("gemma3", True), ("llava", False)])
@pytest.mark.parametrize(
    ("source", "counts"),
    [("union", None), ("base", None), ("x", None), ("union", 0), ("union", 1), ("x", 1), ("union", 2), ("x", 2)],
)
def test_the_result_loads_and_sees_images(
    shape: str, tied: bool, source: str, counts: int | None, tmp_path: Path
) -> None:
    """counts: None where ids and `vocab_size` stand in `text_config`, as transformers 5 writes them; else as on a hub.

    With 0 the number is the default of a class, which the result's is not.
    """
    base = write_model(tmp_path / "base", byte_pairs(), special=OURS, shape=shape, tied=tied)
    other = write_model(tmp_path / "x", byte_pairs(), special=THEIRS, shape=shape, tied=tied, seed=1, base=base)
    if counts is not None:
        as_on_a_hub(base, counts=counts)
        as_on_a_hub(other, counts=counts)
    owner = other if source == "x" else base
    out, models = tmp_path / "out", [base, other]
    recipe = {"base": base.folder, "experts": [{"name": "x", "source": other.folder}]}
    rules = {"source": source, "conflicts": "first"}
    merge_into({**recipe, "method": "task_arithmetic", "scale": 0.5, "tokenizer": rules}, out)

    from transformers import AutoModelForImageTextToText, AutoTokenizer

    model, tokenizer = AutoModelForImageTextToText.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    tokens = tokenizer.get_vocab()
    assert set(tokens) == (set(base.tokens) | set(other.tokens) if source == "union" else set(owner.tokens))
    assert model.config.text_config.vocab_size == len(tokens) == model.get_input_embeddings().weight.shape[0]
    contents, theirs = said(out), said(owner.folder)
    for part, own in ((contents, theirs), (contents["text_config"], theirs["text_config"])):
        assert [part.get(key) for key in IDS] == [own.get(key) for key in IDS]
        assert part.get("vocab_size", len(tokens)) == len(tokens) and ("vocab_size" in part or part is contents)
    assert tokens[IMAGE] == contents["image_token_index"] == model.config.image_token_id
    assert model.generation_config.eos_token_id == tokens[tokenizer.eos_token]
    ids = tokenizer(f"abcd {IMAGE * 4} ab", return_tensors="pt").input_ids
    assert ids[0].tolist().count(tokens[IMAGE]) == 4  # as many as an image has patches here
    with torch.no_grad():
        seen = [model(input_ids=ids, pixel_values=torch.full((1, 3, 8, 8), shade)).logits for shade in (0.0, 1.0)]
    assert seen[0].shape[-1] == len(tokens) and not torch.equal(*seen)
    weights = load_file(out / "model.safetensors")
    for name in [EMBEDDING] + [HEAD] * (not tied):
        ground, expert = rows_by_token(models, name, tokens, len(tokens))
        torch.testing.assert_close(weights[name], ground + 0.5 * (expert - ground), rtol=0, atol=1e-6)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Other vocabularies without a rule, an image token that is none, rows for some of the tokens."""
    base = write_model(tmp_path / "base", byte_pairs(), special=OURS, shape="llava")
    other = write_model(tmp_path / "x", byte_pairs(), special=THEIRS, shape="llava", seed=1, base=base)
    recipe = {"base": base.folder, "experts": [other.folder], "method": "average"}
    with pytest.raises(
        MergeloomError, match=r"text_config.vocab_size 16, the base has 15.*tokenizer: \{source: union\}"
    ):
        merge_into(recipe, tmp_path / "out")
    recipe["tokenizer"] = {"source": "union", "conflicts": "first"}
    rewritten(base, "config.json", image_token_index=99)
    with pytest.raises(
        MergeloomError, match=r"config\.json says image_token_index 99, which is no token of the result"
    ):
        merge_into(recipe, tmp_path / "out")
    rewritten(base, "config.json", image_token_index=base.tokens[IMAGE])
    for model in (base, other):
        contents = {**model.tensors, "language_model.model.embed_tokens_per_layer.weight": torch.zeros(9, 4)}
        save_file(contents, model.folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(MergeloomError, match=r"embed_tokens_per_layer\.weight' has rows for some of the tokens only"):
        merge_into(recipe, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))
