"""A full expert turned into a LoRA adapter of a chosen rank, and what that loses, tensor by tensor."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergecore.arithmetic.linear_algebra import nearest_low_rank, squared_norm
from mergecore.checkpoints.adapters import adapter_config, module_of
from mergecore.checkpoints.architectures import EMBEDDINGS, TRANSPOSED
from mergecore.checkpoints.experts import Expert
from mergecore.checkpoints.layout import lay_out
from mergecore.engine.executor import Executor
from mergecore.errors import SpecError, nearest
from mergecore.events import Event, Report
from mergecore.formats.adapter_folder import AdapterFile, write_config
from mergecore.formats.whole_directory import whole_directory
from mergecore.identity.content import GRID
from mergecore.planning.merge_builder import ENGINE
from mergecore.planning.pool import Pool, opened, resolve_pool
from mergecore.spec.sources import BaseSpec, ExpertSpec, Resolver
from mergecore.spec.yaml_files import as_yaml
from mergecore.tensors.dtypes import SAFETENSORS_DTYPE, Dtype
from mergecore.tensors.finite import KEEP_OUT, check_finite
from mergecore.tensors.source import TensorInfo, TensorSource

RECORD = "extraction.json"


@dataclass(frozen=True)
class Row:
    """One tensor: the norm of its change, how much of that the adapter lacks, and at which rank (0: all of it)."""

    tensor: str
    rank: int
    norm: float
    lost: float

    @property
    def error(self) -> float:
        """Relative, in the Frobenius norm; 0 where nothing changed."""
        return self.lost / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class Extracted:
    """A written adapter: where, its digest and bytes, and its errors. left_out: changed tensors that it cannot hold."""

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
        """Relative error over the whole change, tensors left out included."""
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
    """The adapter of at most `rank` in every linear layer that is nearest to the expert, in the new folder `out`.

    modules: names, last parts of names or shell patterns of the layers to take; none: every linear layer. One tensor is in
    memory at a time and worker. Raises MismatchError where the two are no versions of one model, SpecError where
    `modules` names none, NonFiniteError naming the tensor.
    """
    pool = resolve_pool(base, [expert], None, resolve, report)
    (member,) = pool.members
    changed = lay_out(pool.base.tensors, pool.base.config, [member.carried()]).merged
    targets, transposed = linear_layers(changed, str(pool.base.config.get("model_type", "")), modules)
    ranks = {name: min(rank, *info.shape) for name, info in targets.items()}
    with whole_directory(out, durable) as draft:
        folders = {one.weights: one.source.fetch(report) for one in (pool.base, member.snapshot)}
        held, experts = opened(pool, folders)
        file = AdapterFile(draft, ranks, targets, transposed, SAFETENSORS_DTYPE[dtype])
        shared = Shared(held, experts[member.id], file, ranks)
        rows = dict(_rows(shared, sorted(changed), executor, report))
        taken = tuple(rows[name] for name in sorted(targets))
        left_out = tuple(rows[name] for name in sorted(set(changed) - set(targets)) if rows[name].norm)
        found = Extracted(out, file.digest, file.size, taken, left_out, pool.warnings)
        config = adapter_config(ranks, pool.base.tensors, [{}], transposed)
        write_config(draft, {**config, "base_model_name_or_path": base.known_as or pool.base.source.uri})
        record = record_of(found, pool, rank, dtype)
        (draft / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        (draft / "README.md").write_text(card(found, pool, rank))
    return found


def linear_layers(
    changed: Mapping[str, TensorInfo], model_type: str, modules: Sequence[str]
) -> tuple[dict[str, TensorInfo], bool]:
    """The weights of linear layers among these tensors, and whether the model keeps them as (in, out).

    Raises SpecError where one of `modules` names none of them.
    """
    patterns = TRANSPOSED.get(model_type, ("*.weight",))
    linear = {
        name: info
        for name, info in changed.items()
        if len(info.shape) == 2 and any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in EMBEDDINGS)
    }  # fmt: skip
    for wanted in modules:
        if not any(_is_named(module_of(name), wanted) for name in linear):
            leaves = {module_of(name).rpartition(".")[2] for name in linear}
            raise SpecError(f"modules: '{wanted}' is no linear layer that the expert has; {nearest(wanted, leaves)}")
    taken = {
        name: info
        for name, info in linear.items()
        if not modules or any(_is_named(module_of(name), wanted) for wanted in modules)
    }
    if not taken:
        raise SpecError(
            "the expert has no linear layer (a weight of two dimensions that is no embedding): no adapter fits"
        )
    return taken, model_type in TRANSPOSED


def _is_named(module: str, wanted: str) -> bool:
    return module == wanted or module.endswith(f".{wanted}") or fnmatch.fnmatchcase(module, wanted)


@dataclass(frozen=True)
class Shared:
    """What the work on every tensor shares. ranks: of the tensors that the adapter has."""

    base: TensorSource
    expert: Expert
    file: AdapterFile
    ranks: Mapping[str, int]


def _rows(shared: Shared, names: Sequence[str], executor: Executor, report: Report) -> Iterator[tuple[str, Row]]:
    threads = torch.get_num_threads()
    try:
        for done, (position, row) in enumerate(executor.each(extracted, shared, names), 1):
            report(Event(f"extracting {names[position]}", done, len(names), "tensors"))
            yield names[position], row
    finally:
        torch.set_num_threads(threads)


def extracted(shared: Shared, name: str) -> Row:
    """Write one tensor's factors, where the adapter has them, and say what they lose: of the factors as they stand."""
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


def _delta(shared: Shared, name: str, start: int, stop: int) -> Tensor:
    base = shared.base.read(name, start, stop).to(torch.float32)
    delta = shared.expert.delta(shared.expert.block(name, start, stop), base)
    check_finite(delta, name, f"expert '{shared.expert.name}'", KEEP_OUT.format(name=name))
    return delta


def record_of(found: Extracted, pool: Pool, rank: int, dtype: Dtype) -> dict[str, Any]:
    """Everything that is known of an extraction, as JSON."""
    (member,) = pool.members
    return {
        "base": {"source": pool.base.source.uri, "weights": pool.base.weights},
        "expert": {"source": member.snapshot.source.uri, "weights": member.id},
        "rank": rank,
        "dtype": dtype,
        "engine": ENGINE,
        "digest": found.digest,
        "error": found.error,
        "total_error": found.total_error,
        "tensors": {row.tensor: {"rank": row.rank, "norm": row.norm, "error": row.error} for row in found.rows},
        "left_out": {row.tensor: {"norm": row.norm} for row in found.left_out},
    }


def card(found: Extracted, pool: Pool, rank: int) -> str:
    """README.md of an extracted adapter."""
    (member,) = pool.members
    head = {
        "base_model": pool.base.source.uri,
        "library_name": "peft",
        "tags": ["lora", "mergeloom"],
    }
    lines = ["---", as_yaml(head).strip(), "---", "", f"# LoRA adapter of rank {rank} out of {member.name}", ""]
    lines += [
        f"Made with Mergeloom from {member.snapshot.source.uri} (`{member.id}`) on {pool.base.source.uri} "
        f"(`{pool.base.weights}`): in each of {len(found.rows)} linear layers the nearest matrix of rank {rank}.",
        "",
        f"Relative error in the Frobenius norm: {found.error:.4%} of these layers' change, {found.total_error:.4%} of the "
        f"whole change; {len(found.left_out)} tensors that changed are no linear layers here. Per tensor: `{RECORD}`.",
    ]
    return "\n".join(lines) + "\n"
