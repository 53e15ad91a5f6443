"""The command line. Heavy imports are inside the commands, so that help and a single merge start at once."""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flows.cli.diff import diff as diff_command
from flows.cli.endings import errors, left_of
from flows.cli.export import export as export_command
from flows.cli.store import store as store_commands
from mergecore.tensors.dtypes import DTYPE_CHOICES, SAFETENSORS_DTYPE, Dtype

if TYPE_CHECKING:
    from mergecore.arithmetic.approximation import Metric, Weighting
    from mergecore.recipes.transplant_tokenizer import Approximation

FAILED_CELLS = 3
"""Exit code of a sweep that went through but has failed or refused cells."""


def check_timings(path: Path | None) -> None:
    """Raise UsageError where the file of timings could not be written at the end."""
    if path is None:
        return
    try:
        is_new = not path.exists()
        with path.open("a"):
            pass
        if is_new:
            path.unlink()
    except OSError as error:
        raise click.UsageError(
            f"--timings: {path} cannot be written ({error.strerror}); name a file in a folder that is there"
        ) from None


class Commands(click.Group):
    """The commands. What a person types must be text: paths are printed and written into files."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments. Raises UsageError for bytes that are no UTF-8."""
        for argument in args:
            if any(0xD800 <= ord(letter) <= 0xDFFF for letter in argument):
                raise click.UsageError(f"{argument!a} is not UTF-8; rename the file or folder, or name another")
        return super().parse_args(ctx, args)


def kept_in_the_store() -> str:
    """Return the text after Ctrl-C of a sweep."""
    return "what is finished is kept, run the same command again to go on"


def process_start(otherwise: float) -> float:
    """Return when this process began, in seconds since the epoch; `otherwise` where the system does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    except (OSError, StopIteration):
        return otherwise
    return float(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")


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


main.add_command(diff_command)
main.add_command(export_command)
main.add_command(store_commands)


@main.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path), required=False)
@click.option("--show", is_flag=True, help="print the recipe in Mergeloom's form and make nothing")
@click.option("--durable", is_flag=True, help="fsync every file before OUT appears")
@click.option("--workers", type=click.IntRange(1), help="threads that merge; default: one a core")
@click.option("--memory", help="memory for the windows of all workers, as in 500MB; default: half of what is free")
@click.option("--timings", type=click.Path(path_type=Path), help="write how long each stage took as JSON")
@click.option(
    "--store", type=click.Path(path_type=Path), help="folder that keeps statistics and chains for later merges"
)
@click.option(
    "--intermediates",
    type=click.Path(path_type=Path),
    help="folder for the named results of a recipe of several documents; default: removed once they are used",
)
def merge(
    recipe: Path,
    out: Path | None,
    show: bool,
    durable: bool,
    workers: int | None,
    memory: str | None,
    timings: Path | None,
    store: Path | None,
    intermediates: Path | None,
) -> None:
    """Make one model from RECIPE in the new folder OUT.

    RECIPE is a few lines of YAML, or a recipe of mergekit's as it is (docs/mergekit.md). OUT is a folder that
    `transformers` loads: weights (safetensors), config, generation config, tokenizer, chat template, and a model card
    with recipe and lineage. It is written under another name and renamed, so it is there whole or not at all. With
    --store the chain of a continual method (opcm) stays: the same recipe with one more expert costs one more step.
    """
    began = time.time()
    with errors(partial(left_of, out, store, intermediates)):
        from flows.session.startup import digest_cache, hash_ahead, loops, quick_imports

        digests = digest_cache()
        if out is not None and not show:
            hash_ahead(recipe, digests)

        with quick_imports():
            from flows.cli.terminal import progress
            from flows.cli.texts import recipe_text
            from flows.session.limits import readable
            from flows.session.session import resolver
            from flows.session.settings import memory_setting, worker_setting
            from mergecore.engine.executor import InProcess
            from mergecore.products.masks import PRODUCT, open_product
            from mergecore.recipes.merge_file import merge_file

        if show:
            click.echo(recipe_text(recipe, resolver(digests)))
            return
        check_timings(timings)
        if out is None:
            raise click.UsageError("OUT is missing: the new folder for the model (or --show to print the recipe)")
        stages = {"start": time.time() - process_start(began)}
        with progress() as report:
            find, executor = resolver(digests, report), InProcess(worker_setting(workers).value)
            done = merge_file(
                recipe, out, find, executor, report, durable=durable, intermediates=intermediates, library=loops(),
                memory=memory_setting(memory).value, store=store,
            )  # fmt: skip
        if timings is not None:
            timings.write_text(json.dumps({**stages, **done[-1].seconds}) + "\n")
        for model in done:
            for warning in model.warnings:
                click.echo(f"note: {warning}", err=True)
            click.echo(f"{model.folder}  {readable(model.size)}  digest {model.digest[:16]}")
            if (model.folder / PRODUCT).exists():
                record = open_product(model.folder).record
                tasks = ", ".join(task.name for task in record.tasks)
                click.echo(f"a product of masks for {tasks}: {record.bytes.text}")


@main.command()
@click.argument("product", type=click.Path(path_type=Path))
@click.argument("task")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(DTYPE_CHOICES), help="default: as the recipe says")
@click.option("--shard-size", default="5GB", show_default=True, help="at most so many bytes in a file")
@click.option("--durable", is_flag=True, help="fsync every file before OUT appears")
def unpack(product: Path, task: str, out: Path, dtype: str | None, shard_size: str, durable: bool) -> None:
    """Make the model of one task from a product of masks, in the new folder OUT.

    PRODUCT is a folder that `merge` wrote with tall_masks or emr. TASK is the name of an expert in its recipe. OUT is a
    folder that `transformers` loads.
    """
    with errors(partial(left_of, out)):
        from flows.cli.terminal import progress
        from mergecore.formats.unpack import unpack as write_model
        from mergecore.spec.sizes import size_in_bytes

        stored = SAFETENSORS_DTYPE[dtype] if dtype else None
        with progress() as report:
            digest = write_model(product, task, out, size_in_bytes(shard_size), report, dtype=stored, durable=durable)
        click.echo(f"{out}  digest {digest[:16]}")


@main.command(name="extract-lora")
@click.argument("expert")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--base", required=True, help="what the expert was trained from: a directory or hub id")
@click.option("--rank", "-r", required=True, type=click.IntRange(1), help="rank of every layer's update, at most")
@click.option(
    "--modules",
    "-m",
    multiple=True,
    help="layers to take: a name, its last part or a shell pattern; default: all linear layers",
)
@click.option("--dtype", type=click.Choice(DTYPE_CHOICES), default="float32", show_default=True)
@click.option("--durable", is_flag=True, help="fsync every file before OUT appears")
@click.option("--workers", type=click.IntRange(1), help="threads, each with one tensor in memory; default: one a core")
def extract_lora(
    expert: str,
    out: Path,
    base: str,
    rank: int,
    modules: tuple[str, ...],
    dtype: Dtype,
    durable: bool,
    workers: int | None,
) -> None:
    """Turn the full checkpoint EXPERT into a LoRA adapter in the new folder OUT, and show the error of each layer.

    In every linear layer the change from the base is replaced by the nearest matrix of the chosen rank. OUT is a folder
    that PEFT loads, with every tensor's error in extraction.json. Changes of embeddings, norms and biases are left out
    and counted.
    """
    with errors(partial(left_of, Path(out))):
        from flows.cli.terminal import progress
        from flows.cli.texts import extraction_text
        from flows.session.limits import readable
        from flows.session.session import resolver
        from flows.session.settings import worker_setting
        from flows.session.startup import digest_cache
        from mergecore.engine.executor import InProcess
        from mergecore.recipes.extract_lora import extract_lora as extract
        from mergecore.spec.sources import BaseSpec, ExpertSpec

        with progress() as report:
            find = resolver(digest_cache(), report)
            extraction = extract(
                ExpertSpec.model_validate(expert), BaseSpec(source=base), out, find,
                InProcess(worker_setting(workers).value), report,
                rank=rank, modules=modules, dtype=dtype, durable=durable,
            )  # fmt: skip
        for warning in extraction.warnings:
            click.echo(f"note: {warning}", err=True)
        click.echo(extraction_text(extraction))
        click.echo(f"{extraction.folder}  {readable(extraction.size)}  digest {extraction.digest[:16]}")


@main.command(name="transplant-tokenizer")
@click.argument("model")
@click.argument("donor")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--method",
    type=click.Choice(["omp", "nearest", "mean", "zero"]),
    default="omp",
    show_default=True,
    help="rows of tokens that MODEL lacks: sparse combinations of shared tokens, of the nearest ones, a mean, zeros",
)
@click.option("--count", "-k", type=click.IntRange(1), default=64, show_default=True, help="shared tokens in each row")
@click.option("--metric", type=click.Choice(["euclidean", "cosine"]), default="euclidean", help="of nearest")
@click.option(
    "--weighting",
    type=click.Choice(["distance", "barycentric", "least_squares"]),
    default="distance",
    help="of nearest",
)
@click.option("--pad-to-multiple-of", "multiple", type=click.IntRange(1), default=1, help="of it is the number of rows")
@click.option("--shard-size", default="5GB", show_default=True, help="at most so many bytes in a file")
@click.option("--durable", is_flag=True, help="fsync every file before OUT appears")
@click.option("--workers", type=click.IntRange(1), help="threads; default: one a core")
def transplant_tokenizer(
    model: str,
    donor: str,
    out: Path,
    method: Approximation,
    count: int,
    metric: Metric,
    weighting: Weighting,
    multiple: int,
    shard_size: str,
    durable: bool,
    workers: int | None,
) -> None:
    """Write MODEL with the tokenizer of DONOR into the new folder OUT, without training.

    Rows of tokens that both have stay as they are. A row that MODEL lacks is put together of shared tokens: the
    combination that approximates DONOR's row, taken of MODEL's rows. Both are directories or hub ids.
    """
    with errors(partial(left_of, out)):
        from flows.cli.terminal import progress
        from flows.cli.texts import transplant_text
        from flows.session.limits import readable
        from flows.session.session import resolver
        from flows.session.settings import worker_setting
        from flows.session.startup import digest_cache
        from mergecore.engine.executor import InProcess
        from mergecore.recipes.transplant_tokenizer import Rules
        from mergecore.recipes.transplant_tokenizer import transplant_tokenizer as transplant
        from mergecore.spec.sizes import size_in_bytes
        from mergecore.spec.sources import SourceSpec

        rules, size = Rules(method, count, metric, weighting, multiple), size_in_bytes(shard_size)
        with progress() as report:
            find, executor = resolver(digest_cache(), report), InProcess(worker_setting(workers).value)
            result = transplant(
                SourceSpec(source=model), SourceSpec(source=donor), out, find, executor, report, rules,
                shard_size=size, durable=durable,
            )  # fmt: skip
        click.echo(transplant_text(result))
        click.echo(f"{result.folder}  {readable(result.size)}  digest {result.digest[:16]}")


@main.command()
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


@main.command()
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


@main.command()
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


@main.command()
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
