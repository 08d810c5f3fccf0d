"""Composing, adding, swapping, removing and packing through the public functions: what they check,
what they measure, and what they say when it cannot be.

    pytest tests/composition/test_change.py

Controls: a text left out, another base, a row that is chosen.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_models import dense_checkpoint
from mutants import Tensors, mutant
from pruned import raw
from torch.nn.functional import normalize

import moe_compose as mc
from moe_compose.calibration.tokens import TokenSet
from moe_compose.composition.divergence import REPORT_NAME
from moe_compose.composition.kept import SEARCH_NAME, STATS_PLACE, stats_of

GATE = "model.layers.{}.block_sparse_moe.gate.weight"
LAYERS = range(3)
#: Lengths are given: nothing is held out, nothing searched.
FIXED = mc.RoutingOptions(batch=4, row_scale=2.0)

DRAWN = mc.ComposeOptions(router="random")

Models = dict[str, mc.Checkpoint]


def drift(seed: int, which: Callable[[str], bool] = lambda _: True) -> Callable[[Tensors], None]:
    generator = torch.Generator().manual_seed(seed)

    def change(tensors: Tensors) -> None:
        for name, t in sorted(tensors.items()):
            noise = torch.randn(t.shape, generator=generator)
            if which(name):
                tensors[name] = t + 0.1 * noise * t.std()

    return change


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A base; branches, which differ everywhere; an anchored one, which differs in its FFNs."""
    folder = tmp_path_factory.mktemp("models")
    dense_checkpoint("llama", folder / "base")
    base = mc.Checkpoint.open(folder / "base")
    found = {"base": base}
    for seed, name in enumerate(("py", "math", "de"), 1):
        found[name] = mutant(base, folder / name, drift(seed))
    found["ffn"] = mutant(base, folder / "ffn", drift(9, lambda n: ".mlp." in n))
    return found


@pytest.fixture(scope="module")
def moe(models: Models, texts: dict[str, TokenSet], tmp_path_factory: Any) -> mc.Checkpoint:
    """Base, py, math by ridge, statistics beside it; the base has no text."""
    plan = mc.compose(models["base"], two(models), None, known(texts), routing=FIXED)
    return mc.write(plan, tmp_path_factory.mktemp("moe") / "moe")


def two(models: Models) -> dict[str, mc.Checkpoint]:
    return {n: models[n] for n in ("py", "math")}


def known(texts: dict[str, TokenSet]) -> dict[str, TokenSet]:
    return {n: texts[n] for n in ("py", "math")}


def used(plan: mc.Plan | mc.Checkpoint, text: TokenSet, expert: int) -> float:
    """The largest share of a layer's choices that fall on an expert."""
    stats = mc.calibrate(plan, text, mc.CalibrateOptions(batch=4))
    return max(float(stats.load_share(layer)[expert]) for layer in LAYERS)


# compose


def test_with_text_ridge_without_random(models: Models, moe: mc.Checkpoint) -> None:
    stats = stats_of(moe)
    assert stats is not None and stats.names == ("base", "py", "math")
    assert [e.tokens > 0 for e in stats.experts] == [False, True, True]
    for layer in LAYERS:
        lengths = moe.read(GATE.format(layer)).norm(dim=1)
        assert torch.allclose(lengths, torch.tensor([0.0, 2.0, 2.0]), atol=1e-5)
    plain = mc.compose(models["base"], two(models))
    assert STATS_PLACE not in plain.files
    assert any("not trained (random rows)" in n for n in plain.notes)


def test_flexolmo_names_what_differs(models: Models) -> None:
    options = mc.ComposeOptions(preset="flexolmo", router="random")
    with pytest.raises(mc.UnsupportedError) as caught:
        mc.compose(models["base"], two(models) | {"ffn": models["ffn"]}, options)
    assert len(caught.value.problems) == 2
    shared = sum(".mlp." not in n for n in models["base"].tensors)
    for name, problem in zip(("py", "math"), caught.value.problems, strict=True):
        assert f"{name}: {shared} of {shared} shared tensors differ, the farthest model." in problem
    plan = mc.compose(models["base"], {"ffn": models["ffn"]}, options)
    assert plan.reports[REPORT_NAME]["ffn"]["equal"] == shared
    assert "shared tensors that differ from the base's: none" in plan.notes


def test_bar_says_how_far_what_was_shared_has_moved(models: Models, tmp_path: Path) -> None:
    options = mc.ComposeOptions(preset="bar", router="random")
    plan = mc.compose(models["base"], {"py": models["py"], "ffn": models["ffn"]}, options)
    found = plan.reports[REPORT_NAME]
    assert not found["ffn"]["farthest"]
    assert [f["distance"] for f in found["py"]["farthest"]] == sorted(
        (f["distance"] for f in found["py"]["farthest"]), reverse=True
    )
    for entry in found["py"]["farthest"]:
        x, y = (models[n].read(entry["name"]).double() for n in ("base", "py"))
        assert entry["distance"] == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-9)
    name = "model.norm.weight"
    mean = sum(models[n].read(name).double() for n in ("base", "py", "ffn")) / 3
    assert torch.allclose(plan.read(name).double(), mean, atol=1e-7)
    written = mc.write(plan, tmp_path / "moe")
    assert json.loads((written.path / REPORT_NAME).read_text()) == found


def test_the_better_shared_parameters(models: Models, texts: dict[str, TokenSet]) -> None:
    """`best` is what evaluating both by hand says, and is that plan."""
    plan = mc.compose(
        models["base"], two(models), mc.ComposeOptions(shared="best", router="random"), known(texts)
    )
    losses = plan.reports["shared_best.json"]["loss"]
    by_hand = {}
    for kind in ("base", "mean"):
        options = mc.ComposeOptions(shared=kind, router="random")  # type: ignore[arg-type]
        one = mc.compose(models["base"], two(models), options)
        scores = [
            mc.evaluate(one, t, options=mc.EvaluateOptions(greedy=0)).overall.loss
            for t in known(texts).values()
        ]
        by_hand[kind] = one, sum(scores) / 2
        assert losses[kind] == pytest.approx(by_hand[kind][1], abs=1e-6)
    best = min(losses, key=losses.__getitem__)
    assert plan.reports["shared_best.json"]["chosen"] == best
    assert plan.digest() == by_hand[best][0].digest()
    other = next(kind for kind in losses if kind != best)
    assert plan.digest() != by_hand[other][0].digest()


def test_best_searches_where_rows_follow_from_text(
    models: Models, texts: dict[str, TokenSet]
) -> None:
    routing = mc.RoutingOptions(batch=4, held_out=3)
    options = mc.ComposeOptions(shared="best")
    plan = mc.compose(models["base"], two(models), options, known(texts), routing=routing)
    search, said = plan.reports[SEARCH_NAME], plan.reports["shared_best.json"]
    chosen = search["losses"][search["scales"].index(search["chosen"])]
    assert said["loss"][said["chosen"]] == pytest.approx(sum(chosen.values()) / 2)


def test_rows_from_embeddings(models: Models) -> None:
    """The mean of each expert's documents, of length 1, in every layer."""
    generator = torch.Generator().manual_seed(0)
    given = {"base": torch.randn(32, generator=generator)}
    given |= {n: torch.randn(5, 32, generator=generator) for n in two(models)}
    options = mc.ComposeOptions(router="domain")
    plan = mc.compose(models["base"], two(models), options, embeddings=given)
    rows = [given["base"], given["py"].mean(0), given["math"].mean(0)]
    wanted = torch.stack([normalize(r, dim=0) for r in rows])
    for layer in LAYERS:
        assert torch.allclose(plan.read(GATE.format(layer)), wanted, atol=1e-6)
        assert not torch.allclose(plan.read(GATE.format(layer)), wanted[[0, 2, 1]], atol=0.1)
    for wrong in (torch.randn(31), torch.randn(2, 3, 32), torch.full((32,), torch.inf)):
        with pytest.raises(mc.OptionError, match="embedding of py must be 32 finite numbers"):
            mc.compose(models["base"], two(models), options, embeddings=given | {"py": wrong})


def test_missing_evidence_is_all_said_at_once(models: Models, texts: dict[str, TokenSet]) -> None:
    options = mc.ComposeOptions(shared="best", router="domain", top_k=7)
    with pytest.raises(mc.OptionError) as caught:
        mc.compose(models["base"], two(models), options, embeddings={"py": torch.ones(32)})
    said = "\n".join(caught.value.problems)
    for text in ("top_k (7)", "shared = best needs text", "embedding of base, math"):
        assert text in said
    with pytest.raises(mc.OptionError) as caught:
        mc.compose(
            models["base"], two(models), mc.ComposeOptions(router="random"),
            {"law": texts["de"]}, embeddings={"py": torch.ones(32)},
        )  # fmt: skip
    said = "\n".join(caught.value.problems)
    assert "text for 'law': there is no such expert (base, py, math)" in said
    assert "embeddings have no meaning for router = random" in said
    with pytest.raises(mc.OptionError, match="router = ridge needs text"):
        mc.compose(models["base"], two(models), mc.ComposeOptions(router="ridge"))


# add


def test_a_row_of_its_own(moe: mc.Checkpoint, models: Models, texts: dict[str, TokenSet]) -> None:
    text = {"de": texts["de"]}
    for rows in ("new", "all"):
        options = mc.AddOptions(name="de", rows=rows)  # type: ignore[arg-type]
        plan = mc.add_expert(moe, models["de"], options, text, routing=FIXED)
        for layer in LAYERS:
            old, new = moe.read(GATE.format(layer)), plan.read(GATE.format(layer))
            assert torch.allclose(new[3].norm(), torch.tensor(2.0), atol=1e-5)
            assert torch.equal(old, new[:3]) == (rows == "new")
        stats = stats_of(plan)
        assert stats is not None and stats.names == ("base", "py", "math", "de")
    copied = mc.add_expert(moe, models["de"], mc.AddOptions(name="de"))
    assert torch.equal(copied.read(GATE.format(0))[3], moe.read(GATE.format(0))[0])
    assert any("give text for one of its own" in n for n in copied.notes)


def test_off_is_barely_used(moe: mc.Checkpoint, models: Models, texts: dict[str, TokenSet]) -> None:
    """On the text it follows from, as far as a linear row can; a copied row is chosen."""
    every = {n: texts[n] for n in ("py", "math", "de")}
    plan = mc.add_expert(moe, models["de"], mc.AddOptions(name="de", router="off"), every)
    copied = mc.add_expert(moe, models["de"], mc.AddOptions(name="de", like="py"))
    shares = [max(used(p, text, 3) for text in every.values()) for p in (plan, copied)]
    assert shares[0] < shares[1] / 2, shares
    assert any("starts unused" in n for n in plan.notes)
    for name in moe.tensors:
        if not name.endswith("gate.weight"):
            assert plan.extents(name) == moe.extents(name)
    with pytest.raises(mc.OptionError, match="router = off needs text"):
        mc.add_expert(moe, models["de"], mc.AddOptions(name="de", router="off"))


def test_what_adding_needs(
    moe: mc.Checkpoint, models: Models, texts: dict[str, TokenSet], tmp_path: Path
) -> None:
    donor = models["de"]
    options = mc.AddOptions(name="py", router="glue", like="9", top_k=9)  # type: ignore[arg-type]
    with pytest.raises(mc.OptionError) as caught:
        mc.add_expert(moe, donor, options)
    assert len(caught.value.problems) == 3, caught.value.problems
    with pytest.raises(mc.OptionError, match="there is no expert '9'"):
        mc.add_expert(moe, donor, mc.AddOptions(name="de", like="9"))
    with pytest.raises(mc.OptionError, match="needs text of the new expert"):
        mc.add_expert(moe, donor, mc.AddOptions(name="de", router="ridge"))
    bare = mutant(moe, tmp_path / "bare")
    (bare.path / STATS_PLACE).unlink()
    with pytest.raises(mc.OptionError, match="statistics of the others beside the model"):
        mc.add_expert(bare, donor, mc.AddOptions(name="de"), {"de": texts["de"]}, routing=FIXED)
    assert mc.add_expert(bare, donor, mc.AddOptions(name="de", router="hidden"),
                         {"de": texts["de"]}, routing=FIXED)  # fmt: skip
    other = mutant(donor, tmp_path / "other", config=lambda c: c.update(rms_norm_eps=0.5))
    with pytest.raises(mc.UnsupportedError, match=r"rms_norm_eps is 0\.5"):
        mc.add_expert(moe, other, mc.AddOptions(name="de"))


# swap


def test_swapped_rows(moe: mc.Checkpoint, models: Models, texts: dict[str, TokenSet]) -> None:
    """Kept, or from text; statistics follow the expert, and the others keep everything."""
    kept = mc.swap_expert(moe, models["de"], mc.SwapOptions(expert="math"))
    ridge = mc.swap_expert(
        moe, models["de"], mc.SwapOptions(expert="math", router="ridge", name="de"),
        {"de": texts["de"]}, routing=FIXED,
    )  # fmt: skip
    for layer in LAYERS:
        name = GATE.format(layer)
        assert torch.equal(kept.read(name), moe.read(name))
        assert torch.equal(ridge.read(name)[:2], moe.read(name)[:2])
        assert not torch.allclose(ridge.read(name)[2], moe.read(name)[2], atol=0.05)
        for plan in (kept, ridge):
            own = f"model.layers.{layer}.block_sparse_moe.experts.{{}}.w1.weight"
            gate = models["de"].read(f"model.layers.{layer}.mlp.gate_proj.weight")
            assert torch.equal(plan.read(own.format(2)), gate)
            assert raw(plan, own.format(1)) == raw(moe, own.format(1))
    assert kept.config["expert_names"] == ["base", "py", "math"]
    assert ridge.config["expert_names"] == ["base", "py", "de"]
    stats, before = stats_of(ridge), stats_of(moe)
    assert stats is not None and before is not None
    assert stats.experts[2].text != before.experts[2].text
    assert stats.experts[1] == before.experts[1]


def test_a_swap_forgets_the_text_of_the_old(moe: mc.Checkpoint, models: Models) -> None:
    """Statistics are of an expert that is not there any more, so they do not go along."""
    kept = mc.swap_expert(moe, models["de"], mc.SwapOptions(expert="math"))
    assert STATS_PLACE not in kept.files
    with pytest.raises(mc.OptionError, match="needs text of the new expert"):
        mc.swap_expert(moe, models["de"], mc.SwapOptions(expert="math", router="ridge"))


# remove


def test_removed_with_its_statistics(moe: mc.Checkpoint, tmp_path: Path) -> None:
    plan = mc.remove_expert(moe, mc.RemoveOptions(expert=("py",)))
    stats, before = stats_of(plan), stats_of(moe)
    assert stats is not None and before is not None
    assert stats.names == ("base", "math")
    written = mc.write(plan, tmp_path / "moe")
    content = (written.path / STATS_PLACE).read_bytes()
    digest = before.experts[1].text.encode()
    assert digest in (moe.path / STATS_PLACE).read_bytes()
    assert digest not in content and b"py" not in content
    with pytest.raises(mc.OptionError) as caught:
        mc.remove_expert(moe, mc.RemoveOptions(expert=("law", "py", "math")))
    assert len(caught.value.problems) == 2


# pack


def test_packed_with_statistics_that_were_kept(
    moe: mc.Checkpoint, models: Models, texts: dict[str, TokenSet], tmp_path: Path
) -> None:
    """Out of one mixture, into another of the same base."""
    grown = mc.write(
        mc.add_expert(moe, models["de"], mc.AddOptions(name="de"), {"de": texts["de"]},
                      routing=FIXED),
        tmp_path / "grown",
    )  # fmt: skip
    packed = mc.write(mc.pack_expert(grown, "de"), tmp_path / "packed")
    said = json.loads((packed.path / "expert.json").read_text())
    assert (said["name"], said["of"]) == ("de", "grown")
    stats = stats_of(packed)
    assert stats is not None and stats.names == ("de",)
    again = mc.add_expert(moe, packed, mc.AddOptions(name="de"), routing=FIXED)
    assert all(torch.equal(again.read(n), grown.read(n)) for n in grown.tensors)
    swapped = mc.swap_expert(moe, packed, mc.SwapOptions(expert="math", router="ridge"),
                             routing=FIXED)  # fmt: skip
    found = stats_of(swapped)
    assert found is not None and found.names == ("base", "py", "math")
    other = mutant(moe, tmp_path / "other", drift(5, lambda n: "self_attn" in n))
    for change in (
        lambda: mc.add_expert(other, packed, mc.AddOptions(name="de")),
        lambda: mc.swap_expert(other, packed, mc.SwapOptions(expert="py")),
    ):
        with pytest.raises(mc.UnsupportedError, match="packed was packed for another base"):
            change()


def test_what_packing_needs(moe: mc.Checkpoint, models: Models) -> None:
    for arguments in ({}, {"expert": "py", "base": models["base"]}):
        with pytest.raises(mc.OptionError, match="say which of its 3 experts"):
            mc.pack_expert(moe, **arguments)
    for arguments in ({}, {"base": models["base"]}, {"name": "de"}, {"expert": 0}):
        with pytest.raises(mc.OptionError, match="its expert needs the base"):
            mc.pack_expert(models["de"], **arguments)
    with pytest.raises(mc.OptionError, match="there is no expert 'law'"):
        mc.pack_expert(moe, "law")
    plan = mc.pack_expert(models["de"], base=models["base"], name="de")
    assert STATS_PLACE not in plan.files
    assert plan.reports["expert.json"]["name"] == "de"


def test_an_expert_of_the_same_number_is_no_copy(models: Models, tmp_path: Path) -> None:
    """Another model's expert 1 in the place of expert 1 is not taken for the source's own."""
    moes = {}
    for name in ("py", "math"):
        plan = mc.compose(models["base"], {name: models[name]}, mc.ComposeOptions(shared="base"))
        moes[name] = mc.write(plan, tmp_path / name)
    donor = mc.Donor("math", moes["math"], 1)
    plan = mc.swap_expert(moes["py"], donor, mc.SwapOptions(expert="1"))
    assert not any("experts" in pattern for pattern in plan.copied())
    assert any("q_proj" in pattern for pattern in plan.copied())
    swapped = mc.write(plan, tmp_path / "swapped")
    report = mc.validate(swapped, against=moes["py"], preservation=plan.preservation)
    assert report.ok, report


@pytest.mark.parametrize(
    ("router", "change"),
    [
        (
            "random",
            lambda m, t: mc.compose(m["base"], two(m), mc.ComposeOptions(router="random"), t),
        ),
        ("copy", lambda m, t: mc.add_expert(m["moe"], m["de"], mc.AddOptions(name="de"), t)),
        ("keep", lambda m, t: mc.swap_expert(m["moe"], m["de"], mc.SwapOptions(expert="py"), t)),
    ],
)
def test_text_that_nothing_reads(
    router: str, change: Any, models: Models, moe: mc.Checkpoint, texts: dict[str, TokenSet]
) -> None:
    with pytest.raises(mc.OptionError, match=f"no use with router = {router}"):
        change({**models, "moe": moe}, known(texts))


def test_a_removed_expert_leaves_no_record_of_its_search(
    models: Models, moe: mc.Checkpoint, texts: dict[str, TokenSet], tmp_path: Path
) -> None:
    options = mc.RoutingOptions(batch=4, tokens=256)
    plan = mc.add_expert(moe, models["de"], mc.AddOptions(name="de"), texts, routing=options)
    grown = mc.write(plan, tmp_path / "grown")
    assert SEARCH_NAME in plan.reports and (tmp_path / "grown" / SEARCH_NAME).is_file()
    less = mc.write(mc.remove_expert(grown, mc.RemoveOptions(expert=("de",))), tmp_path / "less")
    assert not (tmp_path / "less" / SEARCH_NAME).exists()
    assert all(torch.equal(less.read(n), moe.read(n)) for n in moe.tensors)
