"""Runs in mergekit's environment: merges every recipe of one folder, in the folder of the models; both are
arguments.
"""

import importlib.metadata
import os
import sys
from pathlib import Path

from click.testing import CliRunner
from mergekit.scripts.multimerge import main as several
from mergekit.scripts.run_yaml import main as single

os.chdir(sys.argv[1])
options = ["--no-copy-tokenizer", "--random-seed", "1", "--quiet", "--lora-merge-cache", "folded"]
for recipe in sorted(Path(sys.argv[2]).glob("*.yml")):
    out = f"out/{recipe.stem}"
    if "\n---\n" in recipe.read_text():
        result = CliRunner().invoke(several, [str(recipe), "--out-path", out, "-I", f"{out}.named", *options])
    else:
        result = CliRunner().invoke(single, [str(recipe), out, *options])
    if result.exit_code:
        sys.exit(f"{recipe.name}: {result.output[-1000:]} {result.exception!r}")
Path("out/version").write_text(importlib.metadata.version("mergekit"))
