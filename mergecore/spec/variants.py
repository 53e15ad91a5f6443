"""The methods of a sweep with every combination of their grids, each with the rules that say which tensors it
merges.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from mergecore.checkpoints.select import SelectRule
from mergecore.errors import SpecError, nearest
from mergecore.identity.keys import digest
from mergecore.methods.average import Average
from mergecore.plugins.method import Method
from mergecore.plugins.values import explained
from mergecore.registry import METHODS, method_from

AVERAGE = Average()


@dataclass(frozen=True)
class Variant:
    """A method with its values and rules. Variants of one label are alternatives: validation items choose among them.

    values: what the spec gave the method, and under `select` what a grid inside a rule came to, by the rule's number.
    counts: numbers of experts it is merged with, its entry's own or the spec's.
    """

    method: Method
    label: str
    values: Mapping[str, Any]
    select: tuple[SelectRule, ...]
    counts: tuple[int, ...] = ()


def variants_of(
    entries: Sequence[Mapping[str, Any]],
    select: Sequence[Mapping[str, Any]],
    experts: Sequence[str],
    counts: Sequence[int],
) -> tuple[Variant, ...]:
    """Every entry of a spec's `methods` with every combination of its grids and of those in its rules; equal ones are
    one, and those that a search finds the values of (mergecore/spec/search_entry.py) are not among them.
    Average, by the rules of the spec, is always there.

    select, counts: for entries that have none of their own. experts: names that rules may name. Raises SpecError.
    """
    variants: dict[str, Variant] = {}
    plain: str | None = None
    for position, entry in enumerate(entries):
        if "search" in entry:
            continue
        for variant in of_entry(entry, select, experts, f"methods[{position}]"):
            key = _key(variant)
            if variant.method == AVERAGE and "select" not in entry:
                plain = key
            others = variants[key].counts if key in variants else ()
            variants[key] = replace(variants.get(key, variant), counts=_together(others, variant.counts or counts))
    if plain is not None:  # what others are compared with is there for every count of the spec
        variants[plain] = replace(variants[plain], counts=_together(counts, variants[plain].counts))
        return tuple(variants.values())
    averages = of_entry({"method": AVERAGE.name}, select, experts, "average")
    first = {_key(variant): replace(variant, counts=tuple(counts)) for variant in averages}
    return tuple((first | variants).values())


def _together(first: Sequence[int], second: Sequence[int]) -> tuple[int, ...]:
    """Numbers that stand in either, each once."""
    return tuple(dict.fromkeys([*first, *second]))


def _key(variant: Variant) -> str:
    """What tells variants apart."""
    rules = [rule.model_dump(mode="json") for rule in variant.select]
    return digest([variant.method.name, variant.method.parameters(), rules])


def of_entry(
    entry: Mapping[str, Any], select: Sequence[Mapping[str, Any]], experts: Sequence[str], where: str
) -> Iterator[Variant]:
    """One entry with every combination of its grids and of those in its rules, as for `variants_of`."""
    own, counts = "select" in entry, _counts_of(entry, len(experts), where)
    rules, ruled = (entry["select"], f"{where}.select") if own else (list(select), "select")
    methods = expanded({key: value for key, value in entry.items() if key not in ("select", "counts")}, where)
    for values, ruled_values in itertools.product(methods, expanded(rules, ruled)):
        if not isinstance(values, Mapping):
            raise SpecError(f"{where}: must be a mapping with a method and its values (given: {values!r:.60})")
        together = dict(values)
        name = str(together.pop("method", ""))
        plain = name + ("+drop" if together.get("drop") else "") + ("+select" if own else "")
        label = str(together.pop("label", "") or plain)
        method = method_from(name, together, where, ("method", "label", "select", "counts"))
        chosen = select_rules(ruled_values, ruled)
        for number, rule in enumerate(chosen):
            _check(rule, method, experts, f"{ruled}.{number}", own)
        yield Variant(method, label, together | gridded({"select": rules}, {"select": ruled_values}), chosen, counts)


def _counts_of(entry: Mapping[str, Any], most: int, where: str) -> tuple[int, ...]:
    """An entry's own numbers of experts, none where it has none. Raises SpecError."""
    if "counts" not in entry:
        return ()
    counts = entry["counts"]
    if not isinstance(counts, list | tuple) or not counts or not all(type(count) is int for count in counts):
        raise SpecError(f"{where}.counts: a list of numbers of experts is meant, as in counts: [2] (given: {counts!r})")
    for count in counts:
        if not 1 <= count <= most:
            raise SpecError(f"{where}.counts: {count} experts are asked for, the pool has {most}")
    return tuple(counts)


def _check(rule: SelectRule, method: Method, experts: Sequence[str], where: str, own: bool) -> None:
    """Raise SpecError for a rule that no merge of the sweep could follow. own: it stands below the method."""
    if rule.take == "drop":
        raise SpecError(
            f"{where}: a model that lacks tensors cannot be measured; 'take: drop' is for `mergeloom merge`"
        )
    if rule.values and rule.method is None and not own:
        key = next(iter(rule.values))
        raise SpecError(
            f"{where}: '{key}' is not a key of a rule; {nearest(key, SelectRule.model_fields)} Values of a method "
            "stand "
            "beside its name, or in a `select` of the method's own"
        )
    for expert in filter(None, (rule.of, rule.base, *(rule.experts or ()))):
        if expert not in experts:
            raise SpecError(f"{where}: the spec has no expert '{expert}'; {nearest(expert, experts)}")
    method_of(rule, method, where)


def select_rules(entries: Any, where: str) -> tuple[SelectRule, ...]:
    """Rules as YAML has them, checked. Raises SpecError."""
    if not isinstance(entries, list | tuple):
        raise SpecError(f"{where}: must be a list of rules, as in select: [{{names: '*mlp*'}}, {{take: copy}}]")
    rules = []
    for number, rule in enumerate(entries):
        try:
            rules.append(SelectRule.model_validate(rule))
        except ValidationError as error:
            raise SpecError(explained(error, SelectRule, f"{where}.{number}")) from None
    return tuple(rules)


def method_of(rule: SelectRule, method: Method, where: str) -> Method:
    """The method of a rule: the recipe's, the recipe's with other values, or another. Raises SpecError."""
    if rule.method is None and not rule.values:
        return method
    name = rule.method or method.name
    kind = METHODS.get(name)
    known = {*SelectRule.model_fields, *(kind.model_fields if kind else ())}
    strange = [key for key in rule.values if kind is not None and key not in known]
    if strange:
        raise SpecError("; ".join(f"{where}.{key}: unknown key; {nearest(key, known)}" for key in strange))
    values = method.model_dump(mode="json", exclude_unset=True) if rule.method is None else {}
    return method_from(name, {**values, **rule.values}, where, SelectRule.model_fields)


def expanded(value: Any, where: str) -> Iterator[Any]:
    """Every combination of the `{grid: [...]}` entries anywhere inside a value, in the order written.

    Raises SpecError, naming the place, for a grid that is no list or an empty one: it would quietly drop the method.
    """
    if isinstance(value, Mapping):
        if "grid" in value:
            choices = value["grid"]
            if set(value) != {"grid"} or not isinstance(choices, list | tuple) or not choices:
                raise SpecError(
                    f"{where}: a grid is a list of at least one value and nothing beside it: {{grid: [0.3, 0.5]}}"
                )
            for choice in choices:
                yield from expanded(choice, where)
            return
        keys = list(value)
        for combination in itertools.product(*(list(expanded(value[key], f"{where}.{key}")) for key in keys)):
            yield dict(zip(keys, combination, strict=True))
    elif isinstance(value, list | tuple):
        for combination in itertools.product(*(list(expanded(item, where)) for item in value)):
            yield list(combination)
    else:
        yield value


def gridded(written: Any, came: Any) -> dict[str, Any]:
    """Of something that was `expanded` only what its grids came to, nested by key, or by place in a list."""
    values_of: dict[str, Any] = {}
    if isinstance(written, Mapping) and "grid" not in written:
        pairs = [(key, value, came[key]) for key, value in written.items()]
    elif isinstance(written, list | tuple):
        pairs = [(str(number), value, came[number]) for number, value in enumerate(written)]
    else:
        return values_of
    for key, value, became in pairs:
        if isinstance(value, Mapping) and "grid" in value:
            values_of[key] = became
        elif inner := gridded(value, became):
            values_of[key] = inner
    return values_of
