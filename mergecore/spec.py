"""What a user writes: a spec for a sweep, a recipe for one merge. Typed, checked, and nothing in it is executed."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mergecore.errors import SpecError, nearest
from mergecore.layout import SelectRule
from mergecore.method import Method
from mergecore.registry import METHODS, explained, method_from
from mergecore.searched import Searched, searched_from
from mergecore.stack import StackRule
from mergecore.variants import Variant, method_of, variants_of
from mergecore.vocabulary.rules import TokenizerRules

Dtype = Literal["float32", "float16", "bfloat16"]
SAFETENSORS_DTYPE: dict[str, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def _size(text: str) -> str:
    try:
        size_in_bytes(text)
    except SpecError as error:
        raise ValueError(str(error)) from None
    return text


Size = Annotated[str, AfterValidator(_size)]
"""A number of bytes as people write it: 5GB, 500MB."""


class Part(BaseModel):
    """A part of a spec: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class SourceSpec(Part):
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
        return {"source": value, "name": Path(value.partition("@")[0]).name} if isinstance(value, str) else value


class Subsets(Part):
    """How the experts of a count are drawn: subset s of n is the first n experts by hash(seed, s, id), so nested."""

    per_count: Annotated[int, Field(ge=1, description="subsets per count; equal ones are one cell")] = 1
    seed: Annotated[int, Field(ge=0)] = 0


class Validation(Part):
    """Validation items: grid values are chosen on them; test items are then opened for the winners only.

    They are scored for the tasks that decide something alone: held-in ones, or held-out ones where `output.register.by`
    says so, and what a search names. No other task needs any.
    """

    limit: Annotated[int | None, Field(ge=1, description="items a task; none: all of the validation split")] = None


class Evaluate(BaseModel):
    """What is measured. Every other key is a setting of the evaluator (limit, batch_size, dtype, num_fewshot …)."""

    model_config = ConfigDict(frozen=True, extra="allow", defer_build=True)

    evaluator: str = "lm_eval"
    path: str | None = Field(None, description="folder of task files; tasks not found there are lm-eval's own")
    held_in: Mapping[str, tuple[str, ...]] = Field(description="category → tasks that experts were trained for")
    held_out: Mapping[str, tuple[str, ...]] = Field({}, description="category → tasks that no expert saw")
    validation: Validation | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The evaluator's own settings."""
        return dict(self.model_extra or {})


class Register(Part):
    """What enters the model registry."""

    name: str = Field(description="name of the registered model")
    alias: str = Field("champion", description="alias that the best cell gets")
    by: Literal["held_in", "held_out"] = Field("held_in", description="the score that decides")


class Output(Part):
    """What is written and what stays."""

    dtype: Dtype | None = Field(None, description="of the files; none: as the base has it")
    shard_size: Size = "5GB"
    keep: Literal["registered", "best", "all", "none"] = Field(
        "registered", description="which models stay on disk: the registered one, the best per method, all, none"
    )
    register_: Register | None = Field(None, alias="register")
    store: str = Field(".mergeloom", description="folder of everything that has been done; shared by all workers")


class Run(Part):
    """Where the work runs; nothing here can change a number."""

    prefect: str | None = Field(None, description="URL of a Prefect API; none: a local server for this run")
    mlflow: str | None = Field(
        None, description="tracking URI; none: MLFLOW_TRACKING_URI, else the store's own database"
    )
    dask: str = Field("local", description="'local', 'gpu' (one worker a device) or a scheduler's address")
    workers: Annotated[int | None, Field(ge=1, description="local worker processes; none: one a core")] = None
    memory: Size | None = Field(None, description="memory that a pass may use, 8GB say; none: half of what is free")
    disk: Size | None = Field(None, description="disk that models under way may use; none: half of what is free")


class Spec(Part):
    """A sweep: which checkpoints, which methods with which values, how many experts, which evaluations."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="the sweep's identity: letters, digits, . _ -"
    )
    base: BaseSpec
    multitask: SourceSpec | None = None
    experts: tuple[ExpertSpec, ...]
    methods: tuple[Mapping[str, Any], ...]
    counts: tuple[Annotated[int, Field(ge=1)], ...]
    subsets: Subsets = Subsets()
    select: tuple[Mapping[str, Any], ...] = Field(
        (),
        description="rules as in a recipe, for every method that has no `select` of its own; grids may stand in them",
    )
    tokenizer: TokenizerRules | None = Field(
        None, description="the vocabulary of all models, where the checkpoints' differ"
    )
    evaluate: Evaluate
    output: Output = Output()
    run: Run = Run()

    @field_validator("experts")
    @classmethod
    def _named_once(cls, experts: tuple[ExpertSpec, ...]) -> tuple[ExpertSpec, ...]:
        if not experts:
            raise ValueError("at least one expert is needed")
        names = [expert.name for expert in experts]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two experts are called '{twice[0]}'; give each its own name")
        return experts

    @model_validator(mode="after")
    def _fits(self) -> Spec:
        if not self.counts:
            raise ValueError("counts: at least one number of experts is needed, as in counts: [2]")
        for count in self.counts:
            if count > len(self.experts):
                raise ValueError(f"counts: {count} experts are asked for, the pool has {len(self.experts)}")
        held_in = {task for tasks in self.evaluate.held_in.values() for task in tasks}
        for expert in self.experts:
            for task in expert.tasks:
                if task not in held_in:
                    raise ValueError(
                        f"experts.{expert.name}: its task '{task}' stands in no category of evaluate.held_in"
                    )
        return self

    @cached_property
    def variants(self) -> tuple[Variant, ...]:
        """Every method with every combination of its grids; average is always there, and equal ones are one."""
        return variants_of(self.methods, self.select, [expert.name for expert in self.experts], self.counts)

    @cached_property
    def searches(self) -> tuple[Searched, ...]:
        """The entries whose values or experts are searched for, each under a label of its own."""
        entries = [(f"methods[{place}]", entry) for place, entry in enumerate(self.methods) if "search" in entry]
        experts = [expert.name for expert in self.experts]
        found = tuple(searched_from(entry, self.select, experts, where) for where, entry in entries)
        if found and self.evaluate.validation is None:
            raise SpecError(
                f"{found[0].where}: a search decides by validation items, and the spec has none; add "
                "evaluate: {validation: {limit: 100}}"
            )
        taken = [variant.label for variant in self.variants] + [one.label for one in found]
        measured = {
            task for side in (self.evaluate.held_in, self.evaluate.held_out) for held in side.values() for task in held
        }
        for one in found:
            if taken.count(one.label) > 1:
                raise SpecError(f"{one.where}: another entry is called '{one.label}' too; give it a `label` of its own")
            for task in one.search.tasks:
                if task not in measured:
                    raise SpecError(
                        f"{one.where}.search.tasks: '{task}' is no task of this spec; {nearest(task, measured)}"
                    )
        return found


class Recipe(Part):
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


def size_in_bytes(text: str) -> int:
    """'5GB' as bytes, with decimal units."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)B", text.strip())
    if found is None:
        raise SpecError(f"'{text}' is no size; write a number and a unit, as in 8GB or 500MB")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping a YAML file holds. Raises SpecError with line and column where it is not YAML."""
    held = read_documents(path)
    if len(held) > 1:
        raise SpecError(
            f"{path} holds {len(held)} documents (between lines of ---); only mergekit's form may have several"
        )
    return held[0]


def read_documents(path: Path) -> tuple[dict[str, Any], ...]:
    """The mappings of a YAML file's documents, at least one. Raises SpecError with line and column."""
    try:
        held = list(yaml.load_all(path.read_text(encoding="utf-8"), Loader=_Loader))
    except FileNotFoundError:
        beside = sorted(other.name for other in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        raise SpecError(f"{path} does not exist" + (f"; there is {', '.join(beside[:5])}" if beside else "")) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise SpecError(f"{path}{place}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise SpecError(f"{path} is not valid YAML: {error}") from None
    found = [document for document in held if document is not None]  # a file may begin or end with ---
    for document in found or [None]:
        if not isinstance(document, dict):
            kind = "is empty" if document is None else f"holds a {type(document).__name__}"
            raise SpecError(f"{path} {kind}; a spec or recipe is a mapping of keys, as in `method: average`")
    return tuple(found)


class _Loader(yaml.SafeLoader):
    """YAML where a key that stands twice is an error: the first would be ignored without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_spec(held: Mapping[str, Any], where: str) -> Spec:
    """A checked spec, its methods built once to be checked too. Raises SpecError naming every place that is wrong."""
    try:
        spec = Spec.model_validate(dict(held))
    except ValidationError as error:
        raise SpecError(explained(error, Spec, where)) from None
    _ = spec.variants
    _ = spec.searches
    return spec


def parse_recipe(held: Mapping[str, Any], where: str) -> Recipe:
    """A checked recipe. Raises SpecError."""
    if "merge_method" in held or "slices" in held:
        raise SpecError(f"{where} is in mergekit's form; `mergeloom merge` takes it, and --show prints it in ours")
    kind = METHODS.get(str(held.get("method")))
    if kind is not None:
        known = {*Recipe.model_fields, *kind.model_fields}
        strange = [str(key) for key in held if key not in known]
        if strange:
            raise SpecError("; ".join(f"{where}.{key}: {_strange(key, known)}" for key in strange))
    try:
        recipe = Recipe.model_validate(dict(held))
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


def as_yaml(value: Any) -> str:
    """YAML text of plain values, keys in the order given."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


def names_of(items: Sequence[ExpertSpec]) -> tuple[str, ...]:
    """The experts' names."""
    return tuple(item.name for item in items)
