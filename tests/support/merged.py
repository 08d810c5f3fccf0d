"""Tiny MoEs in which every second expert is the one before it, its neurons in another order."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from mutants import mutant

import moe_compose as mc
from moe_compose.architectures import find
from moe_compose.architectures.parts import layout_of
from moe_compose.calibration.tokens import TokenSet
from moe_compose.surgery.evaluate import value
from moe_compose.surgery.indices import Order
from moe_compose.surgery.neurons import part_of, templates_of

#: Layer → expert → its neurons, by the places they have in the expert that it was made from.
Orders = dict[int, dict[int, list[int]]]


def rewired(source: mc.Checkpoint, folder: Path, made_from: dict[int, int], seed: int = 0):
    """A copy of a checkpoint, `expert` being `made_from[expert]` with its neurons shuffled.

    Returns:
        The checkpoint, and the shuffles.
    """
    form = find(source.config)
    assert form is not None
    form, moe = layout_of(form, source.tensors), form.moe(source.config)
    lie, draw, orders = form.experts, random.Random(seed), {}
    assert lie is not None

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for layer in moe.sparse_layers:
            orders[layer] = {}
            for e, original in made_from.items():
                shuffle = draw.sample(range(moe.expert_width), moe.expert_width)
                orders[layer][e] = shuffle
                for template in templates_of(lie):
                    names = [template.format(i=layer, e=x) for x in (e, original)]
                    info = source.tensors[names[1]]
                    part = part_of(lie, template, info, original, moe.num_experts, "source")
                    made = value(part.ordered(Order.of(shuffle)), {"source": source})
                    if "{e}" in template:
                        tensors[names[0]] = made
                    else:
                        each = info.shape[0] // moe.num_experts
                        tensors[names[0]][e * each : (e + 1) * each] = made

    return mutant(source, folder, tensors=change), orders


def tokens(vocabulary: int = 96, seed: int = 0, count: int = 6, length: int = 20) -> TokenSet:
    """Random token ids in two domains."""
    draw = random.Random(seed)
    rows = [[draw.randrange(3, vocabulary) for _ in range(length)] for _ in range(count)]
    return TokenSet.of_ids({"a": rows[: count // 2], "b": rows[count // 2 :]})


def measured(source: mc.Checkpoint, folder: Path) -> mc.ExpertStats:
    """Statistics with similarities."""
    return mc.calibrate(
        source, tokens(), mc.CalibrateOptions(similarity=True, sample=48), output=folder
    )
