"""Training routers in fp64 against a loop written down here: transformers' own model, all of whose
parameters have gradients, losses by hand, torch's AdamW on the routers.

pytest tests/training/test_against_autograd.py
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from few_steps import few_steps
from torch import Tensor
from transformers import AutoModelForCausalLM

from moe_compose.training import TrainOptions, train_router
from moe_compose.training.batches import steps_of
from moe_compose.training.setup import texts_of

DOUBLE = {"dtype": torch.float64, "decoder_sparse_step": 1, "norm_topk_prob": True}


def by_hand(path: Any, sequences: list[list[list[int]]], o: TrainOptions, switch: float) -> Any:
    """Losses and routers' weights."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    gates = [layer.mlp.gate for layer in model.model.layers]
    seen: list[Tensor] = []
    for gate in gates:
        gate.register_forward_hook(
            lambda m, args, _: seen.append(args[0].reshape(-1, args[0].shape[-1]) @ m.weight.T)
        )
    optimizer = torch.optim.AdamW([g.weight for g in gates], lr=o.lr, weight_decay=0.1)
    losses = []
    for rows in sequences:
        tokens, total, objective = sum(map(len, rows)), 0.0, 0.0
        z_LTE: list[list[Tensor]] = [[] for _ in gates]
        for row in rows:  # one by one: nothing is padded
            seen.clear()
            ids = torch.tensor([row])
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
            objective = objective + nll / (tokens - len(rows))
            for mine, found in zip(z_LTE, seen, strict=True):
                mine.append(found)
        for mine in z_LTE:
            z_TE = torch.cat(mine)
            chosen = z_TE.topk(2).indices.flatten()
            f_E = torch.bincount(chosen, minlength=z_TE.shape[1]) / len(chosen)
            balance = z_TE.shape[1] * (f_E * z_TE.softmax(-1).mean(0)).sum()
            z = z_TE.logsumexp(-1).square().mean()
            total = total + (switch * balance + o.z_loss * z) / len(gates)
        optimizer.zero_grad()
        model.zero_grad()
        (objective + total).backward()
        torch.nn.utils.clip_grad_norm_([g.weight for g in gates], o.clip)
        optimizer.step()
        losses.append(objective.item())
    return losses, [g.weight.detach() for g in gates]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_routers_only(tiny: Any, tokens: Any, tmp_path: Path, checkpointing: bool) -> None:
    source = tiny("qwen3_moe", **DOUBLE)
    o = few_steps(
        **{"steps": 4, "eval_every": 4, "lr": 3e-2, "weight_decay": 0.1, "clip": 0.05},
        **{"dtype": "float64", "balance": "switch", "batch": 64, "checkpointing": checkpointing},
    )
    plan = train_router(source, tokens, o, folder=tmp_path / "work")
    parts = texts_of(source, tokens, None, o, None)
    steps = islice(steps_of(parts.tokens, parts.fitted, o.batch_tokens, o.seed), o.steps)
    rows = [[list(tokens.sequences[i].ids) for i in chosen] for chosen in steps]
    losses, weights = by_hand(source.path, rows, o, switch=o.balance_coef)
    report = plan.reports["training.json"]
    assert report["losses"] == pytest.approx(losses, rel=1e-7)
    state = torch.load(tmp_path / "work" / "state-0000004.0.pt", weights_only=True)["values"]

    def apart(expected: list[Tensor]) -> float:
        found = [state[f"model.layers.{i}.mlp.gate.weight"] for i in range(len(expected))]
        return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))

    assert apart(weights) < 1e-6
    assert apart(by_hand(source.path, rows, o, switch=0.0)[1]) > 1e-6, "the control"
