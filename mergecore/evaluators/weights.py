"""Weights put into a module in place: every parameter and persistent buffer, tied ones once, none left over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergecore.checkpoints.select import few
from mergecore.errors import MismatchError
from mergecore.tensors.finite import check_finite
from mergecore.tensors.source import TensorSource

_CHUNK = 1 << 24
"""Elements read at a time: no second copy of a large embedding is ever held."""


@dataclass(frozen=True)
class _Place:
    """A tensor of the module and all the names it goes by (several where weights are tied)."""

    names: tuple[str, ...]
    tensor: Tensor


def _places(module: nn.Module) -> list[_Place]:
    """Parameters and persistent buffers; buffers that are not persistent (rotary frequencies) are no business of
    ours.
    """
    names: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
        tensors[id(tensor)] = tensor
    return [_Place(tuple(names[key]), tensors[key]) for key in tensors]


def mismatches(module: nn.Module, weights: TensorSource) -> list[str]:
    """What keeps `weights` from being this module's, one sentence a kind: missing, unexpected, of another shape."""
    places = _places(module)
    known = {name for place in places for name in place.names}
    missing = [place.names[0] for place in places if not any(name in weights.tensors for name in place.names)]
    constants = {name for name, _ in module.named_buffers()}  # older versions saved them with the weights
    unexpected = sorted(set(weights.tensors) - known - constants)
    problems = []
    if missing:
        problems.append(f"missing: {few(missing, 5)}")
    if unexpected:
        problems.append(f"not part of the model: {few(unexpected, 5)}")
    for place in places:
        for name in place.names:
            if name in weights.tensors and weights.tensors[name].shape != tuple(place.tensor.shape):
                theirs, ours = list(weights.tensors[name].shape), list(place.tensor.shape)
                problems.append(f"'{name}' has shape {theirs} where the model has {ours}")
    return problems


def check_fit(module: nn.Module, weights: TensorSource) -> None:
    """Raise MismatchError naming every tensor that is missing, unexpected or of another shape; nothing is written."""
    if problems := mismatches(module, weights):
        raise MismatchError(
            f"the weights are not those of this {type(module).__name__}: {'; '.join(problems)}. "
            "Open another evaluator for another config or vocabulary"
        )


def blank(module: nn.Module) -> None:
    """Fill every floating parameter and persistent buffer with NaN, so that nothing of a model before can pass."""
    with torch.no_grad():
        for place in _places(module):
            if place.tensor.is_floating_point():
                place.tensor.fill_(torch.nan)


def fill(module: nn.Module, weights: TensorSource) -> None:
    """Copy `weights` into the module, cast to its dtypes. Call `check_fit` and `blank` first.

    Raises NonFiniteError for a NaN or an infinity (also one that the cast made), MismatchError for a source that gives
    fewer elements than it says, for integers where the model has floats, and for tied weights that differ.
    """
    with torch.no_grad():
        for place in _places(module):
            names = [name for name in place.names if name in weights.tensors]
            _copy(place.tensor, names[0], weights)
            for name in names[1:]:
                _check_tied(place.tensor, names[0], name, weights)


def _pieces(count: int) -> list[tuple[int, int]]:
    return [(start, min(start + _CHUNK, count)) for start in range(0, count, _CHUNK)]


def _copy(tensor: Tensor, name: str, weights: TensorSource) -> None:
    flat = tensor.detach().view(-1)
    for start, stop in _pieces(flat.numel()):
        piece = weights.read(name, start, stop)
        if piece.numel() != stop - start:  # a single element would be broadcast without a word
            raise MismatchError(f"tensor '{name}' gave {piece.numel()} elements where {stop - start} were asked for")
        if piece.is_floating_point() != tensor.is_floating_point():
            raise MismatchError(f"tensor '{name}' is {piece.dtype} where the model has {tensor.dtype}")
        flat[start:stop].copy_(piece.reshape(-1))
        if tensor.is_floating_point():
            check_finite(flat[start:stop], name, f"the weights, as {tensor.dtype}", "evaluate in a wider dtype")


def _check_tied(tensor: Tensor, first: str, name: str, weights: TensorSource) -> None:
    flat = tensor.detach().view(-1)
    for start, stop in _pieces(flat.numel()):
        piece = weights.read(name, start, stop).reshape(-1).to(device=flat.device, dtype=flat.dtype)
        if not torch.equal(piece, flat[start:stop]):
            raise MismatchError(
                f"the model ties '{first}' and '{name}', but these weights differ; leave one of them out"
            )
