"""One Prefect and one MLflow server for all tests that need them: each takes half a minute to start."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from flows.services.servers import Addresses, servers
from tests.slow_sweep import patiently


@pytest.fixture(scope="session")
def shared_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Addresses]:
    """The addresses of the two servers. Tests keep apart by the names of their sweeps and registered models."""
    patiently()
    with servers(tmp_path_factory.mktemp("servers")) as addresses:
        yield addresses
