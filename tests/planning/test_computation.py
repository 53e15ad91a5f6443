"""Configurations that compute differently: what is refused, what is said, and what is no difference."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mergecore.errors import MismatchError
from mergecore.planning.computation import check_computation, differences
from tests.recipe_files import merge_into

LLAMA = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("ours", "theirs", "key"),
    [
        ({}, {"num_attention_heads": 8, "head_dim": 8}, "num_attention_heads"),
        ({}, {"num_key_value_heads": 4}, "num_key_value_heads"),
        ({}, {"hidden_act": "relu"}, "hidden_act"),
        ({"hidden_act": "gelu"}, {"hidden_act": "gelu_new", "head_dim": 16}, "head_dim"),
        ({"model_type": "opt"}, {"do_layer_norm_before": False}, "do_layer_norm_before"),
        (
            {"model_type": "bert", "position_embedding_type": "absolute"},
            {"position_embedding_type": "relative_key"},
            "position_embedding_type",
        ),
        ({"model_type": "toy", "n_head": 4}, {"n_head": 8}, "n_head"),
        (
            {"model_type": "toy", "layer_types": ["full_attention", "linear_attention"]},
            {"layer_types": ["linear_attention", "full_attention"]},
            "layer_types",
        ),
        ({"model_type": "toy", "text_config": {"num_heads": 2}}, {"text_config": {"num_heads": 4}}, "text_config.num"),
    ],
)
def test_weights_that_cannot_mean_the_same_are_refused(ours: dict[str, Any], theirs: dict[str, Any], key: str) -> None:
    base = {**LLAMA, **ours}
    with pytest.raises(MismatchError, match=rf"expert 'x'.*{key}.* where the base's has"):
        check_computation(base, {**base, **theirs}, "expert 'x'")


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ({}, {"rope_theta": 1e6}, "rope_parameters.rope_theta 1000000.0 where the base's has 10000.0"),
        ({}, {"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_parameters.factor 4.0"),
        ({}, {"max_position_embeddings": 16384}, "max_position_embeddings 16384 where the base's has 2048"),
        ({}, {"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05 where the base's has 1e-06"),
        ({"model_type": "gemma2"}, {"final_logit_softcapping": None}, "final_logit_softcapping nothing"),
        ({"model_type": "mistral"}, {"sliding_window": 128}, "sliding_window 128 where the base's has 4096"),
        ({"model_type": "phi", "hidden_act": "gelu"}, {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act"),
        (
            {"model_type": "toy", "layer_types": ["full_attention"]},
            {"layer_types": ["sliding_attention"]},
            "layer_types ['sliding_attention'] where the base's has ['full_attention']",
        ),
        ({"model_type": "toy"}, {"logit_scale": 0.5}, "logit_scale 0.5 where the base's has nothing"),
        (
            {"model_type": "modernbert"},
            {"classifier_pooling": "mean"},
            "classifier_pooling mean where the base's has cls",
        ),
        ({"model_type": "gemma3"}, {"image_token_index": 51}, "image_token_index 51"),
        ({"model_type": "whisper"}, {"decoder_start_token_id": 3}, "decoder_start_token_id 3"),
        ({"model_type": "bert"}, {"is_decoder": True}, "is_decoder True where the base's has False"),
        (
            {"model_type": "bert", "problem_type": "single_label_classification"},
            {"problem_type": "multi_label_classification"},
            "problem_type multi_label_classification",
        ),
    ],
)
def test_what_weights_may_live_with_is_said(ours: dict[str, Any], theirs: dict[str, Any], said: str) -> None:
    base = {**LLAMA, **ours}
    assert said in check_computation(base, {**base, **theirs}, "expert 'x'")


def test_labels_in_another_order_are_refused() -> None:
    """The rows of the heads are other classes: their mean is of none."""
    base = {"model_type": "bert", "id2label": {"0": "neg", "1": "pos"}}
    with pytest.raises(MismatchError, match=r"expert 'x'.*id2label: 0 is 'pos' where the base's is 'neg'"):
        check_computation(base, {**base, "id2label": {"0": "pos", "1": "neg"}}, "expert 'x'")
    for others in ({0: "neg", 1: "pos"}, {"0": "a", "1": "b"}, {"0": "neg"}):
        assert check_computation(base, {**base, "id2label": others}, "expert 'x'") == ""


@pytest.mark.parametrize(
    "theirs",
    [
        {"rope_theta": 10000.0},
        {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}},
        {"head_dim": 8, "transformers_version": "4.40.0", "torch_dtype": "bfloat16", "use_cache": False},
        {"attention_dropout": 0.5, "architectures": ["X"], "id2label": {"0": "a"}, "eos_token_id": [1, 2]},
        {"_name_or_path": "x", "initializer_range": 1.0, "vocab_size": 8, "tie_word_embeddings": True},
    ],
)
def test_what_says_the_same_is_no_difference(theirs: dict[str, Any]) -> None:
    assert check_computation(LLAMA, {**LLAMA, **theirs}, "expert 'x'") == ""


@pytest.mark.parametrize("start", [0])
def test_of_every_model_type_a_file_without_defaults_says_the_same_as_a_full_one(start: int) -> None:
    """transformers writes what differs from the defaults, or all of it: both are one configuration.

    A fifth of the types is tried; the other fifths are `start` 1 to 4.
    """
    logging.disable(logging.WARNING)
    try:
        seen = 0
        for model_type in list(CONFIG_MAPPING)[start::5]:
            try:
                config = CONFIG_MAPPING[model_type]()
            except Exception:  # it has no defaults
                continue
            short, full = (json.loads(config.to_json_string(use_diff=use)) for use in (True, False))
            assert check_computation({**short, "model_type": model_type}, full, model_type) == "", model_type
            seen += 1
    finally:
        logging.disable(logging.NOTSET)
    assert seen > 140


def write(folder: Path, seed: int, **config: Any) -> Path:
    folder.mkdir()
    save_file({"x.weight": torch.full((4, 4), float(seed))}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**LLAMA, "rope_theta": 1e4, **config}))
    return folder


def test_a_merge_says_it_aloud_once_and_on_its_card(tmp_path: Path) -> None:
    base = write(tmp_path / "base", 0)
    experts = [write(tmp_path / name, seed, rope_theta=1e6) for seed, name in enumerate("ab", 1)]
    model = merge_into({"method": "average", "base": base, "experts": experts}, tmp_path / "out")
    (said,) = model.warnings
    assert "expert 'a'" in said and "expert 'b'" in said and "rope_theta 1000000.0" in said
    assert said in (tmp_path / "out" / "README.md").read_text()
    other = write(tmp_path / "h", 3, num_attention_heads=8, num_key_value_heads=4)
    with pytest.raises(MismatchError, match="num_attention_heads 8"):
        merge_into({"method": "average", "base": base, "experts": [*experts, other]}, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_equal_files_do_not_need_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergecore.planning.computation.with_defaults", lambda config: pytest.fail("read by its class"))
    assert differences(LLAMA, {**LLAMA, "use_cache": False}) == {}
