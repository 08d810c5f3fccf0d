"""Every MoE form against transformers: what a tiny random model is, once saved, the form says.

    pytest tests/architectures/test_contract.py

Names and shapes on disk, parameter counts, defaults of config entries, the class, and the routing.
The last tests break a form on purpose, and the same checks must find that out.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tiny_models import TINY, UNBUILDABLE, tiny_checkpoint
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from moe_compose.architectures import Architecture, all_architectures, find
from moe_compose.architectures.base import REQUIRED, Key, RouterTensor
from moe_compose.architectures.common import QWEN_EXPERTS
from moe_compose.architectures.deepseek import DEEPSEEK_ROUTER
from moe_compose.architectures.layers import Blocks, FirstDense
from moe_compose.architectures.parts import Locator, count_parameters, layout_of
from moe_compose.checkpoint.source import TensorInfo
from moe_compose.routing import route

FAMILIES = [name for name, form in all_architectures().items() if form.is_moe]

#: Tensors that transformers writes and nothing ever reads: matrices of LongCat's identity experts.
UNUSED = {"longcat_flash": re.compile(r"mlp\.experts\.[67]\.(gate|up)_proj\.weight$")}

#: Parameters of an expert beside its matrices: gpt-oss's biases, JetMoE's share of attention.
MORE_PER_EXPERT: dict[str, Callable[[dict[str, Any]], int]] = {
    "gpt_oss": lambda c: 2 * c["intermediate_size"] + c["hidden_size"],
    "jetmoe": lambda c: 2 * c["hidden_size"] * c["num_key_value_heads"] * c["kv_channels"],
}

#: Defaults of entries that are no field of the config class: it ignores them, or only sees them as
#: arguments of its constructor. One for all families, or by family.
NO_FIELD: dict[str, dict[str, Any]] = {
    "moe_layer_freq": dict.fromkeys(all_architectures(), 1),
    "first_k_dense_replace": {"axk1": 1, "kimi_linear": 1, "cohere2_moe": 0},
}

#: Fields that are None in the class, and what that comes to.
NONE_MEANS: dict[str, Any] = {
    "n_group": 1,
    "topk_group": 1,
    "mlp_only_layers": (),
    "num_experts": 0,
    "top_k_experts": 0,
    "moe_intermediate_size": 0,
}


@dataclass(frozen=True)
class Saved:
    """A tiny model and what it became on disk."""

    model: PreTrainedModel
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]


def read_header(folder: Path) -> dict[str, TensorInfo]:
    """Name → dtype and shape, by safetensors' own reader."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as f:
            for name in f.keys():  # noqa: SIM118
                part = f.get_slice(name)
                found[name] = TensorInfo.of(name, part.get_dtype(), tuple(part.get_shape()))
    return found


def save(model_type: str, folder: Path, **changes: Any) -> Saved:
    """Build, save, and read back."""
    model = tiny_checkpoint(model_type, folder, **changes)
    config = json.loads((folder / "config.json").read_text())
    unused = UNUSED.get(model_type)
    tensors = {n: t for n, t in read_header(folder).items() if not (unused and unused.search(n))}
    return Saved(model, config, tensors)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """`saved("mixtral")`: built once per family."""
    made: dict[str, Saved] = {}

    def get(model_type: str) -> Saved:
        if model_type in UNBUILDABLE:
            pytest.skip(UNBUILDABLE[model_type])
        if model_type not in made:
            made[model_type] = save(model_type, tmp_path_factory.mktemp(model_type))
        return made[model_type]

    return get


def dense_layers(form: Architecture, config: Mapping[str, Any]) -> list[int]:
    """Layers in which the form promises its dense FFN."""
    sparse = form.moe(config).sparse
    if isinstance(form.sparse, Blocks):
        blocks = form.sparse.key.get(config)
        return [i for i, block in enumerate(blocks) if block in ("mlp", "-")]
    return [i for i, s in enumerate(sparse) if form.parallel_mlp or not s]


def promised(form: Architecture, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name → shape of every FFN tensor that the form promises under this config."""
    moe = form.moe(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in moe.sparse_layers:
        shapes |= form.moe_shapes(config, layer)
    for layer in dense_layers(form, config):
        assert form.mlp is not None, f"layer {layer} is dense and the form has no dense FFN"
        dense = form.mlp.shapes(form.width.integer(config), moe.hidden)
        shapes |= {name.format(i=layer): shape for name, shape in dense.items()}
    return shapes


def faults(form: Architecture, saved: Saved) -> Iterator[str]:
    """What disk and form disagree about."""
    form = layout_of(form, saved.tensors)
    shapes = promised(form, saved.config)
    for name, shape in shapes.items():
        if name not in saved.tensors:
            yield f"{name} is missing"
        elif saved.tensors[name].shape != shape:
            yield f"{name} is {saved.tensors[name].shape}, not {shape}"
    moe = form.moe(saved.config)
    layers = form.layers.integer(saved.config)
    spare = [t.name for t in form.router if t.optional or t.kind == "other"] + list(form.parts)
    allowed = {t.format(i=i) for t in spare for i in range(layers)}
    locator = Locator(form, layers)
    for name in saved.tensors:
        place = locator.place(name)
        if place.kind in ("router", "experts", "shared experts", "dense FFN"):
            if name not in shapes and name not in allowed:
                yield f"{name} is not promised, but located as {place.kind}"
            if f".{place.layer}." not in name or not 0 <= (place.expert or 0) < moe.num_experts:
                yield f"{name} is located at layer {place.layer}, expert {place.expert}"
        elif place.kind == "other" and re.search(
            r"\.(mlps?|ffn|feed_forward|moe|block_sparse_moe|mixer|experts|router)\.", name
        ):
            yield f"{name} belongs nowhere"
        elif re.search(r"\.experts\.", name) and name not in allowed:
            yield f"{name} is located as {place.kind}"


def experts_in_memory(model: PreTrainedModel) -> dict[int, tuple[int, int]]:
    """Layer → (E, F), from the model's modules alone."""
    config = model.config
    found = {}
    for name, p in model.named_parameters():
        if re.search(r"experts\.down_proj$|experts\.mlp\.w2$|\bmlp\.output_linear\.weight$", name):
            layer = re.search(r"\.(\d+)\.", name)
            assert layer
            count = p.shape[0] if p.ndim == 3 else config.ffn_config.moe_num_experts
            latent = getattr(config, "moe_latent_size", None) or config.hidden_size
            found[int(layer[1])] = (count, p.numel() // count // latent)
    return found


def keys_of(node: Any) -> Iterator[Key]:
    """Every `Key` in a form, at any depth; dense twins and other layouts left out."""
    if isinstance(node, Key):
        yield node
    elif isinstance(node, tuple):
        for item in node:
            yield from keys_of(item)
    elif is_dataclass(node):
        for f in fields(node):
            if f.name not in ("twins", "facts", "layouts"):
                yield from keys_of(getattr(node, f.name))


def class_default(model_type: str, name: str) -> Any:
    """What the config class assumes; `MISSING` where it knows nothing of the entry."""
    config = AutoConfig.for_model(model_type)
    node: Any = config
    *path, last = name.split(".")
    for step in path:
        node = getattr(node, step)
    own = type(node).__dataclass_fields__.get(last)
    return own.default if own is not None else getattr(node, last, MISSING)


BUILT = [f for f in FAMILIES if f in TINY]


def test_every_family_has_a_tiny_model() -> None:
    # transformers loads kimi_k2 with code from the Hub only; it is deepseek_v3 by another name.
    assert set(FAMILIES) - set(TINY) == {"kimi_k2"}


@pytest.mark.parametrize("model_type", BUILT)
def test_disk_is_what_the_form_says(model_type: str, saved: Callable[[str], Saved]) -> None:
    assert list(faults(all_architectures()[model_type], saved(model_type))) == []


@pytest.mark.parametrize("model_type", BUILT)
def test_config_is_read_as_the_model_reads_it(
    model_type: str, saved: Callable[[str], Saved]
) -> None:
    s = saved(model_type)
    form = find(s.config)
    assert form is all_architectures()[model_type]
    assert s.config["architectures"] == [form.hf_class]
    moe = form.moe(s.config)
    assert experts_in_memory(s.model) == dict.fromkeys(
        moe.sparse_layers, (moe.num_experts, moe.expert_width)
    )
    picks = {m.top_k for m in s.model.modules() if isinstance(getattr(m, "top_k", None), int)}
    assert (picks or {s.model.config.top_k_experts}) == {moe.top_k}
    rope = s.config.get("rope_parameters") or {}
    assert form.per_layer_rope == any(isinstance(v, dict) for v in rope.values())


#: Settings that the first table leaves out: parts that a config can switch off, other ways to say
#: which layers are sparse.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("lfm2_moe", {"use_expert_bias": False}),
    ("nemotron_h", {"moe_latent_size": 16}),
    ("jamba", {"num_experts": 1}),
    ("jamba", {"expert_layer_period": 3, "expert_layer_offset": 0}),
    ("gemma4_text", {"enable_moe_block": False}),
    ("ernie4_5_moe", {"moe_num_shared_experts": 0, "moe_layer_interval": 2}),
    ("cohere2_moe", {"num_shared_experts": 0, "expert_selection_fn": "sigmoid"}),
    ("deepseek_v2", {"topk_method": "greedy", "n_group": 1}),
    ("phimoe", {"lm_head_bias": True}),
    ("llama4_text", {"moe_layers": [0, 3]}),
    ("granitemoeshared", {"shared_intermediate_size": 0}),
    ("longcat_flash", {"zero_expert_num": 0}),
    ("hunyuan_v1_moe", {"moe_topk": [2, 2, 2]}),
    ("kimi_linear", {"mlp_layer_types": ["dense", "dense", "sparse"]}),
    ("qwen2_moe", {"tie_word_embeddings": True}),
]


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS, ids=str)
def test_variants_are_what_the_form_says(
    model_type: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    s = save(model_type, tmp_path, **changes)
    form = all_architectures()[model_type]
    assert list(faults(form, s)) == []
    moe = form.moe(s.config)
    assert experts_in_memory(s.model) == dict.fromkeys(
        moe.sparse_layers, (moe.num_experts, moe.expert_width)
    )


@pytest.mark.parametrize("model_type", BUILT)
def test_defaults_are_those_of_the_config_class(model_type: str) -> None:
    for key in keys_of(all_architectures()[model_type]):
        if key.default is REQUIRED or key.count_of:
            continue
        expected = class_default(model_type, key.name)
        if expected is MISSING:
            expected = NO_FIELD[key.name][model_type]
        elif expected is None and key.default is not None:
            expected = (0, 1) if model_type == "flint" else NONE_MEANS[key.name]
        assert key.default == expected, key.name


@pytest.mark.parametrize("model_type", BUILT)
def test_parameters_are_counted_as_the_model_counts_them(
    model_type: str, saved: Callable[[str], Saved]
) -> None:
    s = saved(model_type)
    form = all_architectures()[model_type]
    moe = form.moe(s.config)
    state = s.model.state_dict()
    buffers = state.keys() - dict(s.model.named_parameters(remove_duplicate=False)).keys()
    total = s.model.num_parameters() + sum(state[name].numel() for name in buffers)
    if model_type in UNUSED:
        total -= 2 * 2 * moe.zero_experts * moe.expert_width * moe.hidden
    counted = count_parameters(form, s.config, s.tensors)
    assert counted.total == total
    assert counted.mtp == 0
    assert form.experts is not None
    matrices = 3 if form.experts.gate or form.experts.gate_up else 2
    expert = matrices * moe.expert_width * moe.expert_hidden
    expert += MORE_PER_EXPERT.get(model_type, lambda c: 0)(s.config)
    idle = len(moe.sparse_layers) * (moe.num_experts - moe.top_k) * expert
    assert counted.active == total - idle


@pytest.mark.parametrize("model_type", BUILT)
def test_what_transformers_keeps_in_fp32_is_pinned(model_type: str, tmp_path: Path) -> None:
    model = tiny_checkpoint(model_type, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        type(model).from_pretrained(tmp_path, dtype=torch.bfloat16).save_pretrained(tmp_path)
    tensors = read_header(tmp_path)
    form = layout_of(all_architectures()[model_type], tensors)
    for t in form.router:
        kept = {
            tensors[name].dtype
            for i in range(8)
            if (name := t.name.format(i=i)) in tensors and t.kind != "other"
        }
        if kept == {"F32"}:
            assert t.dtype == "F32", t.name
        assert t.kind != "correction_bias" or t.dtype == "F32", t.name


#: No module of the experts' interface to listen to, or a router that does more than rows can say.
ROUTED_ELSEWHERE = {"dbrx", "jetmoe", "llama4_text"}


@torch.no_grad()
def listen(model: PreTrainedModel) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """Run the model. Per sparse layer: the router's name, its logits, and the choices and weights
    that reached the experts.
    """
    logits: dict[str, Tensor] = {}
    heard: list[tuple[str, Tensor, Tensor, Tensor]] = []

    def router_hook(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            logits[name] = out[0]

        return hook

    def experts_hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        _, index, weights = (*args, *kwargs.values())
        name = next(reversed(logits))
        heard.append((name, logits[name].flatten(0, -2), index, weights))

    handles = []
    for name, module in model.named_modules():
        if re.search(r"Router$|MoEV1Gate$", type(module).__name__):
            handles.append(module.register_forward_hook(router_hook(name)))
        elif re.search(r"Experts$", type(module).__name__):
            handles.append(module.register_forward_pre_hook(experts_hook, with_kwargs=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(torch.arange(3, 3 + 24)[None])
    for handle in handles:
        handle.remove()
    return heard


def spread(index: Tensor, weights: Tensor, experts: int) -> Tensor:
    """`[T, k]` choices and weights as `[T, E]`."""
    return torch.zeros(index.shape[0], experts).scatter_add_(1, index, weights.float())


@pytest.mark.parametrize("model_type", [f for f in BUILT if f not in ROUTED_ELSEWHERE])
def test_routing_is_the_model_s(model_type: str, saved: Callable[[str], Saved]) -> None:
    s = saved(model_type)
    model = s.model
    moe = all_architectures()[model_type].moe(s.config)
    generator = torch.Generator().manual_seed(1)
    state = model.state_dict()
    for name, tensor in state.items():
        if re.search(r"correction_bias|expert_bias|balancing_biases|per_expert_scale", name):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.2)
        elif name.endswith("tid2eid"):
            any_order = torch.rand(len(tensor), moe.num_experts, generator=generator).argsort()
            tensor.copy_(any_order[:, : moe.top_k])
    heard = listen(model)
    assert len(heard) == len(moe.sparse_layers)
    for layer, (name, logits, index, weights) in enumerate(heard):
        block = {n: v for n, v in state.items() if n.startswith(name.rsplit(".", 1)[0] + ".")}
        bias = [v.flatten() for n, v in block.items() if re.search(r"_bias(es)?$", n)]
        scale = [v for n, v in block.items() if n.endswith("per_expert_scale")]
        hashed = layer < moe.routing.hashed_layers
        if model_type == "gemma4_text":  # what its router calls logits are probabilities
            logits = logits.log()
        if moe.routing.softcap:  # returned after the cap
            logits = moe.routing.softcap * (logits / moe.routing.softcap).atanh()
        routed = route(
            logits,
            moe.routing,
            moe.top_k,
            correction_bias_E=bias[0] if moe.routing.selection_bias and not hashed else None,
            expert_scale_E=scale[0] if moe.routing.expert_scale else None,
            chosen_TK=index if hashed else None,
        )
        chosen, weighed = routed.experts_TK, routed.weights_TK
        if model_type == "zaya":  # the class that skips the FFN
            weighed = weighed.masked_fill(chosen == moe.num_experts, 0.0)
            chosen = chosen.masked_fill(chosen == moe.num_experts, 0)
        if model_type in ("laguna", "beam"):  # these scale the sum of the experts' outputs instead
            weighed = weighed / moe.routing.scale
        rows = moe.num_experts + moe.zero_experts
        torch.testing.assert_close(
            spread(chosen, weighed, rows), spread(index, weights, rows), rtol=1e-5, atol=1e-6
        )


@torch.no_grad()
def test_routing_without_the_interface(saved: Callable[[str], Saved]) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(24, 6, generator=generator)

    dbrx = saved("dbrx")
    moe = all_architectures()["dbrx"].moe(dbrx.config)
    weights, index = dbrx.model.transformer.blocks[0].ffn.route_tokens_to_experts(logits)
    routed = route(logits, moe.routing, moe.top_k)
    expected = spread(routed.experts_TK, routed.weights_TK, 6)
    torch.testing.assert_close(spread(index, weights, 6), expected)

    llama4 = saved("llama4_text")
    moe = all_architectures()["llama4_text"].moe(llama4.config)
    router = llama4.model.model.layers[moe.sparse_layers[0]].feed_forward.router
    weights, logits = router(torch.randn(24, 32, generator=generator))
    routed = route(logits, moe.routing, moe.top_k)
    torch.testing.assert_close(weights, spread(routed.experts_TK, routed.weights_TK, 6))
    assert moe.routing.applied_to == "input"


_EXPERTS = QWEN_EXPERTS
BREAKAGES: dict[str, dict[str, Any]] = {
    "an expert's name": {"experts": replace(_EXPERTS, down="model.layers.{i}.{e}.down")},
    "gate and down": {"experts": replace(_EXPERTS, gate=_EXPERTS.down, down=_EXPERTS.gate)},
    "the router's name": {"router": (RouterTensor(name="model.layers.{i}.mlp.router.weight"),)},
    "no correction bias": {"router": DEEPSEEK_ROUTER[:1]},
    "no shared experts": {"shared": None},
    "the experts' width": {"expert_width": Key(name="intermediate_size")},
    "the experts' count": {"num_experts": Key(name="num_experts_per_tok")},
    "the dense width": {"width": Key(name="moe_intermediate_size")},
    "the dense layers": {"sparse": FirstDense(key=Key(name="topk_group"))},
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_control_a_broken_form_is_found_out(breakage: str, saved: Callable[[str], Saved]) -> None:
    form, s = all_architectures()["deepseek_v3"], saved("deepseek_v3")
    assert list(faults(form, s)) == []
    assert list(faults(replace(form, **BREAKAGES[breakage]), s))
