"""Plans, methods and checkpoints as text for the terminal."""

from __future__ import annotations

import itertools
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from flows.cli.terminal import table
from flows.session.limits import readable
from flows.session.session import Session
from flows.session.settings import Settings
from mergecore.checkpoints.architectures import layer_of
from mergecore.checkpoints.snapshot import Snapshot
from mergecore.errors import SpecError, nearest
from mergecore.recipes.extract_lora import Extracted
from mergecore.registry import METHODS
from mergecore.reporting.scores import Trajectory
from mergecore.reporting.trajectories import outcome
from mergecore.spec.recipe_documents import Translator, read_orders
from mergecore.spec.sources import Resolver
from mergecore.sweeps.cost import Cost, PassCost

SHOWN_PASSES = 12
SHOWN_TRIALS = 8
WIDTHS = (20, 42, 26, 56)
"""Characters at most in the columns of a table of parameters."""


def plan_text(session: Session, found: Cost, cells: bool) -> str:
    """The plan in a dozen lines, or with every cell."""
    plan, frontier = session.plan, session.frontier
    kinds = Counter(cell.kind for cell in plan.cells)
    methods = sorted({cell.method for cell in plan.cells if cell.method})
    lines = [
        f"sweep {session.spec.name}: {found.cells} cells"
        f" ({kinds['merge']} merges by {', '.join(methods)}; {found.cells - kinds['merge']} baselines)",
        f"done: {found.cells_done} cells; still to do: {found.statistics} statistics, {found.merges} merges in "
        f"{len(found.passes)} passes, {found.evaluations} evaluations",
        *passes_text(found.passes),
        f"reads up to {readable(found.bytes_read)}, writes {readable(found.bytes_written)}, at most {readable(found.disk)} of "
        f"models on disk at a time, {readable(found.peak_memory)} of memory at the peak",
        f"expected time: {duration(found.seconds)} ({'from what this store measured' if found.measured else 'a guess'})",
        settings_text(session.settings),
    ]
    lines += [search_text(way) for way in frontier.trajectories()]
    lines += [f"note: {note}" for note in session.notes]
    refused = [cell for cell in plan.cells if cell.refused]
    lines += [f"refused: {cell.name}: {cell.refused}" for cell in refused[:10]]
    if cells:
        rows = [[cell.id, cell.kind, cell.name, _state(frontier, cell), ", ".join(cell.experts)] for cell in plan.cells]
        lines += ["", table(["cell", "kind", "name", "state", "experts"], rows)]
    return "\n".join(lines)


def settings_text(settings: Settings) -> str:
    """What the work may use, and who says so, in a line."""
    workers, memory, disk = settings.workers, settings.memory, settings.disk
    return (
        f"limits: {workers.value} workers ({workers.origin}), {readable(memory.value)} of memory ({memory.origin}), "
        f"{readable(disk.value)} of disk ({disk.origin})"
    )


def search_text(way: Trajectory) -> str:
    """A search in a line: what it found, or what it asks for now and how many models it may ask for in all."""
    if way.state != "open":
        return f"search {outcome(way)}"
    waiting = [one for one in way.trials if one.score is None and not one.reason]
    shown = ", ".join(one.what for one in waiting[:SHOWN_TRIALS]) + (" …" if len(waiting) > SHOWN_TRIALS else "")
    asked = f"round {waiting[0].round} asks for {len(waiting)} model{'s' * (len(waiting) > 1)} ({shown})"
    return f"search {way.name} ({way.by}): {asked}; {len(way.trials) - len(waiting)} tried so far, at most {way.most} in all"


def recipe_text(path: Path, resolve: Resolver) -> str:
    """What a recipe file asks for as recipes of ours, one document for each model; notes stand before as comments."""
    translator = Translator(resolve)
    orders = read_orders(path)
    folders = {order.name: Path(order.name) for order in orders if order.name}
    found = []
    for order in orders:
        translation = translator.translation(order, folders)
        head = [f"# {order.name}"] if order.name else []
        found.append(
            "\n".join([*head, *(f"# note: {note}" for note in translation.notes), _recipe(translation.recipe)])
        )
    return "\n---\n".join(found)


def _recipe(held: Mapping[str, Any]) -> str:
    """A recipe as YAML: a line for each key, and for each entry of the lists that grow long."""
    lines = []
    for key, value in held.items():
        if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
            lines += [f"{key}:", *(f"  - {_flow(entry)}" for entry in value)]
        else:
            lines.append(f"{key}: {_flow(_short(value))}")
    return "\n".join(lines)


def _short(value: Any) -> Any:
    plain = isinstance(value, dict) and set(value) in ({"source"}, {"source", "revision"})
    return "@".join(value.values()) if plain else value


def _flow(value: Any) -> str:
    """A value in one line, a checkpoint as `path@revision`."""
    value = {key: _short(held) for key, held in value.items()} if isinstance(value, dict) else value
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=sys.maxsize)
    return text.removesuffix("\n").removesuffix("\n...")


def passes_text(passes: Sequence[PassCost]) -> list[str]:
    """A line for each of the first passes."""
    lines = [
        f"  {number}. {one.what}: reads {readable(one.read)}, writes {readable(one.written)}, "
        f"{readable(one.memory)} of memory in {one.spans} blocks, {readable(one.disk)} of disk, {duration(one.seconds)}"
        for number, one in enumerate(passes, start=1)
    ]
    rest = len(lines) - SHOWN_PASSES
    return lines[:SHOWN_PASSES] + ([f"  … and {rest} more like the last"] if rest > 0 else [])


def _state(frontier: Any, cell: Any) -> str:
    if cell.refused:
        return "refused"
    if frontier.trouble(cell):
        return "failed"
    return "to do" if any(True for _ in frontier.wanted(cell)) else "done"


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def methods_text() -> str:
    """Return every method in a line, those of installed packages with the package; then those that cannot be used."""
    troubles = {name: METHODS.trouble(name) for name in METHODS}
    kinds = {name: METHODS[name] for name, trouble in troubles.items() if not trouble}
    head = ["method", "what it does", "parameters"]
    rows = [
        [name, (kind.__doc__ or "").strip().partition("\n")[0], ", ".join(kind.model_fields)]
        for name, kind in kinds.items()
    ]
    if any(map(METHODS.package, kinds)):
        head.append("package")
        rows = [[*row, METHODS.package(row[0])] for row in rows]
    broken = [f"cannot be used: {trouble}" for trouble in troubles.values() if trouble]
    return "\n".join([table(head, rows), "", *broken, "`mergeloom methods NAME` tells more of one."])


def method_text(name: str) -> str:
    """One method as docs/methods.md has it: what it is, its source, its parameters with their values and defaults."""
    from flows.cli.methods_page import description, parameters

    if name not in METHODS:
        raise SpecError(f"there is no method '{name}'; {nearest(name, METHODS)}")
    kind = METHODS[name]
    rows = [
        [one.name, one.values.replace("`", ""), one.default.replace("`", ""), one.meaning] for one in parameters(kind)
    ]
    head, *said = description(kind)
    if package := METHODS.package(name):
        said += ["", f"From the package {package}; version {kind.version} of the method."]
    columns = ["parameter", "values", "default", "meaning"]
    return "\n".join([name, "", head.strip("*"), *said, "", table(columns, _wrapped(rows))])


def _wrapped(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """The same with each cell in as many lines as its column is narrow."""
    found = []
    for row in rows:
        cells = [textwrap.wrap(text, width) for text, width in zip(row, WIDTHS, strict=True)]
        found += [list(line) for line in itertools.zip_longest(*cells, fillvalue="")]
    return found


def extraction_text(found: Extracted) -> str:
    """What an extraction lost, per tensor and in total."""
    rows = [[row.tensor, str(row.rank), f"{row.norm:.4g}", f"{row.error:.3%}"] for row in found.rows]
    lines = [table(["tensor", "rank", "norm of its change", "lost"], rows), ""]
    these = f"these {len(found.rows)} layers" if len(found.rows) != 1 else "this layer"
    lines.append(f"lost of the change in {these}: {found.error:.3%}")
    if found.left_out:
        largest = sorted(found.left_out, key=lambda row: -row.norm)[:3]
        names = ", ".join(row.tensor for row in largest)
        lines.append(f"left out: {len(found.left_out)} tensors that changed and are no layers taken here ({names} …)")
    lines.append(f"lost of the whole change: {found.total_error:.3%}")
    return "\n".join(lines)


def inspect_text(snapshot: Snapshot) -> str:
    """What a checkpoint is, from its headers."""
    dtypes = Counter(info.dtype for info in snapshot.tensors.values())
    layers = {layer for name in snapshot.tensors if (layer := layer_of(name)) is not None}
    elements = sum(info.count for info in snapshot.tensors.values())
    lines = [
        f"{snapshot.source.uri}: {'LoRA adapter' if snapshot.kind == 'adapter' else 'full checkpoint'}",
        f"{len(snapshot.tensors)} tensors, {elements:,} parameters, {readable(snapshot.size)}, "
        + ", ".join(f"{count} × {dtype}" for dtype, count in dtypes.most_common()),
    ]
    if layers:
        lines.append(f"{len(layers)} layers ({min(layers)} to {max(layers)})")
    told = (
        "model_type",
        "architectures",
        "vocab_size",
        "tie_word_embeddings",
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "use_rslora",
    )
    lines += [f"{key}: {snapshot.config[key]}" for key in told if snapshot.config.get(key) is not None]
    lines += [f"weights    {snapshot.weights}", f"companions {snapshot.companions}"]
    return "\n".join(lines)
