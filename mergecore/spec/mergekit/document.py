"""mergekit's schema: one document of a recipe file, checked. Unknown keys are errors that name the nearest known
one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from mergecore.errors import SpecError
from mergecore.identity.numbers import Numbers
from mergecore.plugins.values import explained
from mergecore.spec.mergekit.reference import Reference
from mergecore.tensors.dtypes import Dtype


def _plain(value: Any) -> Any:
    """torch.bfloat16 as bfloat16, as mergekit reads it."""
    return value.removeprefix("torch.") if isinstance(value, str) else value


def _of_model(value: Any) -> Any:
    """model:./a as ./a: how early versions of mergekit wrote a model's tokenizer."""
    return value.removeprefix("model:") if isinstance(value, str) else value


TheirDtype = Annotated[Dtype, BeforeValidator(_plain)]
Bound = Annotated[int, Field(ge=0)]
Parameters = Annotated[Mapping[str, Any], Field(description="values of the merge method")]


class DocumentPart(Numbers):
    """A part of a document: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, value: Any) -> Any:
        """A key with nothing behind it counts as left out."""
        return (
            {key: entry for key, entry in value.items() if entry is not None} if isinstance(value, Mapping) else value
        )


class ModelInput(DocumentPart):
    """A model that takes part with all of its layers."""

    model: Reference
    parameters: Parameters = Field({})


class SliceInput(ModelInput):
    """A model that takes part with some of its layers."""

    layer_range: Annotated[tuple[Bound, Bound], Field(description="first layer, and the one after the last")]

    @model_validator(mode="after")
    def _has_layers(self) -> SliceInput:
        if self.layer_range[0] >= self.layer_range[1]:
            raise ValueError(f"layer_range {list(self.layer_range)} holds no layer: the end is not included")
        return self

    @property
    def count(self) -> int:
        """Number of layers."""
        return self.layer_range[1] - self.layer_range[0]


class OutputSlice(DocumentPart):
    """Layers of the result, made of as many layers of each source."""

    sources: Annotated[tuple[SliceInput, ...], Field(min_length=1)]
    base_model: Reference | None = None
    residual_weight: None = Field(None, description="not supported: mergekit itself makes no use of it")
    parameters: Parameters = Field({})

    @model_validator(mode="after")
    def _equally_long(self) -> OutputSlice:
        counts = [source.count for source in self.sources]
        if len(set(counts)) > 1:
            raise ValueError(f"sources have {', '.join(map(str, counts))} layers: all must have as many")
        return self


class Inputs(DocumentPart):
    """What a model or a module of one is made of: whole models, or slices of them."""

    slices: Annotated[tuple[OutputSlice, ...], Field(min_length=1)] | None = None
    models: Annotated[tuple[ModelInput, ...], Field(min_length=1)] | None = None
    parameters: Parameters = Field({})


class Module(Inputs):
    """A part of a model with layers of its own: an encoder, a text decoder."""

    @model_validator(mode="after")
    def _one_form(self) -> Module:
        if (self.slices is None) == (self.models is None):
            raise ValueError("a module holds either 'models' or 'slices'")
        return self


class ModelToken(DocumentPart):
    """The embedding of a token as another model has it."""

    kind: Literal["model_token"]
    model: Reference
    token_id: Annotated[int | None, Field(ge=0)] = None
    token: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> ModelToken:
        if (self.token is None) == (self.token_id is None):
            raise ValueError("give either 'token' or 'token_id'")
        return self


class NoToken(DocumentPart):
    """An embedding of zeros."""

    kind: Literal["zero"]


class TokenEntry(DocumentPart):
    """Where the embedding of one token comes from."""

    source: ModelToken | NoToken | Reference | None = None
    force: bool = Field(False, description="also where every model has the token")


class TokenizerRule(DocumentPart):
    """The tokenizer of the result."""

    source: Literal["union", "base"] | Reference = "union"
    tokens: Mapping[str, TokenEntry] = {}
    pad_to_multiple_of: Annotated[int, Field(ge=1, le=1 << 20)] | None = None


class Document(Inputs):
    """One merge, as mergekit's YAML says it."""

    name: str | None = Field(None, description="what other documents of the file call its result")
    merge_method: str
    modules: Annotated[Mapping[str, Module], Field(min_length=1)] | None = None
    base_model: Reference | None = None
    dtype: TheirDtype | None = Field(None, description="of the file; mergekit computes in it too, we in float32")
    out_dtype: TheirDtype | None = Field(None, description="of the file, where it is another than `dtype`")
    tokenizer_source: Annotated[Literal["union", "base"] | Reference | None, BeforeValidator(_of_model)] = None
    tokenizer: TokenizerRule | None = None
    chat_template: str | None = None
    random_seed: Annotated[int, Field(ge=0, description="seed of random masks (mergekit's --random-seed)")] = 0

    @model_validator(mode="after")
    def _one_form(self) -> Document:
        ways = [key for key in ("models", "slices", "modules") if getattr(self, key) is not None]
        if len(ways) != 1:
            raise ValueError(
                f"give exactly one of 'models', 'slices' and 'modules' ({' and '.join(ways) or 'none'} given)"
            )
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise ValueError("give 'tokenizer' or 'tokenizer_source', not both")
        return self

    @property
    def inputs(self) -> Mapping[str, Inputs]:
        """What each module is made of; '' stands for the whole model."""
        return self.modules if self.modules is not None else {"": self}

    def references(self) -> tuple[Reference, ...]:
        """Every model that takes part, the base first, then in the order of the document."""
        return tuple(dict.fromkeys(self._references()))

    def _references(self) -> Iterator[Reference]:
        if self.base_model is not None:
            yield self.base_model
        for models in self.inputs.values():
            for model in models.models or ():
                yield model.model
            for out in models.slices or ():
                yield from (source.model for source in out.sources)
                if out.base_model is not None:
                    yield out.base_model


def is_mergekit(document: Mapping[str, Any]) -> bool:
    """Whether a mapping is in mergekit's form rather than in ours."""
    return "merge_method" in document or "slices" in document


def document_from(document: Mapping[str, Any], where: str) -> Document:
    """The checked document. Raises SpecError naming every place that is wrong."""
    try:
        return Document.model_validate(dict(document))
    except ValidationError as error:
        raise SpecError(explained(error, Document, where)) from None
