"""The files that go with a model's weights: config, tokenizer, chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from mergecore.checkpoints.snapshot import Snapshot
from mergecore.tensors.dtypes import CONFIG_DTYPE


def write_companions(folder: Path, snapshot: Snapshot, at: Path, dtypes: Sequence[str]) -> None:
    """Copy config, tokenizer, chat template and the like of `snapshot` (lying in `at`) beside merged weights.

    dtypes: safetensors names of the floating-point tensors written; where there is only one, the config says so.
    """
    for name in snapshot.source.files:
        if name.endswith((".safetensors", ".safetensors.index.json")) or name == "adapter_config.json":
            continue
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name == "config.json":
            config = dict(snapshot.config)
            if len(set(dtypes)) == 1 and dtypes[0] in CONFIG_DTYPE:
                key = "torch_dtype" if "torch_dtype" in config else "dtype"
                config[key] = CONFIG_DTYPE[dtypes[0]]
            target.write_text(json.dumps(config, indent=2) + "\n")
        else:
            shutil.copyfile(at / name, target)


def write_chat_template(folder: Path, text: str) -> None:
    """Have `text` as the chat template, in the file of its own where transformers looks first."""
    (folder / "chat_template.jinja").write_text(text)
    config = folder / "tokenizer_config.json"
    if config.exists():
        held = json.loads(config.read_text())
        if held.pop("chat_template", None) is not None:
            config.write_text(json.dumps(held, indent=2, ensure_ascii=False) + "\n")
