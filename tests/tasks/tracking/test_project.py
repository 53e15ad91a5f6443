"""MLflow shows exactly the sweep: one run per cell however often it is projected, and no cell that left the spec."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import socketserver
import threading
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from flows.services.servers import Addresses
from mergecore.errors import ServiceError
from mergecore.reporting.scores import Sweep, Trajectory, Trial
from mergecore.reporting.summary import Summaries
from tasks.tracking import project as track
from tasks.tracking import records, views
from tasks.tracking.project import TrackResult
from tests import example_sweep
from tests.example_sweep import few

Q = "workflowType=machine_learning"


@pytest.fixture
def server(shared_servers: Addresses) -> str:
    """A real MLflow server."""
    return shared_servers.mlflow


@pytest.fixture
def client(server: str) -> MlflowClient:
    return MlflowClient(server)


def project(sweep: Sweep, server: str, folder: Path, **files: Path) -> TrackResult:
    artifacts = {name.replace("__", "/").replace("_txt", ".txt"): path for name, path in files.items()}
    return track.project(
        Summaries(sweep), server, artifacts, {"Prefect flow run": "http://localhost:4200/runs/1"}, folder
    )


def shown(client: MlflowClient, result: TrackResult, kind: str = "cell") -> dict[str, Run]:
    """Name → run of a kind, as the saved views filter them; fails where a name is there twice."""
    query = f"tags.`run.kind` = '{kind}' and tags.`sweep.state` = 'current'"
    runs = list(client.search_runs([result.experiment_id], query, max_results=1000))
    by_name = {str(run.info.run_name): run for run in runs}
    assert len(by_name) == len(runs)
    return by_name


def text(client: MlflowClient, run: Run, path: str, folder: Path) -> str:
    return Path(client.download_artifacts(run.info.run_id, path, str(folder))).read_text()


def test_a_sweep_is_shown_once_however_often_it_is_projected(client: MlflowClient, server: str, tmp_path: Path) -> None:
    report = tmp_path / "any name"
    report.write_text("figures and reports")
    sweep = example_sweep.sweep(few(), "twice")
    first = project(sweep, server, tmp_path, reports__report_txt=report)
    before = {name: run.info.run_id for name, run in shown(client, first).items()}
    second = project(sweep, server, tmp_path, reports__report_txt=report)
    assert (second.written, second.retired) == (0, 0) and second.unchanged == first.written
    assert {name: run.info.run_id for name, run in shown(client, second).items()} == before
    assert first.parent_run_id == second.parent_run_id
    everything = client.search_runs([first.experiment_id], max_results=1000)
    assert {run.info.status for run in everything} == {"FINISHED"}

    run = shown(client, first)["ties-n4"]
    assert run.data.params == {
        "method": "ties", "n_experts": "4", "subset": "0", "values": "density=0.2, scale=1", "density": "0.2",
        "scale": "1.0",
    }  # fmt: skip
    assert {"held_in/avg", "held_out/avg", "held_in/category", "held_out/category_new", "n_experts"} <= set(
        run.data.metrics
    )
    assert run.data.tags["mlflow.parentRunId"] == first.parent_run_id
    assert run.info.end_time - run.info.start_time == 14750, "the duration is that of the work"
    assert json.loads(text(client, run, "lineage.json", tmp_path))["recipe"]["method"] == "ties"

    parent = client.get_run(first.parent_run_id)
    assert text(client, parent, "spec.yaml", tmp_path) == sweep.spec
    assert text(client, parent, "reports/report.txt", tmp_path) == "figures and reports"
    table = json.loads(text(client, parent, "cells.json", tmp_path))
    assert len(table["data"]) == len(sweep.cells) and table["columns"][:3] == ["name", "status", "method"]
    assert "| \u00a0ties density=0.2, scale=1\u00a0 |" in parent.data.tags["mlflow.note.content"]


def test_curves_are_runs_whose_step_is_the_number_of_experts(client: MlflowClient, server: str, tmp_path: Path) -> None:
    result = project(example_sweep.sweep(few(), "curves"), server, tmp_path)
    series = shown(client, result, "series")
    assert set(series) == {"average", "ties", "base model", "multitask", "mean expert"}
    history = client.get_metric_history(series["ties"].info.run_id, "held_in/avg")
    assert [point.step for point in history] == [2, 4]
    level = client.get_metric_history(series["base model"].info.run_id, "held_out/avg")
    assert [point.value for point in level] == [1.0, 1.0]


def test_a_search_is_a_run_whose_step_is_the_models_tried(client: MlflowClient, server: str, tmp_path: Path) -> None:
    def way(*scores: float | None) -> Trajectory:
        best, trials = 0.0, []
        for number, score in enumerate(scores, start=1):
            kept = score is not None and score > best
            best = max(best, score or 0.0)
            trials.append(Trial(number, f"id-{number}", f"scale={number}", score, kept, best, "" if score else "NaN"))
        state = "open" if len(trials) < 3 else "done"
        result = next((trial.cell for trial in reversed(trials) if trial.kept), "") if state == "done" else ""
        return Trajectory("pcb n4 s0", "pcb", "nevergrad", 4, 0, state, "", 3, result, tuple(trials))  # type: ignore[arg-type]

    def shown_with(*scores: float | None) -> tuple[Run, TrackResult]:
        sweep = dataclasses.replace(example_sweep.sweep(few(), "searched"), searches=(way(*scores),))
        result = project(sweep, server, tmp_path)
        (run,) = shown(client, result, "search").values()
        return run, result

    run, _ = shown_with(0.5, None)
    assert (run.info.run_name, run.info.status) == ("search pcb n4 s0", "SCHEDULED")
    run, result = shown_with(0.5, None, 0.7)
    assert run.info.status == "FINISHED" and run.data.tags["search.result"] == "id-3"
    points = {
        name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, f"search/{name}")]
        for name in ("score", "best")
    }
    assert points == {"score": [(1, 0.5), (3, 0.7)], "best": [(1, 0.5), (2, 0.5), (3, 0.7)]}
    assert json.loads(text(client, run, "trials.json", tmp_path))["data"][1][2] == "NaN"
    assert (
        "pcb n4 s0 (nevergrad) found scale=3 (0.7000)"
        in client.get_run(result.parent_run_id).data.tags["mlflow.note.content"]
    )
    run, _ = shown_with(0.6, 0.4, 0.5)  # a failure forgiven: another way, and no point of the old one
    assert [point.value for point in client.get_metric_history(run.info.run_id, "search/score")] == [0.6, 0.4, 0.5]


def test_extending_and_shrinking_a_spec(client: MlflowClient, server: str, tmp_path: Path) -> None:
    cells = few()
    first = project(example_sweep.sweep(cells[:-2], "grows"), server, tmp_path)
    grown = project(example_sweep.sweep(cells, "grows"), server, tmp_path)
    assert grown.experiment_id == first.experiment_id
    before = shown(client, grown)["ties-n4"].info.run_id
    assert grown.retired == 0
    assert grown.unchanged >= len(cells) - 2, "what was shown already is left alone"
    shrunk = project(example_sweep.sweep(cells[:-3], "grows"), server, tmp_path)
    assert shrunk.retired == 3
    assert not {"average-n4", "ties-n2", "ties-n4"} & set(shown(client, shrunk))
    assert "ties" not in shown(client, shrunk, "series")
    retired = client.search_runs([shrunk.experiment_id], "tags.`sweep.state` = 'retired'")
    assert {run.info.run_name for run in retired} == {"average-n4", "ties-n2", "ties-n4"}
    back = project(example_sweep.sweep(cells, "grows"), server, tmp_path)
    assert shown(client, back)["ties-n4"].info.run_id == before
    assert len(client.search_runs([back.experiment_id], "tags.`run.kind` = 'cell'", max_results=1000)) == len(cells)


def test_cells_that_fail_are_shown_with_their_reason_until_they_succeed(
    client: MlflowClient, server: str, tmp_path: Path
) -> None:
    cells = few()
    failing = dataclasses.replace(
        cells[-1], status="failed", reason="NonFiniteError: layers.3 of ties", items={}, digest=""
    )
    waiting = dataclasses.replace(cells[-2], status="pending", items={}, digest="")
    sweep = example_sweep.sweep([*cells[:-2], waiting, failing, example_sweep.refused()], "fails")
    result = project(sweep, server, tmp_path)
    runs = shown(client, result)
    assert runs["ties-n4"].info.status == "FAILED"
    assert runs["ties-n4"].data.tags["cell.reason"] == "NonFiniteError: layers.3 of ties"
    assert runs["slerp-n4"].data.tags["cell.status"] == "refused"
    assert runs["ties-n2"].info.status == "SCHEDULED"
    assert client.get_run(result.parent_run_id).info.status == "SCHEDULED"
    assert "layers.3 of ties" in client.get_run(result.parent_run_id).data.tags["mlflow.note.content"]

    done = project(example_sweep.sweep(cells, "fails"), server, tmp_path)
    run = shown(client, done)["ties-n4"]
    assert run.info.run_id == runs["ties-n4"].info.run_id, "its address stays"
    assert run.info.status == "FINISHED" and "cell.reason" not in run.data.tags and "held_in/avg" in run.data.metrics
    assert client.get_run(done.parent_run_id).info.status == "FINISHED"


def test_what_a_killed_projection_left_is_mended(client: MlflowClient, server: str, tmp_path: Path) -> None:
    sweep = example_sweep.sweep(few(), "killed")
    first = project(sweep, server, tmp_path)
    runs = shown(client, first)
    client.delete_tag(runs["ties-n2"].info.run_id, records.DIGEST)
    client.update_run(runs["ties-n2"].info.run_id, status="RUNNING")
    tags = {"sweep.name": "killed", "run.kind": "cell", "cell.id": "id-ties-n4", "sweep.state": "current"}
    twin = client.create_run(first.experiment_id, tags=tags, run_name="ties-n4")
    again = project(sweep, server, tmp_path)
    assert again.written == 1
    assert {run.info.status for run in client.search_runs([again.experiment_id], max_results=1000)} == {"FINISHED"}
    assert client.get_run(twin.info.run_id).info.lifecycle_stage == "deleted"


def test_scores_that_are_gone_do_not_stay(client: MlflowClient, server: str, tmp_path: Path) -> None:
    cells = few()
    project(example_sweep.sweep(cells, "fewer"), server, tmp_path)
    target = next(cell for cell in cells if cell.name == "ties-n4")
    items = {"test": {task: scores for task, scores in target.items["test"].items() if task != "lookup_far"}}
    changed = [dataclasses.replace(cell, items=items) if cell is target else cell for cell in cells]
    run = shown(client, project(example_sweep.sweep(changed, "fewer"), server, tmp_path))["ties-n4"]
    assert "held_out/lookup_far" not in run.data.metrics and "held_out/avg" not in run.data.metrics


def test_validation_scores_stand_beside_test_scores(client: MlflowClient, server: str, tmp_path: Path) -> None:
    cells = [
        dataclasses.replace(cell, items={**cell.items, **example_sweep.items(cell.name, 0.7, "validation")})
        for cell in few()
    ]
    loser = dataclasses.replace(cells[-1], chosen=False, items={"validation": cells[-1].items["validation"]})
    runs = shown(client, project(example_sweep.sweep([*cells[:-1], loser], "searched"), server, tmp_path))
    assert {"held_in/avg", "validation/held_in"} <= set(runs["ties-n2"].data.metrics)
    assert "held_in/avg" not in runs["ties-n4"].data.metrics and "validation/held_in" in runs["ties-n4"].data.metrics


def test_registration_points_at_weights_and_moves_its_alias(client: MlflowClient, server: str, tmp_path: Path) -> None:
    cells = few()
    best, other = cells[-2], cells[-1]
    first = project(example_sweep.sweep(cells, "registers", example_sweep.registration(best)), server, tmp_path)
    assert first.version == "1" and first.urls["model"].startswith(f"{server}/#/models/demo-model?{Q}")
    version = client.get_model_version_by_alias("demo-model", "champion")
    assert version.tags["weights.uri"] == f"mergeloom://store/{best.model}"
    assert version.tags["weights.digest"] == best.digest and version.tags["method"] == "ties"
    assert "2 experts" in str(version.description) and str(version.source).startswith("models:/")
    run = client.get_run(str(version.run_id))
    assert run.data.tags["cell.id"] == best.cell and run.outputs is not None
    model = client.get_logged_model(run.outputs.model_outputs[0].model_id)
    assert model.tags["weights.digest"] == best.digest
    assert {metric.key for metric in model.metrics or []} >= {"held_in/avg"}

    again = project(example_sweep.sweep(cells, "registers", example_sweep.registration(best)), server, tmp_path)
    assert (again.version, again.written) == ("1", 0)
    moved = project(example_sweep.sweep(cells, "registers", example_sweep.registration(other)), server, tmp_path)
    assert moved.version == "2"
    assert str(client.get_model_version_by_alias("demo-model", "champion").version) == "2"


def test_rebuild_makes_all_of_it_again(client: MlflowClient, server: str, tmp_path: Path) -> None:
    cells = few()
    registration = {**example_sweep.registration(cells[-1]), "name": "rebuilt-model"}
    before = project(example_sweep.sweep([*cells, example_sweep.refused()], "rebuilds"), server, tmp_path)
    old = {run.info.run_id for run in client.search_runs([before.experiment_id], max_results=1000)}
    sweep = example_sweep.sweep(cells, "rebuilds", registration)
    result = track.project(Summaries(sweep), server, {}, {}, tmp_path, rebuild=True)
    new = {run.info.run_id for run in client.search_runs([result.experiment_id], max_results=1000)}
    assert result.unchanged == 0 and not old & new
    assert set(shown(client, result)) == {cell.name for cell in cells}
    once_more = track.project(Summaries(sweep), server, {}, {}, tmp_path, rebuild=True)
    champion = client.get_model_version_by_alias("rebuilt-model", "champion")
    assert str(champion.version) == once_more.version == "2", "a version whose run is gone is replaced"


def test_an_experiment_that_was_deleted_comes_back(client: MlflowClient, server: str, tmp_path: Path) -> None:
    sweep = example_sweep.sweep(few()[:1], "binned")
    result = project(sweep, server, tmp_path)
    client.delete_experiment(result.experiment_id)
    assert project(sweep, server, tmp_path).experiment_id == result.experiment_id
    assert set(shown(client, result)) == {"base"}


def test_saved_views_are_kept_and_may_fail(
    client: MlflowClient, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = example_sweep.sweep(few()[:1], "views")
    result = project(sweep, server, tmp_path)
    saved = client.get_experiment(result.experiment_id).tags
    assert {views.PREFIX + key for key in views.TITLES} <= set(saved)
    assert all(len(saved[views.PREFIX + key]) < 5000 for key in views.TITLES)
    project(sweep, server, tmp_path)
    assert client.get_experiment(result.experiment_id).tags == saved

    def broken(*_: object) -> str:
        raise RuntimeError("another format")

    monkeypatch.setattr(views, "view_states", broken)
    assert project(example_sweep.sweep(few()[:2], "views"), server, tmp_path).written >= 1


def test_an_mlflow_that_does_not_answer_is_asked_once(tmp_path: Path) -> None:
    """MLflow's own client would try again for minutes."""
    asked: list[object] = []

    class Mute(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            if self.request.recv(1, socket.MSG_PEEK):  # not the connection that only tries whether anybody is there
                asked.append(self.client_address)

    before = dict(os.environ)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Mute) as mute:
        threading.Thread(target=mute.serve_forever, daemon=True).start()
        try:
            with pytest.raises(ServiceError, match="does not answer"):
                project(example_sweep.sweep(few()), f"http://127.0.0.1:{mute.server_address[1]}", tmp_path)
        finally:
            mute.shutdown()
    assert len(asked) == 1
    assert dict(os.environ) == before


def test_an_mlflow_that_goes_away_meanwhile(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: object, **__: object) -> None:
        raise ConnectionError("connection reset")

    monkeypatch.setattr(MlflowClient, "log_batch", gone)
    with pytest.raises(ServiceError, match="mergeloom track"):
        project(example_sweep.sweep(few(), "broken-off"), server, tmp_path)


def test_values_become_flat_parameters() -> None:
    values = {"scale": 0.5, "drop": {"kind": "random", "rate": 0.5}, "weights": [1, 2], "sign": "sum"}
    flat = records.flat_values(values)
    assert flat == {"scale": "0.5", "drop": "random", "drop.rate": "0.5", "weights": "[1, 2]", "sign": "sum"}
    assert records.metric_name("held_in/a:b(c)") == "held_in/a_b_c_"
