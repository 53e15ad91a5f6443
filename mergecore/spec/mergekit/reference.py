"""How mergekit names a model: `path`, `path@revision`, either of them `+lora`, or the same as a mapping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator


def _is_there(text: str) -> bool:
    try:
        return Path(text).exists()
    except OSError:  # no name of a folder, as one that is too long
        return False


def model_and_lora(text: str) -> tuple[str, str]:
    """Split `model+lora`; the second is '' where there is none. Raises ValueError where that can be meant in two ways.

    The name of a folder may hold a '+': a text that is a folder is that folder, and of several '+' the one counts that
    leaves folders on both sides, else on one.
    """
    if "+" not in text or _is_there(text):
        return text, ""
    places = [place for place, letter in enumerate(text) if letter == "+" and 0 < place < len(text) - 1]
    splits = [(text[:place], text[place + 1 :]) for place in places] or [(text.rstrip("+"), "")]
    there = [sum(map(_is_there, split)) for split in splits]
    best = [split for split, count in zip(splits, there, strict=True) if count == max(there)]
    if len(best) > 1:
        raise ValueError(
            f"'{text}' has more than one '+', and can be read in several ways; write {{model: {{path: …}}, "
            "lora: {path: …}}"
        )
    return best[0]


class ModelPath(BaseModel):
    """A folder or a hub id, with a revision where one is given."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    path: str = Field(min_length=1, description="a folder or a hub id")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if _is_there(value):
            return {"path": value}  # a folder may have any name
        path, at, revision = value.partition("@")
        if "@" in revision:
            raise ValueError(f"'{value}' has more than one '@'; write path@revision")
        return {"path": path, "revision": revision or None} if at else {"path": path}

    def __str__(self) -> str:
        return f"{self.path}@{self.revision}" if self.revision else self.path


class Reference(BaseModel):
    """A model: a checkpoint, and where one is given a LoRA adapter on top of it. Equal references are one model."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    model: ModelPath
    lora: ModelPath | None = None
    override_architecture: None = Field(None, description="not supported: tensor names say what a model is made of")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        model, lora = model_and_lora(value)
        return {"model": model, "lora": lora} if lora else {"model": model}

    @model_serializer
    def _as_text(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return f"{self.model}+{self.lora}" if self.lora else str(self.model)
