"""mergekit's merge methods: their parameters, what they take as inputs, and the values that make ours do the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import fsum, inf
from typing import Any, Literal

from mergecore.errors import SpecError, nearest
from mergecore.spec.mergekit.setting import Scalar

Base = Literal["input", "optional", "required"]
"""What a method makes of the base: just another input, a model that it may or must be given."""


@dataclass(frozen=True)
class Parameter:
    """One parameter. per: 'merge' is one value for all, 'input' one per model, 'expert' one per model but the base."""

    name: str
    kind: Literal["number", "count", "switch"]
    per: Literal["merge", "input", "expert"] = "merge"
    default: Scalar | None = None
    required: bool = False

    def read(self, value: Any) -> Scalar:
        """The value as given in YAML. Raises ValueError where it is of another kind."""
        if self.kind == "switch":
            if isinstance(value, int | float):
                return bool(value)
            raise ValueError(f"must be true or false (given: {value!r})")
        try:
            number = float("no number" if isinstance(value, bool) else value)  # YAML takes 1e-5 for text
            if not math.isfinite(number):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"must be a number (given: {value!r})") from None
        if self.kind == "number":
            return number
        if number != int(number):
            raise ValueError(f"must be a whole number (given: {value!r})")
        return int(number)


@dataclass(frozen=True)
class Values:
    """What holds for one tensor: values for all, and per expert (or per input) in order.

    seed: of random masks. based: whether the experts are seen from a base. notes: what is to be said aloud.
    """

    shared: Mapping[str, Any]
    each: Mapping[str, Sequence[Any]]
    seed: int
    based: bool
    notes: list[str] = field(default_factory=list)

    def bounded(self, name: str, value: float, least: float, most: float) -> float:
        """A value that mergekit takes as well, as the nearest one that means the same; said aloud where it is moved."""
        moved = min(max(float(value), least), most)
        if moved != value:
            self.notes.append(f"{name} {value:g} counts as {moved:g}, in mergekit too")
        return moved


@dataclass(frozen=True)
class MergekitMethod:
    """One of mergekit's methods. ours: our method and its values, or None where the tensor is copied."""

    name: str
    parameters: tuple[Parameter, ...]
    base: Base
    fewest: int
    most: int | None
    ours: Callable[[Values], dict[str, Any] | None]

    def parameter(self, name: str) -> Parameter | None:
        """The parameter of that name."""
        return next((parameter for parameter in self.parameters if parameter.name == name), None)

    def check_count(self, count: int, where: str) -> None:
        """Raise SpecError where there are too few or too many models beside the base."""
        if count < self.fewest or (self.most is not None and count > self.most):
            wanted = f"{self.fewest}" if self.most == self.fewest else f"at least {self.fewest}"
            wanted = f"at most {self.most}" if self.most is not None and count > self.most else wanted
            beside = " beside the base" if self.base == "required" else ""
            raise SpecError(f"{where}: '{self.name}' takes {wanted} models{beside}, {count} are given")


def _linear(values: Values) -> dict[str, Any]:
    return {"method": "average", **_weighed(values), **({} if values.shared["normalize"] else {"aggregate": "sum"})}


def _passthrough(values: Values) -> dict[str, Any] | None:
    scale = values.each["scale"][0]
    return None if scale in (None, 1.0) else {"method": "average", "weights": [scale], "aggregate": "sum"}


def _slerp(values: Values) -> dict[str, Any]:
    if not 0 <= values.shared["t"] <= 1:
        values.notes.append(f"t {values.shared['t']:g} goes on along the arc, beyond the models, as in mergekit")
    return {"method": "slerp", "t": values.shared["t"], "start": "base"}


def _karcher(values: Values) -> dict[str, Any]:
    return {
        "method": "karcher",
        "iterations": values.shared["max_iter"],
        "tolerance": values.bounded("tol", values.shared["tol"], 1e-8, inf),
    }


def _model_stock(values: Values) -> dict[str, Any]:
    group = {"group": "filter"} if values.shared["filter_wise"] else {}
    return {"method": "model_stock", **group, "negative": "extrapolate"}


def _sce(values: Values) -> dict[str, Any]:
    return {"method": "sce", "density": values.bounded("select_topk", values.shared["select_topk"], 0, 1)}


def _task_arithmetic(values: Values) -> dict[str, Any]:
    aggregate = {"aggregate": _mean(values)} if values.shared["normalize"] else {}
    return {"method": "task_arithmetic", "scale": values.shared["lambda"], **_weighed(values), **aggregate}


def _dare_linear(values: Values) -> dict[str, Any]:
    values = _without_nothing(_divided(values))
    return {**_task_arithmetic(values), **_random_drop(values)}


def _ties(values: Values) -> dict[str, Any]:
    if values.shared["rescale"]:  # only methods that see a whole tensor rescale; this one trims outliers, here none
        none = [0.0] * len(values.each["density"])
        return _breadcrumbs(replace(values, each={**values.each, "gamma": none}), "mass")
    return {**_elected(values), "density": _one_or_each(_shares(values)), "least": 1}


def _divided(values: Values) -> Values:
    """Divide weights by their sum beforehand where an expert of which nothing is kept still counts in it."""
    if not values.shared["normalize"] or 0 not in _shares(values):
        return values
    total = fsum(values.each["weight"])
    total = total if abs(total) >= 1e-8 else 1.0
    each = {**values.each, "weight": [weight / total for weight in values.each["weight"]]}
    return replace(values, shared={**values.shared, "normalize": False}, each=each)


def _without_nothing(values: Values) -> Values:
    """Density 0 of a random drop as weight 0: an expert of which nothing is kept counts for nothing."""
    nothing = [share == 0 for share in _shares(values)]
    weights = [0.0 if is_nothing else weight for is_nothing, weight in zip(nothing, values.each["weight"], strict=True)]
    shares = [1.0 if is_nothing else share for is_nothing, share in zip(nothing, values.each["density"], strict=True)]
    return replace(values, each={**values.each, "weight": weights, "density": shares})


def _dare_ties(values: Values) -> dict[str, Any]:
    values = _without_nothing(values)
    return {**_elected(values), "density": 1.0, **_random_drop(values)}


def _elected(values: Values) -> dict[str, Any]:
    """TIES as mergekit has it: ranked within each tensor, a sum of exactly 0 counts as positive."""
    return {
        "method": "ties",
        "scale": values.shared["lambda"],
        "scope": "tensor",
        "aggregate": _mean(values) if values.shared["normalize"] else "sum",
        "count": "exact",
        "zero_sign": "positive",
        **_weighed(values, equal_is_none=bool(values.shared["normalize"])),
    }


def _breadcrumbs(values: Values, elect: str = "none") -> dict[str, Any]:
    shares, outliers = _shares(values), [values.bounded("gamma", gamma, -inf, 1) for gamma in values.each["gamma"]]
    crowded = any(share + gamma > 1 for share, gamma in zip(shares, outliers, strict=True))
    return {
        "method": "breadcrumbs",
        "scale": values.shared["lambda"],
        "density": _one_or_each(shares),
        "outliers": _one_or_each(outliers),
        **({"crowded": "fewer"} if crowded else {}),
        **({"rescale": "l1"} if values.shared["rescale"] else {}),
        **_weighed(values, equal_is_none=elect == "mass" and bool(values.shared["normalize"])),
        **({} if elect == "none" else {"elect": elect}),
        **({"aggregate": _mean(values)} if values.shared["normalize"] else {}),
    }


def _breadcrumbs_ties(values: Values) -> dict[str, Any]:
    return _breadcrumbs(values, "mass")


def _della(values: Values, elect: str = "mass") -> dict[str, Any]:
    values = _without_nothing(values)
    shares = _shares(values)
    windows = [
        0.0 if share == 1 else 2 * epsilon for epsilon, share in zip(values.each["epsilon"], shares, strict=True)
    ]
    return {
        "method": "della",
        "scale": values.shared["lambda"],
        "density": _one_or_each(shares),
        "window": _one_or_each(windows),
        "rescale": "l1" if values.shared["rescale"] else "none",
        "elect": elect,
        "aggregate": _mean(values) if values.shared["normalize"] else "sum",
        **_weighed(values, equal_is_none=bool(values.shared["normalize"])),
        "seed": values.seed,
    }


def _della_linear(values: Values) -> dict[str, Any]:
    return _della(_divided(values), "none")


def _nuslerp(values: Values) -> dict[str, Any]:
    weights = list(values.each["weight"])
    along = "columns" if values.shared["nuslerp_row_wise"] else "rows"
    return {
        "method": "nuslerp",
        "weights": [1.0, 1.0] if abs(sum(weights)) < 1e-6 else weights,  # as mergekit: halfway
        **({"of": "deltas"} if values.based else {}),
        **({} if values.shared["nuslerp_flatten"] else {"along": along}),
    }


def _multislerp(values: Values) -> dict[str, Any]:
    divide = {} if values.shared["normalize_weights"] else {"divide": "none"}
    of = {"of": "deltas"} if values.based else {}
    return {"method": "multislerp", **_weighed(values, equal_is_none=not divide), **divide, **of}


def _nearswap(values: Values) -> dict[str, Any]:
    return {"method": "nearswap", "t": values.bounded("t", values.shared["t"], 0, inf)}


def _ram(values: Values) -> dict[str, Any]:
    if values.shared["epsilon"] < 0:
        return _all_alike(values)
    return {"method": "ram", "epsilon": values.shared["epsilon"]}


def _all_alike(values: Values) -> dict[str, Any]:
    """RAM with an epsilon below 0: every expert counts everywhere, and no change is one expert's own."""
    values.notes.append(f"epsilon {values.shared['epsilon']:g} counts every change, which makes the average")
    return {"method": "average"}


def _ramplus_tl(values: Values) -> dict[str, Any]:
    if values.shared["epsilon"] < 0:
        return _all_alike(values)
    boost = {"rate": values.shared["r"], "most": values.shared["alpha"], "scope": "tensor"}
    return {**_ram(values), "boost": boost}


def _arcee_fusion(values: Values) -> dict[str, Any]:
    return {"method": "arcee_fusion"}


def _weighed(values: Values, equal_is_none: bool = False) -> dict[str, Any]:
    """`weights`, where they change anything: not where all are 1, nor where equal ones are divided away again."""
    weights = list(values.each["weight"])
    same = len(set(weights)) == 1 and (weights[0] == 1 or (equal_is_none and weights[0] > 0))
    return {} if same else {"weights": weights}


def _mean(values: Values) -> str:
    """mergekit divides by the sum of the weights that take part; without negative ones that is our mean."""
    return "signed_mean" if any(weight < 0 for weight in values.each["weight"]) else "mean"


def _shares(values: Values) -> list[float]:
    return [values.bounded("density", share, 0, 1) for share in values.each["density"]]


def _random_drop(values: Values) -> dict[str, Any]:
    rates = [_less(1.0, share) for share in _shares(values)]
    if not any(rates):
        return {}
    rescale = "l1" if values.shared["rescale"] else "none"
    return {"drop": {"rate": _one_or_each(rates), "rescale": rescale, "seed": values.seed}}


def _less(left: float, right: float) -> float:
    """left − right as a person would write it: 1 − 0.9 is 0.1."""
    return round(left - right, 12)


def _one_or_each(values: Sequence[float]) -> float | list[float]:
    return values[0] if len(set(values)) == 1 else list(values)


WEIGHT = Parameter("weight", "number", "expert", required=True)


def _family(normalize: bool, rescale: bool, *further: Parameter) -> tuple[Parameter, ...]:
    """The parameters of everything that sums task vectors."""
    return (
        Parameter("int8_mask", "switch", default=False),
        Parameter("normalize", "switch", default=normalize),
        Parameter("rescale", "switch", default=rescale),
        Parameter("lambda", "number", default=1.0),
        WEIGHT,
        Parameter("density", "number", "expert", default=1.0),
        *further,
    )


GAMMA = Parameter("gamma", "number", "expert", default=0.01)
EPSILON = Parameter("epsilon", "number", "expert", default=0.15)
MERGEKIT_METHODS: dict[str, MergekitMethod] = {
    method.name: method
    for method in (
        MergekitMethod(
            "linear",
            (Parameter("weight", "number", "input", required=True), Parameter("normalize", "switch", default=True)),
            "input", 1, None, _linear,
        ),
        MergekitMethod("slerp", (Parameter("t", "number", required=True),), "required", 1, 1, _slerp),
        MergekitMethod("passthrough", (Parameter("scale", "number", "input"),), "input", 1, 1, _passthrough),
        MergekitMethod(
            "karcher",
            (Parameter("max_iter", "count", default=10), Parameter("tol", "number", default=1e-5)),
            "input", 1, None, _karcher,
        ),
        MergekitMethod(
            "model_stock", (Parameter("filter_wise", "switch", default=False),), "required", 2, None, _model_stock
        ),
        MergekitMethod(
            "sce",
            (Parameter("int8_mask", "switch", default=False), Parameter("select_topk", "number", default=1.0)),
            "required", 0, None, _sce,
        ),
        MergekitMethod(
            "nuslerp",
            (
                WEIGHT,
                Parameter("nuslerp_row_wise", "switch", default=False),
                Parameter("nuslerp_flatten", "switch", default=True),
            ),
            "optional", 2, 2, _nuslerp,
        ),
        MergekitMethod(
            "multislerp",
            (WEIGHT, Parameter("normalize_weights", "switch", default=True), Parameter("eps", "number", default=1e-8)),
            "optional", 1, None, _multislerp,
        ),
        MergekitMethod("nearswap", (Parameter("t", "number", required=True),), "required", 1, 1, _nearswap),
        MergekitMethod("ram", (Parameter("epsilon", "number", default=1e-5),), "required", 0, None, _ram),
        MergekitMethod(
            "ramplus_tl",
            (
                Parameter("r", "number", default=0.1),
                Parameter("alpha", "number", default=0.2),
                Parameter("epsilon", "number", default=1e-5),
            ),
            "required", 0, None, _ramplus_tl,
        ),
        MergekitMethod("arcee_fusion", (), "required", 1, 1, _arcee_fusion),
        MergekitMethod("task_arithmetic", _family(False, False), "required", 0, None, _task_arithmetic),
        MergekitMethod("ties", _family(True, False), "required", 0, None, _ties),
        MergekitMethod("dare_ties", _family(False, True), "required", 0, None, _dare_ties),
        MergekitMethod("dare_linear", _family(False, True), "required", 0, None, _dare_linear),
        MergekitMethod("breadcrumbs", _family(False, False, GAMMA), "required", 0, None, _breadcrumbs),
        MergekitMethod("breadcrumbs_ties", _family(False, False, GAMMA), "required", 0, None, _breadcrumbs_ties),
        MergekitMethod("della", _family(True, True, EPSILON), "required", 0, None, _della),
        MergekitMethod("della_linear", _family(False, True, EPSILON), "required", 0, None, _della_linear),
    )
}  # fmt: skip
ELSEWHERE = frozenset(parameter.name for method in MERGEKIT_METHODS.values() for parameter in method.parameters)
"""Names of parameters that mergekit knows for some method; for another it passes over them in silence."""


def mergekit_method(name: str, where: str) -> MergekitMethod:
    """The method of that name. Raises SpecError where there is none."""
    if name not in MERGEKIT_METHODS:
        raise SpecError(f"{where}.merge_method: there is no '{name}'; {nearest(name, MERGEKIT_METHODS)}")
    return MERGEKIT_METHODS[name]
