"""Three sweeps and three recipes over tiny checkpoints, and a store in which an older Mergeloom has done them.

`written_before.tar.xz` holds the checkpoints, the tasks, the store, and in `scores.json` the scores and digests that
were read from it. It was written by commit d6874f5, the last one before the modules moved into packages, with

    python -m tests.store.written_before FOLDER

It is never written again: a store that people have filled must be found again by every later version.
"""

from __future__ import annotations

import argparse
import json
import os
import tarfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.digits_sweep import Swept, opened
from tests.recipe_files import merge_into

ARCHIVE = Path(__file__).with_suffix(".tar.xz")
FACTORY = "tests.store.written_before:network"
LAYERS, WIDTH, CLASSES = 2, 10, 4
SPLITS = ("train", "validation", "test")
ITEMS = 8
METHODS: list[dict[str, Any]] = [
    {"method": "average"},
    {"method": "average", "label": "weighted", "weights": [3, 1, 2, 1], "counts": [4]},
    {"method": "average", "label": "soup", "search": {"by": "greedy"}},
    {"method": "task_arithmetic", "scale": {"grid": [0.3, 0.6]}},
    {"method": "task_arithmetic", "label": "dare", "scale": 0.5, "drop": {"kind": "random", "rate": 0.5, "seed": 1}},
    {"method": "ties", "density": 0.3},
    {"method": "ties", "label": "exact ties", "density": 0.3, "scope": "tensor", "count": "exact"},
    {
        "method": "ties", "label": "l1", "density": 0.4,
        "drop": {"kind": "random", "rate": 0.4, "rescale": "l1", "seed": 2},
    },
    {"method": "task_arithmetic", "label": "first layer", "scale": 0.5, "select": [{"names": "layers.0.*"}]},
    {
        "method": "ties", "label": "parts",
        "select": [{"names": "head.*", "method": "average"}, {"layers": [0, 0], "density": 0.5}, {}],
    },
    {"method": "breadcrumbs", "scale": 0.4},
    {"method": "della"},
    {"method": "pcb"},
    {"method": "consensus", "scale": 0.5},
    {"method": "fisher", "fisher": {"samples": 8}},
    {"method": "model_stock"},
    {"method": "sce", "density": 0.5},
    {"method": "iso_c"},
    {"method": "iso_cts", "common": 0.5},
    {"method": "tsv_m"},
    {"method": "wudi", "steps": 5},
    {"method": "karcher"},
    {"method": "multislerp"},
    {"method": "ram"},
    {"method": "opcm"},
    {"method": "tall_masks"},
    {"method": "emr"},
]  # fmt: skip


def network(config: Mapping[str, Any]) -> nn.Module:
    """Linear layers under the names that the checkpoints have."""
    width = int(config["hidden_size"])
    layers = nn.ModuleList(nn.Linear(width, width) for _ in range(LAYERS))
    return _Network(layers, nn.Linear(width, CLASSES))


class _Network(nn.Module):
    def __init__(self, layers: nn.ModuleList, head: nn.Linear) -> None:
        super().__init__()
        self.layers, self.head = layers, head

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in self.layers:
            inputs = torch.relu(layer(inputs))
        result: Tensor = self.head(inputs)
        return result


# --- the sweeps and recipes -----------------------------------------------------------------------------------------


def specs() -> dict[str, dict[str, Any]]:
    """The sweeps by name. Checkpoints and tasks are named relative to the folder in which the archive is unpacked."""
    tasks = str(Path("tasks").absolute())
    scored = {"evaluator": "classification", "model": FACTORY, "path": tasks, "limit": ITEMS, "recalibrate": "none"}
    models = {
        "name": "models",
        "base": "models/base",
        "multitask": {"source": "models/several"},
        "experts": [
            {"name": "a", "source": "models/a", "tasks": ["one"]},
            {"name": "b", "source": "models/b", "tasks": ["two"]},
            {"name": "low", "source": "models/low", "tasks": ["one"]},
            {"name": "folded", "source": "models/base", "adapter": "models/lower", "tasks": ["two"]},
        ],
        "methods": METHODS,
        "counts": [2, 4],
        "evaluate": {**scored, "held_in": {"first": ["one"], "second": ["two"]}, "validation": {"limit": 4}},
        "output": {"store": "store", "keep": "registered", "register": {"name": "kept"}},
    }
    adapters = {
        "name": "adapters",
        "base": "models/base",
        "experts": [{"name": name, "source": f"models/{name}", "tasks": ["one"]} for name in ("low", "lower")],
        "methods": [
            {"method": "lora_arithmetic", "rank": 2},
            {"method": "lora_lego"},
            {"method": "ties", "density": 0.5},
        ],
        "counts": [2],
        "evaluate": {**scored, "held_in": {"first": ["one"]}, "held_out": {"other": ["two"]}},
        "output": {"store": "store", "keep": "none", "dtype": "bfloat16"},
    }
    words = {
        "name": "words",
        "base": {"source": "words/base", "known_as": "tiny"},
        "experts": [
            {"name": "chat", "source": "words/chat", "tasks": ["tiny_choice"]},
            {"name": "low", "source": "words/low", "tasks": ["tiny_choice"]},
        ],
        "methods": [
            {"method": "average"}, {"method": "ties", "density": 0.3}, {"method": "layer_swap", "bottom": 0, "top": 0},
        ],
        "counts": [2],
        "tokenizer": "union",
        "evaluate": {
            "path": tasks, "held_in": {"choice": ["tiny_choice"]}, "held_out": {"writing": ["tiny_write"]},
            "limit": 4, "batch_size": 4, "dtype": "float32",
        },
        "output": {"store": "store", "keep": "none"},
    }  # fmt: skip
    return {"models": models, "adapters": adapters, "words": words}


def recipes() -> dict[str, dict[str, Any]]:
    """Recipes with other layers, with an adapter folded into the base, and with rules."""
    experts = [{"name": "a", "source": "models/a"}, {"name": "b", "source": "models/b"}]
    return {
        "stacked": {
            "method": "task_arithmetic", "scale": 0.5, "base": "models/base", "experts": experts,
            "stack": [{"layers": [0, 1]}, {"layers": {"base": [0, 0], "a": [1, 1], "b": [0, 0]}}],
        },
        "folded": {
            "method": "ties", "density": 0.5, "base": {"source": "models/base", "adapter": "models/low"},
            "experts": experts, "dtype": "float16",
        },
        "selected": {
            "method": "average", "experts": experts, "dtype": "bfloat16",
            "select": [{"names": "*.bias", "take": "copy", "of": "b"}, {"layers": [1, 1], "weights": [3, 1]}, {}],
        },
    }  # fmt: skip


def sweep(name: str) -> Swept:
    """The sweep of this name, opened over the store of the current folder."""
    return opened(specs()[name])


def merge(name: str, out: Path) -> str:
    """The digest of a recipe's model, made in `out` with the store of the current folder."""
    return merge_into(recipes()[name], out, store=Path("store").absolute()).digest


# --- what the archive holds -----------------------------------------------------------------------------------------


def unpack(folder: Path) -> None:
    """Unpack the archive."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")


def scores_of(swept: Swept) -> dict[str, Any]:
    """Every cell of a sweep as its report has it: status, whether it was chosen, and its mean scores."""
    return {
        f"{cell.name} {cell.subset}": {
            "status": cell.status,
            "chosen": cell.chosen,
            "model": cell.model,
            "digest": cell.digest,
            "scores": {
                split: {task: float(np.mean(scores)) for task, scores in tasks.items()}
                for split, tasks in cell.items.items()
            },
        }
        for cell in swept.scores().cells
    }


# --- writing it -----------------------------------------------------------------------------------------------------


def _tensors(seed: int, size: float, base: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    shapes = {f"layers.{layer}.{leaf}": shape for layer in range(LAYERS) for leaf, shape in LEAVES.items()}
    shapes |= {"head.weight": (CLASSES, WIDTH), "head.bias": (CLASSES,)}
    drawn = {name: size * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return drawn if base is None else {name: base[name] + drawn[name] for name in base}


LEAVES: dict[str, tuple[int, ...]] = {"weight": (WIDTH, WIDTH), "bias": (WIDTH,)}


def _write(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any], stem: str = "model") -> None:
    folder.mkdir(parents=True)
    save_file(dict(tensors), folder / f"{stem}.safetensors", metadata={"format": "pt"})
    name = "config.json" if stem == "model" else "adapter_config.json"
    (folder / name).write_text(json.dumps(dict(config), indent=1))


def _write_adapter(folder: Path, seed: int, rank: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    factors = {}
    for layer in range(LAYERS):
        stem = f"base_model.model.layers.{layer}"
        factors[f"{stem}.lora_A.weight"] = torch.randn(rank, WIDTH, generator=draw) * 0.3
        factors[f"{stem}.lora_B.weight"] = torch.randn(WIDTH, rank, generator=draw) * 0.3
    config = {
        "peft_type": "LORA", "base_model_name_or_path": "models/base", "r": rank, "lora_alpha": 2 * rank,
        "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "target_modules": ["0", "1"],
    }  # fmt: skip
    _write(folder, factors, config, "adapter_model")


def write_models(folder: Path) -> None:
    """A base, two full experts, a multitask model, and two adapters of ranks 2 and 1."""
    config = {"model_type": "layers", "hidden_size": WIDTH, "num_hidden_layers": LAYERS}
    base = _tensors(0, 0.5)
    _write(folder / "base", base, config)
    for seed, name in enumerate(("a", "b", "several"), 1):
        _write(folder / name, _tensors(seed, 0.2, base), config)
    _write_adapter(folder / "low", 4, 2)
    _write_adapter(folder / "lower", 5, 1)


def write_tasks(folder: Path) -> None:
    """Two classifier tasks beside the two tasks of the language models."""
    draw = np.random.default_rng(5)
    for name in ("one", "two"):
        arrays = {}
        for split in SPLITS:
            arrays[f"{split}.inputs"] = draw.standard_normal((ITEMS, WIDTH)).astype(np.float32)
            arrays[f"{split}.labels"] = draw.integers(0, CLASSES, ITEMS)
        np.savez_compressed(folder / f"{name}.npz", **arrays)


def write_words(folder: Path, tasks: Path) -> None:
    """A language model, a fine-tune of it with a token of its own, and an adapter."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests import tiny_lm

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = tiny_lm.write_base(folder / "base", **sizes, num_key_value_heads=1)
    tiny_lm.write_adapter(base, folder / "low", seed=2)
    chat = tiny_lm.write_expert(base, folder / "chat", seed=1)
    tokenizer = AutoTokenizer.from_pretrained(chat)
    tokenizer.add_tokens(["<m>"])
    model = AutoModelForCausalLM.from_pretrained(chat)
    torch.manual_seed(1)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(chat)
    tokenizer.save_pretrained(chat)
    tiny_lm.write_tasks(tasks, items=8)


def pack(folder: Path, archive: Path) -> None:
    """Pack what `main` wrote, without the folder's own path and without what no later run reads."""
    registration = folder / "store" / "sweeps" / "models" / "registration.json"
    registration.write_text(registration.read_text().replace(folder.as_uri(), "file:///before"))
    with tarfile.open(archive, "w:xz", dereference=True) as written:
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder)
            if path.is_file() and name.parts[0] != "out" and name.parts[:2] not in LEFT_OUT:
                entry = tarfile.TarInfo(str(name))
                entry.size = path.stat().st_size
                with path.open("rb") as file:
                    written.addfile(entry, file)


LEFT_OUT = (("store", "locks"), ("store", "drafts"))


def main() -> None:
    """Write checkpoints, tasks and store into a new folder, and pack them into an archive beside it."""
    parser = argparse.ArgumentParser(description="Write the archive with the code that runs.")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder.absolute()
    folder.mkdir(parents=True)
    os.chdir(folder)
    write_models(Path("models"))
    write_words(Path("words"), Path("tasks"))
    write_tasks(Path("tasks"))
    results: dict[str, Any] = {"lm_eval": version("lm_eval"), "sweeps": {}, "recipes": {}}
    for name in specs():
        swept = sweep(name)
        done = swept.run()
        assert not done.failures, done.failures
        results["sweeps"][name] = scores_of(swept)
    for name in recipes():
        results["recipes"][name] = merge(name, Path("out") / name)
    Path("scores.json").write_text(json.dumps(results, indent=1, sort_keys=True))
    pack(folder, folder.with_suffix(".tar.xz"))


if __name__ == "__main__":
    main()
