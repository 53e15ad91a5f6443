"""A recipe: one merge, as people write it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ConfigDict, Field, ValidationError, field_validator

from mergecore.checkpoints.select import SelectRule
from mergecore.checkpoints.stack import StackRule
from mergecore.checkpoints.vocabulary.rules import TokenizerRules
from mergecore.errors import SpecError, nearest
from mergecore.plugins.evaluator import Evaluator
from mergecore.plugins.method import Method
from mergecore.plugins.values import explained
from mergecore.registry import METHODS, evaluator_from, method_from
from mergecore.spec.sizes import Size
from mergecore.spec.sources import BaseSpec, ExpertSpec, SpecPart
from mergecore.spec.sweep import Spec
from mergecore.spec.variants import method_of
from mergecore.tensors.dtypes import Dtype


class LoraRules(SpecPart):
    """An adapter that is written in place of the merge."""

    rank: int = Field(ge=1, description="rank of every layer's update, at most")
    modules: tuple[str, ...] = Field(
        (), description="layers to take: names, their last parts or shell patterns; none: every linear layer"
    )


class RecipeData(SpecPart):
    """Where a method that learns finds its items, which `tasks` of each expert name. Every other key is a setting of
    the evaluator, as in `evaluate` of a sweep.
    """

    model_config = ConfigDict(frozen=True, extra="allow", defer_build=True)

    evaluator: str = "lm_eval"
    path: str | None = Field(None, description="folder of task files; tasks not found there are lm-eval's own")

    version: str | int | None = Field(
        None, description="of your own code; it takes the place of that code's content in keys"
    )

    def opened(self) -> Evaluator:
        """The evaluator with its settings."""
        return evaluator_from(self.evaluator, dict(self.model_extra or {}), "recipe.data", RecipeData.model_fields)


class Recipe(SpecPart):
    """One merge. Every key besides these is a parameter of the method."""

    model_config = ConfigDict(frozen=True, extra="allow", defer_build=True)

    method: str
    base: BaseSpec | None = None
    experts: tuple[ExpertSpec, ...]
    dtype: Dtype | None = None
    select: tuple[SelectRule, ...] = ()
    stack: tuple[StackRule, ...] = Field((), description="the layers of the result, from the first; none: the base's")
    tokenizer: TokenizerRules | None = Field(
        None, description="the result's vocabulary: union, base, an expert's name, or rules; none: all have the base's"
    )
    chat_template: str | None = Field(None, description="Jinja text of the chat template; none: the tokenizer's own")
    shard_size: Size = "5GB"
    data: RecipeData | None = Field(
        None, description="where a method that learns from items finds them; a sweep says it in `evaluate`"
    )
    lora: LoraRules | None = Field(
        None, description="write the adapter of this rank that is nearest to the merge; none: the merge itself"
    )

    @field_validator("experts")
    @classmethod
    def _told_apart(cls, experts: tuple[ExpertSpec, ...]) -> tuple[ExpertSpec, ...]:
        """Names label, they never decide: where several folders are called alike, their whole paths are the names."""
        if not experts:
            raise ValueError("at least one expert is needed")
        names = [expert.name for expert in experts]
        told = tuple(
            expert.model_copy(update={"name": expert.source}) if names.count(expert.name) > 1 else expert
            for expert in experts
        )
        names = [expert.name for expert in told]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"'{twice[0]}' stands there twice; list each checkpoint once")
        return told

    def built(self) -> Method:
        """The method with its parameters."""
        return method_from(self.method, dict(self.model_extra or {}), "recipe", Recipe.model_fields)


ENTRY = ("search", "label", "counts")
"""Keys of an entry of a spec's methods that are no values of its method."""


def parse_recipe(document: Mapping[str, Any], where: str) -> Recipe:
    """A checked recipe. Raises SpecError."""
    if "merge_method" in document or "slices" in document:
        raise SpecError(f"{where} is in mergekit's form; `mergeloom merge` takes it, and --show prints it in ours")
    kind = METHODS.get(str(document.get("method")))
    if kind is not None:
        known = {*Recipe.model_fields, *kind.model_fields}
        strange = [str(key) for key in document if key not in known]
        if strange:
            raise SpecError("; ".join(f"{where}.{key}: {_strange(key, known)}" for key in strange))
    try:
        recipe = Recipe.model_validate(dict(document))
    except ValidationError as error:
        raise SpecError(explained(error, Recipe, where)) from None
    method = recipe.built()
    for number, rule in enumerate(recipe.select):
        method_of(rule, method, f"{where}.select.{number}")
    return recipe


def _strange(key: str, known: Iterable[str]) -> str:
    """What is wrong with a key that a recipe does not know."""
    if key in ENTRY:
        return "stands in an entry of a sweep's methods; a recipe makes one model"
    if key in Spec.model_fields:
        return "belongs to the spec of a sweep (`mergeloom sweep`); a recipe makes one model"
    return f"unknown key; {nearest(key, known)}"
