"""Does the installed transformers still load a checkpoint as `compat.py` thinks it does?"""

from __future__ import annotations

import tempfile
from functools import cache

import torch
from torch import Tensor, distributed

from moe_compose.architectures import all_architectures
from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.errors import UnsupportedError
from moe_compose.runtime import compat, pretrained
from moe_compose.runtime.loading import Loader
from moe_compose.runtime.quiet import quiet
from moe_compose.runtime.skeleton import Skeleton


@cache
def self_test() -> None:
    """Load a tiny model of two layers by `from_pretrained` and by this package, and compare every
    tensor and every computed buffer. Runs once in a process, in a fraction of a second; of the
    processes of torch.distributed in the first one, since in the others transformers saves nothing.

    Raises:
        UnsupportedError: they differ; the message names the installed transformers.
    """
    from transformers import __version__

    if distributed.is_available() and distributed.is_initialized() and distributed.get_rank():
        return
    try:
        known, found = _both_ways()
    except Exception as e:
        raise UnsupportedError(
            f"transformers {__version__} cannot be streamed: {pretrained.first_line(e)}",
            hint="Install a version of transformers that moe-compose was tested with.",
        ) from e
    wrong = [n for n, t in known.items() if n not in found or not torch.equal(t, found[n])]
    wrong += sorted(found.keys() - known.keys())
    if wrong:
        raise UnsupportedError(
            f"transformers {__version__} loads checkpoints by rules that this version of "
            "moe-compose does not know",
            problems=[f"{name} differs" for name in wrong[:20]],
            hint="Install a version of transformers that moe-compose was tested with.",
        )


def _both_ways() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Name in memory → tensor, as transformers loads it and as this package does."""
    form = next(a for a in all_architectures().values() if a.is_moe)
    sizes = {form.hidden.name: 16, form.layers.name: 2, form.num_experts.name: 3}
    sizes |= {form.top_k.name: 2, form.expert_width.name: 24, "vocab_size": 32}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    with quiet(), tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pretrained.new_model(form.model_type, **sizes).save_pretrained(folder)
        loaded = pretrained.load_model(folder, dtype=torch.float32)
        source = Checkpoint.open(folder)
        model = compat.build(source.config, torch.float32, experts="eager")
        loader = Loader(source, Skeleton(model), torch.float32)
        compat.fill_computed_buffers(model, torch.device("cpu"))
        found = loader.load(model.state_dict())
    known = {**loaded.state_dict(), **dict(loaded.named_non_persistent_buffers())}
    return known, found | dict(model.named_non_persistent_buffers())
