"""An entry of a spec's methods whose values or experts a search finds: `{method: average, search: {by: greedy}}`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergecore.errors import SpecError, nearest
from mergecore.plugins.search import Candidate, Search
from mergecore.registry import METHODS, search_from
from mergecore.spec.variants import Variant, of_entry


@dataclass(frozen=True)
class Searched:
    """An entry of a spec's methods and the search for what it leaves open. The label is one of its own in a spec.

    entry: method, label, values and rules, without the search. select, experts: as for `variants.variants_of`.
    """

    search: Search
    entry: Mapping[str, Any]
    select: Sequence[Mapping[str, Any]]
    experts: Sequence[str]
    where: str

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.entry["method"])

    @property
    def label(self) -> str:
        """What stands in tables and figures."""
        return str(self.entry["label"])

    def variant(self, candidate: Candidate) -> Variant:
        """The entry as a candidate has it. Raises SpecError."""
        (variant,) = of_entry(overlaid(self.entry, dict(candidate.values)), self.select, self.experts, self.where)
        return variant


def searched_from(
    entry: Mapping[str, Any], select: Sequence[Mapping[str, Any]], experts: Sequence[str], where: str
) -> Searched:
    """The entry, with the ends of everything that is searched tried on the method. Raises SpecError naming the
    place.
    """
    values = {key: value for key, value in entry.items() if key != "search"}
    name, asked = str(entry.get("method") or ""), entry["search"]
    if not isinstance(asked, Mapping):
        raise SpecError(f"{where}.search: write how it is searched, as in search: {{by: greedy}} (given: {asked!r})")
    if _has_grid(values) or _has_grid(asked) or ("select" not in entry and _has_grid(select)):
        raise SpecError(
            f"{where}: a grid and a search do not stand in one entry (nor a grid in rules that it takes from the "
            "spec); "
            "list the values under search: {by: grid, over: [{parameter: scale, values: [0.3, 0.5]}]}"
        )
    if "counts" in entry:
        raise SpecError(f"{where}.counts: an entry with a search is searched for every count of the spec; leave it out")
    by = str(asked.get("by") or "")
    search = search_from(by, {key: value for key, value in asked.items() if key != "by"}, f"{where}.search")
    searched = Searched(
        search, {**values, "method": name, "label": entry.get("label") or f"{name}+{by}"}, select, experts, where
    )
    for trial in search.trials():
        _check_places(searched, trial)
        searched.variant(Candidate((), tuple(trial.items())))
    return searched


def _check_places(entry: Searched, trial: Mapping[str, Any]) -> None:
    """Raise SpecError for a parameter that the method does not have, or that the entry gives a value already."""
    kind = METHODS.get(entry.method)
    for path in trial:
        first, *rest = path.split(".")
        if kind is not None and first not in kind.model_fields:
            raise SpecError(f"{entry.where}.search.over: '{path}' is no parameter of {entry.method}; "
                            f"{nearest(first, kind.model_fields)}")  # fmt: skip
        inner: Any = entry.entry
        for part in (first, *rest):
            inner = inner.get(part) if isinstance(inner, Mapping) else None
        if inner is not None:
            raise SpecError(
                f"{entry.where}: '{path}' has the value {inner!r} and is searched as well; leave one of them out"
            )


def overlaid(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Values with others set at their paths: {'drop': {'seed': 0}} and {'drop.rate': 0.5} → {'drop': {'seed': 0,
    'rate': 0.5}}.
    """
    merged_values = dict(values)
    for path, value in changes.items():
        first, _, rest = path.partition(".")
        if rest:
            inner = merged_values.get(first)
            merged_values[first] = overlaid(inner if isinstance(inner, Mapping) else {}, {rest: value})
        else:
            merged_values[first] = list(value) if isinstance(value, tuple) else value
    return merged_values


def _has_grid(value: Any) -> bool:
    if isinstance(value, Mapping):
        return set(value) == {"grid"} or any(map(_has_grid, value.values()))
    return isinstance(value, list | tuple) and any(map(_has_grid, value))
