"""Fetches checkpoints and records what they are."""

from __future__ import annotations

import time

from mergecore.checkpoints.folded import FoldedSnapshot
from mergecore.checkpoints.snapshot import Snapshot
from mergecore.checkpoints.vocabulary.snapshot import RewrittenSource, as_it_lies
from mergecore.execution.outcome import Done, made_with
from mergecore.execution.place import Place
from mergecore.planning.pool import snapshot_step


def fetch(place: Place, snapshot: Snapshot) -> Done:
    """Have a checkpoint's files at hand, and record what it is. Files that differ from those that lie there are the record's."""
    began, before = time.monotonic(), Done()
    if as_it_lies(snapshot) is not snapshot:
        before = fetch(place, as_it_lies(snapshot))
    folder = snapshot.source.fetch(place.report)
    if isinstance(snapshot, FoldedSnapshot):
        snapshot.adapter.source.fetch(place.report)
    step, rewritten = snapshot_step(snapshot), snapshot.source if isinstance(snapshot.source, RewrittenSource) else None
    if rewritten is not None:
        place.folders[snapshot.weights] = place.store.folder(step)
    else:  # the base may be an expert as well; whoever has the companions says where they lie
        place.folders.setdefault(snapshot.weights, folder)
    if place.store.is_done(step, bytes_needed=rewritten is not None):
        return before.note(Done([], {}, time.monotonic() - began))
    with place.store.draft(step) as draft:
        if rewritten is not None:
            rewritten.write(draft.path, snapshot.config)
        files = {name: [held.size, held.sha256] for name, held in sorted(snapshot.source.files.items())}
        result = {"uri": snapshot.source.uri, "revision": snapshot.source.revision, "files": files}
        place.store.commit(draft, snapshot.weights, result, made_with(began))
    return before.note(Done([step.name], {}, time.monotonic() - began))
