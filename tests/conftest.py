"""What several folders of tests share. Prefect's own folder is a temporary one, so that nobody's profile is read."""

import atexit
import os
import shutil
import tempfile

import pytest

for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):  # `make test` runs this; a make that a test runs is not its sub-make
    os.environ.pop(name, None)
pytest.register_assert_rewrite("mergeloom.testing")
os.environ["PREFECT_HOME"] = tempfile.mkdtemp(prefix="mergeloom-prefect-")
atexit.register(shutil.rmtree, os.environ["PREFECT_HOME"], ignore_errors=True)

from tests.deployed import project  # noqa: E402 — Prefect reads its settings as it is imported
from tests.shared_digits import tier  # noqa: E402
from tests.shared_servers import shared_servers  # noqa: E402

__all__ = ["project", "shared_servers", "tier"]
