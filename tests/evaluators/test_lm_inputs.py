"""Items without their answers: no token of an answer is shown, closed answers have the sums of lm-eval, one digest each."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from safetensors.torch import load_file

from mergecore.errors import EvaluationError, SpecError
from mergecore.evaluators import lm_tasks
from mergecore.evaluators.lm_eval import LmEval
from mergecore.evaluators.lm_shell import slots_of
from mergecore.events import silent
from mergecore.plugins.evaluator import Resident
from mergecore.tensors.memory import MemoryTensors
from tests import tiny_lm

BOTH = ("tiny_choice", "tiny_write")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm_inputs")
    tiny_lm.write_base(folder / "base", num_hidden_layers=1)
    tiny_lm.write_tasks(folder / "tasks")
    return folder


@pytest.fixture(scope="module")
def resident(place: Path) -> Resident:
    torch.set_num_threads(1)
    shell = LmEval().open(place / "base", place / "tasks")
    shell.swap(MemoryTensors(load_file(place / "base" / "model.safetensors")))
    return shell


def test_closed_answers_have_the_sums_that_are_scored(place: Path, resident: Resident) -> None:
    """On test items: Σ log p of every option, as the table of the evaluation has them; labels are its targets."""
    task = LmEval().resolve(["tiny_choice"], "test", place / "tasks")["tiny_choice"]
    table = resident.score(task, silent).to_pylist()
    scored = {row["document"]: row for row in table}
    (inputs,) = resident.inputs(["tiny_choice"], "test", 5, 0, labels=True)
    logits, labels = inputs.logits(resident.model, range(5)), inputs.labels(range(5))
    assert logits.requires_grad and logits.shape == (5, inputs.classes) and len(inputs) == 5
    for document, row, right in zip(inputs.documents, logits.tolist(), labels.tolist(), strict=True):
        expected = scored[document]["loglikelihoods"]
        assert row[: len(expected)] == pytest.approx(expected, abs=1e-4)
        assert scored[document]["score"] == float(max(range(len(expected)), key=expected.__getitem__) == right)


def shown(resident: Resident, run: object) -> list[list[int]]:
    """The rows of token ids that the model is shown by `run`."""
    rows: list[list[int]] = []
    hook = resident.model.register_forward_pre_hook(
        lambda _, arguments, named: rows.extend((arguments[0] if arguments else named["input_ids"]).tolist()),
        with_kwargs=True,
    )
    try:
        run()  # type: ignore[operator]
    finally:
        hook.remove()
    return rows


def test_no_token_of_the_answer_is_shown(place: Path, resident: Resident) -> None:
    """What a model is shown is the same whichever answer is right."""
    other = tiny_lm.write_tasks(place / "swapped")
    for path in (other / "data").glob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            line["answer"] = (line["answer"] + 1) % len(line["options"]) if "options" in line else line["answer"] + " q"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    swapped = LmEval().open(place / "base", other)
    swapped.swap(MemoryTensors(load_file(place / "base" / "model.safetensors")))
    for name in BOTH:
        rows = []
        for shell in (resident, swapped):
            (inputs,) = shell.inputs([name], "training", 10**6, 0, labels=False)
            every = range(len(inputs))
            rows.append(sorted(shown(shell, lambda i=inputs, s=shell, e=every: i.run(s.model, e))))
            rows.append(sorted(shown(shell, lambda i=inputs, s=shell, e=every: i.logits(s.model, e))))
            with pytest.raises(SpecError, match="labels: none"):
                inputs.labels([0])
        assert rows[0] == rows[2] and rows[1] == rows[3] and rows[0]


def test_open_answers_are_looked_at_in_their_first_place(resident: Resident) -> None:
    (inputs,) = resident.inputs(["tiny_write"], "training", 3, 0, labels=True)
    assert inputs.classes is None
    logits = inputs.logits(resident.model, range(3))
    contexts = shown(resident, lambda: inputs.run(resident.model, [1]))
    torch.testing.assert_close(logits[1], resident.model(torch.tensor(contexts)).logits[0, -1], atol=1e-5, rtol=1e-5)
    calibration = resident.calibration(["tiny_write"], 3, 0)
    first = [labels[0] for labels in calibration.labels(range(3))]
    assert inputs.labels(range(3)).tolist() == [int(label) for label in first]
    assert list(inputs.documents) == list(calibration.documents), "one digest for every reader"  # type: ignore[attr-defined]


def test_one_digest_for_every_reader(place: Path, resident: Resident, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scored tables, what is drawn, and what planning reads of the files: also where some documents lack a field."""
    folder = place / "tasks"
    path = folder / "data" / "choice.train.jsonl"
    before = path.read_text()
    lines = [json.loads(line) for line in before.splitlines()]
    lines[0] |= {"note": 'é"x', "number": 3}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    try:
        evaluator = LmEval()
        drawn = evaluator.drawn(["tiny_choice", "tiny_write"], "training", 7, 3, folder)
        inputs = resident.inputs(["tiny_choice", "tiny_write"], "training", 7, 3, labels=False)
        assert drawn == {document for own in inputs for document in own.documents}
        monkeypatch.setattr(lm_tasks.TaskFile, "documents", lambda self, split: None)
        assert evaluator.drawn(["tiny_choice", "tiny_write"], "training", 7, 3, folder) == drawn
    finally:
        path.write_text(before)
    monkeypatch.undo()
    for task in LmEval(limit=6).resolve(BOTH, "test", folder).values():
        table = resident.score(task, silent)
        assert LmEval().documents(task, folder) == set(table["document"].to_pylist())


def test_what_the_reader_may_change_is_left_to_the_reader() -> None:
    plain = [{"a": "x", "b": 1}, {"a": "y", "c": [1, 2]}]
    assert lm_tasks._as_read(plain) == [{"a": "x", "b": 1, "c": None}, {"a": "y", "b": None, "c": [1, 2]}]
    for changed in ({"b": 1.5}, {"a": "2020-01-02"}, {"a": {"deep": 1}}, {"c": 3}, {"c": ["x"]}):
        assert lm_tasks._as_read([*plain, changed]) is None


def test_refusals(place: Path, resident: Resident) -> None:
    with pytest.raises(EvaluationError, match="no items to look at"):
        resident.inputs(BOTH, "training", 1, 0, labels=False)


def test_fused_experts_are_found_as_slices() -> None:
    """Every tensor of a Mixtral checkpoint, in transformers' fused parameters: the slice holds its very numbers."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=32, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, max_position_embeddings=16,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    from transformers.core_model_loading import revert_weight_conversion

    saved = {name: value.contiguous() for name, value in revert_weight_conversion(model, model.state_dict()).items()}
    tensors = MemoryTensors(saved).tensors
    assert any(".experts.2.w1." in name for name in saved)
    slots = slots_of(model, tensors, saved)
    state = model.state_dict()
    for name, slot in slots.items():
        assert torch.equal(slot.of(state[slot.parameter]), saved[name]), name
