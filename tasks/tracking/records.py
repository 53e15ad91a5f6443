"""A sweep as records of the MLflow runs that show it. They need no MLflow, so they can be read and tested.

One run per cell, one per curve (its step is the number of experts: MLflow's line charts are then the curves of the
sweep), one for the sweep itself. Parameters hold what varies, because the pages that compare runs pick those first;
identities, digests and lists are tags.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped,unused-ignore]

from mergecore.identity.keys import digest
from mergecore.reporting.curves import json_text
from mergecore.reporting.scores import CellScores, Suite, Sweep, Trajectory, values_label
from mergecore.reporting.summary import Summary
from mergecore.reporting.trajectories import outcome, search_rows

FORMAT = 1
"""Raise it when records come to say more or less than they did: every run is then written again."""

SWEEP, KIND, STATE, DIGEST = "sweep.name", "run.kind", "sweep.state", "projection.digest"
NOTE, COLOUR = "mlflow.note.content", "mlflow.runColor"
CURRENT, RETIRED = "current", "retired"
RUN_STATUS = {"done": "FINISHED", "pending": "SCHEDULED", "failed": "FAILED", "refused": "FAILED"}
"""Never RUNNING: a projection shows what is known, and nobody is left to end such a run."""

BASELINES = {"base": "base model", "expert": "expert", "multitask": "multitask"}
"""What stands in the column 'method' where nothing was merged."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#117733", "#332288", "#999933")
"""One per curve, told apart by colour-blind readers too (Okabe and Ito, Tol); MLflow's own repeat after a few runs."""
GREYS = {"base": "#9A9A9A", "expert": "#C9C9C9", "multitask": "#4A4A4A", "mean expert": "#757575"}


@dataclass(frozen=True)
class RunRecord:
    """Everything that one MLflow run shows.

    metrics: (name, value, step). files: artifact path → text. attached: artifact path → digest of a file that the
    caller has. seconds: its duration, which is the time that the work took.
    """

    kind: str
    identity: str
    name: str
    status: str
    params: Mapping[str, str] = field(default_factory=dict)
    metrics: tuple[tuple[str, float, int], ...] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    attached: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def digest(self) -> str:
        """The digest of everything the run shows. A run with this digest needs no writing."""
        return digest(
            {
                "format": FORMAT,
                "name": self.name,
                "status": self.status,
                "params": dict(self.params),
                "metrics": [list(metric) for metric in self.metrics],
                "tags": dict(self.tags),
                "files": dict(self.files),
                "attached": dict(self.attached),
                "seconds": self.seconds,
            }
        )[:16]


def identity_tag(kind: str) -> str:
    """Return the name of the tag that identifies a run of a kind."""
    return f"{kind}.id"


def metric_name(text: str) -> str:
    """Return `text` with '_' for every character that MLflow refuses in a name."""
    return re.sub(r"[^\w\-. /]", "_", text)


def flat_values(values: Mapping[str, Any]) -> dict[str, str]:
    """Return a method's values as flat parameters: {'drop': {'kind': 'random', 'rate': 0.5}} → drop, drop.rate."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            inner = flat_values(value)
            if "kind" in inner:
                flat[name] = inner.pop("kind")
            flat.update({f"{name}.{part}": text for part, text in inner.items()})
        else:
            flat[name] = value if isinstance(value, str) else json_text(value)
    return flat


def cell_records(sweep: Sweep, test: pa.Table, validation: pa.Table | None) -> Iterator[RunRecord]:
    """Yield one record per cell, in the order of the sweep, with its scores on test and on validation items.

    test, validation: the table `Summary.cells` on each split.
    """
    shown = {row["cell"]: row for row in test.to_pylist()}
    searched = {row["cell"]: row for row in validation.to_pylist()} if validation is not None else {}
    colours = _colours(sweep)
    for cell in sweep.cells:
        merge = cell.kind == "merge"
        params = {"method": cell.method if merge else BASELINES[cell.kind]}
        if merge:
            params |= {"n_experts": str(cell.count), "subset": str(cell.subset), "values": values_label(cell.values)}
            params |= flat_values(cell.values)
        metrics = _scores(sweep.suite, shown[cell.cell])
        for side in ("held_in", "held_out"):
            metrics[f"validation/{side}"] = searched.get(cell.cell, {}).get(f"{side}_normalised")
        if merge:
            metrics["n_experts"] = float(cell.count)
        metrics |= {f"measured/{name.replace('/', '_')}": value for name, value in cell.measured.items()}
        yield RunRecord(
            kind="cell",
            identity=cell.cell,
            name=cell.name,
            status=RUN_STATUS[cell.status],
            params={metric_name(name): text for name, text in params.items() if text},
            metrics=_at(metrics, step=0),
            tags={**_cell_tags(sweep, cell), COLOUR: colours[cell.cell]},
            files={"lineage.json": _document(cell.lineage)} if cell.lineage else {},
            seconds=_seconds(cell),
        )


def _seconds(cell: CellScores) -> float:
    return sum(value for name, value in cell.measured.items() if name.endswith("seconds") and math.isfinite(value))


def _scores(suite: Suite, row: Mapping[str, Any]) -> dict[str, float | None]:
    """Return metric → score of a cell. Pages that show one metric take the first by name: the headline sorts first."""
    scores: dict[str, float | None] = {}
    for side, categories in (("held_in", suite.held_in), ("held_out", suite.held_out)):
        scores[f"{side}/avg"] = row[f"{side}_normalised"]
        scores[f"raw/{side}"] = row[f"{side}_raw"]
        for task in dict.fromkeys(task for tasks in categories.values() for task in tasks):
            scores[f"{side}/{task}"] = row.get(f"score/{task}")
    return scores


def _at(metrics: Mapping[str, float | None], step: int) -> tuple[tuple[str, float, int], ...]:
    """Return (name, value, step) of the metrics that are finite, rounded to four digits."""
    known = ((metric_name(name), value) for name, value in metrics.items() if value is not None)
    return tuple((name, round(float(value), 4), step) for name, value in known if math.isfinite(value))


def _cell_tags(sweep: Sweep, cell: CellScores) -> dict[str, str]:
    tags = {
        SWEEP: sweep.name,
        KIND: "cell",
        identity_tag("cell"): cell.cell,
        STATE: CURRENT,
        "cell.kind": cell.kind,
        "cell.status": cell.status,
        "cell.reason": cell.reason[:5000],
        "cell.chosen": "yes" if cell.chosen else "no",
        "cell.experts": ", ".join(cell.experts)[:5000],
        "cell.step": cell.model,
        "cell.digest": cell.digest,
        NOTE: _cell_note(cell),
    }
    return {name: text for name, text in tags.items() if text}


def _cell_note(cell: CellScores) -> str:
    if cell.kind == "merge":
        text = f"**{cell.method}** {values_label(cell.values)} of {cell.count} experts: {', '.join(cell.experts)}"
    else:
        text = f"{BASELINES[cell.kind].capitalize()} **{cell.name}**, as it is"
    trouble = f"\n\n**{cell.status.capitalize()}**: {cell.reason}" if cell.reason else ""
    return (text + trouble)[:7000]


def _document(value: Mapping[str, Any]) -> str:
    return json.dumps(json.loads(json_text(value)), indent=2, ensure_ascii=False) + "\n"


def _colours(sweep: Sweep) -> dict[str, str]:
    """Return cell id → colour. Colours follow the order of the sweep, so a method that is added changes no colour."""
    merges = {cell.cell: (cell.method, values_label(cell.values)) for cell in sweep.cells if cell.kind == "merge"}
    order = list(dict.fromkeys(merges.values()))
    greys = {cell.cell: GREYS[cell.kind] for cell in sweep.cells if cell.kind != "merge"}
    return greys | {cell: COLOURS[order.index(line) % len(COLOURS)] for cell, line in merges.items()}


def series_records(sweep: Sweep, summary: Summary) -> Iterator[RunRecord]:
    """Yield one record per curve, its steps the counts of experts, and a level line for each baseline."""
    colours = _colours(sweep)
    lines: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in summary.curve.to_pylist():
        lines.setdefault((row["method"], row["label"]), []).append(row)
    for (method, label), rows in lines.items():
        name = (
            f"{method} {_short_label(label, [other[0] for key, other in lines.items() if key[0] == method], rows[0])}"
        )
        yield _series(sweep, name.strip(), method, label, colours[rows[0]["cells"][0]], rows)
    counts = sorted({row["count"] for rows in lines.values() for row in rows})
    for row in summary.baselines.to_pylist():
        if row["kind"] != "expert":  # their mean is one line; eight lines hide the others
            name = BASELINES.get(row["kind"], row["kind"])
            yield _series(sweep, name, name, "", GREYS[row["kind"]], [{**row, "count": count} for count in counts])


def _short_label(label: str, curves: Sequence[Mapping[str, Any]], own: Mapping[str, Any]) -> str:
    """Return a curve's label without the values that all curves of its method share: columns of names are narrow."""
    settings = [json.loads(row["values"]) for row in curves]
    values = json.loads(own["values"])
    if len(curves) == 1:
        return ""
    if len(values) > 1:  # chosen on validation, so not one setting
        return label
    kept = {
        name: value
        for name, value in values[0].items()
        if any(other.get(name) != value for setting in settings for other in setting)
    }
    return values_label(kept)


def _series(
    sweep: Sweep, name: str, method: str, label: str, colour: str, rows: Sequence[Mapping[str, Any]]
) -> RunRecord:
    identity = f"{method} {label}".strip()
    tags = {SWEEP: sweep.name, KIND: "series", identity_tag("series"): identity, STATE: CURRENT, COLOUR: colour}
    sides = [{f"{side}/avg": row[f"{side}_normalised"] for side in ("held_in", "held_out")} for row in rows]
    return RunRecord(
        kind="series",
        identity=identity,
        name=name,
        status="FINISHED",
        params={"method": method, **({"values": label} if label else {})},
        metrics=tuple(metric for row, side in zip(rows, sides, strict=True) for metric in _at(side, step=row["count"])),
        tags=tags,
    )


def search_records(sweep: Sweep) -> Iterator[RunRecord]:
    """Yield one record per search. Its steps are the models tried, so MLflow's line charts show its progress."""
    for search in sweep.searches:
        metrics = [
            metric
            for step, trial in enumerate(search.trials, start=1)
            for metric in _at({"search/score": trial.score, "search/best": trial.best}, step=step)
        ]
        tags = {
            SWEEP: sweep.name,
            KIND: "search",
            identity_tag("search"): search.name,
            STATE: CURRENT,
            NOTE: outcome(search)[:7000],
        }
        yield RunRecord(
            kind="search",
            identity=search.name,
            name=f"search {search.name}",
            status="SCHEDULED" if search.state == "open" else "FINISHED" if search.result else "FAILED",
            params={
                "method": search.method,
                "by": search.by,
                "n_experts": str(search.count),
                "subset": str(search.subset),
            },
            metrics=tuple(metrics),
            tags={**tags, "search.state": search.state, **({"search.result": search.result} if search.result else {})},
            files={"trials.json": _trials(search)},
        )


def _trials(search: Trajectory) -> str:
    """Return the trials as JSON that MLflow's pages show as a table."""
    head, rows, _ = search_rows(search, most=len(search.trials))
    return json.dumps({"columns": head, "data": rows}, ensure_ascii=False)


def cells_table(records: Sequence[RunRecord]) -> str:
    """Return the cells as JSON that MLflow's pages show as a table."""
    metrics = list(dict.fromkeys(name for record in records for name, _, _ in record.metrics if name != "n_experts"))
    params = list(dict.fromkeys(name for record in records for name in record.params))
    rows = []
    for record in records:
        measured = {name: round(value, 4) for name, value, _ in record.metrics}
        rows.append(
            [record.name, record.tags["cell.status"], *(record.params.get(name, "") for name in params)]
            + [measured.get(name) for name in metrics]
            + [record.tags.get("cell.reason", "")]
        )
    return json.dumps({"columns": ["name", "status", *params, *metrics, "reason"], "data": rows}, ensure_ascii=False)
