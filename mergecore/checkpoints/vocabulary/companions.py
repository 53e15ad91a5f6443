"""The files beside the result's weights that speak of tokens: tokenizer, special tokens, config, chat template."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mergecore.checkpoints.snapshot import Snapshot, read_json
from mergecore.checkpoints.vocabulary.configuration import config_with, ends_in, ids_in, plain_ids
from mergecore.checkpoints.vocabulary.result import ResultTokenizer
from mergecore.checkpoints.vocabulary.tokenizer import SETTINGS, TOKENIZER, Tokenizer
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
    """Whether a file belongs to a tokenizer."""
    return (any(part in name for part in NAMES) or name.endswith(".model")) and not name.endswith(
        (".safetensors", ".yaml")
    )


def check_ids(result: ResultTokenizer, owner: Snapshot) -> None:
    """Raise MismatchError for a special token, by id in a configuration or by name, that is no token of the result."""
    known, who = set(result.tokens.values()), result.owner.owner
    for name in (CONFIG, GENERATION):
        held = read_json(owner.source, name) if name in owner.source.files else {}
        for key, number in ids_in(held):
            if number not in known:
                raise MismatchError(
                    f"{who}: {name} says {key} {number}, which is no token of the result ({len(known)} tokens, the last is "
                    f"{max(known, default=-1)}); correct the file, or add the token: tokenizer.tokens"
                )
    settings = result.owner.settings
    named = [(role, token) for token, roles in result.owner.roles.items() for role in sorted(roles)]
    named += [(key, str(_text(one))) for key in LISTS for one in _listed(settings.get(key))]
    for role, token in named:
        if token not in result.tokens:
            raise MismatchError(
                f"{who}: {SETTINGS} says {role} {token!r}, for which no model has a row; a loader would add it behind the "
                f"last one. Give it a row: tokenizer: {{tokens: {{{json.dumps(token)}: {{source: {{kind: zero}}}}}}}}"
            )


def _listed(held: Any) -> Sequence[Any]:
    return list(held.values()) if isinstance(held, Mapping) else held or []


def _text(held: Any) -> Any:
    return held.get("content") if isinstance(held, Mapping) else held


def changed_files(result: ResultTokenizer, base: Snapshot, owner: Snapshot) -> dict[str, bytes | None]:
    """What is to be otherwise beside the base's weights, by name; None: the file is not there. config.json is not among it."""
    changed = files_of_tokenizer(base, owner) if owner is not base else dict[str, bytes | None]()
    if result.held is not None:
        stale = {*owner.source.files, *changed} & {*STALE, *(n for n in owner.source.files if n.endswith(".model"))}
        changed |= dict.fromkeys(stale)
        changed[TOKENIZER] = json.dumps(result.held, ensure_ascii=False, indent=1).encode()
        changed[SETTINGS] = _json(settings_with(result))
    return changed


def files_of_tokenizer(base: Snapshot, owner: Snapshot) -> dict[str, bytes | None]:
    """The owner's tokenizer in place of the base's, and its special tokens in what is said of generation."""
    changed: dict[str, bytes | None] = {name: None for name in base.source.files if of_tokenizer(name)}
    for name, file in owner.source.files.items():
        if of_tokenizer(name):
            changed[name] = owner.source.read(name, 0, file.size)
    ours, theirs = (
        read_json(one.source, GENERATION) if GENERATION in one.source.files else None for one in (base, owner)
    )
    if ours is not None or theirs is not None:
        said = plain_ids(owner.config)
        given = {key: said[key] for key in ours or {} if key in said} if theirs is None else theirs
        changed[GENERATION] = _json(config_with(ours or {}, given))
    return changed


def settings_with(result: ResultTokenizer) -> dict[str, Any]:
    """tokenizer_config.json, as it says of the result's added tokens."""
    held = dict(result.owner.settings)
    if "added_tokens_decoder" in held:
        held["added_tokens_decoder"] = {
            str(entry["id"]): {key: value for key, value in entry.items() if key != "id"}
            for entry in result.added.values()
        }
    held.setdefault("tokenizer_class", "PreTrainedTokenizerFast")
    return held


def _json(held: Mapping[str, Any]) -> bytes:
    return (json.dumps(held, indent=2, ensure_ascii=False) + "\n").encode()


# --- what is to be said aloud -------------------------------------------------------------------------------------


def said_of_ends(result: ResultTokenizer, owner: Snapshot, models: Sequence[tuple[Tokenizer, Snapshot]]) -> list[str]:
    """Experts that end their texts with a token that does not end the result's."""
    ends = _ends(owner, {number: token for token, number in result.tokens.items()})
    found = []
    for tokenizer, snapshot in models:
        theirs = _ends(snapshot, {number: token for token, number in tokenizer.tokens.items()})
        if ends and theirs and not ends & theirs:
            found.append(
                f"{tokenizer.owner} ends its texts with {_listing(theirs)}, the result with {_listing(ends)}: it may not stop "
                f"where {tokenizer.owner} would (tokenizer.source says whose special tokens it has)"
            )
    return found


def _ends(snapshot: Snapshot, names: Mapping[int, str]) -> set[str]:
    held = [snapshot.config]
    if GENERATION in snapshot.source.files:
        held.append(read_json(snapshot.source, GENERATION))
    return {names[number] for one in held for number in ends_in(one) if number in names}


def said_of_splitting(result: ResultTokenizer, models: Sequence[Tokenizer]) -> list[str]:
    """Models whose tokenizer takes text apart in another way than the result's, though it has the same kind of tokens."""
    found = []
    for one in models:
        parts = [part for part in ("normalizer", "pre_tokenizer") if one.held.get(part) != result.owner.held.get(part)]
        if parts and one.kind == result.owner.kind:
            said = " and ".join(parts)
            found.append(
                f"{one.owner} has another {said} than {result.owner.owner}, whose way of splitting text the result has"
            )
    return found


def said_of_template(
    text: str | None, written: str | None, result: ResultTokenizer, models: Sequence[Tokenizer]
) -> list[str]:
    """What the result's chat template writes that is no token of the result though some model has it, or the recipe writes
    it (`written`) like one; or that it has none."""
    if text is None:
        having = [one.owner for one in models if one.template]
        if having:
            return [
                f"{' and '.join(having)}: a chat template lies there, and the result has none; give one as `chat_template`"
            ]
        return []
    special = {token for one in models for token in one.added if len(token) > 2}
    return said_of_markers({token for token in special if token in text} | markers(written), result.tokens)


def markers(written: str | None) -> set[str]:
    """What a chat template writes like special tokens."""
    return set(MARKER.findall(written or ""))


def said_of_markers(found: set[str], tokens: Collection[str]) -> list[str]:
    """Which of them are no tokens of the result."""
    lost = sorted(token for token in found if token not in tokens)
    if not lost:
        return []
    shown = ", ".join(map(repr, lost[:5]))
    return [f"the chat template writes {shown}, no token of the result: it would be taken apart like any text"]


def _listing(tokens: set[str]) -> str:
    return " or ".join(repr(token) for token in sorted(tokens))
