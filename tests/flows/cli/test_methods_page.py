"""docs/methods.md agrees with the classes, and the values that it names for published code are valid in a recipe."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from flows.cli.main import main
from flows.cli.methods_page import methods_page, parameters
from flows.cli.texts import WIDTHS
from mergecore.plugins.method import Method
from mergecore.registry import METHODS

PAGE = Path(__file__).parents[3] / "docs" / "methods.md"


def section(name: str) -> str:
    return methods_page().split(f"\n## {name}\n")[1].split("\n## ")[0]


def test_the_committed_page_is_up_to_date() -> None:
    assert PAGE.read_text() == methods_page(), "docs/methods.md is not what the classes say: run `make docs`"
    assert CliRunner().invoke(main, ["methods", "--markdown"]).output == methods_page()


@pytest.mark.parametrize("kind", METHODS.values(), ids=list(METHODS))
def test_every_method_tells_its_source_and_its_parameters(kind: type[Method]) -> None:
    text = section(kind.name)
    assert kind.paper and f"Paper: {kind.paper}." in text
    for field, info in kind.model_fields.items():
        assert info.description and f"| `{field}` |" in text, f"{kind.name}.{field}"
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") == 5 and not line.endswith("|  |"), line


@pytest.mark.parametrize("kind", METHODS.values(), ids=list(METHODS))
def test_values_that_do_as_published_code_are_values(kind: type[Method]) -> None:
    needed = {name: value for name, value in kind.examples().golden[0].items() if kind.model_fields[name].is_required()}
    for entry in kind.published:
        if entry.startswith("`"):
            values = yaml.safe_load("{" + entry.split("`")[1] + "}")
            if "drop" in values:
                values["drop"]["rate"] = 0.5
            kind.model_validate({**needed, **values})


def test_what_it_takes_and_costs() -> None:
    assert "Takes 2 experts" in section("slerp") and "Takes at least 2 experts" in section("model_stock")
    assert "Takes one expert" in section("nearswap") and "weights and the base's" in section("nearswap")
    assert "Readings: 3 (beforehand `profile`, `threshold`)" in section("ties")
    assert "Readings: 1; 2 with `boost`" in section("ram")
    assert "| `boost.rate` | number ≥ 0 | `0.1` |" in section("ram")
    assert "runs each expert on training items" in section("fisher")
    assert "| `mask_scale` | list of number ≥ 0 or number ≥ 0 | `0.4` |" in section("tall_masks")


@pytest.mark.parametrize("name", METHODS)
def test_the_command_says_of_a_method_what_the_page_says(name: str) -> None:
    result = CliRunner().invoke(main, ["methods", name])
    assert result.exit_code == 0 and not re.search(r"object at|function|Annotated|\bNone\b", result.output)
    lines = result.output.splitlines()
    for parameter in parameters(METHODS[name]):
        line = next(line for line in lines if line.startswith(f"{parameter.name} "))
        assert parameter.values.replace("`", "").split()[0] in line
        assert parameter.default.strip("`[]").split(",")[0] in line
    assert max(len(line) for line in lines[lines.index("") :] if line.startswith((" ", "-"))) <= sum(WIDTHS) + 6
