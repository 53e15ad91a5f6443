"""Another size of the grid's blocks, in every module that names the constant."""

from __future__ import annotations

import sys

import pytest

import mergecore.engine.run_pass


def set_grid(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    """Have blocks of so many elements in every module that is loaded and names the constant."""
    assert mergecore.engine.run_pass  # whatever reads and writes blocks is loaded
    names = [name for name, module in sys.modules.items() if name.startswith("mergecore.") and hasattr(module, "GRID")]
    assert "mergecore.identity.content" in names
    for name in names:
        monkeypatch.setattr(sys.modules[name], "GRID", elements)
