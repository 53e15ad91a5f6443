"""Tests of the report: the averages of the protocol, the paired bootstrap, what wins, what is shown, what is
written.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv
import pyarrow.parquet
import pytest

from mergecore.errors import EvaluationError
from mergecore.reporting.averages import MEASURES
from mergecore.reporting.bootstrap import Draws, percentile_interval
from mergecore.reporting.figure import draw, method_lines, sweep_figure
from mergecore.reporting.report import markdown, write_tables
from mergecore.reporting.scores import CellScores, Suite, Sweep
from mergecore.reporting.summary import best, cell_table, summarise

SUITE = Suite(
    held_in={"a": ("a1", "a2"), "b": ("b1",)},
    held_out={"c": ("c1", "c2"), "d": ("d1",)},
    trained_for={"alpha": ("a1", "a2"), "beta": ("b1",), "gamma": ("a1",)},
)
QUICK = Draws(resamples=200)


def cell(name: str, kind: str, scores: dict[str, Any], **rest: Any) -> CellScores:
    """A cell whose scores are given per task as a number (the mean of two items) or as items, on the test split."""
    items = {
        split: {
            task: np.atleast_1d(np.asarray(value, dtype=float)).repeat(1 + (np.ndim(value) == 0))
            for task, value in own.items()
        }
        for split, own in (scores.items() if {"test", "validation"} & set(scores) else [("test", scores)])
    }
    own = {
        "cell": name, "kind": kind, "name": name, "method": "", "values": {}, "count": 0, "subset": -1,
        "experts": (), "status": "done", "reason": "", "chosen": True, "model": f"merge-{name}", "digest": "",
    }  # fmt: skip
    return CellScores(**{**own, **rest}, items=items)


def merge(name: str, scores: dict[str, Any], method: str = "average", **rest: Any) -> CellScores:
    return cell(
        name, "merge", scores, **{"method": method, "count": 2, "subset": 0, "experts": ("alpha", "beta"), **rest}
    )


ALPHA = cell("alpha", "expert", {"a1": 0.8, "a2": 0.6, "b1": 0.1, "c1": 0.5, "c2": 0.5, "d1": 0.5})
BETA = cell("beta", "expert", {"a1": 0.9, "a2": 0.9, "b1": 0.5, "c1": 0.5, "c2": 0.5, "d1": 0.5})
BASE = cell("base", "base", {"a1": 0.4, "a2": 0.3, "b1": 0.25, "c1": 0.4, "c2": 0.2, "d1": 0.5})
MERGED = merge("m", {"a1": 0.72, "a2": 0.6, "b1": 0.55, "c1": 0.6, "c2": 0.1, "d1": 0.5})


def sweep(*cells: CellScores, select_by: str = "held_in", suite: Suite = SUITE) -> Sweep:
    return Sweep("demo", "", suite, cells, select_by)


def row(table: Any, name: str) -> dict[str, Any]:
    matching: dict[str, Any] = next(row for row in table.to_pylist() if row.get("cell", row.get("name")) == name)
    return matching


def sampled(rng: np.random.Generator, items: int = 60, quality: float = 0.6) -> dict[str, Any]:
    return {task: (rng.random(items) < quality).astype(float) for task in ("a1", "a2", "b1", "c1", "c2", "d1")}


def test_ratios_are_averaged_within_categories_then_over_categories() -> None:
    cell_row = row(summarise(sweep(BASE, ALPHA, BETA, MERGED), "test", draws=QUICK).cells, "m")
    assert cell_row["held_in_normalised"] == pytest.approx(1.025, abs=1e-12)  # 1.0 is the flat mean, 0.984 of means
    assert cell_row["held_in_raw"] == pytest.approx(((0.72 + 0.6) / 2 + 0.55) / 2, abs=1e-12)
    assert cell_row["held_out_normalised"] == pytest.approx(((1.5 + 0.5) / 2 + 1.0) / 2, abs=1e-12)
    assert cell_row["held_out_raw"] == pytest.approx(((0.6 + 0.1) / 2 + 0.5) / 2, abs=1e-12)
    assert cell_row["score/a1"] == pytest.approx(0.72)
    assert cell_row["unreliable"] == []


def test_baselines_use_all_tasks_and_the_best_expert_trained_for_each() -> None:
    gamma = cell("gamma", "expert", {"a1": 1.0, "a2": 0.0, "b1": 0.0, "c1": 0.4, "c2": 0.2, "d1": 0.5})
    mixture = cell("mixture", "multitask", {"a1": 0.5, "a2": 0.6, "b1": 0.5, "c1": 0.4, "c2": 0.2, "d1": 0.5})
    summary = summarise(sweep(BASE, ALPHA, BETA, gamma, mixture, MERGED), "test", draws=QUICK)
    assert row(summary.cells, "mixture")["held_in_normalised"] == pytest.approx(((0.5 / 1.0 + 1.0) / 2 + 1.0) / 2)
    assert row(summary.cells, "base")["held_in_normalised"] == pytest.approx(((0.4 / 1.0 + 0.5) / 2 + 0.5) / 2)
    assert row(summary.cells, "base")["held_out_normalised"] == pytest.approx(1.0)
    assert row(summary.cells, "gamma")["held_in_normalised"] == pytest.approx(1.0)  # its own task, by itself
    assert row(summary.cells, "m")["held_in_normalised"] == pytest.approx(1.025)  # gamma is not one of its experts
    mean = row(summary.baselines, "mean of 3 experts")
    assert mean["held_out_raw"] == pytest.approx((0.5 + 0.5 + 0.4) / 3)
    difference = row(summary.curve.append_column("name", [["m"]]), "m")["held_in_normalised_difference_to_base"]
    assert difference == pytest.approx(1.025 - 0.5)  # the base by alpha and beta, not by gamma


def slow_bootstrap(cells: list[CellScores], alpha: CellScores, beta: CellScores, resamples: int) -> np.ndarray:
    """Held-in normalised under resampled subsets, then items, one item at a time: written without the module."""
    rng = np.random.default_rng(987)
    expert = {"a1": alpha, "a2": alpha, "b1": beta}
    intervals = []
    for _ in range(resamples):
        subsets = rng.choice(len(cells), len(cells))
        picked = {task: rng.choice(60, 60) for task in expert}
        values = []
        for subset in subsets:
            ratio = {
                task: cells[subset].items["test"][task][picked[task]].mean()
                / owner.items["test"][task][picked[task]].mean()
                for task, owner in expert.items()
            }
            values.append(((ratio["a1"] + ratio["a2"]) / 2 + ratio["b1"]) / 2)
        intervals.append(np.mean(values))
    return np.array(intervals)


@pytest.mark.parametrize("subsets", [1, 4])
def test_intervals_agree_with_a_slow_bootstrap(subsets: int) -> None:
    rng = np.random.default_rng(5)
    alpha, beta = (cell(name, "expert", sampled(rng, quality=0.8)) for name in ("alpha", "beta"))
    base = cell("base", "base", sampled(rng))
    cells = [merge(f"m{s}", sampled(rng, quality=0.5 + 0.1 * s), subset=s) for s in range(subsets)]
    point = summarise(sweep(base, alpha, beta, *cells), "test", draws=Draws(4000)).curve.to_pylist()[0]
    expected = slow_bootstrap(cells, alpha, beta, 4000)
    low, high = np.quantile(expected, [0.025, 0.975])
    assert point["subsets"] == subsets
    assert point["held_in_normalised_low"] == pytest.approx(low, abs=0.012)
    assert point["held_in_normalised_high"] == pytest.approx(high, abs=0.012)
    assert point["held_in_normalised_low"] < point["held_in_normalised"] < point["held_in_normalised_high"]


def test_equal_cells_differ_by_exactly_nothing() -> None:
    rng = np.random.default_rng(1)
    scores = [{task: rng.random(37) for task in sampled(rng)} for _ in range(3)]
    cells = [merge(f"{m}{s}", scores[s], m, subset=s) for m in ("average", "slerp", "ties") for s in range(3)]
    others = [
        cell(name, kind, {t: rng.random(37) for t in scores[0]})
        for name, kind in (("alpha", "expert"), ("beta", "expert"))
    ]
    base = cell("base", "base", {t: rng.random(37) for t in scores[0]})
    for point in summarise(sweep(base, *others, *cells), "test").curve.to_pylist():
        for measure in MEASURES:
            for end in ("", "_low", "_high"):
                assert point[f"{measure}_difference_to_average{end}"] == 0.0


def test_differences_are_paired_on_the_subsets_that_both_have() -> None:
    rng = np.random.default_rng(2)
    experts = [cell(name, "expert", sampled(rng, quality=0.9)) for name in ("alpha", "beta")]
    base = cell("base", "base", sampled(rng))
    mine = [merge(f"t{s}", sampled(rng), "ties", subset=s) for s in range(3)]
    gone = merge("a0", {}, subset=0, status="failed", reason="out of memory")
    theirs = [gone, *(merge(f"a{s}", mine[s].items["test"], subset=s) for s in (1, 2))]
    summary = summarise(sweep(base, *experts, *mine, *theirs), "test", draws=QUICK)
    ties = next(point for point in summary.curve.to_pylist() if point["method"] == "ties")
    assert (ties["subsets"], ties["held_in_raw_difference_to_average"]) == (3, 0.0)
    average = next(point for point in summary.curve.to_pylist() if point["method"] == "average")
    assert (average["subsets"], average["subsets_planned"]) == (2, 3)
    assert "2 of 3 subsets" in markdown(summary)


def test_pairing_makes_the_interval_of_a_difference_narrow() -> None:
    rng = np.random.default_rng(3)
    hard = {task: rng.random(200) for task in ("a1", "a2", "b1", "c1", "c2", "d1")}
    at = {q: {task: (u < q).astype(float) for task, u in hard.items()} for q in (0.5, 0.6, 0.62, 0.8)}
    experts = [cell(name, "expert", at[0.8]) for name in ("alpha", "beta")]
    cells = [merge("x", at[0.6]), merge("y", at[0.62], "ties")]
    summary = summarise(sweep(cell("base", "base", at[0.5]), *experts, *cells), "test")
    point = summary.curve.to_pylist()[1]
    apart = point["held_in_raw_difference_to_average_high"] - point["held_in_raw_difference_to_average_low"]
    own = row(summary.baselines, "alpha")
    assert (own["held_in_normalised_low"], own["held_in_normalised_high"]) == pytest.approx(
        (1, 1)
    )  # its own denominator
    assert apart < (point["held_in_raw_high"] - point["held_in_raw_low"]) / 2


@pytest.mark.parametrize("subsets, least", [(1, 0.90), (8, 0.85)])
def test_intervals_cover_the_truth_about_as_often_as_they_say(subsets: int, least: float) -> None:
    suite = Suite(held_in={}, held_out={"c": ("c1",), "d": ("d1",)}, trained_for={})
    covered = 0
    for trial in range(200):
        rng = np.random.default_rng([trial, subsets])
        spread = rng.normal(0.0, 0.05 if subsets > 1 else 0.0, subsets)
        cells = []
        for subset in range(subsets):
            scores = {task: rng.normal(0.6 + spread[subset], 0.3, 80) for task in ("c1", "d1")}
            cells.append(merge(f"m{subset}", scores, subset=subset))
        curve_row = summarise(sweep(*cells, suite=suite), "test", draws=Draws(300, seed=trial)).curve.to_pylist()[0]
        covered += curve_row["held_out_raw_low"] <= 0.6 <= curve_row["held_out_raw_high"]
    assert least <= covered / 200 <= 0.99


@pytest.mark.parametrize(
    "score, chance, reason", [(0.0, {}, "cannot be divided by"), (0.2, {"c2": 0.25}, "not better than chance")]
)
def test_an_unreliable_denominator_is_kept_out_and_named(score: float, chance: dict[str, float], reason: str) -> None:
    base = cell("base", "base", {**BASE.items["test"], "c2": [score, score]})
    summary = summarise(replace(sweep(base, ALPHA, BETA, MERGED), chance=chance), "test", draws=QUICK)
    cell_row = row(summary.cells, "m")
    assert cell_row["held_out_normalised"] == pytest.approx((1.5 + 1.0) / 2)
    assert len(cell_row["unreliable"]) == 1
    assert reason in cell_row["unreliable"][0]
    assert "c2" in cell_row["unreliable"][0]
    assert cell_row["unreliable"][0] in markdown(summary)


def test_where_lower_is_better_more_than_one_is_better() -> None:
    """Perplexities 10 of the base and 5 of the merge; errors 0.4 and 0.5 of the experts and the merge."""
    cells = [
        cell("alpha", "expert", {"a1": [-0.3, -0.5], "a2": 0.6}),
        cell("beta", "expert", {"b1": 0.5}),
        cell("base", "base", {"c1": [-np.log(5), -np.log(20)], "c2": 0.2, "d1": 0.5}),
        merge("m", {"a1": -0.5, "a2": 0.6, "b1": 0.5, "c1": -np.log(5), "c2": 0.2, "d1": 0.5}),
    ]
    made_of = replace(sweep(*cells), scales={"a1": "error", "c1": "perplexity"})
    for split_row in (row(summarise(made_of, "test", draws=QUICK).cells, "m"), row(cell_table(made_of, "test"), "m")):
        assert split_row["score/c1"] == pytest.approx(5.0) and split_row["score/a1"] == pytest.approx(0.5)
        assert split_row["held_in_normalised"] == pytest.approx(((0.4 / 0.5 + 1) / 2 + 1) / 2)
        assert split_row["held_out_normalised"] == pytest.approx(((10 / 5 + 1) / 2 + 1) / 2)
        assert split_row["unreliable"] == []


def test_the_best_expert_is_the_one_with_the_lowest_error() -> None:
    worse = cell("gamma", "expert", {"a1": -0.8})
    better = cell("alpha", "expert", {"a1": -0.2, "a2": 0.5})
    own = merge("m", {"a1": -0.4, "a2": 0.5}, experts=("alpha", "gamma"))
    suite = Suite({"a": ("a1",)}, {}, {"alpha": ("a1",), "gamma": ("a1",)})
    summary = summarise(replace(sweep(worse, better, own, suite=suite), scales={"a1": "error"}), "test", draws=QUICK)
    assert row(summary.cells, "m")["held_in_normalised"] == pytest.approx(0.2 / 0.4)


@pytest.mark.parametrize("scale, sign", [("mean", 1), ("error", -1)])
def test_chance_is_subtracted_from_both(scale: Any, sign: int) -> None:
    base = cell("base", "base", {**BASE.items["test"], "c1": sign * 0.4})
    merged = merge("m", {**MERGED.items["test"], "c1": sign * 0.55})
    chance = 0.25 if sign > 0 else 0.7
    summary = summarise(
        replace(sweep(base, ALPHA, BETA, merged), chance={"c1": chance}, scales={"c1": scale}), "test", draws=QUICK
    )
    ratio = (0.55 - 0.25) / (0.4 - 0.25) if sign > 0 else (0.7 - 0.55) / (0.7 - 0.4)
    assert row(summary.cells, "m")["held_out_normalised"] == pytest.approx(((ratio + 0.5) / 2 + 1.0) / 2)
    assert row(summary.baselines, "base")["held_out_normalised"] == pytest.approx(1.0)


def test_an_error_of_zero_is_said_and_not_divided_by() -> None:
    suite = Suite({}, {"c": ("c1",)}, {})
    cells = cell("base", "base", {"c1": -0.4}), merge("m", {"c1": 0.0})
    summary = summarise(replace(sweep(*cells, suite=suite), scales={"c1": "error"}), "test", draws=QUICK)
    assert np.isnan(row(summary.cells, "m")["held_out_normalised"])
    assert "c1: this cell scores 0 where lower is better" in markdown(summary)


def test_what_was_not_measured_is_no_table() -> None:
    suite = Suite(SUITE.held_in, {}, SUITE.trained_for)
    text = markdown(summarise(sweep(BASE, ALPHA, BETA, MERGED, suite=suite), "test", draws=QUICK))
    assert "Held-out, relative" not in text and "held out" not in text and "held-out −" not in text
    assert "## Held-in, relative" in text and "| base |" in text
    assert not [line for line in text.splitlines() if line.startswith("|") and set(line) <= set("|– ")]


def test_without_any_denominator_to_trust_the_mean_is_nan_and_never_infinite() -> None:
    base = cell("base", "base", {task: [0.0, 0.0] for task in BASE.items["test"]})
    summary = summarise(sweep(base, ALPHA, BETA, MERGED), "test", draws=QUICK)
    assert np.isnan(row(summary.cells, "m")["held_out_normalised"])
    assert np.isnan(summary.curve["held_out_normalised_high"][0].as_py())
    assert summary.curve["held_in_normalised"][0].as_py() == pytest.approx(1.025)
    assert "not comparable" in markdown(summary)


def test_resamples_that_would_divide_by_zero_are_left_out_not_infinite() -> None:
    rng = np.random.default_rng(4)
    rare = {
        task: np.eye(1, 60, 7)[0] for task in BASE.items["test"]
    }  # one of 60 right: a third of the resamples has none
    cells = [cell(name, "expert", sampled(rng)) for name in ("alpha", "beta")]
    point = summarise(sweep(cell("base", "base", rare), *cells, merge("m", sampled(rng))), "test").curve.to_pylist()[0]
    assert point["held_out_normalised"] > 0
    assert np.isnan(point["held_out_normalised_high"])


def test_scores_that_are_not_finite_are_named() -> None:
    bad = merge("bad", {**MERGED.items["test"], "a1": [np.inf, 0.5]})
    cell_row = row(summarise(sweep(BASE, ALPHA, BETA, bad), "test", draws=QUICK).cells, "bad")
    assert np.isnan(cell_row["held_in_normalised"])
    assert np.isnan(cell_row["held_in_raw"])
    assert cell_row["held_out_normalised"] == pytest.approx(1.0)
    assert "a1: the scores of this cell" in cell_row["unreliable"][0]


def test_a_missing_expert_leaves_raw_scores_and_says_why() -> None:
    pending = cell("beta", "expert", {}, status="pending")
    cell_row = row(summarise(sweep(BASE, ALPHA, pending, MERGED), "test", draws=QUICK).cells, "m")
    assert np.isnan(cell_row["held_in_normalised"])
    assert cell_row["held_in_raw"] == pytest.approx(0.605)
    assert cell_row["unreliable"] == ["b1: expert 'beta' has no test scores to divide by"]


def test_best_prefers_validation_and_never_takes_a_baseline() -> None:
    low = merge(
        "low", {"validation": dict.fromkeys(BASE.items["test"], 0.6), "test": dict.fromkeys(BASE.items["test"], 0.1)}
    )
    high = merge(
        "high", {"validation": dict.fromkeys(BASE.items["test"], 0.5), "test": dict.fromkeys(BASE.items["test"], 0.9)}
    )
    both = [
        cell(c.cell, c.kind, {"validation": dict(c.items["test"]), "test": dict(c.items["test"])})
        for c in (BASE, ALPHA, BETA)
    ]
    champion = cell(
        "mixture", "multitask", {split: dict.fromkeys(BASE.items["test"], 1.0) for split in ("validation", "test")}
    )
    assert best(sweep(*both, champion, low, high)) == ("low", "validation")
    assert best(sweep(BASE, ALPHA, BETA, champion, merge("t", high.items["test"] | {}), MERGED)) == ("t", "test")


def test_what_is_not_scored_on_validation_items_is_said_once() -> None:
    """Held-in tasks decide here: of held-out ones there are no numbers, and a sentence instead of a table of dashes."""

    def without_held_out(c: CellScores) -> dict[str, Any]:
        return {"validation": {task: values for task, values in c.items["test"].items() if task in ("a1", "a2", "b1")}}

    cells = [cell(c.cell, c.kind, without_held_out(c)) for c in (BASE, ALPHA, BETA)]
    decided = merge("m", without_held_out(MERGED))
    text = markdown(summarise(sweep(*cells, decided), "validation", draws=QUICK))
    held_in, held_out = text.partition("## Held-out")[::2]
    assert "| average |" in held_in and "decided by these tasks" not in held_in
    assert held_out.partition("##")[0].count("Nothing is decided by these tasks") == 1


def test_best_goes_by_the_side_it_is_told_and_breaks_ties_by_cell_id() -> None:
    scores = dict(MERGED.items["test"])
    out = merge("z", {**scores, "a1": [0.0, 0.0], "d1": [0.9, 0.9]})
    assert best(sweep(BASE, ALPHA, BETA, out, MERGED, select_by="held_in"))[0] == "m"
    assert best(sweep(BASE, ALPHA, BETA, out, MERGED, select_by="held_out"))[0] == "z"
    assert best(sweep(BASE, ALPHA, BETA, merge("n", scores), MERGED, merge("k", scores)))[0] == "k"
    failed = merge("a", {**scores, "a1": [1.0, 1.0]}, status="failed")
    assert best(sweep(BASE, ALPHA, BETA, failed, MERGED))[0] == "m"


def test_best_of_nothing_is_an_error_by_name() -> None:
    with pytest.raises(EvaluationError, match="no merge of sweep 'demo'"):
        best(sweep(BASE, ALPHA, merge("m", {}, status="pending")))
    with pytest.raises(EvaluationError, match="known: held_in, held_out"):
        best(sweep(BASE, ALPHA, BETA, MERGED, select_by="accuracy"))


def test_only_chosen_cells_make_the_curve_where_a_grid_was_searched() -> None:
    scores = dict(MERGED.items["test"])
    values = [{"density": 0.2, "scale": scale} for scale in (0.3, 0.5)]
    cells = [
        merge(f"{n}{s}{v['scale']}", scores, "ties", count=n, subset=s, values=v, chosen=v["scale"] == (0.3 if n == 2 else 0.5))
        for n in (2, 4) for s in (0, 1) for v in values
    ]  # fmt: skip
    curve = summarise(sweep(BASE, ALPHA, BETA, *cells), "test", draws=QUICK).curve.to_pylist()
    assert [(point["label"], point["count"], point["subsets"]) for point in curve] == [
        ("density=0.2, scale chosen", 2, 2),
        ("density=0.2, scale chosen", 4, 2),
    ]
    assert json.loads(curve[0]["values"]) == [{"density": 0.2, "scale": 0.3}]
    assert json.loads(curve[1]["values"]) == [{"density": 0.2, "scale": 0.5}]


def test_listed_values_make_a_curve_each() -> None:
    drop = {"kind": "random", "rate": 0.5}
    cells = [
        merge(f"m{i}", dict(MERGED.items["test"]), "ties", values=v)
        for i, v in enumerate([{"drop": drop}, {"scale": 1}])
    ]
    curve = summarise(sweep(BASE, ALPHA, BETA, *cells), "test", draws=QUICK).curve.to_pylist()
    assert [point["label"] for point in curve] == ["drop.rate=0.5", "scale=1"]
    assert all(point["held_in_raw_difference_to_average"] is None for point in curve)


def test_pending_and_failed_cells_are_listed_and_do_not_disturb() -> None:
    failed = merge("f", {}, "ties", status="failed", reason="disk full | 3 GiB\nshort")
    refused = merge("r", {}, "ties", subset=1, status="refused", reason="vocabularies differ")
    pending = merge("p", {}, "ties", subset=2, status="pending")
    summary = summarise(sweep(BASE, ALPHA, BETA, failed, refused, pending), "test", draws=QUICK)
    assert [(failure.cell, failure.status) for failure in summary.failed] == [("f", "failed"), ("r", "refused")]
    assert (summary.curve.num_rows, summary.winner) == (0, None)
    assert row(summary.cells, "p")["held_in_raw"] is None
    text = markdown(summary)
    assert "disk full \\| 3 GiB short" in text
    assert "vocabularies differ" in text
    assert "1 of 6 cells are pending" in text


def test_an_empty_sweep_has_tables_of_the_same_shape() -> None:
    empty = summarise(sweep(), "test", draws=QUICK)
    full = summarise(sweep(BASE, ALPHA, BETA, MERGED), "test", draws=QUICK)
    for name in ("cells", "curve", "baselines"):
        assert getattr(empty, name).schema == getattr(full, name).schema
    assert "No merge has been measured yet" in markdown(empty)


def test_different_items_cannot_be_compared() -> None:
    other = merge("o", {**MERGED.items["test"], "a1": [0.5, 0.5, 0.5]})
    with pytest.raises(EvaluationError, match=r"'a1'.*cell o has 3 items"):
        summarise(sweep(BASE, ALPHA, BETA, other), "test")


def test_the_same_sweep_gives_the_same_tables_whatever_else_it_holds() -> None:
    rng = np.random.default_rng(6)
    fixed = [cell("base", "base", sampled(rng)), *(cell(n, "expert", sampled(rng)) for n in ("alpha", "beta"))]
    cells = [merge(f"m{s}", sampled(rng), subset=s) for s in range(3)]
    more = [merge(f"n{s}", sampled(rng), "ties", subset=s) for s in range(3)]
    first, second = (summarise(sweep(*fixed, *cells), "test") for _ in range(2))
    assert first.curve.equals(second.curve)
    assert first.baselines.equals(second.baselines)
    grown = summarise(sweep(*fixed, *more, *cells), "test").curve.to_pylist()
    assert first.curve.to_pylist()[0] == next(point for point in grown if point["method"] == "average")


def test_tables_survive_being_written(tmp_path: Path) -> None:
    failed = merge("f", {}, "ties", status="failed", reason="disk full, again")
    summary = summarise(sweep(BASE, ALPHA, BETA, MERGED, failed), "test", draws=QUICK)
    written = write_tables(summary, tmp_path / "report")
    names = [
        "baselines.csv",
        "baselines.parquet",
        "cells.csv",
        "cells.parquet",
        "curve.csv",
        "curve.parquet",
        "report.md",
    ]
    assert [path.name for path in written] == names
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == names
    for name in ("cells", "curve", "baselines"):
        assert pyarrow.parquet.read_table(tmp_path / "report" / f"{name}.parquet").equals(getattr(summary, name))
    cells = pyarrow.csv.read_csv(tmp_path / "report" / "cells.csv")
    assert cells.num_rows == 5
    assert json.loads(cells["experts"].to_pylist()[3]) == ["alpha", "beta"]
    before = [path.read_bytes() for path in written]
    write_tables(summary, tmp_path / "report")
    assert [path.read_bytes() for path in written] == before


def test_intervals_leave_out_what_has_no_value() -> None:
    samples = np.array([[1.0, 1.0], *([float(n), np.nan if n == 50 else n] for n in range(101))])
    low, high = percentile_interval(samples)
    assert (low[0], high[0]) == pytest.approx((2.5, 97.5))
    assert np.isfinite([low[1], high[1]]).all()
    assert np.isnan(percentile_interval(np.ones((1, 2)))[0]).all()


def test_importing_the_report_costs_neither_matplotlib_nor_a_service() -> None:
    code = (
        "import sys, mergecore.reporting.report; print({'matplotlib', 'prefect', 'mlflow', 'dask'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_a_figure_is_the_same_bytes_each_time_and_carries_no_date(tmp_path: Path) -> None:
    summary = summarise(sweep(BASE, ALPHA, BETA, MERGED), "test", draws=QUICK)
    first = draw(summary, tmp_path / "figure.png")
    assert [path.name for path in first] == ["figure.png", "figure.svg"]
    contents = [path.read_bytes() for path in first]
    assert [path.read_bytes() for path in draw(summary, tmp_path / "again")] == contents
    assert b"<dc:date>" not in contents[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.png", "again.svg", "figure.png", "figure.svg"]


def test_a_figure_can_be_drawn_of_nothing_and_of_many_methods() -> None:
    assert len(sweep_figure(summarise(sweep(), "test", draws=QUICK)).axes) == 2
    scores = dict(MERGED.items["test"])
    cells = [merge(f"m{i}-{n}", scores, f"method{i}", count=n) for i in range(9) for n in (2, 4, 8, 64)]
    panel = sweep_figure(summarise(sweep(BASE, ALPHA, BETA, *cells), "test", draws=QUICK)).axes[0]
    assert [label.get_text() for label in panel.get_xticklabels()] == ["2", "4", "8", "64"]
    looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in panel.lines}
    assert len(looks) == len(panel.lines)


def test_a_figure_draws_the_best_of_listed_values_and_says_so() -> None:
    better = {**MERGED.items["test"], "b1": [0.9, 0.9]}
    cells = [
        merge("x", dict(MERGED.items["test"]), "ties", values={"scale": 0.3}),
        merge("y", better, "ties", values={"scale": 1}),
    ]
    lines = method_lines(summarise(sweep(BASE, ALPHA, BETA, *cells), "test", draws=QUICK))
    assert [text for text, _ in lines] == ["ties (scale=1) – best of 2 listed"]
