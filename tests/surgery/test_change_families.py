"""Experts added, swapped, removed and repeated in every MoE family: own bytes move, no more.

    pytest tests/surgery/test_change_families.py

Controls: another expert's tensors, a row left out, top-k that does not grow with the copies.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from mutants import mutant
from pruned import error, lively_checkpoint, masked_run, raw, run
from streamed import make_batches
from tiny_models import TINY

import moe_compose as mc
from moe_compose.architectures import all_architectures
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import CheckpointError, UnsupportedError
from moe_compose.surgery.add_expert import add_expert
from moe_compose.surgery.donors import Donor
from moe_compose.surgery.expand import expand
from moe_compose.surgery.expert_names import names_of
from moe_compose.surgery.expert_options import AddOptions, ExpandOptions, RemoveOptions, SwapOptions
from moe_compose.surgery.remove_expert import remove_expert
from moe_compose.surgery.roles import Roles
from moe_compose.surgery.selection import moe_form
from moe_compose.surgery.swap_expert import swap_expert

FAMILIES = [
    n for n, form in all_architectures().items() if form.is_moe and n in TINY and not form.read_only
]

BATCHES = make_batches()

Tiny = Callable[..., mc.Checkpoint]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    made: dict[tuple[str, int], mc.Checkpoint] = {}

    def tiny(family: str, seed: int = 0) -> mc.Checkpoint:
        if (family, seed) not in made:
            folder = tmp_path_factory.mktemp(family) / "tiny"
            made[family, seed] = lively_checkpoint(family, folder, seed=seed)
        return made[family, seed]

    return tiny


def grouped(source: TensorSource) -> bool:
    _, moe = moe_form(source)
    return moe.routing.grouped


def same_bytes(a: TensorSource, b: TensorSource) -> bool:
    """Bytes, read from where they lie; what passed through a plan that computes, by value."""
    return set(a.tensors) == set(b.tensors) and all(
        raw(a, n) == raw(b, n) if b.extents(n) else torch.equal(a.read(n), b.read(n))
        for n in a.tensors
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_add_then_remove(family: str, tiny: Tiny) -> None:
    """The same bytes and config, whoever gave the expert; meanwhile the new one is masked out."""
    source, other = tiny(family), tiny(family, 1)
    donor = Donor("other#1", other, 1)
    if grouped(source):
        with pytest.raises(UnsupportedError, match="groups"):
            add_expert(source, donor, AddOptions(name="law"))
        return
    added = add_expert(source, donor, AddOptions(name="law"))
    _, before = moe_form(source)
    _, after = moe_form(added)
    assert after.num_experts == before.num_experts + 1
    assert names_of(added.config, after.num_experts)[-1] == "law"
    again = remove_expert(added, RemoveOptions(expert=("law",)))
    assert same_bytes(source, again)
    assert "expert_names" not in again.config
    kept = dict.fromkeys(before.sparse_layers, range(before.num_experts))
    if not before.zero_experts:
        assert error(masked_run(added, kept, BATCHES), run(source, BATCHES)) <= 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_tensors_are_the_donors(family: str, tiny: Tiny) -> None:
    """Expert 1 is the donor's 2, bytes and row; the others are the model's own."""
    source, other = tiny(family), tiny(family, 1)
    plan = swap_expert(source, Donor("o", other, 2), SwapOptions(expert="1", router="trained"))
    form, moe = moe_form(source)
    roles, rest = Roles(form), 0
    layers = {roles.block(i) for i in moe.sparse_layers}
    for name, info in source.tensors.items():
        role = roles.of(name)
        if role is None or role.block not in layers:
            assert raw(plan, name) == raw(source, name)
            continue
        rest += 1
        if role.kind == "expert":
            giver = raw(other, role.renamed(2)) if role.expert == 1 else raw(source, name)
            assert raw(plan, name) == giver, name
        elif role.kind == "stacked":
            found, own, theirs = (
                x.read(name).reshape(moe.num_experts, -1) for x in (plan, source, other)
            )
            wanted = own.clone()
            wanted[1] = theirs[2]
            assert torch.equal(found, wanted), name
            assert torch.equal(own[1], theirs[2]) or not torch.equal(found, own)
        elif info.shape and role.router and role.router.kind == "weight" and not role.router.dim:
            wanted = source.read(name).clone()
            wanted[1] = other.read(name)[2]
            assert torch.equal(plan.read(name), wanted), name
    assert rest


@pytest.mark.parametrize("family", FAMILIES)
def test_expanded(family: str, tiny: Tiny) -> None:
    """Exact where it is said to be; with the old top-k it is not."""
    source = tiny(family)
    _, moe = moe_form(source)
    if moe.routing.hashed_layers:
        with pytest.raises(UnsupportedError, match="table"):
            expand(source, ExpandOptions())
        return
    plan = expand(source, ExpandOptions())
    if family == "zaya":
        with pytest.raises(CheckpointError, match="refuses the config"):
            run(plan, BATCHES)
        return
    wanted = run(source, BATCHES)
    apart = error(run(plan, BATCHES), wanted)
    if plan.preservation.kind == "exact":
        assert apart <= 2e-6
        kept = expand(source, ExpandOptions(top_k="keep"))
        assert kept.preservation.kind == "none"
        if moe.top_k > 1:
            assert error(run(kept, BATCHES), wanted) > 1e-5
    else:
        assert apart > 1e-6


def test_most_families_expand_exactly(tiny: Tiny) -> None:
    kinds = {
        f: expand(tiny(f), ExpandOptions()).preservation.kind
        for f in FAMILIES
        if not moe_form(tiny(f))[1].routing.hashed_layers
    }
    assert sum(kind == "exact" for kind in kinds.values()) > len(kinds) // 2, kinds


def test_a_quantised_donor_must_agree(tiny: Tiny, tmp_path) -> None:
    """Experts of another dtype are refused, each tensor named; the same dtype moves as bytes."""
    source, other = tiny("qwen3_moe"), tiny("qwen3_moe", 1)

    def halve(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({n: t.bfloat16() for n, t in tensors.items() if ".experts." in n})

    half = mutant(other, tmp_path / "half", halve)
    with pytest.raises(UnsupportedError, match=r"is BF16 .* the model's F32"):
        add_expert(source, Donor("half#0", half, 0), AddOptions())
