"""A finished merge in the store, as its product sees it."""

from __future__ import annotations

from mergecore.checkpoints.sources.selection import weights_stem
from mergecore.errors import StoreError
from mergecore.planning.pool import Pool
from mergecore.planning.work import MergeWork
from mergecore.plugins.product import FinishedMerge
from mergecore.store.store import Store
from mergecore.store.verified import DIGESTS


def finished_merge(store: Store, pool: Pool, merge: MergeWork) -> FinishedMerge:
    """Return what is published of a merge. Raise StoreError where its bytes are not in the store."""
    published = merge.published
    record = store.record(published.step)
    if record is None or record.dropped:
        raise StoreError(f"the {published.step.kind} {published.step.name} is not in the store; run the same again")
    names = {member.id: member.name for member in pool.members}
    return FinishedMerge(
        merge.method.name,
        merge.method.parameters(),
        {expert: names[expert] for expert in merge.experts},
        merge.model,
        pool.base.tensors,
        pool.base.source.uri,
        store.folder(published.step),
        tuple(name for name in record.files if name != DIGESTS),
        record.digest,
        published.size,
        record.result,
        weights_stem(pool.base.source.files),
    )
