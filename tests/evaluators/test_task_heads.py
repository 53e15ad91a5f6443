"""Tasks with frozen heads of their own, and sentence encoders that give the features for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import Tensor, nn

from mergecore.errors import EvaluationError, SpecError
from mergecore.evaluators.classification import Classification
from mergecore.evaluators.sentence_encoder import STEP, SentenceEncoder, first_token, mean_pooled
from mergecore.events import silent
from mergecore.tensors.memory import MemoryTensors

WIDTH = 3
MATRIX = torch.linspace(-1, 1, WIDTH * 4).reshape(WIDTH, 4)


def features(config: Mapping[str, Any]) -> nn.Module:
    """Three features of four inputs."""
    return nn.Linear(4, WIDTH, bias=False)


def write_task(path: Path, classes: int, seed: int, **changes: Any) -> dict[str, Any]:
    """A task of so many classes, with a head; return its arrays."""
    draw = np.random.default_rng(seed)
    arrays: dict[str, Any] = {
        "head.weight": draw.normal(size=(classes, WIDTH)).astype(np.float32),
        "head.bias": draw.normal(size=classes).astype(np.float32),
    }
    for split, items in (("train", 12), ("test", 9)):
        arrays[f"{split}.inputs"] = draw.normal(size=(items, 4)).astype(np.float32)
        arrays[f"{split}.labels"] = draw.integers(0, classes, items)
    arrays = {name: value for name, value in {**arrays, **changes}.items() if value is not None}
    save_file(arrays, path)
    return arrays


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Tasks of two and of five classes, and the config of their model beside them."""
    (tmp_path / "config.json").write_text("{}")
    sizes = {"two": 2, "five": 5}
    return {name: write_task(tmp_path / f"{name}.safetensors", size, size) for name, size in sizes.items()}


EVALUATOR = Classification(model=f"{__name__}:features", batch_size=4)


def expected(arrays: Mapping[str, Any], split: str) -> Any:
    """log softmax of (x Mᵀ) Hᵀ + b, in float64."""
    head = arrays["head.weight"].astype(np.float64)
    bias = np.zeros(len(head)) if "head.bias" not in arrays else arrays["head.bias"].astype(np.float64)
    logits = arrays[f"{split}.inputs"].astype(np.float64) @ MATRIX.double().numpy().T @ head.T + bias
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_scores_are_those_of_the_task_s_own_head(tasks: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    resident = EVALUATOR.open(tmp_path, tmp_path)
    resident.swap(MemoryTensors({"weight": MATRIX}))
    for name, identity in EVALUATOR.resolve(list(tasks), "test", tmp_path).items():
        table, logs = resident.score(identity, silent), expected(tasks[name], "test")
        assert np.allclose(np.array(table["loglikelihoods"].to_pylist()), logs, atol=1e-6)
        assert table["score"].to_pylist() == (logs.argmax(-1) == tasks[name]["test.labels"]).astype(float).tolist()


def test_statistics_see_each_item_through_its_head(tasks: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    """Items of several tasks in one batch have as many classes as their own task."""
    resident = EVALUATOR.open(tmp_path, tmp_path)
    resident.swap(MemoryTensors({"weight": MATRIX}))
    drawn = resident.calibration(list(tasks), 10, 0)
    rows = drawn.logits(resident.model, range(len(drawn)))
    assert sorted(row.shape[1] for row in rows) == [2] * 5 + [5] * 5
    for inputs, name in zip(resident.inputs(list(tasks), "training", 8, 0, False), tasks, strict=True):
        assert inputs.classes == len(tasks[name]["head.weight"])
        logits = inputs.logits(resident.model, range(len(inputs)))
        assert logits.shape == (4, inputs.classes) and logits.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head.weight": np.zeros((2, 7), np.float32)}, r"gives \[3\] numbers an item.*takes 7"),
        ({"head.bias": np.zeros(3, np.float32)}, r"head.bias \[3\] must be finite, of shapes"),
        ({"head.weight": np.full((2, WIDTH), np.nan, np.float32)}, "must be finite"),
        ({"test.labels": np.arange(9)}, "labels go from 0 to 8, and its head has 2 classes"),
    ],
)
def test_heads_that_do_not_fit(
    tasks: dict[str, dict[str, Any]], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    write_task(tmp_path / "two.safetensors", 2, 2, **changes)
    resident = EVALUATOR.open(tmp_path, tmp_path)
    resident.swap(MemoryTensors({"weight": MATRIX}))
    with pytest.raises(EvaluationError, match=message):
        resident.score(EVALUATOR.resolve(["two"], "test", tmp_path)["two"], silent)


CONFIG = {
    "model_type": "bert", "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def bert() -> nn.Module:
    """A small encoder with random weights."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    own = {key: value for key, value in CONFIG.items() if key != "model_type"}
    return BertModel(BertConfig(**own)).eval()


def texts() -> list[list[int]]:
    return [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25], [3]]


def padded(rows: list[list[int]], width: int = 40) -> Tensor:
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])


@pytest.mark.parametrize("factory", [mean_pooled, first_token])
def test_embeddings_are_the_encoder_s(factory: Any) -> None:
    """Each text alone, without padding, through transformers' own model; names are those of its checkpoints."""
    reference, encoder = bert(), factory(CONFIG).eval()
    assert encoder.state_dict().keys() == reference.state_dict().keys()
    encoder.load_state_dict(reference.state_dict())
    with torch.no_grad():
        embeddings = encoder(padded(texts()))
        for row, embedding in zip(texts(), embeddings, strict=True):
            states = reference(input_ids=torch.tensor([row])).last_hidden_state[0]
            wanted = states[0] if factory is first_token else states.mean(0)
            assert torch.allclose(embedding, wanted / wanted.norm(), atol=1e-5)


def test_a_batch_is_cut_behind_its_longest_text(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = mean_pooled(CONFIG).eval()
    assert isinstance(encoder, SentenceEncoder)
    widths: list[int] = []
    inner = encoder._inner[0]
    monkeypatch.setattr(inner, "forward", _noted(inner.forward, widths))
    for rows in (texts()[:1], texts()):
        encoder(padded(rows))
    assert widths == [STEP, 2 * STEP]


def _noted(forward: Any, widths: list[int]) -> Any:
    def noted(**inputs: Tensor) -> Any:
        widths.append(inputs["input_ids"].shape[1])
        return forward(**inputs)

    return noted


def test_a_published_checkpoint_fits(tmp_path: Path) -> None:
    """Files of older versions hold the positions, a constant, beside the weights."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    evaluator = Classification(model="mergecore.evaluators.sentence_encoder:mean_pooled")
    positions = {"embeddings.position_ids": torch.arange(64)[None]}
    evaluator.open(tmp_path, None).swap(MemoryTensors({**bert().state_dict(), **positions}))


def test_a_config_without_padding_is_refused() -> None:
    with pytest.raises(SpecError, match="model_type and pad_token_id"):
        mean_pooled({key: value for key, value in CONFIG.items() if key != "pad_token_id"})
