"""A model with another model's tokenizer: rows token by token, what transformers makes of it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from flows.cli.main import main
from mergecore.checkpoints.snapshot import read_snapshot
from mergecore.checkpoints.vocabulary.spelling import matches, meanings
from mergecore.checkpoints.vocabulary.tokenizer import Tokenizer, read_tokenizer
from mergecore.engine.executor import InProcess
from mergecore.errors import MergeloomError
from mergecore.events import silent
from mergecore.recipes.transplant_tokenizer import Rules, Transplanted, transplant_tokenizer
from mergecore.spec.sources import SourceSpec
from tests.arithmetic.test_approximation import pursued
from tests.recipe_files import find
from tests.vocabularies import (
    EMBEDDING,
    HEAD,
    IMAGE,
    LETTERS,
    MERGES,
    Made,
    byte_pairs,
    pieces,
    rewritten,
    words,
    write_model,
)

NEW = [("a", "c"), ("ac", "b"), ("e", "f"), ("ef", "g")]
"""Merges of the donor alone."""


def transplanted(model: Path, donor: Path, out: Path, workers: int = 1, **rules: Any) -> Transplanted:
    sources = (SourceSpec(source=str(path)) for path in (model, donor))
    return transplant_tokenizer(*sources, out, find, InProcess(workers), silent, Rules(**rules))


@pytest.fixture(scope="module", params=["untied", "tied"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Made, Made]:
    """A model, and a donor with other tokens, another order of the same ones, and other names of the special ones."""
    folder, tied = tmp_path_factory.mktemp("pair"), request.param == "tied"
    model = write_model(folder / "model", byte_pairs(), tied=tied, padding=3, dtype=torch.bfloat16)
    other = byte_pairs([*MERGES[:2], *NEW], letters=[*reversed(LETTERS[:-1]), "i", "<unk>"])
    donor = write_model(folder / "donor", other, special=("<begin>", "<mid>", "<end>"), seed=1, template="{{ x }}")
    return model, donor


def wanted_rows(model: Made, donor: Made, name: str, table: str, count: int) -> Tensor:
    """Row by row, in NumPy: the model's for shared tokens and roles, else the pursuit's combination."""
    same = {"<begin>": "<s>", "<end>": "</s>"}
    ours, theirs = model.tensors[name].double().numpy(), donor.tensors[table].double().numpy()
    shared = {token: same.get(token, token) for token in donor.tokens if same.get(token, token) in model.tokens}
    in_order = sorted(shared, key=lambda token: donor.tokens[token])
    points = theirs[[donor.tokens[token] for token in in_order]]
    basis = ours[[model.tokens[shared[token]] for token in in_order]]
    rows = np.zeros((max(donor.tokens.values()) + 1, ours.shape[1]))
    for token, number in donor.tokens.items():
        if token in shared:
            rows[number] = ours[model.tokens[shared[token]]]
        else:
            chosen, weights = pursued(theirs[number], points, count)
            rows[number] = weights @ basis[chosen]
    return torch.from_numpy(rows)


def test_every_row(pair: tuple[Made, Made], tmp_path: Path) -> None:
    model, donor = pair
    result = transplanted(model.folder, donor.folder, tmp_path / "out", count=4)
    after = load_file(tmp_path / "out/model.safetensors")
    tables = {name: info for name, info in ((EMBEDDING["llama"], EMBEDDING["llama"]), (HEAD, HEAD)) if name in after}
    assert set(after) == set(model.tensors) and (HEAD in after) == (HEAD in model.tensors)
    for name, table in tables.items():
        wanted = wanted_rows(model, donor, name, table if table in donor.tensors else EMBEDDING["llama"], 4)
        assert after[name].dtype == torch.bfloat16
        torch.testing.assert_close(after[name].double(), wanted, rtol=1e-2, atol=1e-2)
    same = [("a", "a"), ("ab", "ab"), ("<begin>", "<s>"), ("<end>", "</s>"), ("<unk>", "<unk>")]
    for theirs, ours in same:
        for name in tables:
            assert torch.equal(after[name][donor.tokens[theirs]], model.tensors[name][model.tokens[ours]])
    for name in set(after) - set(tables):
        assert torch.equal(after[name], model.tensors[name])
    record = json.loads((tmp_path / "out/transplant.json").read_text())
    assert record["approximated"] == result.approximated == len({"ac", "acb", "ef", "efg", "i", "<mid>"})
    assert record["shared"] + record["approximated"] == record["rows"] == len(donor.tokens)
    assert set(result.errors) == set(tables) and all(0 < error < 1 for error in result.errors.values())


def test_transformers_loads_it(pair: tuple[Made, Made], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, donor = pair
    transplanted(model.folder, donor.folder, tmp_path / "out", count=4, multiple=8)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer, theirs = (AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "out", donor.folder))
    assert tokenizer.get_vocab() == theirs.get_vocab() and tokenizer.chat_template == "{{ x }}"
    assert tokenizer("ab acb efg").input_ids == theirs("ab acb efg").input_ids
    assert loaded.config.vocab_size % 8 == 0 and loaded.config.vocab_size >= len(donor.tokens)
    assert loaded.config.eos_token_id == donor.tokens["<end>"] and loaded.config.bos_token_id == donor.tokens["<begin>"]
    assert loaded.config.tie_word_embeddings == (HEAD not in model.tensors)
    rows = load_file(tmp_path / "out/model.safetensors")[EMBEDDING["llama"]]
    assert not rows[len(donor.tokens) :].any()
    # Texts of shared tokens are read as before; of their next tokens the model thinks as before.
    before = AutoModelForCausalLM.from_pretrained(model.folder)
    ids = [[of.tokens[token] for token in ("a", "ab", "e")] for of in (model, donor)]
    ours, actual = before(torch.tensor([ids[0]])).logits, loaded(torch.tensor([ids[1]])).logits
    shared = [token for token in model.tokens if token in donor.tokens]
    numbers = [[of.tokens[token] for token in shared] for of in (model, donor)]
    torch.testing.assert_close(actual[..., numbers[1]], ours[..., numbers[0]], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shape", ["gpt2", "gemma3", "llava"])
@pytest.mark.parametrize("tied", [True, False])
def test_other_shapes_of_models(shape: str, tied: bool, tmp_path: Path) -> None:
    """GPT-2's names; models that take images, whose sizes stand in `text_config`: transformers misses nothing."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    added = [] if shape == "gpt2" else [IMAGE]
    model = write_model(tmp_path / "model", byte_pairs(), shape=shape, tied=tied, added=added)
    donor = write_model(tmp_path / "donor", byte_pairs([*MERGES, *NEW]), shape=shape, tied=tied, added=added, seed=1)
    result = transplanted(model.folder, donor.folder, tmp_path / "out", count=5)
    assert result.approximated == len(NEW) and set(result.errors) <= set(model.tensors)
    assert len(result.errors) == (1 if tied else 2)
    kind: Any = AutoModelForCausalLM if shape == "gpt2" else AutoModelForImageTextToText
    loaded, said = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"]
    rows = loaded.get_input_embeddings().weight
    assert rows.shape[0] == len(donor.tokens) == loaded.config.get_text_config().vocab_size
    name = next(name for name in result.errors if "lm_head" not in name)
    for token in ("a", "abcd", *added):
        assert torch.equal(rows[donor.tokens[token]], model.tensors[name][model.tokens[token]])
    if added:
        assert loaded.config.image_token_index == donor.tokens[IMAGE]
    assert AutoModel.from_pretrained(tmp_path / "out") is not None


def test_its_own_tokenizer_changes_nothing(pair: tuple[Made, Made], tmp_path: Path) -> None:
    model, _ = pair
    result = transplanted(model.folder, model.folder, tmp_path / "out")
    after = load_file(tmp_path / "out/model.safetensors")
    for name, value in model.tensors.items():
        assert torch.equal(after[name], value[: len(after[name])])
    assert result.approximated == 0 and result.rows == len(model.tokens)


@pytest.mark.parametrize("method", ["omp", "nearest"])
def test_a_donor_in_a_turned_space_gives_the_turned_rows(method: Any, tmp_path: Path) -> None:
    """The donor's embedding is the model's, turned: what the donor's missing rows are to it they are to the model."""
    model = write_model(tmp_path / "model", byte_pairs())
    donor = write_model(tmp_path / "donor", byte_pairs([*MERGES, *NEW[2:]]), seed=1)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    tensors = dict(donor.tensors)
    truth = {}
    for name in (EMBEDDING["llama"], HEAD):
        rows = torch.randn(len(donor.tokens), 8, generator=torch.Generator().manual_seed(1))
        for token, number in model.tokens.items():
            rows[donor.tokens[token]] = model.tensors[name][number]
        near = [rows[donor.tokens[token]] for token in ("a", "b")]
        rows[donor.tokens["ef"]], rows[donor.tokens["efg"]] = near[0] * 2, near[1] - 3 * near[0]
        tensors[name], truth[name] = rows @ turn, rows
    save_file(tensors, donor.folder / "model.safetensors", {"format": "pt"})
    values = {"count": 8} if method == "omp" else {"count": 12, "weighting": "least_squares"}
    result = transplanted(model.folder, donor.folder, tmp_path / "out", method=method, **values)
    after = load_file(tmp_path / "out/model.safetensors")
    for name, rows in truth.items():
        torch.testing.assert_close(after[name], rows, rtol=1e-4, atol=1e-4)
    assert max(result.errors.values()) < 1e-5


def test_mean_and_zero(pair: tuple[Made, Made], tmp_path: Path) -> None:
    model, donor = pair
    name = EMBEDDING["llama"]
    for method, wanted in (("zero", torch.zeros(8)), ("mean", model.tensors[name].double().mean(0).float())):
        transplanted(model.folder, donor.folder, tmp_path / method, method=method)
        rows = load_file(tmp_path / method / "model.safetensors")[name].float()
        torch.testing.assert_close(rows[donor.tokens["efg"]], wanted, rtol=1e-2, atol=1e-3)


def test_nothing_in_common(tmp_path: Path) -> None:
    """Without a shared token there is nothing to combine; zeros are all that is left."""
    model = write_model(tmp_path / "model", words(["a", "b"]))
    donor = write_model(tmp_path / "donor", words(["x", "y", "z"]), seed=1)
    for written in (model, donor):
        settings = written.folder / "tokenizer_config.json"
        roles = {key: value for key, value in json.loads(settings.read_text()).items() if not key.endswith("_token")}
        settings.write_text(json.dumps(roles))
    lexicon = donor.folder / "tokenizer.json"
    renamed = lexicon.read_text()
    for token in ("<s>", "</s>", "<unk>"):
        renamed = renamed.replace(f'"{token}"', f'"{token[:-1]}!>"')
    lexicon.write_text(renamed)
    with pytest.raises(MergeloomError, match=r"share 0 of the donor's 6 tokens.*as 'mean' or 'zero' do"):
        transplanted(model.folder, donor.folder, tmp_path / "out")
    result = transplanted(model.folder, donor.folder, tmp_path / "out", method="zero")
    assert (result.shared, result.approximated) == (0, 6)
    assert not load_file(tmp_path / "out/model.safetensors")[EMBEDDING["llama"]].any()


def test_the_same_bytes_for_any_number_of_workers(
    pair: tuple[Made, Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mergecore.recipes.transplant_tokenizer as recipe

    monkeypatch.setattr(recipe, "BATCH", 2)
    model, donor = pair
    digests = {
        transplanted(model.folder, donor.folder, tmp_path / str(workers), workers, count=3).digest for workers in (1, 3)
    }
    assert len(digests) == 1


def tokenizer_of(written: Made) -> Tokenizer:
    rows = max(written.tokens.values()) + 1
    tokenizer = read_tokenizer(read_snapshot(find(SourceSpec(source=str(written.folder)))), rows, "it", {})
    assert tokenizer is not None
    return tokenizer


def test_tokens_of_other_spellings_are_the_same_text(tmp_path: Path) -> None:
    """Byte-level signs, ▁ of sentencepiece, bytes spelled out: what counts is the text."""
    from tokenizers import Tokenizer as Encoding
    from tokenizers import decoders, models, pre_tokenizers

    signs = ["Ġ", "Ã", "©", "a", "Ġa", "é", "Ċ", "<unk>"]
    encoding = Encoding(models.BPE(vocab={sign: n for n, sign in enumerate(signs)}, merges=[("Ġ", "a")]))
    encoding.pre_tokenizer, encoding.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    donor = tokenizer_of(write_model(tmp_path / "donor", encoding))
    scores = {
        "▁": -1.0,
        "▁a": -1.0,
        "a": -1.0,
        "é": -2.0,
        "<0x0A>": -3.0,
        "<0x61>": -3.0,
        "<0xC3>": -3.0,
        "<0xA9>": -3.0,
    }
    model = tokenizer_of(write_model(tmp_path / "model", pieces(scores, byte_fallback=True)))
    shared = {
        token: next(name for name, number in model.tokens.items() if number == ours)
        for theirs, ours in matches(donor, model).items()
        for token, number in donor.tokens.items()
        if number == theirs
    }
    same = {"Ġ": "▁", "Ġa": "▁a", "a": "a", "Ã": "<0xC3>", "©": "<0xA9>", "Ċ": "<0x0A>"}
    # "é" of a byte-level encoding is the byte E9 alone, which is no text; the model has no such token.
    assert shared == {**same, "<s>": "<s>", "</s>": "</s>", "<unk>": "<unk>"}
    assert meanings(donor)["</s>"] == (("role", "eos_token"), ("special", "</s>"))
    assert matches(model, donor)[model.tokens["<0x61>"]] == donor.tokens["a"]


def test_what_cannot_be_transplanted_is_refused(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", byte_pairs())
    donor = write_model(tmp_path / "donor", byte_pairs([*MERGES, *NEW]), seed=1)
    bare = write_model(tmp_path / "bare", byte_pairs(), seed=2)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare.folder / name).unlink(missing_ok=True)
    wrong = rewritten(write_model(tmp_path / "wrong", byte_pairs(), seed=3), "config.json", eos_token_id=77)
    short = rewritten(write_model(tmp_path / "short", byte_pairs(), seed=4), "config.json", vocab_size=9)
    alone = write_model(tmp_path / "alone", words(["x", "y"]), special=("[A]", "[B]"), seed=5)
    poor = write_model(tmp_path / "poor", byte_pairs([*MERGES, *NEW]), seed=6)
    tensors = dict(poor.tensors)
    tensors[EMBEDDING["llama"]][3, 4] = float("nan")
    save_file(tensors, poor.folder / "model.safetensors", {"format": "pt"})
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (bare.folder, {}, "the donor .* has no tokenizer"),
        (wrong.folder, {}, "the donor .*eos_token_id 77, which is no token"),
        (short.folder, {}, "the donor .*have 9, .* rows"),
        (donor.folder, {"count": 500}, r"omp of 500 tokens: .* share \d+ of"),
        (alone.folder, {"count": 30}, "omp of 30"),
        (poor.folder, {"count": 2}, "the donor: tensor 'model.embed_tokens.weight' holds nan"),
    ]
    pictures = rewritten(write_model(tmp_path / "pictures", byte_pairs(), seed=7), "config.json", image_token_index=3)
    with pytest.raises(MergeloomError, match=r"the model .*image_token_index 3, and the donor's says nothing"):
        transplanted(pictures.folder, donor.folder, tmp_path / "out", count=2)
    both = write_model(tmp_path / "both", byte_pairs(), tied=True, seed=8)
    save_file(
        {**both.tensors, HEAD: both.tensors[EMBEDDING["llama"]] + 1},
        both.folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(MergeloomError, match=rf"the model .*ties '{HEAD}' to .*differ in its files"):
        transplanted(both.folder, donor.folder, tmp_path / "out", count=2)
    for path, rules, said in cases:
        with pytest.raises(MergeloomError, match=said):
            transplanted(model.folder, path, tmp_path / "out", **rules)
    assert not list(tmp_path.glob("out*"))


def test_the_command(pair: tuple[Made, Made], tmp_path: Path) -> None:
    model, donor = pair
    words = ["transplant-tokenizer", str(model.folder), str(donor.folder), str(tmp_path / "out"), "--workers", "1"]
    said = CliRunner().invoke(main, [*words, "--method", "nearest", "-k", "3", "--metric", "cosine"])
    assert said.exit_code == 0, said.output
    assert "6 were made" in said.output and "mean relative error of rows in" in said.output
    card = (tmp_path / "out/README.md").read_text()
    assert "3 nearest shared tokens (cosine, distance)" in card and str(donor.folder) in card
    again = CliRunner().invoke(main, words)
    assert again.exit_code == 1 and "share" in again.output
    again = CliRunner().invoke(main, [*words, "-k", "3"])
    assert again.exit_code == 1 and "exists already" in again.output
