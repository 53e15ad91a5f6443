"""`mergeloom merge RECIPE OUT`: what lies in OUT, what is left beside it, and what it costs to start."""

from __future__ import annotations

import fcntl
import json
import os
import re
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergecore import merge
from mergecore.errors import CapacityError, MergeloomError, SourceError, StoreError
from mergecore.events import silent
from mergecore.methods import Average, TaskArithmetic, Ties
from mergecore.planning.pool import resolve_pool
from mergecore.spec.sources import BaseSpec, ExpertSpec
from tests.recipe_files import command, find, merge_into, plain
from tests.tiny_lm import CHAT_TEMPLATE, write_adapter, write_base, write_expert


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("models")
    base = write_base(folder / "base")
    return base, [write_expert(base, folder / f"e{number}", number) for number in (1, 2)]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def weights(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def bare(folder: Path) -> list[str]:
    """What lies in a folder besides the recipe and the cache."""
    return sorted(path.name for path in folder.iterdir() if path.name not in ("recipe.yaml", "cache"))


# --- what is written ----------------------------------------------------------------------------------------------


def test_transformers_loads_what_is_written(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, experts = models
    result = command(tmp_path, {"method": "task_arithmetic", "scale": 0.4, "base": base, "experts": experts})
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    state = weights(base)
    changes = [weights(expert) for expert in experts]
    by_hand = {n: v + 0.4 * sum(change[n] - v for change in changes) for n, v in state.items()}
    wanted = AutoModelForCausalLM.from_pretrained(base)
    wanted.load_state_dict(by_hand, strict=False)
    wanted.tie_weights()
    ids = tokenizer("the dog is a kind of dog", return_tensors="pt").input_ids
    assert (
        ids.tolist()
        == AutoTokenizer.from_pretrained(base)("the dog is a kind of dog", return_tensors="pt").input_ids.tolist()
    )
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, wanted(ids).logits, rtol=1e-4, atol=1e-4)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert (out / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert json.loads((out / "config.json").read_text()).keys() >= json.loads((base / "config.json").read_text()).keys()
    names = {path.name for path in base.iterdir()} | {"README.md", "mergeloom.yaml"}
    assert {path.name for path in out.iterdir()} == names


def test_the_same_numbers_as_in_memory(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, experts = models
    members = [ExpertSpec(source=str(path), name=path.name) for path in experts]
    pool = resolve_pool(BaseSpec(source=str(base)), members, None, find, silent)
    ids = [member.id for member in pool.members]
    state, changed = weights(base), [weights(path) for path in experts]
    drop = {"kind": "random", "rate": 0.5, "seed": 7, "rescale": "l1"}
    for number, method in enumerate(
        [
            Average(weights=(2, 1)),
            TaskArithmetic(scale=0.3),
            Ties(density=0.3, count="exact"),
            Ties.model_validate({"density": 0.4, "drop": drop, "count": "published"}),
        ]
    ):
        merge_into(
            {"method": method.name, "base": base, "experts": experts, **method.parameters()}, tmp_path / f"{number}"
        )
        in_memory = merge(method, base=state, experts=changed, ids=None if method.needs_ids else ids)
        assert equal(weights(tmp_path / f"{number}"), in_memory), method


def test_the_card_holds_the_recipe_and_where_everything_came_from(
    models: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, experts = models
    adapter = write_adapter(base, tmp_path / "adapter", 5)
    recipe = {
        "method": "ties",
        "density": 0.3,
        "drop": {"kind": "random", "rate": 0.25, "seed": 3},
        "base": base,
        "experts": [*experts, {"source": adapter, "name": "third"}],
        "dtype": "bfloat16",
        "select": [{"names": "*norm*", "take": "copy"}, {"layers": [0, 1]}],
        "shard_size": "200kB",
    }
    first = merge_into(recipe, tmp_path / "first")
    card = (tmp_path / "first/README.md").read_text()
    for path in [base, *experts, adapter]:
        member = resolve_pool(BaseSpec(source=str(base)), [ExpertSpec(source=str(path), name="e")], None, find, silent)
        assert str(path) in card
        assert member.experts["e"].id in card
    assert re.search(r"Share of each task vector that the threshold kept: e1 (29\.99|30\.)", card)
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == [str(base), *map(str, experts), str(adapter)]
    shown = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert shown == yaml.safe_load((tmp_path / "first/mergeloom.yaml").read_text())
    second = merge_into(shown, tmp_path / "second")
    assert second.digest == first.digest
    for name in bare(tmp_path / "first"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def test_a_hub_revision_is_pinned_in_the_card(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    from mergecore.checkpoints.sources import Source
    from mergecore.engine.executor import InProcess
    from mergecore.recipes.merge_recipe import merge_recipe
    from mergecore.spec.recipe import parse_recipe
    from mergecore.spec.sources import SourceSpec

    base, experts = models

    def pinned(source: SourceSpec) -> Source:
        source_found = find(SourceSpec(source=str(base if source.source.startswith("owner/base") else experts[0])))
        source_found.revision = "c0ffee"  # type: ignore[misc]
        return source_found

    recipe = parse_recipe({"method": "average", "base": "owner/base@main", "experts": ["owner/expert"]}, "recipe")
    merge_recipe(recipe, tmp_path / "out", pinned, InProcess(), silent)
    card = yaml.safe_load((tmp_path / "out/mergeloom.yaml").read_text())
    assert card["base"] == {"source": "owner/base", "revision": "c0ffee"}
    assert card["experts"] == [{"source": "owner/expert", "revision": "c0ffee", "name": "expert"}]


def test_folders_called_alike_are_all_merged(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, experts = models
    for number, expert in enumerate(experts):
        (tmp_path / f"run{number}").mkdir()
        (tmp_path / f"run{number}/final").symlink_to(expert)
    merge_into({"method": "average", "base": base, "experts": experts}, tmp_path / "apart")
    merge_into(
        {"method": "average", "base": base, "experts": [tmp_path / "run0/final", tmp_path / "run1/final"]},
        tmp_path / "alike",
    )
    assert equal(weights(tmp_path / "alike"), weights(tmp_path / "apart"))


def test_shards_and_their_index(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base, experts = models
    whole = merge_into({"method": "average", "base": base, "experts": experts}, tmp_path / "whole")
    parts = merge_into(
        {"method": "average", "base": base, "experts": experts, "shard_size": "100kB"}, tmp_path / "parts"
    )
    assert parts.digest == whole.digest
    index = json.loads((tmp_path / "parts/model.safetensors.index.json").read_text())
    values = weights(tmp_path / "whole")
    assert index["weight_map"].keys() == values.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in values.values())
    files = sorted(path.name for path in (tmp_path / "parts").glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)]
    assert set(index["weight_map"].values()) == set(files)
    for file in files:
        with safe_open(tmp_path / "parts" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert {n for n, place in index["weight_map"].items() if place == file} == set(opened.keys())
            assert all(torch.equal(opened.get_tensor(name), values[name]) for name in opened.keys())
        big = (tmp_path / "parts" / file).stat().st_size > 102_000
        with safe_open(tmp_path / "parts" / file, "pt") as opened:
            assert not big or len(list(opened.keys())) == 1
    left = AutoModelForCausalLM.from_pretrained(tmp_path / "parts").state_dict()
    assert equal(left, AutoModelForCausalLM.from_pretrained(tmp_path / "whole").state_dict())
    again = merge_into(
        {"method": "average", "base": tmp_path / "parts", "experts": [tmp_path / "parts"]}, tmp_path / "again"
    )
    assert again.digest == whole.digest
    assert not (tmp_path / "again/model.safetensors.index.json").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype_of_the_file_rounds_once(dtype: str, models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base, experts = models
    recipe = {"method": "average", "base": base, "experts": experts}
    merge_into({**recipe, "dtype": dtype}, tmp_path / "narrow")
    merge_into(recipe, tmp_path / "wide")
    wide = {name: value.to(getattr(torch, dtype)) for name, value in weights(tmp_path / "wide").items()}
    assert equal(weights(tmp_path / "narrow"), wide)
    config = json.loads((tmp_path / "narrow/config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == dtype
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "narrow", dtype="auto").dtype == getattr(torch, dtype)


# --- families of models -------------------------------------------------------------------------------------------


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_positions=16, n_embd=24, n_layer=2, n_head=2))


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(vocab_size=61, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )


def bert() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(vocab_size=61, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    )


def vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(
        ViTConfig(
            hidden_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=16,
            patch_size=8,
            num_labels=3,
        )
    )


def moved_on(model: Any, seed: int) -> Any:
    """The model after a little noise on everything that floats."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn(value.shape) * 0.05)
    return model


@pytest.mark.parametrize("family", [gpt2, t5, bert, vit])
def test_families(family: Any, tmp_path: Path) -> None:
    """Tied weights, convolutions, scalars; a sharded expert in bfloat16 beside a single file in float32."""
    torch.manual_seed(0)
    model = family()
    model.save_pretrained(tmp_path / "base")
    moved_on(model, 1).save_pretrained(tmp_path / "one")
    moved_on(model, 2).to(torch.bfloat16).save_pretrained(tmp_path / "two", max_shard_size="20KB")
    assert (tmp_path / "two/model.safetensors.index.json").exists()
    recipe = {"method": "task_arithmetic", "scale": 0.5, "base": tmp_path / "base",
              "experts": [tmp_path / "one", tmp_path / "two"]}  # fmt: skip
    merge_into(recipe, tmp_path / "out")
    states = [
        type(model).from_pretrained(tmp_path / name, dtype=torch.float32).state_dict()
        for name in ("base", "one", "two", "out")
    ]
    base, first, two, out = states
    for name, value in base.items():
        wanted = value + 0.5 * ((first[name] - value) + (two[name] - value)) if value.is_floating_point() else value
        torch.testing.assert_close(out[name], wanted, rtol=1e-6, atol=1e-6)
    assert weights(tmp_path / "out").keys() == weights(tmp_path / "base").keys()


def test_buffers_scalars_and_mixed_dtypes(tmp_path: Path) -> None:
    """Whatever a file can hold is merged where it floats, else copied from the base bit for bit."""
    generator = torch.Generator().manual_seed(0)

    def single(number: int) -> dict[str, Tensor]:
        def drawn(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        return {
            "half": drawn(5, 7).half(),
            "brain": drawn(300).bfloat16(),
            "double": drawn(3, 4).double(),
            "scalar": drawn(),
            "single": drawn(1),
            "cube": drawn(2, 3, 4, 5),
            "empty": torch.empty(0, 4),
            "ids": torch.arange(6) + number,
            "mask": torch.tensor([True, False, number > 0]),
            "bytes": torch.tensor([1, 2, number], dtype=torch.uint8),
            "odd.größe/naïve": drawn(4),
        }

    models = [single(number) for number in range(3)]
    for number, tensors in enumerate(models):
        (tmp_path / f"m{number}").mkdir()
        save_file(tensors, tmp_path / f"m{number}/model.safetensors")
    for number, method in enumerate([Average(), Ties(density=0.5), TaskArithmetic(scale=0.5)]):
        recipe = {"method": method.name, **method.parameters(), "base": tmp_path / "m0",
                  "experts": [tmp_path / "m1", tmp_path / "m2"], "shard_size": "1kB"}  # fmt: skip
        merge_into(recipe, tmp_path / f"out{number}")
        merged = weights(tmp_path / f"out{number}")
        assert {n: (v.dtype, v.shape) for n, v in merged.items()} == {
            n: (v.dtype, v.shape) for n, v in models[0].items()
        }
        assert all(torch.equal(merged[name], models[0][name]) for name in ("ids", "mask", "bytes", "empty"))
    mean = (models[1]["double"].float() + models[2]["double"].float()) / 2
    assert torch.equal(weights(tmp_path / "out0")["double"], mean.double())


# --- what is left beside ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["file", "folder", "dangling link"])
def test_what_exists_is_not_touched(what: str, models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, experts = models
    out = tmp_path / "out"
    if what == "file":
        out.write_text("mine")
    elif what == "folder":
        out.mkdir()
        (out / "mine").write_text("mine")
    else:
        out.symlink_to(tmp_path / "nowhere")
    result = command(tmp_path, {"method": "average", "base": base, "experts": experts})
    assert result.exit_code == 1
    assert re.search(r"out exists already; choose another name or remove it", result.output)
    assert bare(tmp_path) == ["out"]
    assert what != "file" or out.read_text() == "mine"
    assert what != "folder" or (out / "mine").read_text() == "mine"
    assert what != "dangling link" or out.is_symlink()


def test_a_draft_that_is_not_ours_is_not_touched(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, experts = models
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp/thesis").write_text("mine")
    result = command(tmp_path, {"method": "average", "base": base, "experts": experts})
    assert result.exit_code == 1
    assert "is something else; move it away" in result.output
    assert (tmp_path / "out.tmp/thesis").read_text() == "mine"


def test_what_a_killed_merge_left_is_replaced(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, experts = models
    (tmp_path / "out.tmp/.work").mkdir(parents=True)
    (tmp_path / "out.tmp/model.safetensors").write_text("half")
    result = command(tmp_path, {"method": "average", "base": base, "experts": experts})
    assert result.exit_code == 0, result.output
    assert bare(tmp_path) == ["out"]


def test_two_merges_into_one_name(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """The second is told; the first goes on undisturbed."""
    base, experts = models
    (tmp_path / "out.tmp/.work").mkdir(parents=True)
    handle = os.open(tmp_path / "out.tmp", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(StoreError, match="another merge; wait for it or choose another name"):
        merge_into({"method": "average", "base": base, "experts": experts}, tmp_path / "out")
    assert (tmp_path / "out.tmp/.work").is_dir()
    os.close(handle)


class Stop(Exception):
    """Something nobody foresaw."""


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (OSError(28, "No space left on device"), MergeloomError),
        (CapacityError("full"), MergeloomError),
        (Stop(), Stop),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (MemoryError(), MemoryError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_no_draft_is_left_after_any_error(
    error: BaseException,
    seen: type[BaseException],
    models: tuple[Path, list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mergecore.tensors.sinks import ShardSink

    base, experts = models
    write, calls = ShardSink.write, [0]

    def failing(self: ShardSink, name: str, start: int, values: Tensor) -> None:
        calls[0] += 1
        if calls[0] == 5:
            raise error
        write(self, name, start, values)

    monkeypatch.setattr(ShardSink, "write", failing)
    with pytest.raises(seen):
        merge_into({"method": "average", "base": base, "experts": experts}, tmp_path / "out")
    assert bare(tmp_path) == []


def test_a_file_that_shrinks_while_it_is_read(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """And one that is written to: the card's digests would not be those of what was merged."""
    from mergecore.engine.executor import InProcess

    base, _ = models

    def attempt(spoil: Any) -> None:
        expert = write_expert(base, tmp_path / "expert", 9)

        class Meanwhile(InProcess):
            def each(
                self, function: Any, shared: Any, items: Any, at_once: int | None = None
            ) -> Iterator[tuple[int, Any]]:
                spoil(expert / "model.safetensors")
                return super().each(function, shared, items, at_once)

        from mergecore.recipes.merge_recipe import merge_recipe
        from mergecore.spec.recipe import parse_recipe

        recipe = parse_recipe(plain({"method": "average", "base": base, "experts": [expert]}), "recipe")
        merge_recipe(recipe, tmp_path / "out", find, Meanwhile(), silent)

    def shorter(path: Path) -> None:
        os.truncate(path, path.stat().st_size // 2)

    def other(path: Path) -> None:
        time.sleep(0.02)
        with path.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(b"\0\0\0\0")

    with pytest.raises(MergeloomError, match=r"expert/model\.safetensors ends inside tensor 'model\..*fetch or write"):
        attempt(shorter)
    with pytest.raises(SourceError, match=r"model\.safetensors has changed since this run began; start again"):
        attempt(other)
    assert bare(tmp_path) == ["expert"]


def test_not_finite_leaves_nothing(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, experts = models
    bad = write_expert(base, tmp_path / "bad", 3)
    tensors = weights(bad)
    name = "model.layers.1.mlp.up_proj.weight"
    for value in (float("nan"), float("-inf")):
        tensors[name][3, 4] = value
        save_file(tensors, bad / "model.safetensors")
        result = command(tmp_path, {"method": "ties", "base": base, "experts": [*experts, bad]})
        assert result.exit_code == 1
        said = " ".join(result.output.split())
        assert re.search(
            rf"expert 'bad': tensor '{name}' holds (nan|-inf); repair the checkpoint, or .*take: copy", said
        )
        assert "Traceback" not in result.output
        assert bare(tmp_path) == ["bad"]
    select = [{"names": name, "take": "copy"}, {}]
    result = command(tmp_path, {"method": "ties", "base": base, "experts": [*experts, bad], "select": select})
    assert result.exit_code == 0, result.output
    assert torch.equal(weights(tmp_path / "out")[name], weights(base)[name])


def test_a_result_that_overflows_names_the_method(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, experts = models
    recipe = {"method": "task_arithmetic", "scale": 1e7, "dtype": "float16", "base": base, "experts": experts}
    with pytest.raises(
        MergeloomError, match=r"method 'task_arithmetic': tensor 'model\..*smaller scale or a wider dtype"
    ):
        merge_into(recipe, tmp_path / "out")
    assert bare(tmp_path) == []


def test_umask_is_respected(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, experts = models
    before = os.umask(0o027)
    try:
        merge_into({"method": "average", "base": base, "experts": experts, "shard_size": "200kB"}, tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o640}


def test_durable_syncs_everything(
    models: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = models
    synced: list[str] = []
    sync = os.fsync

    def noted(handle: int) -> None:
        synced.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        sync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    result = command(tmp_path, {"method": "average", "base": base, "experts": experts}, "--durable")
    assert result.exit_code == 0, result.output
    assert set(synced) == {path.name for path in (tmp_path / "out").iterdir()} | {"out.tmp", tmp_path.name}
    assert synced.index("out.tmp") < synced.index(tmp_path.name), "the name last, once all that it names is safe"


def test_workers_do_not_matter_and_threads_are_given_back(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, experts = models
    recipe = {"method": "ties", "base": base, "experts": experts}
    digests = set()
    for workers in ("1", "3"):
        result = command(tmp_path, recipe, "--workers", workers, out=f"out{workers}")
        assert result.exit_code == 0, result.output
        digests.add(result.output.split()[-1])
    assert len(digests) == 1
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        merge(Average(), experts=[weights(path) for path in experts])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_merges_at_the_same_time_in_one_process(models: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, experts = models
    wanted = merge_into({"method": "ties", "base": base, "experts": experts}, tmp_path / "alone").digest
    failures: list[str] = []

    def single(number: int) -> None:
        failures.append(merge_into({"method": "ties", "base": base, "experts": experts}, tmp_path / f"{number}").digest)

    threads = [threading.Thread(target=single, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [wanted] * 4


# --- as a person starts it ----------------------------------------------------------------------------------------

WATCHED = """
import sys, time
began = time.perf_counter()
from flows.cli.main import main
try:
    main(["merge", "recipe.yaml", "out"])
except SystemExit as end:
    assert not end.code, end.code
took = time.perf_counter() - began
heavy = {"prefect", "dask", "distributed", "mlflow", "transformers", "lm_eval", "sklearn", "matplotlib", "datasets"}
print(sorted(heavy & {name.partition(".")[0] for name in sys.modules}), round(took, 2))
"""


def test_a_real_process_with_relative_paths_pulls_in_nothing_heavy(
    models: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, experts = models
    for name, path in [("base", base), ("e1", experts[0]), ("e2", experts[1])]:
        (tmp_path / name).symlink_to(path)
    (tmp_path / "recipe.yaml").write_text("method: average\nbase: base\nexperts: [./e1, e2]\n")
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    told, seen = done.stdout.strip().splitlines()
    assert re.fullmatch(r"out  [\d.]+ [kM]?B  digest [0-9a-f]{16}", told)
    assert seen.startswith("[] "), seen
    merge_into({"method": "average", "base": base, "experts": experts}, tmp_path / "again")
    assert equal(weights(tmp_path / "out"), weights(tmp_path / "again"))


def test_errors_of_a_real_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flows.cli.main", "merge", "recipe.yaml", "out"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.strip() == "Error: recipe.yaml does not exist"


def readings_of(
    recipe: dict[str, Any], out: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[list[int]], list[list[int]]]:
    """The spans of every reading of a merge, in the order in which they were begun; and how many elements each has."""
    import mergecore.engine.pass_plan
    import mergecore.execution.passes
    import mergecore.recipes.merge_recipe
    from mergecore.engine.executor import InProcess
    from mergecore.spec.recipe import parse_recipe

    readings: list[list[int]] = []
    sizes: list[list[int]] = []

    class Noting(InProcess):
        def each(self, function: Any, shared: Any, items: Any, at_once: int | None = None) -> Any:
            readings.append(list(items))
            spans = shared.plan.spans
            sizes.append([sum(stop - start for unit in spans[n] for _, start, stop in unit) for n in items])
            return super().each(function, shared, items, at_once)

    monkeypatch.setattr(
        mergecore.execution.passes,
        "plan_spans",
        lambda tensors, per: mergecore.engine.pass_plan.plan_spans(tensors, per, size=1),
    )
    mergecore.recipes.merge_recipe.merge_recipe(parse_recipe(plain(recipe), "recipe"), out, find, Noting(), silent)
    return readings, sizes


def test_a_merge_begins_where_its_statistics_ended(
    models: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a page cache still has of a pool that is larger than it was read last."""
    base, experts = models
    recipe = {"method": "ties", "density": 0.3, "base": base, "experts": experts}
    (first, *_, merge), _ = readings_of(recipe, tmp_path / "out", monkeypatch)
    assert first == sorted(first) and merge == sorted(merge, reverse=True) and len(merge) > 2


def test_whole_tensors_are_begun_largest_first(
    models: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = models
    recipe = {"method": "sce", "base": base, "experts": experts}
    _, (sizes,) = readings_of(recipe, tmp_path / "out", monkeypatch)
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > sizes[-1]
