"""Composition: each expert computes what its own model does; what is shared is what was asked for.

    pytest tests/surgery/test_compose.py

Controls: another model's FFN, shared parameters left out of the mean, rows in another order.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_models import dense_checkpoint
from mutants import mutant
from pruned import error, run
from streamed import make_batches

import moe_compose as mc
from moe_compose.architectures import all_architectures
from moe_compose.errors import OptionError, UnsupportedError
from moe_compose.surgery.compose import plan_composition
from moe_compose.surgery.compose_options import PRESETS, ROUTERS, SHARED, ComposeOptions
from moe_compose.surgery.donors import Donor

PAIRS = [
    (twin.dense, target.model_type)
    for target in all_architectures().values()
    for twin in target.twins
    if not target.parallel_mlp
]

Dense = Callable[..., mc.Checkpoint]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Dense:
    """Dense models of a family: the base, and others trained further by noise of a seed."""
    made: dict[tuple[str, int], mc.Checkpoint] = {}

    def dense(family: str, seed: int = 0) -> mc.Checkpoint:
        if (family, seed) not in made:
            folder = tmp_path_factory.mktemp(family) / f"model{seed}"
            if seed == 0:
                dense_checkpoint(family, folder)
                made[family, 0] = mc.Checkpoint.open(folder)
            else:
                generator = torch.Generator().manual_seed(seed)

                def drift(tensors: dict[str, torch.Tensor]) -> None:
                    for name, t in sorted(tensors.items()):
                        noise = torch.randn(t.shape, generator=generator)
                        tensors[name] = t + 0.05 * noise * t.std()

                made[family, seed] = mutant(dense(family), folder, drift)
        return made[family, seed]

    return dense


def composed(base: mc.Checkpoint, donors: dict[str, mc.Checkpoint], **options: object) -> mc.Plan:
    given = {name: Donor(c.label, c) for name, c in donors.items()}
    settings = {"shared": "mean", "router": "random", **options}
    return plan_composition(base, given, ComposeOptions(**settings))  # type: ignore[arg-type]


def batches_of(source: mc.Checkpoint) -> list:
    return make_batches(int(source.config["vocab_size"]))[:2]


@pytest.mark.parametrize(("family", "target"), PAIRS)
def test_one_model_alone_is_that_model(family: str, target: str, dense: Dense) -> None:
    """Also in two copies; the base, of which only the config is used, is another model."""
    base, other = dense(family), dense(family, 1)
    if (family, target) == ("phi3", "glm4_moe"):
        with pytest.raises(UnsupportedError, match="not exact for this checkpoint"):
            composed(base, {"a": other}, base_expert=False, top_k=1, target=target)
        return
    wanted = run(other, batches_of(other))
    plan = composed(base, {"a": other, "b": other}, base_expert=False, top_k=2, target=target)
    assert plan.preservation.kind == "exact"
    assert plan.preservation.reference == "b"
    tolerance = max(2e-6, 2 * plan.preservation.tolerance)
    assert error(run(plan, batches_of(other)), wanted) <= tolerance
    assert error(run(base, batches_of(other)), wanted) > 1e-3


def test_every_expert_is_its_models(dense: Dense) -> None:
    """Bytes, and whose they are; shared parameters are the mean, as numpy takes it."""
    base, one, two = (dense("llama", seed) for seed in (0, 1, 2))
    plan = composed(base, {"one": one, "two": two})
    assert plan.config["expert_names"] == ["base", "one", "two"]
    assert plan.config["num_local_experts"] == 3
    for layer in range(int(base.config["num_hidden_layers"])):
        for e, model in enumerate((base, one, two)):
            for ours, theirs in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
                name = f"model.layers.{layer}.block_sparse_moe.experts.{e}.{ours}.weight"
                own = f"model.layers.{layer}.mlp.{theirs}_proj.weight"
                assert torch.equal(plan.read(name), model.read(own))
                assert not torch.equal(plan.read(name), dense("llama", 3).read(own))
    name = "model.layers.1.self_attn.q_proj.weight"
    values = [m.read(name).double().numpy() for m in (base, one, two)]
    mean = np.mean(values, axis=0)
    assert np.abs(plan.read(name).double().numpy() - mean).max() <= 1e-7 * np.abs(mean).max()
    assert np.abs(np.mean(values[1:], axis=0) - mean).max() > 1e-3 * np.abs(mean).max()


def test_shared_parameters_of_the_base_are_bytes(dense: Dense) -> None:
    base = dense("qwen3")
    plan = composed(base, {"one": dense("qwen3", 1)}, shared="base")
    for name in ("model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight"):
        assert plan.extents(name) == base.extents(name)
    assert plan.preservation.kind == "none"


@pytest.mark.parametrize("kind", [k for k in SHARED if k != "best"])
def test_equal_models_blend_to_themselves(kind: str, dense: Dense) -> None:
    """However it is blended; and different ones to something else."""
    base = dense("llama")
    plan = composed(base, {"copy": base}, shared=kind)
    for name in ("model.norm.weight", "model.layers.0.self_attn.o_proj.weight"):
        assert torch.equal(plan.read(name), base.read(name)), name
    other = composed(base, {"copy": dense("llama", 1)}, shared=kind)
    same = torch.equal(other.read("model.norm.weight"), base.read("model.norm.weight"))
    assert same == (kind == "base")


@pytest.fixture(scope="module")
def pair(dense: Dense, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], mc.Checkpoint]:
    """Anchored pairs whose second expert and router were trained (noise of a seed)."""

    def pair(seed: int) -> mc.Checkpoint:
        folder = tmp_path_factory.mktemp("pairs")
        written = mc.write(mc.anchor(dense("olmo2"), mc.AnchorOptions()), folder / "anchored")
        generator = torch.Generator().manual_seed(seed)

        def train(tensors: dict[str, torch.Tensor]) -> None:
            for name, t in sorted(tensors.items()):
                if ".experts.1." in name or ".gate.weight" in name:
                    tensors[name] = t + torch.randn(t.shape, generator=generator) / 10

        return mutant(written, folder / "trained", train)

    return pair


def test_anchored_pairs_as_by_hand(dense: Dense, pair: Callable[[int], mc.Checkpoint]) -> None:
    """FlexOlmo's merge: FFNs and router rows one after another, all else the base's."""
    base, math, code = dense("olmo2"), pair(1), pair(2)
    plan = composed(base, {"math": math, "code": code}, shared="base", router="trained", top_k=3)
    assert (math.path / "freeze.json").is_file()
    for layer in range(int(base.config["num_hidden_layers"])):
        row = f"model.layers.{layer}.mlp.gate.weight"
        rows = [m.read(row) for m in (math, code)]
        by_hand = torch.cat([(rows[0][:1] + rows[1][:1]) / 2, rows[0][1:], rows[1][1:]])
        assert torch.allclose(plan.read(row), by_hand, atol=1e-7)
        assert not torch.allclose(plan.read(row), by_hand[[0, 2, 1]], atol=1e-3)
        for e, source in ((1, math), (2, code)):
            name = f"model.layers.{layer}.mlp.experts.{e}.down_proj.weight"
            theirs = name.replace(f"experts.{e}", "experts.1")
            assert plan.extents(name) == source.extents(theirs)
        anchor = f"model.layers.{layer}.mlp.experts.0.up_proj.weight"
        assert plan.extents(anchor) == base.extents(f"model.layers.{layer}.mlp.up_proj.weight")


def test_trained_rows_need_pairs(dense: Dense) -> None:
    with pytest.raises(UnsupportedError) as caught:
        composed(dense("llama"), {"one": dense("llama", 1)}, router="trained")
    assert "one is none" in str(caught.value.problems)


def test_an_expert_of_another_mixture(dense: Dense, tmp_path: Path) -> None:
    base = dense("qwen3")
    moe = mc.write(composed(base, {"one": dense("qwen3", 1)}), tmp_path / "moe")
    plan = plan_composition(
        base,
        {"again": Donor("moe#one", moe, "one")},
        ComposeOptions(shared="base", router="random"),
    )
    name = "model.layers.0.mlp.experts.1.gate_proj.weight"
    assert torch.equal(
        plan.read(name), dense("qwen3", 1).read("model.layers.0.mlp.gate_proj.weight")
    )
    with pytest.raises(OptionError, match="there is no expert 'law'"):
        plan_composition(
            base,
            {"x": Donor("moe#law", moe, "law")},
            ComposeOptions(shared="base", router="random"),
        )


def test_everything_that_does_not_fit_at_once(dense: Dense, tmp_path: Path) -> None:
    base = dense("llama")
    vocabulary = mutant(
        base,
        tmp_path / "v",
        lambda t: t.update({"model.embed_tokens.weight": t["model.embed_tokens.weight"][:-1]}),
        lambda c: c.update(vocab_size=c["vocab_size"] - 1, rms_norm_eps=0.25),
    )
    with pytest.raises(UnsupportedError) as caught:
        composed(base, {"v": vocabulary, "q": dense("qwen3")})
    text = " | ".join(caught.value.problems)
    for said in ("v (v): vocab_size is", "v (v): rms_norm_eps is 0.25", "embed_tokens", "qwen3"):
        assert said in text, text
    with pytest.raises(OptionError) as wrong:
        composed(base, {"base": base, "3": base}, top_k=9, shared="glue", density=0.0)
    assert len(wrong.value.problems) == 5


def test_other_tokenizers_are_refused(dense: Dense, tmp_path: Path) -> None:
    base = mutant(dense("llama"), tmp_path / "base")
    other = mutant(dense("llama", 1), tmp_path / "other")
    for model, merges in ((base, ["a b"]), (other, ["b a"])):
        document = {"model": {"vocab": {"a": 0, "b": 1}, "merges": merges}, "version": "1.0"}
        (model.path / "tokenizer.json").write_text(json.dumps(document))
    base, other = mc.Checkpoint.open(base.path), mc.Checkpoint.open(other.path)
    with pytest.raises(UnsupportedError) as caught:
        composed(base, {"o": other})
    assert any("tokenizer.json" in p for p in caught.value.problems)


def test_presets_are_whole() -> None:
    """Every word that a preset uses has a meaning."""
    for shared, with_text, without in PRESETS.values():
        assert shared in SHARED
        assert {with_text, without} <= set(ROUTERS)


def test_loads_in_transformers(dense: Dense, tmp_path: Path) -> None:
    from logits import load

    plan = composed(dense("llama"), {"one": dense("llama", 1)})
    written = mc.write(plan, tmp_path / "moe")
    ids = torch.arange(24).reshape(2, 12)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        found = load(tmp_path / "moe")(input_ids=ids).logits
    assert error([found[:1], found[1:]], run(written, [ids[:1], ids[1:]])) <= 1e-6
