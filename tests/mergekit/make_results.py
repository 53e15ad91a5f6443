"""Makes results.safetensors and vocabularies.safetensors anew: what mergekit makes of the recipes in the two folders;
and depths.json, where tensors stand in its gradients.

mergekit runs in an environment of its own, whose Python is the argument:
python tests/mergekit/make_results.py ENVIRONMENT/bin/python
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results.safetensors"
VOCABULARIES = HERE / "vocabularies.safetensors"


def recipes() -> list[Path]:
    """Every recipe over models of one vocabulary, by name."""
    return sorted((HERE / "recipes").glob("*.yml"))


def vocabulary_recipes() -> list[Path]:
    """Every recipe over models whose vocabularies differ, by name."""
    return sorted((HERE / "vocabularies").glob("*.yml"))


def main(python: str) -> None:
    """Write the models, have mergekit merge them, and keep what came out."""
    sys.path.insert(0, str(HERE))
    from models import write_models, write_models_of_vocabularies

    for write, paths, result in (
        (write_models, recipes(), RESULTS),
        (write_models_of_vocabularies, vocabulary_recipes(), VOCABULARIES),
    ):
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
            command = [python, str(HERE / "inside_mergekit.py"), folder, str(paths[0].parent)]
            subprocess.run(command, check=True, env=environment)
            keep(Path(folder), paths, result)
    subprocess.run([python, str(HERE / "make_depths.py"), str(HERE / "depths.json")], check=True)


def keep(folder: Path, paths: list[Path], result: Path) -> None:
    """One flat tensor for each result: its tensors by name, one after another; mergekit's version; and tokens by
    recipe.
    """
    import torch
    from safetensors.torch import load_file, save_file

    flat, said = {}, {"mergekit": (folder / "out" / "version").read_text()}
    for recipe in paths:
        tensors: dict[str, torch.Tensor] = {}
        for path in sorted((folder / "out" / recipe.stem).glob("*.safetensors")):
            tensors |= load_file(path)
        flat[recipe.stem] = torch.cat([tensors[name].float().reshape(-1) for name in sorted(tensors)])
        if (tokenizer := folder / "out" / recipe.stem / "tokenizer.json").exists():
            held_there = json.loads(tokenizer.read_text())
            tokens = {
                **held_there["model"]["vocab"],
                **{token["content"]: token["id"] for token in held_there["added_tokens"]},
            }
            said[recipe.stem] = json.dumps(dict(sorted(tokens.items(), key=lambda pair: pair[1])), ensure_ascii=False)
    save_file(flat, result, said)
    result.chmod(0o644)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
