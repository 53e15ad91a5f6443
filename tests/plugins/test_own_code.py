"""A user's own code: in the keys by content, with what it imports from the spec's folder; imported anew when changed."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from flows.session.session import open_session
from mergecore.errors import PluginError, SpecError
from mergecore.evaluators.classification import SPLITS, Classification
from mergecore.evaluators.lm_eval import LmEval
from mergecore.execution.scoring import Bench, resident
from mergecore.plugins.own_code import OwnCode, code_of, put_on_path
from mergecore.sweeps.measured import collect

NETWORK = """
import torch
from my_layers import WIDTH

def make(config):
    return torch.nn.Linear(WIDTH, 2)
"""


@pytest.fixture(autouse=True)
def clean_path() -> Iterator[None]:
    before = set(sys.modules)
    yield
    put_on_path(None)
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


def write(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text))
    return folder


def code(folder: Path, factory: str = "my_net:make", version: Any = None) -> OwnCode:
    evaluator = Classification(model=factory)
    return code_of(type(evaluator), evaluator.factories, folder, version)


def test_what_is_imported_from_the_folder_is_in_the_key(tmp_path: Path) -> None:
    files = {
        "my_net.py": "def make(config):\n    from my_package.deep import inner\n    return inner\n",
        "my_package/__init__.py": "",
        "my_package/deep/__init__.py": "from . import inner\nfrom ..beside import x\n",
        "my_package/deep/inner.py": "import my_other, json, torch, mergecore.errors\n",
        "my_package/beside.py": "x = 1\n",
        "my_package/alone.py": "nobody imports this\n",
        "my_other.py": "def broken(\n",
        "json.py": "the library's is the one that is imported\n",
        ".venv/lib/site-packages/my_library.py": "",
    }
    write(tmp_path, files)
    assert list(code(tmp_path).files) == [
        "my_net",
        "my_other",
        "my_package",
        "my_package.beside",
        "my_package.deep",
        "my_package.deep.inner",
    ]
    for name in files:
        before = code(tmp_path).identity
        (tmp_path / name).write_text((tmp_path / name).read_text() + "\n# changed\n")
        reached = name not in ("my_package/alone.py", "json.py", ".venv/lib/site-packages/my_library.py")
        assert (code(tmp_path).identity != before) == reached, name
    assert str(tmp_path) not in str(code(tmp_path).identity)


def test_our_own_evaluators_add_nothing_to_keys(tmp_path: Path) -> None:
    write(tmp_path, {"Say.py": "", "my_net.py": ""})
    evaluator = LmEval(system_instruction="Say:yes")
    assert code_of(LmEval, evaluator.factories, tmp_path, None).identity == {}
    assert code_of(Classification, (), tmp_path, None).identity == {}


def test_a_version_takes_the_place_of_the_content(tmp_path: Path) -> None:
    write(tmp_path, {"my_net.py": NETWORK, "my_layers.py": "WIDTH = 3\n"})
    first = code(tmp_path, version="2026-a")
    (tmp_path / "my_layers.py").write_text("WIDTH = 3  # a remark\n")
    assert code(tmp_path, version="2026-a").identity == first.identity == {"code": {"version": "2026-a"}}
    assert code(tmp_path, version="2026-b").identity != first.identity
    first.ready()  # whoever says a version answers for the content


def test_a_changed_module_is_imported_anew(tmp_path: Path) -> None:
    companions = write(tmp_path / "model", {"config.json": "{}"})
    home = write(tmp_path / "spec", {"my_net.py": NETWORK, "my_layers.py": "WIDTH = 3\n"})
    elsewhere = write(tmp_path / "other", {"my_net.py": NETWORK, "my_layers.py": "WIDTH = 7\n"})

    def width(folder: Path) -> int:
        bench = Bench(tmp_path, Classification(model="my_net:make"), None, code=code(folder))
        return int(resident(bench, companions, "x").model.in_features)  # type: ignore[arg-type]

    assert width(home) == 3
    (home / "my_layers.py").write_text("WIDTH = 5\n")
    assert width(home) == 5
    assert width(elsewhere) == 7 and str(home) not in sys.path


def test_code_that_changed_since_the_plan_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {"my_net.py": NETWORK, "my_layers.py": "WIDTH = 3\n"})
    planned = code(tmp_path)
    (tmp_path / "my_layers.py").write_text("WIDTH = 4\n")
    with pytest.raises(PluginError, match="the code of 'my_layers' is not what it was when the sweep was planned"):
        planned.ready()


def test_an_evaluator_that_was_imported_before_it_changed_is_refused(tmp_path: Path) -> None:
    """Its class is in use already, so that it cannot be imported anew."""
    text = "from mergecore.evaluators.classification import Classification\nclass Mine:\n    pass\n"
    write(tmp_path, {"my_evaluator.py": text})
    put_on_path(tmp_path)
    from my_evaluator import Mine  # type: ignore[import-not-found]

    assert list(code_of(Mine, (), tmp_path, None).files) == ["my_evaluator"]
    (tmp_path / "my_evaluator.py").write_text(text + "# changed\n")
    with pytest.raises(PluginError, match="'my_evaluator' changed after this process had imported it"):
        code_of(Mine, (), tmp_path, None)


def written_spec(folder: Path, evaluate: Mapping[str, Any]) -> Path:
    """A spec with two experts, its task and its factory `my_net` beside it."""
    for name, seed in (("base", 0), ("one", 1), ("two", 2)):
        (folder / name).mkdir(parents=True)
        draw = torch.Generator().manual_seed(seed)
        tensors = {"weight": torch.randn(2, 3, generator=draw), "bias": torch.zeros(2)}
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text("{}")
    arrays = {f"{split}.inputs": np.ones((4, 3), np.float32) * place for place, split in enumerate(SPLITS.values())}
    labels = {f"{split}.labels": np.zeros(4, np.int64) for split in SPLITS.values()}
    np.savez(folder / "task.npz", **arrays, **labels)
    write(folder, {"my_net.py": NETWORK, "my_layers.py": "WIDTH = 3\n"})
    spec = {
        "name": "own",
        "base": str(folder / "base"),
        "experts": [{"name": name, "source": str(folder / name), "tasks": ["task"]} for name in ("one", "two")],
        "methods": [{"method": "average"}, {"method": "fisher"}],
        "counts": [2],
        "evaluate": {
            "evaluator": "classification",
            "model": "my_net:make",
            "path": str(folder),
            "held_in": {"all": ["task"]},
            **evaluate,
        },
        "output": {"store": str(folder / "store")},
    }
    (folder / "spec.yaml").write_text(yaml.safe_dump(spec))
    return folder / "spec.yaml"


def keys(spec: Path) -> dict[str, str]:
    """What is done by the spec → its key."""
    plan = open_session(spec).plan
    scores = {f"score of {cell.name}": plan.evaluation(cell, "test", "task").key for cell in plan.cells}
    merges = {cell.name: cell.model.key for cell in plan.cells if cell.merge is not None}
    return scores | merges


def test_scores_and_statistics_follow_the_code_and_merges_do_not(tmp_path: Path) -> None:
    spec = written_spec(tmp_path / "spec", {})
    before = keys(spec)  # the factory beside the spec was imported, from another folder than its own
    assert keys(spec) == before
    (spec.parent / "my_layers.py").write_text("WIDTH = 1 + 2\n")
    after = keys(spec)
    same = {name for name in before if after[name] == before[name]}
    assert same == {"average n2 s0"}  # Fisher's statistic runs the model
    assert keys(written_spec(tmp_path / "elsewhere", {})) == before


def test_chance_of_a_strange_task_is_refused_and_no_key_depends_on_chance(tmp_path: Path) -> None:
    spec = written_spec(tmp_path / "with", {"chance": {"task": 0.5}})
    assert keys(spec) == keys(written_spec(tmp_path / "without", {}))
    assert collect(open_session(spec).frontier).chance == {"task": 0.5}
    with pytest.raises(SpecError, match=r"chance: 'tusk' is no task here; did you mean 'task'"):
        open_session(written_spec(tmp_path / "strange", {"chance": {"tusk": 0.5}}))


def test_a_version_in_the_spec_keeps_scores(tmp_path: Path) -> None:
    spec = written_spec(tmp_path, {"version": 1})
    before = keys(spec)
    (spec.parent / "my_layers.py").write_text("WIDTH = 1 + 2\n")
    assert keys(spec) == before
    spec.write_text(spec.read_text().replace("version: 1", "version: 2"))
    assert all(keys(spec)[name] != before[name] for name in before if name.startswith("score"))
