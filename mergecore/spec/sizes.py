"""Sizes in bytes as people write them."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

from mergecore.errors import SpecError


def _size(text: str) -> str:
    try:
        size_in_bytes(text)
    except SpecError as error:
        raise ValueError(str(error)) from None
    return text


Size = Annotated[str, AfterValidator(_size)]
"""A number of bytes as people write it: 5GB, 500MB."""


def size_in_bytes(text: str) -> int:
    """'5GB' as bytes, with decimal units."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?)\s*([kKMGT]?)B", text.strip())
    if match is None:
        raise SpecError(f"'{text}' is no size; write a number and a unit, as in 8GB or 500MB")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))
