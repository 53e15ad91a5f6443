"""How a sweep ended: the report, its files, what failed, where it can be seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flows.session.session import Session
from mergecore.errors import EvaluationError
from mergecore.reporting.report import markdown, write_tables
from mergecore.reporting.scores import Sweep
from mergecore.reporting.summary import summarise
from mergecore.reporting.trajectories import draw_searches

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Outcome:
    """How a sweep ended: its report in Markdown, remarks after it, one line on it, whether cells failed or were refused."""

    report: str
    remarks: tuple[str, ...]
    summary: str
    troubled: bool

    @property
    def text(self) -> str:
        """What to print."""
        return "\n".join([self.report, "", *self.remarks])


def written_report(sweep: Sweep, folder: Path, split: str = "test") -> tuple[str, list[Path]]:
    """The report as text, and the files in `folder` that it was written to: tables, report.md and the figure."""
    found = summarise(sweep, split)
    paths = list(write_tables(found, folder))
    if found.curve.num_rows:
        from mergecore.reporting.figure import draw

        paths += list(draw(found, folder / "figure"))
    if found.searches and (drawn := draw_searches(found.searches, folder / "searches.png")):
        paths.append(drawn)
    return markdown(found), paths


def conclusion(session: Session, sweep: Sweep, urls: Mapping[str, str], reused: bool) -> Outcome:
    """What a sweep that went through tells: the table, where the files are, what failed, where it can be seen."""
    counts = dict.fromkeys(("done", "pending", "failed", "refused"), 0) | Counter(cell.status for cell in sweep.cells)
    try:
        text, paths = written_report(sweep, session.results)
    except EvaluationError as error:
        text, paths = f"no report: {error}", []
    lines: list[str] = []
    if reused:
        lines.append("everything was found in the store; nothing had to be done")
    lines += [f"written: {path}" for path in paths if path.suffix in (".png", ".md")]
    lines += [f"{name}: {url}" for name, url in urls.items()]
    lines.append(f"`mergeloom serve --store {session.spec.output.store}` shows the same in Prefect and MLflow")
    troubled = counts["failed"] + counts["refused"]
    if troubled:
        lines.append(f"{troubled} of {sum(counts.values())} cells failed or were refused (--retry-failed tries again):")
        lines += [f"  {cell.name}: {cell.reason}" for cell in sweep.cells if cell.reason][:20]
    return Outcome(text.strip(), tuple(lines), _in_numbers(counts), troubled > 0 or counts["pending"] > 0)


def _in_numbers(counts: Mapping[str, int]) -> str:
    """'22 of 24 cells done, 2 refused'."""
    rest = "".join(f", {counts[state]} {state}" for state in ("pending", "failed", "refused") if counts[state])
    return f"{counts['done']} of {sum(counts.values())} cells done{rest}"
