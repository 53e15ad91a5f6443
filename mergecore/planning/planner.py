"""From a spec to cells and from cells to steps: what every number needs, by key, before anything is done.

A cell is one model to be made and measured. Planning touches no weights: equal plans come from equal digests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergecore.errors import MergeloomError, SpecError
from mergecore.identity.keys import Step, digest
from mergecore.methods.average import Average
from mergecore.planning.cells import Cell, Plan, PlannedSearch
from mergecore.planning.merge_builder import MergeBuilder
from mergecore.planning.pool import Member, Pool, snapshot_step
from mergecore.plugins.evaluator import Evaluator, Split, TaskIdentity
from mergecore.plugins.search import Candidate, Ground
from mergecore.registry import evaluator_from
from mergecore.reporting.scores import Kind, Suite, values_label
from mergecore.spec.search_entry import Searched
from mergecore.spec.sweep import Evaluate, Spec
from mergecore.spec.variants import Variant


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
    asked = {"test": names, "validation": deciding(spec, names)}
    tasks = {split: evaluator.resolve(asked[split], split, folder) for split, evaluator in evaluators.items()}
    planner = Planner(spec, pool, suite, evaluators["test"], tasks["test"], folder)
    cells = list(planner.cells())
    searches, refused = planner.searches()
    notes = leaks(evaluators, tasks, folder) if spec.searches else ()
    return Plan(
        spec, pool, suite, (*cells, *refused), evaluators, tasks, folder, searches, planner.candidate_cell, notes
    )  # fmt: skip


def deciding(spec: Spec, tasks: Sequence[str], searches: Sequence[Searched] | None = None) -> tuple[str, ...]:
    """Of these tasks those whose validation items decide something: the ones of the side that chooses grid values and the
    model to register, and what searches name or look at. searches: all of the spec's where none are given."""
    held_in, held_out = (
        {task for held in side.values() for task in held} for side in (spec.evaluate.held_in, spec.evaluate.held_out)
    )
    register = spec.output.register_
    wanted = set(held_out if register and register.by == "held_out" else held_in)
    for one in spec.searches if searches is None else searches:
        wanted.update(one.search.tasks, held_in if one.search.by_own_tasks else ())
    return tuple(task for task in tasks if task in wanted)


def leaks(
    evaluators: Mapping[Split, Evaluator], tasks: Mapping[Split, Mapping[str, TaskIdentity]], folder: Path | None
) -> tuple[str, ...]:
    """Tasks some of whose validation items are test items too, as sentences.

    Raises SpecError where all of them are: what a search has found on them would be reported on the same items.
    """
    found = []
    for name, validation in tasks["validation"].items():
        test = tasks["test"][name]
        chosen_on, reported_on = (evaluators[one.split].documents(one, folder) for one in (validation, test))
        same = {key: value for key, value in validation.identity.items() if key != "evaluator"} == {
            key: value for key, value in test.identity.items() if key != "evaluator"
        }
        if same or (chosen_on and reported_on and chosen_on <= reported_on):
            raise SpecError(
                f"task '{name}': its validation items are its test items, so that a search would be reported on what it "
                "was chosen by; give the task a validation split of its own"
            )
        if chosen_on and reported_on and (both := chosen_on & reported_on):
            found.append(f"task '{name}': {len(both)} of {len(chosen_on)} validation items are test items too")
    return tuple(found)


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
        self._candidates: dict[tuple[Any, Candidate], Cell] = {}

    def _data(self, member: Member) -> dict[str, Any]:
        names = member.tasks or tuple(dict.fromkeys(task for held in self.suite.held_in.values() for task in held))
        training = self.evaluator.training_identity(names, self.folder)
        return {"tasks": list(names), "training": digest(training), "companions": self.pool.base.companions}

    def cells(self) -> Iterator[Cell]:
        """Baselines first, then every merge by count, subset and method."""
        everything = tuple(
            dict.fromkeys(t for g in (self.suite.held_in, self.suite.held_out) for h in g.values() for t in h)
        )
        base = snapshot_step(self.pool.base.as_stored)
        deciding = self._deciding(everything)
        yield Cell(
            base.key[:16], "base", "base", "", {}, 0, -1, (), base, None, None, everything, deciding=deciding
        )  # fmt: skip
        for member in self.pool.members:
            own = member.tasks if member.name in self.pool.experts else None
            tasks = everything if own is None else self._tasks_of([member.name])
            yield self._baseline(member, tasks)
        seen: set[str] = set()
        variants = self.spec.variants
        for count, subset, chosen in self.drawn([*self.spec.counts, *(n for one in variants for n in one.counts)]):
            for variant in (one for one in variants if count in one.counts):
                cell = self._cell(variant, count, subset, chosen)
                if cell.id not in seen:
                    seen.add(cell.id)
                    yield cell

    def drawn(self, counts: Sequence[int]) -> Iterator[tuple[int, int, tuple[str, ...]]]:
        """Count, subset and experts of every drawing; of those with the same experts, and so the same cells, the first."""
        known: set[tuple[str, ...]] = set()
        for count in dict.fromkeys(counts):
            for subset in range(self.spec.subsets.per_count):
                chosen = self.draw(count, subset)
                if chosen not in known:
                    known.add(chosen)
                    yield count, subset, chosen

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
            step, merge = snapshot_step(member.snapshot.as_stored), None
            key = step.key
        else:
            merge = self.builder.build(Average(), [member])
            step, key = merge.step, digest(["baseline", merge.step.key])
        return Cell(
            key[:16], kind, member.name, "", {}, len(experts), -1, experts, step, merge, member, tasks,
            deciding=self._deciding(tasks),
        )  # fmt: skip

    def searches(self) -> tuple[tuple[PlannedSearch, ...], tuple[Cell, ...]]:
        """A search for each entry and drawing, and a refused cell where its experts cannot be searched over."""
        found, refused = [], []
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
                    found.append(planned)
                except MergeloomError as error:
                    model = Step("merge", entry.method, 0, {"search": planned.name}, {"experts": list(chosen)})
                    refused.append(
                        Cell(
                            model.key[:16], "merge", planned.name, entry.label, {}, count, subset, chosen, model, None, None,
                            (), str(error),
                        )
                    )  # fmt: skip
        return tuple(found), tuple(refused)

    def candidate_cell(self, planned: PlannedSearch, candidate: Candidate) -> Cell:
        """What a search asks for as a cell of its own, also where another cell has the same model."""
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
        """One merge. merged: the experts that it is of, where they are not all that were drawn."""
        merged = chosen if merged is None else merged
        values = values_label(variant.values) if merged == chosen else " + ".join(merged)
        name = f"{variant.label}({values}) n{count} s{subset}" if values else f"{variant.label} n{count} s{subset}"
        merge, refused, tasks, loads = None, "", self._tasks_of(chosen), dict[str, str]()
        try:
            members = [self.pool.experts[expert] for expert in merged]
            merge = self.builder.build(variant.method, members, variant.select)
            model = merge.step
            if merge.method.makes == "masks":
                loads = self._loads(merged)
                tasks = tuple(loads)
        except MergeloomError as error:
            model = Step("merge", variant.method.name, 0, variant.method.parameters(), {"experts": list(merged)})
            refused, tasks = str(error), ()
        return Cell(
            model.key[:16], "merge", name, variant.label, dict(variant.values), count, subset, chosen, model, merge, None,
            tasks, refused, loads, variant.select, None if merged == chosen else merged, self._deciding(tasks),
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
