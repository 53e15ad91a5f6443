"""Which spans of a merge are done: a small file per span beside the shards, with the digests of its grid blocks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from mergecore.engine.pass_plan import MergeJob, Span
from mergecore.identity.keys import digest
from mergecore.store.store import write_json


def _entry(job: MergeJob, span: Span) -> Path:
    """The name says what the span covers: a pass with other spans never reads it."""
    assert job.journal is not None
    return job.journal / f"{digest([list(blocks) for group in span for blocks in group])[:24]}.json"


def read_journal(job: MergeJob, span: Span) -> dict[str, dict[int, str]] | None:
    """Return the digests of a span that an earlier try of this merge has finished; None where there are none."""
    if job.journal is None:
        return None
    try:
        tensors = json.loads(_entry(job, span).read_text())
    except (OSError, ValueError):
        return None
    return {
        name: {int(start): block_digest for start, block_digest in blocks.items()} for name, blocks in tensors.items()
    }


def write_journal(job: MergeJob, span: Span, digests: Mapping[str, Mapping[int, str]]) -> None:
    """Note that the bytes of a span are written."""
    if job.journal is not None:
        tensors = {
            name: {str(start): block_digest for start, block_digest in blocks.items()}
            for name, blocks in digests.items()
        }
        write_json(_entry(job, span), tensors)
