"""Traces a plain torch function of flat tensors: a list of typed operations on one element.

The function is called once with stand-ins (torch.fx proxies), which write down what is done to them. Each operation is
also done on a few sample numbers: so its dtype is torch's own. Numbers of the method, its scale for example, become
arguments of the loop: methods that differ only in them share one loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from mergecore.plugins.block import Beside, Index

SAMPLES = 3
BAKED = (0.0, 1.0)
"""Numbers that are written into the loop, where they make operations cheaper. Every other one is an argument."""


class NotTraceableError(Exception):
    """The function cannot be a loop over elements; it then runs operation by operation."""


@dataclass(frozen=True)
class Value:
    """An operand or result of an operation.

    kind: 'element' (one per element), 'real' or 'whole' (the position-th argument that is a float, an int), 'baked'
    (the number itself).
    """

    kind: str
    dtype: torch.dtype
    position: int = 0
    number: float | int | bool = 0


@dataclass(frozen=True)
class Operation:
    """Does `name` to `operands`, each converted to `common`; the result has `dtype`.

    The result is the element value whose number is the operation's place in the list, from 1.
    """

    name: str
    operands: tuple[Value, ...]
    common: torch.dtype
    dtype: torch.dtype


@dataclass(frozen=True)
class Trace:
    """What is done to each element. Inputs are element values −1, −2, … in order: base, experts, then what lies beside.

    literals: numbers in the function itself. They are the first 'real' arguments of the loop.
    """

    inputs: int
    beside: int
    operations: tuple[Operation, ...]
    results: tuple[Value, ...]
    literals: tuple[float, ...]
    indexed: bool
    """Whether the flat index is used; it is the last input then."""


def leaves_and_form(arguments: Any) -> tuple[list[Any], Any]:
    """Return the leaves of nested arguments, and their form.

    Arguments are dataclasses, mappings, lists and tuples, of anything. The leaves are the numbers, `Index` and
    `Beside` in it, in order. The form is all the rest: types, names of keys, texts, bools and None. It decides the
    loop.
    """
    leaves: list[Any] = []
    return leaves, _walked(arguments, leaves)


def _walked(arguments: Any, leaves: list[Any]) -> Any:
    kind = type(arguments)
    if kind is float or kind is int:  # nearly all are, and this is done for all grid blocks
        leaves.append(arguments)
        return kind
    if kind is list or kind is tuple:
        return tuple([_walked(value, leaves) for value in arguments])
    names = _names_of(kind)
    if names is not None:
        return kind, *[_walked(getattr(arguments, name), leaves) for name in names]
    if isinstance(arguments, Mapping):
        return tuple([(name, _walked(value, leaves)) for name, value in arguments.items()])
    if arguments is None or isinstance(arguments, str | bool):
        return arguments
    leaves.append(arguments)
    return kind


def mapped(arguments: Any, change: Callable[[Any], Any]) -> Any:
    """Return the same nested arguments with `change` done to every leaf."""
    if isinstance(arguments, list | tuple):
        return [mapped(value, change) for value in arguments]
    names = _names_of(type(arguments))
    if names is not None:
        return type(arguments)(*[mapped(getattr(arguments, name), change) for name in names])
    if isinstance(arguments, Mapping):
        return {name: mapped(value, change) for name, value in arguments.items()}
    return arguments if arguments is None or isinstance(arguments, str | bool) else change(arguments)


_names: dict[type, tuple[str, ...] | None] = {Index: None, Beside: None}


def _names_of(kind: type) -> tuple[str, ...] | None:
    """Return the fields of a dataclass, in order; None for every other type, and for what is a leaf."""
    if kind not in _names:
        _names[kind] = tuple(field.name for field in fields(kind)) if is_dataclass(kind) else None
    return _names[kind]


def trace(
    function: Callable[[Sequence[Tensor], Any], Tensor | Sequence[Tensor]], models: int, arguments: Any, unseen: int = 0
) -> Trace:
    """Return the operations of function(models, arguments), which gives one value per element or several.

    unseen: how many of the first `models` are read, but not handed to the function. Raises NotTraceableError.
    """
    tracer = _Tracer()
    inputs: Any = [tracer.element(torch.float32) for _ in range(models)][unseen:]
    stand_ins = mapped(arguments, tracer.stand_in)
    try:
        traced = function(inputs, stand_ins)
    except NotTraceableError:
        raise
    except Exception as error:  # torch.fx and torch raise what they like; the function itself is tried eagerly anyway
        raise NotTraceableError(f"{type(error).__name__}: {error}") from error
    results: list[Any] = list(traced) if isinstance(traced, list | tuple) else [traced]
    if not all(isinstance(result, fx.Proxy) for result in results):
        raise NotTraceableError(f"its result is {type(results[0]).__name__}, no value of an element")
    return tracer.finished([result.node for result in results])


class _Tracer:
    """The graph as it grows, and per node its sample values."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.tracer = fx.proxy.GraphAppendingTracer(self.graph)
        self.samples: dict[fx.Node, Any] = {}
        self.values: dict[fx.Node, Value] = {}
        self.inputs = self.reals = self.wholes = self.besides = 0
        self.index: fx.Proxy | None = None
        self.literals: list[float] = []

    def element(self, dtype: torch.dtype) -> fx.Proxy:
        """Return a stand-in for the next input."""
        self.inputs += 1
        sample = torch.tensor([0.5, -1.25, 3.0]).to(dtype)
        return self._placeholder(Value("element", dtype, -self.inputs), sample)

    def stand_in(self, leaf: Any) -> fx.Proxy:
        """Return a stand-in for a leaf of the arguments."""
        if isinstance(leaf, Index):
            if self.index is None:
                self.index = self._placeholder(Value("element", torch.int64, 0), torch.arange(SAMPLES))
            return self.index
        if isinstance(leaf, Beside):
            self.besides += 1
            return self.element(torch.float32)
        if isinstance(leaf, int):
            self.wholes += 1
            return self._placeholder(Value("whole", torch.int64, self.wholes - 1), torch.tensor(1))
        if isinstance(leaf, float):
            self.reals += 1
            return self._placeholder(Value("real", torch.float32, self.reals - 1), torch.tensor(0.5))
        raise NotTraceableError(f"an argument is {type(leaf).__name__}; give numbers, texts, Index or Beside")

    def _placeholder(self, value: Value, sample: Tensor) -> fx.Proxy:
        node = self.graph.placeholder(f"p{len(self.samples)}")
        self.values[node], self.samples[node] = value, sample
        return fx.Proxy(node, self.tracer)

    def finished(self, results: Sequence[fx.Node]) -> Trace:
        """Return the operations that the results need, in order."""
        needed = _ancestors(results)
        if self.index is not None:
            self.values[self.index.node] = Value("element", torch.int64, -self.inputs - 1)
        operations: list[Operation] = []
        for node in self.graph.nodes:
            if node in needed and node.op != "placeholder":
                self._take(node, operations)
        # Reals handed in come behind the literals, of which there now are as many as there will be.
        shift = len(self.literals)
        shifted = tuple(
            replace(operation, operands=tuple(_shifted(operand, shift) for operand in operation.operands))
            for operation in operations
        )
        indexed = self.index is not None and self.index.node in needed
        values = tuple(_shifted(self.values[result], shift) for result in results)
        return Trace(self.inputs, self.besides, shifted, values, tuple(self.literals), indexed)

    def _take(self, node: fx.Node, operations: list[Operation]) -> None:
        name, operands, options = _called(node)
        sample_of = lambda value: self.samples[value] if isinstance(value, fx.Node) else value  # noqa: E731
        try:
            sample = _done(
                node, [fx.map_arg(operand, sample_of) for operand in operands], fx.map_arg(options, sample_of)
            )
        except NotTraceableError:
            raise
        except Exception as error:
            raise NotTraceableError(f"{name}: {type(error).__name__}: {error}") from error
        self.samples[node] = sample
        if not isinstance(sample, Tensor):
            return  # a dtype, a device: used by an operation, no value of its own
        if name in IDENTITIES:
            self.values[node] = self._value(operands[0])
            return
        if name in FILLED:
            number = FILLED[name] if FILLED[name] is not None else operands[2] if name == "new_full" else operands[1]
            self.values[node] = self._number(number, sample.dtype)
            return
        meant, wanted = _meant(name, list(operands), dict(options))
        values = tuple(self._value(operand) for operand in wanted)
        if all(value.kind != "element" for value in values):
            raise NotTraceableError(f"{name} of numbers alone; work it out in `arguments`, where it is done in float64")
        common = sample.dtype
        if meant in COMPARISONS:
            common = torch.result_type(*(fx.map_arg(operand, sample_of) for operand in wanted))
        elif meant in ("cast", "bits", "isfinite", "invert"):
            common = values[0].dtype
        operations.append(Operation(meant, values, common, sample.dtype))
        self.values[node] = Value("element", sample.dtype, len(operations))

    def _value(self, operand: Any) -> Value:
        if isinstance(operand, fx.Node):
            if operand not in self.values:
                raise NotTraceableError(f"'{operand}' is no value of an element")
            return self.values[operand]
        if isinstance(operand, bool):
            return Value("baked", torch.bool, number=operand)
        if isinstance(operand, int):
            return Value("baked", torch.int64, number=operand)
        if isinstance(operand, float):
            return self._number(operand, torch.float32)
        raise NotTraceableError(f"an operand is {type(operand).__name__}")

    def _number(self, number: Any, dtype: torch.dtype) -> Value:
        if isinstance(number, fx.Node):
            return self._value(number)
        if dtype != torch.float32 or float(number) in BAKED:
            return Value("baked", dtype, number=number)
        self.literals.append(float(number))
        return Value("real", torch.float32, -len(self.literals))


def _shifted(value: Value, by: int) -> Value:
    """Number the reals: literals, which are negative until now, come first."""
    if value.kind != "real":
        return value
    return Value("real", value.dtype, -value.position - 1 if value.position < 0 else value.position + by)


IDENTITIES = {"contiguous", "clone", "detach", "reshape"}
FILLED: dict[str, float | None] = {"zeros_like": 0.0, "ones_like": 1.0, "new_full": None, "full_like": None}
"""Operations that make a tensor of one number, and the number (None: an operand)."""
BINARY = {
    "add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "div": "div",
    "maximum": "maximum", "minimum": "minimum",
    "lt": "lt", "le": "le", "gt": "gt", "ge": "ge", "eq": "eq", "ne": "ne", "and": "and", "or": "or", "xor": "xor",
    "logical_and": "and", "logical_or": "or", "rshift": "rshift", "lshift": "lshift",
}  # fmt: skip
COMPARISONS = {"lt", "le", "gt", "ge", "eq", "ne"}
# No square root: torch's own is not correctly rounded on processors where it comes from MKL (a sixth of the results
# are off by one bit), so it has no bytes that all devices share.
UNARY = {
    "neg": "neg", "abs": "abs", "sign": "sign", "round": "round", "floor": "floor", "invert": "invert",
    "logical_not": "invert", "square": "square", "reciprocal": "reciprocal", "isfinite": "isfinite",
}  # fmt: skip


def _called(node: fx.Node) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))
    return str(name).strip("_"), node.args, dict(node.kwargs)


def _done(node: fx.Node, operands: Sequence[Any], options: Mapping[str, Any]) -> Any:
    if node.op == "call_method":
        if str(node.target).endswith("_") and not str(node.target).startswith("_"):
            raise NotTraceableError(f"{node.target} writes in place")
        return getattr(operands[0], str(node.target))(*operands[1:], **options)
    assert callable(node.target)
    return node.target(*operands, **options)


def _meant(name: str, operands: list[Any], options: dict[str, Any]) -> tuple[str, list[Any]]:
    """Return the operation in a word that a loop knows, and its operands."""
    if name in ("to", "float", "double", "int") or (
        name == "view" and operands[1:] and isinstance(operands[1], torch.dtype)
    ):
        return ("bits" if name == "view" else "cast"), operands[:1]
    if name in ("clamp", "clip"):
        low, high = (
            options.get(key, operands[at] if len(operands) > at else None) for key, at in (("min", 1), ("max", 2))
        )
        if low is not None and high is not None:
            return "clamp", [operands[0], low, high]
        return ("clamp_max", [operands[0], high]) if low is None else ("clamp_min", [operands[0], low])
    if options:
        raise NotTraceableError(f"{name} with {', '.join(options)}")
    if name in ("where", "clamp_min", "clamp_max"):
        return name, operands
    if (name in BINARY and len(operands) == 2) or (name in UNARY and len(operands) == 1):
        return BINARY.get(name) or UNARY[name], operands
    raise NotTraceableError(f"'{name}' is not known as an operation on one element")


def _ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    ancestors: set[fx.Node] = set()
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node not in ancestors:
            ancestors.add(node)
            waiting.extend(node.all_input_nodes)
    return ancestors
