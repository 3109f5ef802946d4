"""Writing to the Hugging Face Hub: one commit a repository, however often it is cut off or told to wait.

Large files go up before the commit, as objects under their hash. An object that the Hub has is never sent again, so a
run that was killed goes on from the last whole file; and what is there already with the same content makes no commit.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from r1distill.data.errors import R1DistillError, RequestError

PATIENCE_SECONDS = 900  # for one step, beside what the client itself waits
TRANSIENT = (408, 429, 500, 502, 503, 504)
KEPT_BY_THE_HUB = {".gitattributes"}
T = TypeVar("T")


@dataclass(frozen=True)
class File:
    """A file of a repository: on this disk, or its bytes."""

    name: str
    size: int
    sha256: str
    content: Path | bytes

    @property
    def git_sha1(self) -> str:
        """Git's name for it, by which the Hub knows files that are small enough to be no large object."""
        data = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class Remote:
    """A file as the Hub lists it: the sha256 of a large object, or git's sha1."""

    size: int
    sha256: str | None
    git_sha1: str

    def same(self, file: File) -> bool:
        if self.size != file.size:
            return False
        return self.sha256 == file.sha256 if self.sha256 else self.git_sha1 == file.git_sha1


class Hub:
    """The account whose token is in the environment, at an endpoint (default: huggingface.co or $HF_ENDPOINT).

    Every method raises R1DistillError in one sentence for what the Hub refuses.
    """

    def __init__(self, endpoint: str | None = None, patience_seconds: float = PATIENCE_SECONDS):
        from huggingface_hub import HfApi, get_token

        if not get_token():
            raise RequestError("uploading needs a token of the Hub: set HF_TOKEN to one that may write.")
        self._api, self._patience = HfApi(endpoint=endpoint), patience_seconds
        self.endpoint = str(self._api.endpoint)
        _hide_signatures()
        self.account = str(self._ask(self._api.whoami, "the account", patience=0)["name"])

    def owned(self, repository: str) -> str:
        """The full name of a repository; without an owner it is this account's."""
        return repository if "/" in repository else f"{self.account}/{repository}"

    def url(self, kind: str, repository: str) -> str:
        return f"{self.endpoint}/{'datasets/' if kind == 'dataset' else ''}{repository}"

    def commit(self, kind: str, repository: str, files: list[File], message: str, *, public: bool) -> tuple[str, bool]:
        """Bring a repository to exactly these files; returns (its commit, whether it was made now).

        A repository that isn't there is made, private. Raises RequestError where one is public and shall not be.
        """
        before = self._ask(lambda: self._head(kind, repository), repository)

        def attempt() -> str:
            commit, private = self._head(kind, repository)
            there = {name: one for name, one in self._tree(kind, repository, commit) if name not in KEPT_BY_THE_HUB}
            operations = list(_operations(there, files))
            if not operations:
                return commit
            if not private and not public:
                raise RequestError(
                    f"{repository} is public, and what would be uploaded is new. Say so if that is right: --public"
                )
            made = self._api.create_commit(
                repository, operations, commit_message=message, repo_type=kind, parent_commit=commit
            )
            return str(made.oid)

        commit = self._ask(attempt, repository)
        return commit, commit != before[0]

    def files(self, kind: str, repository: str, commit: str) -> dict[str, Remote]:
        """What the Hub lists at a commit."""
        return self._ask(lambda: dict(self._tree(kind, repository, commit)), repository)

    def download(self, kind: str, repository: str, commit: str, name: str, folder: Path) -> Path:
        """Fetch one file of a commit into ``folder``."""
        options = {"repo_type": kind, "revision": commit, "local_dir": folder}
        return Path(self._ask(lambda: self._api.hf_hub_download(repository, name, **options), repository))

    def make_public(self, kind: str, repository: str) -> None:
        if self._ask(lambda: self._head(kind, repository), repository)[1]:
            self._ask(lambda: self._api.update_repo_settings(repository, repo_type=kind, private=False), repository)

    def collect(self, title: str, repositories: dict[str, str], *, public: bool) -> str:
        """Put repositories ({name: kind}) into the owner's collection of this title; returns its address."""
        owner = next(iter(repositories)).split("/")[0]

        def attempt() -> str:
            mine = (one for one in self._api.list_collections(owner=owner) if one.title == title)
            found = next(mine, None) or self._api.create_collection(
                title, namespace=owner, private=not public, exists_ok=True
            )
            if public and found.private:
                self._api.update_collection_metadata(found.slug, private=False)
            for name, kind in repositories.items():
                self._api.add_collection_item(found.slug, name, kind, exists_ok=True)
            return str(self._api.get_collection(found.slug).url)

        return self._ask(attempt, f"the collection '{title}'")

    def _head(self, kind: str, repository: str) -> tuple[str, bool]:
        """(commit, private) of a repository's main branch; it is made, private, where there is none."""
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            info = self._api.repo_info(repository, repo_type=kind)
        except RepositoryNotFoundError:
            self._api.create_repo(repository, repo_type=kind, private=True, exist_ok=True)
            info = self._api.repo_info(repository, repo_type=kind)
        return str(info.sha), bool(info.private)

    def _tree(self, kind: str, repository: str, commit: str) -> Iterator[tuple[str, Remote]]:
        from huggingface_hub.hf_api import RepoFile

        for one in self._api.list_repo_tree(repository, repo_type=kind, revision=commit, recursive=True):
            if isinstance(one, RepoFile):
                yield one.path, Remote(one.size, one.lfs.sha256 if one.lfs else None, one.blob_id)

    def _ask(self, call: Callable[[], T], what: str, patience: float | None = None) -> T:
        """The call's answer; an outage, a rate limit or a cut connection is waited out."""
        left, pause = self._patience if patience is None else patience, 1.0
        while True:
            try:
                return call()
            except R1DistillError:
                raise
            except Exception as error:
                cause = _cause(error)
                wait = _retry_after(cause, pause)
                if wait is None or wait > left:
                    raise _explained(cause, what, self.endpoint) from None
                time.sleep(wait)
                left, pause = left - wait, min(60.0, 2 * pause)


def _operations(there: dict[str, Remote], files: list[File]) -> Iterator[Any]:
    """What turns a repository into these files: those that are new or other, and those that go."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    for file in files:
        if file.name not in there or not there[file.name].same(file):
            addition = CommitOperationAdd(file.name, file.content)
            addition.upload_info.sha256 = bytes.fromhex(file.sha256)  # else it would be read through again
            yield addition
    for name in sorted(there.keys() - {file.name for file in files}):
        yield CommitOperationDelete(name, is_folder=False)


def _cause(error: Exception) -> Exception:
    """What stands behind the client's "Error while uploading"."""
    return error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error


def _retry_after(error: Exception, pause: float) -> float | None:
    """Seconds to wait before asking again, or None where it would be in vain."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    if isinstance(error, HfHubHTTPError):
        if error.response.status_code not in TRANSIENT:
            return None
        told = str(error.response.headers.get("Retry-After", ""))
        return max(pause, float(told)) if told.isdigit() else pause
    return pause if isinstance(error, (HTTPError, ConnectionError, TimeoutError, json.JSONDecodeError)) else None


def _explained(error: Exception, what: str, endpoint: str) -> R1DistillError:
    """The error in one message without addresses, which may carry signatures."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError

    kept = "What was uploaded is kept: the same command goes on from there."
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401 and not isinstance(error, RepositoryNotFoundError):
            return RequestError(f"{endpoint} does not know the token in HF_TOKEN (401). Set it to a valid one.")
        if status == 403:
            return RequestError(
                f"{endpoint} refuses {what} (403): the token in HF_TOKEN may not write there. Give it the right to "
                f"write, or take another account or repository name. {kept}"
            )
        if status in (401, 404):
            return RequestError(f"{endpoint} has no {what}, or the token in HF_TOKEN may not see it ({status}).")
        if status in (409, 412):
            return R1DistillError(f"somebody else changed {what} meanwhile ({status}). Run the same command again.")
        said = f": {error.server_message.splitlines()[0]}" if error.server_message else ""
        return R1DistillError(f"{endpoint} answers {status} for {what}{said}. {kept}")
    if isinstance(error, (HTTPError, ConnectionError, TimeoutError)):
        return R1DistillError(f"{endpoint} can't be reached ({type(error).__name__}). Check the network. {kept}")
    return R1DistillError(f"{what} can't be uploaded ({type(error).__name__}: {error}). {kept}")


def _hide_signatures() -> None:
    """Keep what follows the ? of an address, where storage signs it, out of the client's warnings."""

    def without(record: logging.LogRecord) -> bool:
        record.msg, record.args = re.sub(r"\?\S+", "?…", record.getMessage()), ()
        return True

    logger = logging.getLogger("huggingface_hub.utils._http")
    if not logger.filters:
        logger.addFilter(without)
