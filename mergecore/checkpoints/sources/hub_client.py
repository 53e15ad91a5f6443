"""Requests to a model hub, and its refusals as our errors. This is the only file that imports huggingface_hub.

Files lie in that library's own cache: what other tools have fetched is used, and they use ours. Large files are
downloaded here, because the library deletes a half-fetched file when its process ends.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.file_download import http_get, is_xet_available, repo_folder_name  # type: ignore[attr-defined]
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # it exports them at run time only
    WeakFileLock,
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
)

from mergecore.checkpoints.sources import SourceFile
from mergecore.checkpoints.sources.digests import DigestCache
from mergecore.errors import CapacityError, MergeloomError, SourceError
from mergecore.events import Event, Report, silent

LIBRARY = "mergeloom"
TIMEOUT = 30.0
"""Seconds that the hub may take to answer."""
EXPECTED = (OSError, ValueError, errors.HTTPError)  # type: ignore[attr-defined]
"""What huggingface_hub raises: HTTP, network and disk errors, and ValueError for names it does not accept."""

T = TypeVar("T")


class Progress:
    """The bytes of a download so far, reported as events."""

    def __init__(self, label: str, total: int, report: Report) -> None:
        self._label, self._total, self._report = label, total, report
        self._done = 0

    def advance(self, count: float) -> None:
        """Report `count` more bytes."""
        self._done = min(self._done + int(count), self._total)
        self._report(Event(self._label, self._done, self._total, "bytes"))

    def counter(self) -> Any:
        """Return a class that huggingface_hub takes for a progress bar; it draws nothing."""
        progress = self

        class Counter:
            def __init__(self, *arguments: object, **options: object) -> None:
                self.n = 0

            def __enter__(self) -> Counter:
                return self

            def __exit__(self, *raised: object) -> None:
                self.close()

            def update(self, count: float | None = 1) -> None:
                progress.advance(count or 0)

            def update_transfer(self, count: float | None = 1) -> None:
                """Bytes on the wire, fewer than the file's where chunks are shared: not counted twice."""

            def set_postfix_str(self, text: str, refresh: bool = False) -> None:
                """Rates are of no use here."""

            set_transfer_postfix_str = set_postfix_str

            def close(self) -> None:
                """Nothing is drawn."""

        return Counter


class HubClient:
    """One repository of a hub. Every method raises SourceError or CapacityError; no message ever contains the token."""

    def __init__(
        self, repo_id: str, cache_dir: Path | None, token: str | None, endpoint: str | None, offline: bool
    ) -> None:
        self.repo_id = repo_id
        self.cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser()
        self.offline = offline
        self._token = _checked(token)
        self._endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self.folder = self.cache / self._ask(repo_id, lambda: str(repo_folder_name(repo_id=repo_id, repo_type="model")))

    def describe(self, revision: str) -> tuple[str, dict[str, SourceFile]]:
        """Return the commit of a revision, and all its files: sizes, and the SHA-256 of the large ones."""
        hub = huggingface_hub.HfApi(endpoint=self._endpoint, token=self._token, library_name=LIBRARY)
        about = self._ask(
            f"{self.repo_id}@{revision}",
            lambda: hub.model_info(self.repo_id, revision=revision, files_metadata=True, timeout=TIMEOUT),
        )
        return str(about.sha), {
            entry.rfilename: SourceFile(
                (entry.lfs.size if entry.lfs else entry.size) or 0, entry.lfs.sha256 if entry.lfs else None
            )
            for entry in about.siblings or ()
        }

    def piece(self, commit: str, name: str, start: int, length: int) -> bytes:
        """Return up to `length` bytes of a file from byte `start` on, by range request."""
        return self._ask(f"{self.repo_id}@{commit}/{name}", lambda: self._range(commit, name, start, length, 3))

    def _range(self, commit: str, name: str, start: int, length: int, attempts: int) -> bytes:
        headers = self._headers() | {"Range": f"bytes={start}-{start + length - 1}"}
        url = self._url(commit, name)
        content = bytearray()
        try:
            with http_stream_backoff("GET", url, headers=headers, timeout=TIMEOUT, retry_on_exceptions=()) as response:
                hf_raise_for_status(response)
                skip = 0 if response.status_code == 206 else start  # a server without ranges sends from the beginning
                for chunk in response.iter_bytes(1 << 16):
                    content += chunk[skip:]
                    skip = max(0, skip - len(chunk))
                    if len(content) >= length:
                        break
        except errors.HTTPError as error:  # type: ignore[attr-defined]
            # A connection kept open may have gone stale meanwhile; what the hub has answered stays its answer.
            if attempts == 1 or isinstance(error, errors.HfHubHTTPError):
                raise
            return self._range(commit, name, start, length, attempts - 1)
        return bytes(content[:length])

    def cached_file(self, commit: str, name: str, progress: Progress | None = None) -> Path:
        """Return a file in the library's cache. The library fetches it where it is not there yet."""
        counter = (progress or Progress(name, 0, silent)).counter()
        path = self._ask(
            f"{self.repo_id}@{commit}/{name}",
            lambda: huggingface_hub.hf_hub_download(
                self.repo_id,
                name,
                revision=commit,
                cache_dir=self.cache,
                token=self._token,
                endpoint=self._endpoint,
                local_files_only=self.offline,
                library_name=LIBRARY,
                tqdm_class=counter,
            ),
        )
        return Path(path)

    def stage(self, commit: str, name: str, file: SourceFile, digests: DigestCache, progress: Progress) -> None:
        """Put a file into the cache if its SHA-256 is right. Continue what an earlier attempt has left.

        What the hub offers through Xet is left to the library, which fetches it in deduplicated chunks.
        """
        self._ask(f"{self.repo_id}@{commit}/{name}", lambda: self._stage(commit, name, file, digests, progress))

    def _stage(self, commit: str, name: str, file: SourceFile, digests: DigestCache, progress: Progress) -> None:
        about = huggingface_hub.get_hf_file_metadata(
            self._url(commit, name), token=self._token, endpoint=self._endpoint, library_name=LIBRARY
        )
        if about.etag is None or (about.xet_file_data is not None and is_xet_available()):
            return
        blob = self.folder / "blobs" / about.etag
        lock = self.cache / ".locks" / self.folder.name / f"{about.etag}.lock"
        for path in (blob, lock):
            path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            if blob.exists():
                return
            partial = blob.with_name(f"{blob.name}.{LIBRARY}.incomplete")
            self._append(commit, name, file.size, partial, progress)
            sha256 = digests.sha256(partial)
            if sha256 != file.sha256:
                partial.unlink()
                raise other_content(f"{self.repo_id}@{commit}/{name}", sha256, file.sha256)
            partial.replace(blob)
            digests.remember(blob, sha256)

    def _append(self, commit: str, name: str, size: int, partial: Path, progress: Progress) -> None:
        """Fetch what `partial` lacks of `size` bytes."""
        have = partial.stat().st_size if partial.exists() else 0
        if have > size:
            partial.unlink()
            have = 0
        progress.advance(have)
        try:
            with partial.open("ab") as file:
                http_get(
                    self._url(commit, name),
                    file,
                    resume_size=have,
                    headers=self._headers(),
                    expected_size=size,
                    displayed_filename=name,
                    tqdm_class=progress.counter(),
                )
        except errors.HfHubHTTPError as error:
            if error.response.status_code == 416:  # the file is shorter than reported: what is here leads nowhere
                partial.unlink()
            raise

    def partial_size(self) -> int:
        """Return the bytes that interrupted downloads of this repository have left."""
        return sum(path.stat().st_size for path in self.folder.glob(f"blobs/*.{LIBRARY}.incomplete"))

    def _headers(self) -> dict[str, str]:
        return {**build_hf_headers(token=self._token, library_name=LIBRARY), "Accept-Encoding": "identity"}

    def _url(self, commit: str, name: str) -> str:
        return huggingface_hub.hf_hub_url(self.repo_id, name, revision=commit, endpoint=self._endpoint)

    # --- what can go wrong --------------------------------------------------------------------------------------------

    def _ask(self, asked: str, question: Callable[[], T]) -> T:
        """Return the answer of huggingface_hub; turn its errors into ours.

        They are raised outside of the handler: an exception of the library may quote a header, and must not be
        attached.
        """
        try:
            return question()
        except EXPECTED as error:
            problem = self._refusal(asked, error) or self._failure(asked, error)
        raise problem

    def _refusal(self, asked: str, error: BaseException) -> MergeloomError | None:
        """Return the error for what the hub refuses; None where it did not refuse."""
        page = f"{self._endpoint}/{self.repo_id}"
        error = _reason(error)
        if isinstance(error, errors.GatedRepoError):
            return SourceError(
                f"'{self.repo_id}' is gated: accept its licence at {page}, then give a token that may read it "
                f"(environment variable HF_TOKEN){'; the token given may not' if self._token else ''}"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return SourceError(f"'{asked}': the repository has no such revision; its branches: {page}/branches")
        if isinstance(error, errors.RepositoryNotFoundError):
            return SourceError(
                f"'{self.repo_id}' was not found at {self._endpoint}: the name may be misspelt, or it is private and "
                "needs a token that may read it (environment variable HF_TOKEN)"
            )
        if isinstance(error, errors.LocalEntryNotFoundError) and self.offline:
            return not_cached(asked, self.cache)
        if isinstance(error, errors.RemoteEntryNotFoundError):
            return SourceError(f"'{asked}': the hub has no such file, though it lists it; look at {page}/tree/main")
        if isinstance(error, errors.HFValidationError):
            return SourceError(f"'{self.repo_id}' is not a hub id; write owner/name or owner/name@revision")
        return None

    def _failure(self, asked: str, error: BaseException) -> MergeloomError:
        """Return the error for what broke on the way."""
        error = _reason(error)
        if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
            status = error.response.status_code
            advice = {
                401: "it does not accept the token; give a valid one (environment variable HF_TOKEN)",
                403: "the token may not read this; give another (environment variable HF_TOKEN)",
                429: "too many requests; wait some minutes, or give a token for a higher limit",
            }.get(status, "start again later, what has been fetched is kept")
            return SourceError(f"{self._endpoint} answered {status} for '{asked}': {advice}")
        if isinstance(error, errors.OfflineModeIsEnabled):
            return SourceError(f"'{asked}' needs the hub, but HF_HUB_OFFLINE is set; unset it, or run offline")
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return CapacityError(f"the disk of {self.cache} is full: no room for '{asked}'; free some and start again")
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            return SourceError(f"'{asked}' cannot be kept: {error.filename}: {os.strerror(error.errno)}")
        return SourceError(
            f"{self._endpoint} cannot be reached for '{asked}', or the connection broke ({type(error).__name__}): "
            "check the network and start again, what has been fetched is kept"
        )


def _reason(error: BaseException) -> BaseException:
    """Return why the library could not ask; it wraps that in 'not in the cache'."""
    wrapped = isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None
    return error.__cause__ if wrapped and error.__cause__ is not None else error


def _checked(token: str | None) -> str | bool:
    """Return the token as the library wants it. False sends none; None would look for one in the environment."""
    token = (token or "").strip()
    if not token:
        return False
    if not token.isascii() or not token.isprintable() or " " in token:
        raise SourceError("the hub token holds blanks, line breaks or characters that no token has; set it again")
    return token


def not_cached(file: str, cache: Path) -> SourceError:
    """Return the error for an offline run that lacks a file."""
    return SourceError(f"'{file}' is not in the cache ({cache}) and the run is offline; run it once with network")


def other_content(file: str, sha256: str, reported: str | None) -> SourceError:
    """Return the error for a file that is not what the hub says it is."""
    return SourceError(
        f"{file} has other content than the hub reports (SHA-256 {sha256[:12]}…, not {str(reported)[:12]}…): damaged "
        "on the way or on disk; it was deleted, start again"
    )
