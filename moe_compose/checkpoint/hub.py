"""Checkpoints on the Hugging Face Hub: downloaded whole, or only looked at through their headers.

Everything goes through huggingface_hub, imported when first needed, so that its cache, its log-in,
its mirror (`HF_ENDPOINT`) and its offline mode work as people know them. Its
`get_safetensors_metadata` is not used: it checks nothing, and throws away what checks would need.
Here the bytes of the headers are fetched by range requests and read as those of a folder are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moe_compose.errors import CheckpointError

_TEXTS = ("*.json", "*.txt", "*.model", "*.tiktoken", "README.md", "LICENSE*", "NOTICE*")
_WEIGHTS = "*.safetensors"
_WANTED = (_WEIGHTS, *_TEXTS, "*.jinja", "additional_chat_templates/*.jinja")
# Nothing that lies in folders (originals, other formats) but chat templates; and not the second
# copy of all weights that Mistral's repositories hold.
_UNWANTED = (*(f"*/{pattern}" for pattern in (_WEIGHTS, *_TEXTS)), "consolidated*")


@dataclass(frozen=True, slots=True)
class RemoteFiles:
    """The top-level files of a model on the Hub at one commit, none of them downloaded."""

    repo: str
    commit: str
    label: str
    sizes: Mapping[str, int]
    path: Path | None = None

    @classmethod
    def of(cls, repo: str, revision: str | None) -> RemoteFiles:
        """List a model's files.

        Raises:
            CheckpointError: not found, gated, or out of reach.
        """
        from huggingface_hub import HfApi

        with _hub_errors(repo, revision):
            info = HfApi().model_info(repo, revision=revision, files_metadata=True)
        sizes = {
            file.rfilename: file.size
            for file in info.siblings or ()
            if "/" not in file.rfilename and file.size is not None
        }
        return cls(repo, info.sha or revision or "main", label_of(repo, revision), sizes)

    def fetch(self, name: str) -> Path | None:
        """One file, downloaded into the Hub's cache or found there; None where there is none.

        Files in folders are not listed: of a model without one, each call asks the Hub.

        Raises:
            CheckpointError: out of reach, and not in the cache.
        """
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        if "/" not in name and name not in self.sizes:
            return None
        with _hub_errors(self.repo, self.commit):
            try:
                return Path(hf_hub_download(self.repo, name, revision=self.commit))
            except LocalEntryNotFoundError:
                if "/" not in name:
                    raise
                return None  # offline, nobody knows of more than was downloaded
            except EntryNotFoundError:
                return None

    def read(self, name: str, offset: int, nbytes: int) -> bytes:
        """Exactly these bytes, by a range request.

        Raises:
            CheckpointError: out of reach, or the server gives something else.
        """
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported at run time
            build_hf_headers,
            hf_raise_for_status,
            http_stream_backoff,
        )

        if nbytes == 0:
            return b""
        wanted = {"Range": f"bytes={offset}-{offset + nbytes - 1}", "Accept-Encoding": "identity"}
        headers = build_hf_headers(headers=wanted)
        url = hf_hub_url(self.repo, name, revision=self.commit)
        got = bytearray()
        with (
            _hub_errors(self.repo, self.commit),
            http_stream_backoff("GET", url, headers=headers) as response,
        ):
            hf_raise_for_status(response)
            # A server that ignores the range sends the file from its start: take what was asked.
            if response.status_code == 206 or offset == 0:
                for piece in response.iter_bytes():
                    got += piece
                    if len(got) >= nbytes:
                        break
        if len(got) < nbytes:
            raise CheckpointError(
                f"{self.label}/{name}: the server sent {len(got)} of {nbytes} bytes at {offset}",
                hint="Open it without headers_only, to download the whole model.",
            )
        return bytes(got[:nbytes])


def listed(repo: str, revision: str | None) -> RemoteFiles | None:
    """A model's files, not downloaded; None where the Hub is out of reach, but the model was
    downloaded before.

    Raises:
        CheckpointError: not found, gated, or out of reach and not in the cache.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return RemoteFiles.of(repo, revision)
    except CheckpointError as error:
        answered = isinstance(error.__cause__, HfHubHTTPError | HFValidationError)
        if answered or not isinstance(
            try_to_load_from_cache(repo, "config.json", revision=revision), str
        ):
            raise
    return None


def download(repo: str, revision: str | None) -> tuple[Path, str]:
    """Download a model into the Hub's cache, or find it there; pickles and code are left out.

    Returns:
        The folder and its commit.

    Raises:
        CheckpointError: not found, gated, or out of reach and not in the cache.
    """
    from huggingface_hub import snapshot_download

    with _hub_errors(repo, revision):
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=[*_WANTED], ignore_patterns=[*_UNWANTED]
        )
    return Path(folder), Path(folder).name


def label_of(repo: str, revision: str | None) -> str:
    """What people call a model of the Hub: `org/name`, with the revision if they gave one."""
    return f"{repo}@{revision}" if revision else repo


@contextmanager
def _hub_errors(repo: str, revision: str | None) -> Iterator[None]:
    """Whatever the Hub's library raises, said in one sentence with a next step."""
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except GatedRepoError as error:
        raise CheckpointError(
            f"{repo} is gated: its owners ask you to accept terms first",
            hint=f"Accept them at https://huggingface.co/{repo}, then run `hf auth login`.",
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"there is no model {repo} on the Hub that you may read, and no such folder here",
            hint="Check the spelling; for a private model, run `hf auth login`.",
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{repo} has no revision {revision!r}",
            hint=f"Branches, tags and commits: https://huggingface.co/{repo}/commits/main",
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"not a Hub id ({repo!r}): {error}") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        if not HF_HUB_OFFLINE:
            raise _out_of_reach(repo, error) from error
        raise CheckpointError(
            f"{label_of(repo, revision)} is no folder here and not in the Hub's cache, and "
            "HF_HUB_OFFLINE is set",
            hint="Unset it, download the model before, or give the path of a folder.",
        ) from error
    except Exception as error:  # those of the HTTP client come through; which client has changed
        raise _out_of_reach(repo, error) from error


def _out_of_reach(repo: str, error: Exception) -> CheckpointError:
    first_line = str(error).partition("\n")[0]
    return CheckpointError(
        f"there is no folder {repo} here, and the Hub cannot be read "
        f"({type(error).__name__}: {first_line})",
        hint="Check the connection and HF_ENDPOINT; or give the path of a folder.",
    )
