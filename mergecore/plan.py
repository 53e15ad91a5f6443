"""From a spec to cells and from cells to steps: what every number needs, by key, before anything is done.

A cell is one model to be made and measured. Planning touches no weights: equal plans come from equal digests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from mergecore.adapters import ADAPTER, AdapterMethod, is_transposed, ranks_made
from mergecore.errors import MergeloomError, SpecError
from mergecore.evaluators import Evaluator, Split, TaskIdentity
from mergecore.identity import Step, canonical, digest
from mergecore.layout import Layout, SelectRule, lay_out
from mergecore.merging import stored_as
from mergecore.method import BEFORE, DataStatistic, Link, Method, Scope, Statistic, TensorInfo
from mergecore.methods.average import Average
from mergecore.parts import Portion, portions
from mergecore.pool import Member, Pool, snapshot_step
from mergecore.registry import evaluator_from
from mergecore.scores import Kind, Suite, values_label
from mergecore.snapshot import DTYPES, MERGED
from mergecore.spec import SAFETENSORS_DTYPE, Evaluate, Spec, size_in_bytes
from mergecore.variants import Variant

ENGINE = 1
"""Version of the arithmetic that all merges share (deltas in float32, one rounding); bumped when numbers change."""


@dataclass(frozen=True)
class StatisticPlan:
    """One statistic of some experts over a selection, or the adapter that a method makes of adapters.

    experts: ids in fold order; of a link, the newest alone.
    """

    step: Step
    statistic: Statistic | DataStatistic | Link | AdapterMethod
    experts: tuple[str, ...]
    selection: Mapping[str, TensorInfo]
    inputs: Mapping[str, tuple[StatisticPlan, ...]]
    tasks: tuple[str, ...] = ()
    base: str = ""
    """Id of the expert whose weights the changes are counted from; '' for the pool's base."""

    def with_inputs(self) -> Iterator[StatisticPlan]:
        """Everything that must be known for it, deepest first, itself last."""
        for plans in self.inputs.values():
            for plan in plans:
                yield from plan.with_inputs()
        yield self

    def missing(self, at_hand: Callable[[StatisticPlan], bool]) -> Iterator[StatisticPlan]:
        """What must be worked out to have it, deepest first, itself last; behind one that is at hand nobody looks."""
        if not at_hand(self):
            for plans in self.inputs.values():
                for plan in plans:
                    yield from plan.missing(at_hand)
            yield self

    def written(self) -> MergePlan:
        """A link of a chain as what it is to the engine: tensors made from tensors, written like a model's."""
        assert isinstance(self.statistic, Link)
        outputs = self.statistic.outputs(self.selection)
        layout = Layout(self.selection, {}, {})
        return MergePlan(self.step, self.statistic, self.experts, layout, outputs, self.inputs, bytes_of(outputs))


@dataclass(frozen=True)
class MergePlan:
    """One model: the method with its parameters in fold order, and what it must know beforehand.

    Where rules of `select` have tensors made in other ways, `parts` says how each of them comes about, `method` is the
    recipe's, and layout, outputs and statistics are those of all parts together.
    """

    step: Step
    method: Method | Link
    experts: tuple[str, ...]
    layout: Layout
    outputs: Mapping[str, TensorInfo]
    statistics: Mapping[str, tuple[StatisticPlan, ...]]
    size: int
    """Bytes of the written model."""
    base: str = ""
    """Id of the expert that stands for the base, from which copies come too; '' for the pool's base."""
    parts: tuple[MergePlan, ...] = ()

    @property
    def ways(self) -> tuple[MergePlan, ...]:
        """What is to be done: the parts, or this as a whole."""
        return self.parts or (self,)

    @property
    def product(self) -> Step:
        """The step whose result is published: the model, or the adapter that was only put onto the base to be measured."""
        return self.statistics[ADAPTER][0].step if isinstance(self.method, AdapterMethod) else self.step

    def missing(self, at_hand: Callable[[StatisticPlan], bool]) -> Iterator[StatisticPlan]:
        """What must still be worked out for it, what others need before them; some may be named twice."""
        for plans in self.statistics.values():
            for plan in plans:
                yield from plan.missing(at_hand)

    @cached_property
    def needed(self) -> tuple[StatisticPlan, ...]:
        """Everything that must be known for it, each once, what others need before them."""
        found = {
            one.step.key: one for plans in self.statistics.values() for plan in plans for one in plan.with_inputs()
        }
        return tuple(found.values())


@dataclass(frozen=True)
class Cell:
    """One model to be made and measured. `merge` is None where the model is a checkpoint as it stands.

    method: the label of its variant, under which it stands in tables and figures; '' for baselines.
    """

    id: str
    kind: Kind
    name: str
    method: str
    values: Mapping[str, Any]
    count: int
    subset: int
    experts: tuple[str, ...]
    model: Step
    merge: MergePlan | None
    member: Member | None
    tasks: tuple[str, ...]
    refused: str = ""
    loads: Mapping[str, str] = field(default_factory=dict)
    """Of a product: task → id of the expert whose model is loaded for it."""
    select: tuple[SelectRule, ...] = ()
    """Of a merge: what it merges and how, tensor by tensor."""

    @property
    def group(self) -> tuple[str, int, int]:
        """Cells of one group differ in their values only; one of them is chosen on validation items."""
        return (self.method if self.kind == "merge" else self.id, self.count, self.subset)


@dataclass(frozen=True)
class Plan:
    """Everything a sweep consists of."""

    spec: Spec
    pool: Pool
    suite: Suite
    cells: tuple[Cell, ...]
    evaluators: Mapping[Split, Evaluator]
    tasks: Mapping[Split, Mapping[str, TaskIdentity]]
    folder: Path | None
    _digests: dict[str, str] = field(default_factory=dict, compare=False, repr=False)
    _evaluations: dict[tuple[str, str, str], Step] = field(default_factory=dict, compare=False, repr=False)

    def evaluation(self, cell: Cell, split: Split, task: str) -> Step:
        """The step that scores a cell's model on one task."""
        place = (cell.id, split, task)
        if place not in self._evaluations:
            self._evaluations[place] = self._evaluation(cell, split, task)
        return self._evaluations[place]

    def _evaluation(self, cell: Cell, split: Split, task: str) -> Step:
        evaluator, identity = self.evaluators[split], self.tasks[split][task]
        known = f"{split}/{task}"
        if known not in self._digests:
            self._digests[known] = digest(dict(identity.identity))
            self._digests[split] = digest(evaluator.parameters())
        return Step(
            "evaluation",
            evaluator.name,
            evaluator.version,
            {"task": task, "identity": self._digests[known], "settings": self._digests[split]},
            {
                "model": cell.model.key,
                "companions": self.companions(cell).companions,
                **({"expert": cell.loads[task]} if cell.loads else {}),
            },
        )

    def companions(self, cell: Cell) -> Any:
        """The snapshot whose config and tokenizer go with the cell's model."""
        if cell.merge is None and cell.member is not None:
            return cell.member.snapshot
        return self.pool.base

    @property
    def splits(self) -> tuple[Split, ...]:
        """Validation first, where the spec has it."""
        return tuple(self.evaluators)

    @property
    def shard_size(self) -> int:
        """Bytes of a shard."""
        return size_in_bytes(self.spec.output.shard_size)


def make_plan(spec: Spec, pool: Pool, root: Path) -> Plan:
    """The plan of a sweep. `root`: what relative paths in the spec's `evaluate.path` start from.

    Raises SpecError and EvaluationError for what cannot be meant; a method whose values do not fit a count becomes a
    refused cell instead.
    """
    evaluate = spec.evaluate
    folder = root / evaluate.path if evaluate.path else None
    evaluators: dict[Split, Evaluator] = {}
    if evaluate.validation is not None:
        limits = {"limit": evaluate.validation.limit}
        evaluators["validation"] = _evaluator(evaluate, limits)
    evaluators["test"] = _evaluator(evaluate, {})
    suite = Suite(
        {category: tuple(tasks) for category, tasks in evaluate.held_in.items()},
        {category: tuple(tasks) for category, tasks in evaluate.held_out.items()},
        {expert.name: expert.tasks for expert in spec.experts},
    )
    names = list(
        dict.fromkeys(task for group in (suite.held_in, suite.held_out) for held in group.values() for task in held)
    )
    if not names:
        raise SpecError("evaluate: no task stands in held_in or held_out; a sweep needs something to measure")
    tasks = {split: evaluator.resolve(names, split, folder) for split, evaluator in evaluators.items()}
    planner = Planner(spec, pool, suite, evaluators["test"], tasks["test"], folder)
    return Plan(spec, pool, suite, tuple(planner.cells()), evaluators, tasks, folder)


def _evaluator(evaluate: Evaluate, changes: Mapping[str, Any]) -> Evaluator:
    return evaluator_from(evaluate.evaluator, {**evaluate.settings, **changes}, "evaluate", Evaluate.model_fields)


class Planner:
    """Builds merges and their statistics, each distinct one once."""

    def __init__(
        self,
        spec: Spec,
        pool: Pool,
        suite: Suite,
        evaluator: Evaluator,
        tasks: Mapping[str, TaskIdentity],
        folder: Path | None,
    ) -> None:
        self.spec, self.pool, self.suite = spec, pool, suite
        self.evaluator, self.tasks, self.folder = evaluator, tasks, folder
        self.builder = MergeBuilder(pool, (), spec.output.dtype, self._data)

    def _data(self, member: Member) -> dict[str, Any]:
        names = member.tasks or tuple(dict.fromkeys(task for held in self.suite.held_in.values() for task in held))
        training = self.evaluator.training_identity(names, self.folder)
        return {"tasks": list(names), "training": digest(training), "companions": self.pool.base.companions}

    def cells(self) -> Iterator[Cell]:
        """Baselines first, then every merge by count, subset and method."""
        everything = tuple(
            dict.fromkeys(t for g in (self.suite.held_in, self.suite.held_out) for h in g.values() for t in h)
        )
        base = snapshot_step(self.pool.base)
        yield Cell(base.key[:16], "base", "base", "", {}, 0, -1, (), base, None, None, everything)
        for member in self.pool.members:
            own = member.tasks if member.name in self.pool.experts else None
            tasks = everything if own is None else self._tasks_of([member.name])
            yield self._baseline(member, tasks)
        seen: set[str] = set()
        drawn: set[tuple[str, ...]] = set()
        for count in self.spec.counts:
            for subset in range(self.spec.subsets.per_count):
                chosen = self.draw(count, subset)
                if chosen in drawn:
                    continue  # the same experts, so the same cells
                drawn.add(chosen)
                for variant in self.spec.variants:
                    cell = self._cell(variant, count, subset, chosen)
                    if cell.id not in seen:
                        seen.add(cell.id)
                        yield cell

    def draw(self, count: int, subset: int) -> tuple[str, ...]:
        """The first `count` experts by hash(seed, subset, id), named in the order of the spec."""
        seed = self.spec.subsets.seed
        ranked = sorted(self.pool.experts.values(), key=lambda member: digest([seed, subset, member.id]))
        held = {member.name for member in ranked[:count]}
        return tuple(name for name in self.pool.experts if name in held)

    def _tasks_of(self, experts: Sequence[str]) -> tuple[str, ...]:
        own = {task for name in experts for task in self.pool.experts[name].tasks}
        held_in = [task for tasks in self.suite.held_in.values() for task in tasks if task in own]
        return tuple(dict.fromkeys([*held_in, *(task for tasks in self.suite.held_out.values() for task in tasks)]))

    def _baseline(self, member: Member, tasks: tuple[str, ...]) -> Cell:
        kind: Kind = "expert" if member.name in self.pool.experts else "multitask"
        experts = (member.name,) if kind == "expert" else ()
        if member.factors is None:
            step = snapshot_step(member.snapshot)
            return Cell(step.key[:16], kind, member.name, "", {}, len(experts), -1, experts, step, None, member, tasks)
        merge = self.builder.build(Average(), [member])
        key = digest(["baseline", merge.step.key])
        return Cell(key[:16], kind, member.name, "", {}, len(experts), -1, experts, merge.step, merge, member, tasks)

    def _cell(self, variant: Variant, count: int, subset: int, chosen: tuple[str, ...]) -> Cell:
        values = values_label(variant.values)
        name = f"{variant.label}({values}) n{count} s{subset}" if values else f"{variant.label} n{count} s{subset}"
        merge, refused, tasks, loads = None, "", self._tasks_of(chosen), dict[str, str]()
        try:
            members = [self.pool.experts[expert] for expert in chosen]
            merge = self.builder.build(variant.method, members, variant.select)
            model = merge.step
            if merge.method.makes == "masks":
                loads = self._loads(chosen)
                tasks = tuple(loads)
        except MergeloomError as error:
            model = Step("merge", variant.method.name, 0, variant.method.parameters(), {"experts": list(chosen)})
            refused, tasks = str(error), ()
        label, given = variant.label, dict(variant.values)
        return Cell(
            model.key[:16], "merge", name, label, given, count, subset, chosen, model, merge, None, tasks, refused, loads,
            variant.select,
        )  # fmt: skip

    def _loads(self, chosen: Sequence[str]) -> dict[str, str]:
        """A product has a model for the tasks of its own experts, and none for what no expert saw."""
        found: dict[str, str] = {}
        for member in sorted((self.pool.experts[name] for name in chosen), key=lambda member: member.id):
            for task in member.tasks:
                found.setdefault(task, member.id)
        if not found:
            raise SpecError(
                "a product of masks is measured on its experts' own tasks, and the spec names none for them"
            )
        return {task: found[task] for task in self._tasks_of(chosen) if task in found}


@dataclass(frozen=True)
class Laid:
    """A layout, the tensors that are written for it, the digest of their names, and how many bytes they are."""

    layout: Layout
    outputs: Mapping[str, TensorInfo]
    tensors: str
    size: int


def bytes_of(tensors: Mapping[str, TensorInfo]) -> int:
    """Bytes of so many tensors."""
    return sum(info.count * DTYPES[info.dtype].itemsize for info in tensors.values())


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
        return {name: stored_as(info, self.dtype or info.dtype) for name, info in tensors.items()}

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
