"""The files beside the result's weights that refer to tokens: tokenizer, special tokens, config, chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mergecore.checkpoints.snapshot import Snapshot, read_json
from mergecore.checkpoints.sources import decides
from mergecore.checkpoints.vocabulary.configuration import config_with, ends_in, ids_in, plain_ids
from mergecore.checkpoints.vocabulary.result import ResultTokenizer
from mergecore.checkpoints.vocabulary.tokenizer import SETTINGS, TOKENIZER, Tokenizer, few
from mergecore.errors import MismatchError

CONFIG = "config.json"
GENERATION = "generation_config.json"
NAMES = ("token", "vocab", "merges", "special_tokens", "chat_template", "additional_chat_templates/", "spiece")
"""What the names of files that belong to a tokenizer hold."""
STALE = ("vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "special_tokens_map.json")
"""Files that say the vocabulary once more; a loader needs none of them beside tokenizer.json."""
LISTS = ("extra_special_tokens", "additional_special_tokens")
MARKER = re.compile(r"<\|[^|<>{}\s]+\|>")
"""What is written like a special token."""


def of_tokenizer(name: str) -> bool:
    """Return whether a file belongs to a tokenizer."""
    return (any(part in name for part in NAMES) or name.endswith(".model")) and not name.endswith(
        (".safetensors", ".yaml")
    )


def check_ids(result: ResultTokenizer, owner: Snapshot) -> None:
    """Raise MismatchError for a special token that is no token of the result, by its id in a configuration or by its
    name.
    """
    known, who = set(result.tokens.values()), result.owner.owner
    for name in (CONFIG, GENERATION):
        config = read_json(owner.source, name) if name in owner.source.files else {}
        for key, number in ids_in(config):
            if number not in known:
                raise MismatchError(
                    f"{who}: {name} says {key} {number}, which is no token of the result ({len(known)} tokens, the "
                    f"last is {max(known, default=-1)}); correct the file, or add the token: tokenizer.tokens"
                )
    settings = result.owner.settings
    named = [(role, token) for token, roles in result.owner.roles.items() for role in sorted(roles)]
    named += [(key, str(_text(entry))) for key in LISTS for entry in _listed(settings.get(key))]
    for role, token in named:
        if token not in result.tokens:
            raise MismatchError(
                f"{who}: {SETTINGS} says {role} {token!r}, for which no model has a row; a loader would add it "
                f"behind the last one. Give it a row: "
                f"tokenizer: {{tokens: {{{json.dumps(token)}: {{source: {{kind: zero}}}}}}}}"
            )


def _listed(entries: Any) -> Sequence[Any]:
    return list(entries.values()) if isinstance(entries, Mapping) else entries or []


def _text(entry: Any) -> Any:
    return entry.get("content") if isinstance(entry, Mapping) else entry


def changed_files(result: ResultTokenizer, base: Snapshot, owner: Snapshot) -> dict[str, bytes | None]:
    """Return the files that differ beside the base's weights, by name; None: the file is removed.

    config.json is not among them.
    """
    changed = files_of_tokenizer(base, owner) if owner is not base else dict[str, bytes | None]()
    if result.content is not None:
        stale = {*owner.source.files, *changed} & {*STALE, *(n for n in owner.source.files if n.endswith(".model"))}
        changed |= dict.fromkeys(stale)
        changed[TOKENIZER] = json.dumps(result.content, ensure_ascii=False, indent=1).encode()
        changed[SETTINGS] = _json(settings_with(result))
    return changed


def files_of_tokenizer(base: Snapshot, owner: Snapshot) -> dict[str, bytes | None]:
    """Return the owner's tokenizer files in place of the base's, and its special tokens in generation_config.json.

    The owner's processors, poolings and the like take the place of the base's too: they were made for its tokens. Code
    and configuration stay with the base.
    """
    changed: dict[str, bytes | None] = {name: None for name in base.source.files if of_tokenizer(name)}
    for name, file in owner.source.files.items():
        if of_tokenizer(name) or _beside_tokenizer(name):
            changed[name] = owner.source.read(name, 0, file.size)
    ours, theirs = (
        read_json(model.source, GENERATION) if GENERATION in model.source.files else None for model in (base, owner)
    )
    if ours is not None or theirs is not None:
        owner_ids = plain_ids(owner.config)
        ids = {key: owner_ids[key] for key in ours or {} if key in owner_ids} if theirs is None else theirs
        changed[GENERATION] = _json(config_with(ours or {}, ids))
    return changed


def _beside_tokenizer(name: str) -> bool:
    return decides(name) and name not in (CONFIG, GENERATION) and not name.endswith(".py")


def settings_with(result: ResultTokenizer) -> dict[str, Any]:
    """Return tokenizer_config.json with the result's added tokens."""
    settings = dict(result.owner.settings)
    if "added_tokens_decoder" in settings:
        settings["added_tokens_decoder"] = {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
            for entry in result.added.values()
        }
    settings.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    return settings


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


# --- what is to be said aloud -------------------------------------------------------------------------------------


def end_warnings(result: ResultTokenizer, owner: Snapshot, models: Sequence[tuple[Tokenizer, Snapshot]]) -> list[str]:
    """Warn of experts that end their texts with a token that does not end the result's."""
    ends = _ends(owner, {number: token for token, number in result.tokens.items()})
    warnings = []
    for tokenizer, snapshot in models:
        theirs = _ends(snapshot, {number: token for token, number in tokenizer.tokens.items()})
        if theirs - ends:
            own = f"the result with {_listing(ends)}" if ends else "the result with none that its configurations name"
            warnings.append(
                f"{tokenizer.owner} ends its texts with {_listing(theirs)}, {own}: it may not stop where "
                f"{tokenizer.owner} would (tokenizer.source says whose special tokens it has)"
            )
    return warnings


def _ends(snapshot: Snapshot, names: Mapping[int, str]) -> set[str]:
    configs = [snapshot.config]
    if GENERATION in snapshot.source.files:
        configs.append(read_json(snapshot.source, GENERATION))
    return {names[number] for config in configs for number in ends_in(config) if number in names}


def token_warnings(result: ResultTokenizer, models: Sequence[Tokenizer]) -> list[str]:
    """Warn of models with added tokens that the result lacks."""
    lost = {model.owner: [token for token in model.added if token not in result.tokens] for model in models}
    return [
        f"{owner} has added tokens that the result lacks: {few(tokens)}; `tokenizer: union` has them all"
        for owner, tokens in lost.items()
        if tokens
    ]


def splitting_warnings(result: ResultTokenizer, models: Sequence[Tokenizer]) -> list[str]:
    """Warn of models whose tokenizer splits text in another way than the result's, though its tokens are of the same
    kind.
    """
    warnings = []
    for model in models:
        parts = [
            part
            for part in ("normalizer", "pre_tokenizer")
            if model.content.get(part) != result.owner.content.get(part)
        ]
        if parts and model.kind == result.owner.kind:
            differing = " and ".join(parts)
            warnings.append(
                f"{model.owner} has another {differing} than {result.owner.owner}, whose way of splitting text the "
                "result has"
            )
    return warnings


def template_warnings(
    text: str | None, written: str | None, result: ResultTokenizer, models: Sequence[Tokenizer]
) -> list[str]:
    """Warn where the result has no chat template, or where the template contains tokens that the result lacks.

    text: the template. written: the template that the recipe gives; everything in it that looks like a special token
    counts.
    """
    if text is None:
        owners = [model.owner for model in models if model.template]
        if owners:
            return [
                f"{' and '.join(owners)}: a chat template lies there, and the result has none; give one as "
                "`chat_template` of a recipe, or put one beside the base"
            ]
        return []
    special = {token for model in models for token in model.added if len(token) > 2}
    return marker_warnings({token for token in special if token in text} | markers(written), result.tokens)


def markers(written: str | None) -> set[str]:
    """Return what a chat template contains that looks like a special token."""
    return set(MARKER.findall(written or ""))


def marker_warnings(written: set[str], tokens: Collection[str]) -> list[str]:
    """Warn of those that are no tokens of the result."""
    lost = sorted(token for token in written if token not in tokens)
    if not lost:
        return []
    shown = ", ".join(map(repr, lost[:5]))
    return [f"the chat template writes {shown}, no token of the result: it would be taken apart like any text"]


def _listing(tokens: set[str]) -> str:
    return " or ".join(repr(token) for token in sorted(tokens))
