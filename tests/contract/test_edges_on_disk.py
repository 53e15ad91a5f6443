"""Edges that depend on a method's values, or on how models lie on the disk: shares of nothing, tied weights, T5."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergecore import merge
from mergecore.engine.executor import InProcess
from mergecore.events import silent
from mergecore.plugins.method import Method
from mergecore.recipes.merge_file import merge_file
from mergecore.registry import METHODS
from mergeloom.testing.edge_contract import SHAPES, chosen, merged, models, outcomes
from mergeloom.testing.variants import Model, accepted, data_statistics, methods_of, same
from tests.recipe_files import find, merge_into

OURS = methods_of(METHODS.own)

# --- shares of nothing and of everything ----------------------------------------------------------------------------

TRIMMING = sorted(kind.name for kind in OURS if "density" in kind.model_fields)


@pytest.mark.parametrize("name", TRIMMING)
@pytest.mark.parametrize("density", [0.0, 1.0])
def test_nothing_is_kept_or_everything(name: str, density: float) -> None:
    kind = METHODS[name]
    needed: dict[str, Any] = {field: 1.0 for field, info in kind.model_fields.items() if info.is_required()}
    extra = {
        "breadcrumbs": {"outliers": 0}, "della": {"window": 0}, "consensus": {"multi_task": "ties", "minimum_tasks": 1},
        "tall_masks": {"multi_task": "ties"}, "pcb": {"form": "paper"},
    }.get(name, {})  # fmt: skip
    values = {**needed, **extra, "density": density}
    try:
        method = kind.model_validate(values)
    except ValueError as error:
        assert density == 0 and "greater than 0" in str(error)
        return
    shapes = {tensor: shape for tensor, shape in SHAPES.items() if shape}
    base, experts = models(shapes=shapes)
    for actual in outcomes(method, merged(method, base, experts if density == 0 else experts[:1]), base):
        assert same(actual, base if density == 0 else experts[0])


# --- tied weights, on disk ------------------------------------------------------------------------------------------

FIRST: dict[str, Method] = {kind.name: chosen(kind)[0].values[0] for kind in OURS}
FIRST = {name: method for name, method in FIRST.items() if not data_statistics(method, [])}
"""The first variant of every method that needs no data."""


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and experts whose files hold the output embedding a second time, as some trainers write it."""
    folder = tmp_path_factory.mktemp("tied")
    shapes = {
        "model.embed_tokens.weight": (8, 4),
        "model.layers.0.mlp.up_proj.weight": (5, 4),
        "model.norm.weight": (4,),
    }
    base, experts = models(torch.float32, shapes)
    for name, model in (("base", base), *((f"e{number}", expert) for number, expert in enumerate(experts))):
        (folder / name).mkdir()
        copy = {**model, "lm_head.weight": model["model.embed_tokens.weight"].clone()}
        save_file(copy, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps({"model_type": "tied", "tie_word_embeddings": True}))
    return folder


@pytest.mark.parametrize("method", FIRST.values(), ids=list(FIRST))
def test_tied_weights_are_merged_once(method: Method, tied: Path, tmp_path: Path) -> None:
    names = [f"e{number}" for number in range(accepted(method))]
    recipe = {
        "method": method.name, **method.model_dump(mode="json", exclude_defaults=True),
        "base": tied / "base", "experts": [tied / name for name in names],
    }  # fmt: skip
    merge_into(recipe, tmp_path / "out")
    actual: Model = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        actual |= load_file(path)
    assert "lm_head.weight" not in actual
    card = (tmp_path / "out" / "README.md").read_text()
    ids = [next(line.split("`")[1] for line in card.splitlines() if line.startswith(f"| {name} |")) for name in names]
    models_written = []
    for name in ("base", *names):
        model = load_file(tied / name / "model.safetensors")
        del model["lm_head.weight"]
        models_written.append(model)
    base, *experts = models_written
    if method.needs_ids:  # masks are drawn by the tensors, whether or not the head is saved beside them
        order = sorted(range(len(ids)), key=ids.__getitem__)
        assert same(actual, merge(method.bound(order), base=base, experts=[experts[n] for n in order]))
    else:
        assert same(actual, merge(method, base=base, experts=experts, ids=ids)), "nor counted twice"


# --- T5: an encoder and a decoder, shared embeddings, a head that is tied or is not ----------------------------------

HEADS = ("tied", "untied")


@pytest.fixture(scope="module")
def t5s(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Per kind of head a base and two experts, as transformers saves them."""
    from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5")
    for head in HEADS:
        torch.manual_seed(0)
        model: Any = T5ForConditionalGeneration(T5Config(
            vocab_size=61, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0,
            feed_forward_proj="relu" if head == "tied" else "gated-gelu",
        ))  # fmt: skip
        model.save_pretrained(folder / "plain")
        state = load_file(folder / "plain" / "model.safetensors")
        for number, name in enumerate(("base", "e0", "e1")):
            draw = torch.Generator().manual_seed(number)
            moved = {key: value + torch.randn(value.shape, generator=draw) * 0.05 for key, value in state.items()}
            if head == "untied":
                moved["lm_head.weight"] = torch.randn(61, 24, generator=draw)
            place = folder / f"{head}-first-{name}"
            place.mkdir()
            save_file(moved, place / "model.safetensors", metadata={"format": "pt"})
            config = json.loads((folder / "plain" / "config.json").read_text())
            config.pop("scale_decoder_outputs", None)
            # As the published checkpoints have it; what transformers makes of it when it saves anew is another thing.
            (place / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": head == "tied"}))
            AutoModelForSeq2SeqLM.from_pretrained(place).save_pretrained(folder / f"{head}-again-{name}")
    return folder


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("saved", ["first", "again"])
@pytest.mark.parametrize("name", ["average", "ties", "layer_swap", "slerp"])
def test_t5_merges_load_and_say_what_the_merged_weights_say(
    name: str, saved: str, head: str, t5s: Path, tmp_path: Path
) -> None:
    """Loaded without a missing or surplus tensor, the outputs are those of weights that were merged in memory."""
    from transformers import AutoModel, AutoModelForSeq2SeqLM, T5EncoderModel

    method = FIRST[name]
    folders = [t5s / f"{head}-{saved}-{part}" for part in ("base", "e0", "e1")]
    recipe = {"method": name, **method.model_dump(mode="json", exclude_defaults=True), "base": folders[0]}
    merge_into({**recipe, "experts": folders[1:]}, tmp_path / "out")
    base, *experts = (load_file(folder / "model.safetensors") for folder in folders)
    assert ("lm_head.weight" in base) == (head == "untied")
    ids = [line.split("`")[1] for line in (tmp_path / "out" / "README.md").read_text().splitlines() if "| `" in line]
    expected = merge(method, base=base, experts=experts, ids=ids[1:])
    assert same(load_file(tmp_path / "out" / "model.safetensors"), expected)

    kind: Any = AutoModelForSeq2SeqLM
    actual, told = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    wanted = kind.from_pretrained(folders[0])
    wanted.load_state_dict(expected, strict=False)
    tokens = torch.tensor([[5, 8, 13, 1]])
    with torch.inference_mode():
        answers = [name(input_ids=tokens, decoder_input_ids=tokens).logits for name in (actual, wanted)]
    assert torch.equal(*answers)
    assert torch.equal(actual.lm_head.weight, expected.get("lm_head.weight", expected["shared.weight"]))

    for body in (AutoModel, T5EncoderModel):
        part, told = body.from_pretrained(tmp_path / "out", output_loading_info=True)  # type: ignore[attr-defined]
        assert not told["missing_keys"] and set(told["unexpected_keys"]) <= {"lm_head.weight"}
        assert torch.equal(part.encoder.embed_tokens.weight, expected["shared.weight"])
        assert torch.equal(part.encoder.block[1].layer[0].SelfAttention.q.weight,
                           expected["encoder.block.1.layer.0.SelfAttention.q.weight"])  # fmt: skip


@pytest.mark.parametrize("head", HEADS)
def test_t5_embeddings_that_are_saved_for_each_stack_are_merged_once(head: str, t5s: Path, tmp_path: Path) -> None:
    """Some trainers write all names of the shared embeddings; the stacks read one tensor even where the head is another."""
    folders = []
    for name in ("base", "e0", "e1"):
        folders.append(tmp_path / name)
        folders[-1].mkdir()
        state = load_file(t5s / f"{head}-first-{name}" / "model.safetensors")
        copies = {f"{stack}.embed_tokens.weight": state["shared.weight"].clone() for stack in ("encoder", "decoder")}
        save_file({**state, **(copies if name != "e1" else {})}, folders[-1] / "model.safetensors")
        config = t5s / f"{head}-first-{name}" / "config.json"
        (folders[-1] / "config.json").write_text(config.read_text())
    recipe = {"method": "ties", "density": 0.3}
    done = merge_into({**recipe, "base": folders[0], "experts": folders[1:]}, tmp_path / "copies")
    sources = [t5s / f"{head}-first-{name}" for name in ("base", "e0", "e1")]
    assert (
        load_file(tmp_path / "copies" / "model.safetensors").keys()
        == load_file(sources[0] / "model.safetensors").keys()
    )
    plain = merge_into({**recipe, "base": sources[0], "experts": sources[1:]}, tmp_path / "plain")
    assert done.digest == plain.digest, "a density counts them once"


def test_modules_of_a_t5_merged_apart(t5s: Path, tmp_path: Path) -> None:
    """mergekit's `modules`: the encoder of one expert beside an average of decoders, loaded as one model."""
    import yaml
    from transformers import AutoModelForSeq2SeqLM

    base, e0, e1 = (t5s / f"untied-again-{name}" for name in ("base", "e0", "e1"))
    document = {
        "merge_method": "linear", "base_model": str(base),
        "modules": {
            "encoder": {"models": [{"model": str(e0), "parameters": {"weight": 1}}, {"model": str(base), "parameters": {"weight": 0}}]},
            "decoder": {"models": [{"model": str(name), "parameters": {"weight": 1}} for name in (e0, e1)]
                        + [{"model": str(base), "parameters": {"weight": 0}}]},
        },
    }  # fmt: skip
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(document))
    merge_file(tmp_path / "recipe.yml", tmp_path / "out", find, InProcess(), silent)
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    state = {name: value for name, value in model.state_dict().items() if "embed_tokens" not in name}
    first, second = (load_file(name / "model.safetensors") for name in (e0, e1))
    for name, value in state.items():
        wanted = first[name] if name.startswith("encoder.") else (first[name] + second[name]) / 2
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6, msg=name)
