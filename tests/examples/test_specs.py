"""The specs that are shipped: they can be meant, and they score in a dtype that every processor is fast at."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergecore.registry import evaluator_from
from mergecore.spec.sweep import parse_spec
from mergecore.spec.yaml_files import read_yaml

SPECS = sorted(Path(__file__).resolve().parents[2].glob("examples/*.yaml"))


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_an_example_scores_in_float32(path: Path) -> None:
    spec = parse_spec(read_yaml(path), path.name)
    evaluator = evaluator_from(spec.evaluate.evaluator, spec.evaluate.settings, "evaluate")
    assert evaluator.parameters().get("dtype", "float32") == "float32"
