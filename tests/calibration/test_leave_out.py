"""Criteria loo-mse and naee-greedy: experts masked in turn, held to the model itself in fp64, whose
routers get −inf logits.

Run: pytest tests/calibration/test_leave_out.py

Controls: an expert that is dropped and not replaced; the order backwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pruned import lively_checkpoint
from torch import Tensor

import moe_compose as mc
from moe_compose.architectures import all_architectures
from moe_compose.calibration import leave_out
from moe_compose.calibration.criteria import worth
from moe_compose.calibration.tokens import TokenSet
from moe_compose.runtime import Runner
from moe_compose.surgery.prune_options import option_problems
from moe_compose.validation.masked import Masked, masking

#: Softmax with and without renormalisation, after the top-k and with a bias, sigmoid with groups
#: and a correction bias, sparsemixer, a scale per expert, rows of no FFN, a scale behind the sum.
FAMILIES = (
    "mixtral", "olmoe", "gpt_oss", "deepseek_v3", "phimoe", "gemma4_text", "longcat_flash", "zaya",
    "laguna", "minimax_m2", "dbrx", "kolibri1",
)  # fmt: skip


@pytest.fixture(scope="module")
def lively(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], mc.Checkpoint]:
    made: dict[str, mc.Checkpoint] = {}

    def lively(family: str) -> mc.Checkpoint:
        if family not in made:
            made[family] = lively_checkpoint(family, tmp_path_factory.mktemp(family) / "tiny")
        return made[family]

    return lively


def measured(source: mc.Checkpoint, tokens: TokenSet, **more: Any) -> mc.ExpertStats:
    """All tokens are the sample."""
    every = sum(tokens.tokens.values())
    options = mc.CalibrateOptions(batch=2, dtype="float64", loo_tokens=every, **more)
    return mc.calibrate(source, tokens, options)


class Model:
    """What the routed experts of one layer return, in fp64, with experts out of reach there."""

    def __init__(self, source: mc.Checkpoint, tokens: TokenSet, layer: int) -> None:
        self._source, self._rows, self._layer = source, tokens.batches(2), layer
        self.moe = all_architectures()[source.config["model_type"]].moe(source.config)
        self.whole = self.without(())

    def without(self, gone: Sequence[int]) -> Tensor:
        """`[tokens, D]`."""
        kept = {self._layer: [e for e in range(self.moe.num_experts) if e not in gone]}
        source = Masked(self._source, kept) if gone else self._source
        mask, found = masking(self._source, kept) if gone else None, []

        @contextmanager
        def watch(layer: Any) -> Any:
            def keep(module: Any, args: Any, output: Tensor) -> None:
                real = self._rows[layer.index_of_batch].real
                found.append(output.reshape(*real.shape, -1)[real])

            with ExitStack() as stack:
                masked = mask and mask(layer)
                if masked is not None:
                    stack.enter_context(masked)
                if layer.index == self._layer:
                    stack.callback(layer.experts.register_forward_hook(keep).remove)
                yield

        Runner(source, dtype="float64").run([r.batch for r in self._rows], on_layer=watch)
        return torch.cat(found)

    def error(self, gone: Sequence[int]) -> float:
        return float((self.without(gone) - self.whole).square().sum())


@pytest.mark.parametrize("family", FAMILIES)
def test_loo_mse_is_the_layer_without_the_expert(
    family: str, lively: Any, tokens: TokenSet
) -> None:
    source = lively(family)
    stats = measured(source, tokens)
    layer = max(stats.layers)
    model = Model(source, tokens, layer)
    expected = torch.tensor([model.error([e]) for e in range(model.moe.num_experts)]).double()
    # a scale that the class applies behind the sum is part of the weights here
    scale = model.moe.routing.scale if family == "laguna" else 1.0
    found = worth(stats, layer, "loo-mse") / scale**2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9 * float(expected.max()))
    by_part = sum(worth(stats, layer, "loo-mse", domain=d, half=h) for d in "ab" for h in (0, 1))
    torch.testing.assert_close(by_part / scale**2, expected, rtol=1e-5, atol=1e-9)
    dropped = stats.sums(layer)["gated_norm"]  # what leaves, if nobody takes the place
    assert float((found.sqrt() / expected.sqrt().clamp(min=1e-9) - 1).abs().max()) < 1e-3
    assert float((dropped / expected.sqrt().clamp(min=1e-9) - 1).abs().max()) > 0.05


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_naee_greedy_is_backward_greedy(family: str, lively: Any, tokens: TokenSet) -> None:
    """By the model itself, every candidate run; in groups, each loses one before any loses two."""
    source = lively(family)
    stats = measured(source, tokens)
    layer = max(stats.layers)
    model = Model(source, tokens, layer)
    experts, groups = model.moe.num_experts, model.moe.routing.groups
    size, gone, least = experts // groups, [], 3 if groups > 1 else model.moe.top_k
    while experts - len(gone) > least * groups:
        left = [e for e in range(experts) if e not in gone]
        full = max(sum(e // size == g for e in left) for g in range(groups))
        may = [e for e in left if sum(x // size == e // size for x in left) == full]
        errors = {e: model.error([*gone, e]) for e in may}
        gone.append(min(may, key=lambda e: (round(errors[e], 9), -e)))
    steps = worth(stats, layer, "naee-greedy")
    assert steps.argsort()[: len(gone)].tolist() == gone
    assert steps.tolist() == [gone.index(e) if e in gone else len(gone) for e in range(experts)]
    keep = experts - len(gone)
    options = mc.PruneOptions(keep=keep, criterion="naee-greedy", super_experts="ignore")
    kept = mc.prune(source, stats, options).decided["kept"][str(layer)]
    assert kept == sorted(set(range(experts)) - set(gone))
    backwards = steps.argsort(descending=True)[: len(gone)].tolist()
    assert groups > 1 or model.error(gone) < model.error(backwards)


def test_many_experts_run_only_where_they_may_be_needed(
    lively: Any, tokens: TokenSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers, without the order, and fewer rows."""
    from moe_compose.calibration import pairs

    rows, own = [], pairs.experts_of

    def counted(module: Any) -> Any:
        run = own(module)

        def one(e: int, x: Tensor) -> Tensor:
            rows[-1] += len(x)
            return run(e, x)

        rows.append(0)
        return one

    monkeypatch.setattr(leave_out, "experts_of", counted)
    source = lively("deepseek_v3")
    few = measured(source, tokens)
    monkeypatch.setattr(leave_out, "GREEDY_EXPERTS", 7)
    many = measured(source, tokens)
    layer = max(few.layers)
    torch.testing.assert_close(worth(many, layer, "loo-mse"), worth(few, layer, "loo-mse"))
    layers, every = len(few.layers), sum(tokens.tokens.values())
    assert rows[:layers] == [8 * every] * layers
    assert all(r < 8 * every for r in rows[layers:])
    with pytest.raises(mc.OptionError, match="one after the other"):
        worth(many, layer, "naee-greedy")


def test_nothing_is_masked_unless_asked(lively: Any, tokens: TokenSet, tmp_path: Path) -> None:
    source = lively("mixtral")
    plain = mc.calibrate(source, tokens, mc.CalibrateOptions(batch=2), output=tmp_path / "plain")
    assert plain.layers[1].loo_HCE is None and plain.record.loo_tokens == 0
    for criterion in ("loo-mse", "naee-greedy"):
        with pytest.raises(mc.OptionError, match="masked"):
            worth(plain, 1, criterion)
        with pytest.raises(mc.OptionError, match="--loo-tokens 2048"):
            mc.prune(source, plain, mc.PruneOptions(keep=4, criterion=criterion))
    options = mc.CalibrateOptions(batch=2, loo_tokens=20)
    some = mc.calibrate(source, tokens, options, output=tmp_path / "some")
    again = mc.ExpertStats.load(tmp_path / "some")
    assert again.record.loo_tokens == 20
    assert torch.equal(worth(again, 1, "naee-greedy"), worth(some, 1, "naee-greedy"))
    for name, table in plain.layers[1].tensors.items():
        assert torch.equal(table, some.layers[1].tensors[name]), "the rest is the same, bit for bit"
    other = mc.calibrate(source, tokens, mc.CalibrateOptions(batch=4, loo_tokens=20))
    found, expected = worth(other, 1, "loo-mse"), worth(some, 1, "loo-mse")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    with pytest.raises(mc.OptionError, match="one sample of tokens"):
        some + other


def test_what_cannot_be_masked(lively: Any, tokens: TokenSet) -> None:
    for family, why in (("llama4_text", "multiplies their input"), ("deepseek_v4", "by token id")):
        with pytest.raises(mc.UnsupportedError, match=why):
            measured(lively(family), tokens)
    bad = mc.PruneOptions(keep=64, criterion="naee-greedy", domain_weight=("a=1",))
    moe = all_architectures()["mixtral"].moe(lively("mixtral").config)
    found = list(option_problems(bad, replace(moe, num_experts=128)))
    assert any("at most 64 experts a layer (128)" in problem for problem in found)
    assert any("domain_weight" in problem for problem in found)


def test_a_layer_that_routes_in_another_way_is_refused(
    lively: Any, tokens: TokenSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A correction bias that is not the layer's."""
    right = leave_out.router_of

    def wrong(source: Any, layer: int) -> Any:
        router = right(source, layer)
        return type(router)(moe=router.moe, bias_Z=router.bias_Z.flip(0), scale_Z=router.scale_Z)

    monkeypatch.setattr("moe_compose.calibration.calibrate.router_of", wrong)
    with pytest.raises(mc.UnsupportedError, match="does not route as is known"):
        measured(lively("deepseek_v3"), tokens)
