"""Turns a full expert into a LoRA adapter of a chosen rank, and says what that loses, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergecore.arithmetic.linear_algebra import nearest_low_rank, squared_norm
from mergecore.checkpoints.adapters import CONFIG, STEM, adapter_config
from mergecore.checkpoints.experts import Expert
from mergecore.checkpoints.layout import lay_out
from mergecore.checkpoints.ties import check_fetched
from mergecore.engine.executor import Executor
from mergecore.events import Event, Report
from mergecore.formats.whole_directory import whole_directory
from mergecore.identity.content import GRID
from mergecore.planning.merge_builder import ENGINE
from mergecore.planning.pool import Pool, opened, resolve_pool
from mergecore.products.adapter_files import AdapterFile, write_config
from mergecore.recipes.linear_layers import linear_layers
from mergecore.spec.sources import BaseSpec, ExpertSpec, Resolver
from mergecore.spec.yaml_files import as_yaml
from mergecore.tensors.dtypes import SAFETENSORS_DTYPE, Dtype
from mergecore.tensors.files import open_file
from mergecore.tensors.finite import KEEP_OUT, check_finite
from mergecore.tensors.source import TensorSource

RECORD = "extraction.json"


@dataclass(frozen=True)
class Row:
    """One tensor: the norm of its change, the part of it that the adapter lacks, and the rank (0: the adapter lacks
    all).
    """

    tensor: str
    rank: int
    norm: float
    lost: float

    @property
    def error(self) -> float:
        """Relative error in the Frobenius norm; 0 where nothing changed."""
        return self.lost / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class Extracted:
    """A written adapter: its folder, digest, bytes and errors. left_out: changed tensors that it cannot hold."""

    folder: Path
    digest: str
    size: int
    rows: tuple[Row, ...]
    left_out: tuple[Row, ...]
    warnings: tuple[str, ...]

    @property
    def error(self) -> float:
        """Relative error over the layers that the adapter has."""
        return _error(self.rows)

    @property
    def total_error(self) -> float:
        """Relative error over the whole change, including tensors that are left out."""
        return _error((*self.rows, *self.left_out))


def _error(rows: Sequence[Row]) -> float:
    whole = sqrt(sum(row.norm**2 for row in rows))
    return sqrt(sum(row.lost**2 for row in rows)) / whole if whole else 0.0


def extract_lora(
    expert: ExpertSpec,
    base: BaseSpec,
    out: Path,
    resolve: Resolver,
    executor: Executor,
    report: Report,
    *,
    rank: int,
    modules: Sequence[str] = (),
    dtype: Dtype = "float32",
    durable: bool = False,
) -> Extracted:
    """Write the adapter of at most `rank` in every linear layer that is nearest to the expert into the new folder
    `out`.

    modules: names, last parts of names or shell patterns of the layers to take; none: every linear layer. Each worker
    has
    one tensor in memory at a time. Raise MismatchError where the two are no versions of one model, SpecError where
    `modules` names no layer, NonFiniteError naming the tensor.
    """
    pool = resolve_pool(base, [expert], None, resolve, report)
    (member,) = pool.members
    changed = lay_out(pool.base.tensors, pool.base.config, [member.carried()]).merged
    layers = linear_layers(changed, pool.base, modules)
    targets, transposed = layers.weights, layers.transposed
    ranks = {name: min(rank, *info.shape) for name, info in targets.items()}
    with whole_directory(out, durable) as draft:
        folders = {snapshot.weights: snapshot.source.fetch(report) for snapshot in (pool.base, member.snapshot)}
        for snapshot in (pool.base, member.snapshot):
            check_fetched(snapshot)
        base_tensors, experts = opened(pool, folders)
        file = AdapterFile(draft, ranks, targets, transposed, SAFETENSORS_DTYPE[dtype], layers.modules)
        config = adapter_config(ranks, pool.base.tensors, [{}], transposed, layers.modules, layers.known)
        layers.check(config, file.infos, str(out))
        shared = Extraction(base_tensors, experts[member.id], file, ranks)
        rows = dict(_rows(shared, sorted(changed), executor, report))
        taken = tuple(rows[name] for name in sorted(targets))
        left_out = tuple(rows[name] for name in sorted(set(changed) - set(targets)) if rows[name].norm)
        extracted = Extracted(out, file.digest, file.size, taken, left_out, (*pool.warnings, *layers.warnings))
        write_config(draft, {**config, "base_model_name_or_path": base.known_as or pool.base.source.uri})
        layers.check(
            json.loads((draft / CONFIG).read_text()), open_file(draft / f"{STEM}.safetensors").tensors, str(out)
        )
        record = record_of(extracted, pool, rank, dtype)
        (draft / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        (draft / "README.md").write_text(card(extracted, pool, rank))
    return extracted


@dataclass(frozen=True)
class Extraction:
    """What the work on every tensor shares. ranks: {tensor: rank} of the tensors that the adapter has."""

    base: TensorSource
    expert: Expert
    file: AdapterFile
    ranks: Mapping[str, int]


def _rows(shared: Extraction, names: Sequence[str], executor: Executor, report: Report) -> Iterator[tuple[str, Row]]:
    threads = torch.get_num_threads()
    try:
        for done, (position, row) in enumerate(executor.each(extracted, shared, names), 1):
            report(Event(f"extracting: {names[position]}", done, len(names), "tensors"))
            yield names[position], row
    finally:
        torch.set_num_threads(threads)


def extracted(shared: Extraction, name: str) -> Row:
    """Write one tensor's factors, where the adapter has them. Return what the written factors lose."""
    torch.set_num_threads(1)  # sums over two threads differ from sums over one in the last bits
    info = shared.base.tensors[name]
    if name not in shared.ranks:
        pieces = range(0, info.count, GRID)
        norm = sqrt(sum(squared_norm(_delta(shared, name, at, min(at + GRID, info.count))) for at in pieces))
        return Row(name, 0, norm, norm)
    delta = _delta(shared, name, 0, info.count).view(info.shape).to(torch.float64)
    norm, rank = float(delta.norm()), shared.ranks[name]
    matrix = delta.mT if shared.file.transposed else delta
    up, down = nearest_low_rank(matrix, rank)
    down, up = shared.file.write(name, down, up, f"the adapter of '{shared.expert.name}'")
    lost = float((matrix - up.to(torch.float64) @ down.to(torch.float64)).norm())
    return Row(name, rank, norm, lost)


def _delta(shared: Extraction, name: str, start: int, stop: int) -> Tensor:
    base = shared.base.read(name, start, stop).to(torch.float32)
    delta = shared.expert.delta(shared.expert.block(name, start, stop), base)
    check_finite(delta, name, f"expert '{shared.expert.name}'", KEEP_OUT.format(name=name))
    return delta


def record_of(extracted: Extracted, pool: Pool, rank: int, dtype: Dtype) -> dict[str, Any]:
    """Return everything that is known of an extraction, as JSON."""
    (member,) = pool.members
    return {
        "base": {"source": pool.base.source.uri, "weights": pool.base.weights},
        "expert": {"source": member.snapshot.source.uri, "weights": member.id},
        "rank": rank,
        "dtype": dtype,
        "engine": ENGINE,
        "digest": extracted.digest,
        "error": extracted.error,
        "total_error": extracted.total_error,
        "tensors": {row.tensor: {"rank": row.rank, "norm": row.norm, "error": row.error} for row in extracted.rows},
        "left_out": {row.tensor: {"norm": row.norm} for row in extracted.left_out},
    }


def card(extracted: Extracted, pool: Pool, rank: int) -> str:
    """Return README.md of an extracted adapter."""
    (member,) = pool.members
    head = {
        "base_model": pool.base.source.uri,
        "library_name": "peft",
        "tags": ["lora", "mergeloom"],
    }
    lines = ["---", as_yaml(head).strip(), "---", "", f"# LoRA adapter of rank {rank} out of {member.name}", ""]
    lines += [
        f"Made with Mergeloom from {member.snapshot.source.uri} (`{member.id}`) on {pool.base.source.uri} "
        f"(`{pool.base.weights}`): in each of {len(extracted.rows)} linear layers the nearest matrix of rank {rank}.",
        "",
        f"Relative error in the Frobenius norm: {extracted.error:.4%} of these layers' change, "
        f"{extracted.total_error:.4%} of the "
        f"whole change; {len(extracted.left_out)} tensors that changed are no linear layers here. Per tensor: "
        f"`{RECORD}`.",
    ]
    return "\n".join(lines) + "\n"
