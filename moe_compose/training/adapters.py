"""LoRA adapters (2106.09685) that train beside the routers, through Hugging Face peft.

    W + α/r · B A      A [r, in], B [out, r]; α/r: lora_alpha over lora_rank

on the linear layers of attention, on the matrices of all experts, or on both. transformers stacks
experts in one tensor `[E, ...]`; peft gives every expert an A and a B of its own there
(`target_parameters`). A starts uniform, as in peft, but drawn for its name; B starts at zero.

The optimizer moves A and B, in fp32. Evaluations are of the merged weights, as they will be stored,
unless the adapters are to stay adapters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_compose.architectures import Architecture, MoE
from moe_compose.architectures.parts import Locator
from moe_compose.errors import UnsupportedError
from moe_compose.runtime.quiet import quiet
from moe_compose.runtime.whole import Whole
from moe_compose.surgery.draws import Draw
from moe_compose.training.chosen import Chosen
from moe_compose.training.engine import Engine
from moe_compose.training.masters import Master, Masters
from moe_compose.training.options import TrainOptions

_NAME = "default"


def targets_of(whole: Whole, form: Architecture, moe: MoE, lora: str) -> dict[str, Tensor]:
    """The matrices that get adapters, by name in memory; reads no values.

    Args:
        whole: the model, filled or not.
        form: of its family.
        moe: what its config says.
        lora: attention, experts, or all.

    Raises:
        UnsupportedError: experts that are not stacked in three dimensions, nothing to adapt.
    """
    kinds = {"all": {"attention", "experts"}}.get(lora, {lora})
    locator = Locator(form, len(moe.sparse))
    found: dict[str, Tensor] = {}
    for name, tensor in whole.model.named_parameters():
        places = [locator.place(n) for n in whole.made_of(name)]
        inside = all(p.kind in kinds and p.layer is not None for p in places)
        if not places or not inside or tensor.dim() < 2 or name.endswith("bias"):
            continue
        home = whole.model.get_submodule(name.rpartition(".")[0])
        expert = places[0].kind == "experts"
        if expert and not isinstance(home, nn.Linear):
            if tensor.dim() != 3 or len(tensor) != moe.num_experts:
                raise UnsupportedError(
                    f"{name} {list(tensor.shape)} holds experts otherwise than [E, ...]: peft "
                    "gives them one adapter together",
                    hint="Train router+experts=0,1,... or lora-attention.",
                )
        elif not isinstance(home, nn.Linear):
            continue
        found[name] = tensor
    if not found:
        raise UnsupportedError(f"no linear layers for lora-{lora} are known in this family")
    return found


def count_adapters(targets: Mapping[str, Tensor], rank: int) -> int:
    """Parameters of the adapters on these matrices."""
    return sum(rank * math.prod(t.shape[:-2]) * sum(t.shape[-2:]) for t in targets.values())


class AdaptedMasters(Masters):
    """Copies of routers, and adapters, which need no copies.

    Args:
        whole, chosen, by_hand, engine: as for `Masters`; the engine has not prepared the model.
        targets: what gets adapters.
        options: rank, alpha, seed.
        merged: adapters are merged in the end.

    Raises:
        UnsupportedError: peft is not installed; weights that cannot be merged into.
    """

    def __init__(
        self,
        whole: Whole,
        chosen: Chosen,
        by_hand: Sequence[str],
        engine: Engine,
        targets: Mapping[str, Tensor],
        options: TrainOptions,
        *,
        merged: bool,
    ) -> None:
        if find_spec("peft") is None:
            raise UnsupportedError(
                "adapters train through peft, which is not installed",
                hint="pip install 'moe-compose[train]'",
            )
        super().__init__(whole, chosen, by_hand, engine)
        self._whole, self._merged = whole, merged
        self._stored = {n: whole.stored_dtype(n) for n in targets} if merged else {}
        trains = [m.home for m in self.each.values() if m.learns]
        self._model = _adapted(whole.model, targets, options)
        for home in trains:  # peft freezes what is no adapter
            home.requires_grad_(True)
        self._layers = dict(_layers(self._model))
        assert self._layers.keys() == targets.keys()
        for name, parameter in self._model.named_parameters():
            if ".lora_" in name:
                value = nn.Parameter(parameter.detach())  # the same memory
                self.each[name] = Master(parameter, None, None, value, parameter.dtype)

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """The model computes with merged and rounded weights; with adapters if they stay."""
        with super().as_stored():
            if not self._merged:
                yield
                return
            kept = {n: _weight(layer).detach().clone() for n, layer in self._layers.items()}
            with torch.no_grad():
                for name, layer in self._layers.items():
                    change = _change(layer)
                    value = kept[name].to(change.dtype) + change
                    _weight(layer).copy_(value.to(self._stored[name]))
            try:
                with self._model.disable_adapter():
                    yield
            finally:
                with torch.no_grad():
                    for name, layer in self._layers.items():
                        _weight(layer).copy_(kept[name])

    def collected(
        self, values: Mapping[str, Tensor]
    ) -> tuple[Mapping[str, Tensor], dict[str, tuple[int, ...]]]:
        """Routers, and merged weights unless adapters stay; the model has no adapters any more."""
        self.load(values)
        found, rows = super().collected(values)
        plain = {n: v for n, v in found.items() if ".lora_" not in n}
        self._model.unload()
        return (_Merged(plain, self._whole, self._layers) if self._merged else plain), rows

    def save(self, folder: Path, values: Mapping[str, Tensor]) -> None:
        """Write the adapters as peft does.

        Args:
            folder: where.
            values: a snapshot, of which they are.
        """
        self.load(values)
        config = self._model.peft_config[_NAME]
        config.base_model_name_or_path = None
        with quiet():
            self._model.save_pretrained(str(folder), save_embedding_layers=False)


class _Merged(Mapping[str, Tensor]):
    """Weights with their adapters merged, fp32 (fp64), one computed at a time."""

    def __init__(
        self, plain: Mapping[str, Tensor], whole: Whole, layers: Mapping[str, Any]
    ) -> None:
        self._plain, self._whole, self._layers = plain, whole, layers

    def __getitem__(self, name: str) -> Tensor:
        if name in self._plain:
            return self._plain[name]
        with torch.no_grad():
            return self._whole.exact(name) + _change(self._layers[name]).cpu()

    def __iter__(self) -> Iterator[str]:
        return iter((*self._plain, *self._layers))

    def __len__(self) -> int:
        return len(self._plain) + len(self._layers)


def _adapted(model: nn.Module, targets: Mapping[str, Tensor], options: TrainOptions) -> Any:
    from peft import LoraConfig, get_peft_model

    modules = [n.removesuffix(".weight") for n in targets if targets[n].dim() == 2]
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,
        lora_dropout=0.0,
        target_modules=modules,
        target_parameters=[n for n in targets if targets[n].dim() == 3] or None,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    with quiet(), torch.random.fork_rng(devices=[]):
        found = get_peft_model(model, config, adapter_name=_NAME)
    for name, parameter in found.named_parameters():
        if ".lora_A" in name:
            draw = Draw(options.seed, f"adapter {name}").generator()
            bound = 1 / math.sqrt(parameter.shape[1])
            drawn = torch.from_numpy(draw.uniform(-bound, bound, tuple(parameter.shape)))
            parameter.data.copy_(drawn)
        elif ".lora_B" in name:
            parameter.data.zero_()
    return found.eval()


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    """Peft's layers, by the name that the matrix had in memory before."""
    from peft.tuners.lora import LoraLayer

    for key, module in model.base_model.model.named_modules():
        if isinstance(module, LoraLayer):
            path = key.replace(".base_layer", "")
            yield f"{path}.{getattr(module, 'parameter_name', 'weight')}", module


def _weight(layer: Any) -> Tensor:
    found: Tensor = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))
    return found


def _change(layer: Any) -> Tensor:
    """α/r · B A, as the matrix lies, fp32 (fp64); peft would round it to the matrix's dtype."""
    a, b = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
    scaling = layer.scaling[_NAME]
    if not hasattr(layer, "parameter_name"):
        whole: Tensor = scaling * (b @ a)
        return whole
    a_ERI = a.reshape(layer.num_experts, -1, a.shape[-1])
    b_ORE = b.reshape(b.shape[0], -1, layer.num_experts)
    to = "eoi" if layer._did_swap_in_out_features else "eio"
    change: Tensor = scaling * torch.einsum(f"ore,eri->{to}", b_ORE, a_ERI)
    return change
