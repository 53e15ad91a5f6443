"""From a method and its experts to steps: layouts, keys, and what must be known beforehand, each distinct one once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergecore.checkpoints.adapters import is_transposed
from mergecore.checkpoints.layout import Layout, lay_out
from mergecore.checkpoints.select import SelectRule
from mergecore.errors import SpecError
from mergecore.identity.keys import Step, canonical, digest
from mergecore.planning.parts import Portion, portions
from mergecore.planning.plans import MergePlan, StatisticPlan, bytes_of
from mergecore.planning.pool import Member, Pool
from mergecore.plugins.adapter_method import ADAPTER, AdapterMethod, ranks_made
from mergecore.plugins.chain import BEFORE, Link
from mergecore.plugins.method import Method
from mergecore.plugins.statistic import DataStatistic, Scope, Statistic
from mergecore.tensors.dtypes import MERGED, SAFETENSORS_DTYPE
from mergecore.tensors.source import TensorInfo

ENGINE = 1
"""Version of the arithmetic that all merges share (deltas in float32, one rounding); bumped when numbers change."""


@dataclass(frozen=True)
class Laid:
    """A layout, the tensors that are written for it, the digest of their names, and how many bytes they are."""

    layout: Layout
    outputs: Mapping[str, TensorInfo]
    tensors: str
    size: int


class MergeBuilder:
    """Turns (method, experts) into steps; layouts and statistics that several merges share are built once.

    select: rules that hold for merges that are given none of their own. data: for a statistic that needs data, what
    identifies the data it sees for an expert.
    """

    def __init__(self, pool: Pool, select: Sequence[SelectRule], dtype: str | None, data: Any) -> None:
        self.pool, self.select, self.data = pool, tuple(select), data
        self.dtype = SAFETENSORS_DTYPE[dtype] if dtype else None
        self.by_id = {member.id: member for member in pool.members}
        self._layouts: dict[tuple[tuple[SelectRule, ...], frozenset[str]], Laid] = {}
        self._laid: dict[tuple[tuple[SelectRule, ...], frozenset[str]], Laid] = {}
        self._statistics: dict[tuple[type, bytes, str, str], dict[tuple[str, ...], StatisticPlan]] = {}
        self._links: dict[str, StatisticPlan] = {}
        self._wholes: dict[str, Mapping[str, TensorInfo]] = {}

    def build(
        self, method: Method, members: Sequence[Member], select: tuple[SelectRule, ...] | None = None
    ) -> MergePlan:
        """The merge of these experts by this method. Raises SpecError where the values do not fit."""
        select = self.select if select is None else select
        if not all(rule.plain for rule in select):
            return self._in_parts(method, members, select)
        method.validate_count(len(members))
        order = method.arranged([member.id for member in members])
        ids = tuple(members[position].id for position in order)
        bound = method.bound(order).fitted(self.pool.base.tensors)
        laid = self._layout(frozenset(ids), select)
        statistics: Mapping[str, tuple[StatisticPlan, ...]]
        if isinstance(bound, AdapterMethod):
            statistics = {ADAPTER: (self._adapter(bound, [self.by_id[one] for one in ids], laid.layout.merged),)}
        else:
            statistics = self._statistics_of(bound, ids, laid.layout.merged, laid.tensors)
        step = Step(
            "merge",
            bound.name,
            bound.version,
            {"values": bound.parameters(), "dtype": self.dtype, "tensors": laid.tensors, "engine": ENGINE},
            {
                "base": self.pool.base.weights,
                "experts": list(ids),
                "statistics": {name: [plan.step.key for plan in plans] for name, plans in statistics.items()},
            },
        )
        outputs, size = laid.outputs, laid.size
        if (changed := bound.outputs(laid.layout.merged, len(ids))) is not laid.layout.merged:
            held = {**changed, **laid.layout.copied}
            outputs = self._outputs(held) if bound.makes != "masks" else held
            size = bytes_of(outputs)
        return MergePlan(step, bound, ids, laid.layout, outputs, statistics, size)

    def _in_parts(self, method: Method, members: Sequence[Member], select: tuple[SelectRule, ...]) -> MergePlan:
        """The merge whose tensors come about in several ways: one part for each."""
        layout, found = portions(self.pool, members, method, select)
        parts = tuple(self._part(portion) for portion in found)
        ids = tuple(sorted({one for part in parts for one in (*part.experts, part.base) if one}))
        step = Step(
            "merge",
            method.name,
            method.version,
            {"values": method.parameters(), "dtype": self.dtype, "engine": ENGINE},
            {"base": self.pool.base.weights, "experts": list(ids), "parts": sorted(part.step.key for part in parts)},
        )
        outputs = {name: info for part in parts for name, info in part.outputs.items()}
        statistics = {
            f"{number} {name}": plans for number, part in enumerate(parts) for name, plans in part.statistics.items()
        }
        return MergePlan(step, method, ids, layout, outputs, statistics, bytes_of(outputs), parts=parts)

    def _part(self, portion: Portion) -> MergePlan:
        way, layout = portion.way, portion.layout
        base = way.base.id if way.base else ""
        order = way.method.arranged([member.id for member in way.experts])
        ids = tuple(way.experts[position].id for position in order)
        bound = way.method.bound(order).fitted(self.pool.base.tensors) if layout.merged else way.method
        tensors = digest([sorted(layout.merged), sorted(layout.copied)])
        statistics = self._statistics_of(bound, ids, layout.merged, tensors, base) if layout.merged else {}
        step = Step(
            "part",
            bound.name,
            bound.version,
            {"values": bound.parameters(), "dtype": self.dtype, "tensors": tensors, "engine": ENGINE},
            {
                "base": base or self.pool.base.weights,
                "experts": list(ids),
                "statistics": {name: [plan.step.key for plan in plans] for name, plans in statistics.items()},
            },
        )
        outputs = self._outputs({**bound.outputs(layout.merged, len(ids)), **layout.copied})
        return MergePlan(step, bound, ids, layout, outputs, statistics, bytes_of(outputs), base)

    def _outputs(self, tensors: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
        return {name: info.stored_as(self.dtype or info.dtype) for name, info in tensors.items()}

    def _layout(self, ids: frozenset[str], select: tuple[SelectRule, ...]) -> Laid:
        """What these experts carry between them, laid out; whoever carries the same shares it."""
        if (select, ids) not in self._laid:
            union = frozenset[str]().union(*(self.by_id[one].carried() for one in ids))
            if (select, union) not in self._layouts:
                layout = lay_out(self.pool.base.tensors, self.pool.base.config, [union], select)
                outputs = self._outputs({**layout.merged, **layout.copied})
                tensors = digest([sorted(layout.merged), sorted(layout.copied)])
                self._layouts[select, union] = Laid(layout, outputs, tensors, bytes_of(outputs))
            self._laid[select, ids] = self._layouts[select, union]
        return self._laid[select, ids]

    def _statistics_of(
        self,
        owner: Method | Statistic,
        ids: tuple[str, ...],
        selection: Mapping[str, TensorInfo],
        tensors: str,
        base: str = "",
    ) -> dict[str, tuple[StatisticPlan, ...]]:
        found: dict[str, tuple[StatisticPlan, ...]] = {}
        for name, statistic in owner.statistics().items():
            if isinstance(statistic, Link):
                found[name] = (self._chain(statistic, ids, selection),)
                continue
            groups = [(one,) for one in ids] if statistic.scope is Scope.EXPERT else [ids]
            shared = self._known(statistic, tensors, base)
            plans = []
            for number, group in enumerate(groups):
                kind = statistic.of_expert(number) if isinstance(statistic, Statistic) else statistic
                known = shared if kind is statistic else self._known(kind, tensors, base)
                if group not in known:
                    known[group] = self._statistic(kind, group, selection, tensors, base)
                plans.append(known[group])
            found[name] = tuple(plans)
        return found

    def _known(
        self, statistic: Statistic | DataStatistic, tensors: str, base: str
    ) -> dict[tuple[str, ...], StatisticPlan]:
        """Plans of this statistic so far, by its experts."""
        # By what enters its key, not by equality: 0.0 equals -0.0 and is another key.
        return self._statistics.setdefault((type(statistic), canonical(statistic.parameters()), tensors, base), {})

    def _statistic(
        self,
        statistic: Statistic | DataStatistic,
        ids: tuple[str, ...],
        selection: Mapping[str, TensorInfo],
        tensors: str,
        base: str,
    ) -> StatisticPlan:
        inner: dict[str, tuple[StatisticPlan, ...]] = {}
        inputs: dict[str, Any] = {"base": base or self.pool.base.weights, "experts": list(ids)}
        tasks: tuple[str, ...] = ()
        if isinstance(statistic, Statistic) and statistic.whole:
            selection = self._whole(ids[0])
        else:
            inputs["tensors"] = tensors
        if isinstance(statistic, DataStatistic):
            inputs["data"] = self.data(self.by_id[ids[0]])
            tasks = tuple(inputs["data"]["tasks"])
        else:
            inner = self._statistics_of(statistic, ids, selection, tensors, base)
            inputs["statistics"] = {name: [plan.step.key for plan in plans] for name, plans in inner.items()}
        parameters = {"values": statistic.parameters(), "engine": ENGINE}
        step = Step("statistic", statistic.name, statistic.version, parameters, inputs)
        return StatisticPlan(step, statistic, ids, selection, inner, tasks, base)

    def _chain(self, statistic: Link, ids: tuple[str, ...], selection: Mapping[str, TensorInfo]) -> StatisticPlan:
        """The last link of a chain over these experts, in this order.

        A link's key holds its own expert, the link before it and the selected tensors that the experts so far carry:
        nothing of those to come, so that chains which begin alike share their beginning.
        """
        carried: set[str] = set()
        before: tuple[StatisticPlan, ...] = ()
        for one in ids:
            carried |= self.by_id[one].carried()
            # An expert all of whose tensors `select` leaves out still stands in the chain, with a delta of zero.
            held = {name: info for name, info in selection.items() if name in carried} or selection
            inputs = {
                "base": self.pool.base.weights,
                "experts": [one],
                "tensors": digest(sorted(held)),
                "statistics": {BEFORE: [plan.step.key for plan in before]},
            }
            parameters = {"values": statistic.parameters(), "engine": ENGINE}
            step = Step("statistic", statistic.name, statistic.version, parameters, inputs)
            plan = StatisticPlan(step, statistic, (one,), held, {BEFORE: before})
            before = (self._links.setdefault(step.key, plan),)
        return before[0]

    def _adapter(
        self, method: AdapterMethod, members: Sequence[Member], selection: Mapping[str, TensorInfo]
    ) -> StatisticPlan:
        """The adapter made of these. Raises SpecError where one is none, and where a value does not fit their ranks."""
        for member in members:
            if member.factors is None:
                raise SpecError(
                    f"method '{method.name}' merges adapters, and expert '{member.name}' is a full checkpoint; take an "
                    "adapter from it first: `mergeloom extract-lora`"
                )
        experts = [member.adapter(Path(), self.pool.base.tensors) for member in members]
        is_transposed(experts)
        ranks_made(method, experts, selection)
        ids = tuple(member.id for member in members)
        inputs = {"base": self.pool.base.weights, "experts": list(ids), "tensors": digest(sorted(selection))}
        parameters = {"values": method.parameters(), "engine": ENGINE}
        step = Step("adapter", method.name, method.version, parameters, inputs)
        return StatisticPlan(step, method, ids, selection, {})

    def _whole(self, expert: str) -> Mapping[str, TensorInfo]:
        """Every tensor the expert can change, whatever is selected: profiles are shared by all selections."""
        if expert not in self._wholes:
            layout = lay_out(self.pool.base.tensors, self.pool.base.config, [self.by_id[expert].carried()], ())
            self._wholes[expert] = {name: info for name, info in layout.merged.items() if info.dtype in MERGED}
        return self._wholes[expert]
