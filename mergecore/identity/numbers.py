"""Booleans are not numbers, though Python and pydantic count with them: `density: true` is a mistake, not 1."""

from __future__ import annotations

import functools
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationInfo, field_validator

Value = TypeVar("Value")


class Numbers(BaseModel):
    """A model whose fields for numbers refuse true and false."""

    @field_validator("*", mode="before")
    @classmethod
    def _no_booleans(cls, value: Any, info: ValidationInfo) -> Any:
        if _has_boolean(value) and info.field_name is not None:
            kinds = _kinds(cls, info.field_name)
            if bool not in kinds and not kinds.isdisjoint((int, float)):
                raise ValueError("must be a number, not true or false")
        return value


def _has_boolean(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_has_boolean, value)))


@functools.cache
def _kinds(model: type[BaseModel], field: str) -> frozenset[Any]:
    """Return the plain types that a field takes, at any depth."""
    return frozenset(_plain(model.model_fields[field].annotation)) if field in model.model_fields else frozenset()


def _plain(annotation: Any) -> set[Any]:
    inner = get_args(annotation)
    return set().union(*map(_plain, inner)) if inner else {annotation}
