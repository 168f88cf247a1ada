"""Upload a folder to the Hub as one commit: all of it arrives, or nothing does."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo

from infini_llama.hub_upload.card import repo_id_of
from infini_llama.hub_upload.check import check, files_of
from infini_llama.scripts.generate import InputError, one_line, say

__all__ = ["publish", "push"]

LIBRARY = "infini-llama"
KEPT = {".gitattributes"}  # the Hub's own
REMEDIES = {
    401: "your token is not accepted: log in again with `hf auth login`, or correct HF_TOKEN",
    403: "your token may not write there: take one with write access to it, or another repository",
    409: "somebody else is changing it: look at it, and try again",
    412: "somebody else has changed it meanwhile: look at it, and try again",
    413: "a file is too large for the Hub: build with a smaller --max-shard-size",
    429: "the Hub asks for a pause: try again later",
}


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    upload: bool = False,
    public: bool = False,
    update: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
) -> dict[str, Any]:
    """Check a folder, show what is in it, and upload it if that is asked for.

    Args:
        folder: what `build` has made.
        repo_id: on the Hub, the one that the card's code names.
        upload: whether to do it; otherwise nothing is sent.
        public: of a repository that is created; and needed for one that is public already.
        update: replace the files of a repository that has some. Those that are not in `folder` are deleted.
        create_pr: propose the files instead.
        revision: branch, created if need be.

    Returns:
        The report: files and bytes; with `upload`, commit, tag and address too.

    Raises:
        InputError: it must not be shared, or the upload failed. Then nothing is published, unless the message says so.
    """
    if create_pr and revision is not None:
        raise InputError(f"revision is '{revision}', but pull requests go to main: leave one of the two out")
    folder = Path(folder)
    card = folder / "README.md"
    named = repo_id_of(card.read_text(encoding="utf-8")) if card.is_file() else None
    if named not in (None, repo_id):
        raise InputError(
            f"repo_id is '{repo_id}', but the card's code loads '{named}': build the folder with --repo-id {repo_id}"
        )
    checked = check(folder)
    for name, size in checked["files"].items():
        say(f"{size:>14,}  {name}")
    report = {"repo_id": repo_id, "dry_run": not upload, "files": checked["files"], "bytes": checked["bytes"]}
    if not upload:
        say(f"{checked['bytes']:>14,}  bytes for {repo_id}. This was a dry run, --upload uploads them")
        return report
    return report | publish(folder, repo_id, public=public, update=update, create_pr=create_pr, revision=revision)


def publish(
    folder: Path, repo_id: str, *, public: bool, update: bool, create_pr: bool, revision: str | None
) -> dict[str, Any]:
    """Upload a folder that has been checked; the arguments are those of `push`."""
    library = version(LIBRARY)
    api = HfApi(library_name=LIBRARY, library_version=library)
    # Before anything is created or sent.
    with explained(f"repo_id '{repo_id}'"):
        api.whoami()
        require_valid_card(folder)
        info = find(api, repo_id)
    require_consent(info, repo_id, public=public, update=update, create_pr=create_pr)
    with explained(f"repo_id '{repo_id}': nothing was published"):
        if info is None:
            api.create_repo(repo_id, private=not public)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.model_info(repo_id, revision=revision)
        files = files_of(folder)
        # Not `upload_folder`, which cuts large folders into several commits.
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(name, path) for name, path in files.items()]
            + [CommitOperationDelete(name) for name in names_in(info) if name not in files],
            commit_message=f"Upload model with {LIBRARY} {library}",
            revision=revision,
            create_pr=create_pr,
            parent_commit=info.sha,
        )
    report = {"private": info.private, "commit": commit.oid, "url": commit.pr_url or commit.commit_url}
    if not create_pr:
        with explained(f"repo_id '{repo_id}': the files are published as {commit.commit_url}, but without their tag"):
            report["tag"] = set_tag(api, repo_id, f"v{library}", commit.oid)
    say(f"published: {report['url']}")
    return report


def require_valid_card(folder: Path) -> None:
    try:
        ModelCard.load(folder / "README.md").validate()
    except ValueError as error:
        raise InputError(f"the Hub rejects README.md ({one_line(error)}): correct its metadata") from error


def find(api: HfApi, repo_id: str) -> ModelInfo | None:
    try:
        return api.model_info(repo_id)
    except RepositoryNotFoundError:
        return None


def names_in(info: ModelInfo) -> list[str]:
    return [file.rfilename for file in info.siblings or [] if file.rfilename not in KEPT]


def require_consent(info: ModelInfo | None, repo_id: str, *, public: bool, update: bool, create_pr: bool) -> None:
    """Refuse to change what is there, and to show what may not be meant to be seen, unless that is asked for."""
    if info is None:
        if create_pr:
            raise InputError(f"repo_id '{repo_id}' does not exist, or you may not see it: leave --create-pr out")
        return
    if names_in(info) and not (update or create_pr):
        raise InputError(
            f"repo_id '{repo_id}' has files already: replace them with --update, or propose yours with --create-pr"
        )
    if not info.private and not public:
        raise InputError(f"repo_id '{repo_id}' is public: add --public, or choose another")
    if info.private and public:
        say(f"warning: --public has no effect, {repo_id} is there and private: change that in its settings")


def set_tag(api: HfApi, repo_id: str, tag: str, commit: str) -> str | None:
    try:
        api.create_tag(repo_id, tag=tag, revision=commit)
        return tag
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        say(f"warning: the tag {tag} is there already, and stays at the commit that it names")
        return None


# What can go wrong


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn whatever huggingface_hub raises into one line with a remedy."""
    try:
        yield
    except InputError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{what}: {reason(error)}") from error


def reason(error: Exception) -> str:
    # So it wraps what happens while a file is uploaded.
    if type(error) is RuntimeError and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, LocalTokenNotFoundError):
        return "you are not logged in: log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it"
    if isinstance(error, HFValidationError):
        return f"that is no name for a repository ({one_line(error)}): correct it"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        default = "try again later" if status >= 500 else "correct that, and run this again"
        return f"the Hub answers {status} ({error.server_message or one_line(error)}): {REMEDIES.get(status, default)}"
    if isinstance(error, ValueError):
        return f"the Hub's answer makes no sense ({one_line(error)}): update huggingface_hub, or try again later"
    return (
        f"the connection broke ({type(error).__name__}: {one_line(error)}): run this again, what has arrived is not "
        "sent twice"
    )
