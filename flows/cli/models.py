"""The commands that write one model or one adapter: merge, unpack, extract-lora, transplant-tokenizer."""

from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from flows.cli.endings import errors, left_of
from mergecore.tensors.dtypes import DTYPE_CHOICES, SAFETENSORS_DTYPE, Dtype

if TYPE_CHECKING:
    from mergecore.arithmetic.approximation import Metric, Weighting
    from mergecore.recipes.transplant_tokenizer import Approximation


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


def process_start(otherwise: float) -> float:
    """Return when this process began, in seconds since the epoch; `otherwise` where the system does not say."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    except (OSError, StopIteration):
        return otherwise
    return float(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")


@click.command()
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


@click.command()
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


@click.command(name="extract-lora")
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


@click.command(name="transplant-tokenizer")
@click.argument("model")
@click.argument("donor")
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--method",
    type=click.Choice(["omp", "nearest", "mean", "zero"]),
    default="omp",
    show_default=True,
    help="rows of tokens that MODEL lacks: sparse combinations of shared tokens, the nearest ones, a mean, or zeros",
)
@click.option("--count", "-k", type=click.IntRange(1), default=64, show_default=True, help="shared tokens in each row")
@click.option("--metric", type=click.Choice(["euclidean", "cosine"]), default="euclidean", help="of nearest")
@click.option(
    "--weighting",
    type=click.Choice(["distance", "barycentric", "least_squares"]),
    default="distance",
    help="of nearest",
)
@click.option(
    "--pad-to-multiple-of",
    "multiple",
    type=click.IntRange(1),
    default=1,
    help="make the number of rows a multiple of this",
)
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

    Rows of tokens that both have stay as they are. For a token that MODEL lacks, a combination of shared tokens is
    found that approximates DONOR's row. The new row is the same combination of MODEL's rows. MODEL and DONOR are
    directories or hub ids.
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
