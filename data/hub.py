"""The Hugging Face Hub: which commit a repository's branch is at, and whether we may have it."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from r1distill.data.errors import RequestError

Kind = Literal["model", "dataset"]
Access = Literal["granted", "gated", "missing", "not checked"]

CONNECT_SECONDS = 0.25  # without a network the answer is "not checked", and nobody waits for it
ANSWER_SECONDS = 3.0


def commit(kind: Kind, repo: str, revision: str) -> str:
    """The 40-digit commit of a revision; one that is given as a commit is taken at its word, without a network.

    Raises RequestError where there is no such repository or revision, no access to it, or no way to ask.
    """
    if len(revision) == 40 and all(digit in "0123456789abcdef" for digit in revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    api = HfApi()
    try:
        info = api.repo_info(repo, repo_type=kind, revision=revision, timeout=10)
        if info.gated:
            api.auth_check(repo, repo_type=kind)
        return str(info.sha)
    except GatedRepoError:
        page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repo}"
        raise RequestError(
            f"{repo} is gated and this account has no access. Ask for it at {page} and set HF_TOKEN to a token of the "
            "account that was granted it."
        ) from None
    except RevisionNotFoundError:
        raise RequestError(f"the {kind} {repo} has no revision '{revision}'.") from None
    except RepositoryNotFoundError:
        raise RequestError(
            f"there is no {kind} {repo} on the Hub, or it is private: check the name, or set HF_TOKEN."
        ) from None
    except HFValidationError as error:
        raise RequestError(f"'{repo}' is no name of a {kind} on the Hub, which is owner/name: {error}") from None
    except (HTTPError, OSError) as error:  # HTTPError: no connection, too; it is no OSError
        raise RequestError(
            f"the Hub can't be asked for the {kind} {repo} ({type(error).__name__}). Check the network; or pin the "
            "40-digit commit as 'revision'; or use a local copy: a source or model of kind 'file' or 'folder'."
        ) from None


def access(repositories: Iterable[tuple[Kind, str]]) -> dict[str, Access]:
    """Whether this account may have each repository, asked of the Hub at once and within seconds.

    Without a network, or with HF_HUB_OFFLINE, nothing is known, and a quarter of a second is all it takes. This stands
    beside ``commit``, which stops a run, for those who only want to look: the Hub's own client takes a second to load.
    """
    found: dict[str, Access] = {repo: "not checked" for _, repo in repositories}
    offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
    if offline or not found or not _reachable():
        return found

    def ask(kind: Kind, repo: str) -> None:
        found[repo] = _access(kind, repo)

    threads = [threading.Thread(target=ask, args=one, daemon=True) for one in repositories]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + ANSWER_SECONDS
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(found)


def token() -> str | None:
    """The account's token: HF_TOKEN, or what logging in has saved."""
    folder = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    file = Path(os.environ.get("HF_TOKEN_PATH") or folder / "token")
    try:
        return os.environ.get("HF_TOKEN", "").strip() or file.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def _reachable() -> bool:
    """Whether the Hub, or the proxy before it, takes a connection within CONNECT_SECONDS (names may resolve slowly)."""
    from urllib.parse import urlsplit
    from urllib.request import getproxies, proxy_bypass

    address = urlsplit(_endpoint())
    proxy = getproxies().get(address.scheme)
    if proxy and not proxy_bypass(address.hostname or ""):
        address = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    where = (address.hostname or "", address.port or (80 if address.scheme == "http" else 443))
    connected: list[bool] = []

    def connect() -> None:
        try:
            socket.create_connection(where, CONNECT_SECONDS).close()
            connected.append(True)
        except OSError:
            pass

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    return bool(connected)


def _access(kind: Kind, repo: str) -> Access:
    status, answer = _get(f"api/{kind}s/{repo}")
    if status == 200 and answer.get("gated"):
        status, _ = _get(f"api/{kind}s/{repo}/auth-check")
        return "granted" if status == 200 else "gated" if status in (401, 403) else "not checked"
    # The Hub answers 401 for what does not exist and for what is private.
    return "granted" if status == 200 else "missing" if status in (401, 404) else "not checked"


def _get(path: str) -> tuple[int, dict[str, Any]]:
    """(status, JSON) of an answer of the Hub; status 0 where there is none."""
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    request = Request(f"{_endpoint()}/{path}")
    if key := token():
        request.add_unredirected_header("Authorization", f"Bearer {key}")  # for the Hub alone
    try:
        with urlopen(request, timeout=ANSWER_SECONDS) as response:
            found = json.loads(response.read() or b"{}")
            return response.status, found if isinstance(found, dict) else {}
    except HTTPError as error:
        ours = "X-Error-Code" in error.headers or error.code == 404  # a proxy's refusal says nothing of the repository
        return (error.code if ours else 0), {}
    except (OSError, ValueError, HTTPException):
        return 0, {}
