"""Groups and tags: the tasks that lm-eval takes, in a spec too."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergecore.errors import EvaluationError
from mergecore.evaluators import lm_groups
from mergecore.evaluators.lm_eval import LmEval
from mergecore.planning.groups import ungrouped
from mergecore.spec.sweep import parse_spec
from tests import tiny_lm

FILES = {
    "tagged_1": "include: tiny_choice.yaml\ntask: tagged_1\ntag: [colours, others]\n",
    "tagged_2": "include: tiny_write.yaml\ntask: tagged_2\ntag: colours\n",
    "small": "group: small\ntask: [tiny_choice, {task: tiny_write}]\n",
    "large": "group: large\ntask:\n  - small\n  - colours\n  - {group: within, task: [tagged_1]}\n"
    "aggregate_metric_list: [{metric: acc}]\n",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_lm.write_tasks(tmp_path)
    for name, text in FILES.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    own = {"arc": ("TAG", None), "arc_easy": ("TASK", None)}
    monkeypatch.setattr(lm_groups, "own_index", lambda: own)  # the real one takes seconds
    monkeypatch.setattr(lm_groups, "_own_tags", lambda: {"arc": ("arc_challenge", "arc_easy")})
    return tmp_path


def test_a_name_stands_for_the_tasks_that_lm_eval_takes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)  # lm-eval looks for data files there
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    members = LmEval().members(["tiny_choice", "small", "large", "colours", "arc", "nowhere"], folder)
    for name in ("tiny_choice", "small", "large", "colours"):
        assert set(members[name]) == set(manager.load([name])["tasks"]), name
    assert members["large"] == ("tiny_choice", "tiny_write", "tagged_1", "tagged_2")
    assert members["arc"] == ("arc_challenge", "arc_easy") and members["nowhere"] == ("nowhere",)


def test_a_spec_names_groups_wherever_it_names_tasks(folder: Path) -> None:
    spec = {
        "name": "groups",
        "base": "b",
        "experts": [{"name": "x", "source": "x", "tasks": ["small"]}],
        "methods": [{"method": "average"}],
        "counts": [1],
        "evaluate": {
            "path": ".",
            "held_in": {"one": ["small"]},
            "held_out": {"two": ["colours", "tagged_1"]},
            "chance": {"small": 0.3, "tagged_1": 0.1},
            "primary": {"colours": "acc_norm", "tagged_2": "exact_match"},
        },
    }
    plain = ungrouped(parse_spec(spec, "spec"), folder)
    assert plain.experts[0].tasks == plain.evaluate.held_in["one"] == ("tiny_choice", "tiny_write")
    assert plain.evaluate.held_out["two"] == ("tagged_1", "tagged_2")
    assert plain.evaluate.chance == {"tiny_choice": 0.3, "tiny_write": 0.3, "tagged_1": 0.1}
    assert plain.evaluate.settings["primary"] == {"tagged_1": "acc_norm", "tagged_2": "exact_match"}
    assert ungrouped(plain, folder) is plain


def test_groups_that_cannot_be_meant(folder: Path) -> None:
    (folder / "odd.yaml").write_text("group: odd\ntask: [{task: tiny_choice, num_fewshot: 3}]\n")
    with pytest.raises(EvaluationError, match="'odd' changes settings of its task 'tiny_choice'"):
        LmEval().members(["odd"], folder)
    (folder / "odd.yaml").write_text("group: odd\ntask: [small, odd]\n")
    with pytest.raises(EvaluationError, match="'odd' is part of itself"):
        LmEval().members(["odd"], folder)
