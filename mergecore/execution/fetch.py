"""Fetches checkpoints and records what they are."""

from __future__ import annotations

import time

from mergecore.checkpoints.snapshot import Snapshot
from mergecore.checkpoints.ties import check_fetched
from mergecore.execution.outcome import Done, made_with
from mergecore.execution.place import Place
from mergecore.planning.pool import snapshot_step


def fetch(place: Place, snapshot: Snapshot) -> Done:
    """Fetch a checkpoint's files, and record what it is. Files that differ from the fetched ones are written into the
    record's folder.
    """
    done = _fetched(place, snapshot)
    check_fetched(snapshot)
    return done


def _fetched(place: Place, snapshot: Snapshot) -> Done:
    began, before = time.monotonic(), Done()
    if snapshot.as_stored is not snapshot:
        before = _fetched(place, snapshot.as_stored)
    folder = snapshot.source.fetch(place.report)
    if snapshot.adapter_source is not None:
        snapshot.adapter_source.fetch(place.report)
    step, rewritten = snapshot_step(snapshot), snapshot.source.rewritten
    if rewritten:
        place.folders[snapshot.weights] = place.store.folder(step)
    else:  # the base may be an expert as well; whoever has the companions says where they lie
        place.folders.setdefault(snapshot.weights, folder)
    if place.store.is_done(step, bytes_needed=rewritten):
        return before.note(Done([], {}, time.monotonic() - began))
    with place.store.draft(step) as draft:
        if rewritten:
            snapshot.source.write_companions(draft.path, snapshot.config)
        files = {name: [file.size, file.sha256] for name, file in sorted(snapshot.source.files.items())}
        result = {"uri": snapshot.source.uri, "revision": snapshot.source.revision, "files": files}
        place.store.commit(draft, snapshot.weights, result, made_with(began))
    return before.note(Done([step.name], {}, time.monotonic() - began))
