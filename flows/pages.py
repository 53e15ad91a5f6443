"""Log lines and artifacts of a flow run on Prefect's pages."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from pathlib import Path

from prefect import get_run_logger
from prefect.runtime import flow_run

from flows.outcome import Outcome
from mergecore.events import Event, Report

PAGES = {"leaderboard": "Leaderboard", "curves": "Curves", "charts": "Charts", "model": "Registered model"}
MOST_KINDS = 3


def run_name() -> str:
    """Return the name of a run in lists: its spec or recipe, then the name that a person or Prefect chose."""
    chosen, parameters = str(flow_run.name), flow_run.parameters
    stem = Path(parameters.get("spec") or parameters.get("recipe") or "").stem
    return chosen if chosen.startswith(stem) else f"{stem} · {chosen}"


def listed(kinds: Iterable[str]) -> str:
    """Return the names in a row, each once, short enough for the bar of a task."""
    names = sorted(set(kinds))
    more = f" and {len(names) - MOST_KINDS} more" if len(names) > MOST_KINDS else ""
    return ", ".join(names[:MOST_KINDS]) + more


def logged() -> Report:
    """Return a `report` that writes a line into the flow run's log for everything that is finished."""
    logger = get_run_logger()

    def report(event: Event) -> None:
        if event.done >= event.total:
            amount = f" ({event.total:g} {event.unit})" if event.total else ""
            logger.info("%s%s", event.activity, amount)

    return report


def report_page(outcome: Outcome, figure: Path, pages: Mapping[str, str]) -> str:
    """Return the report as an artifact: links to MLflow, then the report with its figure inside the text.

    pages: page → address in MLflow.
    """
    title, _, rest = outcome.report.partition("\n")
    links = " · ".join(f"[{name}]({pages[page]})" for page, name in PAGES.items() if page in pages)
    parts = [title, f"MLflow: {links}" if links else "", _inlined(figure), rest.strip()]
    parts.append("\n".join(f"- {remark.strip()}" for remark in outcome.remarks))
    return "\n\n".join(part for part in parts if part)


def _inlined(figure: Path) -> str:
    if not figure.exists():
        return ""
    return f"![held-in and held-out scores](data:image/png;base64,{base64.b64encode(figure.read_bytes()).decode()})"


def slug(name: str) -> str:
    """Return a name as keys of artifacts may be: small letters, digits and dashes."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower())
