"""Every pair of families on trained-like weights: the MoE gives the dense model's logits.

    pytest tests/surgery/test_pairs.py

transformers loads and runs both. The pairs are listed here as well as in the registry, so that none
comes or goes unseen; the last tests break a result on purpose, and the same comparison must notice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_models import (
    STATED,
    dense_checkpoint,
    in_old_dialect,
    read_config,
    without_defaults,
    write_config,
)
from logits import Comparison, compare, load, logits
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_compose.architectures import Architecture, Twin, all_architectures
from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.checkpoint.writer import write
from moe_compose.errors import UnsupportedError
from moe_compose.surgery.plan import Plan
from moe_compose.surgery.upcycle import upcycle
from moe_compose.surgery.upcycle_options import UpcycleOptions

#: Mean KL to the source that an exact pair stays under, in nats per token.
KL = 1e-9


@dataclass(frozen=True)
class Pair:
    """A dense family, an MoE family, and what the source's config needs for the two to fit.

    Attributes:
        dense: `model_type` of the source.
        target: `model_type` of the result.
        changes: entries of the source's config, on top of those of `dense_models`.
    """

    dense: str
    target: str
    changes: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.dense}-{self.target}"

    @property
    def form(self) -> Architecture:
        return all_architectures()[self.target]

    @property
    def twin(self) -> Twin:
        twin = self.form.twin_of(self.dense)
        assert twin is not None
        return twin


def rope(**more: Any) -> dict[str, Any]:
    """A source's `rope_parameters`."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0, **more}}


PARTIAL = {**rope(partial_rotary_factor=0.5), "sliding_window": None}
MIXED_WINDOWS = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}

PAIRS = (
    Pair("llama", "mixtral", {"head_dim": 12}),
    Pair("mistral", "mixtral"),
    Pair("phi3", "mixtral"),
    Pair("qwen3", "qwen3_moe"),
    Pair("qwen2", "qwen2_moe"),
    Pair("llama", "qwen2_moe"),
    Pair("olmo2", "flex_olmo"),
    Pair("granite", "granitemoe"),
    Pair("qwen2", "granitemoe"),
    Pair("granite", "granitemoeshared"),
    Pair("granitemoehybrid", "granitemoehybrid"),
    Pair("youtu", "deepseek_v3"),
    Pair("llama", "glm4_moe", {"head_dim": 12}),
    Pair("qwen2", "glm4_moe"),
    Pair("qwen3", "glm4_moe"),
    Pair("seed_oss", "glm4_moe"),
    Pair("phi3", "glm4_moe", PARTIAL),
    Pair("qwen3", "dots1"),
    Pair("llama", "solar_open", {"head_dim": 12}),
    Pair("ernie4_5", "ernie4_5_moe"),
    Pair("llama", "ernie4_5_moe", {"head_dim": 12}),
    Pair("hunyuan_v1_dense", "hunyuan_v1_moe"),
    Pair("qwen3_5_text", "qwen3_5_moe_text"),
    Pair("qwen3", "mellum", MIXED_WINDOWS),
    Pair("lfm2", "lfm2_moe"),
    Pair("cohere2", "cohere2_moe"),
    Pair("gemma4_text", "gemma4_text"),
)
COPIED = tuple(p for p in PAIRS if not p.form.parallel_mlp)
SHARED = tuple(p for p in PAIRS if p.form.shared or p.form.parallel_mlp)
HAS_DENSE_LAYERS = tuple(
    p for p in COPIED if p.form.mlp and not p.form.sparse.refusal((False, True, True))
)
ONE_ROPE = tuple(p for p in PAIRS if p.dense != "gemma4_text")
#: Families whose attention may have biases, into families that have the same ones.
BIASED = tuple(
    p
    for p in PAIRS
    if "attention_bias" in all_architectures()[p.dense].facts
    and all(r.key.name != "attention_bias" for r in p.twin.requires)
)

SCALED_ROPE: dict[str, dict[str, Any]] = {
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
}
#: Phi-3's: so many factors as it rotates pairs; the sequence is longer than the original context.
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 1.8, 2.1, 2.4],
}

each = pytest.mark.parametrize("pair", PAIRS, ids=str)
each_copied = pytest.mark.parametrize("pair", COPIED, ids=str)


def options(pair: Pair, **changes: Any) -> UpcycleOptions:
    """Four experts of which two are chosen, by the method that is exact for the pair."""
    method = "shared" if pair.form.parallel_mlp else "copy"
    given = {"num_experts": 4, "top_k": 2, "method": method, "target": pair.target, **changes}
    return UpcycleOptions(**given)


def grown(
    pair: Pair,
    tmp_path: Path,
    rewrite: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    silent: bool = False,
    source: Mapping[str, Any] | None = None,
    **changes: Any,
) -> tuple[Comparison, Plan]:
    """Build the source, upcycle, write, load, and compare with the source as it was built.

    Args:
        pair: which families.
        tmp_path: gets a folder `dense` and a folder `moe`.
        rewrite: applied to the source's `config.json`.
        silent: the source has its class's defaults.
        source: entries of the source's config on top of the pair's.
        changes: options of the upcycle.
    """
    entries = {} if silent else {**pair.changes, **(source or {})}
    model = dense_checkpoint(pair.dense, tmp_path / "dense", silent, **entries)
    expected = logits(model)
    if rewrite is not None:
        write_config(tmp_path / "dense", rewrite(read_config(tmp_path / "dense")))
        assert torch.equal(logits(load(tmp_path / "dense")), expected)
    plan = upcycle(Checkpoint.open(tmp_path / "dense"), options(pair, **changes))
    write(plan, tmp_path / "moe")
    return compare(expected, logits(load(tmp_path / "moe"))), plan


def assert_exact(found: tuple[Comparison, Plan]) -> None:
    comparison, plan = found
    assert plan.preservation.kind == "exact"
    assert comparison.relative <= plan.preservation.tolerance
    assert comparison.kl <= KL


def test_every_pair_is_listed() -> None:
    registered = {(t.dense, a.model_type) for a in all_architectures().values() for t in a.twins}
    assert {(p.dense, p.target) for p in PAIRS} == registered


def test_only_these_pairs_are_held_to_less_than_the_rest() -> None:
    loose = {
        (t.dense, a.model_type): t.accuracy
        for a in all_architectures().values()
        for t in a.twins
        if t.accuracy != 1e-6
    }
    assert loose == {("lfm2", "lfm2_moe"): 3e-6, ("gemma4_text", "gemma4_text"): 1e-4}


@each
def test_copy(pair: Pair, tmp_path: Path) -> None:
    assert_exact(grown(pair, tmp_path))


@pytest.mark.parametrize("pair", ONE_ROPE, ids=str)
def test_old_dialect(pair: Pair, tmp_path: Path) -> None:
    assert_exact(grown(pair, tmp_path, in_old_dialect))


@each
def test_silent_config(pair: Pair, tmp_path: Path) -> None:
    assert_exact(grown(pair, tmp_path, without_defaults, silent=True))


@pytest.mark.parametrize("pair", SHARED, ids=str)
def test_shared(pair: Pair, tmp_path: Path) -> None:
    assert_exact(grown(pair, tmp_path, method="shared"))


@each_copied
def test_granular(pair: Pair, tmp_path: Path) -> None:
    """G = 2: eight experts of half the width, of which two whole virtual groups are chosen."""
    asked = {"method": "granular", "granularity": 2, "num_experts": 8, "top_k": 4}
    assert_exact(grown(pair, tmp_path, **asked))


@pytest.mark.parametrize("pair", HAS_DENSE_LAYERS, ids=str)
def test_some_layers_stay_dense(pair: Pair, tmp_path: Path) -> None:
    found = grown(pair, tmp_path, layers="1,2")
    assert_exact(found)
    assert found[1].summary().parameters.by_part["dense FFN"] > 0


@pytest.mark.parametrize(
    "pair", [p for p in PAIRS if p.dense not in ("youtu", "gemma4_text")], ids=str
)
def test_tied_embeddings(pair: Pair, tmp_path: Path) -> None:
    assert_exact(grown(pair, tmp_path, source={"tie_word_embeddings": True}))


@pytest.mark.parametrize("pair", BIASED, ids=str)
def test_attention_biases(pair: Pair, tmp_path: Path) -> None:
    assert_exact(grown(pair, tmp_path, source={"attention_bias": True}))


@pytest.mark.parametrize("kind", SCALED_ROPE)
@pytest.mark.parametrize("pair", [p for p in ONE_ROPE if p.dense != "phi3"], ids=str)
def test_scaled_rope(pair: Pair, kind: str, tmp_path: Path) -> None:
    more = dict(SCALED_ROPE[kind])
    if pair.dense == "qwen3_5_text":
        more["partial_rotary_factor"] = 0.5
    rewrite = in_old_dialect if kind == "yarn" else None
    assert_exact(grown(pair, tmp_path, rewrite, source=rope(**more)))


@pytest.mark.parametrize("old", [False, True], ids=["new-dialect", "old-dialect"])
@pytest.mark.parametrize("pair", [p for p in PAIRS if p.dense == "phi3"], ids=str)
def test_longrope(pair: Pair, old: bool, tmp_path: Path) -> None:
    more: dict[str, Any] = dict(LONGROPE)
    if pair.target == "glm4_moe":
        more |= {"partial_rotary_factor": 0.5}
        more |= {k: LONGROPE[k][:2] for k in ("short_factor", "long_factor")}
    source = {**rope(**more), "original_max_position_embeddings": 16}
    assert_exact(grown(pair, tmp_path, in_old_dialect if old else None, source=source))


@pytest.mark.parametrize("old", [False, True], ids=["new-dialect", "old-dialect"])
def test_hunyuans_alpha(old: bool, tmp_path: Path) -> None:
    """Its checkpoints stretch rope by an entry of their own."""
    pair = Pair("hunyuan_v1_dense", "hunyuan_v1_moe")
    source = rope(rope_type="dynamic", alpha=1000.0, factor=1.0)
    assert_exact(grown(pair, tmp_path, in_old_dialect if old else None, source=source))


def test_windows_by_a_first_layer(tmp_path: Path) -> None:
    """Published Qwen3 configs have `max_window_layers` and no list of layer types."""

    def rewrite(config: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in config.items() if k != "layer_types"}

    found = grown(Pair("qwen3", "mellum", MIXED_WINDOWS), tmp_path, rewrite)
    assert_exact(found)
    assert found[1].config["layer_types"] == ["full_attention", *["sliding_attention"] * 2]


def test_lfm2_as_its_makers_publish_it(tmp_path: Path) -> None:
    """Width, attention layers and tying under names that only the class's `__init__` knows."""

    def rewrite(config: dict[str, Any]) -> dict[str, Any]:
        renamed = {
            "block_ff_dim": config.pop("intermediate_size"),
            "tie_embedding": config.pop("tie_word_embeddings"),
        }
        del config["layer_types"]
        return config | renamed | {"full_attn_idxs": [1]}

    assert_exact(grown(Pair("lfm2", "lfm2_moe"), tmp_path, rewrite))


def test_a_weak_ffn_is_where_gemmas_second_norm_shows(tmp_path: Path) -> None:
    """The reason for the pair's tolerance: epsilon counts against a small FFN output."""
    pair = Pair("gemma4_text", "gemma4_text")
    model = dense_checkpoint("gemma4_text", tmp_path / "dense")
    edit_tensors(tmp_path / "dense", lambda t: scale(t, "mlp.down_proj", 0.05))
    expected = logits(load(tmp_path / "dense"))
    assert compare(logits(model), expected).relative > 1e-6
    write(upcycle(Checkpoint.open(tmp_path / "dense"), options(pair)), tmp_path / "moe")
    assert 1e-6 < compare(expected, logits(load(tmp_path / "moe"))).relative < 1e-4


def test_a_kept_ffn_refuses_copies(tmp_path: Path) -> None:
    pair = Pair("gemma4_text", "gemma4_text")
    with pytest.raises(UnsupportedError, match="would add it twice"):
        grown(pair, tmp_path, method="copy")


@pytest.mark.parametrize(
    "pair", [p for p in PAIRS if p.target in ("mixtral", "qwen3_moe")], ids=str
)
def test_bf16_is_bitwise_with_a_router_of_zeros(pair: Pair, tmp_path: Path) -> None:
    """Two equal weights are 0.5 each, and halves add up without rounding."""
    model = dense_checkpoint(pair.dense, tmp_path / "dense", **pair.changes).bfloat16()
    model.save_pretrained(tmp_path / "dense")
    dense = load(tmp_path / "dense", torch.bfloat16)
    plan = upcycle(Checkpoint.open(tmp_path / "dense"), options(pair, router_init="zeros"))
    write(plan, tmp_path / "moe")
    assert torch.equal(logits(load(tmp_path / "moe", torch.bfloat16)), logits(dense))


def test_every_default_target_is_the_most_portable() -> None:
    forms = all_architectures().values()
    first = {}
    for form in forms:
        for twin in form.twins:
            first.setdefault(twin.dense, form.model_type)
    assert first == {
        "llama": "mixtral",
        "mistral": "mixtral",
        "phi3": "mixtral",
        "qwen2": "qwen2_moe",
        "qwen3": "qwen3_moe",
        "qwen3_5_text": "qwen3_5_moe_text",
        "olmo2": "flex_olmo",
        "granite": "granitemoe",
        "granitemoehybrid": "granitemoehybrid",
        "seed_oss": "glm4_moe",
        "youtu": "deepseek_v3",
        "ernie4_5": "ernie4_5_moe",
        "hunyuan_v1_dense": "hunyuan_v1_moe",
        "cohere2": "cohere2_moe",
        "lfm2": "lfm2_moe",
        "gemma4_text": "gemma4_text",
    }


@pytest.mark.parametrize("dense", STATED)
def test_the_sources_look_trained(dense: str, tmp_path: Path) -> None:
    """Without its FFNs each source gives quite other logits, or comparing would prove little."""
    expected = logits(dense_checkpoint(dense, tmp_path / "dense"))
    down = "output_linear" if dense == "granitemoehybrid" else "mlp.down_proj"
    down = "feed_forward.w2" if dense == "lfm2" else down
    edit_tensors(tmp_path / "dense", lambda t: scale(t, down, 0.0))
    assert compare(expected, logits(load(tmp_path / "dense"))).relative > 0.2


# What must not pass for exact.

MIXTRAL = Pair("llama", "mixtral")
GRANULAR = {"method": "granular", "granularity": 2, "num_experts": 8, "top_k": 4}


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change tensors of a single-file checkpoint in place."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(tensors)
    save_file({k: v.clone() for k, v in tensors.items()}, file, {"format": "pt"})


def scale(tensors: dict[str, Tensor], part: str, factor: float) -> None:
    """Multiply the tensors whose name holds `part`."""
    for name in tensors:
        if part in name:
            tensors[name] = tensors[name] * factor


def tie_rows_by_shard(tensors: dict[str, Tensor]) -> None:
    """Equal router rows for equal shards instead of equal replicas: `row(n) = proto[n % G]`."""
    for name, rows in tensors.items():
        if name.endswith("block_sparse_moe.gate.weight"):
            tensors[name] = rows[::4].repeat(4, 1)


def cube_root_on_all_three(tensors: dict[str, Tensor]) -> None:
    """`2^(1/3)` on gate, up and down instead of `√2` on up and down; the product is the same."""
    scale(tensors, ".w1.", 2 ** (1 / 3))
    scale(tensors, ".w2.", 2 ** (1 / 3 - 1 / 2))
    scale(tensors, ".w3.", 2 ** (1 / 3 - 1 / 2))


def swap_two_downs(tensors: dict[str, Tensor]) -> None:
    """Experts 0 and 1 of the middle layer, shards of one replica, with each other's down."""
    a, b = (f"model.layers.1.block_sparse_moe.experts.{e}.w2.weight" for e in (0, 1))
    tensors[a], tensors[b] = tensors[b], tensors[a]


@pytest.mark.parametrize(
    ("asked", "change"),
    [
        pytest.param({}, lambda t: scale(t, ".w1.", 1.01), id="scaled-gate"),
        pytest.param(GRANULAR, tie_rows_by_shard, id="rows-tied-by-shard"),
        pytest.param(GRANULAR, cube_root_on_all_three, id="cube-root-scaling"),
        pytest.param(GRANULAR, swap_two_downs, id="two-downs-swapped"),
        pytest.param({}, lambda t: scale(t, ".1.w2.", 1.01), id="one-expert-scaled"),
    ],
)
def test_broken_weights_are_noticed(
    asked: dict[str, Any], change: Callable[[dict[str, Tensor]], object], tmp_path: Path
) -> None:
    found = grown(MIXTRAL, tmp_path, **asked)
    assert_exact(found)
    edit_tensors(tmp_path / "moe", change)
    broken = compare(logits(load(tmp_path / "dense")), logits(load(tmp_path / "moe")))
    assert broken.relative > 1e-3
    assert broken.kl > 1e-6


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 10000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        {"rms_norm_eps": 1e-5},
        {"sliding_window": 9},
    ],
    ids=["rope-theta", "epsilon", "window"],
)
def test_a_broken_config_is_noticed(change: dict[str, Any], tmp_path: Path) -> None:
    found = grown(MIXTRAL, tmp_path)
    assert_exact(found)
    write_config(tmp_path / "moe", read_config(tmp_path / "moe") | change)
    broken = compare(logits(load(tmp_path / "dense")), logits(load(tmp_path / "moe")))
    assert broken.relative > 1e-4
    assert broken.kl > 1e-8
