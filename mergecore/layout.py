"""Which tensors a merge changes, which it copies and which it leaves out; names → layers; tied weights once."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mergecore.architectures import ALWAYS_TIED, BUFFER, HEAD_APART, TIED, layer_of
from mergecore.errors import MismatchError, SpecError, nearest
from mergecore.method import TensorInfo
from mergecore.snapshot import MERGED


class SelectRule(BaseModel):
    """One rule of `select`; of several rules the first that matches a tensor decides.

    Every key besides these is a value of the method, for the tensors the rule speaks of.
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
            try:
                re.compile(names[1:-1])
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
        return names

    @model_validator(mode="after")
    def _fit_together(self) -> SelectRule:
        given = [key for key in ("method", "experts", "base") if getattr(self, key) is not None] + list(self.values)
        if self.take != "merge" and given:
            unknown = given[0] not in SelectRule.model_fields
            hint = nearest(given[0], SelectRule.model_fields) if unknown else "leave one of them out"
            raise ValueError(f"'{given[0]}' says how to merge, 'take: {self.take}' not to; {hint}")
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
        """Whether the rule says no more than what is merged, what is copied from the base and what is left out."""
        return (
            not self.values and self.of is None and self.method is None and self.experts is None and self.base is None
        )

    def matches(self, name: str) -> bool:
        """Whether the rule speaks of this tensor."""
        if self.layers is not None:
            layer = layer_of(name)
            if layer is None or not self.layers[0] <= layer <= self.layers[1]:
                return False
        if _is_expression(self.names):
            return re.search(self.names[1:-1], name) is not None
        return fnmatch.fnmatchcase(name, self.names)


LEFT_OUT = "left out by select"
HEAD = 3
"""At most so many tensors that do not fit may be a task's head; more are another architecture."""


def _is_expression(names: str) -> bool:
    return len(names) > 1 and names.startswith("/") and names.endswith("/")


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


def check_rules(base: Iterable[str], rules: Sequence[SelectRule]) -> None:
    """Raise SpecError for a rule that matches none of these names; what is dropped may be an expert's alone."""
    for rule in rules:
        if rule.take != "drop" and not any(rule.matches(name) for name in base):
            raise SpecError(
                f"select: the rule {rule.model_dump(exclude_defaults=True)} matches no tensor of the base; its tensors "
                f"are named like {_few(sorted(base))} (`mergeloom inspect` tells more of it)"
            )


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


def left_out(name: str, rules: Sequence[SelectRule]) -> bool:
    """Whether `select` drops the tensor, wherever it stands."""
    return bool(rules) and _take(name, rules) == "drop"


def check_left_out(rules: Sequence[SelectRule], models: Sequence[Iterable[str]]) -> None:
    """Raise SpecError for a rule that drops nothing of any model: what it was to drop would be merged."""
    known = {name for names in models for name in names}
    for rule in rules:
        if rule.take == "drop" and not any(rule.matches(name) for name in known):
            raise SpecError(
                f"select: the rule {rule.model_dump(exclude_defaults=True)} drops no tensor of the base or of an expert; "
                f"they are named like {_few(sorted(known))}"
            )


def _take(name: str, rules: Sequence[SelectRule]) -> str:
    if not rules:
        return "merge"
    return next((rule.take for rule in rules if rule.matches(name)), "copy")


def _is_buffer(name: str, info: TensorInfo) -> bool:
    """GPT-2's attention mask is called attn.bias too; a bias that is a parameter has one dimension."""
    return BUFFER.search(name) is not None and (len(info.shape) != 1 or not name.endswith("bias"))


def check_fit(
    base: Mapping[str, TensorInfo],
    expert: Mapping[str, TensorInfo],
    where: str,
    config: Mapping[str, Any],
    rules: Sequence[SelectRule] = (),
) -> None:
    """Raise MismatchError where a full checkpoint's names or shapes are not those of the base, naming the first few.

    What the rules leave out of the result need not fit, nor what the base's configuration ties.
    """
    ignored = {name for _, name in _tied_pairs(config)}
    ignored |= {name for held in (base, expert) for name in held if left_out(name, rules)}
    ignored |= {name for held in (base, expert) for name in held if _is_buffer(name, held[name])}
    missing = sorted(set(base) - set(expert) - ignored)
    unknown = sorted(set(expert) - set(base) - ignored)
    if missing or unknown:
        said = [f"lacks {_few(missing)}"] * bool(missing) + [f"has {_few(unknown)}, unknown to the base"] * bool(
            unknown
        )
        hint = f"; {_without((missing + unknown)[0])}" if len(missing) + len(unknown) <= HEAD else ""
        raise MismatchError(f"{where} does not have the base's architecture: it {' and '.join(said)}{hint}")
    for name in sorted(base):
        if name in expert and name not in ignored and tuple(base[name].shape) != tuple(expert[name].shape):
            wide = re.search(r"embed|wte|lm_head|shared", name)
            hint = "the vocabularies differ: `tokenizer: union` brings them together" if wide else _without(name)
            raise MismatchError(
                f"{where}: '{name}' has shape {list(expert[name].shape)}, in the base {list(base[name].shape)}; {hint}"
            )
        if name in expert and base[name].dtype in MERGED and expert[name].dtype not in MERGED:
            raise MismatchError(
                f"{where}: '{name}' has dtype {expert[name].dtype}, in the base {base[name].dtype}: quantized values "
                "cannot be merged; give the checkpoint before it was quantized"
            )


def _without(name: str) -> str:
    """What may be done about a tensor that does not fit."""
    return f"a task's head may be left out of the result: select: [{{names: '{name}', take: drop}}, {{}}]"


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
