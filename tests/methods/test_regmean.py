"""RegMean: worked numbers, limits, and its Gram matrices against the inputs that layers are really given."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergecore.checkpoints.sources.resolve import resolve
from mergecore.engine.executor import InProcess
from mergecore.evaluators.lm_eval import LmEval
from mergecore.events import silent
from mergecore.execution.fetch import fetch
from mergecore.execution.place import Place, snapshots_of
from mergecore.methods.regmean import RegMean, RegMeanArguments
from mergecore.planning.data import ExpertData
from mergecore.planning.merge_builder import MergeBuilder
from mergecore.planning.pool import resolve_pool
from mergecore.planning.work import MergeWork
from mergecore.recipes.merge_recipe import run_for
from mergecore.spec.sources import BaseSpec, ExpertSpec
from mergecore.statistics.gram import Gram, groups_of, is_linear
from mergecore.store.results import open_model, read_statistic
from mergecore.store.store import Store
from mergecore.tensors.source import TensorInfo
from tests import tiny_lm

X1, X2 = torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [1.0, -1.0]])
W1, W2 = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
SMALL = 1e-12


def per_token(*inputs: Tensor) -> list[Tensor | None]:
    return [x.T @ x / len(x) for x in inputs]


def merged(method: RegMean, weights: list[Tensor], grams: list[Tensor | None], transposed: bool = False) -> list[float]:
    arguments = RegMeanArguments(grams, method.weights or (1.0,) * len(weights), transposed)
    return method.merge(weights, arguments).reshape(-1).tolist()


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [(1.0, (0.333333, 1.0)), (0.9, (0.366667, 0.983333)), (0.1, (0.633333, 0.85)), (0.0, (0.666667, 0.833333))],
)
def test_worked_numbers(alpha: float, expected: tuple[float, float]) -> None:
    method = RegMean(alpha=alpha, ridge=SMALL)
    assert merged(method, [W1, W2], per_token(X1, X2)) == pytest.approx(expected, abs=1e-6)
    twice = per_token(X1, torch.cat([X2, X2]))
    assert merged(method, [W1, W2], twice) == pytest.approx(expected, abs=1e-6), "per token, so doubling is nothing"
    assert merged(method, [W1.T, W2.T], per_token(X1, X2), True) == pytest.approx(expected, abs=1e-6), "Conv1D"


def test_weights_and_summed_grams() -> None:
    assert merged(RegMean(weights=(3, 1), ridge=SMALL), [W1, W2], per_token(X1, X2)) == pytest.approx(
        (0.510614, 0.847612), abs=1e-6
    )
    summed: list[Tensor | None] = [X1.T @ X1, 2 * X2.T @ X2]
    assert merged(RegMean(ridge=SMALL), [W1, W2], summed) == pytest.approx((0.278074, 1.013661), abs=1e-6)


def test_directions_that_nobody_saw_are_those_of_the_mean() -> None:
    seen = per_token(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
    both = [torch.tensor([[1.0, 5.0]]), torch.tensor([[3.0, 7.0]])]
    assert merged(RegMean(), both, seen) == pytest.approx((2, 6), abs=1e-5)
    assert merged(RegMean(), both, [None, None]) == [2, 6]
    assert merged(RegMean(), both, [torch.zeros(2, 2), torch.zeros(2, 2)]) == [2, 6]


def test_it_solves_the_least_squares_problem() -> None:
    """At α 1: what torch.linalg.lstsq finds for Σ ‖X_t W − X_t W_t‖² / n_t."""
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(n, 5, generator=draw, dtype=torch.float64) for n in (30, 11, 70)]
    weights = [torch.randn(4, 5, generator=draw) for _ in inputs]
    left = torch.cat([x / len(x) ** 0.5 for x in inputs])
    right = torch.cat([x @ w.double().T / len(x) ** 0.5 for x, w in zip(inputs, weights, strict=True)])
    expected = torch.linalg.lstsq(left, right).solution.T.reshape(-1).tolist()
    grams: list[Tensor | None] = [x.T @ x / len(x) for x in inputs]
    assert merged(RegMean(alpha=1, ridge=SMALL), weights, grams) == pytest.approx(expected, abs=1e-6)


def test_equal_experts_are_given_back_bit_for_bit() -> None:
    draw = torch.Generator().manual_seed(1)
    weight, x = torch.randn(6, 5, generator=draw), torch.randn(9, 5, generator=draw)
    for values in ({}, {"weights": (0.3, 1.7, 0.11)}):
        arguments = RegMeanArguments(per_token(x, 2 * x, x + 1), values.get("weights", (1.0,) * 3))
        assert torch.equal(RegMean.model_validate(values).merge([weight] * 3, arguments), weight)


def test_which_tensors_are_linear_and_share_an_input() -> None:
    stem = "model.layers.0."
    info = TensorInfo("F32", (4, 8))
    layers = [f"{stem}self_attn.{leaf}.weight" for leaf in ("k_proj", "q_proj", "v_proj", "o_proj")]
    layers += [f"{stem}mlp.{leaf}.weight" for leaf in ("gate_proj", "up_proj", "down_proj")]
    assert all(is_linear(name, info) for name in layers)
    for other in (
        "model.embed_tokens.weight",
        "lm_head.weight",
        "bert.embeddings.word_embeddings.weight",
        f"{stem}norm.weight",
    ):
        assert not is_linear(other, TensorInfo("F32", (4,)) if "norm" in other else info), other
    assert [len(names) for names in groups_of(dict.fromkeys(layers, 8)).values()] == [3, 1, 2, 1]
    crossed = [f"decoder.block.0.layer.1.EncDecAttention.{leaf}.weight" for leaf in "qkv"]
    assert len(groups_of(dict.fromkeys(crossed, 8))) == 3


# --- a language model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("regmean")
    base = tiny_lm.write_base(folder / "base", num_hidden_layers=2)
    tiny_lm.write_expert(base, folder / "choice", 1)
    tiny_lm.write_adapter(base, folder / "write", 2)
    tiny_lm.write_tasks(folder / "tasks")
    return folder


def opened(folder: Path, store: Path, method: RegMean, memory: int | None = None) -> tuple[Place, MergeWork]:
    experts = tuple(
        ExpertSpec(source=str(folder / name), name=name, tasks=(f"tiny_{name}",)) for name in ("choice", "write")
    )
    pool = resolve_pool(
        BaseSpec(source=str(folder / "base")), experts, None, lambda source: resolve(source.source), silent
    )
    evaluator = LmEval()
    data = ExpertData(evaluator, folder / "tasks", pool.base.companions)
    merge = MergeBuilder(pool, (), None, data).build(method, list(pool.experts.values()))
    where = Place(pool, Store(store), InProcess(), silent, 1 << 30, evaluator, folder / "tasks", memory=memory)
    for snapshot in snapshots_of(pool):
        fetch(where, snapshot)
    return where, merge


def digests(where: Place, merge: MergeWork) -> list[Any]:
    records = [where.store.record(work.step) for work in (*merge.inputs["gram"], merge)]
    return [record.digest for record in records if record is not None]


def test_grams_are_of_what_layers_are_given_and_groups_change_nothing(place: Path, tmp_path: Path) -> None:
    """Against hooks of our own on every layer, one item at a time; in one group, and in many under a small budget."""
    method = RegMean(gram=Gram(items=5))
    where, merge = opened(place, tmp_path / "whole", method)
    assert not run_for(where, merge).failures
    tight, again = opened(place, tmp_path / "groups", method, memory=1)
    tight = Place(tight.pool, tight.store, tight.executor, silent, 1 << 30, tight.evaluator, tight.tasks, tight.folders)
    for work in again.inputs["gram"]:
        assert not run_with_memory(tight, work).failures
    assert not run_for(tight, again).failures
    assert digests(where, merge) == digests(tight, again)
    work = next(work for work in merge.inputs["gram"] if work.experts[0] == where.pool.experts["choice"].id)
    result = read_statistic(where.store, work.step)
    shell = LmEval().open(place / "base", place / "tasks")
    shell.model.load_state_dict(load_file(place / "choice" / "model.safetensors"), strict=False)
    shell.model.tie_weights()
    (inputs,) = shell.inputs(["tiny_choice"], "training", 5, 0, labels=False)
    assert result.numbers["layers"]["model.layers.1.self_attn.v_proj.weight"] in result.tensors.tensors
    for name, gram in result.numbers["layers"].items():
        rows: list[Tensor] = []
        module = shell.model.get_submodule(name.removesuffix(".weight"))
        hook = module.register_forward_pre_hook(lambda _, x, rows=rows: rows.append(x[0].detach().flatten(0, -2)))
        for item in range(5):
            inputs.run(shell.model, [item])
        hook.remove()
        x = torch.cat(rows)
        assert result.numbers["tokens"][gram] == len(x)
        width = x.shape[1]
        torch.testing.assert_close(result.tensors.read(gram).view(width, width), x.T @ x / len(x), atol=2e-5, rtol=1e-4)
    assert len(result.tensors.tensors) == 2 * 4 and len(result.numbers["layers"]) == 2 * 7


def run_with_memory(where: Place, work: Any) -> Any:
    """Run one statistic so that each group holds one Gram."""
    from mergecore.execution.spread import run_model_works

    return run_model_works(
        Place(
            where.pool,
            where.store,
            where.executor,
            silent,
            1 << 30,
            where.evaluator,
            where.tasks,
            where.folders,
            memory=1,
        ),
        [work],
    )


def test_the_merge_is_that_of_its_grams(place: Path, tmp_path: Path) -> None:
    where, merge = opened(place, tmp_path / "store", RegMean(gram=Gram(items=5)))
    assert not run_for(where, merge).failures
    name = "model.layers.0.mlp.up_proj.weight"
    grams, weights = [], []
    for work in merge.inputs["gram"]:
        result = read_statistic(where.store, work.step)
        leader = result.numbers["layers"][name]
        grams.append(result.tensors.read(leader).view(64, 64).clone())
        member = next(member for member in where.pool.members if member.id == work.experts[0])
        weights.append(member.name)
    base = load_file(place / "base" / "model.safetensors")[name].double()
    factors = load_file(place / "write" / "adapter_model.safetensors")
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    own = {
        "choice": load_file(place / "choice" / "model.safetensors")[name].double(),
        "write": base + 2.0 * factors[f"{stem}.lora_B.weight"].double() @ factors[f"{stem}.lora_A.weight"].double(),
    }
    shrunk = [0.9 * g.double() + 0.1 * torch.diag(g.double().diagonal()) for g in grams]
    right = sum(g @ own[n].T for g, n in zip(shrunk, weights, strict=True))
    ridge = 1e-6 * float(sum(g.trace() for g in shrunk)) / 64
    mean = sum(own.values()) / 2
    total = sum(shrunk) + ridge * torch.eye(64, dtype=torch.float64)
    expected = torch.linalg.solve(total, right + ridge * mean.T).T
    actual = open_model(where.store, merge.step).read(name).view(expected.shape).double()
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-4)
