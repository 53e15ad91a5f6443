"""Everything a person can get wrong: said where and what to do, before a byte is written."""

from __future__ import annotations

import json
import random
import re
import shutil
import struct
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file, save_file

from flows.session import session
from mergecore.checkpoints.architectures import layer_of
from mergecore.checkpoints.fit import check_fit
from mergecore.checkpoints.layout import lay_out
from mergecore.checkpoints.select import SelectRule
from mergecore.errors import MismatchError, SourceError, SpecError
from mergecore.tensors.header import parse_header
from mergecore.tensors.source import TensorInfo
from tests.recipe_files import command, plan_of
from tests.tiny_lm import write_base, write_expert, write_tasks


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, e1, e2 and tasks."""
    folder = tmp_path_factory.mktemp("models")
    base = write_base(folder / "base")
    for number in (1, 2):
        write_expert(base, folder / f"e{number}", number)
    write_tasks(folder / "tasks", items=4)
    return folder


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def recipe(models: Path, **changes: Any) -> dict[str, Any]:
    recipe = {"method": "ties", "base": models / "base", "experts": [models / "e1", models / "e2"], **changes}
    return {key: value for key, value in recipe.items() if value is not None}


def spec(models: Path, **changes: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "name": "tried",
        "base": models / "base",
        "experts": [
            {"name": "a", "source": models / "e1", "tasks": ["tiny_choice"]},
            {"name": "b", "source": models / "e2"},
        ],
        "methods": [{"method": "average"}],
        "counts": [2],
        "evaluate": {"path": models / "tasks", "held_in": {"choices": ["tiny_choice"]}},
        **changes,
    }
    return {key: value for key, value in spec.items() if value is not None}


def refused(result: Result, folder: Path, *said: str) -> None:
    """Exit code, one message that says all of it, no traceback, nothing written."""
    assert result.exit_code == 1, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit), repr(result.exception)
    message = result.output[result.output.index("Error: ") :]
    assert "Traceback" not in message
    assert "pydantic" not in message
    assert len(message.replace(str(folder), "")) < 700, message
    for part in said:
        assert re.search(part, message), f"{part!r} is not in {message!r}"
    left = {path.name for path in folder.iterdir()} - {"recipe.yaml", "spec.yaml", "cache", "spoilt", "blocked"}
    assert not left, f"left behind: {left}"


# --- keys and values ----------------------------------------------------------------------------------------------

RECIPES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown method": ({"method": "tise"}, (r"no method 'tise'", r"did you mean 'ties'\?", r"mergeloom methods")),
    "no such method at all": ({"method": "zzzzzz"}, (r"no method 'zzzzzz'", r"known: .*average, .*ties")),
    "no method": ({"method": None}, (r"recipe\.yaml\.method: must be given",)),
    "misspelt parameter": ({"densty": 0.3}, (r"recipe\.yaml\.densty: unknown key; did you mean 'density'\?",)),
    "misspelt key": ({"dtpye": "float32"}, (r"recipe\.yaml\.dtpye: unknown key; did you mean 'dtype'\?",)),
    "misspelt experts": (
        {"experts": None, "expert": ["x"]},
        (r"recipe\.yaml\.expert: unknown key; did you mean 'experts'\?",),
    ),
    "misspelt key of a drop": (
        {"drop": {"rate": 0.5, "sead": 1}},
        (r"\.drop\.sead: unknown key; did you mean 'seed'\?",),
    ),
    "misspelt key of a source": (
        {"base": {"sorce": "x"}},
        (r"base\.source: must be given", r"base\.sorce: unknown key; did you mean 'source'\?"),
    ),
    "too large": ({"density": 1.5}, (r"density: must be less than or equal to 1 \(given: 1\.5\)",)),
    "too small": ({"density": -0.1}, (r"density: must be greater than or equal to 0",)),
    "not finite": ({"scale": float("nan")}, (r"scale: must be a finite number \(given: nan\)",)),
    "not a number": ({"density": "much"}, (r"density: must be a .*number",)),
    "everything dropped": ({"drop": {"rate": 1.0}}, (r"drop\.rate: must be less than 1",)),
    "not a choice": ({"scope": "globl"}, (r"scope: must be 'global' or 'tensor' \(given: 'globl'\)",)),
    "no such dtype": ({"dtype": "float8"}, (r"dtype: must be 'float32', 'float16' or 'bfloat16'",)),
    "no such size": ({"shard_size": "5 apples"}, (r"shard_size: '5 apples' is no size; write a number and a unit",)),
    "a size beyond all numbers": ({"shard_size": "9" * 400 + "GB"}, (r"shard_size: '9+GB' is no size",)),
    "size without a unit": ({"shard_size": 5}, (r"shard_size: must be a text \(given: 5\)",)),
    "a grid in a recipe": (
        {"density": {"grid": [0.1, 0.2]}},
        (r"density: a grid may stand in the methods of a sweep's spec only; write one value",),
    ),
    "experts no list": ({"experts": "e1"}, (r"recipe\.yaml\.experts: must be a list \(given: 'e1'\)",)),
    "no experts": ({"experts": []}, (r"recipe\.yaml\.experts: at least one expert is needed",)),
    "no base": ({"base": None}, (r"recipe\.base: method 'ties' works on task vectors; give the base",)),
    "base a number": (
        {"base": 3},
        (r"recipe\.yaml\.base: must be a mapping with source, .*, or text \(given: 3\)",),
    ),
    "a drop that is a number": (
        {"drop": 0.5},
        (r"\(ties\)\.drop: must be a mapping with rate, rescale, seed and ids \(given: 0\.5\)$",),
    ),
    "a search in a recipe": (
        {"search": {"by": "greedy"}},
        (r"recipe\.yaml\.search: stands in an entry of a sweep's methods; a recipe makes one model",),
    ),
    "mergekit": ({"merge_method": "ties"}, (r"recipe\.yaml\.method: unknown key",)),
    "a statistic on data": (
        {"method": "fisher"},
        (r"of expert 'e1' on data, and the recipe names none; write `data:`",),
    ),
    "weights of the wrong count": (
        {"method": "average", "weights": [1, 2, 3]},
        (r"weights: 3 given for 2 experts; give one per expert",),
    ),
    "weights all zero": ({"method": "average", "weights": [0, 0]}, (r"weights: all are 0; give at least one",)),
    "a weight below zero": ({"method": "average", "weights": [1, -1]}, (r"weights: they add up to 0",)),
    "select matches nothing": (
        {"select": [{"names": "*.attn.*"}]},
        (r"select: the rule \{'names': '\*\.attn\.\*'\} matches no tensor", r"named like '", r"mergeloom inspect"),
    ),
    "select a layer that is not there": (
        {"select": [{"layers": [7, 9]}]},
        (r"'layers': \(7, 9\)\} matches no tensor",),
    ),
    "select nothing": ({"select": [{"take": "copy"}]}, (r"select leaves no tensor to merge", r"add a rule")),
    "select a layer too many": (
        {"select": [{"layers": [0, 9]}]},
        (r"'layers': \(0, 9\)\} names layers up to 9; the base has layers 0 to 2",),
    ),
    "select layers backwards": (
        {"select": [{"layers": [1, 0]}]},
        (r"select\.0\.layers: \[1, 0\] is no run of layers; give the first and the last, from 0",),
    ),
    "a Boolean for a number": (
        {"density": True},
        (r"density: must be a number, not true or false \(given: True\)",),
    ),
    "Booleans among weights": (
        {"method": "average", "weights": [True, 1]},
        (r"weights: must be a number, not true or false",),
    ),
    "Booleans for layers": (
        {"select": [{"layers": [False, True]}]},
        (r"select\.0\.layers: must be a number, not true or false",),
    ),
    "a number of 400 digits": ({"scale": 10**400}, (r"not a number of 64 bits at most",)),
    "select no expression": (
        {"select": [{"names": "/layers.[0/"}]},
        (r"select\.0\.names: not a regular expression: unterminated",),
    ),
    "select misspelt": ({"select": [{"name": "*"}]}, (r"select\.0\.name: unknown key; did you mean 'names'\?",)),
    "missing folder": ({"base": "nowhere/at/all"}, (r"nowhere/at/all", r"neither an existing folder nor a hub id")),
    "missing absolute folder": ({"base": "/nowhere/all"}, (r"'/nowhere/all' does not exist; the nearest",)),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipes(case: str, models: Path, tmp_path: Path) -> None:
    changes, said = RECIPES[case]
    refused(command(tmp_path, recipe(models, **changes)), tmp_path, *said)


def test_a_folder_that_is_nearly_right(models: Path, tmp_path: Path) -> None:
    result = command(tmp_path, recipe(models, experts=[models / "e11"]))
    refused(result, tmp_path, rf"'{models}/e11' does not exist; did you mean '{models}/e[12]'\?")


def test_the_same_expert_twice(models: Path, tmp_path: Path) -> None:
    refused(
        command(tmp_path, recipe(models, experts=[models / "e1", models / "e1"])),
        tmp_path,
        r"experts: '.*e1' stands there twice; list each checkpoint once",
    )
    (tmp_path / "spoilt").symlink_to(models / "e1")
    refused(
        command(tmp_path, recipe(models, experts=[models / "e1", tmp_path / "spoilt"])),
        tmp_path,
        r"'spoilt' and 'e1' have the same weights; list each checkpoint once",
    )


FILES: dict[str, tuple[str, str]] = {
    "not YAML": ("method: [ties", r"recipe\.yaml, line 1, column \d+: not valid YAML: expected"),
    "tab": ("method:\n\t- ties", r"recipe\.yaml, line 2, column 1: not valid YAML"),
    "empty": ("", r"recipe\.yaml is empty; a spec or recipe is a mapping"),
    "a list": ("- ties", r"recipe\.yaml holds a list; a spec or recipe is a mapping"),
    "a key twice": (
        "method: ties\nbase: a\nbase: b\n",
        r"recipe\.yaml, line 3, column 1: .*the key 'base' stands twice",
    ),
    "a tag": (
        "method: !!python/object/apply:os.system ['true']",
        r"recipe\.yaml, line 1.*could not determine a constr",
    ),
    "a key that is a list": ("? [a, b]\n: c", r"recipe\.yaml, line 1, column 3: not valid YAML: found unhashable key"),
    "deep": ("[" * 5000, r"recipe\.yaml.*not valid YAML"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_no_recipe(case: str, tmp_path: Path) -> None:
    text, said = FILES[case]
    refused(command(tmp_path, text), tmp_path, said)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from flows.cli.main import main

    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00method")
    for path, said in (("recipe.yaml", "cannot be read"), ("recpe.yaml", r"does not exist; there is recipe\.yaml"),
                       (".", "cannot be read")):  # fmt: skip
        refused(CliRunner().invoke(main, ["merge", path, "out"]), tmp_path, said)


SPECS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "misspelt key": ({"outptu": {}}, (r"spec\.yaml\.outptu: unknown key; did you mean 'output'\?",)),
    "misspelt inner key": (
        {"output": {"registr": {"name": "x"}}},
        (r"output\.registr: unknown key; did you mean 'register'\?",),
    ),
    "misspelt innermost key": (
        {"output": {"register": {"nam": "x"}}},
        (r"register\.nam: unknown key; did you mean 'name'\?",),
    ),
    "misspelt setting": (
        {"evaluate": {"held_in": {"c": ["tiny_choice"]}, "limt": 3}},
        (r"evaluate\.limt: unknown key; did you mean 'limit'\?",),
    ),
    "misspelt split": (
        {"evaluate": {"held_in": {"c": ["tiny_choice"]}, "held_uot": {}}},
        (r"evaluate\.held_uot: unknown key; did you mean 'held_out'\?",),
    ),
    "empty grid": (
        {"methods": [{"method": "ties", "density": {"grid": []}}]},
        (r"methods\[0\]\.density: a grid is a list of at least one value",),
    ),
    "grid no list": (
        {"methods": [{"method": "average"}, {"method": "ties", "drop": {"rate": {"grid": 0.3}}}]},
        (r"methods\[1\]\.drop\.rate: a grid is a list", r"\{grid: \[0\.3, 0\.5\]\}"),
    ),
    "grid of letters": (
        {"methods": [{"method": "ties", "scope": {"grid": "global"}}]},
        (r"methods\[0\]\.scope: a grid is a list",),
    ),
    "a value of a grid": (
        {"methods": [{"method": "ties", "density": {"grid": [0.5, 5]}}]},
        (r"methods\[0\] \(ties\)\.density: must be less than or equal to 1 \(given: 5\)",),
    ),
    "method a word": ({"methods": ["ties"]}, (r"methods\.0: must be a mapping of keys \(given: 'ties'\)",)),
    "method not named": (
        {"methods": [{"density": 0.2}]},
        (r"methods\[0\]\.method: must be given; known: .*average",),
    ),
    "unknown method": ({"methods": [{"method": "darre"}]}, (r"methods\[0\]: there is no method 'darre'",)),
    "more than the pool": ({"counts": [2, 5]}, (r"counts: 5 experts are asked for, the pool has 2",)),
    "count zero": ({"counts": [0]}, (r"counts\.0: must be greater than or equal to 1",)),
    "a method's count beyond the pool": (
        {"methods": [{"method": "average"}, {"method": "slerp", "t": 0.5, "counts": [3]}]},
        (r"methods\[1\]\.counts: 3 experts are asked for, the pool has 2",),
    ),
    "a method's count no list": (
        {"methods": [{"method": "slerp", "t": 0.5, "counts": 2}]},
        (r"methods\[0\]\.counts: a list of numbers of experts is meant, as in counts: \[2\] \(given: 2\)",),
    ),
    "a method's counts misspelt": (
        {"methods": [{"method": "slerp", "t": 0.5, "count": [2]}]},
        (r"methods\[0\] \(slerp\)\.count: unknown key; did you mean 'counts'\?",),
    ),
    "no counts": ({"counts": []}, (r"counts: at least one number of experts is needed, as in counts: \[2\]",)),
    "no experts": ({"experts": []}, (r"experts: at least one expert is needed",)),
    "a task nobody measures": (
        {"evaluate": {"held_in": {"c": ["tiny_write"]}}},
        (r"experts\.a: its task 'tiny_choice' stands in no category of evaluate\.held_in",),
    ),
    "no such task": (
        {"held": ["tiny_choice", "tiny_choise"]},
        (r"no task 'tiny_choise'", r"did you mean 'tiny_choice'"),
    ),
    "nothing to measure": (
        {"evaluate": {"held_in": {}}, "bare": True},
        (r"no task stands in held_in or held_out; a sweep needs something to measure",),
    ),
    "no such evaluator": (
        {"evaluate": {"evaluator": "lm_evl", "held_in": {"c": ["tiny_choice"]}}},
        (r"evaluate: there is no evaluator 'lm_evl'; did you mean 'lm_eval'\?",),
    ),
    "millions of cells": (
        {
            "methods": [
                {
                    "method": "ties",
                    **{key: {"grid": [n / 1000 for n in range(1, 1000)]} for key in ("density", "scale")},
                }
            ]
        },
        (
            r"methods\[0\]: this entry alone comes to 998,001 cells .*run\.most_cells is 100,000; write fewer .*or raise it",
        ),
    ),
    "grids in rules": (
        {"select": [{"names": "*", "density": {"grid": list(range(1000))}}] * 4},
        (r"methods\[0\]: this entry alone comes to 1,000,000,000,000 cells",),
    ),
    "subsets without end": ({"subsets": {"per_count": 10**12}}, (r"comes to 1,000,000,000,000 cells",)),
    "a search of millions": (
        {
            "methods": [
                {
                    "method": "ties",
                    "search": {
                        "by": "grid",
                        "over": [{"parameter": key, "values": list(range(1, 1000))} for key in ("density", "scale")],
                    },
                }
            ],
            "evaluate": {"held_in": {"c": ["tiny_choice"]}, "validation": {}},
        },
        (r"search \(grid\)\.over: 998,001 combinations, more than 10,000: list fewer values",),
    ),
    "a Boolean for a count": ({"counts": [True]}, (r"spec\.yaml\.counts: must be a number, not true or false",)),
    "name with a slash": ({"name": "a/b"}, (r"spec\.yaml\.name: ",)),
    "a grid for an entry": (
        {"methods": [{"grid": [1, 2]}]},
        (r"methods\[0\]: must be a mapping with a method and its values \(given: 1\)",),
    ),
    "a million workers": ({"run": {"workers": 10**6}}, (r"run\.workers: must be less than or equal to 4096",)),
    "memory": ({"run": {"memory": "8 gigs"}}, (r"run\.memory: '8 gigs' is no size; write a number and a unit",)),
    "little memory": ({"run": {"memory": "1kB"}}, (r"needs .* of memory .* may use 1.0 kB .* too few", r"run\.memory")),
    "little disk": (
        {"run": {"disk": "1kB"}},
        (r"one pass \(merge: 1 model of 2 experts.*\) takes .* free space", r"output\.store"),
    ),
}


@pytest.mark.parametrize("case", SPECS)
def test_specs(case: str, models: Path, tmp_path: Path) -> None:
    changes, said = SPECS[case]
    changes = dict(changes)
    if tasks := changes.pop("held", None):
        changes["evaluate"] = {"path": models / "tasks", "held_in": {"choices": tasks}}
    if changes.pop("bare", False):
        changes["experts"] = [models / "e1", models / "e2"]
    refused(plan_of(tmp_path, spec(models, **changes)), tmp_path, *said)


def test_two_experts_of_one_name(models: Path, tmp_path: Path) -> None:
    (tmp_path / "spoilt/e1").mkdir(parents=True)
    result = plan_of(tmp_path, spec(models, experts=[models / "e1", tmp_path / "spoilt/e1"]))
    refused(result, tmp_path, r"two experts are called 'e1'; give each its own name")


def test_a_cell_that_cannot_be_is_refused_and_the_others_stay(models: Path, tmp_path: Path) -> None:
    methods = [{"method": "average", "weights": [1, 2]}, {"method": "task_arithmetic", "scale": 0.5}]
    result = plan_of(tmp_path, spec(models, methods=methods, counts=[1, 2]))
    assert result.exit_code == 0
    assert re.search(
        r"refused: average\(weights=\[1, 2\]\) n1 s0: weights: 2 given for 1 experts; give one", result.output
    )


@pytest.mark.parametrize("where", ["below a file", "a file"])
def test_a_store_that_cannot_be_written(where: str, models: Path, tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("a file")
    store = tmp_path / "blocked" / ("store" if where == "below a file" else "")
    result = plan_of(tmp_path, spec(models, output={"store": str(store)}))
    refused(result, tmp_path, r"the store .*blocked.* cannot be written", r"choose another with `output\.store`")
    assert (tmp_path / "blocked").read_text() == "a file"


def test_an_out_that_cannot_be_written(models: Path, tmp_path: Path) -> None:
    (tmp_path / "blocked").write_text("a file")
    for out in ("blocked/out", "x" * 253):
        refused(
            command(tmp_path, recipe(models), out=out), tmp_path, r"cannot write .*(Not a directory|File name too long)"
        )


def test_timings_that_cannot_be_written_are_said_before_the_merge(models: Path, tmp_path: Path) -> None:
    for path in ("nowhere/timings.json", ".", "/proc/timings.json", "recipe.yaml/timings.json"):
        result = command(tmp_path, recipe(models), "--timings", path)
        assert result.exit_code == 2 and f"--timings: {path} cannot be written (" in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "cache"}


@pytest.mark.parametrize("source", ["x" * 5000, "a/" * 3000, "/" + "x" * 300, "~nobody-of-this-name/model", "a\0b"])
def test_paths_that_no_folder_can_have(source: str, models: Path, tmp_path: Path) -> None:
    refused(
        command(tmp_path, recipe(models, base=source)), tmp_path, r"cannot be the name of a folder or of a model \("
    )


def test_arguments_that_are_no_text(models: Path, tmp_path: Path) -> None:
    result = command(tmp_path, recipe(models), out="out-\udcff")
    assert result.exit_code == 2 and "is not UTF-8; rename the file or folder" in result.output
    text = 'method: average\nexperts: ["a\\ud800"]\n'
    refused(command(tmp_path, text), tmp_path, r"line 2, column \d+: not valid YAML: a text that is no Unicode")


def test_plan_writes_nothing(models: Path, tmp_path: Path) -> None:
    result = plan_of(tmp_path, spec(models, output={"store": "store"}))
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "spec.yaml"]


@pytest.mark.parametrize("able", [True, False])
def test_a_dtype_that_this_processor_is_slow_at_is_said(
    able: bool, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "lacks_arithmetic", lambda dtype: dtype == "bfloat16" and not able)
    for dtype, slow in (("bfloat16", not able), ("float32", False)):
        evaluate = {"path": models / "tasks", "held_in": {"choices": ["tiny_choice"]}, "dtype": dtype}
        result = plan_of(tmp_path, spec(models, evaluate=evaluate))
        assert ("note: this processor has no instructions for bfloat16" in result.output) is slow


# --- checkpoints that do not fit or cannot be read ----------------------------------------------------------------


def spoilt(models: Path, folder: Path, change: Callable[[Path], None]) -> Path:
    """A copy of the second expert after `change`."""
    shutil.rmtree(folder / "spoilt", ignore_errors=True)
    path = shutil.copytree(models / "e2", folder / "spoilt")
    change(path)
    return path


def edited(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        document = json.loads((path / name).read_text())
        (path / name).write_text(json.dumps(change(document)))

    return edit


def retensored(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        change(tensors)
        save_file({name: value.contiguous() for name, value in tensors.items()}, path / "model.safetensors")

    return edit


def reheadered(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Another header over the same data."""

    def edit(path: Path) -> None:
        content = (path / "model.safetensors").read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        changed = change(header)
        text = json.dumps(header if changed is None else changed).encode()
        (path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return edit


def rewritten(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda path: (path / name).write_bytes(content) and None


def cut(size: int) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").write_bytes(content[:size])

    return edit


def indexed(weight_map: Any) -> Callable[[Path], None]:
    return lambda path: (path / "model.safetensors.index.json").write_text(json.dumps(weight_map)) and None


NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"
SPOILT: dict[str, tuple[Callable[[Path], None], tuple[str, ...]]] = {
    "another family": (
        edited("config.json", lambda config: {**config, "model_type": "gpt2"}),
        (r"expert 'spoilt'.* has model_type gpt2, the base has llama: they are no versions of one model",),
    ),
    "another width": (
        edited("config.json", lambda config: {**config, "hidden_size": 128}),
        (r"hidden_size 128, the base has 64",),
    ),
    "a tensor less": (
        retensored(lambda tensors: tensors.pop(NORM)),
        (
            r"'spoilt'.*architecture: it lacks 'model\.norm\.weight'; the checkpoint is not complete, or of another model",
        ),
    ),
    "a tensor of a layer less": (
        retensored(lambda tensors: tensors.pop("model.layers.0.self_attn.q_proj.weight")),
        (r"it lacks '.*q_proj\.weight'; the checkpoint is not complete, or of another model: fetch or save it again",),
    ),
    "a tensor more": (
        retensored(lambda tensors: tensors.update({"model.extra": tensors[NORM].clone()})),
        (r"it has 'model\.extra', unknown to the base; a task's head may be left out",),
    ),
    "another shape": (
        retensored(lambda tensors: tensors.update({NORM: tensors[NORM][:-1]})),
        (r"'model\.norm\.weight' has shape \[63\], in the base \[64\]",),
    ),
    "another vocabulary": (
        retensored(lambda tensors: tensors.update({EMBED: tensors[EMBED][:-3]})),
        (r"embed_tokens\.weight' has shape \[317, 64\], in the base \[320, 64\]; the vocabularies differ",),
    ),
    "another tokenizer": (
        edited("tokenizer.json", lambda config: {**config, "added_tokens": [{**config["added_tokens"][0], "id": 5}]}),
        (r"its tokenizer gives \d+ tokens other ids .*first: '.*only experts that share the base's vocabulary",),
    ),
    "a tokenizer that is none": (
        rewritten("tokenizer.json", b'{"model": []}'),
        (r"(?s)tokenizer|its tokenizer gives",),
    ),
    "a tokenizer of nonsense": (
        rewritten("tokenizer.json", b'{"model": {"vocab": [3]}}'),
        (r"spoilt/tokenizer\.json is no tokenizer that can be read .*fetch it again",),
    ),
    "config too deep": (rewritten("config.json", b"[" * 100_000), (r"spoilt/config\.json is not JSON: .*too deep",)),
    "config in UTF-16": (
        rewritten("config.json", "{}".encode("utf-16")),
        (r"spoilt/config\.json is not JSON: .*utf-8",),
    ),
    "config of a giant number": (
        rewritten("config.json", b'{"hidden_size": ' + b"9" * 5000 + b"}"),
        (r"spoilt/config\.json is not JSON: Exceeds the limit",),
    ),
    "config no JSON": (rewritten("config.json", b"{"), (r"spoilt/config\.json is not JSON",)),
    "config a list": (rewritten("config.json", b"[]"), (r"spoilt/config\.json holds list, not an object",)),
    "integers for floats": (
        retensored(lambda tensors: tensors.update({NORM: tensors[NORM].to(torch.int8)})),
        (r"'model\.norm\.weight' has dtype I8, in the base F32: quantized .*give the checkpoint before",),
    ),
    "quantized": (
        edited("config.json", lambda config: {**config, "quantization_config": {"quant_method": "fp8"}}),
        (r"'spoilt'.*is quantized \(fp8\).*give the checkpoint before it was quantized",),
    ),
    "cut in the data": (cut(100_000), (r"spoilt/model\.safetensors is truncated: tensor '.*fetch it again",)),
    "cut in the header": (cut(500), (r"spoilt/model\.safetensors is no safetensors file, or is truncated",)),
    "a few bytes": (cut(5), (r"spoilt/model\.safetensors has 5 bytes: not a safetensors file; fetch",)),
    "empty file": (cut(0), (r"spoilt/model\.safetensors has 0 bytes",)),
    "not safetensors": (rewritten("model.safetensors", b"PK\x03\x04" * 100), (r"no safetensors file.*fetch it again",)),
    "header no JSON": (
        rewritten("model.safetensors", (9).to_bytes(8, "little") + b"not JSON!"),
        (r"header that cannot be read .*fetch or write it again",),
    ),
    "header a list": (reheadered(lambda header: [1]), (r"header that cannot be read .*fetch or write it again",)),
    "header without offsets": (
        reheadered(lambda header: header[NORM].pop("data_offsets") and None),
        (r"header that cannot be read \(tensor 'model\.norm\.weight' has no 'data_offsets'\)",),
    ),
    "header with another length": (
        reheadered(lambda header: header[NORM].update(shape=[65])),
        (r"'model\.norm\.weight' has 256 bytes for shape \[65\] of F32",),
    ),
    "header beyond the file": (
        reheadered(lambda header: header[NORM].update(data_offsets=[10**9, 10**9 + 256])),
        (r"is truncated: tensor 'model\.norm\.weight' ends after",),
    ),
    "header before the file": (
        reheadered(lambda header: header[NORM].update(data_offsets=[-300, -44])),
        (r"header that cannot be read \(tensor 'model\.norm\.weight' has data_offsets \[-300, -44\]: whole numbers",),
    ),
    "header of negative sizes": (
        reheadered(lambda header: header[NORM].update(shape=[-8, -8])),
        (r"'model\.norm\.weight' has shape \[-8, -8\]: whole numbers from 0 on",),
    ),
    "header too deep": (
        rewritten("model.safetensors", (200_000).to_bytes(8, "little") + b"[" * 200_000),
        (r"header that cannot be read",),
    ),
    "a dtype torch cannot hold": (
        reheadered(lambda header: header[NORM].update(dtype="F4")),
        (r"'model\.norm\.weight' has dtype F4, which cannot be read; give the checkpoint in float32",),
    ),
    "index of a missing shard": (
        indexed({"weight_map": {NORM: "model-00001-of-00002.safetensors", EMBED: "model.safetensors"}}),
        (r"index\.json names model-00001-of-00002\.safetensors; 1 of 2 shards are there.*fetch it again",),
    ),
    "index without a map": (indexed({}), (r"index\.json is not an index: .*'weight_map'.*fetch it again",)),
    "pickled weights": (
        lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin") and None,
        (r"holds no safetensors weights\. It holds pytorch_model\.bin.*Convert: .*save_pretrained",),
    ),
    "nothing": (lambda path: [file.unlink() for file in path.iterdir()] and None, (r"no safetensors.*this is empty",)),
}


@pytest.mark.parametrize("case", SPOILT)
def test_spoilt_experts(case: str, models: Path, tmp_path: Path) -> None:
    change, said = SPOILT[case]
    expert = spoilt(models, tmp_path, change)
    refused(command(tmp_path, recipe(models, experts=[models / "e1", expert])), tmp_path, *said)
    asked = [{"name": "a", "source": models / "e1", "tasks": ["tiny_choice"]}, {"name": "spoilt", "source": expert}]
    refused(plan_of(tmp_path, spec(models, experts=asked)), tmp_path, *said)


def test_a_tensor_in_two_files(models: Path, tmp_path: Path) -> None:
    def twice(path: Path) -> None:
        tensors = load_file(path / "model.safetensors")
        save_file(tensors, path / "a.safetensors")
        save_file({NORM: tensors[NORM]}, path / "b.safetensors")
        (path / "model.safetensors").unlink()

    expert = spoilt(models, tmp_path, twice)
    result = command(tmp_path, recipe(models, experts=[expert]))
    refused(result, tmp_path, r"tensor 'model\.norm\.weight' stands in a\.safetensors and in b\.safetensors")


def test_a_file_instead_of_a_folder(models: Path, tmp_path: Path) -> None:
    result = command(tmp_path, recipe(models, experts=[models / "e1/model.safetensors"]))
    refused(result, tmp_path, rf"is a file; give the folder that holds the checkpoint: '{models}/e1'")


def test_a_revision_of_a_folder(models: Path, tmp_path: Path) -> None:
    result = command(tmp_path, recipe(models, base=f"{models}/base@main"))
    refused(result, tmp_path, r"is a local folder and has no revision: leave it out")


def test_any_bytes_are_a_header_or_an_error() -> None:
    """Whatever stands in a file, reading its header gives tensors inside the file or a SourceError, never more."""
    draw = random.Random(0)
    good = {"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, "__metadata__": {"format": "pt"}}
    odd: list[Any] = [None, -1, 2**63, 1.5, "x", [], {}, [1], True, "F32", "F64", [2**40, 2**40], [0, -0], [24, 0]]
    passed = 0
    for _ in range(3000):
        header = json.loads(json.dumps(good))
        for _ in range(draw.randint(0, 2)):
            target = draw.choice([header, header.get("w")])
            if isinstance(target, dict):
                target[draw.choice(["w", "dtype", "shape", "data_offsets", "__metadata__", "v"])] = draw.choice(odd)
        text = bytearray(json.dumps(header).encode())
        if draw.random() < 0.3:
            text[draw.randrange(len(text))] = draw.randrange(256)
        length = len(text) if draw.random() < 0.9 else draw.choice([0, 1, 2**40, 2**64 - 1, len(text) + 30])
        content = struct.pack("<Q", length) + bytes(text) + b"\0" * draw.choice([24, 24, 24, 23, 0, 100])
        try:
            parsed = parse_header(lambda start, size: content[start : start + size], len(content), "file")
        except SourceError as error:
            assert str(error).startswith("file")
            continue
        passed += 1
        for info, offset in parsed.values():
            assert offset >= 8
            assert all(size >= 0 for size in info.shape)
            assert offset + info.count * {"F32": 4, "F64": 8}.get(info.dtype, 1) <= len(content)
    assert 300 < passed < 3000


# --- select -------------------------------------------------------------------------------------------------------


def names_of(draw: random.Random) -> list[str]:
    """Tensor names of a made-up model."""
    parts = ["attn.q.weight", "attn.k.weight", "mlp.up.weight", "mlp.down.bias", "norm.weight"]
    stem = draw.choice(["model.layers", "transformer.h", "encoder.layer", "visual.blocks"])
    inner = [f"{stem}.{layer}.{part}" for layer in range(draw.randint(1, 12)) for part in parts]
    return [*inner, "embed.weight", "head.weight", "final_norm.weight"]


def rules_of(draw: random.Random) -> list[SelectRule]:
    patterns = ["*", "*attn*", "*.weight", "/attn\\.[qk]/", "/^embed|head/", "*norm*", "/bias$/", "*.[0-3].*", "/./"]
    rules = []
    for _ in range(draw.randint(1, 4)):
        first = draw.randint(0, 6)
        layers = (first, first + draw.randint(0, 4)) if draw.random() < 0.4 else None
        take = draw.choice(["merge", "merge", "copy"])
        rules.append(SelectRule(names=draw.choice(patterns), layers=layers, take=take))  # type: ignore[arg-type]
    return rules


def decided(name: str, rules: Sequence[SelectRule]) -> str:
    """What the page says of rules, written a second time: the first that speaks of the tensor decides, else copy."""
    for rule in rules:
        if rule.layers is not None:
            number = re.search(r"\.(\d+)\.", name)
            if number is None or int(number[1]) not in range(rule.layers[0], rule.layers[1] + 1):
                continue
        if rule.names[0] == "/" and rule.names != "/":
            if re.search(rule.names.strip("/"), name):
                return rule.take
        elif fnmatchcase(name, rule.names):
            return rule.take
    return "copy"


def test_select_rules_hold_for_any_model() -> None:
    draw = random.Random(1)
    merged_somewhere = refused_somewhere = 0
    for _ in range(400):
        names, rules = names_of(draw), rules_of(draw)
        base = {name: TensorInfo(draw.choice(["F32", "BF16", "F16", "F64", "I64"]), (2,)) for name in names}
        deepest = 1 + max(int(number[1]) for name in names if (number := re.search(r"\.(\d+)\.", name)))
        carried = [draw.sample(names, draw.randint(1, len(names))) for _ in range(2)]
        wanted = {
            name
            for name, info in base.items()
            if decided(name, rules) == "merge" and info.dtype != "I64" and any(name in names for names in carried)
        }
        silent_rules = [
            rule
            for rule in rules
            if not any(decided(name, [rule]) == rule.take and rule.matches(name) for name in names)
        ]
        try:
            layout = lay_out(base, {}, carried, rules)
        except SpecError as error:
            refused_somewhere += 1
            beyond = [rule for rule in rules if rule.layers is not None and rule.layers[1] >= deepest]
            assert silent_rules or beyond or not wanted, error
            continue
        merged_somewhere += 1
        assert set(layout.merged) == wanted
        assert set(layout.copied) == set(base) - wanted
        assert list(layout.merged) == sorted(layout.merged)
        assert not layout.dropped
    assert merged_somewhere > 50
    assert refused_somewhere > 20


def test_without_rules_all_that_floats_and_is_carried_is_merged() -> None:
    draw = random.Random(2)
    for _ in range(50):
        names = names_of(draw)
        base = {name: TensorInfo(draw.choice(["F32", "U8", "BOOL"]), ()) for name in names}
        carried = draw.sample(names, len(names) // 2)
        wanted = {name for name in carried if base[name].dtype == "F32"}
        if wanted:
            assert set(lay_out(base, {}, [carried]).merged) == wanted


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.3.mlp.up_proj.weight", 3),
        ("transformer.h.11.attn.c_attn.weight", 11),
        ("bert.encoder.layer.2.output.dense.bias", 2),
        ("encoder.block.4.layer.1.DenseReluDense.wi.weight", 4),
        ("vit.encoder.layer.0.attention.attention.query.weight", 0),
        ("visual.transformer.resblocks.7.ln_1.weight", 7),
        ("model.layers.5.block_sparse_moe.experts.3.w1.weight", 5),
        ("model.embed_tokens.weight", None),
        ("lm_head.weight", None),
        ("model.norm.weight", None),
    ],
)
def test_layers_as_families_number_them(name: str, layer: int | None) -> None:
    assert layer_of(name) == layer


def test_tied_weights_count_once() -> None:
    base = {name: TensorInfo("F32", (4, 2)) for name in ("model.embed_tokens.weight", "lm_head.weight", "w")}
    tied = lay_out(base, {"tie_word_embeddings": True}, [base])
    assert set(tied.merged) == {"model.embed_tokens.weight", "w"}
    assert tied.dropped == {"lm_head.weight": "tied to 'model.embed_tokens.weight'"}
    assert set(lay_out(base, {}, [base]).merged) == set(base)
    without_head = {name: info for name, info in base.items() if name != "lm_head.weight"}
    check_fit(without_head, base, "expert", {"tie_word_embeddings": True})
    check_fit(base, without_head, "expert", {"tie_word_embeddings": True})
    with pytest.raises(MismatchError, match="lacks 'lm_head"):
        check_fit(base, without_head, "expert", {"tie_word_embeddings": False})


def test_codes_of_a_quantization_are_no_weights() -> None:
    """Without a word in the config: most matrices are fp8 or int8, and only norms could be merged."""
    norm = TensorInfo("BF16", (4,))
    for dtype in ("F8_E4M3", "I8", "I32"):
        base = {"a.weight": TensorInfo(dtype, (4, 4)), "b.weight": TensorInfo(dtype, (4, 4)), "norm.weight": norm}
        base["embed.weight"] = TensorInfo("BF16", (8, 4))
        with pytest.raises(
            MismatchError, match=rf"2 of 3 matrices that should be merged are {dtype} \('a\.weight', …\)"
        ):
            lay_out(base, {}, [base])
        with pytest.raises(MismatchError, match=r"1 of 1 matrices that should be merged are"):
            lay_out(base, {}, [["a.weight"]])
        rules = [SelectRule(names="[ab].weight", take="copy"), SelectRule()]
        assert set(lay_out(base, {}, [base], rules).merged) == {"embed.weight", "norm.weight"}
    few = {"a.weight": TensorInfo("BF16", (4, 4)), "position_ids": TensorInfo("I64", (1, 8)), "norm.weight": norm}
    assert set(lay_out(few, {}, [few]).merged) == {"a.weight", "norm.weight"}


def test_a_checkpoint_in_the_place_of_an_adapter(models: Path, tmp_path: Path) -> None:
    document: dict[str, Any] = {"merge_method": "linear", "dtype": "float32"}
    document["models"] = [{"model": f"{models}/base+{models}/e1", "parameters": {"weight": 1}}]
    result = command(tmp_path, document)
    refused(
        result, tmp_path, r"base\+.*e1': '.*e1' is a full checkpoint, and behind a '\+' stands a LoRA adapter; list it"
    )
    document["models"][0]["parameters"] = {"weight": True}
    document["models"][0]["model"] = str(models / "e1")
    refused(command(tmp_path, document), tmp_path, r"models\[0\]\.parameters\.weight: must be a number \(given: True\)")
