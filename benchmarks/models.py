"""Synthetic Llama-shaped checkpoints, base and experts, as every benchmark of merges reads them.

    python benchmarks/models.py --size 1.1 --folder models      models/base, models/expert-1 ... models/expert-8

Sizes are billions of parameters: 0.1 (a quick look, 2 GB for nine models), 0.25 (with repeats, 5 GB), 1.1 (the reported
one, 20 GB), 7 (for those with the disk, 130 GB); others work too. Weights are normal numbers of scale 0.02, changes of
scale 0.0005 are added to them, and all is rounded to bfloat16, so that a change is often one or two steps of the last
bit: as in real fine-tuning many values are equal. They are made and written piece by piece: memory stays small at any
size. What is there already is left as it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder: its profile.py is not Python's

import torch

WIDTHS = {0.1: 768, 0.25: 1024, 1.1: 2048, 7.0: 4096}
PIECE = 1 << 22
"""Elements that are made at a time."""
Shapes = dict[str, tuple[int, ...]]


def shapes(billions: float) -> Shapes:
    """Tensors of a Llama-shaped model of about so many billion parameters."""
    width = WIDTHS.get(billions) or max(256, int(2048 * (billions / 1.1) ** (1 / 3) // 256 * 256))
    inner, vocabulary = int(width * 2.75 // 64 * 64), 32_000 if billions >= 0.05 else 1000
    layer = 2 * width * width + 2 * width * (width // 4) + 3 * width * inner
    layers = max(1, round((billions * 1e9 - 2 * vocabulary * width) / layer))
    tensors: Shapes = {
        "model.embed_tokens.weight": (vocabulary, width),
        "lm_head.weight": (vocabulary, width),
        "model.norm.weight": (width,),
    }
    for number in range(layers):
        stem = f"model.layers.{number}"
        tensors |= {
            f"{stem}.self_attn.q_proj.weight": (width, width),
            f"{stem}.self_attn.k_proj.weight": (width // 4, width),
            f"{stem}.self_attn.v_proj.weight": (width // 4, width),
            f"{stem}.self_attn.o_proj.weight": (width, width),
            f"{stem}.mlp.gate_proj.weight": (inner, width),
            f"{stem}.mlp.up_proj.weight": (inner, width),
            f"{stem}.mlp.down_proj.weight": (width, inner),
            f"{stem}.input_layernorm.weight": (width,),
            f"{stem}.post_attention_layernorm.weight": (width,),
        }
    return tensors


def model_folders(folder: Path, experts: int) -> list[Path]:
    """The base's folder, then the experts'."""
    return [folder / ("base" if number == 0 else f"expert-{number}") for number in range(experts + 1)]


def weights(model: Path) -> Path:
    """The file that holds a model's tensors."""
    return model / "model.safetensors"


def write_models(folder: Path, billions: float, experts: int) -> None:
    """Have base and experts in `folder`; those that are there are kept. Ends the program where the disk is too
    small.
    """
    tensors = shapes(billions)
    missing = {
        number: target
        for number, target in enumerate(model_folders(folder, experts))
        if not (target / "config.json").exists()
    }
    if not missing:
        return
    size = sum(2 * torch.Size(shape).numel() for shape in tensors.values())
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < size * len(missing) + (1 << 30):
        raise SystemExit(
            f"{len(missing)} models of {size / 1e9:.1f} GB do not fit into {folder}: {free / 1e9:.1f} GB are free; "
            "choose another --folder or a smaller --size"
        )
    print(f"making {len(missing)} models of {size / 1e9:.2f} GB in {folder}", file=sys.stderr, flush=True)
    with ExitStack() as stack:
        files: dict[int, BinaryIO] = {}
        for number, target in missing.items():
            target.mkdir(exist_ok=True)
            files[number] = stack.enter_context((target / "model.safetensors.tmp").open("wb"))
            files[number].write(_header(tensors))
        _write_tensors(tensors, files)
    for target in missing.values():
        (target / "model.safetensors.tmp").replace(weights(target))
        (target / "config.json").write_text(json.dumps(_config(tensors)))  # last: what has it is complete


def _header(tensors: Shapes) -> bytes:
    """The head of a safetensors file of these bfloat16 tensors."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape in tensors.items():
        end = position + 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"))
    text += " " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text.encode()


def _write_tensors(tensors: Shapes, files: dict[int, BinaryIO]) -> None:
    generator, piece = torch.Generator(), 0
    for shape in tensors.values():
        count = torch.Size(shape).numel()
        for start in range(0, count, PIECE):
            here = min(PIECE, count - start)
            generator.manual_seed(piece << 8)
            base = torch.randn(here, generator=generator).mul_(0.02)
            for number, file in files.items():
                generator.manual_seed(piece << 8 | number)  # a model made later is the one it would have been
                values = base if number == 0 else base + torch.randn(here, generator=generator).mul_(0.0005)
                file.write(memoryview(values.to(torch.bfloat16).view(torch.uint8).numpy()))
            piece += 1


def _config(tensors: Shapes) -> dict[str, object]:
    width = tensors["model.norm.weight"][0]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width,
        "num_hidden_layers": sum(name.endswith("q_proj.weight") for name in tensors),
        "intermediate_size": tensors["model.layers.0.mlp.gate_proj.weight"][0],
        "vocab_size": tensors["lm_head.weight"][0], "num_attention_heads": width // 64,
        "num_key_value_heads": width // 256,
        "torch_dtype": "bfloat16", "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048,
    }  # fmt: skip


def add_models(parser: argparse.ArgumentParser, size: float) -> None:
    """The options of every benchmark that reads checkpoints."""
    parser.add_argument(
        "--size", type=float, default=size, help="billions of parameters: 0.1, 0.25, 1.1, 7 or others (%(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, help="where models are made and kept for the next time; default: a temporary folder"
    )


def main() -> None:
    """Make what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=0.1, help="billions of parameters (%(default)s)")
    parser.add_argument("--experts", type=int, default=8, help="experts beside the base (%(default)s)")
    parser.add_argument("--folder", type=Path, required=True, help="where they go")
    options = parser.parse_args()
    write_models(options.folder, options.size, options.experts)


if __name__ == "__main__":
    main()
