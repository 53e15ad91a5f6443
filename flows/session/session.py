"""From a spec file to a plan held against its store: what every command starts with. Reads the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from flows.session.limits import memory_budget
from flows.session.startup import digest_cache, loops, without_collector
from mergecore.checkpoints.sources import Source
from mergecore.checkpoints.sources.digests import DigestCache
from mergecore.checkpoints.sources.resolve import resolve
from mergecore.engine.executor import Executor
from mergecore.events import Report, silent
from mergecore.execution.place import Place
from mergecore.planning.cells import Plan
from mergecore.planning.planner import make_plan
from mergecore.planning.pool import resolve_pool
from mergecore.spec.sources import Resolver, SourceSpec
from mergecore.spec.sweep import Spec, parse_spec
from mergecore.spec.yaml_files import read_yaml
from mergecore.store.store import Store
from mergecore.sweeps.remaining import Frontier


@dataclass(frozen=True)
class Session:
    """A spec, its store and what is still missing."""

    spec: Spec
    store: Store
    frontier: Frontier

    @property
    def plan(self) -> Plan:
        """The plan, with the cells that searches have asked for so far."""
        return self.frontier.plan

    def place(self, executor: Executor, report: Report) -> Place:
        """Where this session's work is done."""
        plan = self.plan
        device = "cuda" if self.spec.run.dask == "gpu" and torch.cuda.is_available() else "cpu"
        return Place(
            plan.pool, self.store, executor, report, plan.shard_size, plan.evaluators["test"], plan.folder, {}, device,
            loops(), memory_budget(self.spec),
        )  # fmt: skip

    @property
    def notes(self) -> tuple[str, ...]:
        """What whoever starts this ought to know: of the pool, and of what this processor is slow at."""
        dtype = str(self.plan.evaluators["test"].parameters().get("dtype", ""))
        if self.spec.run.dask != "local" or not lacks_arithmetic(dtype):
            return *self.plan.pool.warnings, *self.plan.notes
        slow = (
            f"this processor has no instructions for {dtype}: scoring in it takes several times as long as in float32 "
            "(evaluate.dtype; scores differ in the last place, so a sweep keeps to one)"
        )
        return *self.plan.pool.warnings, *self.plan.notes, slow

    @property
    def results(self) -> Path:
        """Where tables and figures of this sweep are written."""
        return self.store.root / "sweeps" / self.spec.name


def lacks_arithmetic(dtype: str) -> bool:
    """Whether this processor works in a 16-bit type only by way of slow substitutes, as torch tells."""
    known = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}
    try:
        return dtype in known and not getattr(torch.ops.mkldnn, known[dtype])()
    except (AttributeError, RuntimeError):  # a build that cannot say
        return False


def resolver(digests: DigestCache, report: Report = silent) -> Resolver:
    """Finds sources with the hub settings of this environment (HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT, HF_HOME)."""
    token = _token()

    def found(source: SourceSpec) -> Source:
        return resolve(
            source.source,
            revision=source.revision,
            token=token,
            offline=os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"),
            endpoint=os.environ.get("HF_ENDPOINT"),
            digests=digests,
            report=report,
        )

    return found


def _token() -> str | None:
    """HF_TOKEN, else what `hf auth login` has stored."""
    if token := os.environ.get("HF_TOKEN"):
        return token
    home = os.environ.get("HF_HOME", os.path.join(os.path.expanduser("~"), ".cache", "huggingface"))
    try:
        return Path(os.environ.get("HF_TOKEN_PATH", os.path.join(home, "token"))).read_text().strip() or None
    except OSError:
        return None


def open_session(path: Path, report: Report = silent) -> Session:
    """Parse, resolve, check and plan. Nothing is written. Raises a MergeloomError for what cannot be meant or had."""
    return session_of(parse_spec(read_yaml(path), path.name), report)


def session_of(spec: Spec, report: Report = silent) -> Session:
    """The session of a parsed spec; relative paths in it start from the current directory."""
    store = Store(spec.output.store)
    found = resolver(digest_cache(), report)
    pool = resolve_pool(spec.base, spec.experts, spec.multitask, found, report, tokenizer=spec.tokenizer)
    with without_collector():
        plan = make_plan(spec, pool, Path.cwd())
    frontier = Frontier(plan, store, room=1)
    frontier.room = models_at_once(frontier.plan, store)
    return Session(spec, store, frontier)


def models_at_once(plan: Plan, store: Store) -> int:
    """How many models may lie on the disk at a time: what fits the budget, and no more than keeps evaluation fed."""
    from flows.session.limits import disk_budget
    from mergecore.sweeps.cost import chain_ends

    merges = [cell.merge for cell in plan.cells if cell.merge is not None]
    largest = max((merge.size for merge in merges), default=1)
    room = disk_budget(plan.spec, store) - sum(chain_ends(merges).values())
    return max(1, min(room // largest, 24))
