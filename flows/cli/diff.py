"""`mergeloom diff`: how two checkpoints differ, as tables or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from flows.cli.endings import errors

if TYPE_CHECKING:
    from mergecore.checkpoints.differences import Entry, SmallFiles
    from mergecore.recipes.compare import Comparison, Sums, TensorDifference

SHOWN = 12
"""Lines of a list that are shown without --each."""
WIDEST = 48
"""Characters of a value at most."""


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--each", is_flag=True, help="a line for each tensor, token and key, not for each layer")
@click.option("--json", "as_json", is_flag=True, help="print everything as JSON")
@click.option("--workers", type=click.IntRange(1), help="threads, each with one block in memory; default: one a core")
def diff(a: str, b: str, each: bool, as_json: bool, workers: int | None) -> None:
    """Show how the checkpoint B differs from A: tensors, config, tokenizer and other files.

    A and B are folders or hub ids, both models or both adapters. Of tensors with one name and shape: how many elements
    differ, both norms, the distance relative to A's norm, and the cosine of the angle between the two. Both are read
    block by block; nothing is written. The exit code is 0 whether they differ or not.
    """
    with errors():
        from flows.cli.terminal import progress
        from flows.session.session import resolver
        from flows.session.settings import worker_setting
        from flows.session.startup import digest_cache
        from mergecore.engine.executor import InProcess
        from mergecore.recipes.compare import compare
        from mergecore.spec.sources import SourceSpec

        with progress() as report:
            find, executor = resolver(digest_cache(), report), InProcess(worker_setting(workers).value)
            compared = compare(SourceSpec(source=a), SourceSpec(source=b), find, executor, report)
        click.echo(json.dumps(as_plain(compared), indent=1) if as_json else diff_text(compared, each))


def diff_text(compared: Comparison, each: bool) -> str:
    """Return the comparison as tables: by layer, or with `each` by tensor."""
    from flows.cli.terminal import table

    most = None if each else SHOWN
    lines = [f"A: {compared.first.source.uri}", f"B: {compared.second.source.uri}"]
    lines += [f"note: {note}" for note in compared.notes]
    head = ["", "elements", "differ", "norm of A", "norm of B", "distance / norm of A", "cosine", "largest"]
    rows = [[name, *_numbers(sums)] for name, sums in compared.groups.items() if sums.elements]
    if each:
        rows = [[tensor.name, *_numbers(tensor.sums)] for tensor in compared.tensors if tensor.sums is not None]
    lines += ["", table(head, [*rows, ["all", *_numbers(compared.total)]])]
    unlike = [_unlike(tensor) for tensor in compared.tensors if tensor.first != tensor.second]
    lines += _listed("other dtype or shape", unlike, most)
    lines += _listed("tensors of A only", compared.only_first, most)
    lines += _listed("tensors of B only", compared.only_second, most)
    if compared.total.not_finite:
        lines += ["", f"{compared.total.not_finite} elements are NaN or infinite; they are in no sum"]
    return "\n".join([*lines, *_files_text(compared.files, most)])


def _numbers(sums: Sums) -> list[str]:
    relative, cosine = sums.relative, sums.cosine
    share = sums.changed / sums.elements if sums.elements else 0.0
    return [
        f"{sums.elements:,}", "none" if not sums.changed else "all" if share == 1 else f"{share:.4%}",
        *(f"{norm:.6g}" for norm in sums.norms), "–" if relative is None else f"{relative:.4g}",
        "–" if cosine is None else f"{cosine:.6f}", f"{sums.largest:.4g}",
    ]  # fmt: skip


def _unlike(tensor: TensorDifference) -> str:
    first, second = (f"{info.dtype} {list(info.shape)}" for info in (tensor.first, tensor.second))
    return f"{tensor.name}: {first} in A, {second} in B"


def _listed(title: str, texts: Sequence[str], most: int | None) -> list[str]:
    """Return a heading with a count, and the first texts; nothing where there are none."""
    if not texts:
        return []
    shown = list(texts[:most])
    rest = len(texts) - len(shown)
    return [
        "",
        f"{title} ({len(texts)}):",
        *(f"  {text}" for text in shown),
        *([f"  … and {rest} more"] if rest else []),
    ]


def _files_text(files: SmallFiles, most: int | None) -> list[str]:
    lines = _entries("config", files.config, most) + _entries("generation config", files.generation, most)
    tokens = files.tokens
    if files.unread:
        lines += ["", f"tokenizers were not compared: {files.unread}"]
    elif tokens is not None:
        if not tokens:
            lines += ["", f"tokenizers: the same, {tokens.shared:,} tokens"]
        else:
            lines += ["", f"tokenizers: {tokens.shared:,} tokens have the same id in both"]
        moved = [f"{token!r}: {first} in A, {second} in B" for token, (first, second) in tokens.moved.items()]
        lines += _listed("tokens with another id", moved, most)
        lines += _listed("tokens of A only", [repr(token) for token in tokens.only_first], most)
        lines += _listed("tokens of B only", [repr(token) for token in tokens.only_second], most)
        lines += _entries("rules of the tokenizer", tokens.entries, most)
    lines += _listed("files with other content", files.files, most)
    lines += _listed("files of A only", files.only_first, most)
    return lines + _listed("files of B only", files.only_second, most)


def _entries(title: str, entries: Sequence[Entry], most: int | None) -> list[str]:
    texts = [f"{entry.key}: {_value(entry.first)} in A, {_value(entry.second)} in B" for entry in entries]
    return _listed(title, texts, most)


def _value(value: Any) -> str:
    from mergecore.checkpoints.differences import ABSENT

    if value == ABSENT:
        return ABSENT
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= WIDEST else f"{text[:WIDEST]}…"


def as_plain(compared: Comparison) -> dict[str, Any]:
    """Return the comparison as plain JSON values. A number that is not defined is null."""
    files = compared.files
    return {
        "a": {"source": compared.first.source.uri, "weights": compared.first.weights},
        "b": {"source": compared.second.source.uri, "weights": compared.second.weights},
        "notes": list(compared.notes),
        "total": _plain_sums(compared.total),
        "layers": {name: _plain_sums(sums) for name, sums in compared.groups.items()},
        "tensors": {
            tensor.name: {
                "dtypes": [tensor.first.dtype, tensor.second.dtype],
                "shapes": [list(tensor.first.shape), list(tensor.second.shape)],
                **(_plain_sums(tensor.sums) if tensor.sums is not None else {}),
            }
            for tensor in compared.tensors
        },
        "only_a": list(compared.only_first),
        "only_b": list(compared.only_second),
        "config": _plain_entries(files.config),
        "generation_config": _plain_entries(files.generation),
        "tokenizer": None
        if files.tokens is None
        else {
            "same_id": files.tokens.shared,
            "other_id": {token: list(ids) for token, ids in files.tokens.moved.items()},
            "only_a": list(files.tokens.only_first),
            "only_b": list(files.tokens.only_second),
            "rules": _plain_entries(files.tokens.entries),
        },
        "tokenizer_unread": files.unread,
        "files": {"differ": list(files.files), "only_a": list(files.only_first), "only_b": list(files.only_second)},
    }


def _plain_sums(sums: Sums) -> dict[str, Any]:
    return {
        "elements": sums.elements, "differ": sums.changed, "norms": list(sums.norms), "distance": sums.distance,
        "relative": sums.relative, "cosine": sums.cosine, "largest": sums.largest, "not_finite": sums.not_finite,
    }  # fmt: skip


def _plain_entries(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return {key: [value in A, value in B]}; a side without the key has the text 'not there'."""
    return {entry.key: [entry.first, entry.second] for entry in entries}
