"""Every plug-in by its name: one line each. Evaluators are named by module, so that their heavy imports stay theirs."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, TypeVar

from pydantic import ValidationError

from mergecore import methods
from mergecore.errors import SpecError, nearest
from mergecore.evaluators import Evaluator
from mergecore.method import DataStatistic, Method, Plugin, Statistic
from mergecore.statistics.dropped_norms import DroppedNorms
from mergecore.statistics.fisher import DiagonalFisher
from mergecore.statistics.profile import Profile
from mergecore.statistics.sign_majority import SignMajority
from mergecore.statistics.threshold import Threshold

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
    )
}
STATISTICS: dict[str, type[Statistic] | type[DataStatistic]] = {
    statistic.name: statistic
    for statistic in (
        DroppedNorms,
        Profile,
        Threshold,
        SignMajority,
        DiagonalFisher,
    )
}
EVALUATORS: dict[str, str] = {
    "lm_eval": "mergecore.evaluators.lm_eval:LmEval",
    "classification": "mergecore.evaluators.classification:Classification",
}


def method_from(name: str, values: Mapping[str, Any], where: str) -> Method:
    """The method of that name with these values. Raises SpecError naming `where`, the field and the nearest names."""
    if name not in METHODS:
        raise SpecError(f"{where}: there is no method '{name}'; {nearest(name, METHODS)} (see `mergeloom methods`)")
    return _built(METHODS[name], values, f"{where} ({name})")


def evaluator_from(name: str, values: Mapping[str, Any], where: str) -> Evaluator:
    """The evaluator of that name with these values; errors as for methods."""
    if name not in EVALUATORS:
        raise SpecError(f"{where}: there is no evaluator '{name}'; {nearest(name, EVALUATORS)}")
    module, _, attribute = EVALUATORS[name].partition(":")
    kind: type[Evaluator] = getattr(import_module(module), attribute)
    return _built(kind, values, where)


def _built(kind: type[Kind], values: Mapping[str, Any], where: str) -> Kind:
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise SpecError(explained(error, kind, where)) from None


def explained(error: ValidationError, model: type[Any], where: str) -> str:
    """A pydantic error as sentences: the place, what is wrong with it, and for an unknown key the nearest one."""
    said = []
    for found in error.errors(include_url=False):
        place = ".".join([where, *(str(part) for part in found["loc"])])
        if found["type"] == "extra_forbidden":
            parent, key = list(found["loc"][:-1]), str(found["loc"][-1])
            said.append(f"{place}: unknown key; {nearest(key, _keys(model, parent))}")
        elif found["type"] == "missing":
            said.append(f"{place}: must be given")
        else:
            message = found["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
            said.append(f"{place}: {message} (given: {found['input']!r})")
    return "; ".join(said)


def _keys(model: Any, path: list[Any]) -> list[str]:
    """The known keys of the (nested) model that `path` leads to."""
    for part in path:
        fields = getattr(model, "model_fields", {})
        if part not in fields:
            continue
        annotation = fields[part].annotation
        model = next((kind for kind in _models(annotation)), model)
    return list(getattr(model, "model_fields", {}))


def _models(annotation: Any) -> list[Any]:
    if hasattr(annotation, "model_fields"):
        return [annotation]
    return [kind for part in getattr(annotation, "__args__", ()) for kind in _models(part)]
