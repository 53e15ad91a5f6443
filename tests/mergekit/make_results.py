"""Makes results.safetensors anew: what mergekit makes of every recipe beside this file.

mergekit runs in an environment of its own, whose Python is the argument:
python tests/mergekit/make_results.py ENVIRONMENT/bin/python
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results.safetensors"


def recipes() -> list[Path]:
    """Every recipe, by name."""
    return sorted((HERE / "recipes").glob("*.yml"))


def main(python: str) -> None:
    """Write the models, have mergekit merge them, and keep what came out."""
    sys.path.insert(0, str(HERE))
    from models import write_models

    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        subprocess.run([python, str(HERE / "inside_mergekit.py"), folder], check=True, env=environment)
        keep(Path(folder))


def keep(folder: Path) -> None:
    """One flat tensor for each result: its tensors by name, one after another; and mergekit's version."""
    import torch
    from safetensors.torch import load_file, save_file

    found = {}
    for recipe in recipes():
        held: dict[str, torch.Tensor] = {}
        for path in sorted((folder / "out" / recipe.stem).glob("*.safetensors")):
            held |= load_file(path)
        found[recipe.stem] = torch.cat([held[name].float().reshape(-1) for name in sorted(held)])
    save_file(found, RESULTS, {"mergekit": (folder / "out" / "version").read_text()})
    RESULTS.chmod(0o644)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
