"""The files that go with a model's weights: config, tokenizer, chat template and other small files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from mergecore.checkpoints.snapshot import Snapshot
from mergecore.checkpoints.sources.selection import ADAPTER_CONFIG
from mergecore.tensors.dtypes import CONFIG_DTYPE

DIFFUSERS = "_class_name"
"""The key of config.json that names the class of a part of a diffusers pipeline. Such a config names no dtype."""


def write_companions(folder: Path, snapshot: Snapshot, at: Path, dtypes: Sequence[str]) -> None:
    """Copy the small files of `snapshot` (config, tokenizer, licence …) from the folder `at` beside merged weights.

    dtypes: safetensors names of the floating-point tensors that were written. Where there is one, the config names it.
    """
    for name in snapshot.source.files:
        if name.endswith((".safetensors", ".safetensors.index.json")) or name == ADAPTER_CONFIG:
            continue
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name == "config.json":
            config = dict(snapshot.config)
            if len(set(dtypes)) == 1 and dtypes[0] in CONFIG_DTYPE and DIFFUSERS not in config:
                key = "torch_dtype" if "torch_dtype" in config else "dtype"
                config[key] = CONFIG_DTYPE[dtypes[0]]
            target.write_text(json.dumps(config, indent=2) + "\n")
        else:
            shutil.copyfile(at / name, target)


def write_chat_template(folder: Path, text: str) -> None:
    """Write `text` as the chat template, into the file where transformers looks first."""
    (folder / "chat_template.jinja").write_text(text)
    config = folder / "tokenizer_config.json"
    if config.exists():
        settings = json.loads(config.read_text())
        if settings.pop("chat_template", None) is not None:
            config.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
