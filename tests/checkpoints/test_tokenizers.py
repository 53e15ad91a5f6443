"""Experts of other vocabularies: rows by token, whoever has them, and results that transformers loads and runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.recipe_files import command, merge_into
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
    merge_into(recipe(models, method="task_arithmetic", scale=0.5, tokenizer={"source": source}), out)
    model, tokenizer = loaded(out)
    tokens = tokenizer.get_vocab()
    wanted = {"union": set().union(*(item.tokens for item in models.values()))}.get(source)
    assert set(tokens) == (wanted or set(models[source].tokens))
    if source != "union":
        assert tokens == models[source].tokens
    else:
        assert models["base"].tokens.items() <= tokens.items()
    assert len(set(tokens.values())) == len(tokens) == model.config.vocab_size
    contents = load_file(out / "model.safetensors")
    assert (HEAD in contents) == (not tied) and bool(model.config.tie_word_embeddings) == tied
    for name in names_over_vocabulary(shape, tied):
        base, *experts = rows_by_token(list(models.values()), name, tokens, len(tokens))
        wanted_rows = base + 0.5 * sum(item - base for item in experts)
        torch.testing.assert_close(contents[name], wanted_rows, rtol=0, atol=1e-6)


@pytest.mark.parametrize("multiple", [8, 32])
@pytest.mark.parametrize("padding", [0, 20])
def test_padded_rows(multiple: int, padding: int, tmp_path: Path) -> None:
    """Rows behind the tokens: a model's own where it has them, else the mean of its rows; bfloat16 rounds once."""
    models = pool(tmp_path, "llama", True, padding)
    out, name = tmp_path / "out", EMBEDDING["llama"]
    merge_into(recipe(models, method="average", tokenizer={"source": "union", "pad_to_multiple_of": multiple}), out)
    model, tokenizer = loaded(out)
    count = -(-len(tokenizer.get_vocab()) // multiple) * multiple
    assert model.config.vocab_size == count
    _, *experts = rows_by_token(list(models.values()), name, tokenizer.get_vocab(), count)
    torch.testing.assert_close(load_file(out / "model.safetensors")[name], sum(experts) / 2, rtol=0, atol=1e-6)


def test_a_mean_is_over_the_experts_that_have_the_token(tmp_path: Path) -> None:
    """`missing: mean`, as in mergekit without a base: the base's row counts only where it alone has the token."""
    models = pool(tmp_path, "llama", False)
    models["other"] = write_model(
        tmp_path / "other", byte_pairs(LONGER[:4]), added=["<u>"], seed=3, base=models["base"]
    )
    del models["base"]
    actual = {}
    for missing in ("base", "mean"):
        rules, out = {"source": "union", "missing": missing}, tmp_path / f"{missing}-out"
        asked = {key: value for key, value in recipe({"": models["chat"], **models}).items() if key != "base"}
        merge_into({"method": "average", "tokenizer": rules, **asked}, out)
        _, tokenizer = loaded(out)
        tokens, mean = tokenizer.get_vocab(), missing == "mean"
        actual[missing] = load_file(out / "model.safetensors")[HEAD]
        _, *experts = rows_by_token([models["chat"], *models.values()], HEAD, tokens, len(tokens), mean)
        torch.testing.assert_close(actual[missing], sum(experts) / 3, rtol=0, atol=1e-6)
    assert not torch.equal(actual["base"], actual["mean"])


def test_rules_for_single_tokens(tmp_path: Path) -> None:
    """A row from a model, from another token, of zeros, for those that lack the token or for all; and a new token."""
    models = pool(tmp_path, "llama", True)
    rules = {
        "<m>": "long",
        "<u>": {"source": {"model": "long", "token": "ef"}, "to": "missing"},
        "ab": {"source": {"model": "base", "token_id": models["base"].tokens["cd"]}, "to": "all"},
        "a": {"source": {"kind": "zero"}, "to": "all"},
        "<new>": {"source": {"kind": "zero"}},
    }
    merge_into(recipe(models, method="task_arithmetic", scale=1.0, tokenizer={"tokens": rules}), tmp_path / "out")
    _, tokenizer = loaded(tmp_path / "out")
    tokens, name = tokenizer.get_vocab(), EMBEDDING["llama"]
    assert tokens["<new>"] == max(tokens.values()) and tokenizer.tokenize("ab<new>ab") == ["ab", "<new>", "ab"]
    contents = load_file(tmp_path / "out" / "model.safetensors")[name]
    base, chat, long = (item.tensors[name] for item in models.values())
    row = {token: contents[number] for token, number in tokens.items()}
    of = {name: item.tokens for name, item in models.items()}
    # base and chat − base are added up: what all have alike stays, what only one has comes once.
    torch.testing.assert_close(row["<m>"], chat[of["chat"]["<m>"]])
    torch.testing.assert_close(row["<u>"], chat[of["chat"]["<u>"]] + 0 * long[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(row["ab"], base[of["base"]["cd"]])
    assert not row["a"].any() and not row["<new>"].any()
    other = tmp_path / "weighted"
    merge_into(recipe(models, method="average", weights=[0, 1], tokenizer={"tokens": rules}), other)
    second = load_file(other / "model.safetensors")[name]
    torch.testing.assert_close(second[tokens["<u>"]], long[of["long"]["ef"]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ids_in_any_order_and_any_cut(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vocabularies with the same words in other places; the bytes do not depend on how much is read at a time."""
    from mergecore.engine import windows as reading
    from mergecore.engine.executor import InProcess
    from mergecore.events import silent
    from mergecore.recipes.merge_recipe import merge_recipe
    from mergecore.spec.recipe import parse_recipe
    from tests.recipe_files import find, plain

    texts = ["ab", "abcd", "one", "two", "three"]
    contents: dict[str, Any] = {"dtype": dtype, "tied": True}
    base = write_model(tmp_path / "base", words(texts), **contents)
    back = write_model(tmp_path / "back", words(texts[::-1]), seed=1, base=base, **contents)
    more = write_model(
        tmp_path / "more", words(["four", *texts[2:], "five", *texts[:2]]), seed=2, base=base, **contents
    )
    models = {"base": base, "back": back, "more": more}
    asked = recipe(models, method="ties", density=0.5, tokenizer={"source": "union", "pad_to_multiple_of": 16})
    actual = []
    for number, (window, workers) in enumerate([(1 << 18, 1), (5, 1), (13, 2)]):
        monkeypatch.setattr(reading, "WINDOWS", (window, window))
        out = tmp_path / str(number)
        merge_recipe(parse_recipe(plain(asked), "recipe"), out, find, InProcess(workers), silent)
        actual.append((out / "model.safetensors").read_bytes())
    assert actual[0] == actual[1] == actual[2]
    average = {key: value for key, value in asked.items() if key != "density"} | {"method": "average"}
    merge_into(average, tmp_path / "average")
    _, tokenizer = loaded(tmp_path / "average")
    tokens = tokenizer.get_vocab()
    assert len(tokenizer.tokenize("one four five two")) == 4
    name = EMBEDDING["llama"]
    _, *experts = rows_by_token(list(models.values()), name, tokens, 16)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    result = load_file(tmp_path / "average" / "model.safetensors")[name]
    assert result.dtype == dtype
    torch.testing.assert_close(result.float(), sum(experts) / 2, rtol=0, atol=tolerance)


def test_merges_of_an_expert_go_on_being_merged(tmp_path: Path) -> None:
    """What an expert's tokenizer joins after the base's merges is joined in the result; specials stay whole."""
    models = pool(tmp_path, "llama", True)
    models["longest"] = write_model(
        tmp_path / "longest", byte_pairs([*MERGES, ("g", "h")]), seed=5, base=models["base"], tied=True
    )
    merge_into(recipe(models, method="average", tokenizer="union"), tmp_path / "out")
    _, tokenizer = loaded(tmp_path / "out")
    assert tokenizer.tokenize("abcd ef gh <u> ab<m>") == ["abcd", "ef", "gh", "<u>", "ab", "<m>"]
    assert tokenizer("<s> ab", return_tensors="pt").input_ids[0, 0] == models["base"].tokens["<s>"]


def test_a_token_added_here_and_merged_there(tmp_path: Path) -> None:
    """The base has it by its text alone, an expert's encoding makes it: both in the result, under the base's id."""
    base = write_model(tmp_path / "base", byte_pairs(), added=["ef"])
    models = {
        "base": base,
        "x": write_model(tmp_path / "x", byte_pairs([*MERGES, ("e", "f"), ("ef", "h")]), seed=1, base=base),
    }
    merge_into(recipe(models, method="average", tokenizer="union"), tmp_path / "out")
    _, tokenizer = loaded(tmp_path / "out")
    contents = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert (
        contents["model"]["merges"][-2:] == [["e", "f"], ["ef", "h"]]
        and contents["model"]["vocab"]["ef"] == base.tokens["ef"]
    )
    assert tokenizer.get_vocab() == {**base.tokens, "efh": len(base.tokens)}


def test_a_class_that_builds_its_tokenizer_itself(tmp_path: Path) -> None:
    """transformers makes some tokenizers (GPT-2's, say) from the vocabulary alone: ids must be the same there."""
    models = pool(tmp_path, "gpt2", True)
    for item in models.values():
        rewritten(item, "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    merge_into(recipe(models, method="average", tokenizer="union"), tmp_path / "out")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    contents = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    wanted = {**contents["model"]["vocab"], **{item["content"]: item["id"] for item in contents["added_tokens"]}}
    assert type(tokenizer).__name__.startswith("GPT2") and tokenizer.get_vocab() == wanted


def test_an_adapter_of_the_head(tmp_path: Path) -> None:
    """A LoRA update of lm_head stays with the base's tokens; tokens that the base lacks have no update."""
    from safetensors.torch import save_file

    models = pool(tmp_path, "llama", False)
    base, chat = models["base"], models["chat"]
    torch.manual_seed(9)
    down, up = torch.randn(2, 8), torch.randn(len(base.tokens), 2)
    stem = "base_model.model.lm_head"
    (tmp_path / "lora").mkdir()
    save_file(
        {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}, tmp_path / "lora" / "adapter_model.safetensors"
    )
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 2,
        "target_modules": ["lm_head"],
        "base_model_name_or_path": "base",
    }
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    lora = Made(tmp_path / "lora", base.tokens, {**base.tensors, HEAD: base.tensors[HEAD] + up @ down})
    asked = recipe({"base": base, "chat": chat, "lora": lora}, method="task_arithmetic", scale=0.5, tokenizer="union")
    merge_into(asked, tmp_path / "out")
    _, tokenizer = loaded(tmp_path / "out")
    tokens = tokenizer.get_vocab()
    ground, *experts = rows_by_token([base, chat], HEAD, tokens, len(tokens))
    update = torch.zeros_like(ground)
    for token, number in base.tokens.items():
        update[tokens[token]] = (up @ down)[number]
    wanted = ground + 0.5 * (experts[0] - ground + update)
    torch.testing.assert_close(load_file(tmp_path / "out" / "model.safetensors")[HEAD], wanted, rtol=0, atol=1e-6)


def test_with_folded_adapters_other_layers_and_parts(tmp_path: Path) -> None:
    """A vocabulary together with an adapter folded into an expert, a layer taken twice, and rules with methods."""
    from safetensors.torch import save_file

    models = pool(tmp_path, "llama", True)
    target, rank = "model.layers.0.self_attn.q_proj", 1
    torch.manual_seed(4)
    factors = {"A": torch.randn(rank, 8), "B": torch.randn(8, rank)}
    (tmp_path / "lora").mkdir()
    contents = {f"base_model.model.{target}.lora_{side}.weight": value for side, value in factors.items()}
    save_file(contents, tmp_path / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "base_model_name_or_path": "base"}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    asked = recipe(models, method="average", tokenizer="union")
    asked["experts"][0]["adapter"] = {"source": tmp_path / "lora"}
    asked["stack"] = [{"layers": [0, 0]}, {"layers": [0, 0]}]
    asked["select"] = [{"names": "*embed*", "method": "slerp", "t": 0.25}, {}]
    merge_into(asked, tmp_path / "out")
    model, tokenizer = loaded(tmp_path / "out")
    assert model.config.num_hidden_layers == 2
    result, tokens = load_file(tmp_path / "out" / "model.safetensors"), tokenizer.get_vocab()
    _, chat, long = rows_by_token(list(models.values()), EMBEDDING["llama"], tokens, len(tokens))
    angle = torch.arccos((chat * long).sum() / chat.norm() / long.norm())
    wanted = (torch.sin(0.75 * angle) * chat + torch.sin(0.25 * angle) * long) / torch.sin(angle)
    torch.testing.assert_close(result[EMBEDDING["llama"]], wanted, rtol=0, atol=1e-5)
    weights = [models[name].tensors[f"{target}.weight"] for name in ("chat", "long")]
    for layer in (0, 1):
        name = f"{target}.weight".replace(".0.", f".{layer}.")
        wanted = (weights[0] + factors["B"] @ factors["A"] + weights[1]) / 2
        torch.testing.assert_close(result[name], wanted, rtol=0, atol=1e-6)


def test_nothing_changes_where_nothing_differs(tmp_path: Path) -> None:
    """Rules over one vocabulary make the model that the recipe makes without them, padded rows and all."""
    base = write_model(tmp_path / "base", byte_pairs(), padding=5)
    models = {"base": base, "x": write_model(tmp_path / "x", byte_pairs(), padding=5, seed=1, base=base)}
    plainly = merge_into(recipe(models, method="ties", density=0.5), tmp_path / "plain")
    rules = {"source": "union", "pad_to_multiple_of": len(base.tensors[HEAD])}
    ruled = merge_into(recipe(models, method="ties", density=0.5, tokenizer=rules), tmp_path / "ruled")
    assert plainly.digest == ruled.digest
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        assert (tmp_path / "plain" / name).read_text() == (tmp_path / "ruled" / name).read_text()
    step = [(tmp_path / item / "README.md").read_text().split("step")[1:] for item in ("plain", "ruled")]
    assert step[0] == step[1]


def test_rows_that_are_only_padding(tmp_path: Path) -> None:
    """The same tokens and another number of rows: refused as it is, cut to the tokens by a rule."""
    base = write_model(tmp_path / "base", byte_pairs(), padding=7, tied=True)
    models = {"base": base, "x": write_model(tmp_path / "x", byte_pairs(), seed=1, base=base, tied=True)}
    said = command(tmp_path, recipe(models, method="average")).output
    assert "vocab_size" in said and "tokenizer: {source: union}" in said
    result = command(tmp_path, recipe(models, method="average", tokenizer="base"))
    assert result.exit_code == 0, result.output
    model, _ = loaded(tmp_path / "out")
    assert model.config.vocab_size == len(base.tokens)


def test_special_tokens_and_template_of_a_named_expert(tmp_path: Path) -> None:
    """Its special tokens, its tokenizer files and its chat template; the rest of the configuration is the base's."""
    from mergecore.spec.recipe import parse_recipe
    from tests.recipe_files import plain

    base = write_model(tmp_path / "base", byte_pairs(), special=["<s>", "</s>"])
    template = "{% for m in messages %}<u>{{ m['content'] }}<end>{% endfor %}"
    chat = write_model(
        tmp_path / "chat", byte_pairs(), special=["<u>", "<s>", "<end>"], seed=1, base=base, template=template
    )
    rewritten(base, "config.json", rope_theta=12345.0)
    models = {"base": base, "chat": chat}
    result = merge_into(recipe(models, method="average", tokenizer="chat"), tmp_path / "out")
    model, tokenizer = loaded(tmp_path / "out")
    assert tokenizer.eos_token == "<end>" and model.config.eos_token_id == chat.tokens["<end>"]
    assert tokenizer.chat_template == template
    assert not result.warnings  # beside rope_parameters, transformers does not read rope_theta
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_theta"] == 12345.0
    pinned = (tmp_path / "out" / "mergeloom.yaml").read_text()
    assert "source: chat" in pinned
    assert parse_recipe(plain(recipe(models, method="average", tokenizer="chat")), "recipe").tokenizer is not None
    # Of the union the base's special tokens hold, which is said aloud; so is the template that goes with other tokens.
    said = merge_into(recipe(models, method="average", tokenizer="union"), tmp_path / "union").warnings
    assert any("ends its texts with '<end>', the result with '</s>'" in item for item in said)
    assert any("a chat template lies there, and the result has none" in item for item in said)
    asked = recipe(models, method="average", tokenizer="base", chat_template=template)
    said = merge_into(asked, tmp_path / "base-out").warnings
    assert any("the chat template writes '<end>', '<u>', no token of the result" in item for item in said)


@pytest.mark.parametrize("rules", [{}, {"tokenizer": "base"}])
def test_a_given_template_that_writes_what_nobody_has_is_said_aloud(rules: dict[str, Any], tmp_path: Path) -> None:
    base, chat = write_model(tmp_path / "base", words(["a"])), write_model(tmp_path / "chat", words(["a"]), seed=1)
    models = {"base": base, "chat": chat}
    for template, lost in (
        ("<|im_start|>{{ messages }}<|im_end|>", "'<|im_end|>', '<|im_start|>'"),
        ("<|{{ x }}|>", ""),
    ):
        asked = recipe(models, method="average", chat_template=template, **rules)
        said = [item for item in merge_into(asked, tmp_path / f"out{len(lost)}").warnings if "chat template" in item]
        assert len(said) == bool(lost) and lost in "".join(said)


def test_the_first_holds_where_tokenizers_contradict_each_other(tmp_path: Path) -> None:
    """`conflicts: first`: another encoding's tokens are added by their text with the base's settings, and a warning."""
    base = write_model(tmp_path / "base", byte_pairs(), added=["<m>"])
    other = write_model(
        tmp_path / "x",
        byte_pairs([("c", "d"), ("b", "c"), ("a", "b")]),
        special=["<s>", "<m>", "</s>"],
        seed=1,
        base=base,
    )
    models = {"base": base, "x": other}
    rules = {"source": "union", "conflicts": "first"}
    result = merge_into(recipe(models, method="average", tokenizer=rules), tmp_path / "out")
    said = " ".join(result.warnings)
    assert "merge 0 is a + b in the base and c + d in expert 'x'" in said and "'<m>' is special in expert 'x'" in said
    _, tokenizer = loaded(tmp_path / "out")
    assert set(tokenizer.get_vocab()) == set(base.tokens) | set(other.tokens)
    assert tokenizer.tokenize("abcd") == ["a", "bc", "d"] and "<m>" not in tokenizer.all_special_tokens
