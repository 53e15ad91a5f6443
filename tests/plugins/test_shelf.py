"""Plug-ins of installed packages: found by entry points, imported when they are used, refused with the package's
name.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from flows.cli.texts import method_text, methods_text
from mergecore.errors import PluginError, SpecError
from mergecore.methods import Average, Ties
from mergecore.plugins.installed import Entry, installed_plugins
from mergecore.registry import METHODS, STATISTICS, evaluator_from, method_from
from mergecore.statistics import Threshold

MODULE = """
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from mergecore.methods import Average, Ties
from mergecore.plugins.method import DeltaMethod
from mergecore.statistics import Threshold


class Mine(Average):
    \"\"\"The mean, under another name.\"\"\"

    name: ClassVar[str] = "mine"
    version: ClassVar[int] = 3


class Renamed(Average):
    name: ClassVar[str] = "other"


class Half(Average):
    name: ClassVar[str] = "half"
    version: ClassVar[Any] = 0.5


class Abstract(DeltaMethod):
    name: ClassVar[str] = "abstract"


class OwnThreshold(Threshold):
    pass


class Borrowing(Ties):
    \"\"\"Uses a statistic of its own under a name of ours.\"\"\"

    name: ClassVar[str] = "borrowing"

    def statistics(self) -> Mapping[str, Any]:
        return {"threshold": OwnThreshold(density=0.5)}


class NewThreshold(Threshold):
    name: ClassVar[str] = "new_threshold"


class Unregistered(Ties):
    name: ClassVar[str] = "unregistered"

    def statistics(self) -> Mapping[str, Any]:
        return {"threshold": NewThreshold(density=0.5)}


number = 3
"""

Offer = Callable[..., None]


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Offer:
    """Offers plug-ins: offer(package, group, name='module:object', …)."""
    (tmp_path / "plugs.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    groups: dict[str, dict[str, tuple[Entry, ...]]] = {}
    monkeypatch.setattr("mergecore.plugins.shelf.installed_plugins", lambda: groups)

    def offered(package: str, group: str, **targets: str) -> None:
        for name, value in targets.items():
            entry = Entry(name, package, "1.2", EntryPoint(name, value, f"mergeloom.{group}"))
            names = groups.setdefault(f"mergeloom.{group}", {})
            names[name] = (*names.get(name, ()), entry)

    yield offered
    for shelf in (METHODS, STATISTICS):
        shelf._loaded.clear()
    sys.modules.pop("plugs", None)


def test_a_method_of_a_package_is_one_like_ours(offer: Offer) -> None:
    offer("more-methods", "methods", mine="plugs:Mine")
    assert "plugs" not in sys.modules and "mine" in METHODS and list(METHODS)[-1] == "mine"
    assert METHODS.package("mine") == "more-methods 1.2" and METHODS.package("ties") == ""
    assert "plugs" not in sys.modules, "names are known without an import"
    method = method_from("mine", {"weights": [1, 2]}, "recipe")
    assert (method.name, method.version) == ("mine", 3) and type(method).__module__ == "plugs"
    with pytest.raises(SpecError, match="did you mean 'mine'"):
        method_from("mien", {}, "recipe")


def test_lists_say_which_package_a_method_is_from(offer: Offer) -> None:
    assert "package" not in methods_text()
    offer("more-methods", "methods", mine="plugs:Mine", wrong="broken:Wrong")
    said = methods_text()
    (line,) = [line for line in said.splitlines() if line.startswith("mine ")]
    assert line.endswith("more-methods 1.2") and "The mean, under another name." in line
    assert "cannot be used: the method 'wrong' of the package more-methods 1.2" in said
    assert "From the package more-methods 1.2; version 3 of the method." in method_text("mine")


def test_a_name_that_is_taken_twice_names_both_packages(offer: Offer) -> None:
    offer("first", "methods", mine="plugs:Mine")
    offer("second", "methods", mine="plugs:Mine", ties="plugs:Mine")
    with pytest.raises(
        PluginError, match=r"two packages offer a method called 'mine': first \(plugs:Mine\) and second"
    ):
        METHODS["mine"]
    with pytest.raises(PluginError, match=r"called 'ties': mergeloom and second \(plugs:Mine\); uninstall one of them"):
        method_from("ties", {}, "recipe")
    assert METHODS["average"] is Average, "other names are not concerned"


@pytest.mark.parametrize(
    ("name", "target", "problem"),
    [
        ("wrong", "broken:Wrong", r"cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("gone", "plugs:Gone", r"cannot be imported: AttributeError"),
        ("number", "plugs:number", r"is no subclass of mergecore.plugins.method.Method"),
        ("renamed", "plugs:Renamed", r"calls itself 'other'; the entry point and `name` must be the same"),
        ("half", "plugs:Half", r"has the version 0.5, and a version is a whole number from 1"),
        ("abstract", "plugs:Abstract", r"does not define merge; "),
    ],
)
def test_a_package_that_does_not_work_is_named(offer: Offer, name: str, target: str, problem: str) -> None:
    offer("more-methods", "methods", **{name: target})
    with pytest.raises(
        PluginError, match=rf"the method '{name}' of the package more-methods 1.2 .*{problem}.*pip uninstall"
    ):
        METHODS[name]
    assert METHODS.trouble(name) and METHODS["ties"] is Ties and not METHODS.trouble("ties")


def test_a_statistic_needs_a_name_of_its_own(offer: Offer) -> None:
    """Results are kept under the name: two statistics of one name would be taken for each other."""
    offer("more-methods", "methods", borrowing="plugs:Borrowing", unregistered="plugs:Unregistered")
    with pytest.raises(
        PluginError, match=r"plugs.OwnThreshold is called 'threshold', and so is the statistic mergecore"
    ):
        method_from("borrowing", {}, "recipe")
    with pytest.raises(PluginError, match=r"'new_threshold' .* is not registered; .* 'mergeloom.statistics'"):
        method_from("unregistered", {}, "recipe")
    offer("more-methods", "statistics", new_threshold="plugs:NewThreshold")
    assert method_from("unregistered", {}, "recipe").name == "unregistered"


def test_every_statistic_of_ours_is_registered() -> None:
    for name, kind in METHODS.items():
        for values in kind.examples():
            method_from(name, values, name)
    assert STATISTICS["threshold"] is Threshold


def test_evaluators_are_offered_alike(offer: Offer) -> None:
    offer("more-methods", "evaluators", broken="broken:Evaluator")
    assert evaluator_from("classification", {"model": "a:b"}, "evaluate").name == "classification"
    with pytest.raises(PluginError, match=r"the evaluator 'broken' of the package more-methods 1.2"):
        evaluator_from("broken", {}, "evaluate")


def test_entry_points_are_read_once() -> None:
    assert installed_plugins() is installed_plugins()


def test_importing_the_registry_reads_no_entry_points() -> None:
    code = (
        "import mergecore.registry, mergecore.spec.sweep\n"
        "from mergecore.plugins.installed import installed_plugins\n"
        "print(installed_plugins.cache_info().misses)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "0"
    )
