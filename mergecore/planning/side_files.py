"""What experts have beside their weights and the result will not have: files, ends of texts, chat templates, tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergecore.checkpoints.snapshot import Snapshot, read_json
from mergecore.checkpoints.sources import decides
from mergecore.checkpoints.sources.side_files import named_files
from mergecore.checkpoints.vocabulary.companions import CONFIG, GENERATION, of_tokenizer
from mergecore.checkpoints.vocabulary.configuration import ends_in
from mergecore.checkpoints.vocabulary.tokenizer import TOKENIZER, few, loader_ids, template_of

UNSAID = frozenset({"transformers_version", "_name_or_path", "name_or_path", "_commit_hash"})
"""Keys of a JSON file in which equal settings may differ."""


def side_file_warnings(
    experts: Mapping[str, Snapshot], ground: Snapshot, own_tokenizer: bool, chat_template: str | None
) -> list[str]:
    """Return what is to be said aloud of the files beside the weights. experts: by the name that messages use.

    own_tokenizer: whether the recipe says whose vocabulary the result has; that says what becomes of tokens.
    chat_template: the recipe's.
    """
    told: dict[str, list[str]] = {}
    for name, expert in experts.items():
        for sentence in _sentences(expert, ground, own_tokenizer, chat_template):
            told.setdefault(sentence, []).append(name)
    left_out = ground.as_stored.source.left_out
    beside = [f"left out of the result: {', '.join(named_files(left_out))}, beside the base's weights"]
    return [f"{', '.join(names)}: {sentence}" for sentence, names in told.items()] + (beside if left_out else [])


def _sentences(expert: Snapshot, ground: Snapshot, own_tokenizer: bool, chat_template: str | None) -> Iterator[str]:
    if expert.kind == "full":
        yield from _files(expert, ground, own_tokenizer)
    if not own_tokenizer:
        yield from _ends(expert, ground)
        if expert.kind == "adapter":
            yield from _tokens(expert, ground)
    if chat_template is None:
        yield from _template(expert, ground, own_tokenizer)


def _files(expert: Snapshot, ground: Snapshot, own_tokenizer: bool) -> Iterator[str]:
    """Say which side files differ from the result's in what they say, and which it lacks."""
    ours, theirs = ground.source.files, expert.source.files
    compared = own_tokenizer or (TOKENIZER in ours and TOKENIZER in theirs)
    names = [
        name
        for name in theirs
        if decides(name) and name not in (CONFIG, GENERATION) and not (compared and of_tokenizer(name))
    ]
    lacking = [name for name in names if name not in ours]
    differing = [
        name
        for name in names
        if name in ours
        and theirs[name].sha256 != ours[name].sha256
        and _content(expert, name) != _content(ground, name)
    ]
    if lacking:
        yield f"{', '.join(named_files(lacking))} is there and not beside the base: the result does not have it"
    if differing:
        yield f"{', '.join(named_files(differing))} differs from the base's, which the result has"


def _content(snapshot: Snapshot, name: str) -> Any:
    content = snapshot.source.read(name, 0, snapshot.source.files[name].size)
    if not name.endswith(".json"):
        return content
    try:
        values = json.loads(content)
    except ValueError:
        return content
    return {key: values[key] for key in values.keys() - UNSAID} if isinstance(values, dict) else values


def _ends(expert: Snapshot, ground: Snapshot) -> Iterator[str]:
    lost = sorted(ends_of(expert) - ends_of(ground))
    if lost:
        yield (
            f"texts end with token {' or '.join(map(str, lost))} too (eos_token_id), which does not end the result's: "
            f"it may not stop there; put it into eos_token_id of the base's {GENERATION}, or of the result's"
        )


def ends_of(snapshot: Snapshot) -> set[int]:
    """Return the ids of the tokens that end a model's texts, by its two configurations."""
    if snapshot.kind != "full":
        return set()
    beside = read_json(snapshot.source, GENERATION) if GENERATION in snapshot.source.files else {}
    return ends_in(snapshot.config) | ends_in(beside)


def _template(expert: Snapshot, ground: Snapshot, own_tokenizer: bool) -> Iterator[str]:
    ours, theirs = template_of(ground), template_of(expert)
    if theirs is not None and ours is None and not own_tokenizer:
        yield (
            "a chat template lies there, and the result has none; give one as `chat_template` of a recipe, or put one "
            "beside the base"
        )
    elif theirs is not None and ours is not None and theirs != ours:
        yield "has another chat template than the result; `chat_template` chooses one"


def _tokens(adapter: Snapshot, ground: Snapshot) -> Iterator[str]:
    """Say which tokens an adapter's own tokenizer has that the base's lacks."""
    if TOKENIZER not in adapter.source.files or TOKENIZER not in ground.source.files:
        return
    ours, theirs = (_ids(model) for model in (ground, adapter))
    lost = [token for token in theirs if token not in ours]
    if lost:
        yield f"has tokens that the base lacks: {few(lost)}; the result has the base's tokenizer"


def _ids(model: Snapshot) -> Sequence[str] | Mapping[str, int]:
    try:
        return loader_ids(read_json(model.source, TOKENIZER))[0]
    except (AttributeError, KeyError, TypeError, IndexError, ValueError):
        return {}  # who reads tokens says that it cannot be read
