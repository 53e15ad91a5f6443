"""Makes one adapter of adapters, in the process it is called in."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergecore.checkpoints.adapters import EMPTY, adapter_config
from mergecore.checkpoints.experts import AdapterExpert
from mergecore.execution.outcome import RECORDED, Done, failed, made_with
from mergecore.identity.keys import Step
from mergecore.planning.work import AdapterWork
from mergecore.products.adapter_files import write_config, write_made
from mergecore.store.store import Store
from mergecore.tensors.source import TensorInfo


@dataclass(frozen=True)
class AdapterTask:
    """An adapter to make. base, configs: what its own configuration is written from. drawn_with: of its masks."""

    work: AdapterWork
    experts: tuple[AdapterExpert, ...]
    base: Mapping[str, TensorInfo]
    configs: tuple[Mapping[str, Any], ...]
    drawn_with: Mapping[str, Any]

    @property
    def steps(self) -> tuple[Step, ...]:
        return (self.work.step,)


def make_adapter(root: Path, task: AdapterTask) -> Done:
    """Make one adapter: write its two files, module by module, and record it."""
    store, work, began = Store(root), task.work, time.monotonic()
    torch.set_num_threads(1)
    try:
        with store.draft(work.step) as draft:
            if store.is_done(work.step, bytes_needed=True):
                return Done()
            digest, numbers = write_made(draft.path, work.method, task.experts, work.selection)
            ranks, transposed, names = numbers["ranks"], numbers["fan_in_fan_out"], numbers.get("names", EMPTY)
            write_config(draft.path, adapter_config(ranks, task.base, task.configs, transposed, names))
            store.commit(draft, digest, {**numbers, **task.drawn_with}, made_with(began))
    except RECORDED as error:
        return failed(store, task.steps, error)
    return Done([work.step.name], {}, time.monotonic() - began)
