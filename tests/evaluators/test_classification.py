"""The resident classifier on the digits tier: in place equals afresh, BatchNorm recalibrated, refusals by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergecore.errors import EvaluationError, MismatchError, NonFiniteError, SpecError
from mergecore.evaluators.classification import Classification
from mergecore.events import silent
from mergecore.identity.keys import digest
from mergecore.tensors.memory import MemoryTensors
from tests.digits import CHANGES, CONFIG, FACTORY, DigitsTier, digits_cnn


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def merged(tier: DigitsTier, names: list[str], scale: float) -> dict[str, Tensor]:
    base, experts = tensors_in(tier.base), [tensors_in(tier.experts[name]) for name in names]
    return {
        name: value + scale * sum(expert[name] - value for expert in experts) if value.is_floating_point() else value
        for name, value in base.items()
    }


def accuracy(evaluator: Classification, weights: dict[str, Tensor], tier: DigitsTier, tasks: list[str]) -> float:
    resident = evaluator.open(tier.base, tier.tasks)
    resident.swap(MemoryTensors(weights))
    identities = evaluator.resolve(tasks, "test", tier.tasks)
    return float(np.mean([resident.score(identities[name], silent)["score"].to_numpy().mean() for name in tasks]))


def test_tier_is_what_it_says(tier: DigitsTier) -> None:
    plain = Classification(model=FACTORY, recalibrate="none")
    tasks = list(CHANGES)
    assert accuracy(plain, tensors_in(tier.base), tier, ["upright"]) > 0.97
    assert accuracy(plain, tensors_in(tier.base), tier, tasks) < 0.4
    assert np.mean([accuracy(plain, tensors_in(tier.experts[name]), tier, [name]) for name in tasks]) > 0.95


def test_swapped_equals_afresh(tier: DigitsTier) -> None:
    evaluator = Classification(model=FACTORY, recalibrate="none", batch_size=64)
    task = evaluator.resolve(["mirror"], "test", tier.tasks)["mirror"]
    resident = evaluator.open(tier.base, tier.tasks)
    tables = []
    for name in ("rows", "mirror", "rows"):
        resident.swap(MemoryTensors(tensors_in(tier.experts[name])))
        tables.append(resident.score(task, silent))
    assert tables[0].equals(tables[2]) and not tables[0].equals(tables[1])
    model = digits_cnn(CONFIG).eval()
    model.load_state_dict(tensors_in(tier.experts["rows"]))
    with np.load(tier.tasks / "mirror.npz") as data:
        inputs, labels = torch.from_numpy(data["test.inputs"]), data["test.labels"]
    with torch.no_grad():
        expected = torch.cat([model(batch) for batch in inputs.split(64)]).double().log_softmax(-1)
    assert tables[0]["loglikelihoods"].to_pylist() == expected.tolist()
    assert tables[0]["prediction"].to_pylist() == [str(label) for label in expected.argmax(-1).tolist()]
    assert tables[0]["score"].to_pylist() == (expected.argmax(-1).numpy() == labels).astype(float).tolist()
    assert len(set(tables[0]["document"].to_pylist())) == 500


def test_recalibration_lifts_merges(tier: DigitsTier) -> None:
    tasks = list(CHANGES)[:4]
    weights = merged(tier, tasks, 0.4)
    none = accuracy(Classification(model=FACTORY, recalibrate="none"), weights, tier, tasks)
    pooled = accuracy(Classification(model=FACTORY, recalibration_tasks=tuple(tasks)), weights, tier, tasks)
    own = accuracy(Classification(model=FACTORY), weights, tier, tasks)
    assert own > pooled > none + 0.05


def test_recalibrated_statistics_are_those_of_the_data(tier: DigitsTier) -> None:
    evaluator = Classification(model=FACTORY, recalibration_tasks=("mirror", "rows"), recalibration_items=100)
    resident = evaluator.open(tier.base, tier.tasks)
    resident.swap(MemoryTensors(tensors_in(tier.experts["mirror"])))
    drawn = resident.calibration(["mirror", "rows"], 100, 0)
    model = resident.model
    assert isinstance(model, torch.nn.Sequential)
    with torch.no_grad():  # one batch of 100: its own mean and (unbiased) variance, channel by channel
        first = model[0](drawn.inputs)  # type: ignore[attr-defined]
    torch.testing.assert_close(model[1].running_mean, first.mean((0, 2, 3)))
    torch.testing.assert_close(model[1].running_var, first.var((0, 2, 3)))
    assert not any(module.training for module in model.modules())
    again = evaluator.open(tier.base, tier.tasks)
    again.swap(MemoryTensors(tensors_in(tier.experts["rows"])))
    again.swap(MemoryTensors(tensors_in(tier.experts["mirror"])))
    for name, value in model.state_dict().items():
        if "num_batches" not in name:
            assert torch.equal(value, again.model.state_dict()[name])


def test_weights_that_do_not_fit(tier: DigitsTier) -> None:
    evaluator = Classification(model=FACTORY)
    resident = evaluator.open(tier.base, tier.tasks)
    task = evaluator.resolve(["rows"], "test", tier.tasks)["rows"]
    with pytest.raises(EvaluationError, match="no weights"):
        resident.score(task, silent)
    weights = tensors_in(tier.base)
    for change, said in (
        ({"4.running_var": None}, "missing: '4.running_var'"),
        ({"99.bias": weights["14.bias"]}, "'99.bias'"),
    ):
        with pytest.raises(MismatchError, match=said):
            resident.swap(
                MemoryTensors({name: value for name, value in {**weights, **change}.items() if value is not None})
            )
    with pytest.raises(NonFiniteError, match=r"14\.bias"):
        resident.swap(MemoryTensors({**weights, "14.bias": weights["14.bias"] / 0}))
    resident.swap(MemoryTensors(weights))
    with torch.no_grad():
        resident.model.get_parameter("14.bias")[3] = torch.nan
    with pytest.raises(NonFiniteError, match="item 0"):
        resident.score(task, silent)


def test_identity_and_splits(tier: DigitsTier, tmp_path: Path) -> None:
    evaluator = Classification(model=FACTORY, limit=50)
    test, validation = (evaluator.resolve(["rows"], split, tier.tasks)["rows"] for split in ("test", "validation"))  # type: ignore[arg-type]
    assert test.items == 50 and test.metric == "acc" and test.identity != validation.identity
    assert str(tier.tasks) not in json.dumps(test.identity)
    digest(test.identity)
    with np.load(tier.tasks / "rows.npz") as data:
        save_file({name: torch.from_numpy(data[name]) for name in data.files}, tmp_path / "rows.safetensors")
    resident = evaluator.open(tier.base, tmp_path)
    resident.swap(MemoryTensors(tensors_in(tier.experts["rows"])))
    with pytest.raises(EvaluationError, match="not what it was"):
        resident.score(test, silent)
    there = evaluator.resolve(["rows"], "test", tmp_path)["rows"]
    here = evaluator.open(tier.base, tier.tasks)
    here.swap(MemoryTensors(tensors_in(tier.experts["rows"])))
    assert here.score(test, silent).equals(resident.score(there, silent)) and there != test
    pooled = Classification(model=FACTORY, recalibration_tasks=("mirror",)).resolve(["rows"], "test", tier.tasks)[
        "rows"
    ]
    assert "mirror" in pooled.identity["data"]["recalibration"]


def test_refusals(tier: DigitsTier, tmp_path: Path) -> None:
    evaluator = Classification(model=FACTORY)
    with pytest.raises(EvaluationError, match="did you mean 'mirror'"):
        evaluator.resolve(["miror"], "test", tier.tasks)
    np.savez(tmp_path / "bare.npz", **{"train.inputs": np.zeros((2, 1)), "train.labels": np.zeros(2)})
    with pytest.raises(EvaluationError, match=r"no test.labels; its file has: train.inputs, train.labels"):
        evaluator.resolve(["bare"], "test", tmp_path)
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(EvaluationError, match=r"torn\.npz cannot be read"):
        evaluator.resolve(["torn"], "test", tmp_path)
    with pytest.raises(EvaluationError, match=r"config\.json"):
        evaluator.open(tmp_path, tier.tasks)
    with pytest.raises(SpecError, match="did you mean 'digits_cnn'"):
        Classification(model="examples.make_digits:digit_cnn").open(tier.base, tier.tasks)


def test_calibration_is_drawn_by_hash(tier: DigitsTier) -> None:
    resident = Classification(model=FACTORY).open(tier.base, tier.tasks)
    resident.swap(MemoryTensors(tensors_in(tier.base)))
    drawn = resident.calibration(["mirror", "rows", "half"], 10, seed=0)
    assert len(drawn) == 10 and len(set(drawn.documents)) == 10  # type: ignore[attr-defined]
    assert drawn.documents != resident.calibration(["mirror", "rows", "half"], 10, seed=1).documents  # type: ignore[attr-defined]
    logits = drawn.logits(resident.model, [3, 1])
    assert [row.shape for row in logits] == [(1, 10), (1, 10)] and logits[0].requires_grad
    torch.testing.assert_close(logits[1], drawn.logits(resident.model, [1])[0])
    assert [labels.tolist() for labels in drawn.labels([3])] == [[int(drawn.targets[3])]]  # type: ignore[attr-defined]
