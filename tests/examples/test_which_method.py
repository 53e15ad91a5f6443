"""The page on which method wins where: its tables are those of the results that are kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from examples import which_method
from mergecore.registry import METHODS
from mergecore.spec.sweep import parse_spec
from mergecore.spec.yaml_files import read_yaml

ROOT = Path(which_method.__file__).parents[1]
STUDIES = ("methods", "digits")


def test_the_tables_of_the_page_are_those_of_the_kept_results() -> None:
    text = which_method.PAGE.read_text(encoding="utf-8")
    assert which_method.page(text) == text, "python examples/which_method.py makes them anew"
    for name in which_method.TABLES:
        assert text.count(f"<!-- table: {name} -->") == 1
    for name in which_method.FIGURES:
        assert f"images/which-method-{name}.png" in text and (ROOT / f"docs/images/which-method-{name}.png").exists()


@pytest.mark.parametrize("name", STUDIES)
def test_the_kept_results_are_those_of_the_study(name: str) -> None:
    """A method may be added without being measured here: that takes hours."""
    spec = parse_spec(read_yaml(ROOT / "examples" / f"{name}.yaml"), name)
    assert {variant.method.name for variant in spec.variants} <= set(METHODS.own)
    kept = {(row["method"], row["count"]) for row in which_method.read(name) if row["kind"] == "merge"}
    planned = {(variant.label, str(count)) for variant in spec.variants for count in variant.counts}
    assert kept <= planned and (kept == planned) == which_method.unmeasured(name).startswith("All")


def test_a_table_says_what_was_measured() -> None:
    rows = {(row["method"], row["count"]): row for row in which_method.read("digits")}
    best = max(
        (row for (_, count), row in rows.items() if count == "8" and row["held_out"]),
        key=lambda row: float(row["held_in"]),
    )
    assert best["behind_best"] == "0"
    line = next(line for line in which_method.score_table("digits").splitlines() if line.startswith("| average "))
    values = [
        f"{float(rows['average', count][side]):.2f}" for side in ("held_in", "upright") for count in ("2", "4", "8")
    ]
    assert [part.strip(" *") for part in line.split("|")[2:8]] == values
    line = next(
        line for line in which_method.score_table("digits").splitlines() if line.startswith(f"| {best['method']} |")
    )
    assert line.split("|")[4].strip() == f"**{float(best['held_in']):.2f}**"


def test_both_specs_of_the_digits_ask_the_same_of_the_same_models() -> None:
    row_values = {
        name: yaml.safe_load((ROOT / f"examples/{name}.yaml").read_text()) for name in ("digits", "digits_as_merged")
    }
    anew, merged = row_values["digits"], row_values["digits_as_merged"]
    assert all(entry in anew["methods"] for entry in merged["methods"])
    for key in ("recalibrate", "recalibration_tasks"):
        anew["evaluate"].pop(key), merged["evaluate"].pop(key, None)
    left = {"name", "methods"}
    assert {key: anew[key] for key in anew.keys() - left} == {key: merged[key] for key in merged.keys() - left}


def test_the_digits_are_made_by_a_command_that_leaves_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "digits").mkdir()
    command = [sys.executable, str(ROOT / "examples" / "make_digits.py"), "--out", str(tmp_path / "digits")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1 and "is there already" in done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "digits"] and not any((tmp_path / "digits").iterdir())


def test_a_figure_is_drawn_from_the_kept_results(tmp_path: Path) -> None:
    which_method.draw("digits", "a title", tmp_path / "images" / "figure.png")
    assert (tmp_path / "images" / "figure.png").read_bytes().startswith(b"\x89PNG")
