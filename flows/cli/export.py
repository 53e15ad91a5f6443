"""`mergeloom export`: the whole directory of a cell's model."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from flows.cli.endings import errors, left_of


@click.command()
@click.argument("spec", type=click.Path(path_type=Path))
@click.argument("cell")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--workers", type=click.IntRange(1), help="threads; default: as the spec says, else one a core")
@click.option("--durable", is_flag=True, help="fsync every file before OUT appears")
def export(spec: Path, cell: str, out: Path, workers: int | None, durable: bool) -> None:
    """Write the model of CELL, a cell of the sweep SPEC, into the new folder OUT.

    CELL is a name ('ties n3 s0') or an id, as `mergeloom plan SPEC --cells` and the report list them, or '@champion':
    the alias under which the sweep has registered its best model. OUT is a folder that `transformers` loads: weights,
    config, tokenizer, and a card with recipe, scores and lineage. A model that was dropped is made again from the
    store's steps, byte for byte as the sweep made it. OUT shares no file with the store.
    """
    with errors(partial(left_of, out, None, None)):
        from flows.cli.terminal import progress
        from flows.session.limits import readable
        from flows.session.session import open_session
        from flows.session.settings import Options
        from mergecore.engine.executor import InProcess
        from mergecore.sweeps.exporting import cell_named
        from mergecore.sweeps.exporting import export as write_model

        with progress() as report:
            session = open_session(spec, report, Options(workers=workers))
            chosen = cell_named(session.frontier, cell)
            place = session.place(InProcess(session.settings.workers.value), report)
            done = write_model(place, session.frontier, chosen, out, durable=durable)
        click.echo(f"{done.folder}  {readable(done.size)}  {chosen.name}  {done.origin}  digest {done.digest[:16]}")
