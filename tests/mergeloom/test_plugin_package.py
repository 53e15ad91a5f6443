"""Plug-ins of another package, built and installed beside the wheel: one of each kind."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from flows.services.servers import Addresses
from tests.mergeloom.installed import Installed, built_wheel

pytestmark = pytest.mark.timeout(900)

SOURCE = Path(__file__).parent / "plugin_package"
CHANGES = ([2.0, 0.0, -1.0, 0.0], [1.0, 0.0, -4.0, 0.5], [4.0, 1.0, 0.0, 0.0])


@pytest.fixture(scope="module")
def package(environment: Installed, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The environment with the package, and in the user's folder models of one tensor, tasks, a recipe and a spec."""
    source = tmp_path_factory.mktemp("package") / "source"
    shutil.copytree(SOURCE, source, ignore=shutil.ignore_patterns("__pycache__"))
    environment.install(built_wheel(source, source / "dist"))
    folder = environment.project / "plugins"
    folder.mkdir()
    base = torch.arange(12.0).reshape(3, 4)
    models = {"base": base, **{f"e{number}": base + torch.tensor(change) for number, change in enumerate(CHANGES)}}
    for name, weight in models.items():
        (folder / name).mkdir()
        save_file({"weight": weight}, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text('{"model_type": "matrix"}')
    items = [[row.tolist(), label] for label, row in enumerate(base + torch.tensor(CHANGES[0]))]
    for task in ("rows", "others"):
        (folder / f"{task}.json").write_text(json.dumps({"validation": items, "test": items}))
    experts = [str(folder / name) for name in models if name != "base"]
    recipe = {"method": "median", "limit": 0.5, "base": str(folder / "base"), "experts": experts}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    spec = {
        "name": "plugins",
        "base": str(folder / "base"),
        "experts": [{"name": Path(path).name, "source": path, "tasks": ["rows"]} for path in experts],
        "methods": [{"method": "median", "limit": {"grid": [0.25, 1.0]}}, {"method": "noted_sum"}],
        "counts": [2, 3],
        "evaluate": {
            "evaluator": "nearest_row", "path": str(folder), "held_in": {"rows": ["rows"]}, "validation": {"limit": 2},
            "held_out": {"others": ["others"]},
        },
        "output": {"store": str(folder / "store"), "keep": "all"},
    }  # fmt: skip
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    search = {"method": "median", "label": "searched", "search": {"by": "first_only"}}
    more = spec | {"methods": [*spec["methods"], search], "name": "more"}  # type: ignore[misc]
    (folder / "more.yaml").write_text(yaml.safe_dump(more))
    return environment


def test_the_command_lists_the_method_and_its_package(package: Installed) -> None:
    (line,) = [line for line in package.run("mergeloom", "methods").splitlines() if line.startswith("median ")]
    assert line.endswith("median-merge 0.3")
    said = package.run("mergeloom", "methods", "median")
    assert (
        "From the package median-merge 0.3; version 2 of the method." in said and "share of the largest change" in said
    )


def test_a_recipe_names_the_method(package: Installed) -> None:
    package.run("mergeloom", "merge", "plugins/recipe.yaml", "plugins/merged")
    merged = load_file(package.project / "plugins" / "merged" / "model.safetensors")["weight"]
    base = load_file(package.project / "plugins" / "base" / "model.safetensors")["weight"]
    median = torch.tensor(CHANGES).median(0).values
    assert torch.equal(merged, base + median.clamp(-2.0, 2.0)), "half of the largest change, which is 4"


def test_a_recipe_makes_the_product_of_the_package(package: Installed) -> None:
    recipe = yaml.safe_load((package.project / "plugins" / "recipe.yaml").read_text())
    del recipe["limit"]
    (package.project / "plugins" / "noted.yaml").write_text(yaml.safe_dump(recipe | {"method": "noted_sum"}))
    package.run("mergeloom", "merge", "plugins/noted.yaml", "plugins/noted")
    assert json.loads((package.project / "plugins" / "noted" / "note.json").read_text()) == {"tensors": 1}
    assert "It has 1 tensors." in (package.project / "plugins" / "noted" / "README.md").read_text()


def test_a_sweep_in_this_process_and_its_plan(package: Installed) -> None:
    said = package.run("mergeloom", "plan", "plugins/spec.yaml")
    assert "merges by average, median, noted_sum" in said and "3 statistics" in said
    assert "| median " in package.run("mergeloom", "sweep", "plugins/spec.yaml", "--in-process", "--no-track")
    (record,) = [
        json.loads(path.read_text())
        for path in (package.project / "plugins" / "store").rglob("record.json")
        if '"plugin": "median"' in path.read_text() and '"limit": 0.25' in path.read_text()
    ][:1]
    assert re.search(r'"version": 2', json.dumps(record)), "the package's version of the method is in the key"


def test_a_sweep_on_dask_workers_with_a_search_of_the_package(package: Installed, served: Addresses) -> None:
    addresses = {"PREFECT_API_URL": served.prefect, "MLFLOW_TRACKING_URI": served.mlflow}
    said = package.run("mergeloom", "sweep", "plugins/more.yaml", "--workers", "1", more=addresses)
    assert "searched" in said
    rows = package.run(
        "python", "-c", "import mergeloom; print(set(mergeloom.results('plugins/more.yaml')['status'].to_pylist()))"
    )
    assert rows.strip() == "{'done'}"


def test_the_contract_tests_run_on_the_package(package: Installed) -> None:
    (package.project / "plugins" / "tests").mkdir()
    names = ("median", "noted_sum", "noted", "largest_change", "first_only", "nearest_row")
    options = [word for name in names for word in ("--mergeloom-plugin", name)]
    said = package.run("python", "-m", "pytest", "-p", "mergeloom.testing", "-p", "no:cacheprovider", "-q", *options)
    passed = re.search(r"(\d+) passed", said)
    assert passed and int(passed[1]) > 60 and "failed" not in said, said
    said = package.fails("python", "-m", "pytest", "-p", "mergeloom.testing", "--mergeloom-plugin", "medain")
    assert "there is no plug-in 'medain'; did you mean 'median'?" in said


def test_a_second_package_with_the_name_is_an_error_that_names_both(package: Installed, tmp_path: Path) -> None:
    source = tmp_path / "other"
    shutil.copytree(SOURCE, source, ignore=shutil.ignore_patterns("__pycache__"))
    settings = (source / "pyproject.toml").read_text().replace('"median-merge"', '"other-median"')
    settings = settings.replace("median_merge.", "other_median.")
    (source / "pyproject.toml").write_text(settings)
    (source / "median_merge").rename(source / "other_median")
    package.install(built_wheel(source, source / "dist"))
    try:
        said = package.fails("mergeloom", "methods", "median")
        assert "two packages offer a method called 'median': " in said
        assert (
            "median-merge (median_merge.method:Median)" in said and "other-median (other_median.method:Median)" in said
        )
        assert "cannot be used: two packages offer a method called 'median'" in package.run("mergeloom", "methods")
        assert "digest" in package.run("mergeloom", "merge", "recipe.yaml", "unconcerned")
    finally:
        package.run("python", "-m", "pip", "uninstall", "--quiet", "--yes", "other-median")


def test_a_package_that_is_broken_is_named_and_stops_nothing_else(package: Installed) -> None:
    module = package.packages / "median_merge" / "method.py"
    text = module.read_text()
    try:
        module.write_text("import no_such_module\n" + text)
        said = package.fails("mergeloom", "merge", "plugins/recipe.yaml", "plugins/never")
        assert (
            "the method 'median' of the package median-merge 0.3 (median_merge.method:Median) cannot be imported"
            in said
        )
        assert "pip uninstall median-merge" in said and "Traceback" not in said
        assert "digest" in package.run("mergeloom", "merge", "recipe.yaml", "unconcerned-either")
    finally:
        module.write_text(text)
