"""Rows from text on real small models: what the tiny random ones cannot tell.

pytest tests/composition/test_real.py
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mutants import Tensors, mutant
from safetensors.torch import load_file

import moe_compose as mc
from moe_compose.calibration.data import read_domains
from moe_compose.composition.initialise import route_by_text
from moe_compose.composition.options import RoutingOptions
from moe_compose.composition.rows import solve, with_rows

DATA = Path(__file__).parents[3] / "shared" / "data"
MODELS = ["seed1m", "anchored_py", "anchored_math", "anchored_de"]
DOMAINS = ["en", "py", "math", "de"]
ON_DISK = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> mc.Checkpoint:
    """The seed and three anchored experts, under a router that was drawn."""
    if not DATA.is_dir():
        pytest.skip("needs ../shared/data: real small models and text")
    folder = tmp_path_factory.mktemp("real")
    options = mc.UpcycleOptions(num_experts=4, top_k=2, target="mixtral", router_init="normal")
    plan = mc.upcycle(mc.Checkpoint.open(DATA / "models" / MODELS[0]), options)
    donors = [load_file(DATA / "models" / name / "model.safetensors") for name in MODELS]

    def experts(tensors: Tensors) -> None:
        for name in tensors:
            if m := re.search(r"layers\.(\d+)\..*experts\.(\d+)\.(w\d)\.weight", name):
                at = f"model.layers.{m[1]}.mlp.{ON_DISK[m[3]]}.weight"
                tensors[name] = donors[int(m[2])][at].clone()

    return mutant(mc.write(plan, folder / "copies"), folder / "moe", tensors=experts)


def test_ridge_is_better_than_the_mean_than_a_drawn_router(
    moe: mc.Checkpoint, tmp_path: Path
) -> None:
    train, valid = (
        {d: [DATA / "text" / d / f"{part}.txt"] for d in DOMAINS} for part in ("train", "valid")
    )
    texts = {i: read_domains({d: train[d]}) for i, d in enumerate(DOMAINS)}
    held, how = read_domains(valid), mc.EvaluateOptions(tokens=8192, seq_len=256, greedy=0)

    def loss(model: mc.Checkpoint | mc.Plan) -> float:
        scores = mc.evaluate(model, held, options=how).domains.values()
        return sum(s.loss for s in scores) / len(scores)

    losses = {"drawn": loss(moe)}
    for method in ("hidden", "ridge"):
        options = RoutingOptions(method=method, tokens=4096, seq_len=256, row_scale=1.0)
        plan, stats = route_by_text(moe, texts, options, folder=tmp_path / method)
        losses[method] = loss(plan)
    assert losses["ridge"] < losses["hidden"] - 0.005 < losses["drawn"] - 0.05, losses
    # the control: every row in its neighbour's place
    turned = {layer: rows_ED.roll(1, 0) for layer, rows_ED in solve(stats).items()}
    assert loss(with_rows(moe, turned)) > losses["drawn"]
