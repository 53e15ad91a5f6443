"""One naming for a pool: the tensors of every expert under the names of the base's files.

Two files may name one tensor differently. Both become the name that it has in memory in the base's class, by
transformers' own rules; so they are brought together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mergecore.checkpoints.blueprint import blueprint_of, in_memory
from mergecore.checkpoints.layout import is_buffer, tied_names
from mergecore.checkpoints.snapshot import Snapshot
from mergecore.checkpoints.ties import differ
from mergecore.errors import MismatchError
from mergecore.identity.keys import digest
from mergecore.tensors.source import TensorInfo


def stored_names(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, str]:
    """Return {name in memory: name in the files} of a checkpoint."""
    return {memory: name for name, memory in in_memory(config, tensors).items()}


def under_base_names(base: Snapshot, expert: Snapshot, where: str) -> tuple[Snapshot, tuple[str, ...]]:
    """Return a full checkpoint under the names of the base's files, and what is to be said of it.

    A head that the expert ties and the base has of its own is the expert's embedding. Where all names are the base's
    it is returned as it is. Raises MismatchError where two tensors get one name, and where the expert has a head of
    its own that the base ties to other values.
    """
    tied = tied_names(base.tensors, base.config)
    names = _names(base, expert, tied, where)
    heads = _tied_heads(base, expert, names, tied)
    warnings = tuple(
        f"{where} ties '{name}' to '{owner}', the base does not: it is merged as a head with the embedding's values"
        for name, owner in heads.items()
    )
    names |= heads
    if any(new != old for new, old in names.items()):
        tensors = {new: expert.tensors[old] for new, old in names.items()}
        weights = digest(["names", expert.weights, sorted([new, old] for new, old in names.items() if new != old)])
        contents = expert.contents.renamed(names)
        expert = dataclasses.replace(expert, tensors=tensors, contents=contents, weights=weights)
    _refuse_lost_head(expert, tied, where)
    if any(name in expert.tensors and name not in tied for name in tied_names(expert.tensors, expert.config)):
        # Of a head that the base has of its own it does not matter whether the expert's is the same as its embedding.
        expert = dataclasses.replace(expert, config={**expert.config, "tie_word_embeddings": False})
    return expert, warnings


def _names(base: Snapshot, expert: Snapshot, tied: Mapping[str, str], where: str) -> dict[str, str]:
    """Return {name in the base's files: name in the expert's}. What the base has no tensor for keeps its name.

    tied: names that stand for another tensor of the base.
    """
    unknown = [name for name, info in expert.tensors.items() if name not in base.tensors and not is_buffer(name, info)]
    if not unknown or not base.config.get("model_type"):
        return {name: name for name in expert.tensors}
    _refuse_other_parts(base, expert, where)
    ours = {name: name for name in tied} | stored_names(base.tensors, base.config)
    theirs = in_memory(base.config, expert.tensors)
    names: dict[str, str] = {}
    for name, memory in theirs.items():
        new = name if is_buffer(name, expert.tensors[name]) else ours.get(memory, name)
        if new in names:
            raise MismatchError(
                f"{where}: '{names[new]}' and '{name}' are both '{new}' of the base; leave one of them out of its files"
            )
        names[new] = name
    return names


def _refuse_other_parts(base: Snapshot, expert: Snapshot, where: str) -> None:
    """Raise MismatchError where one file has a tensor as it is in memory, and the other what it is converted from."""
    blueprint = blueprint_of(base.config)
    if blueprint is None:
        return
    models = ((base, f"the base ({base.source.uri})"), (expert, where))
    sides = [
        (blueprint.converted(model.tensors), set(blueprint.in_memory(model.tensors).values()), told)
        for model, told in models
    ]
    for (converted, _, usual), (_, memory, other) in (sides, sides[::-1]):
        for name, result in converted.items():
            if result in memory:
                raise MismatchError(
                    f"{other} has '{result}', as transformers keeps it in memory; {usual} has '{name}', of which it is "
                    f"made while a file is loaded: load {other} with transformers and save it again with "
                    "save_pretrained, which writes files as the other is"
                )


def _tied_heads(base: Snapshot, expert: Snapshot, names: Mapping[str, str], ours: Mapping[str, str]) -> dict[str, str]:
    """Return {head in the base's files: the expert's embedding} of heads that only the expert ties."""
    missing = [name for name in base.tensors if name not in names]
    if not missing:
        return {}
    theirs = tied_names(expert.tensors, expert.config)
    memory = in_memory(base.config, base.tensors) if theirs else {}
    return {
        name: theirs[tied]
        for name in missing
        if name not in ours
        for tied in (name, memory.get(name, name))
        if tied in theirs
    }


def _refuse_lost_head(expert: Snapshot, tied: Mapping[str, str], where: str) -> None:
    """Raise MismatchError where an expert has a head of its own and the base's is its embedding.

    expert: under the base's names. tied: names that stand for another tensor of the base.
    """
    for name, owner in tied.items():
        if name in expert.tensors and owner in expert.tensors and differ(expert, name, owner):
            says = "" if expert.config.get("tie_word_embeddings") is False else ", as does its own config.json"
            raise MismatchError(
                f"{where} has a '{name}' of its own, which the base ties to '{owner}'{says}: the two differ in its "
                "files, so one of them would be lost; give a base that has both (the embedding copied to "
                f"'{name}', and tie_word_embeddings: false in its config.json), or an expert whose two are equal"
            )
