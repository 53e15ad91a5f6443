"""What spans of a merge are done: a small file per span beside the shards, with the digests of the blocks it wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from mergecore.engine.pass_plan import MergeJob, Span
from mergecore.identity.keys import digest
from mergecore.store.store import write_json


def _entry(job: MergeJob, span: Span) -> Path:
    """Named by what the span covers, so that a pass cut otherwise never takes another span's word."""
    assert job.journal is not None
    return job.journal / f"{digest([list(piece) for unit in span for piece in unit])[:24]}.json"


def read_journal(job: MergeJob, span: Span) -> dict[str, dict[int, str]] | None:
    """The digests of a span that an earlier try of this merge has finished, None where it has not."""
    if job.journal is None:
        return None
    try:
        held = json.loads(_entry(job, span).read_text())
    except (OSError, ValueError):
        return None
    return {name: {int(start): found for start, found in blocks.items()} for name, blocks in held.items()}


def write_journal(job: MergeJob, span: Span, digests: Mapping[str, Mapping[int, str]]) -> None:
    """Note that a span's bytes are in their place."""
    if job.journal is not None:
        held = {name: {str(start): found for start, found in blocks.items()} for name, blocks in digests.items()}
        write_json(_entry(job, span), held)
