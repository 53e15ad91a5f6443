"""Making one adapter of adapters, in the process it is called in."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mergecore.checkpoints.adapters import adapter_config
from mergecore.checkpoints.experts import AdapterExpert
from mergecore.execution.outcome import RECORDED, Done, failed, made_with
from mergecore.formats.adapter_folder import write_config, write_made
from mergecore.identity.keys import Step
from mergecore.planning.plans import StatisticPlan
from mergecore.plugins.adapter_method import AdapterMethod
from mergecore.store.store import Store
from mergecore.tensors.source import TensorInfo


@dataclass(frozen=True)
class AdapterTask:
    """An adapter to be made; base and configs are what its own configuration is written from."""

    plan: StatisticPlan
    experts: tuple[AdapterExpert, ...]
    base: Mapping[str, TensorInfo]
    configs: tuple[Mapping[str, Any], ...]

    @property
    def steps(self) -> tuple[Step, ...]:
        """What is to be completed."""
        return (self.plan.step,)


def make_adapter(root: Path, task: AdapterTask) -> Done:
    """Make one adapter in the process it is called in: its two files, written module by module."""
    store, plan, began = Store(root), task.plan, time.monotonic()
    torch.set_num_threads(1)
    try:
        with store.draft(plan.step) as draft:
            if store.is_done(plan.step, bytes_needed=True):
                return Done()
            assert isinstance(plan.statistic, AdapterMethod)
            digest, numbers = write_made(draft.path, plan.statistic, task.experts, plan.selection)
            write_config(
                draft.path, adapter_config(numbers["ranks"], task.base, task.configs, numbers["fan_in_fan_out"])
            )
            store.commit(draft, digest, numbers, made_with(began))
    except RECORDED as error:
        return failed(store, task.steps, error)
    return Done([plan.step.name], {}, time.monotonic() - began)
