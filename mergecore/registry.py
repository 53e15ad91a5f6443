"""Every plug-in by its name: one line each. Evaluators are named by module, so that their heavy imports stay theirs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any, TypeVar

from pydantic import ValidationError

from mergecore import methods, searches
from mergecore.errors import SpecError, nearest
from mergecore.plugins.chain import Link
from mergecore.plugins.evaluator import Evaluator
from mergecore.plugins.method import Method
from mergecore.plugins.plugin import Plugin
from mergecore.plugins.search import Search
from mergecore.plugins.statistic import DataStatistic, Statistic
from mergecore.plugins.values import explained
from mergecore.statistics.balance_cut import BalanceCut
from mergecore.statistics.dropped_norms import DroppedNorms
from mergecore.statistics.fisher import DiagonalFisher
from mergecore.statistics.magnitude_quantiles import MagnitudeQuantiles
from mergecore.statistics.overlap_counts import OverlapCounts
from mergecore.statistics.products import Products
from mergecore.statistics.profile import Profile
from mergecore.statistics.projected_sum import ProjectedSum
from mergecore.statistics.sign_majority import SignMajority
from mergecore.statistics.softmax_means import SoftmaxMeans
from mergecore.statistics.threshold import Threshold
from mergecore.statistics.trimmed_norms import TrimmedNorms
from mergecore.statistics.unified_norms import UnifiedNorms

Kind = TypeVar("Kind", bound=Plugin)

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        methods.Average,
        methods.TaskArithmetic,
        methods.Ties,
        methods.Fisher,
        methods.Slerp,
        methods.Karcher,
        methods.ModelStock,
        methods.Sce,
        methods.IsoC,
        methods.IsoCts,
        methods.TsvM,
        methods.Wudi,
        methods.Breadcrumbs,
        methods.Della,
        methods.Pcb,
        methods.Consensus,
        methods.Opcm,
        methods.LayerSwap,
        methods.LoraArithmetic,
        methods.LoraLego,
        methods.Nearswap,
        methods.Ram,
        methods.ArceeFusion,
        methods.Nuslerp,
        methods.Multislerp,
        methods.TallMasks,
        methods.Emr,
    )
}
STATISTICS: dict[str, type[Statistic] | type[DataStatistic] | type[Link]] = {
    statistic.name: statistic
    for statistic in (
        DroppedNorms,
        Profile,
        Threshold,
        SignMajority,
        TrimmedNorms,
        Products,
        DiagonalFisher,
        MagnitudeQuantiles,
        BalanceCut,
        SoftmaxMeans,
        ProjectedSum,
        OverlapCounts,
        UnifiedNorms,
    )
}
SEARCHES: dict[str, type[Search]] = {
    search.name: search for search in (searches.Greedy, searches.Grid, searches.Nevergrad)
}
EVALUATORS: dict[str, str] = {
    "lm_eval": "mergecore.evaluators.lm_eval:LmEval",
    "classification": "mergecore.evaluators.classification:Classification",
}


def method_from(name: str, values: Mapping[str, Any], where: str, beside: Iterable[str] = ()) -> Method:
    """The method of that name with these values. beside: keys that may stand beside them, to offer for a misspelt one.

    Raises SpecError naming `where`, the field and the nearest names.
    """
    if not name:
        raise SpecError(f"{where}.method: must be given; {nearest('', METHODS)}")
    if name not in METHODS:
        raise SpecError(f"{where}: there is no method '{name}'; {nearest(name, METHODS)} (see `mergeloom methods`)")
    return _built(METHODS[name], values, f"{where} ({name})", beside)


def evaluator_from(name: str, values: Mapping[str, Any], where: str, beside: Iterable[str] = ()) -> Evaluator:
    """The evaluator of that name with these values; errors as for methods."""
    if name not in EVALUATORS:
        raise SpecError(f"{where}: there is no evaluator '{name}'; {nearest(name, EVALUATORS)}")
    module, _, attribute = EVALUATORS[name].partition(":")
    kind: type[Evaluator] = getattr(import_module(module), attribute)
    return _built(kind, values, where, beside)


def search_from(name: str, values: Mapping[str, Any], where: str) -> Search:
    """The search of that name with these values; errors as for methods."""
    if name not in SEARCHES:
        said = f"there is no search '{name}'; {nearest(name, SEARCHES)}" if name else "must be given, as in by: greedy"
        raise SpecError(f"{where}.by: {said}")
    return _built(SEARCHES[name], values, f"{where} ({name})", ("by",))


def _built(kind: type[Kind], values: Mapping[str, Any], where: str, beside: Iterable[str]) -> Kind:
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise SpecError(explained(error, kind, where, beside)) from None
