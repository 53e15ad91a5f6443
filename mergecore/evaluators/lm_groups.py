"""Groups and tags of lm-eval: names that stand for several tasks, local ones and lm-eval's own."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from mergecore.errors import EvaluationError
from mergecore.evaluators.lm_tasks import TaskFile, own_index, read_yaml

_GROUP_KEYS = frozenset({"group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag"})
"""Keys of a group that change no number of its tasks."""


@functools.cache
def _own_tags() -> Mapping[str, tuple[str, ...]]:
    """lm-eval's own tags with their tasks: 6.5 s, so only for a name that the folder does not have."""
    from lm_eval.tasks import TaskManager

    index = TaskManager(include_defaults=True).task_index
    return {name: tuple(sorted(entry.tags)) for name, entry in index.items() if entry.kind.name == "TAG"}


def tasks_of(name: str, local: Mapping[str, TaskFile]) -> tuple[str, ...]:
    """Return the tasks that a name stands for, each once: those of a group or tag, nested ones too, else itself.

    Raises EvaluationError for a group that changes settings of its tasks, or is part of itself.
    """
    return tuple(dict.fromkeys(_members(name, local, ())))


def _members(name: str, local: Mapping[str, TaskFile], above: tuple[str, ...]) -> Iterator[str]:
    if name in above:
        raise EvaluationError(f"the group '{name}' is part of itself ({' → '.join((*above, name))})")
    if name in local:
        config = local[name].config
        yield from _entries(name, config, local, above) if "group" in config else (name,)
        return
    if tagged := [task for task, file in local.items() if name in _tags(file.config)]:
        yield from tagged
        return
    kind, path = own_index().get(name, ("", None))
    if kind == "TAG":
        yield from _own_tags()[name]
    elif kind == "GROUP" and path is not None:
        yield from _entries(name, read_yaml(path), local, above)
    else:
        yield name


def _entries(
    name: str, group: Mapping[str, Any], local: Mapping[str, TaskFile], above: tuple[str, ...]
) -> Iterator[str]:
    tasks = group.get("task") or []
    for entry in [tasks] if isinstance(tasks, str) else tasks:
        if isinstance(entry, str):
            yield from _members(entry, local, (*above, name))
        elif isinstance(entry, Mapping) and set(entry) <= _GROUP_KEYS and "group" in entry:
            yield from _entries(str(entry["group"]), entry, local, (*above, name))
        elif isinstance(entry, Mapping) and set(entry) == {"task"} and isinstance(entry["task"], str):
            yield from _members(entry["task"], local, (*above, name))
        else:
            task = entry.get("task", entry) if isinstance(entry, Mapping) else entry
            raise EvaluationError(
                f"the group '{name}' changes settings of its task {task!r}; write these into a task file of its own, "
                "and name that"
            )


def _tags(config: Mapping[str, Any]) -> tuple[str, ...]:
    tags = config.get("tag") or ()
    return (tags,) if isinstance(tags, str) else tuple(tags)
