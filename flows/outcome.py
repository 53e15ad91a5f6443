"""How a sweep ended: the report, its files, what failed, where it can be seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flows.session.session import Session
from mergecore.errors import EvaluationError
from mergecore.reporting.report import markdown, write_tables
from mergecore.reporting.scores import Sweep
from mergecore.reporting.summary import TEST, Summaries
from mergecore.reporting.trajectories import draw_searches
from mergecore.sweeps.measured import collect

MOST_REASONS = 20


class Ending:
    """A sweep as it stands after the work, with its report written. One is made for each run and handed on.

    summaries: of the sweep, worked out once. report: Markdown. files: what was written. pages: page → address in
    MLflow; empty where it is not shown there, or where the server went with the work. remarks: what else is to be told
    of MLflow, above all what could not be shown there.
    A plain class: Prefect looks into dataclasses for futures.
    """

    def __init__(self, summaries: Summaries, report: str, files: tuple[Path, ...]) -> None:
        self.summaries, self.report, self.files = summaries, report, files
        self.pages: dict[str, str] = {}
        self.remarks: list[str] = []

    @property
    def sweep(self) -> Sweep:
        """The sweep."""
        return self.summaries.sweep


@dataclass(frozen=True)
class Outcome:
    """How a sweep ended, in words. report: Markdown. remarks: lines after it. summary: one line.

    troubled: whether cells failed, were refused or are missing.
    """

    report: str
    remarks: tuple[str, ...]
    summary: str
    troubled: bool

    @property
    def text(self) -> str:
        """What to print."""
        return "\n".join([self.report, "", *self.remarks])


def ending(session: Session, sweep: Sweep | None = None) -> Ending:
    """Write the report of a session's sweep. sweep: as the store holds it, where it is known already."""
    summaries = Summaries(sweep or collect(session.frontier))
    try:
        report, files = written_report(summaries, session.results)
    except EvaluationError as error:
        report, files = f"no report: {error}", []
    return Ending(summaries, report.strip(), tuple(files))


def written_report(summaries: Summaries, folder: Path, split: str = TEST) -> tuple[str, list[Path]]:
    """Return the report as Markdown, and the files in `folder` it was written to: tables, report.md and figures.

    Raises EvaluationError where cells were measured on different numbers of items.
    """
    summary = summaries.on(split)
    paths = list(write_tables(summary, folder))
    if summary.curve.num_rows:
        from mergecore.reporting.figure import draw

        paths += list(draw(summary, folder / "figure"))
    if summary.searches and (drawn := draw_searches(summary.searches, folder / "searches.png")):
        paths.append(drawn)
    return markdown(summary), paths


def conclusion(session: Session, ending: Ending, urls: Mapping[str, str], reused: bool) -> Outcome:
    """Say how a sweep ended: its report, where the files are, what failed, where it can be seen.

    urls: name → address. reused: whether nothing had to be done.
    """
    cells = ending.sweep.cells
    counts = dict.fromkeys(("done", "pending", "failed", "refused"), 0) | Counter(cell.status for cell in cells)
    lines: list[str] = []
    if reused:
        lines.append("everything was found in the store; nothing had to be done")
    lines += [f"written: {path}" for path in ending.files if path.suffix in (".png", ".md")]
    lines += [f"{name}: {url}" for name, url in urls.items()]
    lines += ending.remarks
    pages = "Prefect and MLflow" if session.settings.is_mlflow_own else "Prefect"
    lines.append(f"`mergeloom serve --store {session.spec.output.store}` shows the same in {pages}")
    troubled = counts["failed"] + counts["refused"]
    if troubled:
        lines.append(f"{troubled} of {len(cells)} cells failed or were refused (--retry-failed tries again):")
        lines += [f"  {cell.name}: {cell.reason}" for cell in cells if cell.reason][:MOST_REASONS]
        files = dict.fromkeys(cell.failure for cell in cells if cell.failure)
        lines += [f"  traceback: {file}" for file in files][:MOST_REASONS]
    return Outcome(ending.report, tuple(lines), _in_numbers(counts), troubled > 0 or counts["pending"] > 0)


def _in_numbers(counts: Mapping[str, int]) -> str:
    """'22 of 24 cells done, 2 refused'."""
    rest = "".join(f", {counts[state]} {state}" for state in ("pending", "failed", "refused") if counts[state])
    return f"{counts['done']} of {sum(counts.values())} cells done{rest}"
