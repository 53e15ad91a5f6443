"""One recipe, one model: a directory that `transformers` loads, made in this process and written once."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergecore.errors import MergeloomError, SpecError, StoreError, nearest
from mergecore.folded import FoldedSnapshot
from mergecore.identity import Step
from mergecore.kernels.library import Library
from mergecore.mergekit.document import is_mergekit
from mergecore.method import DataStatistic, Report
from mergecore.passes import Executor
from mergecore.plan import MergeBuilder, MergePlan, StatisticPlan
from mergecore.pool import Member, Pool, Resolver, resolve_pool
from mergecore.publish import TORCH_NAMES, model_card, write_chat_template, write_companions, write_tokenizer
from mergecore.recipes import Order, Translator, read_orders
from mergecore.run import Done, Place, fetch, run_merges, run_statistics, snapshots_of
from mergecore.spec import BaseSpec, Recipe, as_yaml, method_of, size_in_bytes
from mergecore.store import State, Store

WORK = ".work"
"""Folder in a draft for what is worked out on the way; it marks the draft as ours."""


@dataclass(frozen=True)
class Made:
    """A written model: where, its content digest, its bytes, what was said aloud on the way, and how long each stage took."""

    folder: Path
    digest: str
    size: int
    warnings: tuple[str, ...]
    seconds: Mapping[str, float]


def merge_file(
    path: Path,
    out: Path,
    resolve: Resolver,
    executor: Executor,
    report: Report,
    *,
    durable: bool = False,
    intermediates: Path | None = None,
    library: Library | None = None,
    memory: int | None = None,
) -> list[Made]:
    """Make what a recipe file asks for, in our form or in mergekit's; of several documents the one without a name is
    `out`, and where all have names each becomes a folder in `out`.

    intermediates: where results that others are made of stay; none: they are removed. Raises a MergeloomError.
    """
    orders = read_orders(path)
    translator, text = Translator(resolve), path.read_text(encoding="utf-8")
    with contextlib.ExitStack() as stack:
        folders = _folders(orders, out, intermediates, stack)
        made = []
        for order in orders:
            recipe, notes = translator.recipe(order, folders)
            origin = text if is_mergekit(order.held) else None
            one = merge_recipe(
                recipe, folders[order.name], resolve, executor, report, durable=durable, library=library,
                memory=memory, origin=origin,
            )  # fmt: skip
            made.append(dataclasses.replace(one, warnings=(*notes, *one.warnings)))
    return [one for one in made if one.folder.exists()]


def _folders(
    orders: Sequence[Order], out: Path, intermediates: Path | None, stack: contextlib.ExitStack
) -> dict[str, Path]:
    """Where each result goes. Raises SpecError where one would be made for nobody."""
    if len(orders) == 1:
        return {orders[0].name: out}
    needed = {name for order in orders for name in order.needs}
    if intermediates is None and all(order.name for order in orders):
        intermediates = out
    for order in orders:
        if intermediates is None and order.name and order.name not in needed:
            raise SpecError(
                f"{order.where}: no other document is made of '{order.name}'; give --intermediates FOLDER to keep it there"
            )
    if intermediates is None:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.absolute().parent)
        stack.callback(shutil.rmtree, made, ignore_errors=True)
        intermediates = Path(made)
    intermediates.mkdir(parents=True, exist_ok=True)
    return {order.name: intermediates / order.name if order.name else out for order in orders}


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
    origin: str | None = None,
) -> Made:
    """Make the recipe's model in `out`, by way of `out`.tmp and a rename; durable: fsync before the rename.

    origin: the text of mergekit's form that the recipe was read from; it is kept beside the model.
    Raises a MergeloomError for what cannot be made; nothing is left at `out` or beside it then.
    """
    if os.path.lexists(out):
        raise StoreError(f"{out} exists already; choose another name or remove it")
    clock = _Clock()
    method = recipe.built()
    names = [expert.name for expert in recipe.experts]
    if recipe.tokenizer is not None and recipe.tokenizer not in names:
        raise SpecError(
            f"recipe.tokenizer: no expert is called '{recipe.tokenizer}'; {nearest(recipe.tokenizer, names)}"
        )
    pool = resolve_pool(_base(recipe), recipe.experts, None, resolve, report, recipe.stack)
    builder = MergeBuilder(pool, recipe.select, recipe.dtype, _no_data)
    plan = builder.build(method, list(pool.experts.values()))
    with _draft(out) as draft:
        place = Place(
            pool,
            Store(draft / WORK),
            executor,
            report,
            size_in_bytes(recipe.shard_size),
            library=library,
            memory=memory,
        )
        for snapshot in snapshots_of(pool):
            fetch(place, snapshot)
        clock.ended("checkpoints")
        _finish(run_all(place, plan, clock))
        for snapshot in snapshots_of(pool):
            if snapshot.source.revision is None:
                snapshot.source.fetch(report)  # a local file written to meanwhile is none of the digests in the card
        made = _settle(place, plan, recipe, draft)
        if origin is not None:
            (draft / "mergekit.yml").write_text(origin)
        if durable:
            _sync(draft)
        os.rename(draft, out)
    if durable:
        _sync_entry(out.absolute().parent)
    clock.ended("finish")
    return Made(out, made, plan.size, pool.warnings, clock.seconds)


class _Clock:
    """Seconds of each stage: checkpoints (found, hashed, checked), scan, merge, finish."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def ended(self, stage: str) -> None:
        """The stage is over, the next one begins."""
        now = time.monotonic()
        self.seconds[stage], self._since = now - self._since, now


@contextlib.contextmanager
def _draft(out: Path) -> Iterator[Path]:
    """`out`.tmp, new and ours alone; gone after an error. What a killed merge left there is removed, nothing else is."""
    draft = out.with_name(out.name + ".tmp")
    try:
        if os.path.lexists(draft):
            _remove_leftover(draft)
        (draft / WORK).mkdir(parents=True)
        handle = os.open(draft, os.O_RDONLY)
    except OSError as error:
        raise StoreError(f"cannot write {out}: {error}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield draft
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise StoreError(f"cannot write {out}: {error}") from error
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    finally:
        os.close(handle)


def _remove_leftover(draft: Path) -> None:
    """Raise StoreError where `draft` is no leftover: something of the user's, or a merge that is under way."""
    if draft.is_symlink() or not (draft / WORK).is_dir():
        raise StoreError(f"{draft}, where the model would be written first, is something else; move it away")
    handle = os.open(draft, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(draft)
    except BlockingIOError:
        raise StoreError(f"{draft} is being written by another merge; wait for it or choose another name") from None
    finally:
        os.close(handle)


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
    return BaseSpec(source=first.source, revision=first.revision)


def _no_data(member: Member) -> dict[str, Any]:
    raise SpecError(
        f"this method needs a statistic of expert '{member.name}' on data, and a recipe names none; write a spec with "
        "`evaluate:` and the experts' tasks, and run `mergeloom sweep`"
    )


def run_all(place: Place, plan: MergePlan, clock: _Clock | None = None) -> Done:
    """The merge and, level by level, what it must know beforehand."""
    done = Done()
    waiting = [one for plans in plan.statistics.values() for group in plans for one in group.with_inputs()]
    pending = {one.step.key: one for one in waiting if not isinstance(one.statistic, DataStatistic)}
    while pending and not done.failures:
        ready = [one for one in pending.values() if not _open_inputs(one, pending)]
        done = done.note(run_statistics(place, ready))
        pending = {key: one for key, one in pending.items() if place.store.state(one.step) is not State.PRESENT}
    clock = clock or _Clock()
    clock.ended("scan")
    done = done if done.failures else done.note(run_merges(place, [plan]))
    clock.ended("merge")
    return done


def _open_inputs(plan: StatisticPlan, pending: dict[str, StatisticPlan]) -> bool:
    return any(one.step.key in pending for plans in plan.inputs.values() for one in plans)


def _finish(done: Done) -> None:
    if done.failures:
        raise MergeloomError(next(iter(done.failures.values())))


def _settle(place: Place, plan: MergePlan, recipe: Recipe, draft: Path) -> str:
    """Move the weights up, put companions and card beside them, remove the work folder; returns the model's digest."""
    record = place.store.record(plan.step)
    assert record is not None
    for name in record.files:
        os.rename(place.store.folder(plan.step) / name, draft / name)
    dtypes = sorted({info.dtype for info in plan.outputs.values() if info.dtype in TORCH_NAMES})
    base = place.pool.base
    write_companions(draft, base, place.folders[base.weights], dtypes)
    if recipe.tokenizer is not None:
        owner = place.pool.experts[recipe.tokenizer].snapshot
        write_tokenizer(draft, owner, place.folders[owner.weights])
    if recipe.chat_template is not None:
        write_chat_template(draft, recipe.chat_template)
    held = _pinned(recipe, place.pool)
    (draft / "README.md").write_text(model_card(held, _origin(place.pool, plan.step, record.result), None))
    (draft / "mergeloom.yaml").write_text(as_yaml(held))
    shutil.rmtree(draft / ".work")
    return record.digest


def _pinned(recipe: Recipe, pool: Pool) -> dict[str, Any]:
    """The recipe as it can be run again: hub revisions are the commits they stood for."""
    held: dict[str, Any] = recipe.model_dump(mode="json", exclude_defaults=True)
    snapshots = [one.snapshot for one in pool.experts.values()]
    told = [*zip(held["experts"], snapshots, strict=True), *([(held["base"], pool.base)] if "base" in held else [])]
    sources = [(entry, snapshot.source) for entry, snapshot in told]
    sources += [(entry["adapter"], one.adapter.source) for entry, one in told if isinstance(one, FoldedSnapshot)]
    for entry, source in sources:
        if source.revision is not None:
            entry.update(source=str(entry["source"]).partition("@")[0], revision=source.revision)
    return held


def _origin(pool: Pool, step: Step, result: Any) -> dict[str, Any]:
    names = {member.id: member.name for member in pool.members}
    kept = {names.get(one, one): share for one, share in result.get("kept_density", {}).items()}
    return {
        "base": {"source": pool.base.source.uri, "weights": pool.base.weights},
        "experts": [
            {"name": one.name, "source": one.snapshot.source.uri, "weights": one.id} for one in pool.experts.values()
        ],
        "step": step.as_json(),
        "kept_density": kept,
    }


def _sync(folder: Path) -> None:
    """Have every file and the folder itself on the disk."""
    for path in [*sorted(folder.rglob("*")), folder]:
        _sync_entry(path)


def _sync_entry(path: Path) -> None:
    """Have one file, or the names in one folder, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
