"""Trains a small CNN with BatchNorm on scikit-learn's digits and eight full fine-tunes of it, into examples/digits/.

    python examples/make_digits.py                 # some 15 seconds of one core, 3 MB on disk; nothing is fetched
    python examples/make_digits.py --out elsewhere

The base reads upright digits; every expert reads them changed (turned, mirrored, inverted, rows or columns mixed), each
a task of its own with train, validation and test items. What no expert saw: the upright digits themselves, which the
base knows, and two changes that are made of the experts' ones.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from mergecore.checkpoints.sources.digests import file_sha256

FACTORY = "examples.make_digits:digits_cnn"
"""What a spec's `evaluate.model` says for these checkpoints."""

CONFIG = {"model_type": "digits-cnn", "widths": [32, 32, 64, 64], "classes": 10}

Images = NDArray[np.float32]


def _mixed(axis: int, seed: int) -> Callable[[Images], Images]:
    order = np.random.default_rng(seed).permutation(8)
    return lambda images: np.take(images, order, axis=axis)


CHANGES: Mapping[str, Callable[[Images], Images]] = {
    "quarter": lambda images: np.rot90(images, 1, axes=(1, 2)),
    "half": lambda images: np.rot90(images, 2, axes=(1, 2)),
    "three_quarters": lambda images: np.rot90(images, 3, axes=(1, 2)),
    "mirror": lambda images: images[:, :, ::-1],
    "inverted": lambda images: 1 - images,
    "rows": _mixed(1, 0),
    "columns": _mixed(2, 1),
    "transposed_inverted": lambda images: 1 - images.transpose(0, 2, 1),
}
"""What each expert reads instead of an upright digit; images are (items, 8, 8) in 0 … 1."""

HELD_OUT: Mapping[str, Callable[[Images], Images]] = {
    "upright": lambda images: images,
    "transposed": lambda images: images.transpose(0, 2, 1),
    "mirror_inverted": lambda images: 1 - images[:, :, ::-1],
}
"""What no expert reads: what the base knows, and two changes that are others undone or put together."""


def digits_cnn(config: Mapping[str, Any]) -> nn.Module:
    """Four 3 × 3 convolutions with BatchNorm (halved once), mean over places, one linear layer: 68 k parameters."""
    layers: list[nn.Module] = []
    channels = 1
    for position, width in enumerate(config["widths"]):
        layers += [nn.Conv2d(channels, width, 3, padding=1, stride=2 if position == 2 else 1, bias=False)]
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, config["classes"])]
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class DigitsTier:
    """Folders: base and experts hold model.safetensors and config.json; tasks one .npz each, named as the experts."""

    base: Path
    experts: Mapping[str, Path]
    tasks: Path


def splits() -> dict[str, tuple[Images, NDArray[np.int64]]]:
    """Upright images (items, 8, 8) in 0 … 1 and labels: 1,000 train, 297 validation, 500 test."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    split = (images[order].reshape(-1, 8, 8) / 16).astype(np.float32), labels[order].astype(np.int64)
    cuts = {"train": slice(0, 1000), "validation": slice(1000, 1297), "test": slice(1297, None)}
    return {name: (split[0][cut], split[1][cut]) for name, cut in cuts.items()}


def _trained(model: nn.Module, images: Images, labels: NDArray[np.int64], steps: int, rate: float, seed: int) -> None:
    """AdamW on batches of 128, linear decay; batches drawn by `seed`."""
    inputs = torch.from_numpy(np.ascontiguousarray(images))[:, None]
    targets = torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    draw = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(targets), (128,), generator=draw)
        loss = nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()


def _written(model: nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True)
    tensors: dict[str, Tensor] = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1))


def _make(folder: Path) -> None:
    data = splits()
    (folder / "tasks").mkdir()
    for name, change in {**HELD_OUT, **CHANGES}.items():
        arrays: dict[str, NDArray[Any]] = {}
        for split, (images, labels) in data.items():
            arrays |= {f"{split}.inputs": np.ascontiguousarray(change(images))[:, None], f"{split}.labels": labels}
        np.savez(folder / "tasks" / f"{name}.npz", **arrays)
    images, labels = data["train"]
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model = digits_cnn(CONFIG)
    torch.random.set_rng_state(state)
    _trained(model, images, labels, steps=120, rate=3e-3, seed=0)
    _written(model, folder / "base")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    for seed, (name, change) in enumerate(CHANGES.items(), start=1):
        model.load_state_dict(weights)
        _trained(model, change(images), labels, steps=70, rate=2e-3, seed=seed)
        _written(model, folder / "experts" / name)


def write_tier(folder: Path) -> None:
    """The tier in the new folder `folder`, there whole or not at all. One torch thread: the same weights again."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    draft = Path(tempfile.mkdtemp(dir=folder.parent))
    _make(draft)
    torch.set_num_threads(threads)
    try:
        draft.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(draft)


def digits_tier(cache: Path) -> DigitsTier:
    """The tier under `cache`, made in some 15 s of one core where it is not there yet. Uses one torch thread."""
    folder = cache / f"digits-{file_sha256(Path(__file__))[:12]}"
    if not folder.is_dir():
        write_tier(folder)
    return DigitsTier(folder / "base", {name: folder / "experts" / name for name in CHANGES}, folder / "tasks")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "digits", help="the new folder")
    out = parser.parse_args().out
    if out.is_dir():
        sys.exit(f"make_digits: {out} is there already; delete it to train anew")
    write_tier(out)
    print(f"{out}: base, {len(CHANGES)} experts, {len(CHANGES) + len(HELD_OUT)} tasks")


if __name__ == "__main__":
    main()
