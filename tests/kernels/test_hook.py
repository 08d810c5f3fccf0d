"""The experts implementation of transformers; pytest tests/kernels/test_hook.py.

That it gives eager's logits through Triton is in `test_triton.py`.
"""

import logging

import pytest
import torch
from tiny_models import tiny_model

from moe_compose.errors import MoeComposeError, UnsupportedError
from moe_compose.kernels import ExpertLayout, hook

TOKENS = torch.arange(3, 15)[None]


def experts_of(model: torch.nn.Module) -> torch.nn.Module:
    return next(m for m in model.modules() if hasattr(m, "is_concatenated"))


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("mixtral", ExpertLayout(alpha=1.0)),
        ("gemma4_text", ExpertLayout(alpha=1.0, activation="gelu_tanh")),
        ("nemotron_h", ExpertLayout(alpha=1.0, activation="relu2", gated=False)),
        ("aria_text", ExpertLayout(alpha=1.0, transposed=True)),
        (
            "gpt_oss",
            ExpertLayout(activation="clamped_swiglu", limit=7.0, interleaved=True, transposed=True),
        ),
    ],
)
def test_layouts_are_recognised(family, layout):
    assert hook.layout_of(experts_of(tiny_model(family))) == layout


def test_what_no_layout_computes_falls_back_and_says_so(caplog):
    model = tiny_model("mixtral")
    name = hook.register()
    hook._say.cache_clear()
    for module in model.modules():
        if hasattr(module, "is_concatenated"):
            module.act_fn = torch.nn.Tanh()
    with torch.no_grad(), caplog.at_level(logging.INFO, logger="moe_compose"):
        model.set_experts_implementation("eager")
        eager = model(TOKENS).logits
        model.set_experts_implementation(name)
        torch.testing.assert_close(model(TOKENS).logits, eager)
    assert len(caplog.messages) == 1
    assert "what its _apply_gate computes is none of the known activations" in caplog.text


def test_gradients_fall_back_and_flow():
    model = tiny_model("qwen3_moe")
    model.set_experts_implementation(hook.register())
    model(TOKENS).logits.sum().backward()
    assert experts_of(model).down_proj.grad.abs().sum() > 0


def test_a_norm_behind_each_expert_is_unsupported():
    module = experts_of(tiny_model("mixtral"))
    module.has_post_expert_norm = True
    with pytest.raises(UnsupportedError, match="a norm follows each expert"):
        hook.layout_of(module)


def test_triton_when_asked_for_is_triton_or_an_error():
    model = tiny_model("mixtral", dtype=torch.float64)
    model.set_experts_implementation(hook.register(implementation="triton"))
    with torch.no_grad(), pytest.raises(MoeComposeError, match="Triton cannot run this layer"):
        model(TOKENS)
    hook.register()
