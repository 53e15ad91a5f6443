"""One recipe, one model: a directory that `transformers` loads, made in this process and written once."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mergecore.checkpoints.adapters import adapter_config
from mergecore.engine.executor import Executor
from mergecore.errors import MergeloomError, SpecError, StoreError
from mergecore.events import Report
from mergecore.execution.fetch import fetch
from mergecore.execution.outcome import Done
from mergecore.execution.passes import run_merges, run_statistics
from mergecore.execution.place import Place, drop_models, snapshots_of
from mergecore.formats.adapter_folder import write_config, write_copy
from mergecore.formats.card import model_card
from mergecore.formats.companions import write_chat_template, write_companions
from mergecore.formats.masks_product import describe, published_name
from mergecore.formats.whole_directory import WORK, whole_directory
from mergecore.identity.keys import Step
from mergecore.native.library import Library
from mergecore.planning.merge_builder import MergeBuilder
from mergecore.planning.plans import MergePlan, StatisticPlan
from mergecore.planning.pool import Member, Pool, resolve_pool
from mergecore.plugins.adapter_method import ADAPTER, AdapterMethod
from mergecore.plugins.chain import BEFORE
from mergecore.spec.recipe import Recipe
from mergecore.spec.sizes import size_in_bytes
from mergecore.spec.sources import BaseSpec, Resolver
from mergecore.spec.variants import method_of
from mergecore.spec.yaml_files import as_yaml
from mergecore.store.results import read_found
from mergecore.store.store import Store
from mergecore.tensors.dtypes import CONFIG_DTYPE, SAFETENSORS_DTYPE

MERGEKIT = "mergekit.yml"
"""The recipe as it was written, where that was in mergekit's form."""


@dataclass(frozen=True)
class Made:
    """A written model: where, its content digest, its bytes, what was said aloud on the way, and how long each stage took."""

    folder: Path
    digest: str
    size: int
    warnings: tuple[str, ...]
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Origin:
    """mergekit's form that a recipe was read from: its text, and by folder what it calls those results that do not stay."""

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
) -> Made:
    """Make the recipe's model in `out`, by way of `out`.tmp and a rename; durable: fsync before the rename.

    store: where what is worked out beforehand stays for later merges (a chain that an expert will join, say); none: it
    goes with the draft. origin: what the recipe was read from, where it was not written in our form; its text is kept
    beside the model.

    Raises a MergeloomError for what cannot be made; nothing is left at `out` or beside it then.
    """
    if os.path.lexists(out):  # said before anything is fetched
        raise StoreError(f"{out} exists already; choose another name or remove it")
    clock = _Clock()
    method = recipe.built()
    if recipe.tokenizer is not None and method.makes == "adapter":
        raise SpecError(
            f"recipe.tokenizer: '{method.name}' makes an adapter, which has the vocabulary of its base; leave it out"
        )
    base, rules = _base(recipe), recipe.tokenizer
    pool = resolve_pool(
        base, recipe.experts, None, resolve, report, recipe.select, recipe.stack, rules, recipe.chat_template
    )
    builder = MergeBuilder(pool, recipe.select, recipe.dtype, _no_data)
    plan = builder.build(method, list(pool.experts.values()))
    with whole_directory(out, durable) as draft:
        place = Place(
            pool,
            Store(store or draft / WORK),
            executor,
            report,
            size_in_bytes(recipe.shard_size),
            library=library,
            memory=memory,
        )
        adapter = plan.statistics[ADAPTER][0] if isinstance(plan.method, AdapterMethod) else None
        read = [member.snapshot for member in pool.members] if adapter else snapshots_of(pool)
        for snapshot in read:  # an adapter is made of adapters: of the base its headers are enough
            fetch(place, snapshot)
        clock.ended("checkpoints")
        if adapter:
            _finish(run_statistics(place, [adapter]))
            clock.ended("merge")
        else:
            _finish(run_all(place, plan, clock))
        for snapshot in read:
            if snapshot.source.revision is None:
                snapshot.source.fetch(report)  # a local file written to meanwhile is none of the digests in the card
        digest, size, said = (
            _settle_adapter(place, adapter, recipe, draft) if adapter else _settle(place, plan, recipe, draft, origin)
        )
        if origin is not None:
            (draft / MERGEKIT).write_text(origin.text)
    clock.ended("finish")
    return Made(out, digest, size, (*pool.warnings, *said), clock.seconds)


class _Clock:
    """Seconds of each stage: checkpoints (found, hashed, checked), scan, merge, finish."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def ended(self, stage: str) -> None:
        """The stage is over, the next one begins."""
        now = time.monotonic()
        self.seconds[stage], self._since = now - self._since, now


def _base(recipe: Recipe) -> BaseSpec:
    """The base; a method on weights alone takes config and untouched tensors from the first expert where none is given."""
    if recipe.base is not None:
        return recipe.base
    if not recipe.experts:
        raise SpecError("recipe.experts: at least one expert is needed")
    method = recipe.built()
    methods = [method_of(rule, method, "recipe.select") for rule in recipe.select if rule.take == "merge"]
    if any(one.needs_base for one in methods or [method]):
        raise SpecError(f"recipe.base: method '{recipe.method}' works on task vectors; give the base they start from")
    first = recipe.experts[0]
    return BaseSpec(source=first.source, revision=first.revision, adapter=first.adapter)


def _no_data(member: Member) -> dict[str, Any]:
    raise SpecError(
        f"this method needs a statistic of expert '{member.name}' on data, and a recipe names none; write a spec with "
        "`evaluate:` and the experts' tasks, and run `mergeloom sweep`"
    )


def run_all(place: Place, plan: MergePlan, clock: _Clock | None = None) -> Done:
    """The merge and, level by level, what it must know beforehand."""

    def at_hand(one: StatisticPlan) -> bool:
        return place.store.is_done(one.step, bytes_needed=True)

    done = Done()
    while not done.failures and (missing := {one.step.key: one for one in plan.missing(at_hand)}):
        ready = [
            one for one in missing.values() if all(at_hand(known) for held in one.inputs.values() for known in held)
        ]
        done = done.note(run_statistics(place, ready))
        drop_models(place, [before for one in ready if at_hand(one) for before in one.inputs.get(BEFORE, ())])
    clock = clock or _Clock()
    clock.ended("scan")
    done = done if done.failures else done.note(run_merges(place, [plan]))
    clock.ended("merge")
    return done


def _finish(done: Done) -> None:
    if done.failures:
        raise MergeloomError(next(iter(done.failures.values())))


Settled = tuple[str, int, tuple[str, ...]]
"""Digest and bytes of what was written, and what is to be said of it."""


def _settle(place: Place, plan: MergePlan, recipe: Recipe, draft: Path, read_from: Origin | None) -> Settled:
    """Put the weights, companions and card into the draft."""
    record = place.store.record(plan.step)
    assert record is not None
    for name in record.files:
        if (published := published_name(plan, name)) is not None:
            _link_or_copy(place.store.folder(plan.step) / name, draft / published)
    place.store.drop(plan.step)
    dtypes = sorted({info.dtype for info in plan.outputs.values() if info.dtype in CONFIG_DTYPE})
    base = place.pool.base
    write_companions(draft, base, place.folders[base.weights], dtypes)
    if recipe.chat_template is not None:
        write_chat_template(draft, recipe.chat_template)
    saved = {"saved": describe(plan, place.pool, draft)} if plan.method.makes == "masks" else {}
    _write_card(draft, place.pool, recipe, plan.step, record.result, saved, read_from.called if read_from else {})
    return record.digest, plan.size, ()


def _settle_adapter(place: Place, plan: StatisticPlan, recipe: Recipe, draft: Path) -> Settled:
    """Put an adapter that was made of adapters into the draft, as PEFT loads it."""
    record, found, base = place.store.record(plan.step), read_found(place.store, plan.step), place.pool.base
    assert record is not None
    dtype = SAFETENSORS_DTYPE[recipe.dtype or "float32"]
    file = write_copy(draft, found.tensors, record.result, plan.selection, dtype)
    configs = [member.snapshot.config for member in place.pool.members]
    config = adapter_config(record.result["ranks"], base.tensors, configs, record.result["fan_in_fan_out"])
    write_config(draft, {**config, "base_model_name_or_path": config["base_model_name_or_path"] or base.source.uri})
    _write_card(draft, place.pool, recipe, plan.step, record.result)
    error = record.result.get("error")
    return file.digest, file.size, () if error is None else (f"of the sum {error:.3%} was lost by the cut to the rank",)


def _write_card(
    draft: Path,
    pool: Pool,
    recipe: Recipe,
    step: Step,
    result: Any,
    more: Mapping[str, Any] = MappingProxyType({}),
    called: Mapping[str, str] = MappingProxyType({}),
) -> None:
    held, told = _pinned(recipe, pool), ""
    origin = {**_origin(pool, step, result), **more}
    if (renamed := _called(held, called)) != held:
        held, origin = renamed, _called(origin, called)
        told = f"Some of its inputs were made on the way, by other documents of {MERGEKIT}: run that file to make it again."
    card = model_card(held, origin, None)
    (draft / "README.md").write_text(f"{card}\n{told}\n" if told else card)
    (draft / "mergeloom.yaml").write_text((f"# {told}\n" if told else "") + as_yaml(held))


def _called(held: Any, names: Mapping[str, str]) -> Any:
    """Plain values with the names of folders in place of their paths."""
    if isinstance(held, Mapping):
        return {key: _called(value, names) for key, value in held.items()}
    if isinstance(held, list):
        return [_called(value, names) for value in held]
    return names.get(held, held) if isinstance(held, str) else held


def _link_or_copy(source: Path, target: Path) -> None:
    """One file under a second name; a copy where the two folders are not on one disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _pinned(recipe: Recipe, pool: Pool) -> dict[str, Any]:
    """The recipe as it can be run again: hub revisions are the commits they stood for."""
    held: dict[str, Any] = recipe.model_dump(mode="json", exclude_defaults=True)
    snapshots = [member.snapshot.as_stored for member in pool.experts.values()]
    ground = pool.base.as_stored
    told = [*zip(held["experts"], snapshots, strict=True), *([(held["base"], ground)] if "base" in held else [])]
    sources = [(entry, snapshot.source) for entry, snapshot in told]
    sources += [
        (entry["adapter"], snapshot.adapter_source) for entry, snapshot in told if snapshot.adapter_source is not None
    ]
    for entry, source in sources:
        if source.revision is not None:
            entry.update(source=str(entry["source"]).partition("@")[0], revision=source.revision)
    return held


def _origin(pool: Pool, step: Step, result: Any) -> dict[str, Any]:
    names = {member.id: member.name for member in pool.members}
    kept = {names.get(one, one): share for one, share in result.get("kept_density", {}).items()}
    base, experts = pool.base.as_stored, {name: member.snapshot.as_stored for name, member in pool.experts.items()}
    return {
        "base": {"source": base.source.uri, "weights": base.weights},
        "experts": [{"name": name, "source": one.source.uri, "weights": one.weights} for name, one in experts.items()],
        "step": step.as_json(),
        "kept_density": kept,
        **({"error": result["error"]} if "error" in result else {}),
    }
