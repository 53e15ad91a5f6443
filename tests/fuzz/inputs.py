"""Documents as a person, a crash or an enemy may leave them: good ones with a few parts replaced, removed or added."""

from __future__ import annotations

import copy
import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

EXAMPLES = int(os.environ.get("FUZZ", "0"))
"""Examples of each test, drawn anew in every run; 0: the few of the suite, the same in every run."""


def budget(examples: int) -> settings:
    """Settings of a test. examples: in the suite. Nothing is kept on the disk."""
    return settings(
        max_examples=EXAMPLES or examples,
        derandomize=not EXAMPLES,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.0, -0.0, 0.5, 1.0, 1.5, 1e300, 1e-320,
    float("inf"), float("-inf"), float("nan"), "", " ", "a", "x" * 5000, "a/b", "../..", "/", "~", "/dev/zero", "base",
    "union", "1", "1e-5", "true", "nan", "*", "[", "/(/", "/(a|b)+$/", "(a+)+$", "{}", "@", "a@b@c", "9" * 400 + "GB", "+", "a+b", "é", "\u2028",
    "\x00", "https://anna:s3cret@host/x", [], {}, [[]], [{}], [None], [1, 2, 3], [0.5, 0.5], {"grid": [1, 2]},
    {"grid": []}, {"grid": 3}, {"source": "x"}, {"kind": "zero"}, {"a": {"b": {"c": []}}}, [[[[[[]]]]]],
]  # fmt: skip
"""Values that have broken something somewhere."""

scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=12)
plain = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4), max_leaves=8)  # fmt: skip
values = st.sampled_from(ODD) | plain


@st.composite
def mutated(draw: st.DrawFn, document: Any, keys: list[str]) -> Any:
    """A copy of a document with one to three changes. keys: what may be added to any mapping."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        target = changed
        while True:
            inner = list(target.values()) if isinstance(target, dict) else list(target)
            below = [value for value in inner if isinstance(value, dict | list) and value]
            if not below or draw(st.booleans()):
                break
            target = draw(st.sampled_from(below))
        if isinstance(target, dict):
            key = draw(st.sampled_from([*target, *keys]))
            if key in target and draw(st.integers(0, 3)) == 0:
                del target[key]
            else:
                target[key] = copy.deepcopy(draw(values))
        else:
            place = draw(st.integers(0, len(target)))
            target[place : place + draw(st.integers(0, 1))] = [copy.deepcopy(draw(values))]
    return changed


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes with a few of them changed, removed, doubled or cut off."""
    bytes_left = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(bytes_left) - 1, 0)))
        kind = draw(st.sampled_from(["set", "cut", "remove", "insert", "double"]))
        if kind == "set" and bytes_left:
            bytes_left[place] = draw(st.integers(0, 255))
        elif kind == "cut":
            del bytes_left[place:]
        elif kind == "remove":
            del bytes_left[place : place + draw(st.integers(1, 9))]
        elif kind == "insert":
            bytes_left[place:place] = draw(st.sampled_from([b"&a ", b"*a", b"[", b"{", b"\n", b"- ", b": ", b"9" * 400, b"\xff", b'"', b"!!", b"<<: ", b"Infinity"]))  # fmt: skip
        else:
            bytes_left[place:place] = bytes_left[place : place + draw(st.integers(1, 30))]
    return bytes(bytes_left)
