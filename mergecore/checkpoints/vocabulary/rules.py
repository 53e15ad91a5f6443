"""The rules of a recipe for the result's vocabulary, and for tokens that some models lack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from mergecore.identity.numbers import Numbers

BASE = "base"
UNION = "union"


class Rule(Numbers):
    """A part of the rules: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class TokenOf(Rule):
    """The row that another token has in a model."""

    kind: Literal["model_token"] = "model_token"
    model: str = Field(description="'base' or an expert's name")
    token: str | None = Field(None, description="the token as its tokenizer writes it")
    token_id: Annotated[int | None, Field(ge=0, description="or its id there")] = None

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenOf:
        if (self.token is None) == (self.token_id is None):
            raise ValueError("give either 'token' or 'token_id'")
        return self


class NoRow(Rule):
    """A row of zeros."""

    kind: Literal["zero"]


class TokenRule(Rule):
    """Where the row of one token comes from."""

    source: TokenOf | NoRow | str | None = Field(
        None,
        description="'base' or an expert that has it, a token of one, or {kind: zero}; none: as for any other token",
    )
    to: Literal["missing", "all"] = Field(
        "missing", description="who gets that row: the models that lack the token, or all of them"
    )

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _has_a_source(self) -> TokenRule:
        if self.to == "all" and self.source is None:
            raise ValueError("'to: all' needs a 'source': whose row are all of them to get?")
        return self


class TokenizerRules(Rule):
    """The vocabulary of the result; a plain string stands for its `source`."""

    source: str = Field(UNION, description="'union' of all vocabularies, the 'base's, or that of a named expert")
    missing: Literal["base", "mean"] = Field(
        "base",
        description="the row of a token in a model that lacks it: the base's, or where the base lacks it too the mean "
        "of the experts that have it; 'mean': always that mean",
    )
    conflicts: Literal["refuse", "first"] = Field(
        "refuse",
        description="where tokenizers contradict each other: refuse, or hold to the first (the base, then the experts "
        "in order)",
    )
    pad_to_multiple_of: Annotated[
        int | None,
        Field(
            ge=1, le=1 << 20, description="rows of embeddings and head are a multiple of this; none: one for each token"
        ),
    ] = None
    tokens: Mapping[str, TokenRule] = Field({}, description="token → where its row comes from; a new token is added")

    @model_validator(mode="before")
    @classmethod
    def _from_text(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value
