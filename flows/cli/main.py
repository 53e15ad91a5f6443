"""The command line. Heavy imports are inside the commands, so that help and a single merge start at once."""

from __future__ import annotations

import os
from pathlib import Path

import click

from flows.cli.diff import diff
from flows.cli.endings import errors
from flows.cli.export import export
from flows.cli.models import extract_lora, merge, transplant_tokenizer, unpack
from flows.cli.store import store
from flows.cli.sweeps import plan, report, sweep, track


class Commands(click.Group):
    """The commands. What a person types must be text: paths are printed and written into files."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments. Raises UsageError for bytes that are no UTF-8."""
        for argument in args:
            if any(0xD800 <= ord(letter) <= 0xDFFF for letter in argument):
                raise click.UsageError(f"{argument!a} is not UTF-8; rename the file or folder, or name another")
        return super().parse_args(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="mergeloom")
def main() -> None:
    """Model merging as a pipeline: one spec, every method exact, every step cached.

    \b
    mergeloom methods                 list the merge methods and their parameters
    mergeloom inspect SOURCE          show what a checkpoint is
    mergeloom diff A B                show how two checkpoints differ
    mergeloom merge RECIPE OUT        make one model, in this process
    mergeloom extract-lora EXPERT OUT make an adapter of a full checkpoint
    mergeloom transplant-tokenizer …  give a model another model's tokenizer
    mergeloom unpack PRODUCT TASK OUT make the model of one task from a product of masks
    mergeloom plan SPEC               show what a sweep will do, cost and reuse
    mergeloom sweep SPEC              run a sweep; the same command resumes and extends it
    mergeloom report SPEC             write tables and figures of the results so far
    mergeloom track SPEC              show a sweep in MLflow
    mergeloom export SPEC CELL OUT    write the whole folder of one of a sweep's models
    mergeloom store ls | gc | verify  what a store holds; free what nothing asks for; check every byte
    mergeloom serve                   run Prefect and MLflow over the data of a store

    A recipe is a few lines of YAML:

    \b
    method: ties
    density: 0.2
    base: path-or-hub-id@revision
    experts: [path-a, hub-id-b@revision]
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DO_NOT_TRACK", "1")  # or Prefect counts its use, and says so in a terminal


for command in (merge, unpack, extract_lora, transplant_tokenizer, diff, plan, sweep, report, track, export, store):
    main.add_command(command)


@main.command()
@click.argument("name", required=False)
@click.option("--markdown", is_flag=True, help="print the page docs/methods.md")
def methods(name: str | None, markdown: bool) -> None:
    """List the merge methods, or one method's parameters with defaults and ranges."""
    with errors():
        if markdown:
            from flows.cli.methods_page import methods_page

            click.echo(methods_page(), nl=False)
            return
        from flows.cli.texts import method_text, methods_text

        click.echo(method_text(name) if name else methods_text())


@main.command()
@click.argument("source")
def inspect(source: str) -> None:
    """Show kind, tensors, dtypes, layers and digests of SOURCE, a directory or hub id. Only headers are read."""
    with errors():
        from flows.cli.texts import inspect_text
        from flows.session.session import resolver
        from flows.session.startup import digest_cache
        from mergecore.checkpoints.snapshot import read_snapshot
        from mergecore.spec.sources import SourceSpec

        click.echo(inspect_text(read_snapshot(resolver(digest_cache())(SourceSpec(source=source)))))


@main.command()
@click.option(
    "--store", type=click.Path(path_type=Path), default=Path(".mergeloom"), help="folder with the results of sweeps"
)
@click.option("--prefect-port", type=int, default=4200, show_default=True)
@click.option("--mlflow-port", type=int, default=5000, show_default=True)
def serve(store: Path, prefect_port: int, mlflow_port: int) -> None:
    """Run Prefect and MLflow over the data of a store, on fixed ports, until Ctrl-C.

    A sweep over the same store that is started meanwhile uses these servers.
    """
    with errors():
        from flows.services.servers import Ports
        from flows.services.servers import serve as run_servers

        run_servers(store, Ports(prefect=prefect_port, mlflow=mlflow_port), click.echo)


if __name__ == "__main__":
    main()
