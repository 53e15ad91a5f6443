"""What lies beside the weights: which files go with a merge, what is said of the rest, and under which names weights
are read and written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from mergecore.checkpoints.snapshot import read_snapshot
from mergecore.checkpoints.sources.hub import HubSource
from mergecore.checkpoints.sources.local import LocalSource
from mergecore.checkpoints.sources.selection import files_that_matter, weights_stem
from mergecore.checkpoints.sources.side_files import LIMIT, side_files
from mergecore.errors import SourceError
from mergecore.events import silent
from mergecore.identity.keys import digest
from tests.hub_server import running_hub
from tests.recipe_files import merge_into

SENTENCE_ENCODER = {
    "modules.json": json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]).encode(),
    "1_Pooling/config.json": b'{"pooling_mode_cls_token": true}',
    "2_Dense/config.json": b'{"in_features": 4}',
    "sentence_bert_config.json": b"{}",
    "config_sentence_transformers.json": b"{}",
}
GO_ALONG = {
    **SENTENCE_ENCODER,
    "processor_config.json": b"{}",
    "preprocessor_config.json": b"{}",
    "video_preprocessor_config.json": b"{}",
    "normalizer.json": b"{}",
    "modeling_toy.py": b"# code of auto_map",
    "quantize_config.json": b"{}",
    "qwen.tiktoken": b"aGk= 0",
    "LICENSE": b"free",
    "USE_POLICY.md": b"be nice",
    "tokenizer.json": b"{}",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
}
STAYS = {
    "optimizer.pt": b"0",
    "trainer_state.json": b"{}",
    "training_args.bin": b"0",
    "events.out.tfevents.1": b"0",
    "runs/today/events.out": b"0",
    "runs/config.json": b"{}",
    "checkpoint-500/config.json": b"{}",
    "checkpoints-1/trainer.json": b"{}",
    "pytorch_model.bin": b"0",
    "pytorch_model.bin.index.json": b"{}",
    "tf_model.h5": b"0",
    "model.gguf": b"0",
    "2_Dense/model.safetensors": b"0",
    "best/model.safetensors": b"0",
    "best/config.json": b"{}",
    "adapter_config.json": b"{}",
    "onnx/model.onnx": b"0",
    "onnx/config.json": b"{}",
}
UNSPOKEN = {"README.md": b"# a card", ".gitattributes": b"*", "mergeloom.yaml": b"method: average"}


def weights(seed: int) -> dict[str, torch.Tensor]:
    return {"layer.weight": torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))}


def write(folder: Path, files: Mapping[str, bytes], seed: int = 0, name: str = "model.safetensors") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights(seed), folder / name)
    for file, content in {"config.json": b'{"model_type": "toy"}', **files}.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
    return folder


def average(out: Path, *experts: Path, **more: Any) -> Any:
    return merge_into({"method": "average", "experts": list(experts), **more}, out)


def test_small_files_go_with_a_merge_and_the_rest_is_listed(tmp_path: Path) -> None:
    first = write(tmp_path / "a", {**GO_ALONG, **STAYS, **UNSPOKEN})
    second = write(tmp_path / "b", GO_ALONG, seed=1)
    model = average(tmp_path / "out", first, second)
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert written == {*GO_ALONG, "config.json", "model.safetensors", "README.md", "mergeloom.yaml"}
    assert all((tmp_path / "out" / name).read_bytes() == content for name, content in GO_ALONG.items())
    (said,) = [warning for warning in model.warnings if "left out of the result" in warning]
    listed = {name for name in STAYS if "/" not in name} | {"best/ (2 files)", "2_Dense/ (1 file)", "runs/ (1 file)"}
    assert all(name in said for name in listed) and not any(name in said for name in UNSPOKEN)
    assert said in (tmp_path / "out" / "README.md").read_text()


def test_of_a_hub_the_same_files_are_fetched(tmp_path: Path) -> None:
    files = {"model.safetensors": save(weights(0)), "config.json": b"{}", **GO_ALONG, **STAYS, **UNSPOKEN}
    with running_hub() as hub:
        hub.push("some/one", files)
        for source in (HubSource("some/one", cache_dir=tmp_path, endpoint=hub.endpoint) for _ in range(2)):
            folder = source.fetch(silent)  # the second is read from the list in the cache
            assert set(source.files) == {*GO_ALONG, "config.json", "model.safetensors"}
            assert all((folder / name).read_bytes() == content for name, content in GO_ALONG.items())
            assert {name for name in STAYS if name.count("/") < 2} <= set(source.left_out)
        assert not any(hub.served[name] for name in STAYS)


def test_large_files_and_folders_in_folders_stay() -> None:
    sizes = {"data.json": LIMIT + 1, "notes.json": LIMIT, "tokenizer.json": LIMIT + 1, "a/b/config.json": 1}
    assert side_files(sizes, lambda name: b"") == {"notes.json", "tokenizer.json"}


@pytest.mark.parametrize("content", [b"[1]", b"{", b'[{"path": 3}]', b"null", b'{"path": 1}'])
def test_a_list_of_modules_that_is_none_names_no_folder(content: bytes) -> None:
    sizes = {"modules.json": 1, "x/config.json": 1, "x/model.safetensors": 1}
    assert side_files(sizes, lambda name: content) == {"modules.json"}


def test_keys_of_checkpoints_with_files_known_before_stay(tmp_path: Path) -> None:
    """Version 0.1.0 took the digest of the same list. Licences, texts and pictures do not enter it."""
    known = {"tokenizer.json": b"{}", "generation_config.json": b"{}", "chat_template.jinja": b"x"}
    plain = read_snapshot(LocalSource(write(tmp_path / "plain", known)))
    names = sorted(["config.json", *known])
    assert plain.companions == digest([[name, plain.source.files[name].sha256] for name in names])
    texts = {"LICENSE": b"free", "NOTICE.txt": b"by", "docs/figure.png": b"0", "README.md": b"new", "x.pt": b"0"}
    assert read_snapshot(LocalSource(write(tmp_path / "texts", {**known, **texts}))).companions == plain.companions
    more = read_snapshot(LocalSource(write(tmp_path / "more", {**known, "modules.json": b"[]"})))
    assert more.companions != plain.companions and more.weights == plain.weights


def test_what_differs_between_experts_is_said(tmp_path: Path) -> None:
    ours = {"preprocessor_config.json": b'{"size": 8, "transformers_version": "4"}', "x.json": b"{}"}
    same = {"preprocessor_config.json": b'{ "size": 8,\n "transformers_version": "5"}', "LICENSE": b"other"}
    theirs = {"preprocessor_config.json": b'{"size": 16}', "modules.json": b"[]", "1_Pooling/config.json": b"{}"}
    base = write(tmp_path / "base", ours)
    experts = [write(tmp_path / name, files, seed) for seed, (name, files) in enumerate(
        (("a", same), ("b", theirs), ("c", theirs)), 1)]  # fmt: skip
    said = [warning for warning in average(tmp_path / "out", *experts, base=base).warnings if "expert" in warning]
    assert len(said) == 2 and not any("expert 'a'" in warning for warning in said)
    lacking, differing = said
    assert "expert 'b'" in lacking and "expert 'c'" in lacking and "modules.json, 1_Pooling/ (1 file)" in lacking
    assert "preprocessor_config.json differs" in differing and "x.json" not in "".join(said)


# --- names of weights -------------------------------------------------------------------------------------------------


PART = {"config.json": b'{"_class_name": "UNet2DConditionModel", "sample_size": 8}'}
DIFFUSION = "diffusion_pytorch_model.safetensors"


def test_parts_of_diffusers_keep_their_names(tmp_path: Path) -> None:
    folders = [write(tmp_path / name, PART, seed, DIFFUSION) for seed, name in enumerate("ab")]
    average(tmp_path / "out", *folders)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors*")) == [DIFFUSION]
    assert torch.equal(load_file(tmp_path / "out" / DIFFUSION)["layer.weight"], sum(
        load_file(folder / DIFFUSION)["layer.weight"] for folder in folders) / 2)  # fmt: skip
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(PART["config.json"])


def test_shards_of_diffusers_keep_their_names(tmp_path: Path) -> None:
    names = ("a.weight", "b.weight")
    folders = []
    for seed in range(2):
        folder = write(tmp_path / f"m{seed}", PART)
        (folder / "model.safetensors").unlink()
        files = [f"diffusion_pytorch_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
        for name, file in zip(names, files, strict=True):
            save_file({name: torch.full((600,), float(seed))}, folder / file)
        index = json.dumps({"metadata": {}, "weight_map": dict(zip(names, files, strict=True))})
        (folder / f"{DIFFUSION}.index.json").write_text(index)
        folders.append(folder)
    average(tmp_path / "out", *folders, shard_size="2kB")
    index = json.loads((tmp_path / "out" / f"{DIFFUSION}.index.json").read_text())["weight_map"]
    assert index == dict(zip(names, files, strict=True))
    values = {name: load_file(tmp_path / "out" / file)[name] for name, file in index.items()}
    assert all(torch.equal(value, torch.full((600,), 0.5)) for value in values.values())


@pytest.mark.parametrize(
    ("usual", "variant"),
    [
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"),
        ("weights.safetensors", "weights.bf16.safetensors"),
        ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.non_ema.safetensors"),
    ],
)
def test_of_twins_the_one_without_a_variant_is_read(usual: str, variant: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "twin", PART, 0, usual)
    save_file({name: value.half() for name, value in weights(0).items()}, folder / variant)
    snapshot = read_snapshot(LocalSource(folder))
    assert snapshot.tensors["layer.weight"].dtype == "F32" and snapshot.source.left_out == (variant,)
    (folder / usual).unlink()  # alone it is read
    assert read_snapshot(LocalSource(folder)).tensors["layer.weight"].dtype == "F16"


def test_of_two_indices_the_one_without_a_variant_is_read() -> None:
    shards = {f"d-0000{n}-of-00002.safetensors": 1 for n in (1, 2)}
    variants = {f"d.fp16-0000{n}-of-00002.safetensors": 1 for n in (1, 2)}
    indices = {f"d{part}.safetensors.index.json": 1 for part in ("", ".fp16")}

    def read(name: str) -> bytes:
        files = variants if "fp16" in name else shards
        return json.dumps({"weight_map": dict(enumerate(files))}).encode()

    expected = (*shards, "d.safetensors.index.json")
    assert files_that_matter({**shards, **variants, **indices}, read, "there") == tuple(sorted(expected))


def test_a_tensor_in_two_files_is_refused_with_a_remedy(tmp_path: Path) -> None:
    folder = write(tmp_path / "two", {}, 0, "one.safetensors")
    save_file(weights(1), folder / "two.safetensors")
    with pytest.raises(SourceError, match=r"stands in one\.safetensors and in two\.safetensors; keep one"):
        read_snapshot(LocalSource(folder))


@pytest.mark.parametrize(
    ("names", "stem"),
    [
        (["model.safetensors"], "model"),
        (["consolidated.safetensors"], "model"),
        (["diffusion_pytorch_model.fp16.safetensors"], "diffusion_pytorch_model"),
        (["open_clip_model.safetensors"], "open_clip_model"),
        (["diffusion_pytorch_model.safetensors", "model.safetensors"], "model"),
    ],
)
def test_only_names_that_a_library_looks_for_are_kept(names: list[str], stem: str) -> None:
    assert weights_stem(names) == stem
