"""The objective `layer`: gradients, what is kept, memory, resuming, and what is refused.

pytest tests/training/test_layerwise.py
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from few_steps import few_steps
from mutants import mutant
from pruned import lively_checkpoint, raw
from torch import Tensor
from transformers import AutoModelForCausalLM

import moe_compose as mc
from moe_compose.calibration.tokens import TokenSet
from moe_compose.runtime import Runner
from moe_compose.training import layerwise, one_layer, train_router
from moe_compose.training.setup import intent, texts_of

SPARSE = {"decoder_sparse_step": 1}


def options(**changes: Any) -> Any:
    few = {"objective": "layer", "steps": 30, "eval_every": 10, "lr": 1e-2, "batch_tokens": 256}
    return few_steps(**{**few, **changes})


def pruned(source: mc.Checkpoint, keep: int = 3) -> mc.Plan:
    return mc.prune(source, None, mc.PruneOptions(keep=keep, criterion="random"))


def layers(plan: mc.Plan) -> dict[str, Any]:
    found: dict[str, Any] = plan.reports["training.json"]["layers"]
    return found


class Whole64:
    """Two models that transformers has loaded whole, in fp64."""

    def __init__(self, original: Path, result: Path) -> None:
        self.original, self.result = (
            AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float64, experts_implementation="eager"
            ).eval()
            for path in (original, result)
        )

    def of(self, layer: int, sequences: Any) -> tuple[Tensor, Tensor, Tensor]:
        """What our FFN is given, what it should return, and how much each token counts."""
        rows = []
        for ids in sequences:
            with torch.no_grad(), Seen(self.original, layer) as theirs:
                self.original(input_ids=torch.tensor([ids]), use_cache=False)
            with torch.no_grad(), Seen(self.result, layer) as ours:
                self.result(input_ids=torch.tensor([ids]), use_cache=False)
            y = theirs.after - (ours.after - ours.f)
            rows.append((ours.x, y, 1 / theirs.after.square().sum(-1)))
        x, y, w = (torch.cat(part) for part in zip(*rows, strict=True))
        return x, y, w

    def loss(self, layer: int, sequences: Any, *, flat: bool = False) -> Tensor:
        """Of our FFN; unweighted for a control."""
        x, y, w = self.of(layer, sequences)
        w = torch.ones_like(w) if flat else w
        found = self.result.model.layers[layer].mlp(x[None])[0]
        return ((found - y).square().sum(-1) * w).sum() / (y.square().sum(-1) * w).sum()


class Seen:
    """What passes a layer and its FFN."""

    def __init__(self, model: Any, layer: int) -> None:
        self._layer = model.model.layers[layer]

    def __enter__(self) -> Seen:
        self._handles = [
            self._layer.register_forward_hook(lambda m, a, h: setattr(self, "after", h[0])),
            self._layer.mlp.register_forward_hook(self._see),
        ]
        return self

    def _see(self, module: Any, args: Any, output: Tensor) -> None:
        self.x, self.f = args[0][0], output[0]

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()


def test_against_autograd(tiny: Any, tokens: TokenSet, tmp_path: Path) -> None:
    """One step over all fitted tokens, layer after layer: the loss, the norm of its gradient and
    the errors before and after are those of fully loaded fp64 models, of which ours has the trained
    routers of the layers before.
    """
    source = tiny("qwen3_moe", dtype=torch.float64, **SPARSE)
    small = pruned(source)
    mc.write(small, tmp_path / "small")
    o = options(steps=1, eval_every=1, batch_tokens=10**6, dtype="float64", lr=1e-3)
    texts = texts_of(small, tokens, None, o, source)
    plan = train_router(small, tokens, o, teacher=source, folder=tmp_path / "work")
    lines = (tmp_path / "work" / "training.jsonl").read_text().splitlines()
    models = Whole64(source.path, tmp_path / "small")
    fitted = [texts.tokens.sequences[i].ids for i in texts.fitted]
    held = [texts.held.sequences[i].ids for i in texts.chosen]
    for layer, line in enumerate(map(json.loads, lines)):
        weight = models.result.model.layers[layer].mlp.gate.weight
        entry, loss = layers(plan)[str(layer)], models.loss(layer, fitted)
        (gradient,) = torch.autograd.grad(loss, [weight])
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-9)
        assert line["loss"] != pytest.approx(models.loss(layer, fitted, flat=True).item(), rel=1e-3)
        assert line["gradient"] == pytest.approx(float(gradient.norm()), rel=1e-9)
        assert entry["before"] == pytest.approx(models.loss(layer, held).item() ** 0.5, rel=1e-9)
        new = plan.read(f"model.layers.{layer}.mlp.gate.weight")
        if entry["changed"]:
            first = -o.lr * gradient.sign()  # what AdamW's first step is, wherever ε is small
            near = gradient.abs() > 1e-5
            torch.testing.assert_close((new - weight)[near], first[near], rtol=2e-3, atol=1e-9)
        with torch.no_grad():
            weight.copy_(new)
        assert entry["after"] == pytest.approx(models.loss(layer, held).item() ** 0.5, rel=1e-9)
    assert any(entry["changed"] for entry in layers(plan).values())


@pytest.mark.parametrize(
    "family",
    [
        "granitemoe",  # stacked, a router in a module of its own
        "gpt_oss",  # a router with a bias
        "deepseek_v3",  # sigmoid, groups, correction biases, shared experts
        "llama4_text",  # the weight multiplies the input
        "jamba",  # layers without attention, layers without experts
    ],
)
def test_families(tokens: TokenSet, tmp_path: Path, family: str) -> None:
    """Routers that were disturbed find back; every layer gains or stays, nothing else changes."""
    source = lively_checkpoint(family, tmp_path / "tiny")
    draw = torch.Generator().manual_seed(0)

    def disturb(tensors: dict[str, Tensor]) -> None:
        for name in routers:
            noise = torch.randn(tensors[name].shape, generator=draw)
            tensors[name] = tensors[name] + tensors[name].std() * noise / 2

    routers = [n for n in source.tensors if re.search(r"(gate|router|router\.layer)\.weight", n)]
    disturbed = mutant(source, tmp_path / "disturbed", tensors=disturb)
    o = options(steps=60, eval_every=15, lr=3e-3)
    plan = train_router(disturbed, tokens, o, teacher=source)
    found = layers(plan).values()
    assert len(found) == len(routers) and all(entry["before"] > 0.05 for entry in found)
    for entry in found:
        assert entry["changed"] == (entry["after"] < entry["before"]) == (entry["step"] > 0)
        assert sum(entry["load_after"]["load"]) == pytest.approx(1)
    gains = [entry["after"] / entry["before"] for entry in found]
    assert max(gains) < 0.95, gains
    assert {*routers} <= plan.sources["changed"].tensors.keys()


def test_the_start_is_kept_where_nothing_is_better(
    tiny: Any, tokens: TokenSet, tmp_path: Path
) -> None:
    """A rate that destroys; and a control: what it makes would be worse."""
    source = tiny("mixtral")
    small = mc.write(pruned(source), tmp_path / "small")
    o = options(lr=100.0, clip=1e9, steps=4, eval_every=1, patience=2)
    plan = train_router(small, tokens, o, teacher=source, folder=tmp_path / "work")
    assert all(not x["changed"] and x["stopped"] == "patience" for x in layers(plan).values())
    entries = map(json.loads, (tmp_path / "work" / "training.jsonl").read_text().splitlines())
    losses = [entry["loss"] for entry in entries if (entry["step"] - 1) % 4 < 2]
    assert all(b > a for a, b in zip(losses[::2], losses[1::2], strict=True))
    written = mc.write(plan, tmp_path / "out")
    assert all(raw(written, n) == raw(small, n) for n in small.tensors)


def test_one_layer_of_each_is_there(
    tiny: Any, tokens: TokenSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[layerwise.Streamed] = []
    seen: list[list[set[str]]] = []

    class Watched(layerwise.Streamed):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            models.append(self)

    def train(*args: Any) -> Any:
        names = [[n.split(".") for n in m.whole.tensors()] for m in models]
        seen.append([{w[2] for w in some if w[1] == "layers"} for some in names])
        return one_layer.train_layer(*args)

    monkeypatch.setattr(layerwise, "Streamed", Watched)
    monkeypatch.setattr(layerwise, "train_layer", train)
    source = tiny("qwen3_moe", **SPARSE)
    train_router(pruned(source), tokens, options(steps=1), teacher=source)
    assert seen == [[{i}, {i}, set()] for i in ("0", "1", "2")]


def test_resume(tiny: Any, tokens: TokenSet, tmp_path: Path) -> None:
    """Interrupted in the third layer: the first two are not trained again, the bytes the same."""
    source = tiny("qwen3_moe", **SPARSE)
    small, o = pruned(source), options(steps=6, eval_every=3)
    told: list[int] = []

    def run(place: str, stop_at: int = 0, **how: Any) -> mc.Plan:
        def tell(progress: Any) -> None:
            told.append(progress.step)
            if progress.step == stop_at:
                raise KeyboardInterrupt

        folder = tmp_path / place
        return train_router(small, tokens, o, teacher=source, folder=folder, progress=tell, **how)

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", stop_at=14)
    with pytest.raises(mc.WriteError, match="after step 2"):
        run("cut")
    told.clear()
    resumed = run("cut", resume=True)
    assert told == list(range(13, 19))
    assert resumed.digest() == whole.digest() and layers(resumed) == layers(whole)
    lines = [(tmp_path / p / "training.jsonl").read_text() for p in ("whole", "cut")]
    assert lines[0] == lines[1] and len(lines[0].splitlines()) == 18


def test_a_dense_original(tiny: Any, tokens: TokenSet) -> None:
    """Experts made of shuffled neurons, half of them redrawn: routers find those that help."""
    dense = tiny("llama")
    o = mc.UpcycleOptions(method="shuffle", num_experts=4, top_k=2, granularity=2)
    moe = mc.upcycle(dense, o)
    plan = train_router(moe, tokens, options(), teacher=dense)
    assert all(entry["before"] > 0.1 for entry in layers(plan).values())
    assert sum(entry["changed"] for entry in layers(plan).values()) >= 2
    held = TokenSet.of_ids({"b": [s.ids for s in tokens.sequences if s.domain]})
    how = mc.EvaluateOptions(greedy=0)
    kl = [mc.evaluate(x, held, against=dense, options=how).overall.kl for x in (moe, plan)]
    assert kl[1] < kl[0]


@pytest.mark.parametrize("family", ["gemma4_text", "zaya"])
def test_families_that_have_no_ffn_of_their_own(tiny: Any, tokens: TokenSet, family: str) -> None:
    source = tiny(family)
    with pytest.raises(mc.UnsupportedError, match="layer by layer"):
        train_router(pruned(source, 4), tokens, options(), teacher=source)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": "all"}, "trains routers only"),
        ({"balance": "switch"}, "balance (switch)"),
        ({"shard": True}, "shard has no meaning"),
    ],
)
def test_refused(tiny: Any, tokens: TokenSet, changes: Any, said: str) -> None:
    source = tiny("mixtral")
    with pytest.raises(mc.OptionError) as caught:
        train_router(source, tokens, options(**changes), teacher=source)
    assert said in str(caught.value)


def test_models_that_do_not_belong_together(tiny: Any, tokens: TokenSet) -> None:
    with pytest.raises(mc.OptionError, match="needs a teacher"):
        train_router(tiny("mixtral"), tokens, options())
    deeper = tiny("mixtral", num_hidden_layers=4)
    with pytest.raises(mc.OptionError, match="same layers \\(4 and 3\\)"):
        train_router(tiny("mixtral"), tokens, options(), teacher=deeper)


def test_what_it_would_take(tiny: Any, tokens: TokenSet) -> None:
    """One layer of each, and that layer's tokens."""
    source = tiny("mixtral")
    o = options()
    found = intent(source, tokens, None, o, source)
    whole = intent(source, tokens, None, replace(o, objective="distill"), source)
    per_layer = Runner(source).footprint.layer
    assert found.weights == found.teacher == per_layer < whole.weights / 3
    assert found.kept == 3 * 4 * 32 * (found.distinct + found.held_out)
