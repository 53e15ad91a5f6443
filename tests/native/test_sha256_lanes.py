"""Hashing two files at a time: the digests of hashlib for any two lengths, and what happens where a file fails."""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
from pathlib import Path

import pytest

import mergecore.checkpoints.sources.digests
import mergecore.native.sha256_lanes
from mergecore.checkpoints.sources.digests import DigestCache
from mergecore.errors import SourceError
from mergecore.native.library import Library, library_in
from mergecore.native.sha256_lanes import SOURCE, function_in

PIECE = 1 << 17
EDGES = (0, 1, 55, 56, 63, 64, 65, 119, 120, 128, PIECE - 1, PIECE, PIECE + 1, PIECE + 56, 2 * PIECE + 63, 5 * PIECE)
"""Lengths at which padding takes another block or not, and at which reading ends with a whole piece or not."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Library:
    """A library that holds the loop, where this processor has instructions for it."""
    library = library_in(tmp_path_factory.mktemp("loops"))
    library.function(SOURCE, build=True, wait=True)
    return library


@pytest.fixture(params=["side by side", "plainly"])
def cache(request: pytest.FixtureRequest, built: Library, monkeypatch: pytest.MonkeyPatch) -> DigestCache:
    """A cache that hashes files of any length in lanes, and one that has none."""
    monkeypatch.setattr(mergecore.checkpoints.sources.digests, "SMALL", 0)
    if request.param == "plainly":
        return DigestCache()
    if function_in(built) is None:
        pytest.skip(f"no instructions for SHA-256 here: {built.problem(SOURCE)[:200]}")
    return DigestCache(None, built)


@pytest.mark.parametrize("many", [1, 2, 3, 4, 5, len(EDGES)])
def test_digests_are_those_of_hashlib(tmp_path: Path, cache: DigestCache, many: int) -> None:
    content = {str(size): os.urandom(size) for size in EDGES}
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    for chosen in itertools.islice(itertools.combinations(reversed(content), many), 0, None, max(1, many**3)):
        for name in chosen:
            os.utime(tmp_path / name)  # so it is not remembered from the round before
        begun = {name: cache.begin(tmp_path / name) for name in chosen}
        cache.work()
        assert {name: digest.result(0) for name, digest in begun.items()} == {
            name: hashlib.sha256(content[name]).hexdigest() for name in chosen
        }


def test_many_threads_ask_for_the_same_files(
    tmp_path: Path, cache: DigestCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mergecore.native.sha256_lanes, "STEPS", 1)
    paths = [tmp_path / str(number) for number in range(7)]
    for path in paths:
        path.write_bytes(os.urandom(9 * PIECE + 7))
    wanted = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    pairs: list[list[str]] = []
    threads = [threading.Thread(target=lambda: pairs.append([cache.sha256(path) for path in paths])) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pairs == [wanted] * 6


def test_what_cannot_be_read_is_said_and_the_others_are_hashed(tmp_path: Path, cache: DigestCache) -> None:
    good = tmp_path / "good"
    good.write_bytes(os.urandom(3 * PIECE))
    unreadable, folder = cache.begin(Path("/proc/self/mem")), cache.begin(tmp_path)
    assert cache.sha256(good) == hashlib.sha256(good.read_bytes()).hexdigest()
    for digest, reason in ((unreadable, "Input/output error"), (folder, "Is a directory")):
        with pytest.raises(SourceError, match=reason):
            digest.result(0)
    assert cache.sha256(good)  # the queue goes on


def test_a_file_that_is_written_to_meanwhile_is_refused(
    tmp_path: Path, cache: DigestCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "growing"
    path.write_bytes(os.urandom(PIECE))
    original = mergecore.checkpoints.sources.digests.stamp
    digest = cache.begin(path)

    def grown(asked: Path) -> tuple[str, int, int, int]:
        with path.open("ab") as file:
            file.write(b"more")
        return original(asked)

    monkeypatch.setattr(mergecore.checkpoints.sources.digests, "stamp", grown)
    cache.work()
    with pytest.raises(SourceError, match="changed while it was being hashed"):
        digest.result(0)


def test_a_loop_that_gives_other_digests_is_not_used(
    tmp_path: Path, built: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    if function_in(built) is None:
        pytest.skip("no instructions for SHA-256 here")
    wrong = SOURCE.replace("0x428a2f98", "0x428a2f99")
    monkeypatch.setattr(mergecore.native.sha256_lanes, "SOURCE", wrong)
    built.function(wrong, build=True, wait=True)
    assert function_in(built) is None
    assert "other digests" in built.problem(wrong)
    path = tmp_path / "model"
    path.write_bytes(os.urandom(3 << 20))
    assert DigestCache(None, built).sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
