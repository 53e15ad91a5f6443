"""What every plug-in promises, as tests: a pytest plugin for packages that offer plug-ins of their own.

    pytest -p mergeloom.testing --mergeloom-plugin NAME

NAME is a method, statistic, product, search or evaluator of an installed package, as its entry point calls it. The
option may be given several times. Without a path, pytest runs these tests only; with one, it runs them beside the tests
of the path. A method is tried with every set of values that its `examples()` names.
"""

from __future__ import annotations

from pathlib import Path

import pytest

OPTION = "--mergeloom-plugin"
OF_EVERY_KIND = "plugin_contract.py"
OF_METHODS = ("method_contract.py", "edge_contract.py")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that names plug-ins."""
    parser.addoption(OPTION, action="append", default=[], metavar="NAME", help="test what every plug-in promises")


def pytest_configure(config: pytest.Config) -> None:
    """Add the contracts to what is collected. Raises UsageError for a name that is no plug-in's."""
    names = config.getoption(OPTION)
    if names:
        from mergeloom.testing.variants import is_method

        methods = [name for name in names if is_method(name)]
        folder = Path(__file__).parent
        contracts = [str(folder / file) for file in (OF_EVERY_KIND, *(OF_METHODS if methods else ()))]
        explicit = config.args if config.args_source is pytest.Config.ArgsSource.ARGS else []
        config.args = [*explicit, *contracts]
