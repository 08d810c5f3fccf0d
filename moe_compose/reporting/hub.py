"""A written checkpoint on the Hugging Face Hub, model card included."""

from __future__ import annotations

import shlex
from typing import Any

from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.errors import OptionError, WriteError
from moe_compose.surgery.history import read_history

#: What stays here: hidden files, and parts of writes that did not end.
_NOT_PUSHED = [".*", "*.part", "*.lock"]


def check_repo(repo: str) -> None:
    """Refuse what cannot be pushed to, before anything takes long. Asks nobody.

    Raises:
        OptionError: no name of a repository, nobody is logged in, or the Hub is switched off.
    """
    from huggingface_hub import get_token
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    wrong = f"push_to_hub ({repo}) is no name of a repository"
    try:
        validate_repo_id(repo)
    except HFValidationError as e:
        raise OptionError(f"{wrong}: {e}", hint="Write ORG/NAME.") from e
    if "/" not in repo:
        raise OptionError(f"{wrong}: it does not say whose", hint="Write ORG/NAME.")
    if HF_HUB_OFFLINE:
        raise OptionError("nothing can be pushed: HF_HUB_OFFLINE is set", hint="Unset it.")
    if get_token() is None:
        raise OptionError(
            "nothing can be pushed: nobody is logged in to the Hub",
            hint="Run `hf auth login`, or set HF_TOKEN.",
        )


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
        OptionError: no name of a repository, nobody is logged in, or the Hub is switched off.
        WriteError: not allowed, out of reach, or to be private where a public one is there; what is
            on the disk stays.
    """
    from huggingface_hub import HfApi

    check_repo(repo)
    if checkpoint.path is None:
        raise WriteError(f"{checkpoint.label} is not on this disk: there is nothing to push")
    history = read_history(checkpoint)
    verb = str(history[-1].get("operation")) if history else "checkpoint"
    api = api or HfApi()
    try:
        url = api.create_repo(repo, private=private, repo_type="model", exist_ok=True)
        if private and not api.model_info(repo).private:
            raise WriteError(
                f"{checkpoint.label} is not pushed: {repo} is there already, and public",
                hint="Make it private in its settings on the Hub, or give another name.",
            )
        api.upload_folder(
            repo_id=repo,
            repo_type="model",
            folder_path=str(checkpoint.path),
            commit_message=f"moe-compose {verb}",
            ignore_patterns=_NOT_PUSHED,
        )
    except WriteError:
        raise
    except Exception as e:  # those of the HTTP client come through; which client has changed
        said = (str(e).strip() or type(e).__name__).splitlines()[0]
        later = f"hf upload {repo} {shlex.quote(str(checkpoint.path))}"
        raise WriteError(
            f"{checkpoint.label} could not be pushed to {repo}: {said}",
            hint="The folder is complete: nothing has to be made again. `hf auth whoami` tells who "
            f"is logged in.\nPush it later with:\n  {later}{' --private' if private else ''}",
        ) from e
    return str(url)
