"""Which tensors a merge changes, which it copies and which it drops. Tied weights count once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergecore.checkpoints.architectures import ALWAYS_TIED, BUFFER, HEAD_APART, STATED, TIED
from mergecore.checkpoints.blueprint import blueprint_of, in_memory
from mergecore.checkpoints.select import LEFT_OUT, SelectRule, check_rules, left_out, take
from mergecore.errors import MismatchError, SpecError
from mergecore.tensors.dtypes import MERGED
from mergecore.tensors.source import TensorInfo


@dataclass(frozen=True)
class Layout:
    """What happens to every tensor of the base. Densities and norms are counted over `merged`."""

    merged: Mapping[str, TensorInfo]
    copied: Mapping[str, TensorInfo]
    dropped: Mapping[str, str]
    """Tensors left out, with the reason."""


def lay_out(
    base: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    carried: Sequence[Iterable[str]],
    rules: Sequence[SelectRule] = (),
) -> Layout:
    """Return the layout of a merge. carried: for each expert the base tensors that its own files hold.

    Without rules every floating-point tensor that at least one expert carries is merged. Tied weights count once.
    Raises SpecError for a rule that matches nothing or names layers that are not there, and for a selection that is
    empty; MismatchError where most of it is quantized.
    """
    dropped = {name: f"tied to '{owner}'" for name, owner in tied_names(base, config).items() if name in base}
    carried_names = {name for names in carried for name in names}
    merged: dict[str, TensorInfo] = {}
    copied: dict[str, TensorInfo] = {}
    for name in sorted(base):
        if name in dropped:
            continue
        if left_out(name, rules):
            dropped[name] = LEFT_OUT
            continue
        is_merged = name in carried_names and is_weight(name, base[name]) and take(name, rules) == "merge"
        (merged if is_merged else copied)[name] = base[name]
    check_rules(base, rules)
    _refuse_codes(base, carried_names, dropped, rules)
    if not merged:
        raise SpecError(
            "select leaves no tensor to merge: no floating-point tensor that an expert carries is taken; add a rule, "
            "as in select: [{names: '*'}]"
        )
    return Layout(merged, copied, dropped)


def _refuse_codes(
    base: Mapping[str, TensorInfo], carried: Collection[str], dropped: Collection[str], rules: Sequence[SelectRule]
) -> None:
    """Raise MismatchError where most matrices that should be merged hold codes of a quantization, not weights."""
    matrices = [name for name in base if name in carried and name not in dropped and len(base[name].shape) > 1]
    wanted = [name for name in matrices if take(name, rules) == "merge" and not is_buffer(name, base[name])]
    codes = sorted(name for name in wanted if base[name].dtype not in MERGED)
    if 2 * len(codes) > len(wanted):
        dtypes = ", ".join(sorted({base[name].dtype for name in codes}))
        raise MismatchError(
            f"{len(codes)} of {len(wanted)} matrices that should be merged are {dtypes} ('{codes[0]}', …): quantized "
            "values are codes, which cannot be merged; give the checkpoints before they were quantized, or copy these "
            "tensors by `select`"
        )


def is_weight(name: str, info: TensorInfo) -> bool:
    """Return whether a tensor can be merged: it is floating-point, and no constant that is saved with the weights."""
    return info.dtype in MERGED and not is_buffer(name, info)


def tied_names(base: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, str]:
    """Return {name: owner} of the names that stand for another tensor of the base, whether its files hold them
    or not.

    transformers knows which: the class says which names, the configuration and its defaults say whether. Names that
    the files do not hold are those in memory. Without a configuration nothing is known to be tied.
    """
    said_by_config = config.get("model_type") in STATED and isinstance(config.get("tie_word_embeddings"), bool)
    blueprint = None
    if config.get("model_type") and not (said_by_config and any(owner in base for owner, _ in TIED)):
        blueprint = blueprint_of(config)
    if blueprint is None:
        return {name: owner for owner, name in _common_pairs(config) if owner in base}
    if not blueprint.tied:
        return {}
    stored = {memory: name for name, memory in in_memory(config, base).items()}
    groups: dict[str, list[str]] = {}
    for name, owner in blueprint.tied.items():
        if not (_head_apart(config) and name.startswith("lm_head.")):
            groups.setdefault(owner, [owner]).append(name)
    tied: dict[str, str] = {}
    for group in groups.values():
        files = [stored[name] for name in group if name in stored]
        if files:  # the files may hold the head alone: then it is the owner
            tied |= {stored.get(name, name): files[0] for name in group if stored.get(name, name) != files[0]}
    return tied


def _common_pairs(config: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return (owner, name) of each pair of the common families that is one tensor by this configuration alone."""
    tied = bool(config.get("tie_word_embeddings")) and not _head_apart(config)
    return tuple(pair for pair in TIED if tied or (config and pair[1] in ALWAYS_TIED))


def _head_apart(config: Mapping[str, Any]) -> bool:
    """Return whether the head is a tensor of its own, whatever the class of transformers 5 says."""
    # Of a T5 with a head of its own transformers 5 says that it is tied, and, truly, that outputs are not scaled.
    stated = config.get("tie_word_embeddings") is False or config.get("scale_decoder_outputs") is False
    return stated or config.get("model_type") in HEAD_APART


def is_buffer(name: str, info: TensorInfo) -> bool:
    """Return whether a tensor is a constant. GPT-2's attention mask is called attn.bias; a bias that is a parameter is
    1-D.
    """
    return BUFFER.search(name) is not None and (len(info.shape) != 1 or not name.endswith("bias"))
