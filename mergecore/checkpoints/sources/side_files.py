"""The files beside a checkpoint's weights: which of them go with a merge, and which say nothing about numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatch

KNOWN = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "*spiece*",
    "chat_template.jinja",
    "chat_template.json",
)
"""Patterns of the files at the top of the folder that go with a merge whatever their size."""
TEMPLATES = "additional_chat_templates"
"""The folder of which every file goes with a merge."""
LIMIT = 32 << 20
"""Bytes that any other file may have."""
WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".keras", ".msgpack", ".ot", ".gguf", ".ggml", ".onnx",
    ".onnx_data", ".onnx.data", ".tflite", ".mlmodel", ".npy", ".npz", ".pkl", ".pickle", ".joblib", ".nemo",
    ".engine", ".pdparams", ".index.json", ".distcp",
)  # fmt: skip
"""Endings of weights in any format, and of their indexes; pickles may run code when they are loaded."""
ARCHIVES = (".tar", ".gz", ".tgz", ".zip", ".7z", ".bz2", ".xz", ".zst", ".parquet", ".arrow")
"""Endings of packed files and of data."""
DEBRIS = (
    "trainer_state.json", "trainer_log.jsonl", "training_args*", "training_config*", "*_results.json", "optimizer*",
    "rng_state*", "random_states*", "events.out.*", "*tfevents*", "*.log", "*.out",
    "*.tmp", "*.lock", "*.incomplete", "*.pyc", "zero_to_fp32.py", "latest", "training_loss*", "training_eval*",
)  # fmt: skip
"""Names of what training leaves behind."""
DEBRIS_FOLDERS = (
    "runs", "logs", "wandb", "mlruns", "tensorboard", "checkpoint-*", "checkpoints", "checkpoints-*", "global_step*",
    "__pycache__", "eval", "events*", "original", "onnx", "openvino", "coreml", "tf", "flax",
)  # fmt: skip
"""Folders of what training leaves behind, and of copies in other formats."""
REPLACED = ("README.md", "mergeloom.yaml", "mergekit.yml", "mergekit_config.yml")
"""Files that speak of the checkpoint itself and not of a merge of it. A merge writes its own."""
MODULES = "modules.json"
"""The list of a sentence encoder's modules and of their folders."""
DOCUMENTS = (
    "licen[sc]e*", "notice*", "copying*", "use_policy*", "acceptable_use*", "*.md", "*.rst", "*.pdf", "*.png",
    "*.jpg", "*.jpeg", "*.gif", "*.webp", "*.svg", "*.bib", "citation*",
)  # fmt: skip
"""Names, in small letters, of what people read and no program does."""


def side_files(sizes: Mapping[str, int], read: Callable[[str], bytes]) -> set[str]:
    """Return the files beside the weights that go with a merge.

    sizes: bytes of every file, '/' between folders. read: returns a small file's bytes. Every small file goes, but for
    weights, indexes, archives, what training leaves behind and what a merge writes itself. Folders inside folders do
    not. A folder with weights in it is another model, unless modules.json names it.
    """
    modules = _modules(read(MODULES)) if MODULES in sizes else frozenset[str]()
    others = {_folder(name) for name in sizes if name.endswith(WEIGHTS)} - modules
    return {name for name in sizes if _goes_along(name, sizes[name], others)}


def _goes_along(name: str, size: int, others: Collection[str]) -> bool:
    folder, file = _folder(name), name.rpartition("/")[2]
    if any(part.startswith(".") for part in name.split("/")) or "/" in folder:
        return False
    if folder == TEMPLATES or (not folder and any(fnmatch(name, pattern) for pattern in KNOWN)):
        return True
    if folder and (folder in others or any(fnmatch(folder, pattern) for pattern in DEBRIS_FOLDERS)):
        return False
    if (
        name in (*REPLACED, "adapter_config.json")
        or file == "README.md"
        or file.endswith((*WEIGHTS, *ARCHIVES))
        or ".index." in file
    ):
        return False
    return size <= LIMIT and not any(fnmatch(file, pattern) for pattern in DEBRIS)


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _modules(content: bytes) -> frozenset[str]:
    """Return the folders that modules.json names; a file that says something else names none."""
    try:
        return frozenset(str(module["path"]).strip("/") for module in json.loads(content)) - {""}
    except (ValueError, KeyError, TypeError):
        return frozenset()


def is_document(name: str) -> bool:
    """Return whether a file is a licence, a text or a picture: people read it, and no number depends on it."""
    file = name.rpartition("/")[2].lower()
    return any(fnmatch(file, pattern) for pattern in DOCUMENTS)


def named_files(names: Iterable[str]) -> list[str]:
    """Return names as they are told: a file at the top by itself, files in a folder by the folder and their number."""
    listed: list[str] = []
    folders: dict[str, int] = {}
    for name in sorted(names):
        top, _, below = name.partition("/")
        if below:
            folders[top] = folders.get(top, 0) + 1
        else:
            listed.append(name)
    return listed + [f"{folder}/ ({count} file{'s' * (count > 1)})" for folder, count in folders.items()]
