"""What every plug-in promises, of whatever kind."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from mergecore.plugins.plugin import Plugin
from mergeloom.testing.variants import asked_for, plugins


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Try every plug-in that was asked for; what is asked of parameters not of products, which have none."""
    kinds = {f"{sort}-{name}": kind for name in asked_for(metafunc.config) for sort, kind in plugins(name).items()}
    for argument in {"anything", "kind"} & set(metafunc.fixturenames):
        tried = {label: kind for label, kind in kinds.items() if argument == "anything" or issubclass(kind, Plugin)}
        metafunc.parametrize(argument, tried.values(), ids=tried.keys())


def test_a_foreign_plugin_says_its_version(kind: type[Plugin]) -> None:
    """Results are kept under name and version; without a number in the class nobody remembers to raise it."""
    declared = [owner for owner in kind.__mro__ if "version" in vars(owner)]
    ours = kind.__module__.partition(".")[0] == "mergecore"
    assert ours or declared[0] is kind, (
        f"{kind.__qualname__} has no version of its own; write `version: ClassVar[int] = 1` into the class, and raise "
        "it "
        "whenever its numbers change"
    )


def test_it_says_what_it_does(kind: type[Plugin]) -> None:
    assert (kind.__doc__ or "").strip(), (
        f"{kind.__qualname__} has no docstring; `mergeloom methods` shows its first line"
    )


def test_parameters_survive_json_and_pickle(kind: type[Plugin]) -> None:
    plugin = _with_defaults(kind)
    assert kind.model_validate(json.loads(json.dumps(plugin.parameters()))) == plugin
    assert pickle.loads(pickle.dumps(plugin)) == plugin, "workers are handed plug-ins by pickle"


def test_unknown_parameters_are_refused(kind: type[Plugin]) -> None:
    plugin = _with_defaults(kind)
    with pytest.raises(ValueError, match="extra"):
        kind.model_validate({**plugin.parameters(), "no_such_parameter": 1})


def test_parameters_cannot_be_changed(kind: type[Plugin]) -> None:
    plugin = _with_defaults(kind)
    for name in kind.model_fields:
        with pytest.raises(ValueError, match="frozen"):
            setattr(plugin, name, getattr(plugin, name))


def test_another_process_can_import_it(anything: type[Any]) -> None:
    """Dask workers start with nothing but the environment."""
    code = f"import importlib; print(importlib.import_module({anything.__module__!r}).{anything.__qualname__}.name)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip() == anything.name, run.stderr


def _with_defaults(kind: type[Plugin]) -> Plugin:
    """The plug-in with its first example, or its defaults."""
    examples = getattr(kind, "examples", None)
    values: Mapping[str, Any] = next(iter(examples()), {}) if examples else {}
    missing = [name for name, field in kind.model_fields.items() if field.is_required() and name not in values]
    if missing:
        pytest.skip(f"{', '.join(missing)} must be given, and {kind.__qualname__} names no examples")
    return kind.model_validate(values)
