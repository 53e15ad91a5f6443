"""Merges in memory: mappings in, a mapping out. The numbers are those that the pipeline writes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mergecore.checkpoints.experts import Expert, FullExpert
from mergecore.checkpoints.fit import check_fit, float64_loss, float64_names
from mergecore.checkpoints.layout import lay_out
from mergecore.checkpoints.select import SelectRule, check_left_out
from mergecore.engine.executor import InProcess
from mergecore.engine.pass_plan import MergeJob, PassPlan, StatisticJob, coarsest, plan_spans
from mergecore.engine.run_pass import run_pass
from mergecore.errors import SpecError, nearest
from mergecore.events import Report, silent
from mergecore.native.library import Library
from mergecore.plugins.adapter_method import AdapterMethod
from mergecore.plugins.any_statistic import AnyStatistic
from mergecore.plugins.chain import BEFORE, Link
from mergecore.plugins.method import Method
from mergecore.plugins.model_statistic import ModelStatistic
from mergecore.plugins.statistic import Found, Scope, Statistic, Statistics
from mergecore.registry import product_of
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
    """Merge `experts` (and `base`) by `method` into {name: tensor}.

    The result has the names and shapes of the base and, unless `dtype` is given, its dtypes. base may be left out where
    the method does not need it; the first expert's tensors are then copied where nothing is merged. ids: the experts'
    ids. With ids, experts are folded by ascending id as in the pipeline, and random masks are drawn with them; without,
    experts are folded in list order, and masks are drawn by their tensors, as in the pipeline. statistics: {name: one
    mapping per expert} for what weights alone do not tell (Fisher). select: plain rules only. A warning says where
    float64 tensors lose digits: merges work in float32.

    Raise SpecError, MismatchError and NonFiniteError.
    """
    _check(method, base, experts, ids, statistics or {})
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
    wide = {name for model in (first, *experts) for name in float64_names(MemoryTensors(model).tensors)}
    if merged := sorted(wide & layout.merged.keys()):
        warnings.warn(float64_loss(merged[0]), stacklevel=4)
    order = method.arranged([""] * len(experts) if ids is None else ids)
    named = [str(position) for position in order] if ids is None else [ids[position] for position in order]
    pool: tuple[Expert, ...] = tuple(
        FullExpert(name, f"{position}", MemoryTensors(experts[position]))
        for name, position in zip(named, order, strict=True)
    )
    if ids is None and "tensors" in method.drawn_by:
        pool = tuple(expert.identified(expert.identify()) for expert in pool)
    handed = {
        name: [values[position] for position in order] if len(values) == len(order) else values
        for name, values in (statistics or {}).items()
    }
    bound = method.bound(order).fitted(shapes.tensors)
    known = find_statistics(bound, shapes, pool, layout.merged, handed, report, library)
    outputs = {**bound.outputs(layout.merged, len(pool)), **layout.copied}
    if dtype is not None:
        outputs = dict(product_of(bound).stored(outputs, DTYPE_NAMES[dtype]))
    sink = MemorySink(outputs)
    shown = tuple(range(len(pool))) if bound.needs_experts else ()
    job = MergeJob("merge", bound, shown, frozenset(layout.merged), outputs, known, sink)
    spans = plan_spans({**layout.merged, **layout.copied}, bound.per)
    run_pass(PassPlan(shapes, pool, (job,), (), spans, library=library), InProcess(), report)
    return {name: sink.values[name] for name in first if name in sink.values} | sink.values


def _check(
    method: Method,
    base: Mapping[str, Tensor] | None,
    experts: Sequence[Mapping[str, Tensor]],
    ids: Sequence[str] | None,
    statistics: Mapping[str, Sequence[Mapping[str, Tensor]]],
) -> None:
    if not experts:
        raise SpecError("no experts given: a merge needs at least one")
    method.validate_count(len(experts))
    product = product_of(method)
    if not product.in_memory:
        raise SpecError(
            f"method '{method.name}' makes {product.noun} of {product.of}, which are folders: give a recipe of them to "
            "`mergeloom merge`, or to mergecore.recipes.make_recipe.make_recipe"
        )
    if base is None and method.needs_base:
        raise SpecError(f"method '{method.name}' works on task vectors; give the base they start from")
    if ids is not None and (len(ids) != len(experts) or len(set(ids)) != len(ids)):
        raise SpecError(f"ids: give one distinct id for each of the {len(experts)} experts")
    if ids is None and method.needs_ids and "tensors" not in method.drawn_by:
        raise SpecError("what is random here depends on who the experts are: give `ids`, one string per expert")
    taken = {name: statistic for name, statistic in method.statistics().items() if statistic.takes_data}
    for name, results in statistics.items():
        if name not in taken:
            raise SpecError(f"statistics: method '{method.name}' takes no '{name}'; {nearest(name, taken)}")
        if len(results) != (wanted := taken[name].handed(len(experts))):
            of = f"{len(experts)} experts" if wanted > 1 else "all experts together, where it has one"
            raise SpecError(f"statistics: '{name}' has {len(results)} result(s) for {of}")


def find_statistics(
    owner: Method | AnyStatistic,
    base: MemoryTensors,
    pool: Sequence[Expert],
    selection: Mapping[str, TensorInfo],
    handed: Mapping[str, Sequence[Mapping[str, Tensor]]],
    report: Report,
    library: Library | None = None,
) -> Statistics:
    """Return everything `owner` must know beforehand. It is worked out from models in memory, deepest first.

    handed: {name: one mapping per expert} for statistics that take data.
    """
    kinds = _InMemory(owner.name, base, pool, selection, handed, report, library)
    return {name: statistic.visit(replace(kinds, called=name)) for name, statistic in owner.statistics().items()}


@dataclass(frozen=True)
class _InMemory:
    """Works out each kind of statistic from models in memory. called: the name under which the owner is handed the
    result.
    """

    owner: str
    base: MemoryTensors
    pool: Sequence[Expert]
    selection: Mapping[str, TensorInfo]
    handed: Mapping[str, Sequence[Mapping[str, Tensor]]]
    report: Report
    library: Library | None
    called: str = ""

    def streamed(self, statistic: Statistic) -> list[Found]:
        """Return what a pass finds: for each expert, or for all."""
        if statistic.scope is Scope.POOL:
            return [self._scanned(statistic, self.pool)]
        return [self._scanned(statistic.of_expert(number), [expert]) for number, expert in enumerate(self.pool)]

    def _scanned(self, statistic: Statistic, pool: Sequence[Expert]) -> Found:
        known = find_statistics(statistic, self.base, pool, self.selection, {}, self.report, self.library)
        job = StatisticJob("statistic", statistic, tuple(range(len(pool))), self.selection, known)
        spans = plan_spans(self.selection, coarsest(()))
        plan = PassPlan(self.base, tuple(pool), (), (job,), spans, library=self.library)
        result = run_pass(plan, InProcess(), self.report).results["statistic"]
        return Found(MemoryTensors(result.tensors), result.numbers)

    def on_models(self, statistic: ModelStatistic) -> list[Found]:
        """Return what was worked out elsewhere: there is no data here."""
        if self.called not in self.handed:
            raise SpecError(
                f"method '{self.owner}' needs '{self.called}', which takes data: give statistics={{'{self.called}': "
                "[one mapping per expert]}, or run it from a spec with tasks"
            )
        results = [statistic.taken(tensors, self.selection) for tensors in self.handed[self.called]]
        return [Found(MemoryTensors(result.tensors), result.numbers) for result in results]

    def chained(self, link: Link) -> list[Found]:
        """Return the last link over the experts; at most two links are in memory at a time."""
        known: dict[str, Sequence[Found]] = {BEFORE: []}
        for expert in self.pool:
            outputs = link.outputs(self.selection)
            sink = MemorySink(outputs)
            job = MergeJob("link", link, (0,), frozenset(self.selection), outputs, known, sink)
            plan = PassPlan(self.base, (expert,), (job,), (), plan_spans(self.selection, link.per))
            run_pass(plan, InProcess(), self.report)
            written = MemoryTensors(sink.values)
            known = {BEFORE: [Found(written, link.numbers(written, self.selection, known))]}
        return list(known[BEFORE])

    def adapter(self, method: AdapterMethod) -> list[Found]:
        """Refuse: adapters are folders."""
        raise SpecError(f"method '{method.name}' merges adapters, which are folders, not mappings of tensors")
