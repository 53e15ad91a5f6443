"""A part of a spec: some of its methods, some of its numbers of experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mergecore.errors import SpecError, nearest
from mergecore.spec.sweep import Spec, parse_spec
from mergecore.spec.yaml_files import read_yaml


def narrowed(path: Path, methods: Sequence[str], counts: Sequence[int]) -> Spec:
    """Return the spec of a file, limited to these methods and counts. An empty list limits nothing. Raises
    SpecError.
    """
    text = read_yaml(path)
    whole = parse_spec(text, path.name)
    known = {str(entry.get("method")) for entry in whole.methods} | {"average"}
    for name in methods:
        if name not in known:
            raise SpecError(f"methods: {path} has no '{name}'; {nearest(name, known)}")
    for count in counts:
        if count not in whole.counts:
            raise SpecError(f"counts: {path} has no {count}; known: {', '.join(map(str, whole.counts))}")
    entries = [dict(entry) for entry in text["methods"] if not methods or entry.get("method") in methods]
    if counts:
        for entry in entries:
            if "counts" in entry:
                entry["counts"] = [count for count in entry["counts"] if count in counts]
        entries = [entry for entry in entries if entry.get("counts", counts)]
        text["counts"] = list(counts)
    text["methods"] = entries
    return parse_spec(text, path.name)
