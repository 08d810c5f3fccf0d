"""`measure`: sums against a plain loop over the loaded model with experts forced by hand.

pytest tests/composition/test_measure.py
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from mutants import mutant
from pruned import lively_checkpoint
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import moe_compose as mc
from moe_compose.calibration.tokens import TokenSet
from moe_compose.composition import measure as measuring
from moe_compose.composition.forcing import Routers, forced
from moe_compose.composition.measure import measure
from moe_compose.composition.options import RoutingOptions
from moe_compose.composition.rows import solve, with_rows
from moe_compose.composition.statistics import STATS_NAME
from moe_compose.runtime import Layer, Runner


class Loaded:
    """A model as transformers loads it, in fp64, with one expert wherever experts are chosen, by a
    changed `forward` of its own; what routers and decoder layers are given is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, experts_implementation="eager", local_files_only=True
        ).eval()
        self.expert = 0
        self.routed: dict[int, list[Tensor]] = {}
        self.stream: dict[int, list[Tensor]] = {}
        for i, layer in enumerate(self.model.model.layers):
            self._change(i, layer)

    def _change(self, i: int, layer: nn.Module) -> None:
        experts, router = layer.mlp.experts, layer.mlp.gate
        run, route, whole = experts.forward, router.forward, layer.forward

        def forced(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return run(x, torch.full_like(ids[:, :1], self.expert), weights.sum(-1, keepdim=True))

        def watched(x: Tensor, *rest: Any) -> Any:
            self.routed.setdefault(i, []).append(x.reshape(-1, x.shape[-1]))
            return route(x, *rest)

        def streamed(x: Tensor, *rest: Any, **more: Any) -> Any:
            self.stream.setdefault(i, []).append(x.reshape(-1, x.shape[-1]))
            return whole(x, *rest, **more)

        experts.forward, router.forward, layer.forward = forced, watched, streamed

    @torch.no_grad()
    def inputs(self, expert: int, tokens: TokenSet) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """What each layer's router, and each layer, is given, one sequence at a time."""
        self.expert, self.routed, self.stream = expert, {}, {}
        for sequence in tokens.sequences:
            self.model(input_ids=torch.tensor([sequence.ids]), use_cache=False)
        return tuple(
            {i: torch.cat(x) for i, x in kept.items()} for kept in (self.routed, self.stream)
        )


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("family", ["mixtral", "olmoe"])
def test_sums_are_those_of_a_plain_loop(
    family: str, texts: dict[str, TokenSet], options: RoutingOptions, tmp_path: Path
) -> None:
    """Weights that sum to 1 (Mixtral), and to what the router says (OLMoE)."""
    sizes = {"num_local_experts" if family == "mixtral" else "num_experts": 4}
    model = lively_checkpoint(family, tmp_path / "tiny", **sizes)
    by_index = dict(zip((1, 3), texts.values(), strict=False))
    stats = measure(model, by_index, options, folder=tmp_path / "stats")
    assert stats.names == ("0", "1", "2", "3")
    assert [e.tokens > 0 for e in stats.experts] == [False, True, False, True]
    loaded = Loaded(tmp_path / "tiny")
    rows = solve(stats)
    raw: dict[int, list[Tensor]] = {}
    for expert, tokens in by_index.items():
        name = str(expert)
        assert stats.experts[expert].tokens == sum(tokens.tokens.values())
        routed, stream = loaded.inputs(expert, tokens)
        for layer, x_TD in routed.items():
            raw.setdefault(layer, []).append(x_TD)
            assert apart(stats.second(layer, name), x_TD.T @ x_TD) < 1e-5
            assert apart(stats.sum(layer, name), x_TD.sum(0)) < 1e-5
            # the control: the residual stream before attention, and another expert's sums
            h_TD = stream[layer]
            assert apart(stats.second(layer, name), h_TD.T @ h_TD) > 0.1
            assert apart(stats.sum(layer, name), h_TD.sum(0)) > 0.1
        other, _ = loaded.inputs(expert - 1, tokens)
        last = max(other)
        assert apart(stats.sum(last, name), other[last].sum(0)) > 1e-3
    for layer, xs in raw.items():
        expected_ED = ridge_of_raw(xs, 0.01)
        assert apart(rows[layer][[1, 3]], expected_ED) < 1e-5
        assert not rows[layer][[0, 2]].any(), "no text, no row"


def ridge_of_raw(xs: list[Tensor], ridge: float) -> Tensor:
    """Rows from the inputs themselves: least squares to centred targets, penalty as extra rows."""
    x_TD = torch.cat(xs)
    y_TE = torch.cat([torch.eye(len(xs))[i].expand(len(x), -1) for i, x in enumerate(xs)])
    y_TE = y_TE.double() - 1 / len(xs)
    width = x_TD.shape[1]
    penalty = (ridge * x_TD.square().sum() / width).sqrt() * torch.eye(width).double()
    x_all, y_all = torch.cat([x_TD, penalty]), torch.cat([y_TE, torch.zeros(width, len(xs))])
    w_DE = torch.linalg.lstsq(x_all, y_all, driver="gelsd").solution
    return (w_DE / w_DE.norm(dim=0)).T


def test_an_expert_added_later_gives_the_same_bytes(
    source: mc.Checkpoint, texts: dict[str, TokenSet], options: RoutingOptions, tmp_path: Path
) -> None:
    joint = measure(source, texts, options, folder=tmp_path / "joint")
    alone = [
        measure(source, {n: t}, options, folder=tmp_path / n).select([n]) for n, t in texts.items()
    ]
    later = alone[0].join(alone[1]).join(alone[2])
    joint = joint.without("base")
    one, other = (s.save(tmp_path / f"{i}") for i, s in enumerate((joint, later)))
    assert one.read_bytes() == other.read_bytes()
    for layer, rows_ED in solve(joint).items():
        assert torch.equal(rows_ED, solve(later)[layer])


def test_rows_do_not_depend_on_the_router_that_is_there(
    source: mc.Checkpoint, texts: dict[str, TokenSet], options: RoutingOptions, tmp_path: Path
) -> None:
    first = measure(source, texts, options, folder=tmp_path / "a")
    routed = with_rows(source, solve(first.scaled({"py": 3.0})))
    again = measure(routed, texts, options, folder=tmp_path / "b")
    data = [(tmp_path / f / STATS_NAME).read_bytes() for f in ("a", "b")]
    assert data[0] == data[1] and again.shared == first.shared


def test_one_sum_is_in_memory(
    source: mc.Checkpoint,
    texts: dict[str, TokenSet],
    options: RoutingOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sums are written and let go before the next expert's begin."""
    kept: list[Any] = []
    most = 0
    real = measuring.packed

    def packed(matrix_DD: Tensor) -> Tensor:
        nonlocal most
        kept.append(weakref.ref(matrix_DD))
        most = max(most, sum(r() is not None for r in kept))
        return real(matrix_DD)

    monkeypatch.setattr(measuring, "packed", packed)
    stats = measure(source, texts, options, folder=tmp_path)
    assert len(kept) == 3 * 3 and most == 1
    assert stats.nbytes == sum(2 * d * (d + 3) for d in stats.widths.values()) * 3


FAMILIES = ["deepseek_v3", "gpt_oss", "gemma4_text", "flex_olmo", "ernie4_5_moe"]
FAMILIES += ["qwen2_moe", "nemotron_h", "minimax_m2", "dbrx", "phimoe"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_router_multiplies(
    family: str,
    texts: dict[str, TokenSet],
    options: RoutingOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Σ x is what the product itself is given, wherever the class computes it."""
    model = lively_checkpoint(family, tmp_path / "tiny")
    stats = measure(model, {1: texts["py"]}, options, folder=tmp_path)
    routers, runner = Routers.of(model), Runner(model)
    matrices, rows = routers.matrices(runner), texts["py"].batches(options.batch)
    found: dict[int, Tensor] = {}
    now: list[Layer] = []
    real = torch.nn.functional.linear

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        own = matrices[now[0].index].weight if now else None
        if own is not None and weight.shape == own.shape and torch.equal(weight, own.to(weight)):
            real_T = rows[now[0].index_of_batch].real.flatten()
            sum_D = x.reshape(-1, x.shape[-1])[real_T].double().sum(0)
            found[now[0].index] = found.get(now[0].index, 0) + sum_D
        return real(x, weight, bias)

    @contextmanager
    def watching(layer: Layer) -> Iterator[None]:
        with forced(layer, [1] * len(rows), routers.moe):
            now.append(layer)
            yield
            now.clear()

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    runner.run(
        [r.batch for r in rows],
        on_layer=lambda layer: watching(layer) if layer.index in matrices else None,
    )
    assert found.keys() == stats.widths.keys()
    for layer, sum_D in found.items():
        assert apart(stats.sum(layer, "1"), sum_D) < 1e-5


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("llama4_text", "cannot be forced"),
        ("llama", "has no experts"),
        ("jetmoe", "cannot be selected"),
        ("zaya", "without an FFN"),
    ],
)
def test_families_that_are_refused(
    family: str, why: str, texts: dict[str, TokenSet], options: RoutingOptions, tmp_path: Path
) -> None:
    model = lively_checkpoint(family, tmp_path / "tiny")
    with pytest.raises(mc.UnsupportedError, match=why):
        measure(model, {0: texts["py"]}, options, folder=tmp_path / "stats")
    assert not (tmp_path / "stats").exists()


@pytest.mark.parametrize(
    ("given", "why"),
    [({}, "no expert has text"), ({"rust": 0, 9: 0}, "'rust'"), ({"py": 0, 1: 0}, "text twice")],
)
def test_experts_that_are_not_there(
    given: dict[Any, int], why: str, source: mc.Checkpoint, texts: Any, tmp_path: Path
) -> None:
    with pytest.raises(mc.OptionError, match=why):
        measure(source, dict.fromkeys(given, texts["py"]), folder=tmp_path)


def test_infinite_inputs_leave_no_file(
    source: mc.Checkpoint, texts: dict[str, TokenSet], options: RoutingOptions, tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.post_attention_layernorm.weight"][3] = float("inf")

    broken = mutant(source, tmp_path / "broken", tensors=spoil)
    with pytest.raises(mc.CheckpointError, match=r"layer 1 .*expert py"):
        measure(broken, texts, options, folder=tmp_path / "stats")
    assert not list((tmp_path / "stats").iterdir())
