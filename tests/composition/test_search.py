"""The search for rows' lengths: one pass over all candidates equals each one evaluated.

pytest tests/composition/test_search.py
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from mutants import mutant
from pruned import lively_checkpoint, selected
from torch import Tensor

import moe_compose as mc
from moe_compose.calibration.tokens import TokenSet
from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.composition import search as searching
from moe_compose.composition.options import RoutingOptions
from moe_compose.composition.rows import with_rows
from moe_compose.composition.search import SCALES, joined, losses_of, search, search_added

HOW = mc.EvaluateOptions(batch=4, greedy=0)


def drawn(source: mc.Checkpoint, seed: int = 0) -> dict[int, Tensor]:
    """Rows of length 1."""
    generator = torch.Generator().manual_seed(seed)
    width, experts = source.config["hidden_size"], source.config["num_local_experts"]
    shape = (experts, width)
    rows = {i: torch.randn(shape, generator=generator, dtype=torch.float64) for i in range(3)}
    return {i: r / r.norm(dim=1, keepdim=True) for i, r in rows.items()}


def evaluated(model: Any, tokens: TokenSet) -> dict[str, float]:
    return {n: s.loss for n, s in mc.evaluate(model, tokens, options=HOW).domains.items()}


def scaled(rows: dict[int, Tensor], scale: float) -> dict[int, Tensor]:
    return {layer: scale * rows_ED for layer, rows_ED in rows.items()}


@pytest.fixture(scope="module")
def held(texts: dict[str, TokenSet]) -> TokenSet:
    return joined(texts)


def test_one_pass_is_each_candidate_evaluated(
    source: mc.Checkpoint, held: TokenSet, options: RoutingOptions
) -> None:
    rows = drawn(source)
    found = search(source, rows, held, options)
    assert found.scales == SCALES and found.tokens == held.tokens
    plans = [with_rows(source, scaled(rows, s)) for s in SCALES]
    expected = [evaluated(plan, held) for plan in plans]
    assert list(found.losses) == expected, "bit for bit"
    assert len({tuple(x.values()) for x in expected}) == len(SCALES), "they do differ"
    means = [sum(x.values()) for x in expected]
    assert found.chosen == SCALES[means.index(min(means))]
    assert found.to_json()["losses"][0] == expected[0]


def test_bf16_rows_are_rounded_as_they_are_stored(
    held: TokenSet, options: RoutingOptions, tmp_path: Path
) -> None:
    made = lively_checkpoint("mixtral", tmp_path / "tiny", num_local_experts=4)

    def narrow(tensors: dict[str, Tensor]) -> None:
        tensors.update({n: t.bfloat16() for n, t in tensors.items()})

    source = mutant(made, tmp_path / "bf16", tensors=narrow)
    rows = drawn(source)
    [found] = losses_of(source, [rows], held, options)
    assert found == evaluated(with_rows(source, rows), held)


def test_weights_are_read_once(
    source: mc.Checkpoint,
    held: TokenSet,
    options: RoutingOptions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: Counter[str] = Counter()
    real = Checkpoint.read

    def counting(self: Checkpoint, name: str) -> Tensor:
        read[name] += 1
        return real(self, name)

    monkeypatch.setattr(Checkpoint, "read", counting)
    search(source, drawn(source), held, options)
    assert {n for n in read if ".layers." in n} == {n for n in source.tensors if ".layers." in n}
    assert max(read.values()) == 1


def test_one_row_added_later(
    source: mc.Checkpoint, held: TokenSet, options: RoutingOptions
) -> None:
    rows, without = drawn(source, seed=3), selected(source, {i: [0, 1, 2] for i in range(3)})
    before = evaluated(without, held)
    expected = [evaluated(with_rows(source, scaled(rows, s), only=[3]), held) for s in SCALES]
    rises = [max(x[d] - before[d] for d in ("py", "math")) for x in expected]
    assert len({*rises}) == len(SCALES)
    for limit in (sorted(rises)[0], sorted(rises)[3], max(rises)):
        how = RoutingOptions(batch=4, tolerance=max(limit, 0.0))
        found = search_added(source, rows, 3, held, how, without=without, own=["de"])
        assert list(found.losses) == expected and found.without == before
        fits = [s for s, rise in zip(SCALES, rises, strict=True) if rise <= how.tolerance]
        assert found.within and found.chosen == max(fits)


def test_no_length_is_within(
    source: mc.Checkpoint,
    held: TokenSet,
    options: RoutingOptions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without = selected(source, {i: [0, 1, 2] for i in range(3)})
    made = [{"py": 9.0 - i % 3, "math": 9.0, "de": 1.0} for i in range(len(SCALES))]
    monkeypatch.setattr(
        searching, "losses_of", lambda *a, **k: [dict(x, math=x["py"]) for x in made]
    )
    found = search_added(source, drawn(source), 3, held, options, without=without, own=["de"])
    assert not found.within and found.chosen == SCALES[2] and "smallest rise" in found.why
    with pytest.raises(mc.OptionError, match="no held-out text of rust"):
        search_added(source, drawn(source), 3, held, options, without=without, own=["rust"])
    with pytest.raises(mc.OptionError, match="of the other experts"):
        search_added(
            source, drawn(source), 3, held, options, without=without, own=list(held.domains)
        )


def test_texts_by_domain(source: mc.Checkpoint, texts: dict[str, TokenSet], held: TokenSet) -> None:
    rows, how = drawn(source), RoutingOptions(batch=4)
    assert search(source, rows, texts, how) == search(source, rows, held, how)
    with pytest.raises(mc.OptionError, match="no held-out text"):
        search(source, rows, {}, how)
