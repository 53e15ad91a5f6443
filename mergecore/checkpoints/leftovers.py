"""What training leaves in files that are no whole checkpoint: placeholders, flat parameters, names of wrappers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mergecore.checkpoints.blueprint import blueprint_of
from mergecore.errors import SourceError
from mergecore.tensors.dtypes import MERGED
from mergecore.tensors.source import TensorInfo

FLAT = re.compile(r"(?:^|\.)_?flat_param(?:_\d+)?(?:\.|$)")
"""A part of a tensor's name: FSDP's one long vector in place of a layer's tensors."""
WRAPPERS = re.compile(r"(?:^|\.)(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module|_forward_module)\.")
"""Parts of names that FSDP, torch.compile, activation checkpointing and Lightning put around a model's own."""
PARALLEL = "module."
"""What DistributedDataParallel and DeepSpeed put before all names."""


def check_whole(
    tensors: Mapping[str, TensorInfo], files: Mapping[str, str], config: Mapping[str, Any], where: str
) -> None:
    """Raise SourceError where these are no whole tensors under a model's own names.

    files: the file of each tensor. config: config.json; a tensor that is empty in its model may be empty. where: the
    checkpoint.
    """
    flat = [name for name in tensors if FLAT.search(name)]
    if flat:
        raise SourceError(
            f"{_first(flat, files, where)} a flat parameter of FSDP, one piece of several tensors in a row; gather "
            "the model's own tensors (state_dict_type FULL_STATE_DICT; `accelerate merge-weights` of shards) and "
            "save those"
        )
    empty = [name for name, info in tensors.items() if is_placeholder(info)]
    blueprint = blueprint_of(config) if empty else None
    if blueprint is not None:
        empty = [name for name in empty if blueprint.shapes.get(blueprint.in_memory([name])[name]) != (0,)]
    if empty:
        raise SourceError(
            f"{_first(empty, files, where)} empty (shape [0]): a placeholder of DeepSpeed ZeRO-3 or FSDP, whose values "
            "were on other processes; save it again with the weights gathered (DeepSpeed: "
            "stage3_gather_16bit_weights_on_model_save, or zero_to_fp32.py on its checkpoint)"
        )
    wrapped = [name for name in tensors if own_name(name) != name]
    if all(name.startswith(PARALLEL) for name in tensors):
        wrapped = list(tensors)
    if wrapped:
        own = own_name(wrapped[0].removeprefix(PARALLEL))
        raise SourceError(
            f"{_first(wrapped, files, where)} named by a wrapper around the model: its own name is '{own}', and "
            "no model loads the other; save the state_dict of the unwrapped model, or rename the tensors and save them "
            "again"
        )


def is_placeholder(info: TensorInfo) -> bool:
    """Return whether a tensor is what ZeRO-3 leaves of one: floating-point, one axis, no element."""
    return info.shape == (0,) and info.dtype in MERGED


def own_name(name: str) -> str:
    """Return a tensor's name without what wrappers put into it."""
    while (shorter := WRAPPERS.sub(lambda part: "." if part[0].startswith(".") else "", name)) != name:
        name = shorter
    return name


def _first(names: list[str], files: Mapping[str, str], where: str) -> str:
    """Begin a sentence about tensors: the first one, its file, and how many more there are."""
    more = f" and {len(names) - 1} more are" if len(names) > 1 else " is"
    return f"{where}/{files[names[0]]}: tensor '{names[0]}'{more}"
