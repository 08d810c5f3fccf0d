"""The only module that touches transformers' semi-private functions: building a class without
weights, the tensors it computes for itself, and the rules from names on disk to names in memory.

They drift between releases. What is needed is looked up by name when this module is used, and
`self_test.py` loads a tiny model both ways, by `from_pretrained` and by these functions, and
compares.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moe_compose.errors import UnsupportedError
from moe_compose.runtime import pretrained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: What is used of transformers beyond its documented classes: module → names.
_NEEDED = {
    "conversion_mapping": ("get_model_conversion_mapping",),
    "core_model_loading": (
        *("WeightConverter", "WeightRenaming", "dot_natural_key", "rename_source_key"),
    ),
}
_NEEDED_METHODS = ("_get_dtype_plan", "named_non_persistent_buffers", "initialize_weights")

#: Outputs that a config may ask for. Recording them would patch modules while batches alternate.
_RECORDED = ("output_router_logits", "output_hidden_states", "output_attentions", "use_cache")


@cache
def _api() -> Mapping[str, Any]:
    """The semi-private functions, by name.

    Raises:
        UnsupportedError: the installed transformers lacks one.
    """
    import transformers

    found, absent = {}, []
    for module, names in _NEEDED.items():
        try:
            home: Any = importlib.import_module(f"transformers.{module}")
        except ImportError:
            home = None
        for name in names:
            found[name] = getattr(home, name, None)
            absent += [f"{module}.{name}"] if found[name] is None else []
    absent += [n for n in _NEEDED_METHODS if not hasattr(transformers.PreTrainedModel, n)]
    if absent:
        raise UnsupportedError(
            f"transformers {transformers.__version__} cannot be streamed: {', '.join(absent)} is "
            "not there",
            hint="Install transformers 5.1 or later, below 6.",
        )
    return found


def build(
    config: Mapping[str, Any], dtype: torch.dtype, *, experts: str, attention: str | None = None
) -> PreTrainedModel:
    """The causal language model that a config names, on the meta device, in evaluation mode.

    Remote code is never run.

    Args:
        config: `config.json`, not quantised.
        dtype: of its parameters, where the class does not say otherwise.
        experts: name of an experts implementation.
        attention: name of an attention implementation; None for the one transformers prefers.

    Raises:
        UnsupportedError: the installed transformers does not know the family.
        CheckpointError: the class refuses the config.
    """
    _api()
    parsed = pretrained.load_config(config)
    for part in (parsed, parsed.get_text_config()):
        for name in _RECORDED:
            if getattr(part, name, False):
                setattr(part, name, False)
    parsed.dtype = dtype
    given = {"experts_implementation": experts}
    given |= {"attn_implementation": attention} if attention else {}
    return pretrained.build_on_meta(parsed, dtype=dtype, **given).eval()


def fill_computed_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Make the buffers that no checkpoint holds (rotary frequencies, ...) real, by the class's own
    initialisation. Parameters and stored buffers stay on the meta device.
    """
    computed = list(model.named_non_persistent_buffers())
    for name, buffer in computed:
        home, _, attribute = name.rpartition(".")
        model.get_submodule(home)._buffers[attribute] = torch.empty_like(buffer, device="cpu")
    kept = {name for name, _ in computed}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name not in kept:
            tensor._is_hf_initialized = True
    for module in model.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    with torch.random.fork_rng(devices=[]):
        model.initialize_weights()
    for name, _ in computed:
        home, _, attribute = name.rpartition(".")
        buffers = model.get_submodule(home)._buffers
        found = buffers[attribute]
        buffers[attribute] = None if found is None else found.to(device)


def dtypes_of(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Name in memory → dtype that transformers would load the tensor in.

    In fp64 all floating-point tensors are fp64, whatever the class says: it is for references.
    """
    plan = [
        (re.compile(pattern.replace("*", ".*")), wanted)
        for pattern, wanted in model._get_dtype_plan(dtype).items()
    ]
    found = {}
    for name, tensor in model.state_dict().items():
        pinned = next((wanted for pattern, wanted in plan if pattern.search(name)), tensor.dtype)
        wide = dtype == torch.float64 and tensor.dtype.is_floating_point
        found[name] = dtype if wide else pinned
    return found


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """What makes one tensor in memory, or several at once, from tensors on disk.

    Attributes:
        target: name in memory; of several, the first.
        sources: names on disk, in the order transformers takes them, each with the pattern of the
            converter that matched it.
        converter: transformers' `WeightConverter`; None where a tensor is only renamed.
    """

    target: str
    sources: tuple[tuple[str, str], ...]
    converter: Any

    def run(self, model: PreTrainedModel, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Name in memory → tensor.

        Args:
            model: the model on the meta device: some conversions ask it for shapes.
            read: gives a tensor on disk, in the dtype it is to have in memory.
        """
        if self.converter is None:
            return {self.target: read(self.sources[0][0])}
        own = deepcopy(self.converter)
        for name, pattern in self.sources:
            own.add_tensor(self.target, name, pattern, partial(read, name))
        made = own.convert(self.target, model=model, config=model.config)
        return {name: t[0] if isinstance(t, list) else t for name, t in made.items()}


def jobs_of(model: PreTrainedModel, names: Iterable[str]) -> tuple[list[Job], list[str]]:
    """How the tensors of a checkpoint become those of a model, by transformers' own rules.

    Args:
        model: the model on the meta device.
        names: of all tensors on disk.

    Returns:
        The jobs, and the names that the class has no use for (multi-token-prediction layers, ...).
    """
    api = _api()
    rules = api["get_model_conversion_mapping"](model)
    renamings = [r for r in rules if isinstance(r, api["WeightRenaming"])]
    converters = [r for r in rules if isinstance(r, api["WeightConverter"])]
    by_pattern = {p: c for c in converters for p in c.source_patterns}
    wanted = model.state_dict()
    rename = partial(api["rename_source_key"], meta_state_dict=wanted)
    prefix = model.base_model_prefix
    sources: dict[str, list[tuple[str, str]]] = {}
    made_by: dict[str, Any] = {}
    unused = []
    for name in sorted(names, key=api["dot_natural_key"]):
        target, pattern = rename(name, renamings, converters, prefix)
        if target not in wanted and name in wanted:
            target, pattern = rename(name, [], [], prefix)
        if target not in wanted:
            unused.append(name)
            continue
        made_by.setdefault(target, by_pattern[pattern] if pattern is not None else None)
        sources.setdefault(target, []).append((name, pattern or name))
    return [Job(t, tuple(s), made_by[t]) for t, s in sources.items()], unused


def computes_experts(module: nn.Module) -> bool:
    """Whether a module takes hidden states, expert indices and weights: by transformers' experts
    interface, or a module of its own with such arguments.
    """
    interface = hasattr(module, "is_transposed") and hasattr(module, "has_bias")
    arguments = inspect.signature(module.forward).parameters.keys()
    return interface or {"top_k_index", "top_k_weights"} <= arguments


def router_classes(model: PreTrainedModel) -> tuple[type[nn.Module], ...]:
    """Classes whose output transformers records as router logits."""
    classes = []
    for part in model.modules():
        found = (getattr(part, "can_record_outputs", None) or {}).get("router_logits", ())
        entries = found if isinstance(found, list | tuple) else [found]
        classes += [getattr(entry, "target_class", entry) for entry in entries]
    return tuple({c for c in classes if isinstance(c, type)})
