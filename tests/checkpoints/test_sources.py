"""Sources: local folders, a hub, and what a person writes for either."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save

import mergecore.checkpoints.sources.hub_client
import mergecore.checkpoints.sources.local
from mergecore.checkpoints.snapshot import read_snapshot
from mergecore.checkpoints.sources import Source, SourceFile
from mergecore.checkpoints.sources.digests import DigestCache, file_sha256
from mergecore.checkpoints.sources.hub import HubSource
from mergecore.checkpoints.sources.local import LocalSource
from mergecore.checkpoints.sources.resolve import resolve
from mergecore.errors import CapacityError, SourceError
from mergecore.events import Event, silent
from tests.hub_server import Hub, running_hub

BIG = 150_000
"""Float32 elements of a shard: 600 kB, many times a header."""


def shard(seed: int, *names: str) -> bytes:
    """A safetensors file of BIG elements."""
    state = torch.Generator().manual_seed(seed)
    return bytes(save({name: torch.rand(BIG // len(names), generator=state) for name in names}))


SINGLE = {
    "model.safetensors": shard(1, "a", "b"),
    "config.json": b'{"model_type": "toy"}',
    "tokenizer.json": b"{}",
    "README.md": b"# a toy",
    "pytorch_model.bin": b"pickled",
}
SHARDED = {
    "model-00001-of-00002.safetensors": shard(2, "a"),
    "model-00002-of-00002.safetensors": shard(3, "b"),
    "consolidated.safetensors": b"not in the index",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode(),
    "config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
}
ADAPTER = {
    "adapter_model.safetensors": shard(4, "lora"),
    "adapter_config.json": b'{"r": 8}',
    "optimizer.pt": b"state",
}


def folder(path: Path, files: Mapping[str, bytes]) -> Path:
    """A directory with these files."""
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def sha256(content: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(content).hexdigest()


# --- local ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "left_out"),
    [
        (SINGLE, {"README.md", "pytorch_model.bin"}),
        (SHARDED, {"consolidated.safetensors"}),
        (ADAPTER, {"optimizer.pt"}),
        ({"one.safetensors": SINGLE["model.safetensors"], "two.safetensors": b"x"}, set()),
        ({**SINGLE, **ADAPTER}, {"README.md", "pytorch_model.bin", *ADAPTER}),
    ],
    ids=["single", "sharded", "adapter", "loose", "merged beside its adapter"],
)
def test_a_folder_lists_what_matters(tmp_path: Path, files: dict[str, bytes], left_out: set[str]) -> None:
    source = LocalSource(folder(tmp_path, files))
    expected = {name: SourceFile(len(data), sha256(data)) for name, data in files.items() if name not in left_out}
    assert source.files == expected
    assert source.fetch(silent) == tmp_path
    assert source.revision is None
    name = next(name for name in expected if name.endswith(".safetensors"))
    assert source.read(name, 1, 3) == files[name][1:4] or len(files[name]) < 4


def test_a_local_read_beyond_the_end_or_of_another_name(tmp_path: Path) -> None:
    source = LocalSource(folder(tmp_path, SINGLE))
    with pytest.raises(SourceError, match="21 bytes, 110 are needed"):
        source.read("config.json", 10, 100)
    with pytest.raises(SourceError, match=r"did you mean 'config.json'\?"):
        source.read("confg.json", 0, 1)


def test_a_missing_folder_offers_its_neighbour(tmp_path: Path) -> None:
    folder(tmp_path / "experts" / "category", ADAPTER)
    with pytest.raises(SourceError, match=r"does not exist; did you mean '.*experts/category'\?"):
        LocalSource(tmp_path / "experts" / "categroy")
    with pytest.raises(SourceError, match=r"did you mean '.*/experts/category'\?"):
        LocalSource(tmp_path / "expert" / "category")
    with pytest.raises(SourceError, match="is a file; give the folder"):
        LocalSource(tmp_path / "experts" / "category" / "adapter_config.json")


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"pytorch_model.bin": b"", "config.json": b"{}"}, "pytorch_model.bin; safetensors are needed. Convert: model"),
        ({"model-Q4.gguf": b""}, "gguf_file='model-Q4.gguf'"),
        ({"notes.txt": b""}, "this holds notes.txt"),
        ({"adapter_model.safetensors": b""}, "no adapter_config.json"),
        ({"model.safetensors.index.json": b"[]"}, "is not an index"),
        ({**SHARDED, "model-00002-of-00002.safetensors": None}, "names model-00002-of-00002.safetensors; 1 of 2"),
    ],
)
def test_what_is_no_checkpoint_says_why(tmp_path: Path, files: dict[str, bytes | None], said: str) -> None:
    folder(tmp_path, {name: data for name, data in files.items() if data is not None})
    with pytest.raises(SourceError, match=said.replace(".", r"\.")):
        LocalSource(tmp_path)


def test_an_empty_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="this is empty"):
        LocalSource(tmp_path)


def test_a_folder_that_changes_during_a_run_is_refused(tmp_path: Path) -> None:
    source = LocalSource(folder(tmp_path, SINGLE))
    (tmp_path / "config.json").write_bytes(b"{}")
    with pytest.raises(SourceError, match="has changed since this run began"):
        source.fetch(silent)


# --- remembering digests ----------------------------------------------------------------------------------------------


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were read to be hashed."""
    names: list[str] = []
    original = file_sha256

    def counted(path: Path, chunk: int = 0) -> str:
        names.append(Path(path).name)
        return original(path)

    monkeypatch.setattr(mergecore.checkpoints.sources.digests, "file_sha256", counted)
    return names


def test_a_file_is_hashed_once_and_again_when_it_changes(tmp_path: Path, hashed: list[str]) -> None:
    path = folder(tmp_path / "model", SINGLE)
    cache = tmp_path / "state" / "digests.jsonl"
    first = LocalSource(path, DigestCache(cache)).files
    assert sorted(hashed) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert LocalSource(path, DigestCache(cache)).files == first
    assert len(hashed) == 3
    os.utime(path / "config.json", ns=(0, time.time_ns() + 1_000_000_000))
    assert LocalSource(path, DigestCache(cache)).files == first
    assert hashed[3:] == ["config.json"]
    (path / "config.json").write_bytes(b'{"model_type": "changed"}')
    assert LocalSource(path, DigestCache(cache)).files != first
    assert hashed[4:] == ["config.json"]


def test_a_file_whose_time_was_set_back_is_hashed_again(tmp_path: Path, hashed: list[str]) -> None:
    """Another content of the same size at the same time, as `cp -p` over a file leaves it."""
    path = folder(tmp_path / "model", SINGLE) / "config.json"
    before, cache = path.stat(), tmp_path / "digests.jsonl"
    digest = DigestCache(cache).sha256(path)
    source = LocalSource(path.parent, DigestCache(cache))
    with path.open("r+b") as file:
        file.write(b"[")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert DigestCache(cache).sha256(path) != digest
    assert hashed == ["config.json", "config.json"]
    with pytest.raises(SourceError, match="has changed since this run began"):
        source.fetch(silent)


def test_lines_that_cannot_be_read_are_ignored(tmp_path: Path, hashed: list[str]) -> None:
    path = folder(tmp_path / "model", SINGLE) / "config.json"
    cache = tmp_path / "digests.jsonl"
    cache.write_bytes(b'garbage\n["a", 1]\n{"b": 2}\n[1, 2, 3, 4, 5]\n\xff\xfe\n["torn, no line en')
    digest = DigestCache(cache).sha256(path)
    assert (digest, len(hashed)) == (sha256(SINGLE["config.json"]), 1)
    assert DigestCache(cache).sha256(path) == digest
    assert len(hashed) == 1


def test_one_cache_sees_what_another_has_written(tmp_path: Path, hashed: list[str]) -> None:
    path = folder(tmp_path / "model", SINGLE) / "config.json"
    first_cache, other = DigestCache(tmp_path / "digests.jsonl"), DigestCache(tmp_path / "digests.jsonl")
    assert other.known(path) is None
    first_cache.sha256(path)
    assert other.known(path) == sha256(SINGLE["config.json"])
    copied = pickle.loads(pickle.dumps(first_cache))
    assert copied.known(path) is not None
    assert len(hashed) == 1


def test_several_processes_write_one_cache(tmp_path: Path) -> None:
    folder(tmp_path / "many", {f"{number}": b"%d" % number for number in range(60)})

    def write() -> None:
        cache = DigestCache(tmp_path / "digests.jsonl")
        for path in sorted((tmp_path / "many").iterdir()):
            cache.remember(path, path.name.rjust(64, "0"))

    writers = [multiprocessing.get_context("fork").Process(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    lines = [line for line in (tmp_path / "digests.jsonl").read_text().splitlines() if line]
    assert len(lines) == 180
    assert all(len(json.loads(line)) == 6 for line in lines)


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way of a folder")
    path = folder(tmp_path / "model", SINGLE) / "config.json"
    assert DigestCache(tmp_path / "file" / "digests.jsonl").sha256(path) == sha256(SINGLE["config.json"])


# --- a hub ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine; the library does not wait between attempts and keeps small pieces of a broken download."""
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 14)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with running_hub() as server:
        yield server


Opened = Callable[..., HubSource]


@pytest.fixture
def opened(hub: Hub, tmp_path: Path) -> Opened:
    """HubSource(repository, revision, …) on that hub, with a cache of its own."""

    def opened(repo_id: str, revision: str | None = None, token: str | None = None, offline: bool = False) -> HubSource:
        return HubSource(repo_id, revision, tmp_path / "cache", token, hub.endpoint, offline=offline)

    return opened


def refusal(question: Callable[[], object]) -> SourceError:
    """The error that `question` ends in, which hangs on none of the library's."""
    with pytest.raises(SourceError) as caught:
        question()
    assert caught.value.__context__ is None
    return caught.value


def test_a_revision_is_pinned_to_its_commit(hub: Hub, opened: Opened) -> None:
    commit = hub.push("owner/toy", SINGLE)
    source = opened("owner/toy", "main")
    hub.push("owner/toy", {**SINGLE, "config.json": b'{"model_type": "newer"}'})
    assert source.revision == commit
    assert source.uri == f"owner/toy@{commit}"
    assert repr(source) == f"HubSource('owner/toy@{commit}')"
    assert (source.fetch(silent) / "config.json").read_bytes() == SINGLE["config.json"]
    assert opened("owner/toy").revision != commit
    assert opened("owner/toy", commit).files == source.files


def test_digests_are_known_before_any_weights(hub: Hub, opened: Opened) -> None:
    hub.push("owner/toy", SHARDED)
    source = opened("owner/toy")
    kept = {name: SourceFile(len(data), sha256(data)) for name, data in SHARDED.items() if "consolidated" not in name}
    assert source.files == kept
    assert hub.weight_bytes() == 0
    assert not hub.served.keys() & {"README.md", "consolidated.safetensors"}


def test_the_same_files_are_the_same_snapshot_from_hub_and_folder(hub: Hub, opened: Opened, tmp_path: Path) -> None:
    hub.push("owner/adapter", ADAPTER)
    near, far = read_snapshot(LocalSource(folder(tmp_path / "near", ADAPTER))), read_snapshot(opened("owner/adapter"))
    assert (near.kind, near.weights, near.companions) == (far.kind, far.weights, far.companions)


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "a server without ranges"])
def test_a_header_is_had_without_the_weights(hub: Hub, opened: Opened, ranges: bool) -> None:
    hub.push("owner/toy", SINGLE)
    hub.ranges = ranges
    source = opened("owner/toy")
    whole = SINGLE["model.safetensors"]
    length = int.from_bytes(source.read("model.safetensors", 0, 8), "little")
    assert source.read("model.safetensors", 8, length) == whole[8 : 8 + length]
    if ranges:
        assert hub.served["model.safetensors"] < 4096
    assert source.read("model.safetensors", 200_000, 5) == whole[200_000:200_005]
    assert source.read("model.safetensors", len(whole), 0) == b""
    with pytest.raises(SourceError, match=r"bytes, .* are needed"):
        source.read("model.safetensors", len(whole) - 1, 2)
    with pytest.raises(SourceError, match=r"has no file 'model\.safetensor'; did you mean"):
        source.read("model.safetensor", 0, 1)


def test_a_fetch_gives_every_file_and_tells_how_far_it_is(hub: Hub, opened: Opened) -> None:
    hub.push("owner/toy", SHARDED)
    events: list[Event] = []
    source = opened("owner/toy")
    path = source.fetch(events.append)
    assert {name: (path / name).read_bytes() for name in source.files} == {
        name: data for name, data in SHARDED.items() if "consolidated" not in name
    }
    downloads = [event for event in events if event.activity == "download owner/toy"]
    total = sum(len(data) for name, data in SHARDED.items() if name.startswith("model-"))
    assert (downloads[-1].done, downloads[-1].total, downloads[-1].unit) == (total, total, "bytes")
    assert [event.done for event in downloads] == sorted(event.done for event in downloads)
    assert hub.weight_bytes() == total
    assert LocalSource(path).files == source.files


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "a server without ranges"])
def test_a_broken_download_goes_on_in_the_next_run(hub: Hub, opened: Opened, ranges: bool) -> None:
    hub.push("owner/toy", SINGLE)
    whole = SINGLE["model.safetensors"]
    hub.broken["model.safetensors"] = 400_000
    error = refusal(lambda: opened("owner/toy").fetch(silent))
    assert "the connection broke" in str(error)
    assert "what has been fetched is kept" in str(error)
    hub.broken.clear()
    hub.ranges = ranges
    before = hub.served["model.safetensors"]
    path = opened("owner/toy").fetch(silent)
    assert (path / "model.safetensors").read_bytes() == whole
    again = hub.served["model.safetensors"] - before
    assert again < len(whole) - 300_000 if ranges else again == len(whole)
    assert not list(path.parent.parent.glob("blobs/*incomplete"))


def test_wrong_content_is_refused_and_deleted(hub: Hub, opened: Opened) -> None:
    commit = hub.push("owner/toy", SINGLE)
    whole = SINGLE["model.safetensors"]
    hub.replaced["model.safetensors"] = whole[:-1] + bytes([whole[-1] ^ 1])
    source = opened("owner/toy")
    error = refusal(lambda: source.fetch(silent))
    assert f"owner/toy@{commit}/model.safetensors has other content than the hub reports" in str(error)
    hub.replaced.clear()
    assert (source.fetch(silent) / "model.safetensors").read_bytes() == whole


def test_a_file_shorter_than_reported_does_not_block_the_next_run(hub: Hub, opened: Opened) -> None:
    hub.push("owner/toy", SINGLE)
    hub.replaced["model.safetensors"] = SINGLE["model.safetensors"][:1000]
    for _ in range(2):
        refusal(lambda: opened("owner/toy").fetch(silent))
    hub.replaced.clear()
    opened("owner/toy").fetch(silent)


def test_a_cached_file_that_was_damaged_is_refused_and_deleted(hub: Hub, opened: Opened) -> None:
    hub.push("owner/toy", SINGLE)
    path = opened("owner/toy").fetch(silent) / "model.safetensors"
    path.resolve().write_bytes(b"short")
    assert "other content" in str(refusal(lambda: opened("owner/toy").fetch(silent)))
    opened("owner/toy").fetch(silent)
    assert path.read_bytes() == SINGLE["model.safetensors"]


def test_a_second_run_needs_no_network(hub: Hub, opened: Opened) -> None:
    commit = hub.push("owner/toy", SHARDED)
    first = opened("owner/toy")
    path = first.fetch(silent)
    asked = len(hub.requests)
    for again in (opened("owner/toy", commit), opened("owner/toy", "main", offline=True), opened("owner/toy", commit)):
        assert again.revision == commit
        assert again.files == first.files
        assert again.fetch(silent) == path
        assert again.read("model-00001-of-00002.safetensors", 0, 8) == SHARDED["model-00001-of-00002.safetensors"][:8]
    assert len(hub.requests) == asked


def test_offline_uses_what_another_tool_has_cached(hub: Hub, opened: Opened, tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    commit = hub.push("owner/toy", SINGLE)
    snapshot_download("owner/toy", cache_dir=tmp_path / "cache", endpoint=hub.endpoint, token=False)
    source = opened("owner/toy", offline=True)
    assert source.revision == commit
    assert source.files["model.safetensors"].sha256 == sha256(SINGLE["model.safetensors"])
    source.fetch(silent)


def test_offline_says_what_is_not_cached(hub: Hub, opened: Opened) -> None:
    commit = hub.push("owner/toy", SINGLE)
    for revision in ("main", commit):
        error = refusal(lambda revision=revision: opened("owner/toy", revision, offline=True).files)  # type: ignore[misc]
        assert f"owner/toy@{revision}" in str(error)
        assert "is not in the cache" in str(error)
    assert opened("owner/toy").files
    planned = opened("owner/toy", offline=True)
    assert "model.safetensors' is not in the cache" in str(refusal(lambda: planned.fetch(silent)))
    assert "model.safetensors' is not in the cache" in str(refusal(lambda: planned.read("model.safetensors", 0, 8)))


@pytest.mark.parametrize(
    ("repo_id", "revision", "said"),
    [
        ("owner/typo", None, "'owner/typo' was not found at http.* private and needs a token .* HF_TOKEN"),
        ("owner/private", None, "'owner/private' was not found"),
        ("owner/toy", "v9", "'owner/toy@v9': the repository has no such revision"),
        ("owner/to--y", None, "is not a hub id"),
        ("owner/toy", "../../main", "a revision is a branch, a tag or a commit"),
    ],
)
def test_refusals_of_the_hub(hub: Hub, opened: Opened, repo_id: str, revision: str | None, said: str) -> None:
    hub.push("owner/toy", SINGLE)
    hub.push("owner/private", SINGLE)
    hub.repositories["owner/private"].private = True
    with pytest.raises(SourceError, match=said):
        opened(repo_id, revision)


def test_a_file_that_has_gone(hub: Hub, opened: Opened) -> None:
    commit = hub.push("owner/toy", SINGLE)
    source = opened("owner/toy")
    hub.repositories["owner/toy"].commits[commit] = {}
    assert "the hub has no such file" in str(refusal(lambda: source.files))


@pytest.mark.parametrize(
    ("status", "said"),
    [(401, "valid one"), (403, "may not read"), (429, "wait some minutes"), (500, "start again later")],
)
def test_a_hub_that_is_ill(hub: Hub, opened: Opened, status: int, said: str) -> None:
    hub.push("owner/toy", SINGLE)
    hub.status = status
    error = refusal(lambda: opened("owner/toy", token=hub.token))
    assert f"answered {status} for 'owner/toy@main'" in str(error)
    assert said in str(error)
    assert hub.token not in str(error)


def test_no_network(opened: Opened, hub: Hub, tmp_path: Path) -> None:
    commit = hub.push("owner/toy", SINGLE)
    opened("owner/toy").fetch(silent)
    gone = "http://127.0.0.1:9"
    error = refusal(lambda: HubSource("owner/toy", None, tmp_path / "cache", None, gone))
    assert "cannot be reached for 'owner/toy@main'" in str(error)
    assert f"the cache holds commit {commit} of it" in str(error)
    assert HubSource("owner/toy", commit, tmp_path / "cache", None, gone).fetch(silent).is_dir()


def test_a_full_disk(hub: Hub, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.push("owner/toy", SINGLE)
    source = opened("owner/toy")
    assert source.files

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(mergecore.checkpoints.sources.hub_client, "http_get", full)
        with pytest.raises(CapacityError, match="is full: no room for"):
            source.fetch(silent)
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
        with pytest.raises(CapacityError, match=r"600,\d\d\d bytes .* has 1,000 free: 599,\d\d\d too few"):
            source.fetch(silent)


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_a_gated_repository_says_how_to_get_in(hub: Hub, opened: Opened) -> None:
    hub.push("owner/gated", SINGLE)
    hub.repositories["owner/gated"].gated = True
    error = refusal(lambda: opened("owner/gated").files)
    assert f"accept its licence at {hub.endpoint}/owner/gated" in str(error)
    assert "HF_TOKEN" in str(error)
    with pytest.raises(SourceError, match="the token given may not"):
        opened("owner/gated", token="hf_somebody_else").fetch(silent)
    path = opened("owner/gated", token=hub.token).fetch(silent)
    assert (path / "model.safetensors").read_bytes() == SINGLE["model.safetensors"]


def test_the_token_goes_to_the_hub_only(hub: Hub, opened: Opened) -> None:
    hub.push("owner/toy", SINGLE)
    source = opened("owner/toy", token=hub.token)
    source.read("model.safetensors", 0, 8)
    source.fetch(silent)
    assert {(request.host, request.token) for request in hub.requests} == {("127.0.0.1", True), ("localhost", False)}


def test_no_token_is_looked_for(hub: Hub, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.token)
    hub.push("owner/toy", SINGLE)
    opened("owner/toy").fetch(silent)
    assert not any(request.token for request in hub.requests)


@pytest.mark.parametrize("token", ["hf_wrong_but_secret", "hf_secret\nwith a break", "hf_gehe\u00efm"])
def test_the_token_is_in_no_message(
    hub: Hub, opened: Opened, token: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    for name in ("gated", "toy", "broken"):
        hub.push(f"owner/{name}", SINGLE)
    hub.repositories["owner/gated"].gated = True
    hub.broken["model.safetensors"] = 1000
    seen = []
    for repo_id in ("owner/gated", "owner/typo", "owner/toy"):
        with pytest.raises(SourceError) as caught:
            source = opened(repo_id, token=token)
            seen.append(repr(source))
            source.fetch(silent)
        seen += traceback.format_exception(caught.value)
        assert caught.value.__context__ is None
    captured = capfd.readouterr()
    seen += [captured.out, captured.err, caplog.text, *(repr(record.__dict__) for record in caplog.records)]
    data = "\n".join(seen)
    assert not [part for part in (token, *token.split()) if part.startswith("hf_") and part in data]


# --- what a person writes ---------------------------------------------------------------------------------------------


def test_folders_and_hub_ids(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    commit = hub.push("owner/toy", SINGLE)
    folder(tmp_path / "owner" / "near", ADAPTER)
    folder(tmp_path / "owner" / "toy@home", ADAPTER)

    def read(text: str, revision: str | None = None) -> Source:
        return resolve(text, revision=revision, cache_dir=tmp_path / "cache", endpoint=hub.endpoint)

    for text in ("owner/near", "./owner/near", str(tmp_path / "owner" / "near"), "owner/toy@home", "./owner/toy@home"):
        source = read(text)
        assert isinstance(source, LocalSource)
        assert (source.uri, source.revision) == (text, None)
    for source in (read("owner/toy"), read("owner/toy@main"), read("owner/toy", "main"), read(f"owner/toy@{commit}")):
        assert isinstance(source, HubSource)
        assert source.revision == commit


@pytest.mark.parametrize(
    ("text", "revision", "said"),
    [
        (
            "experts/categori",
            None,
            r"was not found .* no folder 'experts/categori' .* did you mean 'experts/category'\?",
        ),
        ("./experts/categori", None, r"does not exist; did you mean 'experts/category'\?"),
        ("./experts/category@main", None, "has no revision: leave it out"),
        ("experts/category", "main", "is a local folder and has no revision 'main'"),
        ("my/experts/category", None, "neither an existing folder nor a hub id"),
        (
            "category",
            None,
            r"neither an existing folder nor a hub id .*; the nearest existing folder is the current folder",
        ),
        ("owner/toy@v1", "v2", "says revision 'v1', beside it stands 'v2'"),
        ("~/no-such-folder-at-all", None, "does not exist"),
        (" ", None, "not an empty name"),
    ],
)
def test_what_cannot_be_meant(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, revision: str | None, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "experts" / "category", ADAPTER)
    with pytest.raises(SourceError, match=said):
        resolve(text, revision=revision, cache_dir=tmp_path / "cache", endpoint=hub.endpoint)


def test_sources_travel_to_other_processes(hub: Hub, opened: Opened, tmp_path: Path) -> None:
    hub.push("owner/toy", SINGLE)
    events: list[Event] = []
    near = LocalSource(folder(tmp_path / "near", SINGLE), report=events.append)
    for source in (near, opened("owner/toy")):
        assert pickle.loads(pickle.dumps(source)).files == source.files
    assert [event.activity for event in events if event.done] == [f"hash {name}" for name in near.files]


def test_the_hub_library_is_imported_only_when_a_hub_is_asked() -> None:
    code = (
        "import sys, mergecore.checkpoints.sources.local, mergecore.checkpoints.sources.resolve\n"
        "sys.exit('huggingface_hub' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
