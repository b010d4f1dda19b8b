"""Look into a repository on the hub, and upload a publication with the hub's own client.

Large files go up one by one before the only commit, which makes all of them appear at once: nobody
downloads half a model. (`upload_folder` commits in batches.) Files that an interrupted upload sent
are not sent again.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from tempoquant.errors import HubError
from tempoquant.models.hub import first_line
from tempoquant.progress import Progress
from tempoquant.publishing.publication import Publication, PublishedFile

_OF_THE_HUB = {".gitattributes"}
"""Files that the hub puts into every new repository."""
_MIB = 2**20


@dataclass(frozen=True)
class Held:
    """The content of a repository.

    Attributes:
        commit: the latest.
        is_private: whether others cannot see it.
        files: name to the SHA-256 of a large file, or to git's hash of any other, without those
            that the hub adds.
    """

    commit: str
    is_private: bool
    files: Mapping[str, str]


class Repository:
    """One model's repository on the hub.

    Args:
        name: hub id.

    Raises:
        HubError: nobody is logged in.
    """

    def __init__(self, name: str) -> None:
        self.name, self._token = name, get_token()
        if self._token is None:
            raise HubError(
                "nobody is logged in to the hub: run `hf auth login`, or set HF_TOKEN to a token that may write."
            )
        self._api = HfApi(endpoint=constants.ENDPOINT, token=self._token)

    @property
    def url(self) -> str:
        """Return its address for people."""
        return f"{constants.ENDPOINT}/{self.name}"

    def held(self) -> Held | None:
        """Return its content; None if there is no such repository yet. Raises HubError."""
        try:
            info = self._api.model_info(self.name)
            entries = list(self._api.list_repo_tree(self.name, recursive=True, revision=info.sha))
        except RepositoryNotFoundError:
            return None
        except Exception as error:  # of the hub, or of one of three HTTP libraries, by the client's version
            raise self._refusal(error) from error
        files = {
            each.path: each.blob_id if each.lfs is None else each.lfs.sha256
            for each in entries
            if isinstance(each, RepoFile) and each.path not in _OF_THE_HUB
        }
        return Held(info.sha, bool(info.private), files)

    def create(self, is_private: bool) -> None:
        """Create the repository, empty. Raises HubError."""
        try:
            self._api.create_repo(self.name, private=is_private, exist_ok=False)
        except Exception as error:  # see above
            raise self._refusal(error) from error

    def upload(self, publication: Publication, held: Held | None, progress: Progress) -> str:
        """Make it hold this publication and nothing else, by one commit, and return its URL.

        Raises HubError. The same call then sends only what is missing.
        """
        there = {} if held is None else held.files
        missing = [file for file in publication.files if not is_held(file, there)]
        total = sum(_units(file) for file in missing)
        advance = progress.start("Uploading", total)
        operations: list[Any] = [CommitOperationDelete(name) for name in superfluous(publication, there)]
        try:
            for file in missing:
                content = file.content if isinstance(file.content, bytes) else str(file.content)
                operation = CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=content)
                self._api.preupload_lfs_files(self.name, [operation], free_memory=False)
                operations.append(operation)
                for _ in range(_units(file)):
                    advance()
            done = self._api.create_commit(
                self.name,
                operations,
                commit_message=f"Upload {publication.title}",
                parent_commit=None if held is None else held.commit,
            )
        except Exception as error:  # see above
            raise self._refusal(error) from error
        return str(done.commit_url)

    def _refusal(self, error: Exception) -> HubError:
        """Return a sentence for what the hub said, without the token in it."""
        status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
        said = first_line(error.__cause__ or error if isinstance(error, RuntimeError) else error)
        said = said.replace(str(self._token), "the token")
        if status == 401:
            return HubError(f"the hub does not take the token: log in again with `hf auth login` ({said}).")
        if status == 403:
            return HubError(
                f"your token may not write to {self.name}: use one with write access, or another name ({said})."
            )
        if status == 412:
            return HubError(f"{self.name} was changed meanwhile: look at {self.url}, then repeat the command.")
        return HubError(
            f"{self.name} could not be uploaded to {constants.ENDPOINT} ({said}). What arrived is not sent again: "
            "repeat the command."
        )


def is_held(file: PublishedFile, there: Mapping[str, str]) -> bool:
    """Tell whether a repository holds a file with this very content."""
    digest = there.get(file.name)
    return digest is not None and digest in (file.sha256, file.git_hash if len(digest) == 40 else file.sha256)


def superfluous(publication: Publication, there: Mapping[str, str]) -> Sequence[str]:
    """Return the names that a repository holds and the publication does not."""
    return sorted(set(there) - {file.name for file in publication.files})


def require_same(publication: Publication, held: Held, name: str, is_private: bool) -> None:
    """Raise HubError unless all that a repository holds is of this publication.

    It is refused also where more or fewer people see it than was asked for.
    """
    require_visibility(held, name, is_private)
    foreign = superfluous(publication, held.files)
    changed = [file.name for file in publication.files if file.name in held.files and not is_held(file, held.files)]
    if foreign or changed:
        what = f"{foreign[0]}, which is not published" if foreign else f"another {changed[0]}"
        raise HubError(
            f"{name} exists and holds {what} ({len(foreign) + len(changed)} such files): choose another name, or "
            "replace what is there with --overwrite; its history keeps it."
        )


def require_visibility(held: Held, name: str, is_private: bool) -> None:
    """Raise HubError where more or fewer people see a repository than was asked for."""
    if held.is_private == is_private:
        return
    if is_private:
        raise HubError(f"{name} exists and is public: say --public if the model is to be, or choose another name.")
    raise HubError(
        f"{name} exists and is private: leave --public out, and change it at "
        f"{constants.ENDPOINT}/{name}/settings when you want to."
    )


def _units(file: PublishedFile) -> int:
    """Return a file's size in units of progress."""
    return max(1, math.ceil(file.num_bytes / _MIB))
