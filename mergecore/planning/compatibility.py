"""Checks that a pool's checkpoints can be merged with each other."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergecore.checkpoints.fit import float64_loss, float64_names
from mergecore.checkpoints.snapshot import Snapshot, read_json
from mergecore.checkpoints.vocabulary.configuration import counts_in
from mergecore.checkpoints.vocabulary.tokenizer import TOKENIZER, pieces_of
from mergecore.errors import MismatchError, SourceError
from mergecore.spec.sources import BaseSpec

VOCABULARIES = "for models whose vocabularies differ say whose is wanted, as in `tokenizer: {source: union}`"
"""What to do about them."""


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    """What versions of one model have alike, as far as it is said."""
    named = {key: config.get(key) for key in ("model_type", "hidden_size", "num_hidden_layers")}
    return {**{key: value for key, value in named.items() if value is not None}, **counts_in(config)}


def _refuse_quantized(snapshot: Snapshot, where: str) -> None:
    """Raise MismatchError where packed integers and their scales would be taken for weights."""
    quantization = snapshot.config.get("quantization_config")
    if quantization:
        kind = quantization.get("quant_method", "") if isinstance(quantization, Mapping) else ""
        raise MismatchError(
            f"{where}: {snapshot.source.uri} is quantized ({kind or 'quantization_config in its config.json'}): its "
            "numbers "
            "are codes, not weights; give the checkpoint before it was quantized, or a dequantized copy"
        )


def float64_warnings(checkpoints: Mapping[str, Snapshot]) -> list[str]:
    """Say whose float64 tensors lose digits. checkpoints: full ones, by what messages call them."""
    wide = [where for where, snapshot in checkpoints.items() if float64_names(snapshot.tensors)]
    if not wide:
        return []
    name = float64_names(checkpoints[wide[0]].tensors)[0]
    return [f"{', '.join(wide)}: {float64_loss(name)}"]


def _same_base(recorded: str, snapshot: Snapshot, base: BaseSpec) -> bool:
    known = (base.source, base.known_as or "", snapshot.source.uri)
    return any(recorded == name or Path(recorded).name == Path(name.partition("@")[0]).name for name in known if name)


def tokenizer_warnings(expert: Snapshot, base: Snapshot, where: str) -> list[str]:
    """Say where a full checkpoint's tokenizer.json differs from the base's and has the same vocabulary.

    Raises MismatchError where the vocabularies differ. An adapter uses the base's tokenizer.
    """
    name = TOKENIZER
    if expert.kind != "full" or name not in expert.source.files or name not in base.source.files:
        return []
    if expert.source.files[name].sha256 == base.source.files[name].sha256:
        return []
    ours, theirs = (
        _vocabulary(read_json(model.source, name), f"{model.source.uri}/{name}") for model in (base, expert)
    )
    differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    if differing:
        raise MismatchError(
            f"{where}: its tokenizer gives {len(differing)} tokens other ids than the base's (first: "
            f"{differing[0]!r}); "
            f"only experts that share the base's vocabulary can be merged; {VOCABULARIES}"
        )
    return [f"{where} has another tokenizer.json than the base (same vocabulary); the base's is used"]


def _vocabulary(tokenizer: Mapping[str, Any], where: str) -> dict[str, int]:
    try:
        return pieces_of(tokenizer.get("model") or {}) | {
            entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens") or []
        }
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise SourceError(f"{where} is no tokenizer that can be read ({error}); fetch it again") from error
