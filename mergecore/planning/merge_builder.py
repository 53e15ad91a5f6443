"""Builds merges: from a method and its experts to steps, layouts and keys. Works that several merges share are made
once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergecore.checkpoints.adapters import is_transposed
from mergecore.checkpoints.layout import Layout, lay_out
from mergecore.checkpoints.select import SelectRule
from mergecore.errors import SpecError
from mergecore.identity.keys import Step, canonical, digest
from mergecore.planning.parts import Portion, portions_of
from mergecore.planning.pool import Member, Pool
from mergecore.planning.work import AdapterWork, LinkWork, MergeWork, ModelWork, ScanWork, Way, Work, bytes_of
from mergecore.plugins.adapter_method import AdapterMethod, ranks_made
from mergecore.plugins.any_statistic import AnyStatistic
from mergecore.plugins.chain import BEFORE, Link
from mergecore.plugins.method import Method
from mergecore.plugins.model_statistic import ModelStatistic
from mergecore.plugins.statistic import Scope, Statistic
from mergecore.registry import product_of
from mergecore.tensors.dtypes import MERGED, SAFETENSORS_DTYPE
from mergecore.tensors.source import TensorInfo, stored_as

ENGINE = 1
"""Version of the arithmetic that all merges share (deltas in float32, one rounding); bumped when numbers change."""


Data = Callable[[Member, ModelStatistic], dict[str, Any]]
"""(expert, statistic) → its `tasks`, and what identifies the items that the statistic draws from."""


@dataclass(frozen=True)
class Laid:
    """A layout, the tensors that are written for it, the digest of their names, and their bytes."""

    layout: Layout
    outputs: Mapping[str, TensorInfo]
    tensors: str
    size: int


class MergeBuilder:
    """Turns (method, experts) into works. Layouts and statistics that several merges share are built once.

    select: the rules of merges that have none of their own. dtype: of the models, as people write it; None: each
    tensor's
    own. data: returns what identifies the data of an expert, for a statistic on models.
    """

    def __init__(self, pool: Pool, select: Sequence[SelectRule], dtype: str | None, data: Data) -> None:
        self.pool, self.select, self.data = pool, tuple(select), data
        self.dtype = SAFETENSORS_DTYPE[dtype] if dtype else None
        self.by_id = {member.id: member for member in pool.members}
        self._layouts: dict[tuple[tuple[SelectRule, ...], frozenset[str]], Laid] = {}
        self._laid: dict[tuple[tuple[SelectRule, ...], frozenset[str]], Laid] = {}
        self._works: dict[tuple[type, bytes, str, str], dict[tuple[str, ...], Work]] = {}
        self._links: dict[str, LinkWork] = {}
        self._wholes: dict[str, Mapping[str, TensorInfo]] = {}

    def build(
        self, method: Method, members: Sequence[Member], select: tuple[SelectRule, ...] | None = None
    ) -> MergeWork:
        """Return the merge of these experts by this method. Raise SpecError where the values do not fit."""
        select = self.select if select is None else select
        if not all(rule.plain for rule in select):
            return self._in_parts(method, members, select)
        method.validate_count(len(members))
        order = method.arranged([member.id for member in members])
        ids = tuple(members[position].id for position in order)
        bound = method.bound(order).fitted(self.pool.base.tensors)
        laid = self._layout(frozenset(ids), select)
        inputs = self.works_for(bound, Subject(ids, laid.layout.merged, laid.tensors))
        step = Step(
            "merge",
            bound.name,
            bound.revision(len(ids)),
            {"values": bound.parameters(), "dtype": self.dtype, "tensors": laid.tensors, "engine": ENGINE},
            {"base": self.pool.base.weights, "experts": list(ids), "statistics": keys_of(inputs)},
        )
        product, outputs, size = product_of(bound), laid.outputs, laid.size
        if (changed := bound.outputs(laid.layout.merged, len(ids))) is not laid.layout.merged:
            outputs = product.stored({**changed, **laid.layout.copied}, self.dtype)
            size = bytes_of(outputs)
        return MergeWork(step, ids, laid.layout.merged, inputs, "", bound, product, laid.layout, outputs, size)

    def _in_parts(self, method: Method, members: Sequence[Member], select: tuple[SelectRule, ...]) -> MergeWork:
        """Return a merge whose tensors are made in several ways, with one part for each way."""
        layout, portions = portions_of(self.pool, members, method, select)
        parts = tuple(self._part(portion) for portion in portions)
        ids = tuple(sorted({expert for part in parts for expert in (*part.experts, part.base) if expert}))
        step = Step(
            "merge",
            method.name,
            method.version,
            {"values": method.parameters(), "dtype": self.dtype, "engine": ENGINE},
            {"base": self.pool.base.weights, "experts": list(ids), "parts": sorted(part.step.key for part in parts)},
        )
        outputs = {name: info for part in parts for name, info in part.outputs.items()}
        inputs = {f"{number} {name}": works for number, part in enumerate(parts) for name, works in part.inputs.items()}
        product, size = product_of(method), bytes_of(outputs)
        return MergeWork(step, ids, layout.merged, inputs, "", method, product, layout, outputs, size, parts)

    def _part(self, portion: Portion) -> Way:
        rule, layout = portion.way, portion.layout
        base = rule.base.id if rule.base else ""
        order = rule.method.arranged([member.id for member in rule.experts])
        ids = tuple(rule.experts[position].id for position in order)
        bound = rule.method.bound(order).fitted(self.pool.base.tensors) if layout.merged else rule.method
        tensors = digest([sorted(layout.merged), sorted(layout.copied)])
        inputs = self.works_for(bound, Subject(ids, layout.merged, tensors, base)) if layout.merged else {}
        step = Step(
            "part",
            bound.name,
            bound.revision(len(ids)),
            {"values": bound.parameters(), "dtype": self.dtype, "tensors": tensors, "engine": ENGINE},
            {"base": base or self.pool.base.weights, "experts": list(ids), "statistics": keys_of(inputs)},
        )
        outputs = stored_as({**bound.outputs(layout.merged, len(ids)), **layout.copied}, self.dtype)
        return Way(step, bound, ids, layout, outputs, inputs, base)

    def _layout(self, ids: frozenset[str], select: tuple[SelectRule, ...]) -> Laid:
        """Return the layout of the tensors that these experts carry. Experts that carry the same tensors share a
        layout.
        """
        if (select, ids) not in self._laid:
            union = frozenset[str]().union(*(self.by_id[expert].carried() for expert in ids))
            if (select, union) not in self._layouts:
                layout = lay_out(self.pool.base.tensors, self.pool.base.config, [union], select)
                outputs = stored_as({**layout.merged, **layout.copied}, self.dtype)
                tensors = digest([sorted(layout.merged), sorted(layout.copied)])
                self._layouts[select, union] = Laid(layout, outputs, tensors, bytes_of(outputs))
            self._laid[select, ids] = self._layouts[select, union]
        return self._laid[select, ids]

    # --- what must be known beforehand ------------------------------------------------------------------------------

    def works_for(self, owner: Method | AnyStatistic, subject: Subject) -> dict[str, tuple[Work, ...]]:
        """Return the works whose results `owner` is handed, by the name it knows them under."""
        wrap = Wrap(self, subject)
        return {name: statistic.visit(wrap) for name, statistic in owner.statistics().items()}

    def known(self, statistic: AnyStatistic, subject: Subject) -> dict[tuple[str, ...], Work]:
        """Return the works of this statistic so far, by expert ids. Whoever asks for the same gets the same work."""
        # By what enters its key, not by equality: 0.0 equals -0.0 and is another key.
        alike = (type(statistic), canonical(statistic.parameters()), subject.tensors, subject.base)
        return self._works.setdefault(alike, {})

    def link(self, work: LinkWork) -> LinkWork:
        """Return the one work of this link. Chains that begin alike share their beginning."""
        return self._links.setdefault(work.step.key, work)

    def whole(self, expert: str) -> Mapping[str, TensorInfo]:
        """Return every tensor that the expert can change, whatever is selected. All selections share its profile."""
        if expert not in self._wholes:
            layout = lay_out(self.pool.base.tensors, self.pool.base.config, [self.by_id[expert].carried()], ())
            self._wholes[expert] = {name: info for name, info in layout.merged.items() if info.dtype in MERGED}
        return self._wholes[expert]


@dataclass(frozen=True)
class Subject:
    """What a method or statistic works on.

    experts: ids in fold order. tensors: the digest of the selection's names. base: id of the expert whose weights the
    changes are counted from; '' for the pool's base.
    """

    experts: tuple[str, ...]
    selection: Mapping[str, TensorInfo]
    tensors: str
    base: str = ""


@dataclass(frozen=True)
class Wrap:
    """Wraps each kind of statistic into its works. The planner looks at kinds here and nowhere else."""

    builder: MergeBuilder
    subject: Subject

    @property
    def _base(self) -> str:
        return self.subject.base or self.builder.pool.base.weights

    def streamed(self, statistic: Statistic) -> tuple[Work, ...]:
        """Return a scan of each expert, or one of all of them."""
        ids, works = self.subject.experts, []
        shared = self.builder.known(statistic, self.subject)
        groups = [ids] if statistic.scope is Scope.POOL else [(expert,) for expert in ids]
        for position, group in enumerate(groups):
            own = statistic.of_expert(position)
            known = shared if own is statistic else self.builder.known(own, self.subject)
            if group not in known:
                known[group] = self._scan(own, group)
            works.append(known[group])
        return tuple(works)

    def _scan(self, statistic: Statistic, ids: tuple[str, ...]) -> ScanWork:
        inputs: dict[str, Any] = {"base": self._base, "experts": list(ids)}
        selection = self.subject.selection
        if statistic.whole:
            selection = self.builder.whole(ids[0])
        else:
            inputs["tensors"] = self.subject.tensors
        known = self.builder.works_for(statistic, replace(self.subject, experts=ids, selection=selection))
        step = _statistic_step(statistic, {**inputs, "statistics": keys_of(known)})
        return ScanWork(step, ids, selection, known, self.subject.base, statistic)

    def on_models(self, statistic: ModelStatistic) -> tuple[Work, ...]:
        """Return a run of each expert on its items, or one of all of them."""
        ids, known = self.subject.experts, self.builder.known(statistic, self.subject)
        groups = [ids] if statistic.scope is Scope.POOL else [(expert,) for expert in ids]
        for group in groups:
            if group not in known:
                known[group] = self._run(statistic, group)
        return tuple(known[group] for group in groups)

    def _run(self, statistic: ModelStatistic, ids: tuple[str, ...]) -> ModelWork:
        data = [self.builder.data(self.builder.by_id[expert], statistic) for expert in ids]
        inputs: dict[str, Any] = {"base": self._base, "experts": list(ids), "tensors": self.subject.tensors}
        inputs["data"] = data if statistic.scope is Scope.POOL else data[0]
        known = self.builder.works_for(statistic, replace(self.subject, experts=ids))
        if known:
            inputs["statistics"] = keys_of(known)
        step, tasks = _statistic_step(statistic, inputs), tuple(tuple(own["tasks"]) for own in data)
        return ModelWork(
            step, ids, self.subject.selection, known, self.subject.base, statistic, tasks, self.builder.pool.base.config
        )

    def chained(self, link: Link) -> tuple[Work, ...]:
        """Return the last link of a chain over the experts, in their order.

        The key of a link holds its own expert, the link before it, and the selected tensors that the experts so far
        carry. It
        holds nothing of the experts to come, so that chains which begin alike share their beginning.
        """
        carried: set[str] = set()
        before: tuple[LinkWork, ...] = ()
        for expert in self.subject.experts:
            carried |= self.builder.by_id[expert].carried()
            # An expert all of whose tensors `select` leaves out still stands in the chain, with a delta of zero.
            own = {name: info for name, info in self.subject.selection.items() if name in carried}
            selection = own or self.subject.selection
            inputs = {
                "base": self.builder.pool.base.weights,
                "experts": [expert],
                "tensors": digest(sorted(selection)),
                "statistics": keys_of({BEFORE: before}),
            }
            work = LinkWork(_statistic_step(link, inputs), (expert,), selection, {BEFORE: before}, "", link)
            before = (self.builder.link(work),)
        return before

    def adapter(self, method: AdapterMethod) -> tuple[Work, ...]:
        """Return the adapter made of these experts. Raise SpecError where an expert is none, or a value does not
        fit.
        """
        members = [self.builder.by_id[expert] for expert in self.subject.experts]
        for member in members:
            if member.factors is None:
                raise SpecError(
                    f"method '{method.name}' merges adapters, and expert '{member.name}' is a full checkpoint; take an "
                    "adapter from it first: `mergeloom extract-lora`"
                )
        pool, selection = self.builder.pool, self.subject.selection
        experts = [member.adapter(Path(), pool.base.tensors) for member in members]
        is_transposed(experts)
        ranks_made(method, experts, selection)
        ids = self.subject.experts
        inputs = {"base": pool.base.weights, "experts": list(ids), "tensors": digest(sorted(selection))}
        parameters = {"values": method.parameters(), "engine": ENGINE}
        step = Step("adapter", method.name, method.revision(len(ids)), parameters, inputs)
        return (AdapterWork(step, ids, selection, {}, "", method),)


def _statistic_step(statistic: AnyStatistic, inputs: Mapping[str, Any]) -> Step:
    parameters = {"values": statistic.parameters(), "engine": ENGINE}
    return Step("statistic", statistic.name, statistic.revision(len(inputs["experts"])), parameters, dict(inputs))


def keys_of(inputs: Mapping[str, tuple[Work, ...]]) -> dict[str, list[str]]:
    """Return the keys of works, by the name under which each is handed on."""
    return {name: [work.step.key for work in works] for name, works in inputs.items()}
