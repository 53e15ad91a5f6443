"""Mean of x xᵀ over the inputs x of every linear layer of an expert: RegMean's statistic (Jin et al. 2023, §3)."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mergecore.checkpoints.architectures import HEADS, TRANSPOSED, VOCABULARY, outside
from mergecore.errors import MismatchError, SpecError
from mergecore.events import Event, Report
from mergecore.plugins.model_statistic import Inputs, Kept, Models, ModelStatistic, Out, Progress, Seen, Shell, Use
from mergecore.plugins.statistic import Result, Scope, Statistics
from mergecore.tensors.source import TensorInfo

SHARED: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
)
"""Layers of one parent that read the same input, by their last names. It is checked while the model runs."""
AT_ONCE = 8
"""Items in one call of the model; those of equal length share a batch."""


class Gram(ModelStatistic):
    """G = (1/n) Σ x xᵀ over the n tokens that reach a linear layer, float32, of the expert on inputs of its own tasks.

    Layers that read the same input share one Gram, which goes by the name of the first. Nothing is padded, so every
    token is one of an item. The layers are done in groups whose Grams fit into memory together; the numbers do not
    depend on the groups. A tensor that is no linear layer's gets zeros.
    """

    name: ClassVar[str] = "gram"
    scope: ClassVar[Scope] = Scope.EXPERT

    inputs: Seen = "training"
    items: Annotated[int, Field(ge=1, description="number of items of each expert's tasks")] = 256
    labels: Annotated[Literal["none"], Field(description="right answers are never looked at")] = "none"
    seed: Annotated[int, Field(ge=0, description="seed by which items are drawn")] = 0

    @property
    def use(self) -> Use:
        return Use(self.inputs, self.items, self.labels, self.seed)

    def outputs(
        self, selection: Mapping[str, TensorInfo], count: int, config: Mapping[str, Any]
    ) -> Mapping[str, TensorInfo]:
        """Return a square matrix of the input's width for every distinct input."""
        widths = {name: _width(name, info, config) for name, info in selection.items() if is_linear(name, info)}
        return {
            leader: TensorInfo("F32", (widths[names[0]], widths[names[0]]))
            for leader, names in groups_of(widths).items()
        }

    def memory(self, selection: Mapping[str, TensorInfo], count: int) -> int:
        """Return the bytes of the expert and of its largest Gram."""
        widest = max((max(info.shape) for name, info in selection.items() if is_linear(name, info)), default=0)
        return super().memory(selection, count) + 4 * widest * widest

    def compute(
        self,
        models: Models,
        inputs: Sequence[Inputs],
        selection: Mapping[str, TensorInfo],
        statistics: Statistics,
        out: Out,
        progress: Progress,
        report: Report,
    ) -> Mapping[str, Any]:
        """Write the Grams. numbers: `layers` {tensor: its Gram's name}, `transposed`, `tokens` {Gram's name: n}."""
        last = progress.last or Kept(0, numbers={"tokens": {}})
        grams = self.outputs(selection, 1, models.config)
        linear = {name: info for name, info in selection.items() if is_linear(name, info)}
        shared = groups_of({name: _width(name, info, models.config) for name, info in linear.items()})
        shell, tokens = models.shell(), dict(last.numbers["tokens"])
        shell.swap(models.experts[0])
        room = None if models.memory is None else models.memory - ModelStatistic.memory(self, selection, 1)
        waiting = [leader for leader in grams if leader not in tokens]
        for group in _fitting({leader: grams[leader] for leader in waiting}, room):
            taps = [_Tap(shell, leader, shared[leader], grams[leader].shape[0]) for leader in group]
            _run(shell.module, taps, inputs[0], report, f"Gram matrices {len(tokens)}/{len(grams)}")
            for tap in taps:
                out.write(tap.leader, tap.total.div_(max(tap.tokens, 1)))
                tokens[tap.leader] = tap.tokens
            progress.keep(lambda: Kept(len(tokens), numbers={"tokens": tokens}))
        layers = {name: leader for leader, names in shared.items() for name in names}
        transposed = sorted(name for name in linear if _is_transposed(name, models.config))
        return {"layers": layers, "transposed": transposed, "tokens": tokens}

    def taken(self, tensors: Mapping[str, Tensor], selection: Mapping[str, TensorInfo]) -> Result:
        """Return Grams that were worked out elsewhere, one for each linear layer or for layers that share an input.

        A layer is kept as (in, out) where its Gram fits its rows alone.
        """
        linear = {name: info for name, info in selection.items() if is_linear(name, info)}
        shared = groups_of({name: info.shape[1] for name, info in linear.items()})
        layers = {}
        for leader, names in shared.items():
            for name in names:
                layers[name] = name if name in tensors else leader
                if layers[name] not in tensors:
                    raise SpecError(f"statistics: no Gram matrix is given for tensor '{name}'")
        sizes = {name: tensors[gram].shape[0] for name, gram in layers.items()}
        transposed = [name for name, size in sizes.items() if linear[name].shape[1] != size == linear[name].shape[0]]
        return Result(tensors, {"layers": layers, "transposed": transposed, "tokens": dict.fromkeys(tensors, 1)})


def is_linear(name: str, info: TensorInfo) -> bool:
    """Return whether a tensor is the weight of a linear layer within the model, by its name and shape.

    Embeddings and heads are none: heads read what the tasks do not share.
    """
    if len(info.shape) != 2 or not info.count or not name.endswith("weight") or VOCABULARY.search(name):
        return False
    if outside(name) == "embeddings" or any(fnmatch.fnmatchcase(name, pattern) for pattern in HEADS):
        return False
    return "embedding" not in name and "relative_attention_bias" not in name


def groups_of(widths: Mapping[str, int]) -> dict[str, list[str]]:
    """Return {first tensor: tensors} of the layers that read one input, in the order of the tensors."""
    leaders: dict[tuple[str, int, int], str] = {}
    groups: dict[str, list[str]] = {}
    for name, width in widths.items():
        parent, _, leaf = name.removesuffix(".weight").rpartition(".")
        family = next((number for number, leaves in enumerate(SHARED) if leaf in leaves), None)
        # Keys and values of a decoder's cross-attention read another input than its queries.
        alone = family is None or "cross" in parent.lower() or "encoder_attn" in parent
        leader = name if alone else leaders.setdefault((parent, family or 0, width), name)
        groups.setdefault(leader, []).append(name)
    return groups


def _is_transposed(name: str, config: Mapping[str, Any]) -> bool:
    patterns = TRANSPOSED.get(str(config.get("model_type", "")), ())
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _width(name: str, info: TensorInfo, config: Mapping[str, Any]) -> int:
    """Return the width of a layer's input."""
    return info.shape[0 if _is_transposed(name, config) else 1]


def _fitting(grams: Mapping[str, TensorInfo], room: int | None) -> Iterator[list[str]]:
    """Yield the Grams in groups that fit into `room` bytes, each with one at least."""
    group: list[str] = []
    filled = 0
    for leader, info in grams.items():
        if group and room is not None and filled + info.size > room:
            yield group
            group, filled = [], 0
        group.append(leader)
        filled += info.size
    if group:
        yield group


class _Tap:
    """Adds up x xᵀ of what reaches the layers that share an input."""

    def __init__(self, shell: Shell, leader: str, names: Sequence[str], width: int) -> None:
        self.leader, self.total, self.tokens = leader, torch.zeros(width, width), 0
        slots = shell.slots(names)
        self._modules = {name: _linear_of(shell.module, slot.parameter) for name, slot in slots.items()}
        self._first = ""
        self._seen: Tensor | None = None

    def hooked(self, stack: ExitStack) -> None:
        """Listen until the stack is left. Modules that are not linear layers are passed over."""
        for name, module in self._modules.items():
            if module is not None:
                handle = module.register_forward_pre_hook(
                    lambda _, arguments, own=name: self._reached(own, arguments[0])
                )
                stack.callback(handle.remove)

    def _reached(self, name: str, x: Tensor) -> None:
        self._first = self._first or name
        if name == self._first:
            self._seen = x
            rows = x.detach().reshape(-1, self.total.shape[0]).float().cpu()
            self.total.addmm_(rows.T, rows)
            self.tokens += len(rows)
        elif self._seen is None or (x is not self._seen and not torch.equal(x, self._seen)):
            raise MismatchError(
                f"'{name}' does not read what '{self._first}' reads, though layers of these names do elsewhere: leave "
                f"it out of the merge by RegMean, select: [{{names: '{name}', method: average}}, {{}}]"
            )


def _linear_of(model: nn.Module, parameter: str) -> nn.Module | None:
    """Return the linear layer, or Conv1D of transformers, that has this weight; None without one."""
    module = model.get_submodule(parameter.rpartition(".")[0])
    return module if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D" else None


def _run(model: nn.Module, taps: Sequence[_Tap], inputs: Inputs, report: Report, told: str) -> None:
    """Run the model on all items, in their order."""
    with ExitStack() as stack, torch.no_grad():
        for tap in taps:
            tap.hooked(stack)
        every = [(task, item) for task in inputs.tasks for item in range(0, len(task), AT_ONCE)]
        for done, (task, first) in enumerate(every):
            task.run(model, range(first, min(first + AT_ONCE, len(task))))
            report(Event(told, done + 1, len(every), "batches"))
