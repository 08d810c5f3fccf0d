"""Two checkpoints on the same tokens: loaded as transformers loads them, run, compared.

expected = logits(load(dense_folder))
assert compare(expected, logits(load(moe_folder))).relative <= 1e-6
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

#: Batch and length of the token ids that are compared; longer than every window of the tiny models.
SHAPE = (2, 28)


@dataclass(frozen=True)
class Comparison:
    """How far logits `[batch, length, vocabulary]` are from the expected ones.

    Attributes:
        relative: ‖Δ‖₂ / ‖expected‖₂.
        kl: mean over tokens of KL(expected ‖ found), in nats.
    """

    relative: float
    kl: float


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model in `folder`; its files hold every key of its class, of its shape, and no other."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    wrong = {kind: found for kind, found in report.items() if found}
    assert not wrong, f"{folder}: {wrong}"
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel, seed: int = 0) -> Tensor:
    """Logits for random token ids, in the model's own dtype."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, SHAPE, generator=generator)
    return model(input_ids=ids, use_cache=False).logits


def compare(expected: Tensor, found: Tensor) -> Comparison:
    """Both measures, taken in fp64."""
    p, q = expected.double(), found.double()
    logp, logq = p.log_softmax(-1), q.log_softmax(-1)
    return Comparison(
        relative=float((p - q).norm() / p.norm()),
        kl=float((logp.exp() * (logp - logq)).sum(-1).mean()),
    )
