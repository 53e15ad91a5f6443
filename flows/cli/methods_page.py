"""The methods as a page, docs/methods.md, made from their classes: what each does, its parameters, what it costs."""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mergecore.errors import SpecError
from mergecore.plugins.any_statistic import AnyStatistic
from mergecore.plugins.block import Per
from mergecore.plugins.method import Method
from mergecore.registry import METHODS, product_of

HEAD = """# The methods

This page is made from the classes by `mergeloom methods --markdown` (`make docs`). A test compares the two. Values are
written in YAML beside `method:`, in a recipe or in a spec. In a spec any of them may be a grid. θ are weights, τ are
task vectors, T is the number of experts, λ and α are factors.

**Readings** are the cost of a method: how often base and experts are read from end to end, at most. The merge itself is
one reading. Statistics that a method needs beforehand take readings of their own. They are kept in the store and shared
by all cells that need the same. One reading serves many methods at once. Statistics of one expert (profile, threshold)
are shared by all merges of that expert. A threshold often follows from the profile, and then costs no reading; between
bfloat16 checkpoints it nearly always does.

"""
PIECES = {
    Per.ELEMENT: "element by element, in one fused loop",
    Per.TENSOR: "a whole tensor of all experts at a time",
}
TRIED = 8
"""Numbers of experts that are tried, to find out how many a method takes."""


def methods_page() -> str:
    """Return the page of this repository's methods, in Markdown."""
    ours = {name: METHODS[name] for name in METHODS.own}
    rows = [
        f"| [`{name}`](#{name}) | {_escaped(_summary(kind))} | {_readings(built(kind))} |"
        for name, kind in ours.items()
    ]
    table = ["| method | what it does | readings |", "|---|---|---|", *rows, ""]
    return HEAD + "\n".join([*table, *(_section(name, kind) for name, kind in ours.items())])


def _summary(kind: type[Method]) -> str:
    return _paragraphs(kind.__doc__)[0]


def _escaped(text: str) -> str:
    """Return text for a cell of a table."""
    return text.replace("|", "\\|")


def _paragraphs(text: str | None) -> list[str]:
    return [" ".join(part.split()) for part in (text or "").strip().split("\n\n")]


def _section(name: str, kind: type[Method]) -> str:
    lines = [f"## {name}", "", *description(kind), ""]
    lines += ["| parameter | values | default | meaning |", "|---|---|---|---|"]
    lines += [
        f"| `{parameter.name}` | {parameter.values} | {parameter.default} | {_escaped(parameter.meaning)} |"
        for parameter in parameters(kind)
    ]
    return "\n".join([*lines, ""])


def description(kind: type[Method]) -> list[str]:
    """Return lines of Markdown: what a method does, takes and costs, and which values match which published code."""
    module = __import__(kind.__module__, fromlist=["__doc__"])
    method = built(kind)
    lines = [f"*{_paragraphs(module.__doc__)[0]}*", "", "\n\n".join(_paragraphs(kind.__doc__)), ""]
    lines += [f"Paper: {kind.paper}.", ""] if kind.paper else []
    lines += [f"Takes {_experts(kind)}; works on {_ground(kind)}, {_piece(method)}."]
    if kind.ordered:
        lines += ["The order of the experts counts."]
    lines += [described] if (described := product_of(kind).described) else []
    lines += [f"Readings: {_cost(kind, method)}."]
    if kind.published:
        lines += ["", "Does as:", "", *(f"- {entry}" for entry in kind.published)]
    return lines


# --- parameters -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ParameterRow:
    """One parameter as YAML has it. name: a key inside another one has a dot, `drop.rate`."""

    name: str
    values: str
    default: str
    meaning: str


def parameters(kind: type[BaseModel], prefix: str = "") -> Iterator[ParameterRow]:
    """Yield the parameters of a method, each followed by those inside it."""
    for field, info in kind.model_fields.items():
        if (prefix and not info.repr) or (field == "kind" and not info.is_required()):  # is there without being written
            continue
        yield ParameterRow(f"{prefix}{field}", _values(info), _default(info), info.description or "")
        inner = _inner(info.annotation)
        if inner is not None:
            yield from parameters(inner, f"{prefix}{field}.")


def _inner(annotation: Any) -> type[BaseModel] | None:
    """Return the pydantic model in a parameter's type, or None."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((inner for part in get_args(annotation) if (inner := _inner(part)) is not None), None)


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "must be given"
    if isinstance(info.default, BaseModel):
        return "as below"
    return "none" if info.default is None else f"`{_plain(info.default)}`"


def _plain(value: Any) -> str:
    """Return a value as YAML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(_plain(item) for item in value)}]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_plain(inner)}" for key, inner in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _values(info: FieldInfo) -> str:
    limits = _limits(info.metadata)
    return _kind(info.annotation) + (f" {limits}" if limits else "")


def _kind(annotation: Any) -> str:
    origin = get_origin(annotation)
    if origin is Annotated:
        base, *metadata = get_args(annotation)
        limits = _limits([inner for item in metadata for inner in getattr(item, "metadata", [item])])
        return _kind(base) + (f" {limits}" if limits else "")
    if origin is Literal:
        return ", ".join(f"`{option}`" for option in get_args(annotation))
    if origin in (Union, UnionType):
        return " or ".join(_kind(part) for part in get_args(annotation) if part is not NoneType)
    if origin is tuple:
        parts = get_args(annotation)
        return f"{'two' if len(parts) == 2 and parts[1] is not Ellipsis else 'list'} × {_kind(parts[0])}".replace(
            "list × ", "list of "
        )
    if origin is abc.Mapping:
        return f"keys, each with {_kind(get_args(annotation)[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "keys below"
    return {float: "number", int: "whole number", bool: "true, false", str: "text"}.get(annotation, str(annotation))


def _limits(metadata: list[Any]) -> str:
    signs = ((Ge, "≥", "ge"), (Gt, ">", "gt"), (Le, "≤", "le"), (Lt, "<", "lt"))
    return ", ".join(
        f"{sign} {getattr(bound, name):g}"
        for bound in metadata
        for limit, sign, name in signs
        if isinstance(bound, limit)
    )


# --- what it takes and costs ----------------------------------------------------------------------------------------


def built(kind: type[Method], **values: Any) -> Method:
    """Return the method with these values, and defaults for the others; what has none is taken from its first
    example.
    """
    example = next(iter(kind.examples()))
    needed = {name: example[name] for name, info in kind.model_fields.items() if info.is_required()}
    return kind.model_validate({**needed, **values})


def _experts(kind: type[Method]) -> str:
    taken = [count for count in range(1, TRIED + 1) if accepts(built(kind), count)]
    if len(taken) == 1:
        return "one expert" if taken == [1] else f"{taken[0]} experts"
    return "any number of experts" if taken[0] == 1 else f"at least {taken[0]} experts"


def accepts(method: Method, count: int) -> bool:
    """Whether the method merges so many experts."""
    try:
        method.validate_count(count)
    except SpecError:
        return False
    return True


def _ground(kind: type[Method]) -> str:
    method = built(kind)
    if ground := product_of(kind).ground:
        return ground
    if method.on in ("deltas", "state"):
        return "the experts' changes of the base"
    return "the experts' weights and the base's" if method.needs_base else "the experts' weights alone"


def _piece(method: Method) -> str:
    if any(statistic.chained for statistic in method.statistics().values()):
        return "one expert after another, a whole tensor at a time"
    return PIECES[method.per]


def _cost(kind: type[Method], method: Method) -> str:
    usual = _readings(method)
    told = [f"{usual}{_because(method)}"]
    for field, info in kind.model_fields.items():
        for option in _options(info.annotation):
            told += _otherwise(kind, f"{field}: {_plain(option)}", {field: option}, usual)
        told += _nested_cost(kind, field, info, usual)
    return "; ".join(told)


def _nested_cost(kind: type[Method], field: str, info: FieldInfo, usual: int) -> Iterator[str]:
    """Yield what a parameter that is made of others costs: where it is there at all, and with each of its options."""
    inner = _inner(info.annotation)
    samples = [values[field] for values in kind.examples() if isinstance(values.get(field), Mapping)]
    if inner is None or not samples:
        return
    options = {name: _options(part.annotation) for name, part in inner.model_fields.items()}
    needed = {name for name, part in inner.model_fields.items() if part.is_required()}
    plain = {name: value for name, value in samples[0].items() if not options.get(name) or name in needed}
    yield from _otherwise(kind, field, {field: plain}, usual)
    usual = _readings(built(kind, **{field: plain}))
    for name, choices in options.items():
        for option in choices:
            yield from _otherwise(kind, f"{field}: {_plain({name: option})}", {field: {**plain, name: option}}, usual)


def _otherwise(kind: type[Method], label: str, values: Mapping[str, Any], usual: int) -> Iterator[str]:
    """Yield the readings of the method with these values where they are not the usual number."""
    try:
        readings = _readings(built(kind, **values))
    except ValueError:
        return
    if readings != usual:
        yield f"{readings} with `{label}`"


def _because(method: Method) -> str:
    beforehand = [f"`{statistic.name}`" for statistic in _beforehand(method) if statistic.shown_as != "adapter"]
    costs = dict.fromkeys(statistic.cost for statistic in method.statistics().values() if statistic.cost)
    told = ", ".join(beforehand) + "".join(f", {cost}" for cost in costs)
    return f" (beforehand {told})" if beforehand else ""


def _beforehand(owner: Method | AnyStatistic) -> list[AnyStatistic]:
    """Return everything that is worked out beforehand, deepest first, each once."""
    needed: list[AnyStatistic] = []
    for statistic in owner.statistics().values():
        needed += [*_beforehand(statistic), statistic]
    return list(dict.fromkeys(needed))


def _readings(method: Method) -> int:
    return 1 + _depth(method)


def _depth(owner: Method | AnyStatistic) -> int:
    """Return the readings until everything it must know is known; what can go side by side does."""
    return max((_depth(statistic) + statistic.readings for statistic in owner.statistics().values()), default=0)


def _options(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(option for part in get_args(annotation) for option in _options(part))
