"""Makes one model from one recipe: a directory that `transformers` loads, written once."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mergecore.engine.executor import Executor
from mergecore.errors import MergeloomError, SpecError, StoreError, masked
from mergecore.events import Report
from mergecore.execution.fetch import fetch
from mergecore.execution.lanes import run_works
from mergecore.execution.outcome import Done
from mergecore.execution.place import Place, drop_models, snapshots_of
from mergecore.formats.card import model_card
from mergecore.formats.companions import write_chat_template, write_companions
from mergecore.formats.finished import finished_merge
from mergecore.formats.whole_directory import WORK, whole_directory
from mergecore.identity.keys import Step
from mergecore.native.library import Library
from mergecore.planning.data import ExpertData, uses
from mergecore.planning.merge_builder import Data, MergeBuilder
from mergecore.planning.pool import Member, Pool, resolve_pool
from mergecore.planning.work import MergeWork, Work
from mergecore.plugins.evaluator import Evaluator
from mergecore.plugins.model_statistic import ModelStatistic
from mergecore.plugins.own_code import OwnCode, code_of, folder_on_path
from mergecore.plugins.product import Published
from mergecore.registry import product_of
from mergecore.spec.recipe import Recipe
from mergecore.spec.sizes import size_in_bytes
from mergecore.spec.sources import BaseSpec, Resolver
from mergecore.spec.variants import method_of
from mergecore.spec.yaml_files import as_yaml
from mergecore.store.store import Store
from mergecore.tensors.dtypes import CONFIG_DTYPE, SAFETENSORS_DTYPE

MERGEKIT = "mergekit.yml"
"""The recipe as it was written, where that was in mergekit's form."""


@dataclass(frozen=True)
class WrittenModel:
    """A written model: its folder, content digest, bytes, warnings, and the seconds of each stage."""

    folder: Path
    digest: str
    size: int
    warnings: tuple[str, ...]
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Origin:
    """mergekit's form that a recipe was read from. called: {folder: name} of results that do not stay."""

    text: str
    called: Mapping[str, str] = field(default_factory=dict)


def merge_recipe(
    recipe: Recipe,
    out: Path,
    resolve: Resolver,
    executor: Executor,
    report: Report,
    *,
    durable: bool = False,
    library: Library | None = None,
    memory: int | None = None,
    store: Path | None = None,
    origin: Origin | None = None,
) -> WrittenModel:
    """Make the recipe's model in `out`. It is written as `out`.tmp and renamed. A recipe with `lora` goes to
    `make_recipe`.

    durable: fsync before the rename. store: the folder that keeps statistics and chains for later merges; None: they go
    with the draft. origin: what the recipe was read from, where it was not written in our form; its text is kept beside
    the
    model.

    Raise a MergeloomError for what cannot be made. Then nothing is left at `out` or beside it.
    """
    if os.path.lexists(out):  # said before anything is fetched
        raise StoreError(f"{out} exists already; choose another name or remove it")
    if recipe.lora is not None:
        raise SpecError("recipe.lora: an adapter of the merge is made by mergecore.recipes.make_recipe.make_recipe")
    clock = _Clock()
    method = recipe.built()
    product = product_of(method)
    if recipe.tokenizer is not None and not product.tokenizer_in_recipe:
        raise SpecError(
            f"recipe.tokenizer: '{method.name}' makes {product.noun}, which has the vocabulary of its base; leave it "
            f"out"
        )
    base, rules = _base(recipe), recipe.tokenizer
    pool = resolve_pool(
        base, recipe.experts, None, resolve, report, recipe.select, recipe.stack, rules, recipe.chat_template
    )
    evaluator = recipe.data.opened() if recipe.data is not None else None
    code = _code(recipe, evaluator)
    builder = MergeBuilder(pool, recipe.select, recipe.dtype, _data(recipe, evaluator, pool.base.companions, code))
    merge = builder.build(method, list(pool.experts.values()))
    with whole_directory(out, durable) as draft:
        place = Place(
            pool,
            Store(store or draft / WORK),
            executor,
            report,
            size_in_bytes(recipe.shard_size),
            evaluator,
            _folder(recipe),
            library=library,
            memory=memory,
            code=code,
        )
        read = snapshots_of(pool) if product.reads_base else [member.snapshot for member in pool.members]
        for snapshot in read:
            fetch(place, snapshot)
        clock.ended("checkpoints")
        _finish(run_for(place, merge.published, clock))
        for snapshot in read:
            if snapshot.source.revision is None:
                snapshot.source.fetch(report)  # a local file written to meanwhile is none of the digests in the card
        published = _settle(place, merge, recipe, draft, origin)
        if origin is not None:
            (draft / MERGEKIT).write_text(masked(origin.text))
    clock.ended("finish")
    return WrittenModel(out, published.digest, published.size, (*pool.warnings, *published.notes), clock.seconds)


class _Clock:
    """Measures the seconds of each stage: checkpoints (found, hashed, checked), scan, merge, finish."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def ended(self, stage: str) -> None:
        """End a stage and begin the next one."""
        now = time.monotonic()
        self.seconds[stage], self._since = now - self._since, now


def _base(recipe: Recipe) -> BaseSpec:
    """Return the base. A method on weights alone takes config and copied tensors from the first expert where none is
    given.
    """
    if recipe.base is not None:
        return recipe.base
    if not recipe.experts:
        raise SpecError("recipe.experts: at least one expert is needed")
    method = recipe.built()
    methods = [method_of(rule, method, "recipe.select") for rule in recipe.select if rule.take == "merge"]
    if any(chosen.needs_base for chosen in methods or [method]):
        raise SpecError(f"recipe.base: method '{recipe.method}' works on task vectors; give the base they start from")
    first = recipe.experts[0]
    return BaseSpec(source=first.source, revision=first.revision, adapter=first.adapter)


def _code(recipe: Recipe, evaluator: Evaluator | None) -> OwnCode:
    if evaluator is None or recipe.data is None:
        return OwnCode()
    return code_of(type(evaluator), evaluator.factories, folder_on_path(), recipe.data.version)


def _data(recipe: Recipe, evaluator: Evaluator | None, companions: str, code: OwnCode) -> Data:
    if evaluator is None or recipe.data is None:
        return _no_data
    return ExpertData(evaluator, _folder(recipe), companions, code=code)


def _folder(recipe: Recipe) -> Path | None:
    return Path(recipe.data.path).absolute() if recipe.data is not None and recipe.data.path else None


def _no_data(member: Member, statistic: ModelStatistic) -> dict[str, Any]:
    raise SpecError(
        f"this method needs '{statistic.name}' of expert '{member.name}' on data, and the recipe names none; write "
        "`data:` with the keys of a sweep's `evaluate:`, and `tasks` in each expert's entry"
    )


def run_for(place: Place, target: Work, clock: _Clock | None = None) -> Done:
    """Complete a work and, level by level, what it must know beforehand."""

    def at_hand(work: Work) -> bool:
        return place.store.is_done(work.step, bytes_needed=True)

    done = Done()
    while not done.failures and (missing := {work.step.key: work for work in target.missing_inputs(at_hand)}):
        ready = [
            work
            for work in missing.values()
            if all(at_hand(known) for works in work.inputs.values() for known in works)
        ]
        done = done.note(run_works(place, ready))
        drop_models(place, [passed for work in ready if at_hand(work) for passed in work.passed_on])
    clock = clock or _Clock()
    clock.ended("scan")
    done = done if done.failures else done.note(run_works(place, [target]))
    clock.ended("merge")
    return done


def _finish(done: Done) -> None:
    if done.failures:
        raise MergeloomError(next(iter(done.failures.values())))


def _settle(place: Place, merge: MergeWork, recipe: Recipe, draft: Path, read_from: Origin | None) -> Published:
    """Put the product, what goes with it, and its card into the draft."""
    contents, product, base = finished_merge(place.store, place.pool, merge), merge.product, place.pool.base
    dtype = SAFETENSORS_DTYPE[recipe.dtype] if recipe.dtype else None
    published = product.publish(contents, draft, dtype)
    place.store.drop(merge.published.step)
    if product.companions:
        dtypes = sorted({info.dtype for info in merge.outputs.values()} & set(CONFIG_DTYPE))
        write_companions(draft, base, place.folders[base.weights], dtypes)
        if recipe.chat_template is not None:
            write_chat_template(draft, recipe.chat_template)
    origin = {**_origin(place.pool, merge.published.step, contents.numbers), **published.card}
    if seen := uses(merge):
        origin["looked_at"] = [str(use) for use in seen]
    lines = product.card_lines(published.card)
    _write_card(draft, _pinned(recipe, place.pool), origin, lines, place.pool.warnings, read_from)
    return replace(published, notes=(*published.notes, *origin["learned"].get("warnings", ())))


def _write_card(
    draft: Path,
    recipe: dict[str, Any],
    origin: dict[str, Any],
    of_product: Sequence[str],
    warnings: Sequence[str],
    read_from: Origin | None,
) -> None:
    """Write README.md and mergeloom.yaml. Results that do not stay go by the names that mergekit's form gave them."""
    remark = ""
    if read_from and (renamed := _called(recipe, read_from.called)) != recipe:
        recipe, origin = renamed, _called(origin, read_from.called)
        remark = f"Other documents of {MERGEKIT} made some of its inputs on the way: run that file to make it again."
    card = model_card(recipe, origin, None, of_product, warnings)
    (draft / "README.md").write_text(f"{card}\n{remark}\n" if remark else card)
    (draft / "mergeloom.yaml").write_text((f"# {remark}\n" if remark else "") + as_yaml(recipe))


def _called(value: Any, names: Mapping[str, str]) -> Any:
    """Return plain values with the names of folders in place of their paths."""
    if isinstance(value, Mapping):
        return {key: _called(value, names) for key, value in value.items()}
    if isinstance(value, list):
        return [_called(value, names) for value in value]
    return names.get(value, value) if isinstance(value, str) else value


def _pinned(recipe: Recipe, pool: Pool) -> dict[str, Any]:
    """Return the recipe as it can be run again, with hub revisions as commits."""
    pinned: dict[str, Any] = recipe.model_dump(mode="json", exclude_defaults=True)
    snapshots = [member.snapshot.as_stored for member in pool.experts.values()]
    ground = pool.base.as_stored
    told = [*zip(pinned["experts"], snapshots, strict=True), *([(pinned["base"], ground)] if "base" in pinned else [])]
    sources = [(entry, snapshot.source) for entry, snapshot in told]
    sources += [
        (entry["adapter"], snapshot.adapter_source) for entry, snapshot in told if snapshot.adapter_source is not None
    ]
    for entry, source in sources:
        if source.revision is not None:
            entry.update(source=str(entry["source"]).partition("@")[0], revision=source.revision)
    return pinned


def _origin(pool: Pool, step: Step, result: Any) -> dict[str, Any]:
    base, experts = pool.base.as_stored, {name: member.snapshot.as_stored for name, member in pool.experts.items()}
    return {
        "base": {"source": base.source.uri, "weights": base.weights},
        "experts": [
            {"name": name, "source": snapshot.source.uri, "weights": snapshot.weights}
            for name, snapshot in experts.items()
        ],
        "step": step.as_json(),
        "kept_density": pool.by_name(result.get("kept_density", {})),
        "learned": result.get("learned", {}),
        "drawn_with": {kind: pool.by_name(ids) for kind, ids in result.get("drawn_with", {}).items()},
    }
