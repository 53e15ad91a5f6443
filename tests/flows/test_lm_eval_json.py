"""`report --lm-eval` on a sweep: the files have lm-eval's names and numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from pyarrow import parquet
from safetensors.torch import load_file

import mergeloom
from flows.lm_eval_json import exported
from flows.session.session import open_session
from mergecore.evaluators.lm_eval import LmEval
from mergecore.events import silent
from mergecore.tensors.memory import MemoryTensors
from tests.tiny_sweep import write_spec

LAST = """
include: tiny_write.yaml
task: tiny_last
output_type: loglikelihood
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}, {metric: perplexity}]
metadata: {version: 3, primary_metric: perplexity}
"""


def test_a_sweep_by_perplexity(tmp_path: Path) -> None:
    """The perplexity is e to the mean negated log-likelihood; the report shows it, and more is better when divided."""
    torch.set_num_threads(1)
    path = write_spec(tmp_path, experts=2, counts=[2])
    (tmp_path / "tasks" / "tiny_last.yaml").write_text(LAST)
    spec = yaml.safe_load(path.read_text())
    spec["evaluate"]["held_out"] = {"writing": ["tiny_last"]}
    spec["output"]["register"] = None
    path.write_text(yaml.safe_dump(spec))
    assert mergeloom.sweep(path).complete
    paths = exported(open_session(path), tmp_path / "out")
    assert len(paths) == len({file.parent for file in paths})
    written = json.loads((tmp_path / "out" / "base" / "results_test.json").read_text())
    shell = LmEval(limit=4, batch_size=4).open(tmp_path / "base", tmp_path / "tasks")
    shell.swap(MemoryTensors(load_file(tmp_path / "base" / "model.safetensors")))
    task = LmEval(limit=4, batch_size=4).resolve(["tiny_last"], "test", tmp_path / "tasks")["tiny_last"]
    items = torch.tensor(shell.score(task, silent)["loglikelihoods"].to_pylist(), dtype=torch.float64)
    perplexity = float(torch.exp(-items.mean()))
    assert written["results"]["tiny_last"]["perplexity,none"] == pytest.approx(perplexity)
    assert written["higher_is_better"]["tiny_last"] == {"acc": True, "perplexity": False}
    assert set(written["results"]) == {"tiny_last", "tiny_choice"} and written["versions"]["tiny_last"] == 3
    rows = mergeloom.results(path).to_pylist()
    scores = {row["name"]: row["score"] for row in rows if row["task"] == "tiny_last"}
    assert scores["base"] == pytest.approx(perplexity)
    cells = {row["name"]: row for row in read_cells(tmp_path)}
    for name, score in scores.items():
        assert cells[name]["held_out_normalised"] == pytest.approx(perplexity / score)


def read_cells(folder: Path) -> list[dict[str, object]]:
    table = parquet.read_table(folder / "store" / "sweeps" / "tiny" / "cells.parquet")
    rows: list[dict[str, object]] = table.to_pylist()
    return rows
