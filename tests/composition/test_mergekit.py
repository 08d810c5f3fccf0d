"""Configs of mergekit-moe, and its own results, tensor by tensor.

    pytest tests/composition/test_mergekit.py
    MOE_COMPOSE_MERGEKIT=/path/to/venv pytest -m slow tests/composition/test_mergekit.py

With the variable mergekit-moe itself runs; without, digests of what mergekit 0.1.5 (transformers
5.23) wrote for the same sources are compared with. Controls: a config in which two experts change
places; another base.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from dense_models import dense_checkpoint
from mutants import mutant

import moe_compose as mc
from moe_compose.checkpoint.source import TensorSource
from moe_compose.surgery.compose import plan_composition
from moe_compose.surgery.mergekit import MergekitConfig, names_of_models, read_mergekit

STORIES = Path(__file__).parents[2] / "examples/models/stories260K"
VENV = os.environ.get("MOE_COMPOSE_MERGEKIT")

FAMILIES = ("llama", "mistral", "qwen3")

#: SHA-256 over all tensors but routers that mergekit 0.1.5 wrote.
FROZEN = {
    "llama": "bb2ba42d31320192b80a3b2aa85dc9e5aa43e766dfe75a5f48c1b693e6fcb25a",
    "mistral": "5fcf8665fb249cf25cecc0d7c02d6ba94b6fc28121e14510d673a69db5b690cc",
    "qwen3": "46ff2a68ea32128d3e93ede31e41b1a2d0b5b41ccd3f91ad65d0826e138a4754",
}

CONFIG = """\
base_model: {base}
gate_mode: {gate}
experts:
  - source_model: {one}
    positive_prompts: ["Once upon a time there was a dog", "He ran home"]
  - source_model: {two}
    positive_prompts: ["The sun was hot and the big red ball"]
"""

Sources = Callable[[str], Path]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """A folder with base, one, two: weights from integers, the same on every machine."""
    made: dict[str, Path] = {}

    def sources(family: str) -> Path:
        if family not in made:
            root = made[family] = tmp_path_factory.mktemp(family)
            dense_checkpoint(family, root / "first", vocab_size=512)
            first = mc.Checkpoint.open(root / "first")
            for seed, name in enumerate(("base", "one", "two")):
                rng = np.random.default_rng(seed)

                def redraw(
                    tensors: dict[str, torch.Tensor], rng: np.random.Generator = rng
                ) -> None:
                    for key in sorted(tensors):
                        drawn = rng.integers(-128, 128, tuple(tensors[key].shape))
                        tensors[key] = torch.from_numpy(drawn).float() / 512

                mutant(first, root / name, redraw)
                for file in ("tokenizer.json", "tokenizer_config.json"):
                    shutil.copy(STORIES / file, root / name)
        return made[family]

    return sources


def text_of(root: Path, gate: str, order: tuple[str, str] = ("one", "two")) -> str:
    one, two = (root / name for name in order)
    return CONFIG.format(base=root / "base", gate=gate, one=one, two=two)


def composed(config: MergekitConfig) -> mc.Plan:
    donors = {name: mc.Donor.parse(model) for name, model in config.experts.items()}
    options = mc.RoutingOptions(row_scale=1.0)
    base = mc.Checkpoint.open(config.base)
    return mc.compose(base, donors, config.options, dict(config.texts), routing=options)


def as_they_write(source: TensorSource) -> dict[str, torch.Tensor]:
    """All tensors but routers under mergekit's names: experts in one tensor, w1 above w3."""
    found, parts = {}, {}
    for name in source.tensors:
        expert = re.fullmatch(r"(.*layers\.\d+)\..*experts\.(\d+)\.(\w+)\.weight", name)
        if expert:
            parts[expert[1], int(expert[2]), expert[3]] = source.read(name)
        elif not name.endswith("gate.weight"):
            found[name] = source.read(name)
    for layer in {layer for layer, _, _ in parts}:
        count = 1 + max(e for at, e, _ in parts if at == layer)
        gate, up, down = (
            [parts.get((layer, e, ours), parts.get((layer, e, theirs))) for e in range(count)]
            for ours, theirs in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"))
        )
        fused = [torch.cat([g, u]) for g, u in zip(gate, up, strict=True)]
        found[f"{layer}.mlp.experts.gate_up_proj"] = torch.stack(fused)
        found[f"{layer}.mlp.experts.down_proj"] = torch.stack(down)
    return found


def digest(tensors: dict[str, torch.Tensor]) -> str:
    h = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        h.update(f"{name} {value.dtype} {list(value.shape)}\0".encode())
        h.update(value.contiguous().numpy().tobytes())
    return h.hexdigest()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_as_mergekit_wrote(family: str, sources: Sources) -> None:
    root = sources(family)
    plan = composed(read_mergekit(text_of(root, "random")))
    assert digest(as_they_write(plan)) == FROZEN[family]
    turned = composed(read_mergekit(text_of(root, "random", ("two", "one"))))
    assert digest(as_they_write(turned)) != FROZEN[family]


@pytest.mark.slow
@pytest.mark.skipif(not VENV, reason="needs MOE_COMPOSE_MERGEKIT, an environment with mergekit")
@pytest.mark.parametrize("gate", ["random", "hidden"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_as_mergekit_writes(
    family: str, gate: str, sources: Sources, tmp_path: Path
) -> None:
    (tmp_path / "moe.yml").write_text(text_of(sources(family), gate))
    tool = [f"{VENV}/bin/mergekit-moe", str(tmp_path / "moe.yml"), str(tmp_path / "theirs")]
    subprocess.run(tool, check=True, capture_output=True)
    plan = composed(read_mergekit((tmp_path / "moe.yml").read_text()))
    theirs, ours = mc.Checkpoint.open(tmp_path / "theirs"), as_they_write(plan)
    routers = {n for n in theirs.tensors if n.endswith("gate.weight")}
    assert set(theirs.tensors) - routers == set(ours)
    for name, value in ours.items():
        assert torch.equal(theirs.read(name), value), name
    assert digest(ours) == FROZEN[family]
    assert theirs.config["num_experts_per_tok"] == plan.config["num_experts_per_tok"]


def test_hidden_is_the_mean_of_what_routers_are_given(sources: Sources) -> None:
    """Not of the residual stream: rows of length 1 that change with the prompts."""
    root = sources("llama")
    text = text_of(root, "hidden")
    plan = composed(read_mergekit(text))
    other = composed(read_mergekit(text.replace("He ran home", "cat cat cat cat")))
    for layer in range(int(plan.config["num_hidden_layers"])):
        name = f"model.layers.{layer}.block_sparse_moe.gate.weight"
        rows = plan.read(name)
        assert torch.allclose(rows.norm(dim=1), torch.ones(2), atol=1e-5)
        assert not torch.allclose(rows[0], other.read(name)[0], atol=1e-3)


def test_all_that_is_asked_for() -> None:
    config = read_mergekit(
        json.dumps(
            {
                "base_model": "org/seed@v1",
                "gate_mode": "random",
                "dtype": "torch.bfloat16",
                "architecture": "Qwen3",
                "experts_per_token": 1,
                "shared_experts": [],
                "experts": [
                    {"source_model": "org/math@main", "negative_prompts": None},
                    {"source_model": "org/seed+tuned/law/", "noise_scale": 0.0},
                    {"source_model": "other/math"},
                    {"source_model": "here/base"},
                    {"source_model": "7"},
                ],
            }
        )
    )
    assert config.base == "org/seed@v1"
    assert dict(config.experts) == {
        "math": "org/math@main",
        "law": "org/seed+tuned/law/",
        "math-2": "other/math",
        "base-2": "here/base",
        "expert-7": "7",
    }
    assert not config.texts
    wanted = mc.ComposeOptions(
        top_k=1, base_expert=False, shared="base", router="random", router_std=1.0,
        target="qwen3_moe", dtype="bfloat16",
    )  # fmt: skip
    assert config.options == wanted


def test_every_name_can_be_an_experts() -> None:
    from moe_compose.surgery.compose_options import compose_option_problems

    models = ["a:b/c=d", "../x#y", "C:\\models\\law", "/a/b/", "é 7b", "3", "3", "+", "m\x00"]
    names = names_of_models(models)
    options = mc.ComposeOptions(shared="base", router="random")
    assert not list(compose_option_problems(options, names)), names
    assert list(compose_option_problems(options, ["a:b"]))


def test_everything_without_a_counterpart_at_once() -> None:
    text = """\
base_model: a
gate_mode: cheap_embed
dtyp: bfloat16
dtype: int8
shared_experts: [{source_model: s}]
architecture: qwen
experts_per_token: two
experts:
  - source_modell: b
    noise_scale: 0.1
    residual_scale: 0.5
  - source_model: c
    positive_prompts: hello
    negative_prompts: [x]
  - d
"""
    with pytest.raises(mc.OptionError) as caught:
        read_mergekit(text, "moe.yml")
    problems = "\n".join(caught.value.problems)
    for said in (
        "moe.yml:2  gate_mode: 'cheap_embed' has no counterpart: use hidden",
        "moe.yml:3  dtyp: unknown key (did you mean 'dtype'?)",
        "moe.yml:4  dtype: must be float32, bfloat16 or float16 ('int8')",
        "moe.yml:5  shared_experts: has no counterpart here: list them under experts",
        "moe.yml:6  architecture: 'qwen' is no family here",
        "moe.yml:7  experts_per_token: must be a whole number above 0 ('two')",
        "moe.yml:9  experts.0.source_modell: unknown key (did you mean 'source_model'?)",
        "moe.yml:9  experts.0.source_model: must be a folder",
        "moe.yml:10  experts.0.noise_scale: has no counterpart here",
        "moe.yml:11  experts.0.residual_scale: has no counterpart here",
        "moe.yml:13  experts.1.positive_prompts: must be a list of texts",
        "moe.yml:14  experts.1.negative_prompts: has no counterpart here: leave them out; --router",
        "moe.yml:15  experts.2: must be a mapping",
    ):
        assert said in problems
    assert len(caught.value.problems) == 13


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must be a mapping"),
        ("- a", "must be a mapping"),
        ("a: [", "is no YAML"),
        ("a: 1\n---\nb: 2", "is no YAML"),
        ("base_model: !!python/object:os.system x", "is no YAML"),
        ("base_model: a\nexperts: []", "experts: must be a list"),
        ("base_model: a\nexperts: [{source_model: b}]", "experts.0.positive_prompts: hidden needs"),
        ("merge_method: ties\nmodels: []", "unknown key"),
    ],
)
def test_no_config_at_all(text: str, said: str) -> None:
    with pytest.raises(mc.OptionError, match=re.escape(said)):
        read_mergekit(text)


def test_options_that_compose_refuses_are_refused(sources: Sources) -> None:
    text = text_of(sources("llama"), "random") + "experts_per_token: 3\n"
    config = read_mergekit(text)
    with pytest.raises(mc.OptionError, match=r"top_k \(3\)"):
        plan_composition(
            mc.Checkpoint.open(config.base),
            {n: mc.Donor.parse(m) for n, m in config.experts.items()},
            config.options,
        )
