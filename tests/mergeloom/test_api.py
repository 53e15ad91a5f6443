"""The public interface: plan, sweep and results from Python."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import yaml

import mergeloom
from mergecore.events import Event
from mergecore.reporting.scores import Kind, Status
from mergecore.sweeps.score_table import SCHEMA
from tests import tiny_sweep


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny sweep that has been run from Python."""
    path = tiny_sweep.write_spec(tmp_path_factory.mktemp("api"))
    before = mergeloom.plan(path)
    assert before.steps.merges > 0 and {cell.state for cell in before.cells} == {"to do"}
    events: list[Event] = []
    outcome = mergeloom.sweep(path, workers=1, report=events.append)
    assert outcome.complete and not outcome.failed and outcome.summary == "8 of 8 cells done"
    assert (outcome.folder / "report.md").read_text().strip() == outcome.report
    assert events
    return path


def test_a_finished_sweep_has_nothing_to_do(spec: Path) -> None:
    plan = mergeloom.plan(str(spec))
    assert plan.steps.total == 0 and {cell.state for cell in plan.cells} == {"done"}
    assert str(plan).startswith("sweep tiny: 8 cells")
    merges = [cell for cell in plan.cells if cell.kind == "merge"]
    assert {(cell.method, cell.count) for cell in merges} == {("average", 2), ("average", 3), ("ties", 2), ("ties", 3)}
    assert all(len(cell.experts) == cell.count for cell in merges)


def test_a_path_a_mapping_and_a_spec_are_the_same(spec: Path) -> None:
    content = yaml.safe_load(spec.read_text())
    expected = mergeloom.results(spec)
    assert mergeloom.results(content).equals(expected)
    assert mergeloom.results(mergeloom.Spec.model_validate(content)).equals(expected)


def test_results_have_a_row_for_each_cell_split_and_task(spec: Path) -> None:
    table = mergeloom.results(spec)
    assert table.schema.equals(SCHEMA)
    rows = table.to_pylist()
    tasks: dict[str, list[str]] = {}
    for row in rows:
        tasks.setdefault(row["name"], []).append(row["task"])
    assert tasks.pop("expert-1") == ["tiny_write"], "it was trained for no task"
    assert len(tasks) == 7 and set(map(tuple, tasks.values())) == {("tiny_choice", "tiny_write")}
    for row in rows:
        assert 0 <= row["score"] <= 1 and row["items"] == 4 and row["split"] == "test" and row["sweep"] == "tiny"
        assert row["kind"] in get_args(Kind) and row["status"] in get_args(Status)
        assert (row["side"], row["category"]) == {
            "tiny_choice": ("held_in", "choice"),
            "tiny_write": ("held_out", "writing"),
        }[row["task"]]
        assert row["digest"] or row["kind"] != "merge"
    (ties,) = [row for row in rows if row["method"] == "ties" and row["count"] == 3 and row["task"] == "tiny_write"]
    assert json.loads(ties["values"]) == {"density": 0.2, "scale": 1.0}
    assert ties["experts"] == ["expert-0", "expert-1", "expert-2"]


def test_results_agree_with_the_tables_of_the_report(spec: Path) -> None:
    from pyarrow import parquet

    cells = parquet.read_table(mergeloom.sweep(spec).folder / "cells.parquet").to_pylist()
    reported = {row["cell"]: row for row in cells}
    for row in mergeloom.results(spec).to_pylist():
        assert reported[row["cell"]][f"score/{row['task']}"] == row["score"]


def test_results_become_a_data_frame(spec: Path) -> None:
    pytest.importorskip("pandas")
    frame = mergeloom.results(spec).to_pandas()
    assert list(frame.columns) == SCHEMA.names and frame.score.notna().all()


def test_what_is_not_measured_is_null(spec: Path) -> None:
    content = yaml.safe_load(spec.read_text())
    content["methods"].append({"method": "slerp", "t": 0.5})
    content["methods"].append({"method": "task_arithmetic", "scale": 0.5})
    rows = mergeloom.results(content).to_pylist()
    refused = [row for row in rows if row["method"] == "slerp" and row["count"] == 3]
    (row,) = refused
    assert row["status"] == "refused" and row["score"] is None and row["items"] == 0 and "two experts" in row["reason"]
    assert (row["split"], row["side"], row["category"], row["task"]) == (None, None, None, None)
    assert {row["status"] for row in rows if row["method"] == "task_arithmetic"} == {"pending"}
    states = {(cell.method, cell.count): cell.state for cell in mergeloom.plan(content).cells if cell.kind == "merge"}
    assert states["slerp", 3] == "refused" and states["slerp", 2] == "to do" and states["ties", 2] == "done"


def test_failed_cells_are_told(tmp_path: Path) -> None:
    path = tiny_sweep.write_spec(tmp_path, methods=[{"method": "slerp", "t": 0.5}])
    outcome = mergeloom.sweep(path)
    assert not outcome.complete
    (failed,) = outcome.failed
    assert failed.status == "refused" and "slerp" in failed.name and "two experts" in failed.reason


def test_relative_paths_start_from_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_sweep.write_spec(tmp_path / "deep")
    text = path.read_text().replace(str(tmp_path / "deep"), "deep")
    monkeypatch.chdir(tmp_path)
    path.write_text(text)
    assert mergeloom.plan(path).steps == mergeloom.plan(yaml.safe_load(text)).steps
    assert not list(tmp_path.glob("**/store")), "a plan writes nothing"


def test_errors_are_meant_for_people(tmp_path: Path) -> None:
    with pytest.raises(mergeloom.MergeloomError, match=r"nowhere\.yaml does not exist"):
        mergeloom.plan(tmp_path / "nowhere.yaml")
    with pytest.raises(mergeloom.MergeloomError, match=r"spec.*experts: must be given"):
        mergeloom.sweep({"name": "x"})
    with pytest.raises(mergeloom.MergeloomError, match="spec is a int; give the path"):
        mergeloom.results(3)  # type: ignore[arg-type]


def test_every_public_name_is_there_and_documented() -> None:
    assert set(mergeloom.__all__) <= set(dir(mergeloom))
    for name in mergeloom.__all__:
        value = getattr(mergeloom, name)
        assert name == "__version__" or inspect.getdoc(value), name
    with pytest.raises(AttributeError, match="no attribute 'swep'"):
        mergeloom.swep
    lines = (line.split() for line in (mergeloom.results.__doc__ or "").splitlines() if line.startswith(" " * 8))
    assert [words[0] for words in lines if words] == SCHEMA.names, "the documented columns are those of the table"


def test_the_import_is_light() -> None:
    code = "import sys, mergeloom; print([m for m in ('torch', 'pyarrow', 'prefect', 'pydantic') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
