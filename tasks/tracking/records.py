"""A sweep as the MLflow runs that show it: plain records, made without MLflow, so that they can be read and tested.

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
    """Everything one MLflow run is to say.

    metrics: (name, value, step). files: artifact path → text. attached: artifact path → digest of a file that the
    caller has. seconds: what stands as its duration: the time its work took, not that of writing a line about it.
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
        """Equal for records that say the same: what tells a run that needs nothing from one that is out of date."""
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
    """The tag by which a run of a kind is found again."""
    return f"{kind}.id"


def metric_name(text: str) -> str:
    """`text` with what MLflow refuses in a name replaced by '_'."""
    return re.sub(r"[^\w\-. /]", "_", text)


def flat_values(values: Mapping[str, Any]) -> dict[str, str]:
    """A method's values as parameters: {'drop': {'kind': 'random', 'rate': 0.5}} → drop=random, drop.rate=0.5."""
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
    """Yield one record per cell, in the order of the sweep; scores on validation items stand beside those on test items.

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
    """The headline first: pages that show one metric show the first by name."""
    scores: dict[str, float | None] = {}
    for side, categories in (("held_in", suite.held_in), ("held_out", suite.held_out)):
        scores[f"{side}/avg"] = row[f"{side}_normalised"]
        scores[f"raw/{side}"] = row[f"{side}_raw"]
        for task in dict.fromkeys(task for tasks in categories.values() for task in tasks):
            scores[f"{side}/{task}"] = row.get(f"score/{task}")
    return scores


def _at(metrics: Mapping[str, float | None], step: int) -> tuple[tuple[str, float, int], ...]:
    """Metrics that were measured and mean something: a NaN has no place on a chart, a seventeenth digit none in a table."""
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
        what = f"**{cell.method}** {values_label(cell.values)} of {cell.count} experts: {', '.join(cell.experts)}"
    else:
        what = f"{BASELINES[cell.kind].capitalize()} **{cell.name}**, as it is"
    trouble = f"\n\n**{cell.status.capitalize()}**: {cell.reason}" if cell.reason else ""
    return (what + trouble)[:7000]


def _document(value: Mapping[str, Any]) -> str:
    return json.dumps(json.loads(json_text(value)), indent=2, ensure_ascii=False) + "\n"


def _colours(sweep: Sweep) -> dict[str, str]:
    """Cell id → colour: one per method and values in the order of the sweep, so that more methods change no colour."""
    merges = {cell.cell: (cell.method, values_label(cell.values)) for cell in sweep.cells if cell.kind == "merge"}
    order = list(dict.fromkeys(merges.values()))
    greys = {cell.cell: GREYS[cell.kind] for cell in sweep.cells if cell.kind != "merge"}
    return greys | {cell: COLOURS[order.index(line) % len(COLOURS)] for cell, line in merges.items()}


def series_records(sweep: Sweep, summary: Summary) -> Iterator[RunRecord]:
    """One record per curve, its steps the counts of experts, and a level line per baseline to compare with."""
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
    """A curve's label without what all curves of its method share: columns of run names are narrow."""
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
    """One record per search: its steps are the models tried, so that MLflow's line charts show its way."""
    for way in sweep.searches:
        metrics = [
            metric
            for step, one in enumerate(way.trials, start=1)
            for metric in _at({"search/score": one.score, "search/best": one.best}, step=step)
        ]
        tags = {
            SWEEP: sweep.name,
            KIND: "search",
            identity_tag("search"): way.name,
            STATE: CURRENT,
            NOTE: outcome(way)[:7000],
        }
        yield RunRecord(
            kind="search",
            identity=way.name,
            name=f"search {way.name}",
            status="SCHEDULED" if way.state == "open" else "FINISHED" if way.result else "FAILED",
            params={"method": way.method, "by": way.by, "n_experts": str(way.count), "subset": str(way.subset)},
            metrics=tuple(metrics),
            tags={**tags, "search.state": way.state, **({"search.result": way.result} if way.result else {})},
            files={"trials.json": _trials(way)},
        )


def _trials(way: Trajectory) -> str:
    """The trials as the JSON that MLflow's pages show as a table."""
    head, rows, _ = search_rows(way, most=len(way.trials))
    return json.dumps({"columns": head, "data": rows}, ensure_ascii=False)


def cells_table(records: Sequence[RunRecord]) -> str:
    """The cells as the JSON that MLflow's pages show as a table."""
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
