"""Which tensors a merge changes, which it copies and which it leaves out; names → layers; tied weights once."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mergecore.architectures import TIED, layer_of
from mergecore.errors import MismatchError, SpecError
from mergecore.method import TensorInfo
from mergecore.snapshot import MERGED


class SelectRule(BaseModel):
    """One rule of `select`; of several rules the first that matches a tensor decides."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    names: str = Field("*", description="shell pattern over tensor names, or a regular expression between slashes")
    layers: tuple[int, int] | None = Field(None, description="first and last layer (counted from 0), both included")
    take: Literal["merge", "copy"] = Field("merge", description="merge the tensor, or copy it from the base")

    def matches(self, name: str) -> bool:
        """Whether the rule speaks of this tensor."""
        if self.layers is not None:
            layer = layer_of(name)
            if layer is None or not self.layers[0] <= layer <= self.layers[1]:
                return False
        if len(self.names) > 1 and self.names.startswith("/") and self.names.endswith("/"):
            return re.search(self.names[1:-1], name) is not None
        return fnmatch.fnmatchcase(name, self.names)


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
    dropped = {
        name: f"tied to '{owner}'"
        for owner, name in TIED
        if config.get("tie_word_embeddings") and owner in base and name in base
    }
    held = {name for names in carried for name in names}
    merged: dict[str, TensorInfo] = {}
    copied: dict[str, TensorInfo] = {}
    for name in sorted(base):
        if name in dropped:
            continue
        wanted = name in held and base[name].dtype in MERGED and _take(name, rules) == "merge"
        (merged if wanted else copied)[name] = base[name]
    for rule in rules:
        if not any(rule.matches(name) for name in base):
            raise SpecError(f"select: the rule {rule.model_dump(exclude_defaults=True)} matches no tensor of the base")
    if not merged:
        raise SpecError("select leaves no tensor to merge: no floating-point tensor that an expert carries matches")
    return Layout(merged, copied, dropped)


def _take(name: str, rules: Sequence[SelectRule]) -> str:
    if not rules:
        return "merge"
    return next((rule.take for rule in rules if rule.matches(name)), "copy")


def check_fit(base: Mapping[str, TensorInfo], expert: Mapping[str, TensorInfo], where: str, tied: bool) -> None:
    """Raise MismatchError where a full checkpoint's names or shapes are not those of the base, naming the first few."""
    ignored = {name for _, name in TIED} if tied else set()
    missing = sorted(set(base) - set(expert) - ignored)
    unknown = sorted(set(expert) - set(base) - ignored)
    if missing or unknown:
        said = [f"lacks {_few(missing)}"] * bool(missing) + [f"has {_few(unknown)}, unknown to the base"] * bool(
            unknown
        )
        raise MismatchError(f"{where} does not have the base's architecture: it {' and '.join(said)}")
    for name in sorted(base):
        if name in expert and tuple(base[name].shape) != tuple(expert[name].shape):
            hint = "; the vocabularies differ" if re.search(r"embed|wte|lm_head|shared", name) else ""
            raise MismatchError(
                f"{where}: '{name}' has shape {list(expert[name].shape)}, in the base {list(base[name].shape)}{hint}"
            )


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
