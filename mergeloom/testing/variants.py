"""What the contracts are tried with: the methods that were asked for, with every set of values they name."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mergecore.errors import PluginError, SpecError, nearest
from mergecore.plugins.adapter_method import AdapterMethod
from mergecore.plugins.method import Method
from mergecore.plugins.model_statistic import ModelStatistic
from mergecore.plugins.shelf import Shelf
from mergecore.registry import EVALUATORS, METHODS, PRODUCTS, SEARCHES, STATISTICS
from mergecore.tensors.source import TensorInfo

Model = dict[str, Tensor]
SHELVES: tuple[Shelf[Any], ...] = (METHODS, STATISTICS, PRODUCTS, SEARCHES, EVALUATORS)
IDS = ("c", "a", "b")
"""Ids of three experts, not in ascending order."""


def plugins(name: str) -> dict[str, type[Any]]:
    """Return the plug-ins of that name by kind. Raises UsageError where there is none, or it does not work."""
    try:
        kinds = {shelf.kind: shelf[name] for shelf in SHELVES if name in shelf}
    except PluginError as error:
        raise pytest.UsageError(str(error)) from None
    if not kinds:
        known = [known for shelf in SHELVES for known in shelf]
        raise pytest.UsageError(f"there is no plug-in '{name}'; {nearest(name, known)}")
    return kinds


def is_method(name: str) -> bool:
    """Whether a method has that name. Raises UsageError as `plugins` does."""
    return "method" in plugins(name)


def asked_for(config: pytest.Config) -> list[str]:
    """Return the names of the option; all of this repository's methods where none is given."""
    return list(config.getoption("--mergeloom-plugin", []) or METHODS.own)


def methods_of(names: Iterable[str]) -> list[type[Method]]:
    """Return the methods among these names that merge models; those that make adapters of adapters are left out."""
    kinds = [METHODS[name] for name in names if name in METHODS]
    return [kind for kind in kinds if not issubclass(kind, AdapterMethod)]


def variants(kind: type[Method], usual: bool = False) -> list[Any]:
    """Return the method with every set of values that its `examples()` names, as parameters for pytest.

    usual: only the first golden set and the others, which are values that make sense for any model.
    Raises UsageError where values of the examples are not the method's.
    """
    examples = kind.examples()
    parameters = []
    for values in (*examples.golden[:1], *examples.others) if usual else examples:
        try:
            method = kind.model_validate(values)
        except ValueError as error:
            raise pytest.UsageError(
                f"{kind.name}: examples() names {dict(values)}, which is refused: {error}"
            ) from None
        label = f"{kind.name}-{json.dumps(dict(values), separators=(',', ':'))}"
        parameters.append(pytest.param(method, id=label))
    return parameters


def accepted(method: Method, at_most: int = 3) -> int:
    """Return the largest number of experts that the method takes, 0 where it takes none of them."""
    for count in range(at_most, 0, -1):
        with contextlib.suppress(SpecError):
            method.validate_count(count)
            return count
    return 0


def data_statistics(method: Method, experts: Sequence[Mapping[str, Tensor]]) -> dict[str, list[Model]] | None:
    """Return numbers between 0 and 1 in place of what the method works out with data; None where it needs no data."""
    numbers = [
        {name: (value.float() * 3).sin() ** 2 for name, value in expert.items() if value.is_floating_point()}
        for expert in experts
    ]
    results: dict[str, list[Model]] = {}
    for name, statistic in method.statistics().items():
        if statistic.takes_data and isinstance(statistic, ModelStatistic):
            results[name] = [
                in_place_of(statistic, own, len(numbers)) for own in numbers[: statistic.handed(len(numbers))]
            ]
    return results or None


def in_place_of(statistic: ModelStatistic, numbers: Model, count: int = 1) -> Model:
    """Return these numbers where the statistic has one for each of a model; else matrices as large as those that it
    writes: for a square one a matrix without negative eigenvalues, for others numbers between 0 and 1.

    count: of the experts.
    """
    selection = {name: TensorInfo("F32", tuple(value.shape)) for name, value in numbers.items()}
    written = statistic.outputs(selection, count, {})
    if all(selection.get(name) == info for name, info in written.items()) and written.keys() == selection.keys():
        return numbers
    made_up = {}
    for name, info in written.items():
        if name not in numbers:
            made_up[name] = ((torch.arange(info.count).double() * 3 + 1).sin() ** 2).reshape(info.shape)
            continue
        values = numbers[name].reshape(-1)[: info.shape[0]].repeat(info.shape[0])[: info.shape[0]]
        made_up[name] = torch.outer(values, values) + torch.eye(info.shape[0])
    return made_up


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    """Return whether two models have the same names and the same numbers."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
