"""The check that an expert has the base's tensors in the same shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mergecore.checkpoints.architectures import layer_of, outside
from mergecore.checkpoints.layout import is_buffer, tied_names
from mergecore.checkpoints.select import SelectRule, few, left_out
from mergecore.errors import MismatchError
from mergecore.tensors.dtypes import MERGED
from mergecore.tensors.source import TensorInfo

HEAD = 3
"""At most so many tensors that do not fit may be a task's head; more are another architecture."""
INCOMPLETE = "the checkpoint is not complete, or of another model: fetch or save it again"
OTHER_MODEL = "give an expert that was trained from this base"
VOCABULARIES_DIFFER = "the vocabularies differ: `tokenizer: union` brings them together"


def check_fit(
    base: Mapping[str, TensorInfo],
    expert: Mapping[str, TensorInfo],
    where: str,
    config: Mapping[str, Any],
    rules: Sequence[SelectRule] = (),
) -> None:
    """Raise MismatchError where a full checkpoint's names or shapes are not those of the base. It names the first few.

    rules: what they drop need not fit. config: the base's; what it ties need not fit either.
    """
    ignored = set(tied_names(base, config)) | set(tied_names(expert, config))
    ignored |= {name for tensors in (base, expert) for name in tensors if left_out(name, rules)}
    ignored |= {name for tensors in (base, expert) for name in tensors if is_buffer(name, tensors[name])}
    missing = sorted(set(base) - set(expert) - ignored)
    unknown = sorted(set(expert) - set(base) - ignored)
    if missing or unknown:
        differences = [f"lacks {few(missing)}"] * bool(missing) + [f"has {few(unknown)}, unknown to the base"] * bool(
            unknown
        )
        astray = missing + unknown
        is_head = len(astray) <= HEAD and all(layer_of(name) is None and outside(name) == "head" for name in astray)
        hint = _without(astray) if is_head else INCOMPLETE if missing and not unknown else OTHER_MODEL
        raise MismatchError(f"{where} does not have the base's architecture: it {' and '.join(differences)}; {hint}")
    for name in sorted(base):
        if name in expert and name not in ignored and tuple(base[name].shape) != tuple(expert[name].shape):
            wide = re.search(r"embed|wte|lm_head|shared", name)
            is_head = layer_of(name) is None and outside(name) == "head"
            hint = VOCABULARIES_DIFFER if wide else _without([name]) if is_head else OTHER_MODEL
            raise MismatchError(
                f"{where}: '{name}' has shape {list(expert[name].shape)}, in the base {list(base[name].shape)}; {hint}"
            )
        if name in expert and base[name].dtype in MERGED and expert[name].dtype not in MERGED:
            raise MismatchError(
                f"{where}: '{name}' has dtype {expert[name].dtype}, in the base {base[name].dtype}: quantized values "
                "cannot be merged; give the checkpoint before it was quantized"
            )


def float64_names(tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Return the tensors that are float64."""
    return sorted(name for name, info in tensors.items() if info.dtype == "F64")


def float64_loss(name: str) -> str:
    """Return a sentence about float64 tensors, of which `name` is one."""
    return (
        f"'{name}' and the like are float64; merges work in float32, so of about 16 digits 7 are kept (what is copied "
        "keeps all of its digits)"
    )


def _without(names: Sequence[str]) -> str:
    """Say what can be done about tensors that do not fit."""
    rules = ", ".join(f"{{names: '{name}', take: drop}}" for name in names)
    return f"a task's head may be left out of the result: select: [{rules}, {{}}]"
