"""Where tensors belong, by name: quantised companions, MTP layers, the Hub's layouts.

pytest tests/architectures/test_parts.py
"""

from __future__ import annotations

import pytest

from moe_compose.architectures import all_architectures
from moe_compose.architectures.parts import Locator, Place, layout_of

PLACES = [
    ("gpt_oss", 24, "model.layers.3.mlp.experts.gate_up_proj_blocks", Place("experts", 3)),
    ("gpt_oss", 24, "model.layers.3.mlp.experts.down_proj_scales", Place("experts", 3)),
    ("gpt_oss", 24, "model.layers.3.mlp.experts.down_proj_bias", Place("experts", 3)),
    ("gpt_oss", 24, "model.layers.3.mlp.router.bias", Place("router", 3)),
    ("gpt_oss", 24, "model.layers.3.self_attn.sinks", Place("attention", 3)),
    (
        "deepseek_v3",
        61,
        "model.layers.6.mlp.experts.12.down_proj.weight_scale_inv",
        Place("experts", 6, 12),
    ),
    (
        "deepseek_v3",
        61,
        "model.layers.6.mlp.shared_experts.up_proj.weight_scale_inv",
        Place("shared experts", 6),
    ),
    ("deepseek_v3", 61, "model.layers.0.mlp.down_proj.weight_scale_inv", Place("dense FFN", 0)),
    ("deepseek_v3", 61, "model.layers.60.mlp.experts.1.up_proj.weight", Place("experts", 60, 1)),
    ("deepseek_v3", 61, "model.layers.61.mlp.experts.1.up_proj.weight", Place("MTP")),
    ("deepseek_v3", 61, "model.layers.62.eh_proj.weight", Place("MTP")),
    ("qwen3_moe", 48, "model.layers.1.mlp.experts.7.up_proj.qweight", Place("experts", 1, 7)),
    ("qwen3_moe", 48, "model.layers.1.mlp.experts.7.up_proj.weight_packed", Place("experts", 1, 7)),
    ("qwen3_moe", 48, "model.layers.1.post_attention_layernorm.weight", Place("norm", 1)),
    ("qwen3_moe", 48, "model.norm.weight", Place("norm")),
    ("qwen3_moe", 48, "norm", Place("other")),  # no module's name, so nothing to go by
    ("qwen3_moe", 48, "model.layers.2.something.norm", Place("other", 2)),
    ("qwen3_next", 48, "mtp.layers.0.mlp.experts.0.up_proj.weight", Place("MTP")),
    ("phimoe", 32, "lm_head.bias", Place("head")),
    (
        "jetmoe",
        24,
        "model.layers.0.self_attention.experts.input_linear.weight",
        Place("experts", 0),
    ),
    ("longcat_flash", 28, "model.layers.2.mlps.1.up_proj.weight", Place("dense FFN", 2)),
    ("deepseek_v4", 43, "layers.5.ffn.experts.3.w1.scale", Place("experts", 5, 3)),
    ("deepseek_v4", 43, "layers.0.ffn.gate.tid2eid", Place("router", 0)),
    ("deepseek_v4", 43, "layers.0.hc_ffn_fn", Place("other", 0)),
    ("deepseek_v4", 43, "mtp.0.ffn.experts.3.w1.weight", Place("MTP")),
    ("deepseek_v4", 43, "embed.weight", Place("embedding")),
    ("deepseek_v4", 43, "head.weight", Place("head")),
    ("kimi_linear", 27, "model.layers.0.mlp.gate_proj.weight", Place("dense FFN", 0)),
    ("ernie4_5_moe", 28, "model.mtp_block.0.mlp.gate_proj.weight", Place("MTP")),
]


@pytest.mark.parametrize(("model_type", "layers", "name", "place"), PLACES)
def test_place(model_type: str, layers: int, name: str, place: Place) -> None:
    form = layout_of(all_architectures()[model_type], [name])
    assert Locator(form, layers).place(name) == place


LAYOUTS = [
    ("qwen3_5_moe_text", "model.layers.0.mlp.experts.3.up_proj.weight", False),
    ("qwen3_5_moe_text", "model.layers.0.mlp.experts.gate_up_proj", True),
    ("qwen3_5_moe_text", "model.language_model.layers.0.mlp.experts.gate_up_proj", True),
    ("deepseek_v4", "layers.0.ffn.experts.3.w2.weight", False),
    ("deepseek_v4", "model.layers.0.ffn.experts.3.w2.weight", False),
]


@pytest.mark.parametrize(("model_type", "name", "stacked"), LAYOUTS)
def test_layout(model_type: str, name: str, stacked: bool) -> None:
    form = layout_of(all_architectures()[model_type], [name, "model.norm.weight"])
    assert form.experts is not None
    assert form.experts.stacked == stacked
    assert name in {n.format(i=0, e=3) for n in form.experts.names}
