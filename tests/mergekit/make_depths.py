"""Runs in mergekit's environment: writes depths.json, at which depth each tensor of a model stands in mergekit's gradients.

Models of several stacks are written twice, full of zeros and full of ones, and merged with weights that go from 0 to 1:
every tensor of the result is full of its depth. The argument is the file to write.
"""

import importlib.metadata
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from click.testing import CliRunner
from mergekit.scripts.run_yaml import main as single
from safetensors.torch import load_file

IMAGES = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
TEXT = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4}
BART = {
    name: size
    for side in ("encoder", "decoder")
    for name, size in ((f"{side}_attention_heads", 2), (f"{side}_ffn_dim", 24))
}
MODELS = {
    "Qwen2_5_VLForConditionalGeneration": {
        "text_config": {**TEXT, "num_hidden_layers": 4, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        "vision_config": {**VISION, "depth": 2, "fullatt_block_indexes": [1]},
        **IMAGES,
    },
    "Qwen3VLForConditionalGeneration": {
        "text_config": {
            **TEXT, "num_hidden_layers": 3, "head_dim": 8,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        },
        "vision_config": {**VISION, "depth": 4, "deepstack_visual_indexes": [0, 1, 2], "num_position_embeddings": 16},
        **IMAGES,
    },
    "T5ForConditionalGeneration": {
        "vocab_size": 96, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 3, "num_decoder_layers": 5, "num_heads": 2,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    },
    "BartForConditionalGeneration": {
        "vocab_size": 96, "d_model": 16, "encoder_layers": 3, "decoder_layers": 2, "max_position_embeddings": 20, **BART,
    },
}  # fmt: skip
RECIPE = """
models:
  - {model: ./NAME-zeros, parameters: {weight: [1, 0]}}
  - {model: ./NAME-ones, parameters: {weight: [0, 1]}}
merge_method: linear
dtype: float32
"""


def depths(name: str, settings: dict[str, object]) -> tuple[str, dict[str, float]]:
    """The model type of a class, and the depth of every tensor of such a model."""
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**settings))
    for folder, fill in ((f"{name}-zeros", 0.0), (f"{name}-ones", 1.0)):  # mergekit remembers what lies in a folder
        with torch.no_grad():
            for value in model.parameters():
                value.fill_(fill)
        model.save_pretrained(folder)
    Path("recipe.yml").write_text(RECIPE.replace("NAME", name))
    result = CliRunner().invoke(single, ["recipe.yml", "out", "--no-copy-tokenizer", "--quiet"])
    if result.exit_code:
        sys.exit(f"{name}: {result.output[-1000:]} {result.exception!r}")
    tensors = {n: value for path in Path("out").glob("*.safetensors") for n, value in load_file(path).items()}
    return model.config.model_type, {n: round(float(tensors[n].reshape(-1)[0]), 6) for n in sorted(tensors)}


if __name__ == "__main__":
    out = Path(sys.argv[1]).resolve()
    said: dict[str, object] = {"mergekit": importlib.metadata.version("mergekit")}
    for name, settings in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            kind, by_name = depths(name, settings)
            said[kind] = by_name
            os.chdir("/")
    out.write_text(json.dumps(said, indent=0) + "\n")
