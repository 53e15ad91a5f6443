"""Functions run in processes of their own, so that they can be killed. The processes are forked from a warm one."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

IMPORTED = [
    "pytest",
    "mergecore.sweeps.complete",
    "mergecore.recipes.merge_recipe",
    "mergecore.evaluators.classification",
    "tests.small_pool",
]

CONTEXT: ForkServerContext = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([*IMPORTED, "tests.digits_sweep"])


def killed_here() -> None:
    """The end of this process, as `kill -9` makes it: no `finally`, no exit handler."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(function: str, call: int, after: bool = False) -> None:
    """Kill this process at the n-th call (from 1) of 'module:name' or 'module:Class.name', before it or after it."""
    module, _, path = function.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    original, calls = getattr(owner, name), [0]

    def wrapped(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and not after:
            killed_here()
        result = original(*arguments, **options)
        if calls[0] == call:
            killed_here()
        return result

    setattr(owner, name, wrapped)


def _run(function: Callable[..., Any], arguments: tuple[Any, ...], answer: Connection) -> None:
    try:
        answer.send((True, function(*arguments)))
    except BaseException:
        answer.send((False, traceback.format_exc()))


class Started:
    """A function that runs in a process of its own."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._answer, theirs = CONTEXT.Pipe(duplex=False)
        self.process: ForkServerProcess = CONTEXT.Process(target=_run, args=(function, arguments, theirs))
        self.process.start()
        theirs.close()

    def result(self, seconds: float = 120) -> Any:
        """What the function returned; fails with its traceback where it raised."""
        assert self._answer.poll(seconds), f"no answer after {seconds} s"
        try:
            succeeded, answer = self._answer.recv()
        except EOFError:
            succeeded, answer = False, "the process was killed"
        self.process.join(seconds)
        assert succeeded, answer
        return answer

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.join(30)


def ran(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns, called in a process of its own."""
    return Started(function, *arguments).result()


def was_killed(function: Callable[..., Any], *arguments: Any, seconds: float = 120) -> None:
    """Call the function in a process of its own, which must end by SIGKILL."""
    started = Started(function, *arguments)
    started.process.join(seconds)
    if started.process.exitcode != -signal.SIGKILL:
        raise AssertionError(f"it was not killed and gave {started.result(1)!r}")
