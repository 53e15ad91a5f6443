"""The resident language model: the numbers of a fresh lm-eval process, nothing of the model before, refusals by
name.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mergecore.errors import EvaluationError, MismatchError, NonFiniteError
from mergecore.evaluators import lm_tasks as task_files
from mergecore.evaluators.lm_eval import LmEval
from mergecore.evaluators.lm_results import results_json
from mergecore.events import Event, silent
from mergecore.identity.keys import digest
from mergecore.plugins.evaluator import Resident
from mergecore.plugins.own_code import put_on_path
from mergecore.reporting.scales import higher_is_better, shown
from mergecore.tensors.memory import MemoryTensors
from tests import tiny_lm

FRESH = """
import json, sys
import torch
torch.set_num_threads(1)
import lm_eval
from lm_eval.tasks import TaskManager
found = []
for case in json.loads(sys.argv[1]):
    made = lm_eval.simple_evaluate(
        model="hf", model_args=case["model"], device="cpu", tasks=[case["task"]], random_seed=1234, bootstrap_iters=0,
        task_manager=TaskManager(include_path=case["folder"], include_defaults=False), **case["settings"])
    kept = {key: made[key][case["task"]] for key in ("samples", "results", "higher_is_better", "n-samples", "n-shot")}
    found.append(kept)
print("FOUND" + json.dumps(found, default=str))
"""

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "choice": ("tiny_choice", "test", {}),
    "bfloat16": ("tiny_choice", "test", {"limit": 30, "num_fewshot": 2, "dtype": "bfloat16", "batch_size": 7}),
    "chat": (
        "tiny_choice",
        "validation",
        {"apply_chat_template": True, "system_instruction": "Say.", "num_fewshot": 1},
    ),
    "uncached": ("tiny_choice", "test", {"logits_cache": False, "limit": 12}),
    "written": ("tiny_write", "test", {"limit": 12}),
    "rolling": ("tiny_roll", "test", {"limit": 5}),
    "last word": ("tiny_last", "test", {"limit": 12}),
    "two filters": ("tiny_filtered", "test", {"limit": 12, "num_fewshot": 1}),
}

ROLL = """
include: tiny_choice.yaml
task: tiny_roll
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_choice: null
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
LAST = """
include: tiny_write.yaml
task: tiny_last
output_type: loglikelihood
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
FILTERED = """
include: tiny_write.yaml
task: tiny_filtered
doc_to_target: "a"
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}
filter_list:
  - {name: strict, filter: [{function: take_first}]}
  - {name: letter, filter: [{function: regex, regex_pattern: "([a-m])"}, {function: take_first}]}
metadata: {version: 1, primary_filter: letter}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("language")
    tiny_lm.write_base(folder / "base")
    for seed in (1, 2):
        tiny_lm.write_expert(folder / "base", folder / f"expert-{seed}", seed)
    tiny_lm.write_tasks(folder / "tasks")
    for name, text in (("roll", ROLL), ("last", LAST), ("filtered", FILTERED)):
        (folder / "tasks" / f"tiny_{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def resident(place: Path) -> Resident:
    return LmEval().open(place / "base", place / "tasks")


def weights(folder: Path) -> MemoryTensors:
    return MemoryTensors(load_file(folder / "model.safetensors"))


def fresh_case(place: Path, task: str, split: str, fields: dict[str, Any]) -> dict[str, Any]:
    """What simple_evaluate is told, for the same as `fields`; the split is exchanged in a copy of the task file."""
    folder = place / f"fresh-{split}"
    folder.mkdir(exist_ok=True)
    for path in (place / "tasks").glob("*.yaml"):
        text = path.read_text().replace("data/", f"{place}/tasks/data/")
        (folder / path.name).write_text(text.replace("test_split: test", f"test_split: {split}"))
    settings = {"limit": None, "num_fewshot": None, "batch_size": 16, **fields}
    model = {"pretrained": str(place / "expert-2"), "dtype": settings.pop("dtype", "float32")}
    model["logits_cache"] = settings.pop("logits_cache", True)
    return {"model": model, "task": task, "folder": str(folder), "settings": settings}


@pytest.fixture(scope="module")
def fresh(place: Path) -> dict[str, Any]:
    cases = json.dumps([fresh_case(place, *case) for case in CASES.values()])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(place / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", FRESH, cases], check=False, capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(CASES, json.loads(done.stdout.split("FOUND")[1]), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_swapped_equals_fresh_process(place: Path, fresh: dict[str, Any], name: str) -> None:
    task, split, fields = CASES[name]
    evaluator = LmEval(**fields)
    identity = evaluator.resolve([task], split, place / "tasks")[task]  # type: ignore[arg-type]
    resident = evaluator.open(place / "base", place / "tasks")
    for model in ("base", "expert-1"):
        resident.swap(weights(place / model))
        resident.score(identity, silent)
    resident.swap(weights(place / "expert-2"))
    rows = resident.score(identity, silent).to_pylist()
    filtered = identity.metric.partition(",")[2] or "none"
    samples = [sample for sample in fresh[name]["samples"] if sample["filter"] == filtered]
    samples.sort(key=lambda sample: int(sample["doc_id"]))
    assert len(rows) == len(samples) == identity.items
    for row, sample in zip(rows, samples, strict=True):
        assert row["document"] == sample["doc_hash"]
        if task == "tiny_choice":
            assert row["score"] == sample["acc"] and row["acc_norm"] == sample["acc_norm"]
            likelihoods = [float(response[0][0]) for response in sample["resps"]]
            assert row["loglikelihoods"] == pytest.approx(likelihoods, abs=1e-6)
        elif task in ("tiny_write", "tiny_filtered"):
            assert row["prediction"] == sample["filtered_resps"][0] and row["score"] == sample["exact_match"]
        elif task == "tiny_roll":
            assert row["loglikelihoods"] == pytest.approx([float(sample["filtered_resps"][0])], rel=1e-6)
    table = resident.score(identity, silent)
    ours, theirs = results_json(table, identity), fresh[name]
    assert ours["results"][task].keys() == theirs["results"].keys()
    for key, value in theirs["results"].items():
        assert "_stderr," in key or ours["results"][task][key] == pytest.approx(value), key
    for part in ("higher_is_better", "n-samples", "n-shot"):
        assert ours[part][task] == theirs[part]
    metric, _, chosen = identity.metric.partition(",")
    mean = float(np.mean(table["score"].to_numpy()))  # what tables show is lm-eval's number of the primary metric
    assert shown(identity.scale, mean) == pytest.approx(theirs["results"][f"{metric},{chosen or 'none'}"])
    assert higher_is_better(identity.scale) == theirs["higher_is_better"][metric]


def test_a_primary_metric_and_filter_are_chosen(place: Path, resident: Resident) -> None:
    """In the spec; only the task's own key changes, and what was second is a column."""
    names = ["tiny_choice", "tiny_filtered"]
    before = LmEval().resolve(names, "test", place / "tasks")
    assert before["tiny_filtered"].metric == "exact_match,letter"
    chosen = LmEval(primary={"tiny_choice": "acc_norm"})
    after = chosen.resolve(names, "test", place / "tasks")
    assert after["tiny_filtered"] == before["tiny_filtered"] and after["tiny_choice"].metric == "acc_norm"
    assert after["tiny_choice"].identity != before["tiny_choice"].identity
    assert chosen.parameters() == LmEval().parameters()
    other = chosen.open(place / "base", place / "tasks")
    for shell in (other, resident):
        shell.swap(weights(place / "expert-1"))
    plain, normed = resident.score(before["tiny_choice"], silent), other.score(after["tiny_choice"], silent)
    assert plain["acc_norm"].to_pylist() == normed["score"].to_pylist()
    assert normed["acc"].to_pylist() == plain["score"].to_pylist()
    both = resident.score(before["tiny_filtered"], silent)
    assert "exact_match,strict" in both.column_names


def test_lower_is_better_is_scored_by_what_is_better(place: Path, tmp_path: Path) -> None:
    folder = tiny_lm.write_tasks(tmp_path / "tasks")
    text = (folder / "tiny_choice.yaml").read_text()
    (folder / "tiny_choice.yaml").write_text(text.replace("higher_is_better: true", "higher_is_better: false", 1))
    task = LmEval().resolve(["tiny_choice"], "test", folder)["tiny_choice"]
    shell = LmEval().open(place / "base", folder)
    shell.swap(weights(place / "expert-1"))
    table = shell.score(task, silent)
    share = results_json(table, task)["results"]["tiny_choice"]["acc,none"]
    assert 0 < share < 1 and shown(task.scale, np.mean(table["score"].to_numpy())) == pytest.approx(share)


def test_standard_errors_and_tables_of_before(place: Path, resident: Resident) -> None:
    """A table that an older version wrote has no sums: means and perplexities come from its items."""
    resident.swap(weights(place / "expert-1"))
    identities = LmEval().resolve(["tiny_choice", "tiny_last"], "test", place / "tasks")
    for task in identities.values():
        table = resident.score(task, silent)
        new, old = (results_json(each, task) for each in (table, table.replace_schema_metadata(None)))
        assert old["higher_is_better"] == new["higher_is_better"]
        assert old["results"][task.task].keys() == new["results"][task.task].keys()
        for key, value in new["results"][task.task].items():
            assert old["results"][task.task][key] == (pytest.approx(value) if isinstance(value, float) else value), key
    values = resident.score(identities["tiny_choice"], silent)["score"].to_pylist()
    error = statistics.stdev(values) / len(values) ** 0.5
    table = resident.score(identities["tiny_choice"], silent)
    assert results_json(table, identities["tiny_choice"])["results"]["tiny_choice"]["acc_stderr,none"] == pytest.approx(
        error
    )


def test_two_models_after_each_other(place: Path, resident: Resident) -> None:
    task = LmEval().resolve(["tiny_choice"], "test", place / "tasks")["tiny_choice"]
    scores = []
    for name in ("expert-1", "expert-2", "expert-1"):
        resident.swap(weights(place / name))
        scores.append(resident.score(task, silent))
    assert scores[0].equals(scores[2])
    assert scores[0]["loglikelihoods"] != scores[1]["loglikelihoods"]


def test_progress_is_told_in_items(place: Path, resident: Resident) -> None:
    task = LmEval().resolve(["tiny_choice"], "test", place / "tasks")["tiny_choice"]
    resident.swap(weights(place / "base"))
    told: list[Event] = []
    resident.score(task, told.append)
    assert told[-1].done == told[-1].total == 40 and told[-1].unit == "items" and len(told) > 1


def test_nothing_left_over(place: Path, resident: Resident) -> None:
    task = LmEval().resolve(["tiny_choice"], "test", place / "tasks")["tiny_choice"]
    tensors = load_file(place / "base" / "model.safetensors")
    norm = "model.layers.1.input_layernorm.weight"

    def refused(changes: dict[str, torch.Tensor | None], error: type[Exception], said: str) -> None:
        changed = {name: value for name, value in {**tensors, **changes}.items() if value is not None}
        with pytest.raises(error, match=said):
            resident.swap(MemoryTensors(changed))
        with pytest.raises(EvaluationError, match="no weights"):
            resident.score(task, silent)

    refused({norm: None}, MismatchError, f"missing: '{norm}'")
    refused({"model.layers.9.oddity": tensors[norm]}, MismatchError, "not part of the model: 'model.layers.9.oddity'")
    refused({norm: tensors[norm][:-1].clone()}, MismatchError, rf"{norm}' has shape \[63\]")
    refused({norm: torch.full_like(tensors[norm], torch.nan)}, NonFiniteError, norm)
    refused({norm: tensors[norm].to(torch.int64)}, MismatchError, norm)
    other = tensors["model.embed_tokens.weight"] + 1
    refused({"lm_head.weight": other}, MismatchError, "ties 'model.embed_tokens.weight' and 'lm_head.weight'")
    resident.swap(MemoryTensors({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    resident.swap(weights(place / "base"))
    with torch.no_grad():  # a parameter that was missed would still hold the NaN
        resident.model.get_parameter(norm).fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="item 0"):
        resident.score(task, silent)


def test_untied_head_and_family_names(place: Path, tmp_path: Path) -> None:
    base = tiny_lm.write_base(tmp_path / "untied", tied=False)
    resident = LmEval().open(base, None)
    resident.swap(weights(base))
    tensors = load_file(base / "model.safetensors")
    assert torch.equal(resident.model.get_parameter("lm_head.weight"), tensors["lm_head.weight"])
    bare = {name.removeprefix("model."): value * 2 for name, value in tensors.items()}  # as some checkpoints name them
    resident.swap(MemoryTensors(bare))
    name = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(resident.model.get_parameter(name), tensors[name] * 2)


def test_mixture_of_experts_checkpoint(tmp_path: Path) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = MixtralForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    tiny_lm.write_tokenizer(tmp_path)
    resident = LmEval().open(tmp_path, None)
    resident.swap(weights(tmp_path))
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(resident.model(tokens).logits, model(tokens).logits)


def test_identity_follows_what_changes_numbers(place: Path, tmp_path: Path) -> None:
    evaluator = LmEval(limit=10)
    names = ["tiny_choice", "tiny_write"]
    here = evaluator.resolve(names, "test", place / "tasks")
    there = evaluator.resolve(names, "test", tiny_lm.write_tasks(tmp_path / "elsewhere"))
    assert here == there and here["tiny_choice"].items == 10 and here["tiny_choice"].metric == "acc"
    assert str(place) not in json.dumps(here["tiny_choice"].identity)
    digest(here["tiny_choice"].identity)  # has a canonical form
    validation = evaluator.resolve(names, "validation", place / "tasks")
    assert validation["tiny_choice"].identity != here["tiny_choice"].identity
    data = tmp_path / "elsewhere" / "data" / "choice.train.jsonl"
    data.write_text(data.read_text() + data.read_text().splitlines()[0] + "\n")
    assert evaluator.resolve(names, "test", tmp_path / "elsewhere") == here  # no example of it is shown
    shown = LmEval(limit=10, num_fewshot=1)
    changed = shown.resolve(names, "test", tmp_path / "elsewhere")["tiny_choice"]
    assert changed != shown.resolve(names, "test", place / "tasks")["tiny_choice"]
    assert LmEval(seed=3).resolve(names, "test", place / "tasks") != LmEval().resolve(names, "test", place / "tasks")
    before, after = (
        evaluator.training_identity(["tiny_choice"], folder_of)
        for folder_of in (place / "tasks", tmp_path / "elsewhere")
    )
    assert before != after


def test_validation_and_test_items(place: Path, resident: Resident) -> None:
    resident.swap(weights(place / "base"))
    tables = [
        resident.score(LmEval().resolve(["tiny_choice"], split, place / "tasks")["tiny_choice"], silent)
        for split in ("validation", "test")
    ]  # type: ignore[misc]
    assert not set(tables[0]["document"].to_pylist()) & set(tables[1]["document"].to_pylist())


def test_changed_data_are_refused(place: Path, tmp_path: Path) -> None:
    folder = tiny_lm.write_tasks(tmp_path / "tasks")
    task = LmEval().resolve(["tiny_choice"], "test", folder)["tiny_choice"]
    resident = LmEval().open(place / "base", folder)
    resident.swap(weights(place / "base"))
    data = folder / "data" / "choice.test.jsonl"
    data.write_text("".join(data.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(EvaluationError, match="not what it was"):
        resident.score(task, silent)
    again = LmEval().resolve(["tiny_choice"], "test", folder)["tiny_choice"]
    assert len(resident.score(again, silent)) == 39
    with pytest.raises(EvaluationError, match="not what it was"):  # another evaluator's settings
        resident.score(
            replace(again, identity=LmEval(seed=1).resolve(["tiny_choice"], "test", folder)["tiny_choice"].identity),
            silent,
        )


def test_filtered_documents_and_functions(place: Path, tmp_path: Path) -> None:
    folder = tiny_lm.write_tasks(tmp_path / "tasks")
    (folder / "odd.py").write_text(
        "def keep(documents):\n    return documents.filter(lambda one: one['answer'] == 1).select(range(7))\n"
    )
    (folder / "odd.yaml").write_text("include: tiny_choice.yaml\ntask: odd\nprocess_docs: !function odd.keep\n")
    identity = LmEval().resolve(["odd"], "test", folder)["odd"]
    assert identity.items == 7 and identity.identity["config"]["process_docs"]["function"] == "odd.keep"
    (folder / "odd.py").write_text((folder / "odd.py").read_text() + "# changed\n")
    assert LmEval().resolve(["odd"], "test", folder)["odd"] != identity


def test_what_a_function_imports_from_the_folder_of_the_spec(place: Path, tmp_path: Path) -> None:
    folder = tiny_lm.write_tasks(tmp_path / "tasks")
    (tmp_path / "my_numbers.py").write_text("COUNT = 5\n")
    (folder / "odd.py").write_text(
        "from my_numbers import COUNT\ndef keep(documents):\n    return documents.select(range(COUNT))\n"
    )
    (folder / "odd.yaml").write_text("include: tiny_choice.yaml\ntask: odd\nprocess_docs: !function odd.keep\n")
    put_on_path(tmp_path)
    try:
        five = LmEval().resolve(["odd"], "test", folder)["odd"]
        (tmp_path / "my_numbers.py").write_text("COUNT = 11\n")
        eleven = LmEval().resolve(["odd"], "test", folder)["odd"]
    finally:
        put_on_path(None)
        sys.modules.pop("my_numbers", None)
    assert (five.items, eleven.items) == (5, 11)
    imports = [task.identity["config"]["process_docs"]["imports"] for task in (five, eleven)]
    assert imports[0].keys() == imports[1].keys() == {"my_numbers"} and imports[0] != imports[1]


def test_refusals(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"arc_easy": ("TASK", None), "mmlu": ("GROUP", None)}
    monkeypatch.setattr(task_files, "own_index", lambda: known)  # the real one takes seconds
    with pytest.raises(EvaluationError, match="did you mean 'tiny_choice'"):
        LmEval().resolve(["tiny_choise"], "test", place / "tasks")
    with pytest.raises(EvaluationError, match="did you mean 'arc_easy'"):
        LmEval().resolve(["arc_easi"], "test", place / "tasks")
    with pytest.raises(EvaluationError, match="group"):
        LmEval().resolve(["mmlu"], "test", None)
    with pytest.raises(EvaluationError, match="is not there"):
        LmEval().resolve(["tiny_choice"], "test", tmp_path / "nowhere")
    folder = tiny_lm.write_tasks(tmp_path / "tasks")
    text = (folder / "tiny_choice.yaml").read_text()
    (folder / "tiny_choice.yaml").write_text(text.replace("validation_split: validation\n", ""))
    with pytest.raises(EvaluationError, match="no validation split; it has: training, test"):
        LmEval().resolve(["tiny_choice"], "validation", folder)
    (folder / "tiny_choice.yaml").write_text(text)
    for chosen, said in (
        ({"tiny_choise": "acc"}, "primary: no task here is 'tiny_choise'; did you mean 'tiny_choice'"),
        ({"tiny_choice": "acc_nrm"}, "no metric 'acc_nrm'; did you mean 'acc_norm'"),
        ({"tiny_choice": "acc,strict"}, "no filter 'strict'"),
    ):
        with pytest.raises(EvaluationError, match=said):
            LmEval(primary=chosen).resolve(["tiny_choice"], "test", folder)
    (folder / "data" / "write.test.jsonl").unlink()
    with pytest.raises(EvaluationError, match=r"write\.test\.jsonl"):
        LmEval().resolve(["tiny_write"], "test", folder)


def test_calibration_is_the_answer_places(place: Path, resident: Resident) -> None:
    resident.swap(weights(place / "base"))
    drawn = resident.calibration(["tiny_choice", "tiny_write"], 7, seed=0)
    assert len(drawn) == 7
    again = resident.calibration(["tiny_choice", "tiny_write"], 7, seed=0)
    assert drawn == again and drawn != resident.calibration(["tiny_choice", "tiny_write"], 7, seed=1)
    logits, labels = drawn.logits(resident.model, range(7)), drawn.labels(range(7))
    assert all(
        own.shape == (len(right), 320) and own.dtype == torch.float32 for own, right in zip(logits, labels, strict=True)
    )
    alone = [drawn.logits(resident.model, [item])[0] for item in range(7)]
    for own, other in zip(logits, alone, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)
    item = 0  # by hand: the whole sequence in one pass, the places before each token of the answer
    tokens = torch.tensor(drawn.sequences[item])[None]
    width = drawn.answers[item]
    whole = resident.model(tokens).logits[0, -width - 1 : -1]
    torch.testing.assert_close(whole, alone[item], atol=1e-5, rtol=1e-5)
    assert logits[0].requires_grad
    with pytest.raises(EvaluationError, match="no training split"):
        (place / "tasks" / "bare.yaml").write_text(
            (place / "tasks" / "tiny_choice.yaml")
            .read_text()
            .replace("tiny_choice", "bare")
            .replace("training_split: train\n", "")
        )
        resident.calibration(["bare"], 3, seed=0)


def test_resolving_is_cheap(place: Path, tmp_path: Path) -> None:
    folder = tiny_lm.write_tasks(tmp_path / "many", items=150)
    text = (folder / "tiny_choice.yaml").read_text()
    names = [f"choice_{number}" for number in range(20)]
    for name in names:
        (folder / f"{name}.yaml").write_text(text.replace("tiny_choice", name))
    start = time.process_time()
    LmEval(limit=100).resolve(names, "test", folder)
    assert time.process_time() - start < 0.5
    script = (
        "import sys; from mergecore.evaluators.lm_eval import LmEval; from pathlib import Path; "
        f"LmEval().resolve({names!r}, 'test', Path({str(folder)!r})); "
        "print([name for name in ('transformers', 'lm_eval', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_warm_scoring_is_cheap(place: Path, resident: Resident) -> None:
    task = LmEval().resolve(["tiny_choice"], "test", place / "tasks")["tiny_choice"]
    resident.swap(weights(place / "base"))
    resident.score(task, silent)
    start = time.process_time()
    resident.score(task, silent)
    assert time.process_time() - start < 0.5  # 0.1 s of a quiet core
