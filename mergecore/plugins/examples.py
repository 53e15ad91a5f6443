"""The values that a method is tried with: by the contract tests, the golden values and the page of the methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Values = Mapping[str, Any]
"""A method's values as YAML has them; what is left out has its default."""


@dataclass(frozen=True)
class Examples:
    """Sets of values that cover what a method can do: at least one set for each way through its code.

    The contract tests merge three small experts with all of them. Of `golden` the results are kept beside the tests: a
    change of these numbers needs a new version of the method.
    """

    golden: Sequence[Values] = ({},)
    others: Sequence[Values] = ()

    def __iter__(self) -> Iterator[Values]:
        yield from self.golden
        yield from self.others
