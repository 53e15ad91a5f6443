"""Every plug-in by its name, from this repository and from installed packages.

Methods, statistics and searches of this repository are the classes that `mergecore/methods/__init__.py`,
`mergecore/statistics/__init__.py` and `mergecore/searches/__init__.py` list. Evaluators are named by module, so that
their heavy imports stay theirs. Installed packages offer theirs as entry points: see docs/guides/your-own-method.md.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any, TypeVar

from pydantic import ValidationError

from mergecore import methods, products, searches, statistics
from mergecore.errors import PluginError, SpecError, nearest
from mergecore.plugins.any_statistic import AnyStatistic
from mergecore.plugins.evaluator import Evaluator
from mergecore.plugins.method import Method
from mergecore.plugins.plugin import Plugin
from mergecore.plugins.product import Product
from mergecore.plugins.search import Search
from mergecore.plugins.shelf import Shelf, class_of
from mergecore.plugins.values import explained

Kind = TypeVar("Kind", bound=Plugin)


def _listed(module: ModuleType, base: type[Any]) -> Iterator[tuple[str, Any]]:
    """The plug-ins that a package lists, by name and in its order; other classes it exports are no plug-ins."""
    for kind in vars(module).values():
        if isinstance(kind, type) and issubclass(kind, base) and not inspect.isabstract(kind):
            yield str(vars(kind)["name"]), kind


METHODS: Shelf[type[Method]] = Shelf("method", "methods", dict(_listed(methods, Method)), class_of(Method))
STATISTICS: Shelf[type[AnyStatistic]] = Shelf(
    "statistic", "statistics", dict(_listed(statistics, AnyStatistic)), class_of(AnyStatistic)
)
PRODUCTS: Shelf[type[Product]] = Shelf("product", "products", dict(_listed(products, Product)), class_of(Product))
SEARCHES: Shelf[type[Search]] = Shelf("search", "searches", dict(_listed(searches, Search)), class_of(Search))
EVALUATORS: Shelf[type[Evaluator]] = Shelf(
    "evaluator",
    "evaluators",
    {
        "lm_eval": "mergecore.evaluators.lm_eval:LmEval",
        "classification": "mergecore.evaluators.classification:Classification",
    },
    class_of(Evaluator),
)


def method_from(name: str, values: Mapping[str, Any], where: str, beside: Iterable[str] = ()) -> Method:
    """Return the method of that name with these values. beside: keys that may stand beside them.

    Raise SpecError naming `where`, the field and the nearest names.
    """
    if not name:
        raise SpecError(f"{where}.method: must be given; {nearest('', METHODS)}")
    if name not in METHODS:
        raise SpecError(f"{where}: there is no method '{name}'; {nearest(name, METHODS)} (see `mergeloom methods`)")
    method = _built(METHODS[name], values, f"{where} ({name})", beside)
    _check_statistics(method)
    return method


def _check_statistics(owner: Method | AnyStatistic) -> None:
    """Raise PluginError where a statistic that is needed has the name of another, under which its results are kept."""
    for statistic in owner.statistics().values():
        if statistic.registered:
            STATISTICS.check_own(statistic)
        _check_statistics(statistic)


def product_of(method: Method | type[Method]) -> Product:
    """Return the product that the method makes. Raise PluginError where no product has that name."""
    if method.product not in PRODUCTS:
        raise PluginError(
            f"method '{method.name}' makes a product '{method.product}', which is not there; "
            f"{nearest(method.product, PRODUCTS)}"
        )
    return PRODUCTS[method.product]()


def evaluator_from(name: str, values: Mapping[str, Any], where: str, beside: Iterable[str] = ()) -> Evaluator:
    """Return the evaluator of that name with these values. Errors are as for methods."""
    if name not in EVALUATORS:
        raise SpecError(f"{where}: there is no evaluator '{name}'; {nearest(name, EVALUATORS)}")
    return _built(EVALUATORS[name], values, where, beside)


def search_from(name: str, values: Mapping[str, Any], where: str) -> Search:
    """Return the search of that name with these values. Errors are as for methods."""
    if name not in SEARCHES:
        said = f"there is no search '{name}'; {nearest(name, SEARCHES)}" if name else "must be given, as in by: greedy"
        raise SpecError(f"{where}.by: {said}")
    return _built(SEARCHES[name], values, f"{where} ({name})", ("by",))


def _built(kind: type[Kind], values: Mapping[str, Any], where: str, beside: Iterable[str]) -> Kind:
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise SpecError(explained(error, kind, where, beside)) from None
