"""Tokenizers that cannot be brought together, and rules that cannot be meant: refused before a byte is written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mergecore.checkpoints.vocabulary.tokenizer import _ids
from mergecore.errors import MergeloomError, SourceError
from tests.recipe_files import merge_into
from tests.vocabularies import EMBEDDING, HEAD, Made, byte_pairs, rewritten, words, write_model

Models = dict[str, Made]


def pool(folder: Path) -> Models:
    """A base and an expert with one token more."""
    base = write_model(folder / "base", byte_pairs())
    return {"base": base, "x": write_model(folder / "x", byte_pairs(), added=["<m>"], seed=1, base=base)}


def another(tokenizer: Any, **values: Any) -> Callable[[Path], Models]:
    """The expert with another tokenizer."""

    def built(folder: Path) -> Models:
        models = pool(folder)
        write_model(folder / "x", tokenizer(), seed=1, **values)
        return models

    return built


def edited(model: str, file: str, **values: Any) -> Callable[[Path], Models]:
    """One model with other values in a JSON file."""

    def built(folder: Path) -> Models:
        models = pool(folder)
        rewritten(models[model], file, **values)
        return models

    return built


def without(model: str, *names: str, put: str | None = None) -> Callable[[Path], Models]:
    """One model without some files; put: a file that lies there instead."""

    def built(folder: Path) -> Models:
        models = pool(folder)
        for name in names:
            (folder / model / name).unlink()
        if put:
            (folder / model / put).write_text("")
        return models

    return built


def retensored(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Models]:
    """The expert with other tensors."""

    def built(folder: Path) -> Models:
        models = pool(folder)
        contents = dict(models["x"].tensors)
        change(contents)
        save_file(contents, folder / "x" / "model.safetensors", {"format": "pt"})
        return models

    return built


def shared_id(folder: Path) -> Models:
    models = pool(folder)
    contents = json.loads((folder / "x" / "tokenizer.json").read_text())
    contents["model"]["vocab"]["h"] = contents["model"]["vocab"]["g"]
    return {**models, "x": rewritten(models["x"], "tokenizer.json", model=contents["model"])}


def misnumbered(folder: Path) -> Models:
    models = pool(folder)
    contents = json.loads((folder / "x" / "tokenizer.json").read_text())
    contents["added_tokens"][-1]["id"] += 3
    return {**models, "x": rewritten(models["x"], "tokenizer.json", added_tokens=contents["added_tokens"])}


def cut(folder: Path) -> Models:
    """The base's tokenizer has a special token for which the model has no row."""
    models = pool(folder)
    contents = json.loads((folder / "base" / "tokenizer.json").read_text())
    last = {**contents["added_tokens"][-1], "id": len(models["base"].tokens), "content": "<pad>"}
    rewritten(models["base"], "tokenizer.json", added_tokens=[*contents["added_tokens"], last])
    rewritten(models["base"], "tokenizer_config.json", pad_token="<pad>")
    return models


def cut_piece(folder: Path) -> Models:
    """The base's embedding ends inside its model's own tokens."""
    models = pool(folder)
    contents = {n: t[:7] if t.shape[0] == len(models["base"].tokens) else t for n, t in models["base"].tensors.items()}
    save_file({n: t.clone() for n, t in contents.items()}, folder / "base" / "model.safetensors", {"format": "pt"})
    rewritten(models["base"], "config.json", vocab_size=7)
    rewritten(models["x"], "config.json", eos_token_id=0)
    return {"base": models["base"], "y": write_model(folder / "y", words(["a", "b"]), seed=3)}


def rules(**values: Any) -> dict[str, Any]:
    return {"tokenizer": {"source": "union", **values}}


def token(rule: Any, name: str = "<new>") -> dict[str, Any]:
    return rules(tokens={name: rule})


REFUSED: dict[str, tuple[Callable[[Path], Models], dict[str, Any], str]] = {
    "no rules": (pool, {}, "vocab_size 15, the base has 14.*tokenizer: {source: union}"),
    "a stranger": (pool, rules(source="y"), "no expert is called 'y'; known: base, union, x"),
    "a key": (pool, rules(pad_to=8), "pad_to.*did you mean 'pad_to_multiple_of'"),
    "merges": (
        another(lambda: byte_pairs([("c", "d"), ("b", "c")])),
        rules(),
        r"merge 0 is a \+ b in the base and c \+ d in expert 'x', which has 1 tokens of its own \('bc'\)"
        ".*conflicts: first",
    ),
    "kinds": (
        another(lambda: words(["a", "tree"])),
        rules(source="base"),
        "'x' is tokenized by WordLevel in plain text, the base by BPE in plain text.*'tree'",
    ),
    "roles": (
        another(byte_pairs, special=["</s>", "<s>"]),
        rules(),
        "'</s>' is eos_token of the base and bos_token of expert 'x'",
    ),
    "special here, plain there": (
        another(byte_pairs, special=["<s>", "<m>"], added=["</s>"]),
        rules(),
        "'</s>' is not special in expert 'x', unlike before",
    ),
    "an id without a token": (
        edited("base", "generation_config.json", pad_token_id=99),
        rules(),
        r"the base: generation_config.json says pad_token_id 99, which is no token of the result "
        r"\(15 tokens, the last is 14\)",
    ),
    "a special token without a row": (cut, rules(source="base"), "names|says pad_token '<pad>', for which no model "
    "has a row"),
    "tokens without a row": (cut_piece, rules(source="base", conflicts="first"), "no model has a row for .*'h'.*of "
    "its tokenizer"),
    "only a slow one": (without("x", "tokenizer.json", put="vocab.json"), rules(), "has vocab.json and no "
    "tokenizer.json.*use_fast"),
    "none at all": (without("x", "tokenizer.json"), rules(), "expert 'x' .*has no tokenizer.json beside it, and 15 "
    "rows"),
    "none in the base": (without("base", "tokenizer.json"), rules(), "the base .*has no tokenizer.json beside it"),
    "two of one id": (shared_id, rules(), "x/tokenizer.json: 'g' and 'h' have one id"),
    "other ids than a loader gives": (misnumbered, rules(), "'<m>' has id 17, which a loader would take for 14"),
    "rows of the head": (
        retensored(lambda contents: contents.update({HEAD: contents[HEAD][:-1].clone()})),
        rules(),
        "expert 'x'.*rows.*of which tokens are they",
    ),
    "rows of the configuration": (edited("x", "config.json", vocab_size=20), rules(), "config.json says vocab_size "
    "20, .* has 15"),
    "no embedding": (
        retensored(lambda contents: (contents.pop(HEAD), contents.pop(EMBEDDING["llama"]))),
        rules(),
        "no tensor that is known to have a row for each token",
    ),
    "another width": (
        retensored(lambda contents: contents.update({name: torch.zeros(15, 6) for name in (HEAD, EMBEDDING["llama"])})),
        rules(),
        r"has shape \[15, 6\], in the base \[15, 8\]",
    ),
    "a token of nobody": (pool, token({}), "no model has the token '<new>'; say where its row comes from"),
    "a token of a stranger": (pool, token("y", "<m>"), "tokenizer.tokens.<m>: no model is called 'y'"),
    "a token that is not there": (pool, token("base", "<m>"), "'base' has no row for the token '<m>'"),
    "a row that is not there": (pool, token({"source": {"model": "x", "token_id": 15}}), "'x' has rows 0 to 14, no 15"),
    "a token of two names": (
        pool,
        token({"source": {"model": "x", "token_id": 1, "token": "a"}}),
        "give either 'token' or 'token_id'",
    ),
    "a row for all, of nobody": (pool, token({"to": "all"}, "a"), "'to: all' needs a 'source'"),
    "an adapter made": (pool, {"method": "lora_arithmetic", **rules()}, "makes an adapter, which has the vocabulary "
    "of its base"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    build, values, said = REFUSED[case]
    models = build(tmp_path)
    experts = [{"name": name, "source": model.folder} for name, model in models.items() if name != "base"]
    with pytest.raises(MergeloomError, match=f"(?s){said}") as refusal:
        merge_into({"method": "average", "base": models["base"].folder, "experts": experts, **values}, tmp_path / "out")
    assert len(str(refusal.value)) < 700 and "pydantic" not in str(refusal.value)
    assert not list(tmp_path.glob("out*"))


def test_an_adapter_has_no_vocabulary(tmp_path: Path) -> None:
    """Neither as whose tokenizer is to be used nor as whose row is to be taken."""
    models = pool(tmp_path)
    (tmp_path / "lora").mkdir()
    stem = "base_model.model.model.layers.0.self_attn.q_proj"
    contents = {f"{stem}.lora_A.weight": torch.ones(1, 8), f"{stem}.lora_B.weight": torch.ones(8, 1)}
    save_file(contents, tmp_path / "lora" / "adapter_model.safetensors")
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    experts = [{"name": "x", "source": models["x"].folder}, {"name": "lora", "source": tmp_path / "lora"}]
    for spoilt, said in (
        (rules(source="lora"), "'lora' is an adapter, whose vocabulary is the base's"),
        (token("lora", "a"), "'lora' is an adapter and has no embeddings of its own"),
    ):
        with pytest.raises(MergeloomError, match=said):
            merge_into(
                {"method": "average", "base": models["base"].folder, "experts": experts, **spoilt}, tmp_path / "out"
            )
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"vocab": {"a": 0}, "merges": [["a", 1]]}, r"\(its merge \['a', 1\] is no pair of tokens\)"),
        ({"vocab": {"a": 0}, "merges": ["ab"]}, r"\(its merge 'ab' is no pair of tokens\)"),
        ({"vocab": {"a": 0}, "merges": [[]]}, r"\(its merge \[\] is no pair"),
        ({"vocab": {"a": 0}, "merges": [3]}, r"\("),
        ({"vocab": {"a": 0}, "merges": 7}, r"\("),
        ({"vocab": [["a", "much"]]}, r"\(its piece \['a', 'much'\] is no text with a score\)"),
        ({"vocab": [["a"]]}, r"\(its piece \['a'\] is no text"),
        ({"vocab": {"a": "x"}}, r"\("),
        ([1], r"\("),
        ("x", r"\("),
    ],
)
def test_a_model_of_a_tokenizer_that_is_malformed(model: Any, said: str) -> None:
    with pytest.raises(SourceError, match=rf"folder/tokenizer\.json is no tokenizer that can be read {said}"):
        _ids({"model": model}, "folder/tokenizer.json")
