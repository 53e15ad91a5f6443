"""Names in a spec that stand for several tasks, replaced by these before anything is planned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mergecore.registry import evaluator_from
from mergecore.spec.sweep import Evaluate, Spec, parse_spec


def ungrouped(spec: Spec, root: Path) -> Spec:
    """Return the spec with the tasks of groups and tags in the place of their names.

    root: the folder that `evaluate.path` starts from. Raises SpecError and EvaluationError.
    """
    evaluate = spec.evaluate
    evaluator = evaluator_from(evaluate.evaluator, evaluate.settings, "evaluate", Evaluate.model_fields)
    sides = (evaluate.held_in, evaluate.held_out)
    names = list(dict.fromkeys(task for side in sides for tasks in side.values() for task in tasks))
    members = evaluator.members(names, root / evaluate.path if evaluate.path else None)
    if all(members[name] == (name,) for name in names):
        return spec

    def several(tasks: Iterable[str]) -> list[str]:
        return list(dict.fromkeys(task for name in tasks for task in members.get(name, (name,))))

    def by_task(values: Mapping[str, Any]) -> dict[str, Any]:
        spread = {task: value for name, value in values.items() for task in members.get(name, (name,))}
        return spread | {name: value for name, value in values.items() if name in spread}

    document = spec.model_dump(mode="json", exclude_defaults=True, by_alias=True)
    part = document["evaluate"]
    for side in ("held_in", "held_out"):
        part[side] = {category: several(tasks) for category, tasks in part.get(side, {}).items()}
    for key in ("chance", "primary"):
        if isinstance(part.get(key), Mapping):
            part[key] = by_task(part[key])
    for entry in document["experts"]:
        if "tasks" in entry:
            entry["tasks"] = several(entry["tasks"])
    for method in document["methods"]:
        if isinstance(search := method.get("search"), dict) and "tasks" in search:
            search["tasks"] = several(search["tasks"])
    return parse_spec(document, spec.name)
