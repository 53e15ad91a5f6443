"""A trace as one loop in C++: every value as torch has it, one rounding per operation, nothing fused or reordered.

The same text serves the processor (a shared library, its loop vectorised by the compiler) and a CUDA device (one
element a thread). Three loops are written: one gives a number per element, in the dtype of the file; one counts bit
patterns into bins; one adds numbers up, in float64 and in one order.
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
"""Dtypes of files that can be read and written, and as what."""
SHORT = {dtype: DTYPE_NAMES[dtype].lower() for dtype in STORED}
COUNT_BLOCK = 1024
"""Patterns that are worked out at once before they are counted one by one."""
BINS = 1 << 16
GROUP = 16
"""Elements of a count that are passed over together."""
LANES = 256
"""Sums that are formed beside each other: element i of a block of the grid is added to that of i modulo LANES."""
COPIES = 2
"""Bins that are counted into in turn; the counts are their sum."""

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
"""What becomes of a function's results: values are stored in a dtype or summed, int32 patterns are counted."""


@dataclass(frozen=True)
class Stored:
    """An array that is read: the base, an expert or what lies beside. delta: it holds a delta already (an adapter)."""

    dtype: torch.dtype
    delta: bool = False


@dataclass(frozen=True)
class Loop:
    """One loop: `inputs` are base (where there is one), experts and what lies beside, as they are stored."""

    trace: Trace
    inputs: tuple[Stored, ...]
    base: bool
    on: Literal["weights", "deltas"]
    out: Out
    windows: int = 0
    """Of a count, per result: 0 counts high half-words, else low ones inside so many windows."""

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
    """Integer arithmetic wraps around, as torch's does; in C++ only that of unsigned numbers may."""
    unsigned = {torch.int32: "uint32_t", torch.int64: "uint64_t"}.get(dtype)
    if unsigned is None:
        return f"{left} {sign} {right}"
    return f"({C_TYPES[dtype]})(({unsigned}){left} {sign} ({unsigned}){right})"


_COMPARED = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_ARITHMETIC = {"add": "+", "sub": "-", "mul": "*"}
_BITWISE = {"and": "&", "or": "|", "xor": "^"}


def _expression(one: Operation) -> str:
    """The C++ expression of one operation, with torch's own choice at every edge (signed zeros, −0, equal numbers)."""
    held = [_as(value, one.common) for value in one.operands]
    if one.name in _COMPARED:
        return f"{held[0]} {_COMPARED[one.name]} {held[1]}"
    if one.name in _ARITHMETIC:
        return _wrapped(_ARITHMETIC[one.name], held[0], held[1], one.dtype)
    if one.name in _BITWISE:
        return f"{held[0]} {_BITWISE[one.name]} {held[1]}"
    if one.name == "where":
        chosen = [_as(value, one.dtype) for value in one.operands[1:]]
        return f"{_as(one.operands[0], torch.bool)} ? {chosen[0]} : {chosen[1]}"
    if one.name == "bits":
        return {torch.int32: f"(int32_t)bits_of({held[0]})", torch.float32: f"float_of((uint32_t){held[0]})"}[one.dtype]
    if one.name == "div" and one.operands[0].kind != "element":
        return f"(1.0f / {held[1]}) * {held[0]}"  # a number over a tensor is its reciprocal times the number, in torch
    return _UNCOMMON[one.name](held, one.dtype)


def _sign(held: Sequence[str], dtype: torch.dtype) -> str:
    return f"({C_TYPES[dtype]})(({held[0]} > 0) - ({held[0]} < 0))"


_UNCOMMON: dict[str, Callable[[Sequence[str], torch.dtype], str]] = {
    "div": lambda held, dtype: f"{held[0]} / {held[1]}",
    "neg": lambda held, dtype: f"-{held[0]}" if dtype.is_floating_point else _wrapped("-", "0", held[0], dtype),
    "abs": lambda held, dtype: (
        f"float_of(bits_of({held[0]}) & 0x7fffffffu)"
        if dtype == torch.float32
        else f"{held[0]} < 0 ? -{held[0]} : {held[0]}"
    ),
    "sign": _sign,
    "round": lambda held, dtype: f"rintf({held[0]})",
    "floor": lambda held, dtype: f"floorf({held[0]})",
    "square": lambda held, dtype: f"{held[0]} * {held[0]}",
    "reciprocal": lambda held, dtype: f"1.0f / {held[0]}",
    "isfinite": lambda held, dtype: f"!not_finite({held[0]})",
    "invert": lambda held, dtype: f"!{held[0]}" if dtype == torch.bool else f"~{held[0]}",
    "cast": lambda held, dtype: f"{held[0]} != 0" if dtype == torch.bool else f"({C_TYPES[dtype]}){held[0]}",
    "maximum": lambda held, dtype: f"{held[0]} > {held[1]} ? {held[0]} : {held[1]}",
    "minimum": lambda held, dtype: f"{held[0]} < {held[1]} ? {held[0]} : {held[1]}",
    "clamp": lambda held, dtype: (
        f"({held[0]} < {held[1]} ? {held[1]} : {held[0]}) > {held[2]} ? {held[2]} : "
        f"({held[0]} < {held[1]} ? {held[1]} : {held[0]})"
    ),
    "clamp_min": lambda held, dtype: f"{held[0]} < {held[1]} ? {held[1]} : {held[0]}",
    "clamp_max": lambda held, dtype: f"{held[0]} > {held[1]} ? {held[1]} : {held[0]}",
    "rshift": lambda held, dtype: f"{held[0]} >> {held[1]}",
    "lshift": lambda held, dtype: _wrapped("<<", held[0], held[1], dtype),
}


def _body(loop: Loop) -> str:
    """Statements for element i: inputs widened and checked, forms taken, operations done; results are y0, y1 …"""
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
        covered = ground and loop.on == "deltas" and any(not one.delta for one in loop.inputs[1:models])
        if position <= models and not covered:
            lines.append(f"lost |= not_finite(x{position});")
    if trace.indexed:
        lines.append(f"const int64_t x{trace.inputs + 1} = start + i;")
    for number, one in enumerate(trace.operations, start=1):
        lines.append(f"const {C_TYPES[one.dtype]} v{number} = {_expression(one)};")
    for number, value in enumerate(trace.results):
        exact = loop.out == "sums" and value.dtype == torch.float64
        kind = torch.int32 if loop.out == "counts" else torch.float64 if exact else torch.float32
        lines.append(f"const {C_TYPES[kind]} y{number} = {_as(value, kind)};")
    return "\n".join(lines)


def _unpacked(loop: Loop) -> str:
    """The arguments of the loop as constants."""
    numbers = [value for one in loop.trace.operations for value in one.operands] + list(loop.trace.results)
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
    """A chunk has fewer than 2^31 elements: counted in 32 bits, random words for its indices take a tenth less time."""
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
    """Lane by lane: `start` is a multiple of LANES, and no sum waits for another, so the compiler may do several at once."""
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
    """The bin of every element first, vectorised, then one element after another counted: into copies of the bins in turn,
    for counts of the same bin that follow each other would wait for each other. What lies in no window has a bin of its own;
    groups of elements that all lie in none are passed over.
    """
    kind = "uint32_t" if loop.windows else "uint16_t"
    constants, places, chosen, counting = [], [], [], []
    for result in range(len(loop.trace.results)):
        number = f"(uint16_t)((y{result} >> 16) + {BINS // 2})"
        if loop.windows:
            number = str(_nowhere(loop.windows))
        for slot in reversed(range(loop.windows)):
            window = f"w{result}_{slot}"
            constants.append(f"const int32_t {window} = (int32_t)windows[{result * loop.windows + slot}];")
            number = (
                f"(y{result} >> 16) == {window} ? (uint32_t)({slot * BINS} + (y{result} & {BINS - 1})) : ({number})"
            )
        places.append(f"alignas(64) {kind} n{result}[{COUNT_BLOCK}];")
        chosen.append(f"n{result}[j] = {number};")
        counting.append(_counted(loop.windows, result))
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


def _counted(windows: int, result: int) -> str:
    """The statements that count one block of one result."""
    size = stride(windows)
    held = _lines(
        [f"uint32_t* const c{copy} = bins + {result * COPIES + copy} * (int64_t){size};" for copy in range(COPIES)]
    )
    steps = " ".join(f"c{copy}[n{result}[k + {copy}]]++;" for copy in range(COPIES))
    skip = ""
    if windows:
        pairs = " & ".join(f"q[{pair}]" for pair in range(GROUP // 2))
        both = _nowhere(windows) * ((1 << 32) + 1)
        skip = f"""uint64_t q[{GROUP // 2}]; memcpy(q, n{result} + j, sizeof q);
if ((({pairs}) & {both}ull) == {both}ull) continue;"""
    return f"""{{ {held}
int64_t j = 0;
for (; j + {GROUP} <= size; j += {GROUP}) {{ {skip}
for (int64_t k = j; k < j + {GROUP}; k += {COPIES}) {{ {steps} }} }}
for (; j < size; j++) c0[n{result}[j]]++; }}"""


def _nowhere(windows: int) -> int:
    """The bin of what lies in no window: a bit that no other bin has."""
    return BINS << (windows - 1).bit_length()


def _lines(texts: Sequence[str]) -> str:
    return "\n".join(texts)


def stride(windows: int) -> int:
    """Bins of one copy: those of the windows (or of the high half-words) and the one for the rest."""
    return (_nowhere(windows) if windows else BINS) + 16
