"""A session: a spec, its plan, its store and its settings. Every command on a sweep starts with one."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flows.services.servers import Addresses
from flows.session.limits import check_fit
from flows.session.settings import Options, Settings, resolved
from flows.session.startup import digest_cache, loops, without_collector
from mergecore.checkpoints.sources import Source
from mergecore.checkpoints.sources.digests import DigestCache
from mergecore.checkpoints.sources.resolve import resolve
from mergecore.engine.executor import Executor
from mergecore.events import Report, silent
from mergecore.execution.place import Place
from mergecore.planning.cells import Plan
from mergecore.planning.groups import ungrouped
from mergecore.planning.planner import make_plan
from mergecore.planning.pool import resolve_pool
from mergecore.plugins.own_code import put_on_path
from mergecore.spec.sources import Resolver, SourceSpec
from mergecore.spec.sweep import Spec, parse_spec
from mergecore.spec.yaml_files import read_yaml
from mergecore.store.store import Store
from mergecore.sweeps.cost import Cost, chain_ends, cost
from mergecore.sweeps.remaining import Frontier

MOST_MODELS = 24
"""How many models lie on the disk at a time at most: enough to keep the evaluation busy."""


@dataclass(frozen=True)
class Session:
    """A spec, its store, what is still missing, and the settings of this run.

    path: the file the spec was read from, absolute; None where it came from elsewhere or is a part of a file's spec.
    """

    spec: Spec
    store: Store
    frontier: Frontier
    settings: Settings
    path: Path | None = None

    @property
    def plan(self) -> Plan:
        """The plan, with the cells that searches have asked for so far."""
        return self.frontier.plan

    def place(self, executor: Executor, report: Report) -> Place:
        """Return where this session's work is done."""
        plan, settings = self.plan, self.settings
        return Place(
            plan.pool, self.store, executor, report, plan.shard_size, plan.evaluators["test"], plan.folder, {},
            plan.code, settings.device.value, loops(), settings.memory.value,
        )  # fmt: skip

    def at(self, addresses: Addresses) -> Session:
        """Return the same session with the addresses of servers that were started for it."""
        return replace(self, settings=self.settings.at(addresses))

    def cost(self) -> Cost:
        """Return what is still to be done, in numbers."""
        return cost(self.frontier, self.settings.workers.value, self.settings.memory.value)

    def check_fit(self, costs: Cost) -> None:
        """Check that the work fits on this machine. Raises CapacityError, and StoreError for a store that is
        read-only.
        """
        check_fit(self.settings, self.store, costs)

    @property
    def notes(self) -> tuple[str, ...]:
        """Warnings for the person who starts the sweep: about the pool, and about dtypes this processor is slow at."""
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
        """The folder for the tables and figures of this sweep."""
        return self.store.root / "sweeps" / self.spec.name


def lacks_arithmetic(dtype: str) -> bool:
    """Whether torch says that this processor has no instructions for a 16-bit dtype."""
    known = {"bfloat16": "_is_mkldnn_bf16_supported", "float16": "_is_mkldnn_fp16_supported"}
    try:
        return dtype in known and not getattr(torch.ops.mkldnn, known[dtype])()
    except (AttributeError, RuntimeError):  # a build that cannot say
        return False


def resolver(digests: DigestCache, report: Report = silent) -> Resolver:
    """Return a function that finds sources, by HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT and HF_HOME."""
    token = _token()

    def find(source: SourceSpec) -> Source:
        return resolve(
            source.source,
            revision=source.revision,
            token=token,
            offline=os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"),
            endpoint=os.environ.get("HF_ENDPOINT"),
            digests=digests,
            report=report,
        )

    return find


def _token() -> str | None:
    """Return HF_TOKEN, else the token that `hf auth login` has stored, else None."""
    if token := os.environ.get("HF_TOKEN"):
        return token
    home = os.environ.get("HF_HOME", f"{os.path.expanduser('~')}/.cache/huggingface")  # noqa: PTH111 — without a home too
    try:
        return Path(os.environ.get("HF_TOKEN_PATH", f"{home}/token")).read_text().strip() or None
    except OSError:
        return None


def open_session(path: Path, report: Report = silent, options: Options = Options()) -> Session:
    """Read, check, resolve and plan the spec of a file. Nothing is written.

    Raises a MergeloomError for what cannot be meant or had.
    """
    session = session_of(parse_spec(read_yaml(path), path.name), report, options, path.absolute().parent)
    return replace(session, path=path.absolute())


def session_of(spec: Spec, report: Report = silent, options: Options = Options(), home: Path | None = None) -> Session:
    """Return the session of a parsed spec; relative paths in it start from the current directory.

    home: the folder of the spec, from which a user's own modules are imported; None: the current directory.
    """
    put_on_path(home or Path.cwd())
    spec = ungrouped(spec, Path.cwd())
    store = Store(spec.output.store)
    settings = resolved(spec.run, store, options)
    find = resolver(digest_cache(), report)
    pool = resolve_pool(spec.base, spec.experts, spec.multitask, find, report, tokenizer=spec.tokenizer)
    with without_collector():
        plan = make_plan(spec, pool, Path.cwd(), home or Path.cwd())
    frontier = Frontier(plan, store, room=1)
    frontier.room = models_at_once(frontier.plan, settings.disk.value)
    return Session(spec, store, frontier, settings)


def models_at_once(plan: Plan, disk: int) -> int:
    """Return how many models may lie on the disk at a time. disk: bytes that models and the ends of chains may use."""
    merges = [cell.merge for cell in plan.cells if cell.merge is not None]
    largest = max((merge.size for merge in merges), default=1)
    room = disk - sum(chain_ends(merges).values())
    return max(1, min(room // largest, MOST_MODELS))
