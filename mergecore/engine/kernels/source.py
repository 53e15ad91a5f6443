"""A trace as a loop in C++: it has torch's own values, one rounding per operation, and nothing fused or reordered.

The same text serves the processor (a shared library, the compiler vectorises its loop) and a CUDA device (a thread for
each element). There are three kinds of loops: the first stores a number per element in the dtype of the file, the
second counts bit patterns into bins, the third adds numbers up in float64, in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from mergecore.engine.kernels.trace import Operation, Trace, Value
from mergecore.tensors.torch_dtypes import DTYPE_NAMES

C_TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.int32: "int32_t",
    torch.int64: "int64_t",
    torch.bool: "bool",
}
STORED = {torch.bfloat16: "uint16_t", torch.float16: "uint16_t", torch.float32: "float", torch.float64: "double"}
"""Dtypes of files that a loop reads and writes, and their C++ types."""
SHORT = {dtype: DTYPE_NAMES[dtype].lower() for dtype in STORED}
COUNT_BLOCK = 1024
"""Patterns that are worked out together before they are counted one by one."""
BINS = 1 << 16
GROUP = 16
"""Elements that a count skips together."""
LANES = 256
"""Sums that are formed beside each other: element i of a grid block is added to sum number i modulo LANES."""
COPIES = 2
"""Copies of the bins, counted into in turn; the counts are their sum."""

HEADER = r"""
#ifdef __CUDACC_RTC__
typedef unsigned short uint16_t; typedef unsigned int uint32_t; typedef int int32_t; typedef signed char int8_t;
typedef long long int64_t; typedef unsigned long long uint64_t;
#define HERE static __device__ __forceinline__
HERE uint32_t bits_of(float x) { return __float_as_uint(x); }
HERE float float_of(uint32_t u) { return __uint_as_float(u); }
#else
#include <cmath>
#include <cstdint>
#include <cstring>
#define HERE static inline
HERE uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
HERE float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
#endif
HERE bool not_finite(float x) { return (bits_of(x) & 0x7f800000u) == 0x7f800000u; }
HERE float widen_f32(float x) { return x; }
HERE float widen_f64(double x) { return (float)x; }
HERE float widen_bf16(uint16_t h) { return float_of((uint32_t)h << 16); }
HERE float widen_f16(uint16_t h) {
  // The exponent is moved by a product with 2^112, which is exact, for subnormal numbers too.
  float magnitude = float_of(((uint32_t)h & 0x7fffu) << 13) * 5192296858534827628530496329220096.0f;
  uint32_t infinite = (h & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
  return float_of(bits_of(magnitude) | infinite | ((uint32_t)(h & 0x8000u) << 16));
}
HERE float narrow_f32(float x) { return x; }
HERE double narrow_f64(float x) { return (double)x; }
HERE uint16_t narrow_bf16(float x) {
  uint32_t u = bits_of(x);
  return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
HERE uint16_t narrow_f16(float x) {
  uint32_t u = bits_of(x), sign = u & 0x80000000u, m = u ^ sign;
  uint32_t normal = (m + 0xc8000fffu + ((m >> 13) & 1u)) >> 13;
  uint32_t small = bits_of(float_of(m) + 0.5f) - 0x3f000000u;
  uint32_t held = m >= 0x47800000u ? 0x7c00u : m < 0x38800000u ? small : normal;
  return (uint16_t)(held | (sign >> 16));
}
HERE bool lost_f32(float x) { return not_finite(x); }
HERE bool lost_f64(double x) { return not_finite((float)x); }
HERE bool lost_bf16(uint16_t h) { return (h & 0x7f80u) == 0x7f80u; }
HERE bool lost_f16(uint16_t h) { return (h & 0x7c00u) == 0x7c00u; }
"""


Out = torch.dtype | Literal["counts", "sums"]
"""What becomes of the results: values are stored in a dtype or summed, int32 patterns are counted."""


@dataclass(frozen=True)
class Stored:
    """An array that a loop reads: the base, an expert or what lies beside. delta: it is a delta, not weights."""

    dtype: torch.dtype
    delta: bool = False


@dataclass(frozen=True)
class Loop:
    """A loop over elements. inputs: the base, where there is one, the experts, and what lies beside, as stored."""

    trace: Trace
    inputs: tuple[Stored, ...]
    base: bool
    on: Literal["weights", "deltas"]
    out: Out
    slots: int = 0
    """Of a count, per result: the high half-words inside which low ones are counted; 0: high ones are counted."""

    @cached_property
    def text(self) -> str:
        """The C++ source."""
        body = _body(self)
        return HEADER + {"counts": _count, "sums": _sum}.get(str(self.out), _store)(self, body)


def _name(value: Value) -> str:
    if value.kind == "element":
        return f"v{value.position}" if value.position > 0 else f"x{-value.position}"
    return f"{'r' if value.kind == 'real' else 'k'}{value.position}"


def _baked(number: float | int | bool, dtype: torch.dtype) -> str:
    if dtype.is_floating_point:
        return f"{float(number)!r}{'f' if dtype == torch.float32 else ''}"
    if dtype == torch.bool:
        return "true" if number else "false"
    return f"({C_TYPES[dtype]})({int(number)}LL)"


def _as(value: Value, dtype: torch.dtype) -> str:
    if value.kind == "baked":
        return _baked(value.number, dtype)
    if value.kind == "real" and dtype == torch.float64:
        return f"d{value.position}"
    name = _name(value)
    if value.dtype == dtype:
        return name
    if dtype == torch.bool:
        return f"({name} != 0)"
    return f"(({C_TYPES[dtype]}){name})"


def _wrapped(sign: str, left: str, right: str, dtype: torch.dtype) -> str:
    """Integers wrap around, as in torch. In C++ only unsigned ones may, so the operation is done on those."""
    unsigned = {torch.int32: "uint32_t", torch.int64: "uint64_t"}.get(dtype)
    if unsigned is None:
        return f"{left} {sign} {right}"
    return f"({C_TYPES[dtype]})(({unsigned}){left} {sign} ({unsigned}){right})"


_COMPARED = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_ARITHMETIC = {"add": "+", "sub": "-", "mul": "*"}
_BITWISE = {"and": "&", "or": "|", "xor": "^"}


def _expression(operation: Operation) -> str:
    """Return the C++ expression of an operation. It does what torch does at every edge: −0, equal numbers."""
    operands = [_as(value, operation.common) for value in operation.operands]
    if operation.name in _COMPARED:
        return f"{operands[0]} {_COMPARED[operation.name]} {operands[1]}"
    if operation.name in _ARITHMETIC:
        return _wrapped(_ARITHMETIC[operation.name], operands[0], operands[1], operation.dtype)
    if operation.name in _BITWISE:
        return f"{operands[0]} {_BITWISE[operation.name]} {operands[1]}"
    if operation.name == "where":
        chosen = [_as(value, operation.dtype) for value in operation.operands[1:]]
        return f"{_as(operation.operands[0], torch.bool)} ? {chosen[0]} : {chosen[1]}"
    if operation.name == "bits":
        return {torch.int32: f"(int32_t)bits_of({operands[0]})", torch.float32: f"float_of((uint32_t){operands[0]})"}[
            operation.dtype
        ]
    if operation.name == "div" and operation.operands[0].kind != "element":
        # In torch a number over a tensor is the tensor's reciprocal times the number.
        return f"(1.0f / {operands[1]}) * {operands[0]}"
    return _UNCOMMON[operation.name](operands, operation.dtype)


def _sign(operands: Sequence[str], dtype: torch.dtype) -> str:
    return f"({C_TYPES[dtype]})(({operands[0]} > 0) - ({operands[0]} < 0))"


_UNCOMMON: dict[str, Callable[[Sequence[str], torch.dtype], str]] = {
    "div": lambda operands, dtype: f"{operands[0]} / {operands[1]}",
    "neg": lambda operands, dtype: (
        f"-{operands[0]}" if dtype.is_floating_point else _wrapped("-", "0", operands[0], dtype)
    ),
    "abs": lambda operands, dtype: (
        f"float_of(bits_of({operands[0]}) & 0x7fffffffu)"
        if dtype == torch.float32
        else f"{operands[0]} < 0 ? -{operands[0]} : {operands[0]}"
    ),
    "sign": _sign,
    "round": lambda operands, dtype: f"rintf({operands[0]})",
    "floor": lambda operands, dtype: f"floorf({operands[0]})",
    "square": lambda operands, dtype: f"{operands[0]} * {operands[0]}",
    "reciprocal": lambda operands, dtype: f"1.0f / {operands[0]}",
    "isfinite": lambda operands, dtype: f"!not_finite({operands[0]})",
    "invert": lambda operands, dtype: f"!{operands[0]}" if dtype == torch.bool else f"~{operands[0]}",
    "cast": lambda operands, dtype: (
        f"{operands[0]} != 0" if dtype == torch.bool else f"({C_TYPES[dtype]}){operands[0]}"
    ),
    "maximum": lambda operands, dtype: f"{operands[0]} > {operands[1]} ? {operands[0]} : {operands[1]}",
    "minimum": lambda operands, dtype: f"{operands[0]} < {operands[1]} ? {operands[0]} : {operands[1]}",
    "clamp": lambda operands, dtype: (
        f"({operands[0]} < {operands[1]} ? {operands[1]} : {operands[0]}) > {operands[2]} ? {operands[2]} : "
        f"({operands[0]} < {operands[1]} ? {operands[1]} : {operands[0]})"
    ),
    "clamp_min": lambda operands, dtype: f"{operands[0]} < {operands[1]} ? {operands[1]} : {operands[0]}",
    "clamp_max": lambda operands, dtype: f"{operands[0]} > {operands[1]} ? {operands[1]} : {operands[0]}",
    "rshift": lambda operands, dtype: f"{operands[0]} >> {operands[1]}",
    "lshift": lambda operands, dtype: _wrapped("<<", operands[0], operands[1], dtype),
}


def _body(loop: Loop) -> str:
    """Return the statements for element i: they widen and check the inputs and do the operations; results: y0, y1 …"""
    trace, lines = loop.trace, ["bool lost = false;"]
    models = len(loop.inputs) - trace.beside
    for position, stored in enumerate(loop.inputs, start=1):
        lines.append(f"const float a{position} = widen_{SHORT[stored.dtype]}(in{position}[i]);")
    for position, stored in enumerate(loop.inputs, start=1):
        ground = loop.base and position == 1
        form = f"a{position}"
        if not ground and position <= models and loop.base:
            if loop.on == "deltas" and not stored.delta:
                form = f"a{position} - a1"
            elif loop.on == "weights" and stored.delta:
                form = f"a1 + a{position}"
        lines.append(f"const float x{position} = {form};")
        # A delta of finite models can overflow, and that of a base that is not finite never is: it says all.
        covered = ground and loop.on == "deltas" and any(not stored.delta for stored in loop.inputs[1:models])
        if position <= models and not covered:
            lines.append(f"lost |= not_finite(x{position});")
    if trace.indexed:
        lines.append(f"const int64_t x{trace.inputs + 1} = start + i;")
    for number, operation in enumerate(trace.operations, start=1):
        lines.append(f"const {C_TYPES[operation.dtype]} v{number} = {_expression(operation)};")
    for number, value in enumerate(trace.results):
        exact = loop.out == "sums" and value.dtype == torch.float64
        kind = torch.int32 if loop.out == "counts" else torch.float64 if exact else torch.float32
        lines.append(f"const {C_TYPES[kind]} y{number} = {_as(value, kind)};")
    return "\n".join(lines)


def _unpacked(loop: Loop) -> str:
    """Return the declarations of the loop's arguments as constants."""
    numbers = [value for operation in loop.trace.operations for value in operation.operands] + list(loop.trace.results)
    real = sorted({value.position for value in numbers if value.kind == "real"})
    whole = sorted({value.position for value in numbers if value.kind == "whole"})
    lines = [f"const double d{at} = reals[{at}]; const float r{at} = (float)d{at};" for at in real]
    return "\n".join(lines + [f"const int64_t k{position} = wholes[{position}];" for position in whole])


def _arrays(loop: Loop) -> str:
    return "\n".join(
        f"const {STORED[stored.dtype]}* __restrict in{position} = (const {STORED[stored.dtype]}*)in[{position - 1}];"
        for position, stored in enumerate(loop.inputs, start=1)
    )


def _store(loop: Loop, body: str) -> str:
    """A window has fewer than 2^31 elements: with a 32 bit counter, random words for indices take a tenth less time."""
    assert isinstance(loop.out, torch.dtype)
    kind, short = STORED[loop.out], SHORT[loop.out]
    work = f"{body}\nconst {kind} held = narrow_{short}(y0);"
    head = ", ".join(
        f"const {STORED[stored.dtype]}* __restrict in{position}" for position, stored in enumerate(loop.inputs, start=1)
    )
    return f"""
#ifdef __CUDACC_RTC__
extern "C" __global__ void run({head}, {kind}* __restrict out, const double* reals, const int64_t* numbers,
                               int32_t* flags) {{
const int64_t start = numbers[0], count = numbers[1];
const int64_t* const wholes = numbers + 2;
{_unpacked(loop)}
const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
if (i >= count) return;
{work}
out[i] = held;
if (lost) flags[0] = 1;
if (lost_{short}(held)) flags[1] = 1;
}}
#else
extern "C" int32_t run(const void* const* in, void* target, const double* reals, const int64_t* wholes,
                       int64_t start, int64_t count) {{
{_arrays(loop)}
{kind}* __restrict out = ({kind}*)target;
{_unpacked(loop)}
int32_t inputs = 0, results = 0;
for (int32_t i = 0; i < (int32_t)count; i++) {{
{work}
out[i] = held;
inputs |= lost;
results |= lost_{short}(held);
}}
return inputs | (results << 1);
}}
#endif
"""


def _sum(loop: Loop, body: str) -> str:
    """`start` is a multiple of LANES. No lane waits for another one, so the compiler may add several at once."""
    added = [f"lanes[{result * LANES} + j] += (double)y{result};" for result in range(len(loop.trace.results))]
    return f"""
extern "C" int32_t run(const void* const* in, double* __restrict lanes, const double* reals, const int64_t* wholes,
                       int64_t start, int64_t count) {{
{_arrays(loop)}
{_unpacked(loop)}
int32_t inputs = 0;
for (int64_t first = 0; first < count; first += {LANES}) {{
const int64_t size = count - first < {LANES} ? count - first : {LANES};
for (int64_t j = 0; j < size; j++) {{
const int64_t i = first + j;
{body}
inputs |= lost;
{_lines(added)}
}}
}}
return inputs;
}}
"""


def _count(loop: Loop, body: str) -> str:
    """First the bins of many elements, vectorised; then the elements are counted one after another.

    Counts of the same bin that follow each other would wait for each other: they go into copies of the bins in turn.
    What lies in no slot has a bin of its own, and a group of elements that all lie in none is skipped.
    """
    kind = "uint32_t" if loop.slots else "uint16_t"
    constants, places, chosen, counting = [], [], [], []
    for result in range(len(loop.trace.results)):
        number = f"(uint16_t)((y{result} >> 16) + {BINS // 2})"
        if loop.slots:
            number = str(_nowhere(loop.slots))
        for slot in reversed(range(loop.slots)):
            window = f"w{result}_{slot}"
            constants.append(f"const int32_t {window} = (int32_t)windows[{result * loop.slots + slot}];")
            number = (
                f"(y{result} >> 16) == {window} ? (uint32_t)({slot * BINS} + (y{result} & {BINS - 1})) : ({number})"
            )
        places.append(f"alignas(64) {kind} n{result}[{COUNT_BLOCK}];")
        chosen.append(f"n{result}[j] = {number};")
        counting.append(_counted(loop.slots, result))
    return f"""
extern "C" int32_t run(const void* const* in, uint32_t* bins, const double* reals, const int64_t* wholes,
                       int64_t start, int64_t count, const int64_t* windows) {{
{_arrays(loop)}
{_unpacked(loop)}
{_lines(constants)}
{_lines(places)}
int32_t inputs = 0;
for (int64_t first = 0; first < count; first += {COUNT_BLOCK}) {{
const int64_t size = count - first < {COUNT_BLOCK} ? count - first : {COUNT_BLOCK};
for (int64_t j = 0; j < size; j++) {{
const int64_t i = first + j;
{body}
inputs |= lost;
{_lines(chosen)}
}}
{_lines(counting)}
}}
return inputs;
}}
"""


def _counted(slots: int, result: int) -> str:
    """Return the statements that count COUNT_BLOCK elements of one result."""
    size = stride(slots)
    copies = _lines(
        [f"uint32_t* const c{copy} = bins + {result * COPIES + copy} * (int64_t){size};" for copy in range(COPIES)]
    )
    steps = " ".join(f"c{copy}[n{result}[k + {copy}]]++;" for copy in range(COPIES))
    skip = ""
    if slots:
        pairs = " & ".join(f"q[{pair}]" for pair in range(GROUP // 2))
        both = _nowhere(slots) * ((1 << 32) + 1)
        skip = f"""uint64_t q[{GROUP // 2}]; memcpy(q, n{result} + j, sizeof q);
if ((({pairs}) & {both}ull) == {both}ull) continue;"""
    return f"""{{ {copies}
int64_t j = 0;
for (; j + {GROUP} <= size; j += {GROUP}) {{ {skip}
for (int64_t k = j; k < j + {GROUP}; k += {COPIES}) {{ {steps} }} }}
for (; j < size; j++) c0[n{result}[j]]++; }}"""


def _nowhere(slots: int) -> int:
    """Return the bin of what lies in no slot: a bit that no other bin has."""
    return BINS << (slots - 1).bit_length()


def _lines(texts: Sequence[str]) -> str:
    return "\n".join(texts)


def stride(slots: int) -> int:
    """Return the bins of one copy: those of the slots (or of the high half-words) and the one for the rest."""
    return (_nowhere(slots) if slots else BINS) + 16
