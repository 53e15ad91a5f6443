"""How mergekit names a model: `path`, `path@revision`, either of them `+lora`, or the same as a mapping."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator


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
        model, _, lora = value.partition("+")
        if "+" in lora:
            raise ValueError(f"'{value}' has more than one '+'; write model+lora")
        return {"model": model, "lora": lora} if lora else {"model": model}

    @model_serializer
    def _as_text(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return f"{self.model}+{self.lora}" if self.lora else str(self.model)
