"""What a configuration says of single layers, after these are in another order: by worked examples, and for every model
type of transformers.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mergecore.checkpoints import layer_settings
from mergecore.checkpoints.config_classes import with_defaults
from mergecore.checkpoints.layer_settings import settings_of, stacked_config
from mergecore.errors import MismatchError
from tests.recipe_files import merge_into

FULL, SLIDING, DENSE, SPARSE = "full_attention", "sliding_attention", "dense", "sparse"


def stacked(config: Mapping[str, Any], layers: list[int]) -> dict[str, Any]:
    settings = settings_of(config)
    assert settings is not None
    return stacked_config(config, [(settings, layer) for layer in layers], "model")


@pytest.mark.parametrize(
    ("config", "layers", "wanted"),
    [
        ({"model_type": "toy", "n_layer": 3, "layer_types": ["a", "b", "c"]}, [0, 2, 2], {"layer_types": ["a", "c", "c"]}),
        ({"model_type": "toy", "num_layers": 3, "hybrid_override_pattern": "M*-"}, [2, 0], {"hybrid_override_pattern": "-M"}),
        ({"model_type": "toy", "n_layers": 4, "mlp_only_layers": [0, 3]}, [3, 1, 0], {"mlp_only_layers": [0, 2]}),
        ({"model_type": "toy", "n_layer": 4, "cross_attention_layers": [1]}, [0, 1, 1], {"cross_attention_layers": [1, 2]}),
        ({"model_type": "toy", "n_layer": 4, "first_k_dense_replace": 2}, [0, 2, 3], {"first_k_dense_replace": 1}),
        ({"model_type": "toy", "n_layer": 4, "first_k_dense_replace": 1}, [2, 3], {"first_k_dense_replace": 0}),
        (
            {"model_type": "toy", "n_layer": 4, "max_window_layers": 2, "use_sliding_window": True},
            [0, 1, 0, 2, 3],
            {"max_window_layers": 3},
        ),
        ({"model_type": "toy", "n_layer": 4, "decoder_sparse_step": 2}, [0, 1, 2, 3, 2, 3], {"decoder_sparse_step": 2}),
        (
            {"model_type": "toy", "n_layer": 4, "moe_layer_interval": 1, "moe_layer_start_index": 1},
            [0, 1, 2, 3, 3],
            {"moe_layer_start_index": 1},
        ),
        (
            {"model_type": "toy", "n_layer": 3, "per_layer_config": {"01": {"head_dim": 8}}},
            [1, 0, 1],
            {"per_layer_config": {"0": {"head_dim": 8}, "2": {"head_dim": 8}}},
        ),
        # What the class fills in by itself is made explicit where it would fill in something else.
        (
            {"model_type": "gemma2", "num_hidden_layers": 4},
            [0, 2, 1],
            {"layer_types": [SLIDING, SLIDING, FULL]},
        ),
        (
            {"model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window_pattern": 3},
            [2, 2, 0],
            {"layer_types": [FULL, FULL, SLIDING]},
        ),
        (
            {"model_type": "deepseek_v32", "num_hidden_layers": 4, "first_k_dense_replace": 1},
            [0, 1, 0, 1],
            {"mlp_layer_types": [DENSE, SPARSE, DENSE, SPARSE]},
        ),
        (
            {"model_type": "gpt_neo", "num_layers": 4, "attention_types": [[["global", "local"], 2]]},
            [0, 2, 1],
            {"attention_types": [[["global", "global", "local"], 1]]},
        ),
        (
            {"model_type": "smollm3", "num_hidden_layers": 4, "no_rope_layer_interval": 2},
            [1, 1],
            {"no_rope_layers": [0, 0]},
        ),
        ({"model_type": "recurrent_gemma", "num_hidden_layers": 3}, [2, 0], {"block_types": ["attention", "recurrent"]}),
    ],
)  # fmt: skip
def test_what_is_said_of_a_layer_moves_with_it(
    config: dict[str, Any], layers: list[int], wanted: dict[str, Any]
) -> None:
    new = stacked(config, layers)
    assert {key: new[key] for key in wanted} == wanted
    count = next(key for key in layer_settings.COUNTS if key in config)
    assert new[count] == len(layers)
    assert new.keys() - config.keys() <= wanted.keys(), "what the class says by itself is not written"


def test_a_plain_configuration_gets_its_count_alone() -> None:
    config = {"model_type": "llama", "num_hidden_layers": 4, "hidden_size": 8}
    assert stacked(config, [0, 1, 1, 2, 3]) == {**config, "num_hidden_layers": 5}
    nested = {"model_type": "x", "text_config": {"model_type": "gemma2", "num_hidden_layers": 2}}
    assert stacked(nested, [1, 0])["text_config"]["layer_types"] == [FULL, SLIDING]


def test_of_two_models_each_says_what_its_own_layers_are() -> None:
    ours = settings_of({"model_type": "toy", "n_layer": 2, "layer_types": ["a", "b"]})
    theirs = settings_of({"model_type": "toy", "n_layer": 2, "layer_types": ["c", "d"]})
    assert ours is not None and theirs is not None
    new = stacked_config(dict(ours.raw), [(ours, 0), (theirs, 1), (theirs, 0)], "model")
    assert new["layer_types"] == ["a", "d", "c"]
    silent = settings_of({"model_type": "toy", "n_layer": 2})
    assert silent is not None
    with pytest.raises(MismatchError, match="says nothing of 'layer_types' for layer 1"):
        stacked_config(dict(ours.raw), [(ours, 0), (silent, 1)], "model")


@pytest.mark.parametrize(
    ("config", "layers", "said"),
    [
        ({"model_type": "toy", "n_layer": 4, "decoder_sparse_step": 2}, [0, 2], "decoder_sparse_step 2, and no value"),
        ({"model_type": "toy", "n_layer": 4, "first_k_dense_replace": 1}, [1, 0], "first_k_dense_replace 1, and no"),
        ({"model_type": "toy", "n_layer": 8, "attn_layer_period": 4}, [0, 4], "attn_layer_period 4, and no value"),
        ({"model_type": "toy", "n_layer": 2, "num_kv_shared_layers": 1}, [0, 1], "num_kv_shared_layers 1, which ties"),
        ({"model_type": "gpt2", "n_layer": 2, "scale_attn_by_inverse_layer_idx": True}, [1], "ties layers to their"),
        ({"model_type": "toy", "n_layer": 3, "secret_layers": [1]}, [0, 1], r"secret_layers \[1\], which may speak"),
        ({"model_type": "diffllama", "num_hidden_layers": 3}, [0, 1], "computes with its own number"),
    ],
)
def test_what_no_value_can_say_is_refused(config: dict[str, Any], layers: list[int], said: str) -> None:
    with pytest.raises(MismatchError, match=said):
        stacked(config, layers)


# --- every model type of transformers -----------------------------------------------------------------------------

SPEAKS = re.compile(r"layer|pattern|interval|period|every|freq|sparse_step|block_types|indices|indexes|idxs")
NOT_OF_LAYERS = re.compile(
    r"norm|drop|layer_?scale|hidden_layers$|num_(?:\w+_)?layers?$|^n_layers?$|_layers_per|per_layer_input|loss|_period$"
    r"|^(?:freeze|share|use|remove|drop|skip|stage|conv|out|return|layer_type$|layers$|[lrx]_layers$)"
    r"|freq_|frequency_(?:embedding|stride)|base_freq|(?:encoder|decoder|text|query|prompt|lqe|pooler|head)_\w*layers?$"
    r"|^mtp_|_offset$|^moe_layer_(?:start|end)_index$|vision|feature|gnn|extract|insert|accept|conditional|all_layers"
    r"|^(?:encoder|decoder|t2u\w*|speech\w*|pitch\w*|energy\w*|duration\w*)_layers$|rescale_every|encoder_sparse_step|channel_indices|summary_idxs"
)
"""Other counts of layers, parts beside the stack of layers (vision, audio, heads), and training."""


@pytest.fixture(scope="module")
def every_type() -> dict[str, dict[str, Any]]:
    """The default configurations of all model types that count layers."""
    logging.disable(logging.WARNING)
    configs = {}
    for model_type in CONFIG_MAPPING:
        try:
            config = json.loads(CONFIG_MAPPING[model_type]().to_json_string(use_diff=False))
        except Exception:  # it has no defaults
            continue
        if any(isinstance(config.get(key), int) and config[key] > 1 for key in layer_settings.COUNTS):
            configs[model_type] = config
    logging.disable(logging.NOTSET)
    return configs


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


def test_every_key_that_may_speak_of_layers_is_known(every_type: dict[str, dict[str, Any]]) -> None:
    """A new version of transformers with another such key fails here: the key belongs into one of the tables."""
    known = {*layer_settings.LISTS, *layer_settings.INDICES, *layer_settings.RULES, *layer_settings.OF_DEPTH}
    known.add(layer_settings.PER_LAYER)
    unknown: dict[str, str] = {}
    for model_type, config in every_type.items():
        unknown |= {
            key: f"{model_type}: {value}"
            for key, value in config.items()
            if SPEAKS.search(key) and not NOT_OF_LAYERS.search(key) and key not in known
        }
    assert len(every_type) > 400
    assert unknown == {}


def test_lists_that_grow_with_the_layers_move_with_them(every_type: dict[str, dict[str, Any]]) -> None:
    """Of each type whose configuration says something of single layers: moved as transformers reads it, or refused."""
    moved, refused = [], {}
    tables = {*layer_settings.LISTS, *layer_settings.INDICES, *layer_settings.RULES, *layer_settings.OF_DEPTH}
    for model_type, config in every_type.items():
        count = next(key for key in layer_settings.COUNTS if isinstance(config.get(key), int))
        depth = config[count]
        growing = {key for key, value in config.items() if isinstance(value, list) and len(value) == depth}
        if not growing and not any(config.get(key) for key in tables):
            continue
        layers = [*range((3 * depth + 3) // 4), *range(depth // 4, depth)]
        try:
            new = with_defaults(stacked(config, layers))
        except MismatchError as error:
            refused[model_type] = str(error)
            continue
        assert new is not None, model_type
        longer = with_defaults({"model_type": model_type, count: depth + 1}) or {}
        for key in growing:
            if len(longer.get(key) or ()) == depth + 1 and key not in layer_settings.INDICES:
                assert list(new[key]) == [config[key][layer] for layer in layers], (model_type, key)
        moved.append(model_type)
    assert len(moved) > 150 and {"gemma2", "qwen3_next", "deepseek_v3", "gpt_neo", "llama4_text", "jamba"} <= {*moved}
    assert len(refused) < 30 and {"gemma3n_text", "idefics"} <= refused.keys()


# --- as a recipe has it -------------------------------------------------------------------------------------------


def write(folder: Path, depth: int, **config: Any) -> Path:
    folder.mkdir()
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(depth)]
    save_file({name: torch.full((4, 4), float(n)) for n, name in enumerate(names)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma2", "hidden_size": 4, **config}))
    return folder


def test_a_stack_writes_the_configuration_of_its_layers(tmp_path: Path) -> None:
    base, expert = (write(tmp_path / name, 4, num_hidden_layers=4) for name in ("base", "a"))
    recipe = {"method": "average", "base": base, "experts": [expert], "stack": [{"layers": [0, 2]}, {"layers": [2, 3]}]}
    merge_into(recipe, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 5
    assert config["layer_types"] == [SLIDING, FULL, SLIDING, SLIDING, FULL]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_hidden_layers": 3}, "has layers 0 to 3, and its config.json says num_hidden_layers 3"),
        ({}, "no number of"),
    ],
)
def test_a_count_that_is_not_the_files_is_refused(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    base = write(tmp_path / "base", 4, **config)
    expert = write(tmp_path / "a", 4, **config)
    recipe = {"method": "average", "base": base, "experts": [expert], "stack": [{"layers": [0, 1]}]}
    with pytest.raises(MismatchError, match=said):
        merge_into(recipe, tmp_path / "out")
