"""A sweep over the digits tier in one process: its spec, its session, and what its store holds once it is done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergecore.checkpoints.sources.resolve import resolve
from mergecore.engine.executor import InProcess
from mergecore.events import Report, silent
from mergecore.execution.outcome import Done
from mergecore.execution.place import Place
from mergecore.planning.cells import Cell, Plan
from mergecore.planning.planner import make_plan
from mergecore.planning.pool import resolve_pool
from mergecore.reporting.scores import Sweep
from mergecore.spec.sweep import Spec, parse_spec
from mergecore.store.store import RECORD, Store
from mergecore.sweeps.complete import complete
from mergecore.sweeps.measured import collect
from mergecore.sweeps.registration_record import read_registration
from mergecore.sweeps.remaining import Frontier
from tests.digits import FACTORY, DigitsTier
from tests.small_pool import changed

EXPERTS = ("quarter", "mirror", "inverted", "rows")
METHODS: tuple[Mapping[str, Any], ...] = (
    {"method": "average"},
    {"method": "task_arithmetic", "scale": {"grid": [0.3, 0.6]}},
    {"method": "ties", "density": 0.3, "scale": 1.0},
)


def digits_spec(tier: DigitsTier, store: Path, **changes: Any) -> dict[str, Any]:
    """Three methods (one with a grid) on two and three of four experts; validation items choose. As YAML would be.

    changes: as `small_pool.changed` takes them.
    """
    spec: dict[str, Any] = {
        "name": "digits",
        "base": {"source": str(tier.base)},
        "experts": [{"name": name, "source": str(tier.experts[name]), "tasks": [name]} for name in EXPERTS],
        "methods": [dict(method) for method in METHODS],
        "counts": [2, 3],
        "evaluate": {
            "evaluator": "classification",
            "model": FACTORY,
            "path": str(tier.tasks),
            "held_in": {name: [name] for name in EXPERTS},
            "held_out": {"upright": ["upright"]},
            "limit": 80,
            "batch_size": 64,
            "validation": {"limit": 40},
            "recalibration_tasks": list(EXPERTS),
            "recalibration_items": 64,
        },
        "output": {"store": str(store), "register": {"name": "digits", "by": "held_in"}, "shard_size": "100KB"},
    }
    return changed(spec, changes)


@dataclass
class Swept:
    """A sweep opened over a store, and what was done in it. `run` does what is missing."""

    spec: Spec
    store: Store
    frontier: Frontier
    place: Place

    @property
    def plan(self) -> Plan:
        """The plan, grown by its searches."""
        return self.frontier.plan

    def run(self, heard: Callable[[Done], None] = lambda done: None) -> Done:
        """Everything that is missing."""
        return complete(self.place, self.frontier, heard)

    def cell(self, name: str) -> Cell:
        """The cell of this name."""
        return next(cell for cell in self.plan.cells if cell.name == name)

    def scores(self) -> Sweep:
        """What the store knows now."""
        return collect(Frontier(self.plan, self.store, 1))

    def registered(self) -> dict[str, Any] | None:
        """The registration record."""
        return read_registration(self.store, self.spec.name, {cell.id for cell in self.plan.cells})


def opened(spec: Mapping[str, Any], report: Report = silent, room: int = 3) -> Swept:
    """The sweep of a spec, planned and held against its store."""
    torch.set_num_threads(1)
    parsed = parse_spec(spec, "digits")
    pool = resolve_pool(
        parsed.base,
        parsed.experts,
        parsed.multitask,
        lambda source: resolve(source.source),
        report,
        tokenizer=parsed.tokenizer,
    )
    plan, store = make_plan(parsed, pool, Path("/")), Store(parsed.output.store)
    place = Place(pool, store, InProcess(), report, plan.shard_size, plan.evaluators["test"], plan.folder)
    return Swept(parsed, store, Frontier(plan, store, room), place)


def records(store: Store) -> dict[str, dict[str, Any]]:
    """Every record by the folder it lies in, without how it was made."""
    stamped = {}
    for path in sorted(_records(store)):
        record = json.loads(path.read_text())
        del record["made"]
        stamped[str(path.parent.relative_to(store.root))] = record
    return stamped


def _records(store: Store) -> list[Path]:
    """Where the records lie; one in a draft says nothing yet."""
    return [path for path in store.root.glob(f"*/*/{RECORD}") if path.parent.parent.name != "drafts"]


def contents(store: Store) -> dict[str, str]:
    """SHA-256 of every file of every step, records without how they were made; of the registration without its
    place.
    """
    digests = {name: hashlib.sha256(json.dumps(record).encode()).hexdigest() for name, record in records(store).items()}
    for name in list(digests):
        for path in sorted((store.root / name).rglob("*")):
            if path.is_file() and path.name != RECORD:
                digests[str(path.relative_to(store.root))] = hashlib.sha256(path.read_bytes()).hexdigest()
    for path in store.root.glob("sweeps/*/registration.json"):
        record = json.loads(path.read_text())
        del record["uri"]
        digests[str(path.relative_to(store.root))] = json.dumps(record)
    return digests


def stamps(store: Store) -> dict[str, tuple[int, int]]:
    """(inode, mtime in ns) of every record: what is not done again keeps them."""
    return {
        str(path.parent.relative_to(store.root)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in _records(store)
    }


def leftovers(store: Store) -> list[str]:
    """Whatever lies in the store and is neither a result nor named by one: drafts, temporary files, locks of steps."""
    named = set()
    for name, record in records(store).items():
        named.add(f"{name}/{RECORD}")
        if not record["dropped"]:
            named |= {f"{name}/{file}" for file in record["files"]}
    files = {str(path.relative_to(store.root)) for path in store.root.rglob("*") if not path.is_dir()}
    drafts = {str(path.relative_to(store.root)) for path in store.root.glob("drafts/*")}
    known = {name for name in files if name.startswith("failures/") and name.endswith(".json")}
    known |= {name for name in files if name.startswith("sweeps/") and not name.rpartition("/")[2].startswith(".")}
    return sorted((files | drafts) - named - known)
