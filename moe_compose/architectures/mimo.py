"""MiMo-V2-Flash: DeepSeek-V3's router without a shared expert, hybrid window attention."""

from dataclasses import replace

from moe_compose.architectures.base import Key
from moe_compose.architectures.deepseek import DEEPSEEK_V3, SIGMOID_ROUTING
from moe_compose.architectures.layers import TypeList

MIMO_V2_FLASH = replace(
    DEEPSEEK_V3,
    model_type="mimo_v2_flash",
    twins=(),
    hf_class="MiMoV2FlashForCausalLM",
    shared=None,
    routing=replace(SIGMOID_ROUTING, scale=Key(name="routed_scaling_factor", default=1.0)),
    sparse=TypeList(key=Key(name="mlp_layer_types", default=None), first_dense=1),
    mtp=("model.mtp.",),
    per_layer_rope=True,
    note="published configs list the sparse layers in moe_layer_freq, which transformers ignores",
)
