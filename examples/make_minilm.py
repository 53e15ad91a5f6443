"""Prepares examples/minilm/: a sentence encoder, its fine-tunes and text tasks, as examples/minilm.yaml reads them.

    python examples/make_minilm.py --base FOLDER --experts FOLDER --tasks tasks.json.gz

base: all-MiniLM-L6-v2, or another BERT-shaped encoder of sentence-transformers, as a folder (on the hub
`sentence-transformers/all-MiniLM-L6-v2`). It is rounded to bfloat16 and saved in float32.

experts: one file for each task, `<task>.safetensors`. It holds changes of the base as int8 rows: `<tensor>.q` (int8)
times `<tensor>.s` (float32, one scale a row) is added to the tensor. Fine-tuned folders need no preparation: name them
in the spec.

tasks: JSON, {task: {"labels": […], "prompts": […], "train": [[text, label], …], "test": [[text, label], …]}}. A label
is the position of its prompt. The first 200 test texts are the test split, the next 200 the validation split. Training
texts that are among them are left out. Texts become token ids, cut at 64 tokens. Every task gets a frozen head: the
base's embedding of each prompt, times 20, so that logits are 20 · cosine, as in CLIP.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from mergecore.evaluators.sentence_encoder import mean_pooled

TOKENS = 64
TEMPERATURE = 20.0
TEST = 200


def write_base(source: Path, out: Path) -> dict[str, Tensor]:
    """Save the encoder, its weights rounded to bfloat16, and return them in float32."""
    model = AutoModel.from_pretrained(source, dtype=torch.float32)
    weights = {name: tensor.to(torch.bfloat16).to(torch.float32) for name, tensor in model.state_dict().items()}
    model.load_state_dict(weights)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)
    return weights


def write_expert(changes: Path, base: Path, weights: dict[str, Tensor], out: Path) -> None:
    """Save the base plus the changes of one file."""
    rows = load_file(changes)
    changed = dict(weights)
    for name, value in weights.items():
        if f"{name}.q" in rows:
            codes, scales = rows[f"{name}.q"].float(), rows[f"{name}.s"]
            changed[name] = value + codes * scales.reshape(-1, *[1] * (codes.dim() - 1))
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in changed.items()}, out / "model.safetensors")
    shutil.copy(base / "config.json", out)


def ids_of(tokenizer: Any, texts: list[str]) -> Tensor:
    """Return token ids (texts, 64), int64, filled up with the padding token."""
    encoded = tokenizer(texts, truncation=True, max_length=TOKENS, padding="max_length", return_tensors="pt")
    ids: Tensor = encoded["input_ids"]
    return ids


def write_task(task: dict[str, Any], tokenizer: Any, encoder: torch.nn.Module, out: Path) -> None:
    """Save ids and labels of the splits, and the head."""
    arrays = {}
    test, validation = task["test"][:TEST], task["test"][TEST : 2 * TEST]
    scored = {text for text, _ in [*test, *validation]}
    training = [(text, label) for text, label in task["train"] if text not in scored]
    for split, items in (("train", training), ("validation", validation), ("test", test)):
        texts, labels = zip(*items, strict=True)
        arrays[f"{split}.inputs"] = ids_of(tokenizer, list(texts))
        arrays[f"{split}.labels"] = torch.tensor(labels, dtype=torch.int64)
    with torch.no_grad():
        arrays["head.weight"] = TEMPERATURE * encoder(ids_of(tokenizer, list(task["prompts"])))
    save_file(arrays, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--experts", type=Path, required=True)
    parser.add_argument("--tasks", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "minilm")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    base = chosen.out / "base"
    weights = write_base(chosen.base, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    encoder = mean_pooled(json.loads((base / "config.json").read_text())).eval()
    encoder.load_state_dict(weights)
    opened = gzip.open if chosen.tasks.suffix == ".gz" else open
    with opened(chosen.tasks, "rt", encoding="utf-8") as file:
        tasks = json.load(file)
    (chosen.out / "tasks").mkdir(parents=True, exist_ok=True)
    for name, task in tasks.items():
        write_task(task, tokenizer, encoder, chosen.out / "tasks" / f"{name}.safetensors")
        print(f"{name}: {len(task['labels'])} labels")
    for changes in sorted(chosen.experts.glob("*.safetensors")):
        write_expert(changes, base, weights, chosen.out / "experts" / changes.stem)
        print(f"expert {changes.stem}")


if __name__ == "__main__":
    main()
