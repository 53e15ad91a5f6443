"""The record of what a sweep has registered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mergecore.store.store import Store


def registration_file(store: Store, sweep: str) -> Path:
    """Where the sweep's registration is recorded."""
    return store.root / "sweeps" / sweep / "registration.json"


def read_registration(store: Store, sweep: str, cells: set[str]) -> dict[str, Any] | None:
    """The registration record, None where there is none or its cell is no longer part of the sweep."""
    try:
        held = json.loads(registration_file(store, sweep).read_text())
    except (OSError, ValueError):
        return None
    return held if held.get("cell") in cells else None
