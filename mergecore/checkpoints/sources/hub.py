"""A checkpoint on a model hub: pinned to a commit; digests are known before any weights; downloads continue.

Beside the files the cache keeps a list of each commit's files with their SHA-256. A commit that was seen once needs
no network.
"""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mergecore.checkpoints.sources import Source, SourceFile
from mergecore.checkpoints.sources.digests import DigestCache
from mergecore.checkpoints.sources.hub_client import LIBRARY, HubClient, Progress, not_cached, other_content
from mergecore.checkpoints.sources.local import piece, sizes_below
from mergecore.checkpoints.sources.selection import files_that_matter, left_out
from mergecore.errors import CapacityError, SourceError, nearest
from mergecore.events import Report

COMMIT = re.compile(r"[0-9a-f]{40}")
SHA256 = re.compile(r"[0-9a-f]{64}")


class HubSource(Source):
    """A checkpoint of a hub. It is read from the hub's cache where it is there.

    revision: branch, tag or commit; None: main. It is resolved to a commit when the source is created.
    cache_dir, endpoint: None for huggingface_hub's own. token: None sends none. offline: only what is cached.
    Raises SourceError where the checkpoint cannot be had, CapacityError where the disk is too small. No message ever
    contains the token.
    """

    def __init__(
        self,
        repo_id: str,
        revision: str | None = None,
        cache_dir: Path | None = None,
        token: str | None = None,
        endpoint: str | None = None,
        *,
        offline: bool = False,
        digests: DigestCache | None = None,
    ) -> None:
        self._client = HubClient(repo_id, cache_dir, token, endpoint, offline)
        self._digests = digests if digests is not None else DigestCache(None)
        self._offered: Mapping[str, SourceFile] | None = None
        self._commit = self._resolved(revision or "main")
        self.revision = self._commit
        self.uri = f"{repo_id}@{self._commit}"

    def __repr__(self) -> str:
        return f"HubSource({self.uri!r})"

    def _resolved(self, revision: str) -> str:
        """Return the commit of a revision. A commit whose files are listed needs no network."""
        pinned = COMMIT.fullmatch(revision) is not None
        if pinned and (self._client.offline or self._listing(revision).exists()):
            return revision
        asked = f"{self._client.repo_id}@{revision}"
        if ".." in revision or revision.startswith("/"):
            raise SourceError(f"'{asked}': a revision is a branch, a tag or a commit")
        reference = self._client.folder / "refs" / revision
        known = reference.read_text().strip() if reference.is_file() else ""
        if self._client.offline:
            if not COMMIT.fullmatch(known):
                raise not_cached(asked, self._client.cache)
            return known
        try:
            commit, self._offered = self._client.describe(revision)
        except SourceError as error:
            if not COMMIT.fullmatch(known):
                raise
            # An older commit is never taken in silence: it would give other numbers under the same name.
            problem = f"{error}; the cache holds commit {known} of it: pin that, or run offline"
        else:
            if not pinned:
                _write(reference, commit)
            return commit
        raise SourceError(problem)

    def _list_files(self) -> Mapping[str, SourceFile]:
        """List every file that matters. The hub tells the digests of large files; small ones are fetched and hashed."""
        listing = self._listing(self._commit)
        if listing.exists():
            listed = json.loads(listing.read_text())
            self._left_out = tuple(listed["left_out"])
            return {name: SourceFile(int(size), str(sha256)) for name, (size, sha256) in listed["files"].items()}
        offered = self._offered if self._offered is not None else self._cached()
        sizes = {name: file.size for name, file in offered.items()}
        names = files_that_matter(sizes, lambda name: self._small(name).read_bytes(), self.uri)
        self._left_out = left_out(offered, names)
        with ThreadPoolExecutor(8) as pool:
            files = dict(zip(names, pool.map(lambda name: self._hashed(name, offered[name]), names), strict=True))
        if not self._client.offline:
            known = {name: [file.size, file.sha256] for name, file in files.items()}
            _write(listing, json.dumps({"files": known, "left_out": self._left_out}))
        return files

    def _listing(self, commit: str) -> Path:
        # Version 0.1.0 listed fewer of the files beside the weights, under the commit's name alone.
        return self._client.folder / LIBRARY / f"{commit}-files.json"

    @property
    def _folder(self) -> Path:
        """The commit's folder in the cache."""
        return self._client.folder / "snapshots" / self._commit

    def _cached(self) -> dict[str, SourceFile]:
        """Return what the cache holds of the commit. The blob of a large file is named by its SHA-256."""
        folder = self._folder
        if not folder.is_dir():
            raise not_cached(self.uri, self._client.cache)
        blobs = {name: (folder / name).resolve() for name in sizes_below(folder)}
        return {
            name: SourceFile(blob.stat().st_size, blob.name if SHA256.fullmatch(blob.name) else None)
            for name, blob in blobs.items()
        }

    def _small(self, name: str) -> Path:
        return self._client.cached_file(self._commit, name)

    def _hashed(self, name: str, offered: SourceFile) -> SourceFile:
        if offered.sha256 is not None:
            return offered
        path = self._small(name)
        return SourceFile(path.stat().st_size, self._digests.sha256(path))

    def _local(self, name: str) -> Path:
        """Return where the cache has a file, or would have it."""
        return self._folder / name

    def at_hand(self, name: str) -> bool:
        """Return whether the cache has a file."""
        return self._local(name).exists()

    def read(self, name: str, start: int, length: int) -> bytes:
        """Read `length` bytes of a file from byte `start` on, from the cache or by range request.

        Raises SourceError where the file is shorter.
        """
        file = self.files.get(name)
        if file is None:
            raise SourceError(f"'{self.uri}' has no file '{name}'; {nearest(name, self.files)}")
        if start + length > file.size:
            raise SourceError(f"{self.uri}/{name} has {file.size:,} bytes, {start + length:,} are needed")
        path = self._local(name)
        if path.exists():
            return piece(path, start, length)
        if self._client.offline:
            raise not_cached(f"{self.uri}/{name}", self._client.cache)
        content = self._client.piece(self._commit, name, start, length) if length else b""
        if len(content) != length:
            raise SourceError(f"{self.uri}/{name}: the hub sent {len(content):,} of {length:,} bytes; start again")
        return content

    def fetch(self, report: Report) -> Path:
        """Return the cache's folder of the commit, with every file fetched and checked against its SHA-256.

        An interrupted download continues, in a later run too. Raises SourceError where a file cannot be had or has
        other content than the hub reports (it is deleted), CapacityError where the disk is too small.
        """
        missing = [name for name in self.files if not self._local(name).exists()]
        if missing and self._client.offline:
            raise not_cached(f"{self.uri}/{missing[0]}", self._client.cache)
        total = sum(self.files[name].size for name in missing)
        self._check_room(total)
        progress = Progress(f"download {self._client.repo_id}", total, report)
        for name in missing:
            self._client.stage(self._commit, name, self.files[name], self._digests, progress)
            self._client.cached_file(self._commit, name, progress)
        for name, file in self.files.items():
            path = self._local(name)
            sha256 = self._digests.sha256(path, report)
            if sha256 != file.sha256:
                path.resolve().unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                raise other_content(f"{self.uri}/{name}", sha256, file.sha256)
        return self._folder

    def _check_room(self, total: int) -> None:
        """Raise CapacityError where `total` bytes, less what interrupted downloads have left, do not fit on the
        disk.
        """
        cache = self._client.cache.absolute()
        free = shutil.disk_usage(next(folder for folder in (cache, *cache.parents) if folder.exists())).free
        lacking = total - self._client.partial_size() - free
        if lacking > 0:
            raise CapacityError(
                f"fetching {self.uri} needs {total:,} bytes in {cache}, which has {free:,} free: {lacking:,} too few; "
                "free some or choose another cache folder"
            )


def _write(path: Path, text: str) -> None:
    """Write a small file by renaming. Where the cache cannot be written nothing happens."""
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text)
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
