"""The record of what a sweep has registered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mergecore.store.store import Store


def registration_file(store: Store, sweep: str) -> Path:
    """Return the path of the sweep's registration record."""
    return store.root / "sweeps" / sweep / "registration.json"


def read_registration(store: Store, sweep: str, cells: set[str]) -> dict[str, Any] | None:
    """Return the registration record; None where there is none, or its cell is no longer part of the sweep."""
    try:
        record = json.loads(registration_file(store, sweep).read_text())
    except (OSError, ValueError):
        return None
    return record if record.get("cell") in cells else None
