"""What is tied is read from the model: class defaults, every declaration, heads stored twice, heads that differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import constants
from torch import nn

from mergecore.checkpoints.architectures import STATED
from mergecore.checkpoints.blueprint import blueprint_of
from mergecore.checkpoints.layout import tied_names
from mergecore.checkpoints.sources import Source
from mergecore.checkpoints.sources.hub import HubSource
from mergecore.engine.executor import InProcess
from mergecore.errors import MismatchError
from mergecore.events import silent
from mergecore.recipes.merge_recipe import merge_recipe
from mergecore.spec.recipe import parse_recipe
from mergecore.spec.sources import SourceSpec
from mergecore.tensors.source import TensorInfo
from tests.checkpoints.test_names_in_memory import SIZES, loaded, mean, moved, rewrite, saved, weights
from tests.hub_server import running_hub
from tests.recipe_files import find, merge_into

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DRAWN = {"method": "ties", "density": 1.0, "drop": {"rate": 0.5, "seed": 0}}


def llama(tied: bool) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied))


def gemma2() -> nn.Module:
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, head_dim=8))


def whisper() -> nn.Module:
    config = transformers.WhisperConfig(
        vocab_size=96, d_model=16, encoder_layers=3, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=20,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


def edit(folder: Path, **changes: Any) -> None:
    """Change config.json; None removes a key."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def with_head(folder: Path, owner: str, name: str, shift: float = 0.0) -> None:
    """Store the head beside the embedding, moved by `shift`."""
    rewrite(folder, weights(folder) | {name: weights(folder)[owner] + shift})


@pytest.mark.parametrize("twice", ["everywhere", "not in the base", "in the base alone"])
def test_a_class_that_ties_by_default(twice: str, tmp_path: Path) -> None:
    """Gemma 2 as on the hub: no tie_word_embeddings in config.json, and a head in the files of earlier merges."""
    folders = saved(tmp_path, base=gemma2(), a=moved(gemma2(), 1), b=moved(gemma2(), 2))
    for folder in folders:
        edit(folder, tie_word_embeddings=None)
        if twice == "everywhere" or (folder.name == "base") == (twice == "in the base alone"):
            with_head(folder, EMBEDDING, HEAD)
    base, a, b = folders
    merge_into({**DRAWN, "base": base, "experts": [a, b]}, tmp_path / "out")
    assert HEAD not in weights(tmp_path / "out")
    model = transformers.Gemma2ForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_head_of_another_name(tmp_path: Path) -> None:
    """Whisper's proj_out is its decoder's embedding."""
    folders = saved(tmp_path, base=whisper(), a=moved(whisper(), 1), b=moved(whisper(), 2))
    for folder in folders:
        with_head(folder, "model.decoder.embed_tokens.weight", "proj_out.weight")
    base, a, b = folders
    merge_into({**DRAWN, "base": base, "experts": [a, b]}, tmp_path / "out")
    assert "proj_out.weight" not in weights(tmp_path / "out")
    loaded(transformers.WhisperForConditionalGeneration, tmp_path / "out")


def test_an_expert_whose_head_differs_is_refused(tmp_path: Path) -> None:
    """As PEFT folds an adapter on a tied head: config.json says tied, the file has both, transformers loads both."""
    base, a, b = saved(tmp_path, base=llama(True), a=moved(llama(True), 1), b=moved(llama(True), 2))
    with_head(a, EMBEDDING, HEAD)
    recipe = {"method": "average", "base": base, "experts": [{"source": str(a), "name": "a"}, b]}
    merge_into(recipe, tmp_path / "equal")
    shape = transformers.LlamaForCausalLM
    close = mean(loaded(shape, a), loaded(shape, b))[EMBEDDING]
    torch.testing.assert_close(weights(tmp_path / "equal")[EMBEDDING], close)
    for says in (True, False):
        with_head(a, EMBEDDING, HEAD, 0.01)
        edit(a, tie_word_embeddings=says)
        with pytest.raises(
            MismatchError, match=r"expert 'a'.*lm_head\.weight.*of its own.*base ties.*give a base that has both"
        ):
            merge_into(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tied_expert_of_a_base_with_a_head(tmp_path: Path) -> None:
    """The expert's head is its embedding; so it is merged, and said."""
    base, a = saved(tmp_path, base=llama(False), a=moved(llama(True), 1))
    assert HEAD in weights(base) and HEAD not in weights(a)
    written = merge_into(
        {"method": "average", "base": base, "experts": [{"source": str(a), "name": "a"}]}, tmp_path / "out"
    )
    assert any("expert 'a'" in said and f"ties '{HEAD}' to '{EMBEDDING}'" in said for said in written.warnings)
    shape = transformers.LlamaForCausalLM
    result, expert = loaded(shape, tmp_path / "out"), loaded(shape, a)
    for name in result:
        torch.testing.assert_close(result[name], expert[name], rtol=0, atol=0)
    edit(a, tie_word_embeddings=False)
    with pytest.raises(MismatchError, match=r"lacks 'lm_head\.weight'"):
        merge_into({"method": "average", "base": base, "experts": [a]}, tmp_path / "out2")


def test_a_base_whose_head_differs_is_untied(tmp_path: Path) -> None:
    """transformers loads the two apart; so they are merged, and the result's config.json says so to everybody else."""
    base, a, b = saved(tmp_path, base=llama(True), a=moved(llama(True), 1), b=moved(llama(True), 2))
    for folder in (base, a):
        with_head(folder, EMBEDDING, HEAD, 0.5)
    written = merge_into({"method": "average", "base": base, "experts": [a, b]}, tmp_path / "out")
    assert any(
        "ties 'lm_head.weight' and 'model.embed_tokens.weight', which differ" in said for said in written.warnings
    )
    out, first, second = (weights(folder) for folder in (tmp_path / "out", a, b))
    torch.testing.assert_close(out[HEAD], (first[HEAD] + second[EMBEDDING]) / 2)
    torch.testing.assert_close(out[EMBEDDING], (first[EMBEDDING] + second[EMBEDDING]) / 2)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    loaded(transformers.LlamaForCausalLM, tmp_path / "out")


def test_bytes_of_a_hub_are_sampled_before_they_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no sample shows is told once the files are here, and from then on beforehand: nothing is lost in silence."""
    values = {**SIZES, "vocab_size": 30_000, "num_hidden_layers": 1}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values, tie_word_embeddings=True))
    base, expert = saved(tmp_path, base=model, expert=model)
    head = weights(expert)[EMBEDDING].clone()
    head.view(-1)[20_000] += 1  # between the first two samples of 64 KiB
    rewrite(expert, weights(expert) | {HEAD: head})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with running_hub() as hub:
        hub.push("owner/expert", {path.name: path.read_bytes() for path in expert.iterdir()})

        def resolved(source: SourceSpec) -> Source:
            if source.source.startswith("owner/"):
                return HubSource(source.source, source.revision, tmp_path / "cache", None, hub.endpoint)
            return find(source)

        recipe = {"method": "average", "base": str(base), "experts": [{"source": "owner/expert", "name": "e"}]}
        for said in (r"owner/expert@.*tied.*some of their values differ.*start again", "expert 'e'.*of its own"):
            with pytest.raises(MismatchError, match=said):
                merge_recipe(parse_recipe(recipe, "recipe"), tmp_path / "out", resolved, InProcess(), silent)
        edit(base, tie_word_embeddings=False)
        with_head(base, EMBEDDING, HEAD)
        merge_recipe(parse_recipe(recipe, "recipe"), tmp_path / "out", resolved, InProcess(), silent)
    assert torch.equal(weights(tmp_path / "out")[HEAD], head)


def test_a_file_that_holds_the_head_alone() -> None:
    """transformers then ties the embedding to the head; so the head is the owner."""
    config = {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "num_hidden_layers": 1}
    assert tied_names({HEAD: TensorInfo("F32", (4, 2))}, config) == {EMBEDDING: HEAD}


@pytest.mark.parametrize("kind", STATED)
@pytest.mark.parametrize("tied", [True, False])
def test_the_families_of_the_table_are_as_transformers_has_them(kind: str, tied: bool) -> None:
    """For these transformers is not asked; the table must say the same."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = {
        "model_type": kind,
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]],
        "tie_word_embeddings": tied,
    }
    blueprint = blueprint_of(config)
    assert blueprint is not None
    names = {name: TensorInfo("F32", shape) for name, shape in blueprint.shapes.items()}
    assert tied_names(names, config) == dict(blueprint.tied)
    assert bool(blueprint.tied) == tied
