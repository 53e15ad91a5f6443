"""What a user writes: a spec for a sweep, a recipe for one merge. Typed, checked, and nothing in it is executed."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from mergecore.checkpoints.vocabulary.rules import TokenizerRules
from mergecore.errors import SpecError, nearest
from mergecore.identity.numbers import Numbers
from mergecore.plugins.values import explained
from mergecore.spec.cell_limit import check_cells
from mergecore.spec.search_entry import Searched, searched_from
from mergecore.spec.sizes import Size
from mergecore.spec.sources import BaseSpec, ExpertSpec, SourceSpec, SpecPart
from mergecore.spec.variants import Variant, variants_of
from mergecore.tensors.dtypes import Dtype


class Subsets(SpecPart):
    """How the experts of a count are drawn: subset s of n is the first n experts by hash(seed, s, id), so nested."""

    per_count: Annotated[int, Field(ge=1, description="subsets per count; equal ones are one cell")] = 1
    seed: Annotated[int, Field(ge=0)] = 0


class Validation(SpecPart):
    """Validation items: grid values are chosen on them; test items are then opened for the winners only.

    They are scored for the tasks that decide something alone: held-in ones, or held-out ones where `output.register.by`
    says so, and what a search names. No other task needs any.
    """

    limit: Annotated[int | None, Field(ge=1, description="items a task; none: all of the validation split")] = None


class Evaluate(Numbers):
    """What is measured. Every other key is a setting of the evaluator (limit, batch_size, dtype, num_fewshot …)."""

    model_config = ConfigDict(frozen=True, extra="allow", defer_build=True)

    evaluator: str = "lm_eval"
    path: str | None = Field(None, description="folder of task files; tasks not found there are lm-eval's own")
    version: str | int | None = Field(
        None, description="of your own code; it takes the place of that code's content in the keys of scores"
    )
    held_in: Mapping[str, tuple[str, ...]] = Field(description="category → tasks that experts were trained for")
    held_out: Mapping[str, tuple[str, ...]] = Field({}, description="category → tasks that no expert saw")
    validation: Validation | None = None
    chance: Mapping[str, float] = Field(
        {}, description="task → score of guessing, as the task's metric says it; subtracted in normalised scores"
    )

    @property
    def settings(self) -> dict[str, Any]:
        """The evaluator's own settings."""
        return dict(self.model_extra or {})


class Register(SpecPart):
    """What enters the model registry."""

    name: str = Field(description="name of the registered model")
    alias: str = Field("champion", description="alias that the best cell gets")
    by: Literal["held_in", "held_out"] = Field("held_in", description="the score that decides")


class Output(SpecPart):
    """What is written and what stays."""

    dtype: Dtype | None = Field(None, description="of the files; none: as the base has it")
    shard_size: Size = "5GB"
    keep: Literal["registered", "best", "all", "none"] = Field(
        "registered", description="which models stay on disk: the registered one, the best per method, all, none"
    )
    register_: Register | None = Field(None, alias="register")
    store: str = Field(".mergeloom", description="folder of everything that has been done; shared by all workers")


class Run(SpecPart):
    """Where the work runs; nothing here can change a number."""

    prefect: str | None = Field(None, description="URL of a Prefect API; none: a local server for this run")
    mlflow: str | None = Field(
        None,
        description="tracking URI, as http://host:5000 or sqlite:////folder/mlflow.db (a relative file is seen from "
        "the current folder, and artifacts go beside it); none: MLFLOW_TRACKING_URI, else the store's own database",
    )
    dask: str = Field("local", description="'local', 'gpu' (one worker a device) or a scheduler's address")
    workers: Annotated[int | None, Field(ge=1, le=4096, description="local worker processes; none: one a core")] = None
    memory: Size | None = Field(None, description="memory that a pass may use, 8GB say; none: half of what is free")
    disk: Size | None = Field(None, description="disk that models under way may use; none: half of what is free")
    most_cells: Annotated[int, Field(ge=1, description="a sweep of more cells is refused; raise it if you mean it")] = (
        100_000
    )


class Spec(SpecPart):
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
        held_out = {task for tasks in self.evaluate.held_out.values() for task in tasks}
        for task in self.evaluate.chance:
            if task not in held_in | held_out:
                raise ValueError(f"evaluate.chance: '{task}' is no task here; {nearest(task, held_in | held_out)}")
        for expert in self.experts:
            for task in expert.tasks:
                if task not in held_in:
                    raise ValueError(
                        f"experts.{expert.name}: its task '{task}' stands in no category of evaluate.held_in"
                    )
        return self

    @cached_property
    def variants(self) -> tuple[Variant, ...]:
        """Every method with every combination of its grids; average is always there, and equal ones are one.

        Raises SpecError where they come to more cells than `run.most_cells`.
        """
        check_cells(self.methods, self.select, self.counts, self.subsets.per_count, self.run.most_cells)
        return variants_of(self.methods, self.select, [expert.name for expert in self.experts], self.counts)

    @cached_property
    def searches(self) -> tuple[Searched, ...]:
        """The entries whose values or experts are searched for, each under a label of its own."""
        entries = [(f"methods[{place}]", entry) for place, entry in enumerate(self.methods) if "search" in entry]
        experts = [expert.name for expert in self.experts]
        searches = tuple(searched_from(entry, self.select, experts, where) for where, entry in entries)
        if searches and self.evaluate.validation is None:
            raise SpecError(
                f"{searches[0].where}: a search decides by validation items, and the spec has none; add "
                "evaluate: {validation: {limit: 100}}"
            )
        taken = [variant.label for variant in self.variants] + [search.label for search in searches]
        measured = {
            task
            for side in (self.evaluate.held_in, self.evaluate.held_out)
            for names in side.values()
            for task in names
        }
        for search in searches:
            if taken.count(search.label) > 1:
                raise SpecError(
                    f"{search.where}: another entry is called '{search.label}' too; give it a `label` of its own"
                )
            for task in search.search.tasks:
                if task not in measured:
                    raise SpecError(
                        f"{search.where}.search.tasks: '{task}' is no task of this spec; {nearest(task, measured)}"
                    )
        return searches


def parse_spec(document: Mapping[str, Any], where: str) -> Spec:
    """A checked spec, its methods built once to be checked too. Raises SpecError naming every place that is wrong."""
    try:
        spec = Spec.model_validate(dict(document))
    except ValidationError as error:
        raise SpecError(explained(error, Spec, where)) from None
    _ = spec.variants
    _ = spec.searches
    return spec
