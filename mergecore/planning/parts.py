"""A model made in several ways: which rule of `select` makes which tensors, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergecore.checkpoints.layout import Layout, is_weight, tied_names
from mergecore.checkpoints.select import LEFT_OUT, SelectRule, check_rules, left_out
from mergecore.errors import SpecError, nearest
from mergecore.identity.keys import digest
from mergecore.methods.average import Average
from mergecore.planning.pool import Member, Pool
from mergecore.plugins.method import Method
from mergecore.registry import product_of
from mergecore.spec.variants import method_of

COPY = Average()
"""Stands where nothing is merged; it is never called."""


@dataclass(frozen=True)
class TensorRule:
    """How tensors are made: `method` merges `experts`; without experts they are copied.

    base: the member that they are copied from, or whose weights changes are counted from; None for the pool's base.
    """

    method: Method
    experts: tuple[Member, ...]
    base: Member | None = None

    @property
    def key(self) -> str:
        """A digest that is equal for rules that give the same numbers, so that their tensors are one selection."""
        base = self.base.id if self.base else None
        return digest([self.method.name, self.method.parameters(), [member.id for member in self.experts], base])

    def carries(self, name: str) -> bool:
        """Return whether the files of an expert hold the tensor."""
        return any(name in member.carried() for member in self.experts)


@dataclass(frozen=True)
class Portion:
    """The tensors of a model that one rule makes."""

    way: TensorRule
    layout: Layout


def rule_of(rule: SelectRule, method: Method, members: Mapping[str, Member], where: str) -> TensorRule:
    """Return how the tensors of a rule are made in a merge of `members` by `method`. Raise SpecError naming the
    rule.
    """
    if rule.take == "drop":
        return TensorRule(COPY, ())
    if rule.take == "copy":
        chosen = _member(rule.of, members, f"{where}.of") if rule.of else None
        if chosen is not None and chosen.factors is not None:
            return TensorRule(
                COPY, (chosen,)
            )  # an adapter is no model yet: the average of one expert folds it into the base
        return TensorRule(COPY, (), chosen)
    experts = tuple(_member(name, members, f"{where}.experts") for name in rule.experts or members)
    base = _member(rule.base, members, f"{where}.base") if rule.base else None
    if base is not None and base.factors is not None:
        raise SpecError(f"{where}.base: '{base.name}' is an adapter; changes are counted from a full checkpoint")
    chosen_method = method_of(rule, method, where)
    _check_makes(chosen_method, where)
    if base is not None and any(statistic.chained for statistic in chosen_method.statistics().values()):
        raise SpecError(
            f"{where}.base: '{chosen_method.name}' goes on from what it made of the base before; leave it out"
        )
    chosen_method.validate_count(len(experts))
    return TensorRule(chosen_method, experts, base)


def _check_makes(method: Method, where: str) -> None:
    """Raise SpecError for a method that gives no dense model: it cannot make single tensors."""
    product = product_of(method)
    if not product.by_tensor:
        raise SpecError(f"{where}: '{method.name}' makes {product.noun}, which no single tensors can be made by")


def _member(name: str, members: Mapping[str, Member], where: str) -> Member:
    if name not in members:
        raise SpecError(f"{where}: no expert of this merge is called '{name}'; {nearest(name, members)}")
    return members[name]


def portions_of(
    pool: Pool, members: Sequence[Member], method: Method, rules: Sequence[SelectRule]
) -> tuple[Layout, tuple[Portion, ...]]:
    """Return the layout of the whole model, and one portion for each way that makes tensors.

    Tensors that no rule matches are copied from the base. So is what a rule cannot merge: integers, buffers, and
    tensors
    that none of its experts carries. Raise SpecError for rules that contradict each other or match nothing.
    """
    base = pool.base.tensors
    check_rules(base, rules)
    _check_makes(method, "select")
    by_name = {member.name: member for member in members}
    ways = [rule_of(rule, method, by_name, f"select.{number}") for number, rule in enumerate(rules)]
    dropped = {name: f"tied to '{owner}'" for name, owner in tied_names(base, pool.base.config).items() if name in base}
    dropped |= {name: LEFT_OUT for name in base if name not in dropped and left_out(name, rules)}
    by_rule: dict[str, tuple[TensorRule, list[str], list[str]]] = {}
    for name in sorted(set(base) - set(dropped)):
        position = next((number for number, rule in enumerate(rules) if rule.matches(name)), None)
        way = TensorRule(COPY, ()) if position is None else ways[position]
        merged = way.carries(name) and is_weight(name, base[name])
        if not merged and way.base is not None and name not in way.base.snapshot.tensors:
            way = TensorRule(COPY, ())  # a buffer that this checkpoint was saved without
        _, mine, copied = by_rule.setdefault(way.key, (way, [], []))
        (mine if merged else copied).append(name)
    portions = tuple(
        Portion(way, Layout({name: base[name] for name in mine}, {name: base[name] for name in copied}, {}))
        for way, mine, copied in by_rule.values()
    )
    if not any(portion.layout.merged or portion.way.base for portion in portions):
        raise SpecError("select leaves no tensor to merge or to copy from an expert: the result would be the base")
    joined_merged = {name: base[name] for portion in portions for name in portion.layout.merged}
    joined_copied = {name: base[name] for portion in portions for name in portion.layout.copied}
    return Layout(joined_merged, joined_copied, dropped), portions
