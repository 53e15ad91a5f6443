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
from mergecore.errors import SpecError, masked, nearest
from mergecore.recipes.extract_lora import Extracted
from mergecore.recipes.transplant_tokenizer import Transplanted
from mergecore.registry import METHODS
from mergecore.reporting.scores import Trajectory
from mergecore.reporting.trajectories import outcome
from mergecore.spec.recipe_documents import Translator, read_orders
from mergecore.spec.sources import Resolver
from mergecore.sweeps.cost import Cost, PassCost

SHOWN_PASSES = 12
SHOWN_TRIALS = 8
WIDTHS = (26, 42, 26, 56)
"""Characters at most in the columns of a table of parameters."""


def plan_text(session: Session, costs: Cost, cells: bool) -> str:
    """Return the plan in a dozen lines. cells: with a line for each cell."""
    plan, frontier = session.plan, session.frontier
    kinds = Counter(cell.kind for cell in plan.cells)
    methods = sorted({cell.method for cell in plan.cells if cell.method})
    lines = [
        f"sweep {session.spec.name}: {costs.cells} cells"
        f" ({kinds['merge']} merges by {', '.join(methods)}; {costs.cells - kinds['merge']} baselines)",
        f"done: {costs.cells_done} cells; still to do: {costs.statistics} statistics, {costs.merges} merges in "
        f"{len(costs.passes)} passes, {costs.evaluations} evaluations",
        *passes_text(costs.passes),
        f"reads up to {readable(costs.bytes_read)}, writes {readable(costs.bytes_written)}, at most "
        f"{readable(costs.disk)} of models on disk at a time, {readable(costs.peak_memory)} of memory at the peak",
        f"expected time: {duration(costs.seconds)} ({'measured in this store' if costs.measured else 'a guess'})",
        settings_text(session.settings),
    ]
    lines += [search_text(search) for search in frontier.trajectories()]
    lines += [f"note: {note}" for note in session.notes]
    refused = [cell for cell in plan.cells if cell.refused]
    lines += [f"refused: {cell.name}: {cell.refused}" for cell in refused[:10]]
    if cells:
        rows = [[cell.id, cell.kind, cell.name, _state(frontier, cell), ", ".join(cell.experts)] for cell in plan.cells]
        lines += ["", table(["cell", "kind", "name", "state", "experts"], rows)]
    return "\n".join(lines)


def settings_text(settings: Settings) -> str:
    """Return a line with the workers, memory and disk that the work may use, and where each number comes from."""
    workers, memory, disk = settings.workers, settings.memory, settings.disk
    return (
        f"limits: {workers.value} workers ({workers.origin}), {readable(memory.value)} of memory ({memory.origin}), "
        f"{readable(disk.value)} of disk ({disk.origin})"
    )


def search_text(search: Trajectory) -> str:
    """Return a search in a line: its result, or the models it asks for now and how many it may ask for in all."""
    if search.state != "open":
        return f"search {outcome(search)}"
    waiting = [trial for trial in search.trials if trial.score is None and not trial.reason]
    shown = ", ".join(trial.what for trial in waiting[:SHOWN_TRIALS]) + (" …" if len(waiting) > SHOWN_TRIALS else "")
    asked = f"round {waiting[0].round} asks for {len(waiting)} model{'s' * (len(waiting) > 1)} ({shown})"
    tried = len(search.trials) - len(waiting)
    return f"search {search.name} ({search.by}): {asked}; {tried} tried so far, at most {search.most} in all"


def recipe_text(path: Path, resolve: Resolver) -> str:
    """Return a recipe file as recipes of ours, one document for each model, with notes as comments before it."""
    translator = Translator(resolve)
    orders = read_orders(path)
    folders = {order.name: Path(order.name) for order in orders if order.name}
    documents = []
    for order in orders:
        translation = translator.translation(order, folders)
        head = [f"# {order.name}"] if order.name else []
        notes = [f"# note: {note}" for note in translation.notes]
        documents.append("\n".join([*head, *notes, _recipe(translation.recipe)]))
    return "\n---\n".join(documents)


def _recipe(recipe: Mapping[str, Any]) -> str:
    """Return a recipe as YAML: a line for each key, and for each entry of lists of mappings."""
    lines = []
    for key, value in recipe.items():
        if isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
            lines += [f"{key}:", *(f"  - {_flow(entry)}" for entry in value)]
        else:
            lines.append(f"{key}: {_flow(_short(value))}")
    return "\n".join(lines)


def _short(value: Any) -> Any:
    plain = isinstance(value, dict) and set(value) in ({"source"}, {"source", "revision"})
    return "@".join(value.values()) if plain else value


def _flow(value: Any) -> str:
    """Return a value as YAML in one line, a checkpoint as `path@revision`."""
    value = {key: _short(inner) for key, inner in value.items()} if isinstance(value, dict) else value
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=sys.maxsize)
    return text.removesuffix("\n").removesuffix("\n...")


def passes_text(passes: Sequence[PassCost]) -> list[str]:
    """Return a line for each of the first passes."""
    lines = [
        f"  {number}. {cost.what}: reads {readable(cost.read)}, writes {readable(cost.written)}, "
        f"{readable(cost.memory)} of memory in {cost.spans} blocks, {readable(cost.disk)} of disk, "
        f"{duration(cost.seconds)}"
        for number, cost in enumerate(passes, start=1)
    ]
    rest = len(lines) - SHOWN_PASSES
    return lines[:SHOWN_PASSES] + ([f"  … and {rest} more like the last"] if rest > 0 else [])


def _state(frontier: Any, cell: Any) -> str:
    if cell.refused:
        return "refused"
    if frontier.view.trouble(cell):
        return "failed"
    return "to do" if any(True for _ in frontier.choice.wanted(cell)) else "done"


def duration(seconds: float) -> str:
    """Return seconds as people say them: '40 s', '12 min', '3.5 h'."""
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
    """Return one method as on docs/methods.md: its source, parameters, values and defaults. Raises SpecError."""
    from flows.cli.methods_page import description, parameters

    if name not in METHODS:
        raise SpecError(f"there is no method '{name}'; {nearest(name, METHODS)}")
    kind = METHODS[name]
    rows = [
        [parameter.name, parameter.values.replace("`", ""), parameter.default.replace("`", ""), parameter.meaning]
        for parameter in parameters(kind)
    ]
    head, *lines = description(kind)
    if package := METHODS.package(name):
        lines += ["", f"From the package {package}; version {kind.version} of the method."]
    columns = ["parameter", "values", "default", "meaning"]
    return "\n".join([name, "", head.strip("*"), *lines, "", table(columns, _wrapped(rows))])


def _wrapped(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return the rows with the text of each cell wrapped to the width of its column."""
    lines = []
    for row in rows:
        cells = [textwrap.wrap(text, width) for text, width in zip(row, WIDTHS, strict=True)]
        lines += [list(line) for line in itertools.zip_longest(*cells, fillvalue="")]
    return lines


def extraction_text(extracted: Extracted) -> str:
    """Return the loss of an extraction, for each tensor and in total."""
    rows = [[row.tensor, str(row.rank), f"{row.norm:.4g}", f"{row.error:.3%}"] for row in extracted.rows]
    lines = [table(["tensor", "rank", "norm of its change", "lost"], rows), ""]
    these = f"these {len(extracted.rows)} layers" if len(extracted.rows) != 1 else "this layer"
    lines.append(f"lost of the change in {these}: {extracted.error:.3%}")
    if extracted.left_out:
        largest = sorted(extracted.left_out, key=lambda row: -row.norm)[:3]
        names = ", ".join(row.tensor for row in largest)
        count = len(extracted.left_out)
        lines.append(f"left out: {count} tensors that changed and are no layers taken here ({names} …)")
    lines.append(f"lost of the whole change: {extracted.total_error:.3%}")
    return "\n".join(lines)


def transplant_text(result: Transplanted) -> str:
    """Return how many rows were kept and made, and how well the made ones meet the donor's."""
    lines = [
        f"{result.shared} of {result.rows} rows are the model's own, {result.approximated} were made, "
        f"{result.rows - result.shared - result.approximated} stand for no token"
    ]
    lines += [f"mean relative error of rows in {name}: {error:.3%}" for name, error in result.errors.items() if error]
    return "\n".join(lines)


def inspect_text(snapshot: Snapshot) -> str:
    """Return what the headers of a checkpoint say: kind, tensors, dtypes, layers, digests."""
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
    shown = (
        "model_type",
        "architectures",
        "vocab_size",
        "tie_word_embeddings",
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "use_rslora",
    )
    lines += [masked(f"{key}: {snapshot.config[key]}") for key in shown if snapshot.config.get(key) is not None]
    lines += [f"weights    {snapshot.weights}", f"companions {snapshot.companions}"]
    return "\n".join(lines)
