"""How a spec names checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, model_validator

from mergecore.checkpoints.sources import Source
from mergecore.errors import masked
from mergecore.identity.numbers import Numbers


class SpecPart(Numbers):
    """A part of a spec: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class SourceSpec(SpecPart):
    """Where a checkpoint or adapter comes from; a plain string stands for its `source`."""

    source: str = Field(description="a directory, or a hub id with an optional @revision")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    adapter: SourceSpec | None = Field(None, description="a LoRA adapter to be folded into the checkpoint")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value


class BaseSpec(SourceSpec):
    """The base model."""

    known_as: str | None = Field(None, description="the hub id that a local folder is a copy of, as adapters record it")


class ExpertSpec(SourceSpec):
    """An expert of the pool."""

    name: str = Field(description="a short name; it labels, it never decides anything")
    tasks: tuple[str, ...] = Field((), description="the held-in tasks it was trained for")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return (
            {"source": value, "name": Path(masked(value).partition("@")[0]).name} if isinstance(value, str) else value
        )


Resolver = Callable[[SourceSpec], Source]
"""Finds the source a spec names; the caller decides about caches, tokens and being offline."""
