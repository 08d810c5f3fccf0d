"""Commands that run in several processes, as `torchrun` starts them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import typer

from moe_compose.errors import MoeComposeError

from .output import out

#: Seconds that the others wait, when all have failed, for the first one's message.
_WORDS = 10


@contextmanager
def together() -> Iterator[bool]:
    """Work that fails in all processes if it fails in one; True in the first. Alone, torch is not
    imported for it.
    """
    if _size() == 1:
        yield True
        return
    from moe_compose.calibration.ranks import Ranks

    ranks = Ranks()
    with ranks.together():
        yield ranks.first


@contextmanager
def joined() -> Iterator[bool]:
    """Join the processes that torchrun started, and leave them at the end; without torchrun there
    is nothing to join. True in the first process, the only one that prints.

    What fails inside must fail for all (`Ranks.together`): the first process shows it, and the
    others end after that, since torchrun ends all as soon as one has failed.
    """
    if _size() == 1:
        yield True
        return
    rank = int(os.environ.get("RANK", "0"))
    import torch
    from torch import distributed

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if rank and not out.debug:
        logging.getLogger("moe_compose").setLevel(logging.ERROR)
    try:
        yield rank == 0
    except Exception as error:
        said = MoeComposeError(f"{type(error).__name__}: {error}")
        if isinstance(error, MoeComposeError):
            said = error
        if rank == 0 or out.debug:
            out.error(said)
        with suppress(Exception):
            distributed.monitored_barrier(timeout=timedelta(seconds=_WORDS))
        raise typer.Exit(said.exit_code) from error
    finally:
        distributed.destroy_process_group()


def _size() -> int:
    """How many processes torchrun started."""
    return int(os.environ.get("WORLD_SIZE", "1"))
