"""A written checkpoint on the Hugging Face Hub, model card included."""

from __future__ import annotations

from typing import Any

from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.errors import OptionError, WriteError
from moe_compose.surgery.history import read_history

#: What stays here: hidden files, and parts of writes that did not end.
_NOT_PUSHED = [".*", "*.part", "*.lock"]


def check_repo(repo: str) -> None:
    """Refuse what cannot be the name of a repository, before anything takes long.

    Raises:
        OptionError: so it is.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as e:
        raise OptionError(
            f"push_to_hub ({repo}) is no name of a repository: {e}", hint="Write ORG/NAME."
        ) from e


def push(checkpoint: Checkpoint, repo: str, *, private: bool = False, api: Any = None) -> str:
    """Upload a checkpoint's folder, in one commit; the repository is made if there is none.

    Args:
        checkpoint: a folder; its README.md becomes the model's page.
        repo: `ORG/NAME`.
        private: whether a repository that is made is private.
        api: what talks to the Hub, by default `huggingface_hub.HfApi()` with the log-in and the
            mirror that people have set.

    Returns:
        The address of the model.

    Raises:
        OptionError: no name of a repository.
        WriteError: not logged in, not allowed, or out of reach; what is on the disk stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    check_repo(repo)
    if checkpoint.path is None:
        raise WriteError(f"{checkpoint.label} is not on this disk: there is nothing to push")
    history = read_history(checkpoint)
    verb = str(history[-1].get("operation")) if history else "checkpoint"
    api = api or HfApi()
    try:
        url = api.create_repo(repo, private=private, repo_type="model", exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            repo_type="model",
            folder_path=str(checkpoint.path),
            commit_message=f"moe-compose {verb}",
            ignore_patterns=_NOT_PUSHED,
        )
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError, ValueError) as e:
        said = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise WriteError(
            f"{checkpoint.label} could not be pushed to {repo}: {said}",
            hint="The folder is complete. Log in with `hf auth login`, or push it with "
            f"`hf upload {repo} {checkpoint.path}`.",
        ) from e
    return str(url)
