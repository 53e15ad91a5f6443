"""Regular expressions that stand in files: compiled once, and matched in bounded time.

The standard library tries every way to match: an expression of twenty letters can keep it busy for years. The package
`regex` reads the same expressions and stops after a time.
"""

from __future__ import annotations

import functools
import re
from typing import Any

from mergecore.errors import SpecError

LONGEST = 1000
"""Characters of an expression at most."""
SECONDS = 1.0
"""Time for one name. An expression that people write takes a microsecond."""


def check_pattern(text: str) -> None:
    """Raise ValueError where a text is no regular expression."""
    if len(text) > LONGEST:
        raise ValueError(f"a regular expression has {LONGEST:,} characters at most; this one has {len(text):,}")
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"not a regular expression: {error}") from None


def search(text: str, name: str) -> bool:
    """Return whether an expression matches anywhere in a name. Raises SpecError where it cannot be used."""
    return _matched(text, name, "search")


def matches(text: str, name: str) -> bool:
    """Return whether an expression matches from the start of a name on. Raises SpecError where it cannot be used."""
    return _matched(text, name, "match")


def _matched(text: str, name: str, how: str) -> bool:
    try:
        return getattr(_compiled(text), how)(name, timeout=SECONDS) is not None
    except TimeoutError:
        raise SpecError(
            f"the regular expression '{text:.80}' takes more than {SECONDS:g} s on '{name:.80}'; write it without a "
            "repeat inside a repeat, as in (a+)+"
        ) from None


@functools.lru_cache(maxsize=256)
def _compiled(text: str) -> Any:
    import regex

    try:
        check_pattern(text)
        return regex.compile(text, regex.VERSION0)
    except (ValueError, regex.error) as error:
        raise SpecError(f"'{text:.80}': {error}") from None
