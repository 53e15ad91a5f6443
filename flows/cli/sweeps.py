"""The commands of a sweep: plan, sweep, report, track."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from flows.cli.endings import errors

FAILED_CELLS = 3
"""Exit code of a sweep that went through but has failed or refused cells."""


def kept_in_the_store() -> str:
    """Return the text after Ctrl-C of a sweep."""
    return "what is finished is kept, run the same command again to go on"


@click.command()
@click.argument("spec", type=click.Path(path_type=Path))
@click.option("--cells", is_flag=True, help="list every cell")
def plan(spec: Path, cells: bool) -> None:
    """Show the cells and steps of SPEC, how many are done, and what the rest costs. Nothing is written.

    Mistakes are found here: keys and values that are not known, checkpoints that do not fit each other, tasks that do
    not exist, memory and disk that do not suffice.
    """
    with errors():
        from flows.session.startup import quick_imports

        with quick_imports():
            from flows.cli.terminal import progress
            from flows.cli.texts import plan_text
            from flows.session.session import open_session

        with progress() as report:
            session = open_session(spec, report)
        costs = session.cost()
        click.echo(plan_text(session, costs, cells))
        session.check_fit(costs)


@click.command()
@click.argument("spec", type=click.Path(path_type=Path))
@click.option("--in-process", is_flag=True, help="do everything in this process: no Prefect, no Dask")
@click.option(
    "--workers",
    type=click.IntRange(1),
    help="worker processes (threads with --in-process); default: as the spec says, else one a core",
)
@click.option("--retry-failed", is_flag=True, help="try failed cells again")
@click.option("--no-track", is_flag=True, help="do not write to MLflow")
def sweep(spec: Path, in_process: bool, workers: int | None, retry_failed: bool, no_track: bool) -> None:
    """Run the sweep SPEC, resume it, or extend it: only what is missing is done.

    After a kill the same command goes on where the sweep was. Cells that are refused or fail are recorded with their
    reason and do not stop the others; the exit code is then 3. Where the spec has no addresses, local Prefect and
    MLflow servers and a Dask cluster are started, and stopped at the end.
    """
    with errors(kept_in_the_store):
        from flows.session.startup import quick_imports

        with quick_imports():
            from flows.cli.terminal import progress
            from flows.conduct import conduct
            from flows.session.session import open_session
            from flows.session.settings import Options
            from mergecore.events import Event

        with progress() as report:
            session = open_session(spec, report, Options(workers=workers))
            for warning in session.notes:
                report(Event(f"note: {warning}"))
            outcome = conduct(session, report, in_process=in_process, retry_failed=retry_failed, track=not no_track)
        click.echo(outcome.text)
        sys.exit(FAILED_CELLS if outcome.troubled else 0)


@click.command()
@click.argument("spec", type=click.Path(path_type=Path))
@click.option("--split", type=click.Choice(["test", "validation"]), default="test", help="which items to report on")
@click.option(
    "--lm-eval", type=click.Path(path_type=Path), help="also write lm-eval's own results files into this folder"
)
def report(spec: Path, split: str, lm_eval: Path | None) -> None:
    """Print the results of SPEC so far, and write tables (Parquet, CSV), report.md and figures into the store."""
    with errors():
        from flows.outcome import written_report
        from flows.session.session import open_session
        from mergecore.reporting.summary import Summaries
        from mergecore.sweeps.measured import collect

        session = open_session(spec)
        text, paths = written_report(Summaries(collect(session.frontier)), session.results, split)
        click.echo(text)
        if lm_eval is not None:
            from flows.lm_eval_json import exported

            paths += exported(session, lm_eval)
        for path in paths:
            click.echo(str(path))


@click.command()
@click.argument("spec", type=click.Path(path_type=Path))
@click.option("--rebuild", is_flag=True, help="delete the sweep's runs first and write all of them again")
@click.option(
    "--uri", help="MLflow tracking URI; default: the spec's, else MLFLOW_TRACKING_URI, else the store's database"
)
def track(spec: Path, rebuild: bool, uri: str | None) -> None:
    """Show the results of SPEC in MLflow. MLflow is a view of the store: this can be done again at any time."""
    with errors():
        from flows.mlflow_view import projected
        from flows.session.session import open_session
        from flows.session.settings import Options
        from mergecore.events import silent
        from mergecore.reporting.summary import Summaries
        from mergecore.sweeps.measured import collect

        session = open_session(spec, silent, Options(mlflow=uri))
        result = projected(session, Summaries(collect(session.frontier)), rebuild=rebuild)
        click.echo(f"{result.written} runs written, {result.unchanged} unchanged, {result.retired} retired")
        for name, url in result.urls.items():
            click.echo(f"{name}: {url}")
        for remark in result.remarks:
            click.echo(remark)
        if result.unregistered:
            sys.exit(1)
