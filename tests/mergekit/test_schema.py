"""What mergekit's YAML may say, what is refused with which words, and what `mergeloom merge --show` prints of it."""

from __future__ import annotations

import contextlib
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from flows.cli.endings import left_of
from flows.cli.main import main
from mergecore.engine.executor import InProcess
from mergecore.events import silent
from mergecore.formats.whole_directory import whole_directory
from mergecore.spec.mergekit.reference import Reference
from mergecore.spec.mergekit.rules import Condition, rules_for
from mergecore.spec.mergekit.setting import setting_from, value_for
from tests.mergekit.models import write_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture(autouse=True)
def _beside_the_models(models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(models)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(folder: Path, recipe: str | dict[str, Any], *options: str) -> Result:
    """`mergeloom merge` of a recipe in `folder`."""
    path = folder / "recipe.yml"
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe, sort_keys=False))
    return CliRunner().invoke(main, ["merge", str(path), *options])


# --- modules ------------------------------------------------------------------------------------------------------


def write_t5(folder: Path, seed: float, encoder: int = 2, decoder: int = 3) -> None:
    """A checkpoint with as many layers as a small T5's, one weight in each."""
    folder.mkdir()
    names = [
        f"{side}.block.{n}.layer.0.w" for side, m in (("encoder", encoder), ("decoder", decoder)) for n in range(m)
    ]
    tensors = {name: torch.full((2, 2), seed + place) for place, name in enumerate(["shared.weight", *names])}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text('{"model_type": "t5", "tie_word_embeddings": true}')


def modules(**ranges: tuple[int, int]) -> dict[str, Any]:
    """The mean of two T5s, of these layers in each module."""
    return {
        "merge_method": "linear",
        "dtype": "float32",
        "modules": {
            module: {
                "parameters": {"weight": 1},
                "slices": [{"sources": [{"model": name, "layer_range": list(layers)} for name in ("t5-a", "t5-b")]}],
            }
            for module, layers in ranges.items()
        },
    }


def test_an_encoder_and_a_decoder_of_other_depths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_t5(tmp_path / "t5-a", 0.0)
    write_t5(tmp_path / "t5-b", 10.0)
    result = run(tmp_path, modules(encoder=(0, 2), decoder=(0, 3)), "out")
    assert result.exit_code == 0, result.output
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("t5-a", "t5-b"))
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == a.keys()
    for name, value in merged.items():
        torch.testing.assert_close(value, (a[name] + b[name]) / 2, rtol=0, atol=1e-6)
    for document, said in (
        (modules(encoder=(0, 3), decoder=(0, 3)), "layer_range [0, 3] of 't5-a', which has 2 layers"),
        (
            modules(encoder=(0, 2), decoder=(0, 2)),
            "modules.decoder: layers of a model with several modules cannot change",
        ),
    ):
        result = run(tmp_path, document, "--show")
        assert result.exit_code == 1 and said in result.output


# --- values -------------------------------------------------------------------------------------------------------


def test_gradients_are_interpolated_and_filters_tried_in_order() -> None:
    """Worked by hand: 5 anchors over a depth of 0.3 fall between the second (0.25) and the third (0.5)."""
    setting = setting_from(
        [{"filter": "mlp", "value": [0, 1, 2, 4, 8]}, {"filter": "*", "value": 7}], float, "t"
    )  # fmt: skip
    sources = [{"t": setting}]
    assert value_for(iter(sources), "t", "model.layers.3.mlp.up", 0.3) == pytest.approx(1 + 0.2 * 1)
    assert value_for(iter(sources), "t", "model.layers.3.mlp.up", 1.0) == 8
    assert value_for(iter(sources), "t", "model.norm", 0.3) == 7
    nearer = [{"t": setting_from({"filter": "norm", "value": 1}, float, "t")}, *sources]
    assert value_for(iter(nearer), "t", "model.norm", 0.0) == 1
    assert value_for(iter(nearer), "t", "model.layers.0.mlp.up", 0.0) == 0, "no case there: the next place is asked"


def test_switches_are_not_mixed() -> None:
    """Two switches over a depth: the first holds to the very end."""
    setting = setting_from([True, False], bool, "x")
    assert [value_for(iter([{"x": setting}]), "x", "n", depth) for depth in (0.0, 0.9, 1.0)] == [True, True, False]


def test_rules_say_what_was_decided() -> None:
    """Any decisions, told by two overlapping conditions and the layer, or by nothing the rules know of."""
    from mergecore.checkpoints.select import SelectRule

    names = [
        f"model.layers.{n}.{kind}.{part}" for n in range(12) for kind in ("attn", "mlp") for part in ("q", "up.mlp")
    ]
    names += ["lm_head", "model.norm", "odd[1]*.weight"]
    payloads = {
        name: {"t": number % 3 if "attn" in name else 5, **({"x": 1} if "mlp" in name else {})}
        for number, name in enumerate(names)
    }
    conditions = [Condition((("attn", ""),)), Condition((("mlp", ""), ("q", "")))]
    rules = rules_for(payloads, conditions)
    for name, payload in payloads.items():
        rule = next(rule for rule in rules if SelectRule(**rule).matches(name))
        assert {key: value for key, value in rule.items() if key not in ("names", "layers")} == payload
    assert len(rules) < len(names)


# --- what mergekit takes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "folders", "wanted"),
    [
        ("a+b", [], ("a", "b")),
        ("org/base+org/lora", [], ("org/base", "org/lora")),
        ("a+", [], ("a", "")),
        ("a+b", ["a+b"], ("a+b", "")),
        ("a+b+c", ["a+b"], ("a+b", "c")),
        ("a+b+c", ["a", "b+c"], ("a", "b+c")),
        ("a+b+c", ["a", "b+c", "c"], ("a", "b+c")),
        ("c++", ["c++"], ("c++", "")),
        ("c+++lora", ["c++"], ("c++", "lora")),
    ],
)
def test_a_plus_may_be_part_of_a_name(
    text: str, folders: list[str], wanted: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in folders:
        Path(folder).mkdir()
    reference = Reference.model_validate(text)
    assert (reference.model.path, reference.lora.path if reference.lora else "") == wanted


def test_a_plus_that_can_be_read_in_two_ways_is_refused(tmp_path: Path) -> None:
    result = run(tmp_path, changed(models=[{"model": "x+y+z"}]), str(tmp_path / "out"))
    assert result.exit_code == 1 and "can be read in several ways; write {model: {path" in result.output


def test_an_at_may_be_part_of_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x@y").mkdir()
    assert Reference.model_validate("x@y").model.revision is None
    assert Reference.model_validate("x@z").model.revision == "z"
    assert Reference.model_validate("n" * 9000).model.path == "n" * 9000


@pytest.mark.parametrize("method", ["dare_linear", "della_linear"])
def test_an_expert_of_which_nothing_is_kept_still_counts_in_the_divisor(method: str, tmp_path: Path) -> None:
    """(1 · τ_a + 3 · 0) / 4, as mergekit has it."""
    kept, none = {"density": 1, "weight": 1}, {"density": 0, "weight": 3}
    models = [{"model": "./a", "parameters": kept}, {"model": "./b", "parameters": none}]
    document = changed(merge_method=method, models=models, parameters={"normalize": True}, dtype="float32")
    assert run(tmp_path, document, str(tmp_path / "out")).exit_code == 0
    merged, base, a = (load_file(f"{folder}/model.safetensors") for folder in (tmp_path / "out", "base", "a"))
    for name, value in merged.items():
        torch.testing.assert_close(value, base[name] + (a[name] - base[name]) / 4, rtol=0, atol=1e-6)


# --- what is printed ----------------------------------------------------------------------------------------------


def test_show_prints_a_recipe_that_makes_the_same_model(tmp_path: Path) -> None:
    theirs = Path(__file__).parent / "recipes" / "ties_gradients.yml"
    shown = CliRunner().invoke(main, ["merge", str(theirs), "--show"])
    assert shown.exit_code == 0, shown.output
    ours = run(tmp_path, shown.stdout, str(tmp_path / "ours"))
    assert ours.exit_code == 0, ours.output
    direct = CliRunner().invoke(main, ["merge", str(theirs), str(tmp_path / "direct")])
    assert ours.stdout.split("digest")[1] == direct.stdout.split("digest")[1]
    assert (tmp_path / "direct" / "mergekit.yml").read_text() == theirs.read_text()


def test_show_of_a_plain_recipe(tmp_path: Path) -> None:
    document = {
        "models": [{"model": "./a", "parameters": {"weight": 1, "density": 0.5}}, {"model": "./b+./lora"}],
        "merge_method": "task_arithmetic", "base_model": "./base", "dtype": "float16",
        "parameters": {"weight": 0.5, "select_topk": 1},
    }  # fmt: skip
    other = run(tmp_path, document, "--show")
    assert "  - {name: lora, source: ./b, adapter: ./lora}" in other.stdout
    document["models"][1]["model"] = "./base+./lora"  # type: ignore[index]
    shown = run(tmp_path, document, "--show")
    assert shown.stdout == (
        "# note: recipe.yml.parameters.select_topk: has no effect with 'task_arithmetic', in mergekit neither\n"
        "method: task_arithmetic\nscale: 1.0\nweights: [1.0, 0.5]\nbase: ./base\nexperts:\n"
        "  - {name: a, source: ./a}\n  - {name: lora, source: ./lora}\ndtype: float16\n"
    )


def test_show_of_several_documents(tmp_path: Path) -> None:
    theirs = Path(__file__).parent / "recipes" / "several_documents.yml"
    shown = CliRunner().invoke(main, ["merge", str(theirs), "--show"])
    assert shown.exit_code == 0, shown.output
    documents = list(yaml.safe_load_all(shown.stdout))
    assert [document["method"] for document in documents] == ["average", "slerp", "task_arithmetic"]
    assert documents[1]["base"] == "first"


# --- several documents --------------------------------------------------------------------------------------------

TWO = """
models: [{model: first}]
merge_method: passthrough
---
name: first
models: [{model: ./a}]
merge_method: passthrough
"""


def test_intermediates_are_kept_where_asked(tmp_path: Path) -> None:
    result = run(tmp_path, TWO, str(tmp_path / "out"), "--intermediates", str(tmp_path / "kept"))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "kept" / "first" / "model.safetensors").exists()
    (tmp_path / "other").mkdir()
    assert run(tmp_path, TWO, str(tmp_path / "other" / "out")).exit_code == 0
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["out"], "else they are gone"
    left, right = (load_file(tmp_path / where / "model.safetensors") for where in ("out", "other/out"))
    assert all(bool((left[name] == right[name]).all()) for name in left)


def test_documents_that_all_have_names(tmp_path: Path) -> None:
    """Nothing is the result: each becomes a folder in OUT."""
    text = TWO.replace("\nmodels: [{model: first}]", "\nname: second\nmodels: [{model: first}]", 1)
    assert run(tmp_path, text, str(tmp_path / "out")).exit_code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["first", "second"]


def test_the_card_names_documents_not_folders_that_are_gone(tmp_path: Path) -> None:
    assert run(tmp_path, TWO, str(tmp_path / "out")).exit_code == 0
    assert run(tmp_path, TWO, str(tmp_path / "other"), "--intermediates", str(tmp_path / "kept")).exit_code == 0
    for file in ("README.md", "mergeloom.yaml"):
        text = (tmp_path / "out" / file).read_text()
        assert ".out-" not in text and "first of mergekit.yml" in text and "run that file to make it again" in text
        beside = (tmp_path / "other" / file).read_text()
        assert str(tmp_path / "kept" / "first") in beside and "run that file" not in beside
    assert run(tmp_path, (tmp_path / "out" / "mergekit.yml").read_text(), str(tmp_path / "again")).exit_code == 0
    assert run(tmp_path, (tmp_path / "other" / "mergeloom.yaml").read_text(), str(tmp_path / "third")).exit_code == 0
    results = [load_file(tmp_path / out / "model.safetensors") for out in ("out", "again", "third")]
    assert all(bool((result[name] == results[0][name]).all()) for result in results for name in results[0])


def test_the_flow_makes_all_documents_as_the_command_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The flow's own code, with its task and its cluster in this process."""
    import flows.merge

    pages: dict[str, str] = {}
    monkeypatch.setattr(flows.merge, "merge_recipe", flows.merge.merge_recipe.fn)
    monkeypatch.setattr(flows.merge, "dask_client", lambda *arguments, **named: contextlib.nullcontext())
    monkeypatch.setattr(flows.merge, "OnDask", lambda *arguments: InProcess())
    monkeypatch.setattr(flows.merge, "logged", lambda: silent)
    monkeypatch.setattr(
        flows.merge, "create_markdown_artifact", lambda page, key, description: pages.setdefault(key, page)
    )
    assert run(tmp_path, TWO, str(tmp_path / "theirs")).exit_code == 0
    state = flows.merge.merge.fn(str(tmp_path / "recipe.yml"), str(tmp_path / "ours"), workers=1)
    assert state.data == [str(tmp_path / "ours")] and set(pages) == {"model-ours"}
    contents = [
        sorted((path.name, path.read_bytes()) for path in (tmp_path / folder_name).iterdir())
        for folder_name in ("ours", "theirs")
    ]
    assert contents[0] == contents[1], "mergekit's text beside it too"
    kept = str(tmp_path / "kept")
    state = flows.merge.merge.fn(str(tmp_path / "recipe.yml"), str(tmp_path / "more"), intermediates=kept)
    assert state.data == [f"{kept}/first", str(tmp_path / "more")]


DOCUMENTS = {
    "a circle": (TWO.replace("./a", "second") + "---\nname: second\nmodels: [{model: first}]\nmerge_method: passthrough",
                 r"documents , first, second are made of each other|first, second are made of each other"),
    "two without a name": (TWO.replace("name: first\n", ""), r"two documents have no name"),
    "a name twice": (TWO + "---\nname: first\nmodels: [{model: ./b}]\nmerge_method: passthrough", r"called 'first'"),
    "made for nobody": (TWO.replace("{model: first}", "{model: ./b}"), r"no other document is made of 'first'"),
    "a name with slashes": (TWO.replace("name: first", "name: x/first"), r"'x/first' is to be the name of a folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", DOCUMENTS)
def test_documents_refused(case: str, tmp_path: Path) -> None:
    text, pattern = DOCUMENTS[case]
    result = run(tmp_path, text, str(tmp_path / "out"))
    assert result.exit_code == 1 and not (tmp_path / "out").exists()
    import re

    assert re.search(pattern, result.output), result.output


# --- what is refused ----------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {
    "models": [{"model": "./a", "parameters": {"weight": 1}}, {"model": "./b", "parameters": {"weight": 1}}],
    "merge_method": "ties",
    "base_model": "./base",
}


def changed(**changes: Any) -> dict[str, Any]:
    """The good document with other keys; None leaves one out."""
    return {key: value for key, value in {**GOOD, **changes}.items() if value is not None}


def rules_of_one(**parameters: Any) -> list[dict[str, Any]]:
    """The models, of which the first has these parameters."""
    return [{"model": "./a", "parameters": {"weight": 1, **parameters}}, GOOD["models"][1]]


REFUSED = {
    "a key": (changed(merge_metod="ties"), "recipe.yml.merge_metod: unknown key; did you mean 'merge_method'?"),
    "a method": (changed(merge_method="tise"), "there is no 'tise'; did you mean 'ties'?"),
    "a parameter": (changed(models=rules_of_one(densty=1)), ".densty: 'ties' has no such parameter; did you mean 'density'?"),
    "a shared parameter": (changed(parameters={"lamda": 1}), "recipe.yml.parameters.lamda: 'ties' has no such"),
    "a key of a model": (changed(models=[{"modle": "./a"}]), "models.0.modle: unknown key; did you mean 'model'?"),
    "a key of a filter": (changed(models=rules_of_one(density=[{"filtre": "x", "value": 1}])), "density[0].filtre: unknown key"),
    "a filter without value": (changed(models=rules_of_one(density=[{"filter": "x"}])), "density[0].value: must be given"),
    "mixed values": (changed(models=rules_of_one(density=[1, {"value": 1}])), "density: mixes plain values"),
    "no number": (changed(models=rules_of_one(density="half")), "density: must be a number (given: 'half')"),
    "no switch": (changed(parameters={"normalize": "perhaps"}), "normalize: must be true or false"),
    "an empty gradient": (changed(models=rules_of_one(density=[])), "density: is an empty list"),
    "a value that is missing": (changed(models=[{"model": "./a"}]), "no value for 'weight', which 'ties' needs"),
    "a value out of range": (changed(merge_method="breadcrumbs", parameters={"gamma": -1}),
                             "outliers: must be greater than or equal to 0"),
    "no base": (changed(base_model=None), "'ties' needs a base among its models; say base_model"),
    "two forms": (changed(slices=[]), "slices: "),
    "no form": (changed(models=None), "give exactly one of 'models', 'slices' and 'modules' (none given)"),
    "too many models": (changed(merge_method="slerp", parameters={"t": 0.5}), "'slerp' takes at most 1 models"),
    "too few": (changed(merge_method="model_stock", models=[{"model": "./a"}]), "'model_stock' takes at least 2"),
    "a model twice": (changed(models=[GOOD["models"][0]] * 2), "'./a' stands there twice"),
    "a model that is not there": (changed(models=[{"model": "./aa"}]), "'./aa' does not exist; did you mean 'a'?"),
    "other depths": (changed(models=[{"model": "./deep"}]), "have different numbers of layers"),
    "layers that are not there": (changed(models=None, slices=[{"sources": [
        {"model": "./base", "layer_range": [2, 6]}, {"model": "./deep", "layer_range": [2, 6]}]}]),
        "layer_range [2, 6] of './base', which has 4 layers"),
    "unequal slices": (changed(models=None, slices=[{"sources": [
        {"model": "./base", "layer_range": [0, 2]}, {"model": "./a", "layer_range": [0, 3]}]}]),
        "sources have 2, 3 layers: all must have as many"),
    "an empty slice": (changed(models=None, slices=[{"sources": [{"model": "./a", "layer_range": [2, 2]}]}]),
                       "layer_range [2, 2] holds no layer"),
    "a slice without the base": (changed(models=None, slices=[{"sources": [{"model": "./a", "layer_range": [0, 4]}]}]),
                                 "add './base' to the sources of the slice"),
    "a module": (changed(models=None, modules={"decoder": {"models": GOOD["models"]}}), "a 'llama' model has no such module"),
    "a dtype": (changed(dtype="int8"), "recipe.yml.dtype: must be 'float32', 'float16' or 'bfloat16'"),
    "an adapter as a model": (changed(models=[{"model": "./lora"}]), "'./lora' is an adapter; write model+adapter"),
    "tokens": (changed(tokenizer={"source": "base", "tokens": {"x": {"source": "./a"}}}), "no model has a tokenizer.json"),
    "a row of a stranger": (changed(tokenizer={"tokens": {"x": {"source": "./c"}}}), "a row is to be that of './c', which is not"),
    "two tokenizers": (changed(tokenizer={"source": "base"}, tokenizer_source="base"), "not both"),
    "a stranger's tokenizer": (changed(tokenizer_source="./c"), "'./c', which is not among the models"),
    "a chat template": (changed(chat_template="chatlm"), "did you mean 'chatml'?"),
    "another architecture": (changed(models=[{"model": {"model": {"path": "./a"}, "override_architecture": "X"}}]),
                             "override_architecture"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    document, said = REFUSED[case]
    result = run(tmp_path, document, str(tmp_path / "out"))
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    message = result.output[result.output.index("Error: ") :]
    assert said in message, message
    assert len(message) < 700 and "pydantic" not in message
    assert not list(tmp_path.glob("out*"))


# --- what lies beside the weights ---------------------------------------------------------------------------------


def test_tokenizer_and_chat_template(models: Path, tmp_path: Path) -> None:
    """The tokenizer files of a named model, and a chat template by name, by text and by the plurality of the models."""
    for name, template in (("base", "{{ 'x' }}"), ("a", "{{ 'y' }}"), ("b", "{{ 'y' }}")):
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "mine": name, "chat_template": template}
        (models / name / "tokenizer_config.json").write_text(json.dumps(settings))
    try:
        templates = {}
        for number, template in enumerate([None, "chatml", "{{ 'z' }}", "auto"]):
            out = tmp_path / f"out{number}"
            document = changed(tokenizer_source="./a", chat_template=template)
            assert run(tmp_path, document, str(out)).exit_code == 0
            settings = json.loads((out / "tokenizer_config.json").read_text())
            assert settings["mine"] == "a"
            file = out / "chat_template.jinja"
            templates[template] = file.read_text() if file.exists() else settings["chat_template"]
        assert templates[None] == templates["auto"] == "{{ 'y' }}" and templates["{{ 'z' }}"] == "{{ 'z' }}"
        assert templates["chatml"].startswith("{% for message in messages %}<|im_start|>")
    finally:
        for name in ("base", "a", "b"):
            (models / name / "tokenizer_config.json").unlink()


def test_a_run_that_was_interrupted_says_what_it_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first result is whole, the second is stopped; the next run says what is in its way before it reads a model."""

    def stopping(out: Path, durable: bool) -> AbstractContextManager[Path]:
        if out.name == "out":
            raise KeyboardInterrupt
        return whole_directory(out, durable)

    options = (str(tmp_path / "out"), "--intermediates", str(tmp_path / "kept"))
    with monkeypatch.context() as stopped:
        stopped.setattr("mergecore.recipes.merge_recipe.whole_directory", stopping)
        result = run(tmp_path, TWO, *options)
    first = tmp_path / "kept" / "first"
    assert result.exit_code == 130
    said = f"interrupted; finished results lie in {first}, remove them before you run the same command again"
    assert said in result.output
    result = run(tmp_path, TWO, *options)
    assert result.exit_code == 1
    assert (
        f"{first} exists already, perhaps from a run that was interrupted: remove it, or name another" in result.output
    )
    assert not (tmp_path / "out").exists()


def test_nothing_finished_is_not_said_to_be_kept(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    assert left_of(tmp_path / "out", None, tmp_path / "kept") == f"{tmp_path / 'out'} was not written"
