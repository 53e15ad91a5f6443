"""The command line with small spans that take their time, so that Ctrl-C hits the middle: run as `python -m`.

Arguments: seconds a span lasts, and the command.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import mergecore.engine.pass_plan
import mergecore.engine.run_pass
from flows.cli.main import main
from mergecore.engine.span import run_span


def slowed(seconds: float) -> None:
    """Make every span of this process last so long."""
    mergecore.engine.pass_plan.plan_spans.__defaults__ = (20_000,)

    def slowly(shared: Any, number: int) -> Any:
        time.sleep(seconds)
        return run_span(shared, number)

    mergecore.engine.run_pass.run_span = slowly


if __name__ == "__main__":
    slowed(float(sys.argv[1]))
    main(sys.argv[2:], prog_name="mergeloom")
