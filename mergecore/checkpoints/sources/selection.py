"""Which files of a checkpoint matter: its weights, and what says how to read and how to run them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from mergecore.checkpoints.sources.side_files import REPLACED, side_files
from mergecore.errors import SourceError

INDEX = "model.safetensors.index.json"
INDEX_ENDING = ".safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
VARIANT = re.compile(
    r"^(?P<stem>[^.]+)\.(?:(?:fp|bf|float|bfloat)\d+\w*|(?:non_)?ema)(?:-\d+-of-\d+)?\.safetensors(?:\.index\.json)?$"
)
"""The name of weights in another precision beside the usual ones: diffusers writes model.fp16.safetensors."""
SHARD = re.compile(r"-\d+-of-\d+")
LOADED_BY_NAME = ("diffusion_pytorch_model", "open_clip_model", "open_clip_pytorch_model")
"""How weight files begin that a library other than transformers looks for by name."""


def files_that_matter(sizes: Mapping[str, int], read: Callable[[str], bytes], where: str) -> tuple[str, ...]:
    """Return the files of a checkpoint, sorted. sizes: bytes of all files, '/' between folders. read: returns a small
    file's bytes.

    model.safetensors decides where there is one, as `transformers` reads it; an index beside it is left over, unless it
    names that file. Then an index decides, then an adapter, then every safetensors file at the top. Of twins in two
    precisions the one without a variant in its name is read. Raises SourceError where there are no safetensors, or
    where the index cannot be read or names what is missing.
    """
    top = {name for name in sizes if "/" not in name}
    kept = side_files(sizes, read)
    top -= _variants(top)
    names = sizes.keys()
    weights = sorted(name for name in top if name.endswith(".safetensors"))
    indices = sorted(name for name in top if name.endswith(INDEX_ENDING))
    index = INDEX if INDEX in top else indices[0] if len(indices) == 1 and SINGLE not in top else None
    shards = set[str]() if index is None else set(weight_map(read(index), f"{where}/{index}").values())
    if index is not None and (SINGLE not in top or SINGLE in shards):
        _check_shards(index, shards, names, where)
        kept |= {index, *shards}
    elif SINGLE in top:
        kept.add(SINGLE)
    elif ADAPTER in top:
        kept |= {ADAPTER, ADAPTER_CONFIG} & top
        if ADAPTER_CONFIG not in top:
            raise SourceError(f"{where} holds {ADAPTER} but no {ADAPTER_CONFIG}, which says rank and scaling; add it")
    elif weights:
        kept |= set(weights)
    else:
        raise SourceError(f"{where} holds no safetensors weights. {_remedy(sorted(top), where)}")
    return tuple(sorted(kept))


def left_out(names: Collection[str], files: Collection[str]) -> tuple[str, ...]:
    """Return what does not go with a merge, sorted, without hidden files and what a merge writes itself."""
    rest = set(names) - set(files) - set(REPLACED)
    return tuple(sorted(name for name in rest if not any(part.startswith(".") for part in name.split("/"))))


def weights_stem(names: Collection[str]) -> str:
    """Return how the weight files of a merge are called, from those of its base: 'model', or the name that the base's
    library looks for.
    """
    stems = {name.partition(".")[0] for name in names if name.endswith(".safetensors") and "/" not in name}
    stems = {SHARD.sub("", stem) for stem in stems}
    return next((stem for stem in LOADED_BY_NAME if stems == {stem}), "model")


def _variants(top: Collection[str]) -> set[str]:
    """Return the weight files that lie beside the same in the usual precision."""
    usual = {SHARD.sub("", name.removesuffix(".index.json")) for name in top if VARIANT.match(name) is None}
    matches = ((name, VARIANT.match(name)) for name in top)
    return {
        name for name, match in matches if match is not None and f"{SHARD.sub('', match['stem'])}.safetensors" in usual
    }


def weight_map(content: bytes, where: str) -> dict[str, str]:
    """Return {tensor: file} of an index. Raises SourceError where it is none."""
    try:
        index = read_object(content, where)
        files = index["weight_map"]
        if isinstance(files, dict) and all(isinstance(file, str) and file for file in files.values()):
            return dict(files)
    except (SourceError, KeyError):
        pass
    raise SourceError(f"{where} is not an index: it must be JSON with a 'weight_map' of tensor to file; fetch it again")


def read_object(content: bytes, where: str) -> dict[str, Any]:
    """Return the object that a JSON file holds. Raises SourceError where it holds something else."""
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        reason = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise SourceError(f"{where} is not JSON: {reason}; fetch or write it again") from error
    if not isinstance(value, dict):
        raise SourceError(f"{where} holds {type(value).__name__}, not an object")
    return value


def _check_shards(index: str, named: Collection[str], names: Collection[str], where: str) -> None:
    """Raise SourceError where a file that an index names is not there."""
    missing = sorted(set(named) - set(names))
    if missing or not named:
        lacking = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "") if named else "no file at all"
        raise SourceError(
            f"{where}/{index} names {lacking}; {len(named) - len(missing)} of {len(named)} shards are there: "
            "the copy is not complete, fetch it again"
        )


def _remedy(top: list[str], where: str) -> str:
    """Say how to get safetensors from what is there."""
    gguf = next((name for name in top if name.endswith(".gguf")), None)
    pickled = next((name for name in top if name.endswith((".bin", ".bin.index.json", ".pt", ".pth", ".ckpt"))), None)
    load = f"model = transformers.AutoModelForCausalLM.from_pretrained('{where}'"
    if pickled is not None:
        return (
            f"It holds {pickled}; safetensors are needed. Convert: {load}, dtype='auto'), then "
            "model.save_pretrained('new-folder') (with the Auto class of your task) and copy the tokenizer files"
        )
    if gguf is not None:
        return (
            f"It holds {gguf}; safetensors are needed. Convert: {load}, gguf_file='{gguf}'), copy its state_dict into "
            "a fresh model of the same config without quantization_config, and save_pretrained that one"
        )
    return f"A checkpoint is {SINGLE}, or {INDEX} and its shards, or {ADAPTER} and {ADAPTER_CONFIG}; " + (
        f"this holds {', '.join(top[:5])}" + (", …" if len(top) > 5 else "") if top else "this is empty"
    )
