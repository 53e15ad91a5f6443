"""The task that shows a sweep in MLflow: it completes, and says what could not be shown."""

from __future__ import annotations

from prefect.logging import disable_run_logger

from mergecore.errors import ServiceError
from tasks.track import Projection, track
from tasks.tracking.project import TrackResult


def test_what_is_not_shown_is_told() -> None:
    def away() -> TrackResult:
        raise ServiceError("MLflow at http://host does not answer")

    projection = Projection(away)
    with disable_run_logger():
        state = track.fn("demo", projection)
    assert state.is_completed() and state.name == "Without MLflow"
    assert projection.remarks == ["not shown in MLflow: MLflow at http://host does not answer"]


def test_what_is_not_registered_is_told() -> None:
    result = TrackResult("1", "run", "http://host", {"curves": "http://host/#/1"}, model="a/b", unregistered="no slash")
    projection = Projection(lambda: result)
    with disable_run_logger():
        state = track.fn("demo", projection)
    assert state.is_completed() and state.name == "Not registered"
    (remark,) = projection.remarks
    assert "not registered in MLflow: model 'a/b', at http://host: no slash" in remark
    assert projection.pages == result.urls
