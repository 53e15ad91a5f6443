"""Running one recipe in a test: as the library does it, and as a person at the command line does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner, Result

from flows.cli.main import main
from mergecore.checkpoints.sources import Source
from mergecore.checkpoints.sources.digests import DigestCache
from mergecore.checkpoints.sources.resolve import resolve
from mergecore.engine.executor import InProcess
from mergecore.events import silent
from mergecore.recipes.merge_recipe import WrittenModel, merge_recipe
from mergecore.spec.recipe import parse_recipe
from mergecore.spec.sources import SourceSpec


def find(source: SourceSpec) -> Source:
    """The local source, hashed anew."""
    return resolve(source.source, digests=DigestCache(None))


def merge_into(recipe: dict[str, Any], out: Path, **options: Any) -> WrittenModel:
    """The recipe's model in `out`, made in this process; paths may be given as such."""
    return merge_recipe(parse_recipe(plain(recipe), "recipe"), out, find, InProcess(), silent, **options)


def command(folder: Path, recipe: dict[str, Any] | str, *options: str, out: str = "out") -> Result:
    """`mergeloom merge` of a recipe written to `folder`, into the folder `out` beside it."""
    path = folder / "recipe.yaml"
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(plain(recipe)))
    return CliRunner().invoke(main, ["merge", str(path), str(folder / out), *options])


def plan_of(folder: Path, spec: dict[str, Any] | str) -> Result:
    """`mergeloom plan` of a spec written to `folder`."""
    path = folder / "spec.yaml"
    path.write_text(spec if isinstance(spec, str) else yaml.safe_dump(plain(spec)))
    return CliRunner().invoke(main, ["plan", str(path)])


def plain(value: Any) -> Any:
    """Paths as text, at any depth."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
