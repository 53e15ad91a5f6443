"""`plan` refuses what scoring cannot do, before anything is made; and a module that is not there is no failed cell."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from mergecore.errors import EvaluationError, PluginError
from mergecore.evaluators.classification import Classification
from mergecore.evaluators.lm_eval import LmEval
from mergecore.evaluators.lm_shell import check_scorable
from mergecore.execution.outcome import failed
from mergecore.execution.scoring import Bench, resident
from mergecore.identity.keys import Step
from mergecore.store.store import Store
from tests.recipe_files import plan_of
from tests.tiny_lm import CHAT_TEMPLATE, write_base, write_expert, write_tasks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    base = write_base(folder / "base")
    for number, name in enumerate("ab", 1):
        write_expert(base, folder / name, number)
    (base / "chat_template.jinja").unlink()
    write_tasks(folder / "tasks", items=4)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def spec(folder: Path, store: Path, base: str = "base", **evaluate: Any) -> dict[str, Any]:
    return {
        "name": "chats",
        "base": folder / base,
        "experts": [{"name": name, "source": folder / name, "tasks": ["tiny_choice"]} for name in "ab"],
        "methods": [{"method": "average"}],
        "counts": [2],
        "evaluate": {"path": folder / "tasks", "held_in": {"choice": ["tiny_choice"]}, "limit": 2, **evaluate},
        "output": {"store": store},
    }


def test_a_template_that_the_base_lacks_is_asked_for(folder: Path, tmp_path: Path) -> None:
    result = plan_of(tmp_path, spec(folder, tmp_path / "store", apply_chat_template=True))
    assert result.exit_code == 1 and "there is no chat template: put chat_template.jinja beside" in result.output
    assert str(folder / "base") in result.output
    assert plan_of(tmp_path, spec(folder, tmp_path / "store")).exit_code == 0
    taken = {**spec(folder, tmp_path / "store", apply_chat_template=True), "tokenizer": "a"}
    result = plan_of(tmp_path, taken)  # merges have the expert's template; the base as it stands has none
    assert result.exit_code == 0 and "refused: base: evaluate.apply_chat_template" in result.output
    assert "refused: a" not in result.output and "refused: average" not in result.output


def test_an_expert_that_cannot_be_scored_by_itself_is_a_refused_cell(folder: Path, tmp_path: Path) -> None:
    for name in ("base", "a", "b"):
        shutil.copytree(folder / name, tmp_path / name)
    (tmp_path / "base" / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (tmp_path / "b" / "chat_template.jinja").unlink()
    asked = spec(tmp_path, tmp_path / "store", apply_chat_template=True, path=folder / "tasks")
    result = plan_of(tmp_path, asked)
    assert result.exit_code == 0 and "refused: b: evaluate.apply_chat_template" in result.output
    assert "refused: a" not in result.output


def test_a_task_that_does_not_exist_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("lm_tasks", "lm_groups"):
        monkeypatch.setattr(f"mergecore.evaluators.{module}.own_index", dict)  # lm-eval's own takes seconds
    result = plan_of(tmp_path, spec(folder, tmp_path / "store", held_out={"more": ["tiny_choise"]}))
    assert result.exit_code == 1 and "there is no task 'tiny_choise': did you mean 'tiny_choice'?" in result.output


FILES = ("config.json", "tokenizer.json")


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
        {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
        {"model_type": "mistral"},
    ],
)
def test_causal_language_models_are_scored(config: dict[str, Any]) -> None:
    check_scorable(config, FILES)


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
        {"model_type": "bart", "architectures": ["BartModel"]},
        {"model_type": "whisper", "is_encoder_decoder": True},
        {"model_type": "vit", "architectures": ["ViTForImageClassification"]},
        {"model_type": "toy", "auto_map": {"AutoModel": "modeling_toy.Toy"}},
        {},
    ],
)
def test_other_architectures_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(EvaluationError, match="causal language models only"):
        check_scorable(config, FILES)


def test_a_model_without_its_files_is_refused() -> None:
    with pytest.raises(EvaluationError, match=r"no config\.json"):
        LmEval().check({}, ["tokenizer.json"], None)
    with pytest.raises(EvaluationError, match="no tokenizer"):
        LmEval().check({"model_type": "llama"}, ["config.json"], None)


@pytest.mark.parametrize(
    ("factory", "error", "said"),
    [
        ("no_such_module:make", PluginError, r"cannot be imported \(ModuleNotFoundError"),
        ("broken_factory:make", PluginError, r"cannot be imported \(KeyError"),
        ("failing_factory:make", EvaluationError, r"fails for this config\.json: ZeroDivisionError"),
    ],
)
def test_a_factory_that_fails_is_refused(
    factory: str, error: type[Exception], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_factory.py").write_text("{}['x']\n")
    (tmp_path / "failing_factory.py").write_text("def make(config):\n    return 1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(error, match=said):
        Classification(model=factory).check({}, ["config.json"], None)


def test_a_module_that_is_not_there_is_no_failure_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it is installed, the same sweep goes on; nothing has to be tried again by a flag."""
    companions = tmp_path / "model"
    companions.mkdir()
    (companions / "config.json").write_text(json.dumps({}))
    store, step = Store(tmp_path / "store"), Step("evaluation", "classification", 1, {}, {})
    bench = Bench(store.root, Classification(model="later_module:make"), None)
    with pytest.raises(PluginError, match="later_module") as raised:
        resident(bench, companions, "x")
    with pytest.raises(PluginError):
        failed(store, [step], raised.value)
    assert not list(store.root.rglob("*.json"))
    (tmp_path / "later_module.py").write_text("import torch\ndef make(config):\n    return torch.nn.Linear(2, 2)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resident(bench, companions, "x").model is not None
    sys.modules.pop("later_module")


def test_a_library_that_lacks_a_module_is_no_failure_of_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def needing(self: LmEval, companions: Path, folder: Path | None) -> Any:
        raise ImportError("sentencepiece is needed")

    monkeypatch.setattr(LmEval, "open", needing)
    with pytest.raises(PluginError, match=r"lm_eval.*sentencepiece is needed"):
        resident(Bench(tmp_path, LmEval(), None), tmp_path, "y")
