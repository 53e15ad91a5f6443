"""Which tensors a merge changes, which it copies and which it leaves out; names → layers; tied weights once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergecore.checkpoints.architectures import ALWAYS_TIED, BUFFER, HEAD_APART, TIED
from mergecore.checkpoints.select import LEFT_OUT, SelectRule, _take, check_rules, left_out
from mergecore.errors import SpecError
from mergecore.tensors.dtypes import MERGED
from mergecore.tensors.source import TensorInfo


@dataclass(frozen=True)
class Layout:
    """Every tensor of the base is merged, copied or dropped; `merged` is what densities and norms are counted over."""

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
    """The layout of a merge. carried: per expert the base tensors that its own files hold.

    Without rules every floating-point tensor that at least one expert carries is merged; tied weights count once.
    Raises SpecError for a rule that matches nothing or a selection that is empty.
    """
    dropped = {name: f"tied to '{owner}'" for name, owner in tied_names(base, config).items() if name in base}
    held = {name for names in carried for name in names}
    merged: dict[str, TensorInfo] = {}
    copied: dict[str, TensorInfo] = {}
    for name in sorted(base):
        if name in dropped:
            continue
        if left_out(name, rules):
            dropped[name] = LEFT_OUT
            continue
        wanted = name in held and is_weight(name, base[name]) and _take(name, rules) == "merge"
        (merged if wanted else copied)[name] = base[name]
    check_rules(base, rules)
    if not merged:
        raise SpecError(
            "select leaves no tensor to merge: no floating-point tensor that an expert carries is taken; add a rule, "
            "as in select: [{names: '*'}]"
        )
    return Layout(merged, copied, dropped)


def is_weight(name: str, info: TensorInfo) -> bool:
    """Whether a tensor can be merged: floating-point and no constant that is saved along."""
    return info.dtype in MERGED and not _is_buffer(name, info)


def tied_names(base: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, str]:
    """{name: owner} of the names that stand for another tensor of the base, whether its files hold them or not."""
    return {name: owner for owner, name in _tied_pairs(config) if owner in base}


def _tied_pairs(config: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """(owner, name) of what is one tensor in a model of this configuration; without one nothing is known to be."""
    # Of a T5 with a head of its own transformers 5 says that it is tied, and, truly, that outputs are not scaled.
    apart = config.get("scale_decoder_outputs") is False or config.get("model_type") in HEAD_APART
    tied = bool(config.get("tie_word_embeddings")) and not apart
    return tuple(pair for pair in TIED if tied or (config and pair[1] in ALWAYS_TIED))


def _is_buffer(name: str, info: TensorInfo) -> bool:
    """GPT-2's attention mask is called attn.bias too; a bias that is a parameter has one dimension."""
    return BUFFER.search(name) is not None and (len(info.shape) != 1 or not name.endswith("bias"))
