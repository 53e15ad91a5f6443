"""Plans a sweep: from the spec to cells, and from cells to steps with their keys. Planning reads no weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergecore.checkpoints.snapshot import Snapshot
from mergecore.checkpoints.vocabulary.tokenizer import template_of
from mergecore.errors import EvaluationError, MergeloomError, SpecError
from mergecore.identity.keys import Step, digest
from mergecore.methods.average import Average
from mergecore.planning.cells import Cell, Plan, PlannedSearch
from mergecore.planning.data import Apart, ExpertData
from mergecore.planning.merge_builder import MergeBuilder
from mergecore.planning.pool import Member, Pool, snapshot_step
from mergecore.plugins.evaluator import Evaluator, Split, TaskIdentity
from mergecore.plugins.own_code import OwnCode, code_of
from mergecore.plugins.search import Candidate, Ground
from mergecore.registry import evaluator_from
from mergecore.reporting.scores import Kind, Suite, values_label
from mergecore.spec.search_entry import Searched
from mergecore.spec.sweep import Evaluate, Spec
from mergecore.spec.variants import Variant


def make_plan(spec: Spec, pool: Pool, root: Path, home: Path | None = None) -> Plan:
    """Return the plan of a sweep. root: the folder that relative paths in `evaluate.path` start from. home: the spec's
    own folder, from which a user's modules are imported.

    Raise SpecError and EvaluationError for what the spec cannot mean. A method whose values do not fit a count becomes
    a
    refused cell.
    """
    evaluate = spec.evaluate
    folder = root / evaluate.path if evaluate.path else None
    evaluators: dict[Split, Evaluator] = {}
    if evaluate.validation is not None:
        limits = {"limit": evaluate.validation.limit}
        evaluators["validation"] = _evaluator(evaluate, limits)
    evaluators["test"] = _evaluator(evaluate, {})
    code = code_of(type(evaluators["test"]), evaluators["test"].factories, home, evaluate.version)
    if reason := unscorable(evaluators["test"], pool.base):
        where = f"the base ({pool.base.source.uri})"
        raise EvaluationError(f"merges go with config and tokenizer of {where} and cannot be scored: {reason}")
    suite = Suite(
        {category: tuple(tasks) for category, tasks in evaluate.held_in.items()},
        {category: tuple(tasks) for category, tasks in evaluate.held_out.items()},
        {expert.name: expert.tasks for expert in spec.experts},
    )
    names = list(suite.tasks)
    if not names:
        raise SpecError("evaluate: no task stands in held_in or held_out; a sweep needs something to measure")
    asked = {"test": names, "validation": deciding(spec, names)}
    tasks = {split: evaluator.resolve(asked[split], split, folder) for split, evaluator in evaluators.items()}
    planner = Planner(spec, pool, suite, evaluators["test"], tasks["test"], folder, code)
    cells = list(planner.cells())
    searches, refused = planner.searches()
    notes = leaks(evaluators, tasks, folder) if spec.searches else ()
    return Plan(
        spec, pool, suite, (*cells, *refused), evaluators, tasks, folder, searches, planner.candidate_cell, notes,
        code,
    )  # fmt: skip


def unscorable(evaluator: Evaluator, snapshot: Snapshot) -> str:
    """Return why models with a checkpoint's companions cannot be scored; '' where they can."""
    try:
        evaluator.check(snapshot.config, snapshot.source.files, template_of(snapshot))
    except EvaluationError as error:
        return str(error)
    return ""


def deciding(spec: Spec, tasks: Sequence[str], searches: Sequence[Searched] | None = None) -> tuple[str, ...]:
    """Return those of the tasks whose validation items decide something.

    They are the tasks of the side that chooses grid values and the model to register, and those that a search names or
    looks at. searches: all searches of the spec where None.
    """
    held_in, held_out = (
        {task for names in side.values() for task in names} for side in (spec.evaluate.held_in, spec.evaluate.held_out)
    )
    register = spec.output.register_
    wanted = set(held_out if register and register.by == "held_out" else held_in)
    for entry in spec.searches if searches is None else searches:
        wanted.update(entry.search.tasks, held_in if entry.search.by_own_tasks else ())
    return tuple(task for task in tasks if task in wanted)


def leaks(
    evaluators: Mapping[Split, Evaluator], tasks: Mapping[Split, Mapping[str, TaskIdentity]], folder: Path | None
) -> tuple[str, ...]:
    """Return one sentence for each task some of whose validation items are test items too.

    Raise SpecError where all of them are: the search would be reported on the items that it chose by.
    """
    notes = []
    for name, validation in tasks["validation"].items():
        test = tasks["test"][name]
        chosen_on, reported_on = (
            evaluators[identity.split].documents(identity, folder) for identity in (validation, test)
        )
        same = {key: value for key, value in validation.identity.items() if key != "evaluator"} == {
            key: value for key, value in test.identity.items() if key != "evaluator"
        }
        if same or (chosen_on and reported_on and chosen_on <= reported_on):
            raise SpecError(
                f"task '{name}': its validation items are its test items, so that a search would be reported on what "
                f"it "
                "was chosen by; give the task a validation split of its own"
            )
        if chosen_on and reported_on and (both := chosen_on & reported_on):
            notes.append(f"task '{name}': {len(both)} of {len(chosen_on)} validation items are test items too")
    return tuple(notes)


def _evaluator(evaluate: Evaluate, changes: Mapping[str, Any]) -> Evaluator:
    return evaluator_from(evaluate.evaluator, {**evaluate.settings, **changes}, "evaluate", Evaluate.model_fields)


class Planner:
    """Plans the cells of a sweep. Each distinct merge and statistic is planned once."""

    def __init__(
        self,
        spec: Spec,
        pool: Pool,
        suite: Suite,
        evaluator: Evaluator,
        tasks: Mapping[str, TaskIdentity],
        folder: Path | None,
        code: OwnCode,
    ) -> None:
        self.spec, self.pool, self.suite = spec, pool, suite
        self.evaluator, self.tasks, self.folder = evaluator, tasks, folder
        held_in = tuple(dict.fromkeys(task for own in suite.held_in.values() for task in own))
        self.apart = Apart(evaluator, folder, tasks)
        data = ExpertData(evaluator, folder, pool.base.companions, held_in, code)
        self.builder = MergeBuilder(pool, (), spec.output.dtype, data)
        self._candidates: dict[tuple[Any, Candidate], Cell] = {}

    def cells(self) -> Iterator[Cell]:
        """Yield the baselines, then every merge by count, subset and method."""
        base = snapshot_step(self.pool.base.as_stored)
        refused = self._unscorable(self.pool.base.as_stored)
        tasks = () if refused else self.suite.tasks
        yield Cell(
            id=base.key[:16],
            kind="base",
            name="base",
            model=base,
            tasks=tasks,
            refused=refused,
            deciding=self._deciding(tasks),
        )
        for member in self.pool.members:
            own = member.tasks if member.name in self.pool.experts else None
            tasks = self.suite.tasks if own is None else self._tasks_of([member.name])
            yield self._baseline(member, tasks)
        seen: set[str] = set()
        variants = self.spec.variants
        for count, subset, chosen in self.drawn(
            [*self.spec.counts, *(n for variant in variants for n in variant.counts)]
        ):
            for variant in (variant for variant in variants if count in variant.counts):
                cell = self._cell(variant, count, subset, chosen)
                if cell.id not in seen:
                    seen.add(cell.id)
                    yield cell

    def _unscorable(self, snapshot: Snapshot) -> str:
        """Return why a checkpoint cannot be scored as it stands. Companions that are the base's were checked."""
        checked = snapshot.companions == self.pool.base.companions
        return "" if checked else unscorable(self.evaluator, snapshot)

    def drawn(self, counts: Sequence[int]) -> Iterator[tuple[int, int, tuple[str, ...]]]:
        """Yield count, subset and experts of every drawing. Of drawings with the same experts only the first is
        yielded.
        """
        known: set[tuple[str, ...]] = set()
        for count in dict.fromkeys(counts):
            for subset in range(self.spec.subsets.per_count):
                chosen = self.draw(count, subset)
                if chosen not in known:
                    known.add(chosen)
                    yield count, subset, chosen

    def draw(self, count: int, subset: int) -> tuple[str, ...]:
        """Return the first `count` experts by hash(seed, subset, id), in the order of the spec."""
        seed = self.spec.subsets.seed
        ranked = sorted(self.pool.experts.values(), key=lambda member: digest([seed, subset, member.id]))
        drawn = {member.name for member in ranked[:count]}
        return tuple(name for name in self.pool.experts if name in drawn)

    def _tasks_of(self, experts: Sequence[str]) -> tuple[str, ...]:
        own = {task for name in experts for task in self.pool.experts[name].tasks}
        held_in = [task for tasks in self.suite.held_in.values() for task in tasks if task in own]
        return tuple(dict.fromkeys([*held_in, *(task for tasks in self.suite.held_out.values() for task in tasks)]))

    def _baseline(self, member: Member, tasks: tuple[str, ...]) -> Cell:
        kind: Kind = "expert" if member.name in self.pool.experts else "multitask"
        experts = (member.name,) if kind == "expert" else ()
        if member.factors is None:
            step, merge = snapshot_step(member.snapshot.as_stored), None
            key, refused = step.key, self._unscorable(member.snapshot.as_stored)
        else:
            merge = self.builder.build(Average(), [member])
            step, key, refused = merge.step, digest(["baseline", merge.step.key]), ""
        tasks = () if refused else tasks
        return Cell(
            id=key[:16],
            kind=kind,
            name=member.name,
            count=len(experts),
            experts=experts,
            model=step,
            merge=merge,
            member=member,
            tasks=tasks,
            refused=refused,
            deciding=self._deciding(tasks),
        )

    def searches(self) -> tuple[tuple[PlannedSearch, ...], tuple[Cell, ...]]:
        """Return a search for each entry and drawing, and a refused cell where a search does not fit its experts."""
        planned_searches, refused = [], []
        for count, subset, chosen in self.drawn(self.spec.counts):
            members = {name: self.pool.experts[name] for name in chosen}
            own = {name: member.tasks for name, member in members.items()}
            ground = Ground({name: member.id for name, member in members.items()}, own)
            for entry in self.spec.searches:
                planned = PlannedSearch(entry, ground, count, subset)
                try:
                    entry.search.check(ground)
                    if not self._deciding(self._tasks_of(chosen), entry):
                        raise SpecError("none of the tasks that decide is measured for these experts; name their tasks")
                    planned_searches.append(planned)
                except MergeloomError as error:
                    model = Step("merge", entry.method, 0, {"search": planned.name}, {"experts": list(chosen)})
                    refused.append(
                        Cell(
                            id=model.key[:16],
                            kind="merge",
                            name=planned.name,
                            model=model,
                            method=entry.label,
                            count=count,
                            subset=subset,
                            experts=chosen,
                            refused=str(error),
                        )
                    )
        return tuple(planned_searches), tuple(refused)

    def candidate_cell(self, planned: PlannedSearch, candidate: Candidate) -> Cell:
        """Return the cell of what a search asks for. It is a cell of its own, also where another cell has the same
        model.
        """
        place = (planned.group, candidate)
        if place not in self._candidates:
            cell = self._cell(
                planned.entry.variant(candidate),
                planned.count,
                planned.subset,
                planned.ground.experts,
                candidate.experts,
            )
            key = digest(["search", *planned.group, cell.model.key])
            self._candidates[place] = replace(cell, id=key[:16], deciding=self._deciding(cell.tasks, planned.entry))
        return self._candidates[place]

    def _deciding(self, tasks: Sequence[str], *searches: Searched) -> tuple[str, ...]:
        return deciding(self.spec, tasks, searches)

    def _cell(
        self, variant: Variant, count: int, subset: int, chosen: tuple[str, ...], merged: tuple[str, ...] | None = None
    ) -> Cell:
        """Return the cell of one merge. merged: the experts that are merged, where these are not all that were
        drawn.
        """
        merged = chosen if merged is None else merged
        values = values_label(variant.values) if merged == chosen else " + ".join(merged)
        name = f"{variant.label}({values}) n{count} s{subset}" if values else f"{variant.label} n{count} s{subset}"
        merge, refused, tasks, loads = None, "", self._tasks_of(chosen), dict[str, str]()
        try:
            members = [self.pool.experts[expert] for expert in merged]
            merge = self.builder.build(variant.method, members, variant.select)
            model = merge.step
            if experts := merge.product.loads(
                {member.id: member.tasks for member in sorted(members, key=lambda member: member.id)}
            ):
                loads = {task: experts[task] for task in tasks if task in experts}
                tasks = tuple(loads)
            self.apart.check(merge, tasks)
        except MergeloomError as error:
            model = Step("merge", variant.method.name, 0, variant.method.parameters(), {"experts": list(merged)})
            refused, tasks = str(error), ()
        return Cell(
            id=model.key[:16],
            kind="merge",
            name=name,
            model=model,
            method=variant.label,
            values=dict(variant.values),
            count=count,
            subset=subset,
            experts=chosen,
            merge=merge,
            tasks=tasks,
            refused=refused,
            loads=loads,
            select=variant.select,
            merged=None if merged == chosen else merged,
            deciding=self._deciding(tasks),
        )
