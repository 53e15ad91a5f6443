"""Golden numbers: every method's result on tiny inputs, as digests (or, beyond plain arithmetic, as a few numbers).

    python -m tests.golden.golden            write what is new (a new method, a new version, a new variant)
    python -m tests.golden.golden --force    write everything anew, also numbers that changed without a new version

The inputs are multiples of 2^-12 made from `random_words`: sums of them in float64 are exact, so nothing here depends on
the order in which a machine adds. Element-wise methods give the same bytes on every machine; others are compared with
a tolerance.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergecore import merge
from mergecore.checkpoints.experts import AdapterExpert, Factor
from mergecore.identity.content import model_digest, tensor_digest
from mergecore.identity.draws import random_key, random_words
from mergecore.plugins.adapter_method import AdapterMethod, combined_modules
from mergecore.plugins.block import Per
from mergecore.plugins.chain import Link
from mergecore.plugins.method import Method
from mergecore.plugins.model_statistic import ModelStatistic
from mergecore.registry import METHODS
from mergecore.statistics.products import Products
from mergecore.tensors.memory import MemoryTensors
from mergecore.tensors.source import TensorInfo
from mergecore.tensors.torch_dtypes import DTYPE_NAMES
from mergeloom.testing.variants import accepted, in_place_of

STORED = Path(__file__).with_name("golden.json")
TOLERANCE = 1e-4
"""Relative, for methods that are not element-wise."""

Golden = str | dict[str, list[float]]


def drawn(name: str, shape: tuple[int, ...], bits: int = 10) -> Tensor:
    """Multiples of 2^-12 between −2^(bits−12) and 2^(bits−12), the same on every machine."""
    count = torch.Size(shape).numel()
    words = random_words(random_key(0, "golden", name), 0, count) >> (31 - bits)
    return (words.to(torch.float32) / 4096).reshape(shape)


def models() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """A base and three experts: matrix, convolution, vector, scalar, narrow dtypes, an empty tensor, a counter."""
    shapes: dict[str, tuple[int, ...]] = {
        "layers.0.m": (29, 13), "layers.1.m": (29, 13), "conv": (3, 4, 3, 3), "v": (11,), "s": (), "empty": (0, 4),
    }  # fmt: skip
    kinds = {"layers.1.m": torch.bfloat16, "conv": torch.float16}

    def drawn_model(label: str, bits: int, onto: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        tensors = {}
        for name, shape in shapes.items():
            value = drawn(f"{label}/{name}", shape, bits)
            tensors[name] = (value if onto is None else onto[name].float() + value).to(kinds.get(name, torch.float32))
        return {**tensors, "counter": torch.arange(5)}

    base = drawn_model("base", 12)
    return base, [drawn_model(f"expert {number}", 8, base) for number in range(3)]


def adapters() -> list[AdapterExpert]:
    """Three adapters of ranks 2, 3 and 2 on two modules, of which the last has only one."""
    actual = []
    for number, rank in enumerate((2, 3, 2)):
        tensors, factors = {}, {}
        for target, (rows, columns) in (("a.weight", (9, 7)), ("b.weight", (5, 8)))[: 2 if number < 2 else 1]:
            tensors[f"{target}.down"] = drawn(f"{number} {target} down", (rank, columns))
            tensors[f"{target}.up"] = drawn(f"{number} {target} up", (rows, rank))
            factors[target] = Factor(f"{target}.down", f"{target}.up", 0.5 + number, False)
        shapes = {"a.weight": (9, 7), "b.weight": (5, 8)}
        actual.append(AdapterExpert(f"{number}", f"{number}", MemoryTensors(tensors), factors, shapes))
    return actual


def result(method: Method) -> dict[str, Tensor]:
    """The method's merge of the tiny models; Fisher information and the like is made up. Of adapters: what they change."""
    if isinstance(method, AdapterMethod):
        selection = {"a.weight": TensorInfo("F32", (9, 7)), "b.weight": TensorInfo("F32", (5, 8))}
        return {
            target: combined.up @ combined.down for target, combined in combined_modules(method, adapters(), selection)
        }
    base, experts = models()
    experts = experts[: accepted(method)]
    handed = {}
    for name, statistic in method.statistics().items():
        if isinstance(statistic, ModelStatistic):
            handed[name] = [
                in_place_of(
                    statistic,
                    {
                        tensor: drawn(f"{name} {n}/{tensor}", tuple(value.shape), 8).abs()
                        for tensor, value in expert.items()
                        if value.is_floating_point()
                    },
                    len(experts),
                )
                for n, expert in enumerate(experts[: statistic.handed(len(experts))])
            ]
    return merge(method, base=base, experts=experts, ids=["c", "a", "b"][: len(experts)], statistics=handed or None)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes."""
    digested = {
        name: (
            DTYPE_NAMES[value.dtype],
            tuple(value.shape),
            tensor_digest([hashlib.sha256(value.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()]),
        )
        for name, value in tensors.items()
    }
    return model_digest(digested)[:32]


def summary_of(tensors: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Per tensor its sum, its norm and its first elements, to six digits."""
    actual = {}
    for name, value in tensors.items():
        wide = value.reshape(-1).to(torch.float64)
        numbers = [float(wide.sum()), float((wide * wide).sum() ** 0.5), *wide[:4].tolist()]
        actual[name] = [float(f"{number:.6g}") for number in numbers]
    return actual


def adapter() -> dict[str, Tensor]:
    """The delta of an adapter over several blocks of rows, plain and transposed."""
    rows, columns, rank = 300, 7, 3
    tensors = {"down": drawn("down", (rank, columns), 8), "up": drawn("up", (rows, rank), 8)}
    tensors |= {"wide": drawn("wide", (rank, rows), 8), "tall": drawn("tall", (columns, rank), 8)}
    factors = {"plain": Factor("down", "up", 0.75, False), "transposed": Factor("wide", "tall", 1.5, True)}
    shapes = dict.fromkeys(factors, (rows, columns))
    expert = AdapterExpert("id", "name", MemoryTensors(tensors), factors, shapes)
    return {name: expert.block(name, 0, rows * columns) for name in factors}


def label_of(method: Method, values: Mapping[str, Any]) -> str:
    """How a variant is called in the file: method, version, values."""
    return f"{method.name} v{method.revision(accepted(method))} {json.dumps(dict(values), sort_keys=True)}"


def variants() -> dict[str, Method]:
    """Return every method of this repository with the values whose results are golden (`examples()`), by label."""
    actual: dict[str, Method] = {}
    for kind in map(METHODS.__getitem__, METHODS.own):
        for values in kind.examples().golden:
            method = kind.model_validate(values)
            actual[label_of(method, values)] = method
    return actual


def golden_of(method: Method) -> Golden:
    """A digest for what is element-wise, a few numbers for the rest: factorisations and angles differ in their last bits
    from one machine's libraries to another's."""
    actual = result(method)
    inexact = any(isinstance(statistic, Link | Products) for statistic in method.statistics().values())
    exact = (method.per is Per.ELEMENT and not inexact) or method.product == "masks"
    return digest_of(actual) if exact else summary_of(actual)


def stored() -> dict[str, Golden]:
    """What the file holds."""
    numbers: dict[str, Golden] = json.loads(STORED.read_text()) if STORED.exists() else {}
    return numbers


def agree(actual: Golden, wanted: Golden) -> bool:
    """Whether the numbers are the golden ones."""
    if isinstance(actual, str) or isinstance(wanted, str):
        return actual == wanted
    return actual.keys() == wanted.keys() and all(
        abs(ours - theirs) <= TOLERANCE * max(1.0, abs(theirs))
        for name in actual
        for ours, theirs in zip(actual[name], wanted[name], strict=True)
    )


def main() -> None:
    """Write the file anew, keeping what already stands there unless forced."""
    parser = argparse.ArgumentParser(description="Write golden.json anew.")
    parser.add_argument("--force", action="store_true", help="also numbers that changed without a new version")
    force = parser.parse_args().force
    before, after = stored(), {"adapter": digest_of(adapter())}
    fresh: dict[str, Golden] = {**after, **{label: golden_of(method) for label, method in variants().items()}}
    changed = [label for label, value in fresh.items() if label in before and not agree(value, before[label])]
    if changed and not force:
        raise SystemExit(f"other numbers under the same version: {', '.join(changed)}; bump the version, or --force")
    kept = {
        label: before[label] if label in before and label not in changed else fresh[label] for label in sorted(fresh)
    }
    STORED.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
