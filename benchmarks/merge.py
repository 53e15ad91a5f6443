"""Single merges side by side: Mergeloom, the floor of the same bytes read and written, and mergekit where it is installed.

    python benchmarks/merge.py --size 0.1                      a quick look
    python benchmarks/merge.py --size 1.1 --against PATH/TO/mergekit-yaml

Makes Llama-shaped bfloat16 checkpoints of its own (base and experts), runs whole commands alternately on the same files
and prints medians: wall, CPU-seconds, peak memory, and the ratio to the floor. Writes JSON with --json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

METHODS: dict[str, dict[str, Any]] = {
    "average": {"method": "average"},
    "task_arithmetic": {"method": "task_arithmetic", "scale": 0.3},
    "ties (tensor)": {"method": "ties", "density": 0.2, "scope": "tensor"},
    "ties (global)": {"method": "ties", "density": 0.2},
    "dare_ties (tensor)": {"method": "ties", "density": 0.2, "scope": "tensor", "drop": {"rate": 0.5, "seed": 0}},
}
THEIRS: dict[str, tuple[str, dict[str, float]]] = {
    "average": ("linear", {"weight": 1.0}),
    "task_arithmetic": ("task_arithmetic", {"weight": 0.3}),
    "ties (tensor)": ("ties", {"weight": 1.0, "density": 0.2}),
    "dare_ties (tensor)": ("dare_ties", {"weight": 1.0, "density": 0.2}),
}


def shapes(billions: float) -> dict[str, tuple[int, ...]]:
    """Tensors of a Llama-shaped model of about so many billion parameters."""
    width = {0.1: 768, 0.25: 1024, 1.1: 2048}.get(billions, int(2048 * (billions / 1.1) ** (1 / 3) // 64 * 64))
    inner, vocabulary = int(width * 2.75 // 64 * 64), 32_000
    layer = 2 * width * width + 2 * width * (width // 4) + 3 * width * inner
    layers = max(1, round((billions * 1e9 - 2 * vocabulary * width) / layer))
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, width),
        "lm_head.weight": (vocabulary, width),
        "model.norm.weight": (width,),
    }
    for number in range(layers):
        stem = f"model.layers.{number}"
        found |= {
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
    return found


def write_models(folder: Path, billions: float, experts: int) -> None:
    """Base and experts: normal weights of scale 0.02, changes of scale 0.0005, rounded to bfloat16."""
    held = shapes(billions)
    width, layers = held["model.norm.weight"][0], sum(name.endswith("q_proj.weight") for name in held)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": width, "num_hidden_layers": layers,
        "intermediate_size": held["model.layers.0.mlp.gate_proj.weight"][0], "vocab_size": 32_000,
        "num_attention_heads": width // 64, "num_key_value_heads": width // 256, "torch_dtype": "bfloat16",
        "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048,
    }  # fmt: skip
    base: dict[str, torch.Tensor] = {}
    for number in range(experts + 1):
        target = folder / ("base" if number == 0 else f"expert-{number}")
        if (target / "config.json").exists():
            continue
        target.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(0)
        if not base:
            base = {name: torch.randn(shape, generator=generator).mul_(0.02) for name, shape in held.items()}
        generator.manual_seed(number)
        tensors = {
            name: (value + torch.randn(value.shape, generator=generator).mul_(0.0005) * (number > 0)).to(torch.bfloat16)
            for name, value in base.items()
        }
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
        (target / "config.json").write_text(json.dumps(config))


def timed(command: list[str], cwd: Path) -> dict[str, float]:
    """Wall, CPU-seconds and peak memory (bytes) of a command; raises where it fails."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, cwd=cwd, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{output.read().decode()[-3000:]}")
    return {
        "wall": time.monotonic() - began,
        "cpu": usage.ru_utime + usage.ru_stime,
        "memory": usage.ru_maxrss * 1024.0,
    }


def floor(folder: Path, readings: int, experts: int, out: Path) -> dict[str, float]:
    """The time to read the models so often and write one with plain large reads and writes (page cache warm)."""
    buffer = bytearray(8 << 20)
    began, used = time.monotonic(), time.process_time()
    names = ["base", *(f"expert-{number}" for number in range(1, experts + 1))]
    for _ in range(readings):
        for name in names:
            with open(folder / name / "model.safetensors", "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
    size = (folder / "base" / "model.safetensors").stat().st_size
    with open(out, "wb", buffering=0) as file:
        for start in range(0, size, len(buffer)):
            file.write(memoryview(buffer)[: min(len(buffer), size - start)])
    out.unlink()
    return {"wall": time.monotonic() - began, "cpu": time.process_time() - used, "memory": float(len(buffer))}


def ours(folder: Path, name: str, experts: int, work: Path) -> list[str]:
    """The command that makes one merge with Mergeloom."""
    chosen = [str(folder / f"expert-{number}") for number in range(1, experts + 1)]
    recipe = {**METHODS[name], "base": str(folder / "base"), "experts": chosen, "dtype": "bfloat16"}
    (work / "ours.yaml").write_text(yaml.safe_dump(recipe))
    return [str(Path(sys.executable).with_name("mergeloom")), "merge", str(work / "ours.yaml"), str(work / "ours")]


def theirs(folder: Path, name: str, experts: int, work: Path, program: str) -> list[str]:
    """The command that makes the same merge with mergekit."""
    method, parameters = THEIRS[name]
    models = [{"model": str(folder / f"expert-{n}"), "parameters": parameters} for n in range(1, experts + 1)]
    recipe: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "bfloat16"}
    if method != "linear":
        recipe["base_model"] = str(folder / "base")
    (work / "theirs.yaml").write_text(yaml.safe_dump(recipe))
    return [program, str(work / "theirs.yaml"), str(work / "theirs"), "--no-copy-tokenizer"]


def median(runs: list[dict[str, float]]) -> dict[str, float]:
    """The median of each figure."""
    return {figure: statistics.median(run[figure] for run in runs) for figure in runs[0]}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=0.1, help="billions of parameters")
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--against", help="mergekit-yaml of an environment that has mergekit")
    parser.add_argument("--folder", type=Path, help="where models are made and kept; default: a temporary folder")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary) / "models"
        work = Path(temporary) / "work"
        work.mkdir()
        write_models(folder, options.size, max(options.experts))
        rows = []
        for experts in options.experts:
            for name in options.methods:
                rows.append(measured(folder, work, name, experts, options))
                print_row(rows[-1])
    if options.json:
        options.json.write_text(json.dumps({"load": os.getloadavg(), "size": options.size, "rows": rows}, indent=1))


def measured(folder: Path, work: Path, name: str, experts: int, options: argparse.Namespace) -> dict[str, Any]:
    """One row: ours, the floor and theirs, alternately."""
    readings = 3 if name.startswith(("ties", "dare")) else 1
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "floor": [], "theirs": []}
    for _ in range(options.repeats):
        runs["ours"].append(timed(ours(folder, name, experts, work), work))
        runs["floor"].append(floor(folder, readings, experts, work / "floor"))
        if options.against and name in THEIRS:
            runs["theirs"].append(timed(theirs(folder, name, experts, work, options.against), work))
        for made in ("ours", "theirs"):
            shutil.rmtree(work / made, ignore_errors=True)
    return {"method": name, "experts": experts, **{who: median(held) for who, held in runs.items() if held}}


def print_row(row: dict[str, Any]) -> None:
    """One line: wall/CPU/memory of each, and the ratios."""
    parts = [f"{row['method']:20s} {row['experts']} experts"]
    for who in ("ours", "floor", "theirs"):
        if who in row:
            held = row[who]
            parts.append(f"{who} {held['wall']:.1f} s wall, {held['cpu']:.1f} s CPU, {held['memory'] / 1e9:.2f} GB")
    parts.append(f"ours/floor {row['ours']['wall'] / row['floor']['wall']:.1f}")
    if "theirs" in row:
        parts.append(f"theirs/ours {row['theirs']['wall'] / row['ours']['wall']:.1f}")
    print(" | ".join(parts), flush=True)


if __name__ == "__main__":
    main()
