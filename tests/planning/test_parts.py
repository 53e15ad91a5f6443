"""Models whose tensors come about in several ways: rules with values, other methods, copies from experts, other
layers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergecore import methods
from mergecore.checkpoints.select import SelectRule
from mergecore.errors import MergeloomError
from mergecore.recipes.in_memory import merge
from mergecore.recipes.merge_recipe import WrittenModel
from tests.recipe_files import merge_into

LAYERS = 4
SHAPES = {"self_attn.q_proj.weight": (4, 4), "mlp.up_proj.weight": (6, 4), "input_layernorm.weight": (4,)}


def state(seed: int, layers: int = LAYERS) -> dict[str, Tensor]:
    """A Llama-like state dict of a few hundred bytes."""
    draw = torch.Generator().manual_seed(seed)
    names = {f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in SHAPES.items()}
    names |= {"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,), "lm_head.weight": (8, 4)}
    return {name: torch.randn(shape, generator=draw) for name, shape in names.items()}


def write(folder: Path, tensors: dict[str, Tensor], layers: int = LAYERS, **config: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    values = {"model_type": "llama", "num_hidden_layers": layers, "hidden_size": 4, "vocab_size": 8, **config}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: write(folder / name, state(seed)) for seed, name in enumerate(("ground", "a", "b", "c"))}


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def result(recipe: dict[str, Any], out: Path) -> tuple[WrittenModel, dict[str, Tensor]]:
    done = merge_into(recipe, out)
    return done, weights(out)


def test_values_by_layer_are_those_of_lone_merges(models: dict[str, Path], tmp_path: Path) -> None:
    """A gradient over layers: every layer is as a merge of everything with its value makes it."""
    shares = {0: 0.1, 1: 0.4, 2: 0.7, 3: 1.0}
    rules = [{"layers": [layer, layer], "t": t} for layer, t in shares.items()]
    recipe = {"method": "slerp", "t": 0.5, "start": "base", "base": models["ground"], "experts": [models["a"]]}
    _, merged = result({**recipe, "select": [*rules, {}]}, tmp_path / "out")
    for layer, t in {**shares, None: 0.5}.items():
        slerp = methods.Slerp(t=t, start="base")
        lone = merge(slerp, base=weights(models["ground"]), experts=[weights(models["a"])])
        mine = [name for name in lone if (f"layers.{layer}." in name if layer is not None else "layers" not in name)]
        assert mine
        for name in mine:
            assert torch.equal(merged[name], lone[name]), name


def test_layer_swapping(models: dict[str, Path], tmp_path: Path) -> None:
    """Outer layers from one expert, inner ones from another, an average in between, embeddings and head from the
    base.
    """
    recipe = {
        "method": "average",
        "base": models["ground"],
        "experts": [models["a"], models["b"]],
        "select": [
            {"layers": [0, 0], "take": "copy", "of": "a"},
            {"layers": [1, 1], "weights": [0.25, 0.75]},
            {"layers": [2, 3], "take": "copy", "of": "b"},
            {"names": "lm_head.weight", "method": "task_arithmetic", "scale": 0.5, "experts": ["b"]},
            {"take": "copy"},
        ],
    }
    _, merged = result(recipe, tmp_path / "out")
    ground, a, b = (weights(models[name]) for name in ("ground", "a", "b"))
    for name, value in merged.items():
        if ".0." in name:
            wanted = a[name]
        elif ".1." in name:
            wanted = 0.25 * a[name] + 0.75 * b[name]
        elif "layers" in name:
            wanted = b[name]
        elif name == "lm_head.weight":
            wanted = ground[name] + 0.5 * (b[name] - ground[name])
        else:
            wanted = ground[name]
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6, msg=name)
    assert torch.equal(merged["model.layers.2.mlp.up_proj.weight"], b["model.layers.2.mlp.up_proj.weight"])


def test_an_expert_can_stand_for_the_base(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = {
        "method": "task_arithmetic",
        "scale": 2.0,
        "base": models["ground"],
        "experts": [models["a"], models["b"]],
        "select": [{"layers": [0, 1], "base": "b", "experts": ["a"]}, {"experts": ["a"]}],
    }
    _, merged = result(recipe, tmp_path / "out")
    ground, a, b = (weights(models[name]) for name in ("ground", "a", "b"))
    for name, value in merged.items():
        start = b if ".0." in name or ".1." in name else ground
        torch.testing.assert_close(value, start[name] + 2 * (a[name] - start[name]), rtol=1e-6, atol=1e-6)


def test_equal_ways_are_one_selection(models: dict[str, Path], tmp_path: Path) -> None:
    """Two rules that say the same thing are one part: a density counts over both, as over one rule for both."""
    recipe = {"method": "ties", "density": 0.3, "base": models["ground"], "experts": [models["a"], models["b"]]}
    apart = [{"names": "*mlp*"}, {"names": "*q_proj*"}, {"names": "*norm*", "density": 0.9}]
    together = [{"names": "/mlp|q_proj/"}, {"names": "*norm*", "density": 0.9}]
    first, _ = result({**recipe, "select": apart}, tmp_path / "apart")
    second, _ = result({**recipe, "select": together}, tmp_path / "together")
    assert first.digest == second.digest


def test_a_rule_that_says_nothing_new_changes_no_byte(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = {"method": "ties", "density": 0.3, "base": models["ground"], "experts": [models["a"], models["b"]]}
    plain, _ = result(recipe, tmp_path / "plain")
    ruled, _ = result({**recipe, "select": [{"layers": [0, 1], "density": 0.3}, {}]}, tmp_path / "ruled")
    assert plain.digest == ruled.digest


def test_the_card_can_be_run_again(models: dict[str, Path], tmp_path: Path) -> None:
    import yaml

    rules = [{"layers": [1, 2], "take": "copy", "of": "a"}, {"weights": [1.0, 3.0]}]
    recipe = {
        "method": "average",
        "experts": [models["a"], models["b"]],
        "select": rules,
        "stack": [{"layers": [1, 3]}],
    }
    first, _ = result(recipe, tmp_path / "out")
    again, _ = result(yaml.safe_load((tmp_path / "out" / "mergeloom.yaml").read_text()), tmp_path / "again")
    assert first.digest == again.digest


# --- other layers -------------------------------------------------------------------------------------------------


def test_a_stack_of_two_models(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = {
        "method": "average",
        "base": models["a"],
        "experts": [models["b"]],
        "stack": [{"layers": [0, 2]}, {"layers": [1, 3]}],
        "select": [{"layers": [3, 5], "take": "copy", "of": "b"}, {"take": "copy"}],
    }
    _, merged = result(recipe, tmp_path / "out")
    a, b = weights(models["a"]), weights(models["b"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 6
    assert len(merged) == 6 * len(SHAPES) + 3
    for number, (source, layer) in enumerate([(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]):
        for name in SHAPES:
            assert torch.equal(merged[f"model.layers.{number}.{name}"], source[f"model.layers.{layer}.{name}"])
    assert torch.equal(merged["lm_head.weight"], a["lm_head.weight"])


def test_layers_of_different_numbers_are_merged(models: dict[str, Path], tmp_path: Path) -> None:
    recipe = {
        "method": "task_arithmetic",
        "scale": 0.5,
        "base": models["ground"],
        "experts": [models["a"]],
        "stack": [{"layers": {"base": [0, 1], "a": [2, 3]}}],
    }
    _, merged = result(recipe, tmp_path / "out")
    ground, a = weights(models["ground"]), weights(models["a"])
    for layer in (0, 1):
        for name in SHAPES:
            start, other = ground[f"model.layers.{layer}.{name}"], a[f"model.layers.{layer + 2}.{name}"]
            wanted = start + 0.5 * (other - start)
            torch.testing.assert_close(merged[f"model.layers.{layer}.{name}"], wanted, rtol=1e-6, atol=1e-6)


REFUSED = {
    "an expert nobody knows": ({"select": [{"take": "copy", "of": "x"}]}, r"select\.0\.of: no expert .* 'x'"),
    "a value of no method": ({"select": [{"weigths": [1, 2]}, {}]}, r"select\.0\.weigths: unknown key.*'weights'"),
    "a value for a copy": ({"select": [{"take": "copy", "weights": [1, 2]}]}, r"'weights' says how to merge"),
    "a method nobody knows": ({"select": [{"method": "tise"}]}, r"no method 'tise'; did you mean 'ties'"),
    "of without copy": ({"select": [{"of": "a"}]}, r"write \{take: copy, of: a\}"),
    "weights for another count": ({"select": [{"experts": ["a"], "weights": [1, 2]}, {}]}, r"2 given for 1 experts"),
    "layers that are not there": ({"stack": [{"layers": [2, 4]}]}, r"has layers 0 to 3; \[2, 4\] asks for more"),
    "layers backwards": ({"stack": [{"layers": [2, 1]}]}, r"\[2, 1\] is no run of layers"),
    "unequal runs": ({"stack": [{"layers": {"base": [0, 1], "a": [0, 2]}}]}, r"different numbers of layers"),
    "nothing but the base": ({"select": [{"take": "copy"}]}, r"leaves no tensor to merge"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_a_byte_is_written(case: str, models: dict[str, Path], tmp_path: Path) -> None:
    changes, pattern = REFUSED[case]
    recipe = {"method": "average", "base": models["ground"], "experts": [models["a"], models["b"]], **changes}
    with pytest.raises(MergeloomError, match=pattern):
        merge_into(recipe, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


# --- an adapter folded in -----------------------------------------------------------------------------------------


def test_an_adapter_on_a_model_of_its_own(models: dict[str, Path], tmp_path: Path) -> None:
    """As expert and as base it is the checkpoint plus the product, and the card says both."""
    import yaml

    draw = torch.Generator().manual_seed(9)
    up, down = torch.randn(4, 2, generator=draw), torch.randn(2, 4, generator=draw)
    stem = "base_model.model.model.layers.1.self_attn.q_proj"
    factors = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    (tmp_path / "lora").mkdir()
    save_file(factors, tmp_path / "lora" / "adapter_model.safetensors")
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
    folded = {"source": models["a"], "adapter": tmp_path / "lora"}
    recipe = {"method": "task_arithmetic", "scale": 0.5, "base": models["ground"], "experts": [{"name": "x", **folded}]}
    first, expert = result(recipe, tmp_path / "expert")
    again, _ = result(yaml.safe_load((tmp_path / "expert" / "mergeloom.yaml").read_text()), tmp_path / "again")
    assert first.digest == again.digest
    turned = {**recipe, "base": folded, "experts": [models["ground"]]}
    _, base = result(turned, tmp_path / "base")
    ground, a = weights(models["ground"]), weights(models["a"])
    a["model.layers.1.self_attn.q_proj.weight"] = a["model.layers.1.self_attn.q_proj.weight"] + 3.0 * (up @ down)
    for name in ground:
        half = ground[name] + 0.5 * (a[name] - ground[name])
        torch.testing.assert_close(expert[name], half, rtol=0, atol=1e-5)
        torch.testing.assert_close(base[name], half, rtol=0, atol=1e-5)


# --- killed, and started again ------------------------------------------------------------------------------------


def test_a_merge_in_parts_goes_on_where_it_was(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted between its passes (one for each base): the second run reads what is missing, the bytes are the
    same.
    """
    import mergecore.engine.span
    import mergecore.execution.passes
    from mergecore.engine.executor import InProcess
    from mergecore.events import silent
    from mergecore.execution.fetch import fetch
    from mergecore.execution.lanes import run_works
    from mergecore.execution.place import Place, snapshots_of
    from mergecore.planning.merge_builder import MergeBuilder
    from mergecore.planning.pool import resolve_pool
    from mergecore.spec.sources import BaseSpec, ExpertSpec
    from mergecore.store.store import Store
    from tests.recipe_files import find

    experts = tuple(ExpertSpec(source=str(models[name]), name=name) for name in ("a", "b"))
    pool = resolve_pool(BaseSpec(source=str(models["ground"])), experts, None, find, silent)
    rules = [
        SelectRule(layers=(0, 1), take="copy", of="b"),
        SelectRule(layers=(2, 2), weights=(1.0, 3.0)),
        SelectRule(),
    ]
    plan = MergeBuilder(pool, rules, None, None).build(methods.Average(), list(pool.experts.values()))
    assert len(plan.parts) == 3
    passes: list[Any] = []
    real = mergecore.execution.passes.run_pass

    def counted(planned: Any, *rest: Any) -> Any:
        passes.append(planned)
        if len(passes) == 2:
            raise KeyboardInterrupt
        return real(planned, *rest)

    noted: list[str] = []
    journalled = mergecore.engine.span.write_journal

    def noting(job: Any, *rest: Any) -> None:
        noted.append(job.key)
        journalled(job, *rest)

    monkeypatch.setattr(mergecore.execution.passes, "run_pass", counted)
    monkeypatch.setattr(mergecore.engine.span, "write_journal", noting)
    digests, spans = [], []
    for root, interrupted in ((tmp_path / "whole", False), (tmp_path / "again", True)):
        passes[:], noted[:] = [] if interrupted else [None, None], []
        place = Place(pool, Store(root), InProcess(), silent, 1 << 30)
        for snapshot in snapshots_of(pool):
            fetch(place, snapshot)
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                run_works(place, [plan])
            assert noted, "the first pass is noted"
        run_works(place, [plan])
        record = place.store.record(plan.step)
        assert record is not None
        digests.append(record.digest)
        spans.append(sorted(noted))
    assert digests[0] == digests[1]
    assert spans[0] == spans[1], "and nothing of it is done again"
