"""The rules of `select`: which tensors are merged, copied or left out."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from mergecore.checkpoints.architectures import depths, layer_of
from mergecore.checkpoints.patterns import check_pattern, search
from mergecore.errors import SpecError, nearest
from mergecore.identity.numbers import Numbers


class SelectRule(Numbers):
    """One rule of `select`. The first rule that matches a tensor decides.

    Every other key is a value of the method for the tensors that the rule matches.
    """

    model_config = ConfigDict(frozen=True, extra="allow", defer_build=True)

    names: str = Field("*", description="shell pattern over tensor names, or a regular expression between slashes")
    layers: tuple[int, int] | None = Field(None, description="first and last layer (counted from 0), both included")
    take: Literal["merge", "copy", "drop"] = Field(
        "merge", description="merge the tensor, copy it, or leave it out of the result (a task's head)"
    )
    of: str | None = Field(None, description="the expert it is copied from; none: the base")
    method: str | None = Field(None, description="the method that merges it; none: the recipe's")
    experts: tuple[str, ...] | None = Field(None, description="names of the experts that take part; none: all")
    base: str | None = Field(None, description="the expert whose weights the changes are counted from; none: the base")

    @field_validator("names")
    @classmethod
    def _can_be_read(cls, names: str) -> str:
        if _is_expression(names):
            check_pattern(names[1:-1])
        return names

    @field_validator("layers")
    @classmethod
    def _forward(cls, layers: tuple[int, int] | None) -> tuple[int, int] | None:
        if layers is not None and not 0 <= layers[0] <= layers[1]:
            raise ValueError(f"{list(layers)} is no run of layers; give the first and the last, from 0")
        return layers

    @model_validator(mode="after")
    def _fit_together(self) -> SelectRule:
        keys = [key for key in ("method", "experts", "base") if getattr(self, key) is not None] + list(self.values)
        if self.take != "merge" and keys:
            unknown = keys[0] not in SelectRule.model_fields
            hint = nearest(keys[0], SelectRule.model_fields) if unknown else "leave one of them out"
            raise ValueError(f"'{keys[0]}' says how to merge, 'take: {self.take}' not to; {hint}")
        if self.take != "copy" and self.of is not None:
            raise ValueError(f"'of' says whom to copy from; write {{take: copy, of: {self.of}}}")
        if self.experts is not None and not self.experts:
            raise ValueError("'experts' is empty; name at least one, or write take: copy")
        return self

    @property
    def values(self) -> dict[str, Any]:
        """Values of the method that hold for these tensors."""
        return dict(self.model_extra or {})

    @property
    def plain(self) -> bool:
        """Whether the rule says only what is merged, copied from the base or dropped."""
        return (
            not self.values and self.of is None and self.method is None and self.experts is None and self.base is None
        )

    def matches(self, name: str) -> bool:
        """Return whether the rule matches this tensor."""
        if self.layers is not None:
            layer = layer_of(name)
            if layer is None or not self.layers[0] <= layer <= self.layers[1]:
                return False
        if _is_expression(self.names):
            return search(self.names[1:-1], name)
        return fnmatch.fnmatchcase(name, self.names)


LEFT_OUT = "left out by select"


def _is_expression(names: str) -> bool:
    return len(names) > 1 and names.startswith("/") and names.endswith("/")


def check_rules(base: Iterable[str], rules: Sequence[SelectRule]) -> None:
    """Raise SpecError for a rule that matches none of these names, or names layers that they do not have.

    A rule that drops may match an expert's tensor alone.
    """
    for rule in rules:
        if rule.take != "drop" and not any(rule.matches(name) for name in base):
            raise SpecError(
                f"select: the rule {rule.model_dump(exclude_defaults=True)} matches no tensor of the base; its tensors "
                f"are named like {few(sorted(base))} (`mergeloom inspect` tells more of it)"
            )
    deepest = max(depths(base).values(), default=0)
    for rule in rules:
        if rule.take != "drop" and rule.layers is not None and rule.layers[1] >= deepest:
            raise SpecError(
                f"select: the rule {rule.model_dump(exclude_defaults=True)} names layers up to {rule.layers[1]}; the "
                f"base has layers 0 to {deepest - 1}"
            )


def left_out(name: str, rules: Sequence[SelectRule]) -> bool:
    """Return whether `select` drops the tensor, in the base or in an expert."""
    return bool(rules) and take(name, rules) == "drop"


def check_left_out(rules: Sequence[SelectRule], models: Sequence[Iterable[str]]) -> None:
    """Raise SpecError for a rule that drops nothing of any model: what it was to drop would be merged."""
    known = {name for names in models for name in names}
    for rule in rules:
        if rule.take == "drop" and not any(rule.matches(name) for name in known):
            raise SpecError(
                f"select: the rule {rule.model_dump(exclude_defaults=True)} drops no tensor of the base or of an "
                f"expert; they are named like {few(sorted(known))}"
            )


def take(name: str, rules: Sequence[SelectRule]) -> str:
    """Return what happens to a tensor: the `take` of the first rule that matches, 'copy' where none does.

    Without rules every tensor is merged.
    """
    if not rules:
        return "merge"
    return next((rule.take for rule in rules if rule.matches(name)), "copy")


def few(names: Sequence[str], count: int = 3) -> str:
    """Return the first `count` names, quoted, and how many more there are."""
    shown = ", ".join(f"'{name}'" for name in names[:count])
    return shown + (f" and {len(names) - count} more" if len(names) > count else "")
