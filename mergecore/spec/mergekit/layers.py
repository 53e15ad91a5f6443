"""What each tensor of mergekit's result is made of: which tensors of which models, at which depth, with which
settings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mergecore.checkpoints.architectures import LAYER, at_layer, depths, layer_of
from mergecore.checkpoints.snapshot import Snapshot
from mergecore.errors import SpecError, nearest
from mergecore.spec.mergekit.document import Document, Inputs, OutputSlice, SliceInput
from mergecore.spec.mergekit.reference import Reference

Lookup = Callable[[Reference], Snapshot]
"""Headers and configuration of a model (without its adapter)."""
FIRST = re.compile(r"embed|wte|wpe|shared")
"""Tensors that stand before the first layer; what else belongs to no layer stands after the last."""
ENCODER = {"encoder": r"^(?:model\.)?encoder\.", "decoder": r"^(?!(?:model\.)?encoder\.)"}
VISUAL = {
    "text_decoder": r"^(?!(?:model\.)?visual\.)",
    "multi_modal_projector": r"^(?:model\.)?visual\.(?:deepstack_)?merger",
    "vision_tower": r"^(?:model\.)?visual\.(?!(?:deepstack_)?merger)",
}
TOWER = {
    "text_decoder": r"^(?!(?:model\.)?(?:vision_tower|vision_model|multi_modal_projector)\.)",
    "multi_modal_projector": r"^(?:model\.)?multi_modal_projector\.",
    "vision_tower": r"^(?:model\.)?(?:vision_tower|vision_model)\.",
}
NUMBER = re.compile(r"\.(\d+)\.")
AT_THE_END = dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), r"(?:^|\.)visual\.merger\.mlp\.")
"""By model type, numbered tensors that mergekit takes for those of two layers each: the depth of the last holds."""
MODULES: dict[str, Mapping[str, str]] = {
    **dict.fromkeys(("t5", "whisper"), ENCODER),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"), VISUAL),
    **dict.fromkeys(("gemma3", "llama4", "mistral3"), TOWER),
}
"""Names of modules by model type, as mergekit has them, and which tensors are theirs."""


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the result. out: the slice it belongs to; names: what it is called in each source, in their
    order.
    """

    name: str
    out: OutputSlice
    inputs: Inputs
    names: tuple[str, ...]
    depth: float


@dataclass(frozen=True)
class Level:
    """One layer of the result: for every model of its slice the layer it is there."""

    layers: Mapping[Reference, int]


def depth_of(snapshot: Snapshot, module: str = "") -> int:
    """Number of layers, of the whole model or of one of its modules."""
    mine = MODULES.get(str(snapshot.config.get("model_type")), {}).get(module, "")
    layers = [layer for name in snapshot.tensors if re.search(mine, name) and (layer := layer_of(name)) is not None]
    return max(layers) + 1 if layers else 0


def stacks_of(snapshot: Snapshot, module: str = "") -> dict[str, int]:
    """{what stands before the number: how many layers} of every stack of a model, or of one of its modules."""
    mine = MODULES.get(str(snapshot.config.get("model_type")), {}).get(module, "")
    return depths(name for name in snapshot.tensors if re.search(mine, name))


def slices_of(document: Document, module: str, lookup: Lookup, where: str) -> tuple[OutputSlice, ...]:
    """The slices of a document ('') or module; whole models are one slice, to which the base belongs where there is
    one.
    """
    inputs = document.inputs[module]
    where = f"{where}.modules.{module}" if module else where
    if inputs.slices is not None:
        for number, out in enumerate(inputs.slices):
            for source in out.sources:
                depth = depth_of(lookup(source.model), module)
                if source.layer_range[1] > depth:
                    raise SpecError(
                        f"{where}.slices[{number}]: layer_range {list(source.layer_range)} of '{source.model}', which "
                        f"has {depth} layers: the end may be {depth} at most"
                    )
                stacks = stacks_of(lookup(source.model), module)
                if len(set(stacks.values())) > 1:
                    told = " and ".join(f"'{stem}' with {layers}" for stem, layers in stacks.items())
                    raise SpecError(
                        f"{where}.slices: '{source.model}' has several stacks of layers, {told}, and slices speak of "
                        "one, in mergekit too; where every layer stays where it is, list the models under 'models', "
                        "else write 'modules' with slices of each"
                    )
        return inputs.slices
    models = inputs.models or ()
    parameters = {model.model: model.parameters for model in models}
    if len(parameters) < len(models):
        twice = next(
            model.model for number, model in enumerate(models) if model.model in [m.model for m in models[:number]]
        )
        raise SpecError(f"{where}.models: '{twice}' stands there twice; list each model once")
    if document.base_model is not None:
        parameters.setdefault(document.base_model, {})
    counts = {str(model): depth_of(lookup(model), module) for model in parameters}
    if len(set(counts.values())) > 1:
        raise SpecError(
            f"{where}.models have different numbers of layers ({counts}); use slices to say which go together"
        )
    whole = (0, max(1, *counts.values()))
    return (
        OutputSlice(sources=tuple(SliceInput(model=m, layer_range=whole, parameters=p) for m, p in parameters.items())),
    )


def whole_depths(tensors: Sequence[str], kind: str) -> dict[str, float]:
    """{name: depth} of every tensor of a model whose layers all stay. Without a number the depth is 0.

    Whatever is numbered is a stack to mergekit, the parts of a projector too: there the first number of a name counts.
    """
    numbered = {name: number for name in tensors if (number := LAYER.search(name) or NUMBER.search(name)) is not None}
    counts: dict[str, int] = {}
    for name, number in numbered.items():
        stem = name[: number.start(1)]
        counts[stem] = max(counts.get(stem, 0), int(number[1]) + 1)
    depth_by_name = dict.fromkeys(tensors, 0.0)
    for name, number in numbered.items():
        last = counts[name[: number.start(1)]] - 1
        at_end = kind in AT_THE_END and re.search(AT_THE_END[kind], name)
        depth_by_name[name] = 1.0 if at_end or not last else int(number[1]) / last
    return depth_by_name


def made_tensors(
    slices: Sequence[OutputSlice], inputs: Inputs, tensors: Sequence[str], kind: str = ""
) -> Iterator[OutputTensor]:
    """Every tensor of the result. tensors: the names that one model has. kind: its model type.

    Of whole models every layer stays, and its depth is that in its own stack: in mergekit each stack is a module.
    """
    if inputs.slices is None:
        for name, depth in whole_depths(tensors, kind).items():
            yield OutputTensor(name, slices[0], inputs, (name,) * len(slices[0].sources), depth)
        return
    for name in tensors:
        if layer_of(name) is None:
            out = slices[0] if FIRST.search(name) else slices[-1]
            yield OutputTensor(name, out, inputs, (name,) * len(out.sources), 0.0)
    within = {at_layer(name, 0): name for name in tensors if layer_of(name) is not None}
    number = 0
    for out in slices:
        count = out.sources[0].count
        for offset in range(count):
            depth = offset / (count - 1) if count > 1 else 1.0
            for name in within:
                names = tuple(at_layer(name, source.layer_range[0] + offset) for source in out.sources)
                yield OutputTensor(at_layer(name, number), out, inputs, names, depth)
            number += 1


def levels(slices: Sequence[OutputSlice]) -> tuple[Level, ...]:
    """The layers of the result, from the first."""
    return tuple(
        Level({source.model: source.layer_range[0] + offset for source in out.sources})
        for out in slices
        for offset in range(out.sources[0].count)
    )


def module_tensors(module: str, kind: str, tensors: Sequence[str], where: str) -> list[str]:
    """The tensors that belong to a module of a model type; '' and 'default' are the whole model. Raises SpecError."""
    if module in ("", "default"):
        return list(tensors)
    known = MODULES.get(kind, {})
    if module not in known:
        raise SpecError(
            f"{where}.modules.{module}: a '{kind}' model has no such module here; "
            f"{nearest(module, {*known, 'default'})}"
        )
    return [name for name in tensors if re.search(known[module], name)]
