"""A model made in several ways: which tensors each rule of `select` has merged how, or copied from whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergecore.checkpoints.layout import Layout, is_weight, tied_names
from mergecore.checkpoints.select import LEFT_OUT, SelectRule, check_rules, left_out
from mergecore.errors import SpecError, nearest
from mergecore.identity.keys import digest
from mergecore.methods.average import Average
from mergecore.planning.pool import Member, Pool
from mergecore.plugins.chain import Link
from mergecore.plugins.method import Method
from mergecore.spec.variants import method_of

COPY = Average()
"""Stands where nothing is merged; it is never called."""


@dataclass(frozen=True)
class Way:
    """How tensors come about: `method` merges `experts`, none of them: a copy. base: a member; None for the pool's base."""

    method: Method
    experts: tuple[Member, ...]
    base: Member | None = None

    @property
    def key(self) -> str:
        """Equal for ways that give the same numbers, so that their tensors are one selection."""
        base = self.base.id if self.base else None
        return digest([self.method.name, self.method.parameters(), [member.id for member in self.experts], base])

    def carries(self, name: str) -> bool:
        """Whether the files of an expert hold the tensor."""
        return any(name in member.carried() for member in self.experts)


@dataclass(frozen=True)
class Portion:
    """The tensors of a model that come about in one way."""

    way: Way
    layout: Layout


def way_of(rule: SelectRule, method: Method, members: Mapping[str, Member], where: str) -> Way:
    """How the tensors of a rule come about in a merge of `members` by `method`. Raises SpecError naming the rule."""
    if rule.take == "drop":
        return Way(COPY, ())
    if rule.take == "copy":
        chosen = _member(rule.of, members, f"{where}.of") if rule.of else None
        if chosen is not None and chosen.factors is not None:
            return Way(COPY, (chosen,))  # an adapter is no model yet: the average of one expert folds it into the base
        return Way(COPY, (), chosen)
    experts = tuple(_member(name, members, f"{where}.experts") for name in rule.experts or members)
    base = _member(rule.base, members, f"{where}.base") if rule.base else None
    if base is not None and base.factors is not None:
        raise SpecError(f"{where}.base: '{base.name}' is an adapter; changes are counted from a full checkpoint")
    chosen_method = method_of(rule, method, where)
    _check_makes(chosen_method, where)
    if base is not None and any(isinstance(one, Link) for one in chosen_method.statistics().values()):
        raise SpecError(
            f"{where}.base: '{chosen_method.name}' goes on from what it made of the base before; leave it out"
        )
    chosen_method.validate_count(len(experts))
    return Way(chosen_method, experts, base)


def _check_makes(method: Method, where: str) -> None:
    """Raise SpecError for a method whose result is no model: no single tensors can be made by it."""
    if method.makes != "model":
        what = "an adapter" if method.makes == "adapter" else "a product of masks"
        raise SpecError(f"{where}: '{method.name}' makes {what}, which no single tensors can be made by")


def _member(name: str, members: Mapping[str, Member], where: str) -> Member:
    if name not in members:
        raise SpecError(f"{where}: no expert of this merge is called '{name}'; {nearest(name, members)}")
    return members[name]


def portions(
    pool: Pool, members: Sequence[Member], method: Method, rules: Sequence[SelectRule]
) -> tuple[Layout, tuple[Portion, ...]]:
    """The layout of the whole model, and its portions, one for each way that has tensors.

    Tensors that no rule matches are copied from the base, and so is what a way cannot merge: integers, buffers, and what
    no expert of it carries. Raises SpecError for rules that cannot be meant.
    """
    base = pool.base.tensors
    check_rules(base, rules)
    _check_makes(method, "select")
    by_name = {member.name: member for member in members}
    ways = [way_of(rule, method, by_name, f"select.{number}") for number, rule in enumerate(rules)]
    dropped = {name: f"tied to '{owner}'" for name, owner in tied_names(base, pool.base.config).items() if name in base}
    dropped |= {name: LEFT_OUT for name in base if name not in dropped and left_out(name, rules)}
    held: dict[str, tuple[Way, list[str], list[str]]] = {}
    for name in sorted(set(base) - set(dropped)):
        position = next((number for number, rule in enumerate(rules) if rule.matches(name)), None)
        way = Way(COPY, ()) if position is None else ways[position]
        merged = way.carries(name) and is_weight(name, base[name])
        if not merged and way.base is not None and name not in way.base.snapshot.tensors:
            way = Way(COPY, ())  # a buffer that this checkpoint was saved without
        _, mine, copied = held.setdefault(way.key, (way, [], []))
        (mine if merged else copied).append(name)
    found = tuple(
        Portion(way, Layout({name: base[name] for name in mine}, {name: base[name] for name in copied}, {}))
        for way, mine, copied in held.values()
    )
    if not any(one.layout.merged or one.way.base for one in found):
        raise SpecError("select leaves no tensor to merge or to copy from an expert: the result would be the base")
    joined_merged = {name: base[name] for one in found for name in one.layout.merged}
    joined_copied = {name: base[name] for one in found for name in one.layout.copied}
    return Layout(joined_merged, joined_copied, dropped), found
