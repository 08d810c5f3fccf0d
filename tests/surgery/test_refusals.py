"""What upcycling refuses, and that it says why: facts without a home, families that differ.

    pytest tests/surgery/test_refusals.py

No weights are read: a refusal comes before that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import dense_llama
from dense_models import dense_config
from mutants import mutant
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from moe_compose.architectures import all_architectures
from moe_compose.architectures.refused import NO_PAIR, NO_SOURCE, NO_TARGET
from moe_compose.architectures.twin import Require
from moe_compose.checkpoint.source import Extent, TensorInfo
from moe_compose.errors import CheckpointError, UnsupportedError
from moe_compose.surgery.pairing import choose_target, dense_form, stated_config
from moe_compose.surgery.upcycle import upcycle
from moe_compose.surgery.upcycle_options import UpcycleOptions


@dataclass(frozen=True)
class ConfigOnly:
    """A tensor source that has a config and would fail if asked for anything else."""

    config: Mapping[str, Any]
    label: str = "config only"
    tensors: Mapping[str, TensorInfo] = None  # type: ignore[assignment]
    files: Mapping[str, Path] = None  # type: ignore[assignment]

    def digest(self) -> str:
        raise AssertionError("not to be asked")

    def extents(self, name: str) -> tuple[Extent, ...] | None:
        raise AssertionError("not to be asked")

    def stream(self, name: str) -> Iterator[torch.Tensor]:
        raise AssertionError("not to be asked")

    def read(self, name: str) -> torch.Tensor:
        raise AssertionError("not to be asked")


def refusal(config: Mapping[str, Any], **options: Any) -> str:
    """What upcycling a checkpoint with this config is refused with."""
    given = {"num_experts": 4, "top_k": 2, **options}
    with pytest.raises(UnsupportedError) as raised:
        upcycle(ConfigOnly(config), UpcycleOptions(**given))
    return str(raised.value)


def config_of(dense: str, **changes: Any) -> dict[str, Any]:
    """A small, proper config of a dense family, with changes made to the JSON."""
    found: dict[str, Any] = dense_config(dense).to_dict() | changes
    return found


#: The entry a requirement is about → changes of a config that break it.
BREAKS: dict[str, tuple[dict[str, Any], ...]] = {
    "attention_bias": ({"attention_bias": True},),
    "attention_out_bias": ({"attention_out_bias": True},),
    "mlp_bias": ({"mlp_bias": True},),
    "use_bias": ({"use_bias": True},),
    "partial_rotary_factor": (
        {"rope_parameters": None, "partial_rotary_factor": 0.5},
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}},
    ),
    "rope_type": (
        {"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}},
        {"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 2.0}},
    ),
    "use_sliding_window": ({"use_sliding_window": True},),
    "sliding_window": ({"sliding_window": 9},),
    "layer_types": ({"layer_types": ["full_attention", "sliding_attention", "full_attention"]},),
    "num_attention_heads * head_dim / hidden_size": ({"head_dim": 12},),
    "use_double_wide_mlp": ({"use_double_wide_mlp": True},),
}

REQUIREMENTS = [
    pytest.param(t.dense, a.model_type, r, edit, id=f"{t.dense}-{a.model_type}-{r.key.name}-{n}")
    for a in all_architectures().values()
    for t in a.twins
    for r in t.requires
    for n, edit in enumerate(BREAKS[r.key.name])
]


@pytest.mark.parametrize(("dense", "target", "require", "edit"), REQUIREMENTS)
def test_a_fact_without_a_home(
    dense: str, target: str, require: Require, edit: dict[str, Any]
) -> None:
    method = "shared" if all_architectures()[target].parallel_mlp else "copy"
    said = refusal(config_of(dense, **edit), target=target, method=method)
    assert f"{dense} → {target} is not exact for this checkpoint" in said
    assert require.key.name in said
    assert require.reason in said


def test_all_facts_are_named_at_once() -> None:
    said = refusal(config_of("llama", attention_bias=True, mlp_bias=True))
    assert "attention_bias (True)" in said
    assert "mlp_bias (True)" in said


def test_targets_that_fit_are_named() -> None:
    windowed = config_of("qwen3", use_sliding_window=True)
    assert "Exact for it: --target mellum." in refusal(windowed, target="qwen3_moe")
    said = refusal(config_of("phi3", **PARTIAL), target="mixtral")
    assert "Exact for it: --target glm4_moe." in said


PARTIAL = {
    "sliding_window": None,
    "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
}


def chosen(config: Mapping[str, Any], **options: Any) -> str:
    dense = dense_form(config)
    form, _ = choose_target(stated_config(config, dense), dense, UpcycleOptions(**options))
    return form.model_type


def test_without_a_target_the_first_that_fits_is_taken() -> None:
    assert chosen(config_of("qwen3")) == "qwen3_moe"
    assert chosen(config_of("qwen3", use_sliding_window=True)) == "mellum"
    assert chosen(config_of("phi3", sliding_window=None)) == "mixtral"
    assert chosen(config_of("phi3", **PARTIAL)) == "glm4_moe"
    assert chosen(config_of("llama")) == "mixtral"
    assert chosen(config_of("llama"), method="shared") == "qwen2_moe"


def test_rope_per_layer_type_into_a_family_with_one() -> None:
    kinds = {k: {"rope_theta": 1e4} for k in ("full_attention", "sliding_attention")}
    said = refusal(config_of("qwen3", rope_parameters=kinds))
    assert "rope_parameters per layer type have no home" in said
    assert "No target of qwen3 has a home for all of this checkpoint." in said


def test_a_window_that_covers_the_context_is_none() -> None:
    """Phi-4-mini states one of 262144 tokens for a context of 131072."""
    config = config_of("phi3", sliding_window=128, max_position_embeddings=128)
    assert chosen(config, target="glm4_moe") == "glm4_moe"


@pytest.mark.parametrize("dense", NO_TARGET)
def test_a_family_without_a_target(dense: str) -> None:
    said = refusal({"model_type": dense})
    assert f"no MoE family computes what a dense '{dense}' computes: {NO_TARGET[dense]}" in said
    assert "Dense families with an exact target: cohere2" in said


def test_an_unknown_family() -> None:
    assert "no pair is known for it" in refusal({"model_type": "nonesuch"})


@pytest.mark.parametrize("config", [{"model_type": "mixtral"}, {"model_type": "qwen3_moe"}])
def test_experts_already(config: dict[str, Any]) -> None:
    assert "is a mixture of experts already" in refusal(config)


def test_experts_already_in_a_family_that_may_have_none() -> None:
    config = config_of("granitemoehybrid", num_local_experts=4)
    assert "is a mixture of experts already" in refusal(config)


@pytest.mark.parametrize(("dense", "target"), NO_PAIR, ids="-".join)
def test_a_pair_that_differs(dense: str, target: str) -> None:
    said = refusal(config_of(dense), target=target)
    assert f"{dense} → {target} is not exact: {NO_PAIR[dense, target]}" in said
    assert f"Exact targets of {dense}: " in said


@pytest.mark.parametrize("target", NO_SOURCE)
def test_a_target_that_nothing_grows_into(target: str) -> None:
    assert NO_SOURCE[target] in refusal(config_of("llama"), target=target)


def test_any_other_pair() -> None:
    said = refusal(config_of("llama"), target="nonesuch")
    assert "llama → nonesuch is not exact: the two compute different things" in said


def test_what_is_refused_is_known_and_not_also_allowed() -> None:
    forms = all_architectures()
    pairs = {(t.dense, a.model_type) for a in forms.values() for t in a.twins}
    dense = {d for d, _ in pairs}
    assert set(NO_TARGET) <= set(CONFIG_MAPPING_NAMES)
    assert not set(NO_TARGET) & dense
    assert set(NO_SOURCE) <= set(forms)
    assert not set(NO_SOURCE) & {m for _, m in pairs}
    assert not set(NO_PAIR) & pairs
    assert {d for d, _ in NO_PAIR} <= dense
    assert {m for _, m in NO_PAIR} <= set(forms)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 10**12}, "num_hidden_layers must be a whole number up to 10000"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers must be a whole number"),
        ({"hidden_size": -1}, "hidden_size must be a whole number"),
        ({"rope_parameters": "default"}, "rope_parameters must be an object"),
        ({"rope_scaling": [4.0]}, "rope_scaling must be an object"),
        ({"model_type": None}, "must name its family in model_type"),
    ],
)
def test_nonsense_in_a_config(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    """At once, and without filling the memory."""
    source = dense_llama(tmp_path / "dense")
    broken = mutant(source, tmp_path / "broken", config=lambda c: c.update(changes))
    with pytest.raises(CheckpointError, match=says):
        upcycle(broken, UpcycleOptions())


def test_tensors_of_another_width_than_the_config_says(tmp_path: Path) -> None:
    source = dense_llama(tmp_path / "dense")
    wide = mutant(source, tmp_path / "m", config=lambda c: c.update(intermediate_size=96))
    with pytest.raises(CheckpointError, match=r"shape \[64, 32\], its config.json says \[96, 32\]"):
        upcycle(wide, UpcycleOptions())
