"""Diagonal Fisher information against worked numbers, closed forms and its own exact expectation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from mergecore.errors import CapacityError, MismatchError, NonFiniteError
from mergecore.events import Event, silent
from mergecore.plugins.statistic import Result
from mergecore.statistics.fisher import DiagonalFisher
from mergecore.tensors.memory import MemoryTensors
from mergecore.tensors.source import TensorInfo
from tests import tiny_lm


class Rows:
    """Items of one position: inputs (items, features), labels (items,)."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.targets = inputs, labels

    def __len__(self) -> int:
        return len(self.inputs)

    def logits(self, model: nn.Module, items: Sequence[int]) -> list[Tensor]:
        return [row[None] for row in model(self.inputs[list(items)])]

    def labels(self, items: Sequence[int]) -> list[Tensor]:
        return [self.targets[item][None] for item in items]


def linear(weight: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    layer.weight.data = torch.tensor(weight)
    return layer.eval()


def selection(model: nn.Module) -> dict[str, TensorInfo]:
    return {name: TensorInfo("F32", tuple(value.shape)) for name, value in model.state_dict().items()}


def fisher(model: nn.Module, data: Rows, **fields: object) -> Result:
    return DiagonalFisher(**fields).estimate(model, data, selection(model), silent)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


WEIGHT = [[0.2, -0.1], [0.0, 0.3], [-0.4, 0.1]]
ONE = Rows(torch.tensor([[1.0, 2.0]]), torch.tensor([1]))


def test_linear_softmax_by_hand() -> None:
    actual = fisher(linear(WEIGHT), ONE, estimator="exact")
    expected = torch.tensor([[0.199222, 0.79689], [0.25, 0.999999], [0.174305, 0.697222]])
    torch.testing.assert_close(actual.tensors["weight"], expected, atol=2e-6, rtol=0)
    assert actual.numbers["squared_norm"]["weight"] == pytest.approx(float(expected.double().square().sum()), rel=1e-5)
    assert actual.numbers["items"] == actual.numbers["positions"] == 1


def test_true_labels_by_hand() -> None:
    actual = fisher(linear(WEIGHT), ONE, estimator="empirical").tensors["weight"]
    expected = torch.tensor([[0.075439, 0.301755], [0.249535, 0.99814], [0.050568, 0.202272]])
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=0)


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, Rows]:
    """A network of two layers and four inputs, each repeated 600 times."""
    draw = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw)
    return model, Rows(torch.randn(4, 3, generator=draw).repeat(600, 1), torch.zeros(2400, dtype=torch.int64))


def test_sampled_approaches_exact(small: tuple[nn.Module, Rows]) -> None:
    model, data = small
    exact = fisher(model, data, estimator="exact", samples=4)  # the four inputs once
    sampled = fisher(model, data, estimator="sampled", samples=2400)
    for name, value in exact.tensors.items():
        assert (value >= 0).all() and (sampled.tensors[name] >= 0).all()
        torch.testing.assert_close(sampled.tensors[name], value, rtol=0.15, atol=0.01 * float(value.max()))


def test_batches_are_unbiased(small: tuple[nn.Module, Rows]) -> None:
    model, data = small
    exact = fisher(model, data, estimator="exact", samples=4).tensors
    runs = [fisher(model, data, samples=2400, batch="batch", batch_size=6, seed=seed).tensors for seed in range(3)]
    for name, value in exact.items():
        mean = torch.stack([run[name] for run in runs]).mean(0)
        torch.testing.assert_close(mean, value, rtol=0.25, atol=0.03 * float(value.max()))


def test_batch_is_refused_where_it_is_biased() -> None:
    for estimator in ("empirical", "exact"):
        with pytest.raises(ValidationError, match="unbiased for labels drawn from the model alone"):
            DiagonalFisher(estimator=estimator, batch="batch")  # type: ignore[arg-type]


def test_seed_and_item_fix_the_labels(small: tuple[nn.Module, Rows]) -> None:
    model, data = small
    first, again, other = (fisher(model, data, samples=16, seed=seed).tensors["2.weight"] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(7)  # no global generator is asked
    assert torch.equal(first, fisher(model, data, samples=16).tensors["2.weight"])


def test_buffers_have_no_gradient_and_flags_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
    model[0].weight.requires_grad_(False)
    told: list[Event] = []
    data = Rows(torch.randn(5, 2), torch.zeros(5, dtype=torch.int64))
    chosen = {name: info for name, info in selection(model).items() if "num_batches" not in name}
    actual = DiagonalFisher(samples=4).estimate(model, data, chosen, told.append)
    assert list(actual.tensors) == list(chosen)
    assert actual.numbers["without_gradient"] == ["1.running_mean", "1.running_var"]
    assert not actual.tensors["1.running_var"].any() and actual.tensors["0.weight"].any()
    assert not model[0].weight.requires_grad and model[0].bias.requires_grad and model[0].bias.grad is None
    assert told[-1].done == 4


def test_refusals() -> None:
    model = linear(WEIGHT)
    with pytest.raises(MismatchError, match="'other'"):
        DiagonalFisher().estimate(model, ONE, {"other": TensorInfo("F32", (1,))}, silent)
    with pytest.raises(MismatchError, match="weight"):
        DiagonalFisher().estimate(model, ONE, {"weight": TensorInfo("F32", (2, 2))}, silent)
    with pytest.raises(CapacityError, match="5000 classes"):
        fisher(nn.Linear(2, 5000), ONE, estimator="exact")
    model.weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="weight"):
        fisher(model, ONE)


def test_last_layer_of_a_language_model(tmp_path: Path) -> None:
    """F(W_out)_cj = mean over positions of p_c (1 − p_c) h_j², with items of several positions."""
    from mergecore.evaluators.lm_eval import LmEval

    base = tiny_lm.write_base(tmp_path / "base", tied=False, vocab_size=320, num_hidden_layers=1)
    resident = LmEval().open(base, tiny_lm.write_tasks(tmp_path / "tasks"))
    resident.swap(MemoryTensors(load_file(base / "model.safetensors")))
    data = resident.calibration(["tiny_choice", "tiny_write"], 6, seed=0)
    hidden: list[Tensor] = []
    hook = resident.model.get_submodule("lm_head").register_forward_pre_hook(
        lambda _, inputs_of: hidden.append(inputs_of[0][0])
    )
    logits = [data.logits(resident.model, [item])[0].detach() for item in range(6)]
    hook.remove()
    chances = torch.cat(logits).softmax(-1)
    inputs = torch.cat([hidden_rows[-len(logit) :] for hidden_rows, logit in zip(hidden, logits, strict=True)]).detach()
    expected = (chances * (1 - chances)).T @ inputs.square() / len(inputs)
    chosen = {"lm_head.weight": TensorInfo("F32", (320, 64)), "model.norm.weight": TensorInfo("F32", (64,))}
    exact = DiagonalFisher(estimator="exact").estimate(resident.model, data, chosen, silent)
    torch.testing.assert_close(exact.tensors["lm_head.weight"], expected, rtol=1e-3, atol=1e-6)
    assert exact.numbers["positions"] == len(inputs) > exact.numbers["items"] == 6
    runs = [DiagonalFisher(seed=seed).estimate(resident.model, data, chosen, silent) for seed in range(100)]
    mean = torch.stack([run.tensors["model.norm.weight"] for run in runs]).mean(0)
    torch.testing.assert_close(mean.sum(), exact.tensors["model.norm.weight"].sum(), rtol=0.15, atol=0)
