"""Merging in memory: mappings in, a mapping out, the same numbers as the pipeline writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mergecore.arithmetic.linear_algebra import squared_norm
from mergecore.checkpoints.experts import Expert, FullExpert
from mergecore.checkpoints.fit import check_fit
from mergecore.checkpoints.layout import lay_out
from mergecore.checkpoints.select import SelectRule, check_left_out
from mergecore.engine.executor import InProcess
from mergecore.engine.pass_plan import MergeJob, PassPlan, StatisticJob, coarsest, plan_spans
from mergecore.engine.run_pass import run_pass
from mergecore.errors import SpecError
from mergecore.events import Report, silent
from mergecore.native.library import Library
from mergecore.plugins.adapter_method import AdapterMethod
from mergecore.plugins.chain import BEFORE, Link
from mergecore.plugins.method import Method
from mergecore.plugins.statistic import DataStatistic, Found, Scope, Statistic, Statistics
from mergecore.tensors.memory import MemoryTensors
from mergecore.tensors.sinks import MemorySink
from mergecore.tensors.source import TensorInfo
from mergecore.tensors.torch_dtypes import DTYPE_NAMES


def merge(
    method: Method,
    *,
    base: Mapping[str, Tensor] | None = None,
    experts: Sequence[Mapping[str, Tensor]],
    ids: Sequence[str] | None = None,
    statistics: Mapping[str, Sequence[Mapping[str, Tensor]]] | None = None,
    select: Sequence[SelectRule] = (),
    dtype: torch.dtype | None = None,
    report: Report = silent,
    library: Library | None = None,
) -> dict[str, Tensor]:
    """Merge `experts` (and `base`) by `method`; the result has the base's names, shapes and, unless `dtype` says
    otherwise, dtypes.

    base may be left out where the method does not need it; tensors that are not merged are then the first expert's.
    ids: the experts' ids; given, experts are folded by ascending id as the pipeline does, else in list order. A random
    drop demands them. statistics: what the method cannot work out from weights alone (Fisher), one mapping per expert.
    Raises SpecError, MismatchError and NonFiniteError.
    """
    _check(method, base, experts, ids)
    if not all(rule.plain for rule in select):
        raise SpecError("select: rules with a method, values or whom to copy from are for recipes (`mergeloom merge`)")
    threads = torch.get_num_threads()
    try:
        return _merged(method, base, experts, ids, statistics, select, dtype, report, library)
    finally:
        torch.set_num_threads(threads)  # the engine works with one; whoever called has a setting of their own


def _merged(
    method: Method,
    base: Mapping[str, Tensor] | None,
    experts: Sequence[Mapping[str, Tensor]],
    ids: Sequence[str] | None,
    statistics: Mapping[str, Sequence[Mapping[str, Tensor]]] | None,
    select: Sequence[SelectRule],
    dtype: torch.dtype | None,
    report: Report,
    library: Library | None,
) -> dict[str, Tensor]:
    first = base if base is not None else experts[0]
    shapes = MemoryTensors(first)
    for position, expert in enumerate(experts):
        check_fit(shapes.tensors, MemoryTensors(expert).tensors, f"expert {position}", {}, select)
    check_left_out(select, [first, *experts])
    layout = lay_out(shapes.tensors, {}, [tuple(expert) for expert in experts], select)
    order = method.arranged([""] * len(experts) if ids is None else ids)
    named = [str(position) for position in order] if ids is None else [ids[position] for position in order]
    pool = tuple(
        FullExpert(name, f"{position}", MemoryTensors(experts[position]))
        for name, position in zip(named, order, strict=True)
    )
    given = {name: [values[position] for position in order] for name, values in (statistics or {}).items()}
    bound = method.bound(order).fitted(shapes.tensors)
    found = find_statistics(bound, shapes, pool, layout.merged, given, report, library)
    outputs = {**bound.outputs(layout.merged, len(pool)), **layout.copied}
    if dtype is not None and bound.makes != "masks":
        outputs = {name: info.stored_as(DTYPE_NAMES[dtype]) for name, info in outputs.items()}
    sink = MemorySink(outputs)
    shown = tuple(range(len(pool))) if bound.needs_experts else ()
    job = MergeJob("merge", bound, shown, frozenset(layout.merged), outputs, found, sink)
    spans = plan_spans({**layout.merged, **layout.copied}, bound.per)
    run_pass(PassPlan(shapes, pool, (job,), (), spans, library=library), InProcess(), report)
    return {name: sink.held[name] for name in first if name in sink.held} | sink.held


def _check(
    method: Method,
    base: Mapping[str, Tensor] | None,
    experts: Sequence[Mapping[str, Tensor]],
    ids: Sequence[str] | None,
) -> None:
    if not experts:
        raise SpecError("no experts given: a merge needs at least one")
    method.validate_count(len(experts))
    if isinstance(method, AdapterMethod):
        raise SpecError(
            f"method '{method.name}' makes an adapter of adapters, which are folders: give a recipe of them to "
            "`mergeloom merge`, or to mergecore.recipes.merge_recipe.merge_recipe"
        )
    if base is None and method.needs_base:
        raise SpecError(f"method '{method.name}' works on task vectors; give the base they start from")
    if ids is not None and (len(ids) != len(experts) or len(set(ids)) != len(ids)):
        raise SpecError(f"ids: give one distinct id for each of the {len(experts)} experts")
    if ids is None and method.needs_ids:
        raise SpecError("a random drop depends on who the experts are: give `ids`, one string per expert")


def find_statistics(
    method: Method | Statistic,
    base: MemoryTensors,
    pool: Sequence[Expert],
    selection: Mapping[str, TensorInfo],
    given: Mapping[str, Sequence[Mapping[str, Tensor]]],
    report: Report,
    library: Library | None = None,
) -> Statistics:
    """Everything `method` must know beforehand, worked out depth first from models in memory, or as given."""
    found: dict[str, Sequence[Found]] = {}
    for name, statistic in method.statistics().items():
        if name in given:
            found[name] = [_given(values, selection) for values in given[name]]
        elif isinstance(statistic, DataStatistic):
            raise SpecError(
                f"method '{method.name}' needs '{name}', which takes data: give statistics={{'{name}': "
                "[one mapping per expert]}, or run it from a spec with tasks"
            )
        elif isinstance(statistic, Link):
            found[name] = [_chained(statistic, base, pool, selection, report)]
        else:
            each = statistic.scope is Scope.EXPERT
            groups = [(p,) for p in range(len(pool))] if each else [tuple(range(len(pool)))]
            kinds = [statistic.of_expert(p) for p in range(len(pool))] if each else [statistic]
            found[name] = [
                _find(kind, base, [pool[p] for p in group], selection, report, library)
                for kind, group in zip(kinds, groups, strict=True)
            ]
    return found


def _find(
    statistic: Statistic,
    base: MemoryTensors,
    pool: Sequence[Expert],
    selection: Mapping[str, TensorInfo],
    report: Report,
    library: Library | None,
) -> Found:
    known = find_statistics(statistic, base, pool, selection, {}, report, library)
    job = StatisticJob("statistic", statistic, tuple(range(len(pool))), selection, known)
    plan = PassPlan(base, tuple(pool), (), (job,), plan_spans(selection, coarsest(())), library=library)
    result = run_pass(plan, InProcess(), report).results["statistic"]
    return Found(MemoryTensors(result.tensors), result.numbers)


def _chained(
    link: Link, base: MemoryTensors, pool: Sequence[Expert], selection: Mapping[str, TensorInfo], report: Report
) -> Found:
    """The last link over these experts; at most two links are held at a time."""
    known: dict[str, Sequence[Found]] = {BEFORE: []}
    for expert in pool:
        outputs = link.outputs(selection)
        sink = MemorySink(outputs)
        job = MergeJob("link", link, (0,), frozenset(selection), outputs, known, sink)
        run_pass(PassPlan(base, (expert,), (job,), (), plan_spans(selection, link.per)), InProcess(), report)
        written = MemoryTensors(sink.held)
        known = {BEFORE: [Found(written, link.numbers(written, selection, known))]}
    return known[BEFORE][0]


def _given(values: Mapping[str, Tensor], selection: Mapping[str, TensorInfo]) -> Found:
    missing = sorted(set(selection) - set(values))
    if missing:
        raise SpecError(f"statistics: nothing given for tensor '{missing[0]}' and {len(missing) - 1} more")
    return Found(MemoryTensors(values), {"squared_norm": {name: squared_norm(values[name]) for name in selection}})
