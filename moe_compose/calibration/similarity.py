"""How alike a layer's experts are, on a sample of tokens: what merging needs (METHODS section 6).

Here, and only here, experts run on tokens that were not sent to them: all of them on the same few
tokens. Per layer a file `similarity-00003.safetensors` holds

    inputs_SD       fp32, what the experts are given
    logits_SE       fp32, the router's logits; absent where the router could not be read
    mean_ED         fp32, mean of f_e(x) over the sample: the feature of HC-SMoE (2410.08589)
    cosine_EE       fp32, mean over the sample of cos(f_i(x), f_j(x)): REAM (2604.04356)
    hidden.{e}      fp16 [S, F], what expert e's second matrix is given, divided by scale_E[e]:
                    neurons are aligned on it; absent where no layout describes the experts
    scale_E         fp32

so it takes `2·E·S·F + 4·(S·(D + E) + E·(D + E + 1))` bytes: with 128 experts of width 768, hidden
2048 and 256 tokens 54 MB a layer.

Shape suffixes: E experts, S tokens of the sample, D model, F expert width.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_compose.calibration.pairs import Expert, experts_of, hidden_of
from moe_compose.checkpoint.copying import (
    commit_part,
    create_part,
    discard_part,
    os_errors,
    write_at,
)
from moe_compose.checkpoint.header import encode_header
from moe_compose.checkpoint.source import TensorInfo
from moe_compose.errors import CheckpointError, OptionError

#: Bytes of expert outputs that are held at a time, whatever the number of experts and tokens.
BLOCK = 64 << 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Similarity:
    """One layer's file; the hidden activations stay on the disk until one expert's are asked for.

    Attributes:
        path: the file.
        inputs_SD, mean_ED, cosine_EE: as above.
        logits_SE: None where the router could not be read.
        scale_E: None where there are no hidden activations.
    """

    path: Path
    inputs_SD: Tensor  # noqa: N815
    mean_ED: Tensor  # noqa: N815
    cosine_EE: Tensor  # noqa: N815
    logits_SE: Tensor | None = None  # noqa: N815
    scale_E: Tensor | None = None  # noqa: N815

    def hidden(self, expert: int) -> Tensor:
        """What the expert's second matrix is given, `[S, F]`, fp32.

        Raises:
            OptionError: the layer has no such expert, or no hidden activations.
        """
        from safetensors import safe_open

        if self.scale_E is None:
            raise OptionError(
                f"{self.path.name} holds no hidden activations: no layout describes these experts"
            )
        if not 0 <= expert < len(self.scale_E):
            raise OptionError(f"there is no expert {expert} ({len(self.scale_E)} experts)")
        with safe_open(self.path, "pt") as file:
            found: Tensor = file.get_tensor(f"hidden.{expert}")
        return found.float() * self.scale_E[expert]

    @property
    def gate_EE(self) -> Tensor | None:  # noqa: N802
        """Cosine of the experts' router logits over the sample (M-SMoE, 2310.01334)."""
        if self.logits_SE is None:
            return None
        columns_ES = self.logits_SE.double().T
        unit_ES = columns_ES / columns_ES.norm(dim=-1, keepdim=True).clamp(min=1e-300)
        found: Tensor = (unit_ES @ unit_ES.T).float()
        return found

    @classmethod
    def load(cls, folder: Path, layer: int) -> Similarity:
        """Read a layer's file, all but the hidden activations.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        from safetensors import safe_open

        path = folder / file_of(layer)
        try:
            with safe_open(path, "pt") as file:
                names = [n for n in file.keys() if not n.startswith("hidden.")]  # noqa: SIM118
                return cls(path=path, **{name: file.get_tensor(name) for name in names})
        except Exception as e:  # safetensors raises its own
            raise CheckpointError(f"cannot read {path.name}: {e}") from e


def file_of(layer: int) -> str:
    """Name of a layer's file."""
    return f"similarity-{layer:05d}.safetensors"


def gather(
    module: Any, experts: int, inputs_SD: Tensor, logits_SE: Tensor | None, path: Path
) -> int:
    """Run all experts on the sample and write the file; returns its bytes.

    Args:
        module: the layer's experts.
        experts: how many.
        inputs_SD: what they are given, fp32.
        logits_SE: the router's logits, or None.
        path: the file.

    Raises:
        WriteError: it cannot be written.
    """
    parameter = next(module.parameters())
    x_SD = inputs_SD.to(parameter.device, parameter.dtype)
    mean_ED, cosine_EE = _alike(experts_of(module), experts, x_SD)
    small = {"inputs_SD": inputs_SD, "mean_ED": mean_ED, "cosine_EE": cosine_EE}
    if logits_SE is not None:
        small["logits_SE"] = logits_SE
    return _write(path, small, hidden_of(module), experts, x_SD)


def _alike(run: Expert, experts: int, x_SD: Tensor) -> tuple[Tensor, Tensor]:
    """Mean output of every expert, and mean cosine of every two, a block of tokens at a time."""
    tokens, width = x_SD.shape
    step = max(1, BLOCK // (4 * experts * width))
    mean_ED = torch.zeros(experts, width, dtype=torch.float64, device=x_SD.device)
    cosine_EE = torch.zeros(experts, experts, dtype=torch.float64, device=x_SD.device)
    for start in range(0, tokens, step):
        block = x_SD[start : start + step]
        unit = torch.zeros(experts, block.numel(), device=x_SD.device)
        for e in range(experts):
            f = run(e, block).float()
            mean_ED[e] += f.double().sum(0)
            unit[e] = (f / f.norm(dim=-1, keepdim=True).clamp(min=1e-30)).flatten()
        cosine_EE += (unit @ unit.T).double()
    return (mean_ED / tokens).float().cpu(), (cosine_EE / tokens).float().cpu()


def _write(
    path: Path, small: dict[str, Tensor], hidden: Expert | None, experts: int, x_SD: Tensor
) -> int:
    """One expert's activations in memory at a time."""
    infos = [TensorInfo.of(n, "F32", tuple(t.shape)) for n, t in small.items()]
    if hidden is not None:
        shape = (len(x_SD), hidden(0, x_SD[:1]).shape[-1])
        infos += [TensorInfo.of("scale_E", "F32", (experts,))]
        infos += [TensorInfo.of(f"hidden.{e}", "F16", shape) for e in range(experts)]
    with os_errors(f"write {path}"):
        descriptor = create_part(path)
        try:
            at = write_at(descriptor, memoryview(encode_header(infos, {})), 0)
            for table in small.values():
                at += write_at(descriptor, _bytes(table.contiguous()), at)
            if hidden is not None:
                at += _write_hidden(descriptor, at, hidden, experts, x_SD)
        except BaseException:
            os.close(descriptor)
            discard_part(path)
            raise
        commit_part(path, descriptor)
    return at


def _write_hidden(descriptor: int, at: int, hidden: Expert, experts: int, x_SD: Tensor) -> int:
    """Each expert's activations, and before them in the file their scales; the bytes of both."""
    scale_E, written = torch.zeros(experts), 4 * experts
    for e, a_SF in enumerate(_activations(hidden, experts, x_SD)):
        scale_E[e] = a_SF.abs().max().clamp(min=1e-30)
        half = (a_SF / scale_E[e]).half().contiguous()
        written += write_at(descriptor, _bytes(half), at + written)
    write_at(descriptor, _bytes(scale_E), at)
    return written


def _activations(hidden: Expert, experts: int, x_SD: Tensor) -> Iterator[Tensor]:
    for e in range(experts):
        yield hidden(e, x_SD).float().cpu()


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.flatten().view(torch.uint8).numpy().data)
