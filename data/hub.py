"""The Hugging Face Hub: which commit a repository's branch is at, and whether we may have it."""

from __future__ import annotations

from typing import Literal

from r1distill.data.errors import RequestError


def commit(kind: Literal["model", "dataset"], repo: str, revision: str) -> str:
    """The 40-digit commit of a revision; one that is given as a commit is taken at its word, without a network.

    Raises RequestError where there is no such repository or revision, no access to it, or no way to ask.
    """
    if len(revision) == 40 and all(digit in "0123456789abcdef" for digit in revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

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
    except (HTTPError, OSError) as error:  # HTTPError: no connection, too; it is no OSError
        raise RequestError(
            f"the Hub can't be asked for the {kind} {repo} ({type(error).__name__}). Check the network; or pin the "
            "40-digit commit as 'revision'; or use a local copy: a source or model of kind 'file' or 'folder'."
        ) from None
