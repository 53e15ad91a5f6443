"""AdaMerging: worked numbers, gradients against finite differences, limits, tables, and kills."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from mergecore import merge
from mergecore.checkpoints.folded import FoldedTensors
from mergecore.checkpoints.sources.resolve import resolve
from mergecore.engine.executor import InProcess
from mergecore.errors import NonFiniteError, SpecError
from mergecore.evaluators.lm_eval import LmEval
from mergecore.events import Event, silent
from mergecore.execution.fetch import fetch
from mergecore.execution.model_runs import OpenedModels
from mergecore.execution.place import Place, snapshots_of
from mergecore.methods.adamerging import AdaMerging
from mergecore.methods.task_arithmetic import TaskArithmetic
from mergecore.planning.data import ExpertData
from mergecore.planning.merge_builder import MergeBuilder
from mergecore.planning.pool import opened as opened_experts
from mergecore.planning.pool import resolve_pool
from mergecore.plugins.model_statistic import ModelStatistic, Slot, TaskInputs
from mergecore.plugins.table import Groups, Table, part_of
from mergecore.recipes.merge_recipe import merge_recipe, run_for
from mergecore.registry import METHODS
from mergecore.spec.recipe import parse_recipe
from mergecore.spec.sources import BaseSpec, ExpertSpec
from mergecore.statistics.coefficients import Coefficients, Merged, mean_entropy
from mergecore.store.results import open_model, read_statistic
from mergecore.store.store import Store
from mergecore.tensors.memory import MemoryTensors
from tests import tiny_lm
from tests.execution.learned_pool import FACTORY, NAMES, merge_of, write_pool
from tests.execution.test_model_statistics import killed_at

# --- a network of two layers, as in the worked example ---------------------------------------------------------------


class Network(nn.Module):
    """z = W2 tanh(W1 x)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))  # type: ignore[no-any-return]


class Given(TaskInputs):
    """Inputs of the example."""

    def __init__(self, task: str, x: Sequence[Sequence[float]], classes: int | None = 3) -> None:
        self.task, self.x, self.classes = task, torch.tensor(x), classes
        self.documents = tuple(f"{task} {item}" for item in range(len(x)))

    def logits(self, model: nn.Module, items: Sequence[int]) -> Tensor:
        return model(self.x[list(items)])  # type: ignore[no-any-return]

    def run(self, model: nn.Module, items: Sequence[int]) -> None:
        self.logits(model, items)

    def labels(self, items: Sequence[int]) -> Tensor:
        raise AssertionError("no labels")


@dataclass
class Shell:
    module: nn.Module

    def swap(self, weights: Any) -> None:
        for name, parameter in self.module.state_dict(keep_vars=True).items():
            parameter.data.copy_(weights.read(name).view(parameter.shape))

    def slots(self, names: Any) -> Mapping[str, Any]:
        return {name: Slot(name) for name in names}


class Models:
    """Base, task vectors and a shell in memory; counts how often task vectors are read."""

    def __init__(self, base: dict[str, Tensor], deltas: list[dict[str, Tensor]], memory: int | None = None) -> None:
        self.base, self.deltas, self.memory, self.config, self.reads = MemoryTensors(base), deltas, memory, {}, 0
        self.experts = [MemoryTensors({name: base[name] + d[name] for name in base}) for d in deltas]
        self.only = Shell(Network())

    def delta(self, expert: int, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        self.reads += 1
        return self.deltas[expert][name].reshape(-1)[start:stop]

    def shell(self, number: int = 0) -> Shell:
        return self.only


@dataclass
class Own:
    tasks: Sequence[TaskInputs]


BASE = {
    "first.weight": torch.tensor([[0.5, -0.2], [0.1, 0.4]]),
    "second.weight": torch.tensor([[0.6, 0], [0, 0.6], [-0.3, 0.2]]),
}
DELTAS = [
    {
        "first.weight": torch.tensor([[0.4, 0], [0, -0.2]]),
        "second.weight": torch.tensor([[0.5, 0.1], [0, 0], [0, -0.4]]),
    },
    {
        "first.weight": torch.tensor([[0, 0.3], [-0.5, 0]]),
        "second.weight": torch.tensor([[0, -0.2], [0.7, 0.3], [0.1, 0]]),
    },
]
INPUTS = [Own([Given("one", [[1, -1], [0.5, 2]])]), Own([Given("two", [[-1, 0.5], [2, 1]])])]
SELECTION = MemoryTensors(BASE).tensors


class Nothing:
    """Keeps nothing; goes on from `last`."""

    last: Any = None

    def __init__(self) -> None:
        self.written: dict[str, Tensor] = {}

    def keep(self, state: Any) -> None:
        pass

    def write(self, name: str, values: Tensor, start: int = 0) -> None:
        self.written[name] = values


def learned(
    inputs: Sequence[Own] = tuple(INPUTS), memory: int | None = None, models: Models | None = None, **values: Any
) -> Mapping[str, Any]:
    statistic, nothing = Coefficients(**values), Nothing()
    models = models or Models(BASE, DELTAS, memory)
    numbers = statistic.compute(models, inputs, SELECTION, {}, nothing, nothing, silent)  # type: ignore[arg-type]
    assert nothing.written["coefficients"].tolist() == [list(row) for row in numbers["table"]["rows"].values()]
    return numbers


def rows(numbers: Mapping[str, Any]) -> list[list[float]]:
    return [list(row) for row in numbers["table"]["rows"].values()]


def loss_at(values: Tensor, groups: Groups) -> tuple[float, Tensor]:
    """The loss and its gradient at coefficients (groups, experts), by the statistic's own way."""
    statistic = Coefficients(groups=groups)
    merged = Merged(statistic, Models(BASE, DELTAS), SELECTION, {})  # type: ignore[arg-type]
    with merged.learning():
        merged.put(values)
        tasks = [task for own in INPUTS for task in own.tasks]
        loss = sum(statistic._backward(task, merged.module, 0)[0] for task in tasks)
        return loss, merged.gradient()


def test_worked_gradients() -> None:
    loss, gradient = loss_at(torch.full((2, 2), 0.3, dtype=torch.float64), Groups())
    assert loss == pytest.approx(2.123419, abs=2e-6)
    expected = [[-0.030285, -0.010378], [-0.058581, 0.007181]]
    torch.testing.assert_close(gradient, torch.tensor(expected).double(), atol=2e-6, rtol=0)
    task_wise = loss_at(torch.full((1, 2), 0.3, dtype=torch.float64), Groups(by="model"))[1]
    torch.testing.assert_close(task_wise, torch.tensor([[-0.088866, -0.003196]]).double(), atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (1, [[0.301, 0.301], [0.301, 0.299]]),
        (100, [[0.405368, 0.414445], [0.403309, 0.179347]]),
        (500, [[0.890013, 0.93924], [0.86673, 0.0]]),
    ],
)
def test_worked_steps(steps: int, expected: list[list[float]]) -> None:
    """The raw value of the last reaches −.014 and is clamped."""
    numbers = learned(steps=steps)
    assert rows(numbers) == [pytest.approx(row, abs=2e-5) for row in expected]
    ends = {1: 2.123312, 100: 2.1088, 500: 2.009853}
    values = torch.tensor(rows(numbers), dtype=torch.float64)
    assert loss_at(values, Groups())[0] == pytest.approx(ends[steps], abs=2e-5)
    assert len(numbers["losses"]) == steps and numbers["losses"][0] == pytest.approx(2.123419, abs=2e-6)
    assert numbers["at_start"]["one"] == pytest.approx((1.048326 + 1.081416) / 2 / log(3), abs=1e-5)


@pytest.mark.parametrize("groups", [Groups(), Groups(by="model"), Groups(by="model", parts=True)])
def test_gradients_are_finite_differences(groups: Groups) -> None:
    count = len(groups.rows(BASE))
    values = torch.linspace(0.1, 0.9, count * 2, dtype=torch.float64).view(count, 2)
    gradient = loss_at(values, groups)[1]
    for place in np.ndindex(count, 2):
        ends = []
        for step in (2e-2, -2e-2):
            beside = values.clone()
            beside[place] += step
            ends.append(loss_at(beside, groups)[0])
        assert float(gradient[place]) == pytest.approx((ends[0] - ends[1]) / 4e-2, abs=2e-4)


def test_entropy_of_absent_answers_and_its_share_of_ln_classes() -> None:
    z = torch.tensor([[1.0, 2.0, -torch.inf]], requires_grad=True)
    entropy = mean_entropy(z)
    p = torch.tensor([1.0, 2.0]).softmax(-1)
    assert entropy.item() == pytest.approx(float(-(p * p.log()).sum()))
    torch.autograd.backward(entropy)
    assert z.grad is not None and z.grad.isfinite().all()
    plain, divided = learned(steps=1), learned(steps=1, entropy="ln_classes")
    assert divided["losses"][0] == pytest.approx(plain["losses"][0] / log(3))


def test_task_vectors_are_read_at_most_twice_a_step_and_memory_changes_nothing() -> None:
    resident, streamed = Models(BASE, DELTAS), Models(BASE, DELTAS, memory=1)
    assert learned(steps=5, models=resident) == learned(steps=5, models=streamed)
    assert resident.reads == 4 and streamed.reads == 2 * 5 * 4


def test_trimmed_task_vectors_are_those_of_ties() -> None:
    """++: a fifth of each, the elected sign, no mean: λ = 1 gives TIES with `aggregate: sum`."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(6, 5, generator=generator) for name in ("a.weight", "b.weight")}
    experts = [{n: v + torch.randn(6, 5, generator=generator) for n, v in base.items()} for _ in range(3)]
    method = AdaMerging(coefficients=Coefficients(density=0.2))
    actual = merge(
        method, base=base, experts=experts, ids=["x", "y", "z"],
        statistics={"coefficients": [{"coefficients": torch.ones(2, 3, dtype=torch.float64)}]},
    )  # fmt: skip
    ties = METHODS["ties"].model_validate({"density": 0.2, "count": "published", "aggregate": "sum"})
    expected = merge(ties, base=base, experts=experts, ids=["x", "y", "z"])
    assert all(torch.equal(actual[name], expected[name]) for name in base)


# --- through the product ---------------------------------------------------------------------------------------------


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    return write_pool(tmp_path / "pool")


def ada(**values: Any) -> AdaMerging:
    return AdaMerging(coefficients=Coefficients(**{"items": 12, "batch": 5, "steps": 4, **values}))


def model_of(pool: Path, method: Any) -> tuple[dict[str, Tensor], Any]:
    place, merge_work = merge_of(pool, method)
    outcome = run_for(place, merge_work)
    assert not outcome.failures, outcome.failures
    record = place.store.record(merge_work.step)
    source = open_model(place.store, merge_work.step)
    return {name: source.read(name) for name in source.tensors}, record.result if record else {}


def test_without_a_step_it_is_task_arithmetic(pool: Path) -> None:
    expected, _ = model_of(pool, TaskArithmetic(scale=1.0, weights=(0.3, 0.3)))
    actual, _ = model_of(pool, ada(steps=0))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("groups", [{}, {"by": "model"}, {"by": "layers", "parts": True}])
def test_the_table_of_the_record_makes_the_same_model(pool: Path, groups: dict[str, Any]) -> None:
    actual, result = model_of(pool, ada(groups=groups, learning_rate=0.05))
    table = yaml.safe_load(yaml.safe_dump(result["learned"]["coefficients"]))
    again = TaskArithmetic.model_validate({"scale": 1.0, "weights": table})
    expected, _ = model_of(pool, again)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert any(value != 0.3 for row in table["rows"].values() for value in row)
    assert result["learned"]["loss"]["steps"] == 4


def test_it_learns_and_a_step_goes_down(pool: Path) -> None:
    _, result = model_of(pool, ada(batch=12, steps=60, learning_rate=0.02, groups={"by": "model"}))
    assert result["learned"]["loss"]["last"] < result["learned"]["loss"]["first"]


def test_plus_plus_learns_on_trimmed_task_vectors(pool: Path) -> None:
    actual, result = model_of(pool, ada(density=0.4, steps=3))
    base = load_file(pool / "base" / "model.safetensors")
    own = [load_file(pool / name / "model.safetensors") for name in NAMES]
    ties = METHODS["ties"].model_validate({"density": 0.4, "count": "published"})
    kept = {name: (value != base[name].view(-1)) for name, value in model_of(pool, ties)[0].items()}
    for name, value in actual.items():
        assert torch.equal(value != base[name].view(-1), kept[name]), "what TIES leaves is left"
    assert len(own) == 2 and result["learned"]["coefficients"]["rows"]


@pytest.mark.parametrize("moment", [3, 8, 14, 19])
def test_killed_and_gone_on_it_has_the_digest_of_an_undisturbed_run(pool: Path, moment: int, tmp_path: Path) -> None:
    statistic: ModelStatistic = Coefficients(items=12, batch=5, steps=12, learning_rate=0.05)

    def done(folder: Path) -> Any:
        from tests.execution.learned_pool import Moved

        class Only(Moved):
            name = "test_only"

            def arguments(self, block: Any, statistics: Any) -> Any:
                return [statistics["known"][0].numbers["table"]["rows"][block.name][0]]

        place, merge_work = merge_of(folder, Only(statistic=statistic))
        assert not run_for(place, merge_work).failures
        step = merge_work.inputs["known"][0].step
        record = place.store.record(step)
        assert record is not None
        return record.digest, record.result, read_statistic(place.store, step).tensors.read("coefficients").tolist()

    undisturbed = done(write_pool(tmp_path / "undisturbed"))
    assert killed_at(moment, pool, statistic)
    assert done(pool) == undisturbed


def test_bad_input_is_refused_in_words(pool: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"expert 'first' names none; write `tasks: \[\.\.\]`"):
        merge_of(pool, ada(), first=())
    with pytest.raises(SpecError, match="task 'one' has 1 class: its entropy is 0 for any model"):
        learned([Own([Given("one", [[1, 1]], 1)])], steps=1)
    with pytest.raises(NonFiniteError, match=r"task 'one', step 1: the entropy .* is nan"):
        learned([Own([Given("one", [[float("nan"), 1]])])], steps=1)


def test_without_data_it_says_what_to_write(pool: Path, tmp_path: Path) -> None:
    asked = {key: value for key, value in recipe_of(pool).items() if key != "data"}
    with pytest.raises(SpecError, match=r"'coefficients' of expert .* write `data:`"):
        merge_recipe(
            parse_recipe(asked, "recipe"), tmp_path / "out", lambda source: resolve(source.source), InProcess(), silent
        )
    assert not list(tmp_path.glob("out*"))


def test_every_step_is_reported_with_its_loss() -> None:
    told: list[Event] = []
    nothing, statistic = Nothing(), Coefficients(steps=3)
    statistic.compute(Models(BASE, DELTAS), INPUTS, SELECTION, {}, nothing, nothing, told.append)  # type: ignore[arg-type]
    assert [(event.done, event.total, event.unit) for event in told] == [
        (1, 3, "steps"),
        (2, 3, "steps"),
        (3, 3, "steps"),
    ]
    assert told[0].activity == "learn coefficients, loss 2.1234"


def recipe_of(pool: Path, **changes: Any) -> dict[str, Any]:
    return {
        "method": "adamerging",
        "coefficients": {"items": 12, "batch": 5, "steps": 2, "inputs": "test"},
        "base": str(pool / "base"),
        "experts": [{"source": str(pool / name), "name": name, "tasks": [name]} for name in NAMES],
        "data": {"evaluator": "classification", "model": FACTORY, "path": str(pool / "tasks")},
        **changes,
    }


def test_the_card_has_the_table_and_pasting_it_makes_the_model(pool: Path, tmp_path: Path) -> None:
    def made_of(out: str, **changes: Any) -> tuple[dict[str, Tensor], str]:
        asked = {key: value for key, value in recipe_of(pool, **changes).items() if value is not None}
        merge_recipe(
            parse_recipe(asked, "recipe"), tmp_path / out, lambda source: resolve(source.source), InProcess(), silent
        )
        return load_file(tmp_path / out / "model.safetensors"), (tmp_path / out / "README.md").read_text()

    expected, card = made_of("learned")
    told = yaml.safe_load(card.rpartition("```yaml")[2].partition("```")[0])
    assert (
        "*transductive*" in card
        and "unsure of its answers: mean entropy as a share of ln C, first 0." in told["warnings"][0]
    )
    pasted = {"method": "task_arithmetic", "scale": 1.0, "weights": told["coefficients"]}
    actual, _ = made_of("pasted", **pasted, coefficients=None, data=None)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


# --- a language model ------------------------------------------------------------------------------------------------


def test_a_language_model_learns_from_closed_and_open_answers(tmp_path: Path) -> None:
    """A full fine-tune and a LoRA adapter; the first gradient is the finite difference of the loss in merged models."""
    torch.set_num_threads(1)
    base = tiny_lm.write_base(tmp_path / "base", num_hidden_layers=1)
    tiny_lm.write_expert(base, tmp_path / "choice", 1)
    tiny_lm.write_adapter(base, tmp_path / "write", 2)
    tasks = tiny_lm.write_tasks(tmp_path / "tasks")
    experts = tuple(
        ExpertSpec(source=str(tmp_path / name), name=name, tasks=(f"tiny_{name}",)) for name in ("choice", "write")
    )
    pool = resolve_pool(BaseSpec(source=str(base)), experts, None, lambda source: resolve(source.source), silent)
    evaluator = LmEval()
    data = ExpertData(evaluator, tasks, pool.base.companions)
    statistic = Coefficients(groups=Groups(by="model", parts=True), items=6, batch=4, steps=3, learning_rate=0.1)
    work = MergeBuilder(pool, (), None, data).build(AdaMerging(coefficients=statistic), list(pool.experts.values()))
    where = Place(pool, Store(tmp_path / "store"), InProcess(), silent, 1 << 30, evaluator, tasks)
    for snapshot in snapshots_of(pool):
        fetch(where, snapshot)
    assert not run_for(where, work).failures
    learning = work.inputs["coefficients"][0]
    numbers = read_statistic(where.store, learning.step).numbers
    assert set(numbers["at_start"]) == {"tiny_choice", "tiny_write"} and len(numbers["losses"]) == 3
    _, opened = opened_experts(where.pool, where.folders)
    assert list(learning.experts) == [pool.experts[name].id for name in ("choice", "write")], "the recipe's order"
    plain = load_file(base / "model.safetensors")
    folded = [FoldedTensors(MemoryTensors(plain), opened[pool.experts[name].id]) for name in ("choice", "write")]
    full = [{name: own.read(name).view(value.shape).float() for name, value in plain.items()} for own in folded]
    shell = evaluator.open(base, tasks)
    own = [shell.inputs([f"tiny_{name}"], "training", 6, 0, labels=False)[0] for name in ("choice", "write")]

    rows_of = statistic.groups.rows(plain)

    def loss(values: Tensor) -> float:
        merged = {}
        for name, value in plain.items():
            row = values[rows_of.index(statistic.groups.of(name))]
            merged[name] = value + sum(float(f) * (e[name] - value) for f, e in zip(row, full, strict=True))
        shell.swap(MemoryTensors(merged))
        with torch.no_grad():
            return sum(float(mean_entropy(task.logits(shell.model, task.batch(0, 4, 0)))) for task in own)

    start = torch.full((3, 2), 0.3, dtype=torch.float64)
    assert numbers["losses"][0] == pytest.approx(loss(start), abs=1e-4)
    models = OpenedModels(MemoryTensors(plain), [MemoryTensors(expert) for expert in full], None, {}, 1,
                          lambda: shell, lambda: shell)  # fmt: skip
    merged = Merged(statistic, models, learning.selection, {})
    with merged.learning():
        merged.put(start)
        for task in own:
            statistic._backward(task, merged.module, 0)
        gradient = merged.gradient()
    for place in np.ndindex(3, 2):
        ends = []
        for step in (2e-2, -2e-2):
            beside = start.clone()
            beside[place] += step
            ends.append(loss(beside))
        assert float(gradient[place]) == pytest.approx((ends[0] - ends[1]) / 4e-2, abs=5e-4), place
    assert gradient.abs().max() > 1e-3


# --- tables ----------------------------------------------------------------------------------------------------------

LAYERS = [
    *(f"model.layers.{n}.self_attn.q_proj.weight" for n in range(5)),
    *(f"model.layers.{n}.mlp.up_proj.weight" for n in range(5)),
    *(f"model.layers.{n}.input_layernorm.weight" for n in range(5)),
    "model.embed_tokens.weight",
]


def test_groups_by_hand() -> None:
    assert Groups().rows(LAYERS) == tuple(sorted(LAYERS))
    assert Groups(by="model").rows(LAYERS) == ("all",)
    pairs = Groups(by="layers", every=2).rows(LAYERS)
    assert set(pairs) == {"others", "model.layers.0-1", "model.layers.2-3", "model.layers.4-5"}
    parts = Groups(by="layers", parts=True)
    assert parts.of(LAYERS[1]) == "model.layers.1 attention" and parts.of(LAYERS[7]) == "model.layers.2 mlp"
    assert parts.of(LAYERS[14]) == "model.layers.4 rest" and parts.of(LAYERS[15]) == "others"


@pytest.mark.parametrize(
    ("tensor", "part"),
    [
        ("bert.encoder.layer.3.attention.output.dense.weight", "attention"),
        ("bert.encoder.layer.3.attention.output.LayerNorm.weight", "rest"),
        ("bert.encoder.layer.3.intermediate.dense.bias", "mlp"),
        ("bert.encoder.layer.3.output.dense.weight", "mlp"),
        ("transformer.h.0.attn.c_attn.weight", "attention"),
        ("transformer.h.0.mlp.c_fc.weight", "mlp"),
        ("transformer.h.0.ln_1.weight", "rest"),
        ("encoder.block.2.layer.0.SelfAttention.q.weight", "attention"),
        ("encoder.block.2.layer.1.DenseReluDense.wi.weight", "mlp"),
        ("model.layers.0.block_sparse_moe.experts.3.w1.weight", "mlp"),
        ("model.decoder.layers.0.fc1.weight", "mlp"),
        ("distilbert.transformer.layer.0.ffn.lin1.weight", "mlp"),
        ("layers.0.weight", "rest"),
    ],
)
def test_parts_of_layers(tensor: str, part: str) -> None:
    assert part_of(tensor) == part


def test_a_table_moves_with_its_experts_and_must_fit() -> None:
    base = {name: torch.full((2,), 1.0) for name in LAYERS}
    experts = [{name: value + number for name, value in base.items()} for number in (1.0, 10.0)]
    rows = {"all attention": [1, 0.5], "all mlp": [0, 0.25]}
    weights = {"groups": {"by": "model", "parts": True}, "rows": rows, "others": [0.5, 0]}
    method = TaskArithmetic.model_validate({"scale": 2.0, "weights": weights})
    for ids in (["a", "b"], ["b", "a"]):
        merged = merge(method, base=base, experts=experts, ids=ids)
        assert merged[LAYERS[0]].tolist() == [13.0] * 2 and merged[LAYERS[5]].tolist() == [6.0] * 2
        assert merged["model.embed_tokens.weight"].tolist() == [2.0] * 2
    for change, said in (
        ({"others": None}, r"task_arithmetic\.weights\.rows: tensor .* is of the group 'all rest', which has no row"),
        ({"rows": {**rows, "all atention": [1, 1]}}, "has no group 'all atention'; did you mean 'all attention'"),
        ({"others": [1]}, "the row 'others' has 1 numbers for 2 experts"),
    ):
        wrong = TaskArithmetic.model_validate({"scale": 2.0, "weights": {**weights, **change}})
        with pytest.raises(SpecError, match=said):
            merge(wrong, base=base, experts=experts, ids=["a", "b"])


@pytest.mark.parametrize(
    "weights",
    [
        {"rows": {"a": [True, 1]}},
        {"rows": {}},
        {"rows": {"a": ["x"]}},
        {"groups": {"by": "tensor", "parts": True}, "rows": {"a": [1]}},
        {"groups": {"by": "model", "every": 2}, "rows": {"all": [1]}},
        {"rows": {"a": [1]}, "other": [1]},
    ],
)
def test_tables_that_say_nothing_are_refused(weights: Any) -> None:
    with pytest.raises(ValueError, match="validation error"):
        TaskArithmetic.model_validate({"scale": 1.0, "weights": weights})
    assert Table.model_validate({"rows": {"a": [1]}}).at("a") == (1.0,)
