"""The end of a sweep: one report, its intervals bootstrapped once, from a spec that can be run again."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from flows.conduct import _spec_file, conduct
from flows.session.session import open_session, session_of
from flows.session.settings import Options
from mergecore.events import silent
from mergecore.reporting import summary
from mergecore.reporting.bootstrap import Draws, Floats
from mergecore.reporting.scores import Sweep
from mergecore.spec.sweep import parse_spec
from mergecore.spec.yaml_files import read_yaml
from tests.digits import DigitsTier
from tests.digits_sweep import digits_spec


def test_a_sweep_that_registers_and_tracks_bootstraps_each_split_once(
    tier: DigitsTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values are chosen on validation items and the report is on test items: only the report has intervals."""
    path = tmp_path / "digits.yaml"
    few_items = {"evaluate__limit": 20, "evaluate__validation": {"limit": 20}}
    path.write_text(yaml.safe_dump(digits_spec(tier, tmp_path / "store", counts=[2], **few_items)))
    summarised: list[str] = []
    bootstrapped: Counter[tuple[str, str]] = Counter()
    summarise, task_means = summary.summarise, Draws.task_means

    def counted_summarise(sweep: Sweep, split: str, **options: object) -> summary.Summary:
        summarised.append(split)
        return summarise(sweep, split, **options)  # type: ignore[arg-type]

    def counted_means(draws: Draws, task: str, scores: Floats) -> Floats:
        if draws.resamples:
            bootstrapped[task, hashlib.sha256(np.ascontiguousarray(scores).tobytes()).hexdigest()] += 1
        return task_means(draws, task, scores)

    monkeypatch.setattr(summary, "summarise", counted_summarise)
    monkeypatch.setattr(Draws, "task_means", counted_means)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    session = open_session(path, silent, Options(workers=1))
    outcome = conduct(session, silent, in_process=True, retry_failed=False, track=True)
    assert not outcome.troubled
    assert (session.results / "registration.json").exists() and (session.results / "shown.json").exists()
    assert summarised == ["test"]
    assert bootstrapped and set(bootstrapped.values()) == {1}


def test_a_spec_that_came_from_no_file_is_written_so_that_it_can_be_run_again(tier: DigitsTier, tmp_path: Path) -> None:
    spec = parse_spec(digits_spec(tier, tmp_path / "store", counts=[2]), "digits")
    session = session_of(spec)
    path = _spec_file(session)
    assert path.is_absolute() and path.is_relative_to(tmp_path / "store")
    again = open_session(path)
    assert parse_spec(read_yaml(path), path.name) == spec
    assert [cell.id for cell in again.plan.cells] == [cell.id for cell in session.plan.cells]
    assert _spec_file(again) == path
