"""A checkpoint's forward pass, streamed layer by layer: eager in fp32, where every layer's experts
are measured on what reaches them; then end to end, eager and Triton against eager in fp64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.checkpoint.source import FLOAT_DTYPES, common_dtype
from moe_compose.errors import UnsupportedError
from moe_compose.kernels import hook
from moe_compose.runtime import Layer, Runner
from moe_compose.validation.forward_cover import Cover
from moe_compose.validation.forward_layers import Routed, Squares, probes, run_part
from moe_compose.validation.forward_report import Errors, LayerForward, LogitForward
from moe_compose.version import versions

Say = Callable[[dict[str, Any]], None]


class _TimeUpError(Exception):
    """Unwinds a run whose other layers nobody waits for."""


def run(job: dict[str, Any], say: Say) -> None:
    """Measure the layers and, if there is time, the logits of a checkpoint.

    Args:
        job: `path`, `ids` (token ids, one list a sequence), `seconds` for a machine without a GPU.
        say: gets `{"start": ...}`, a `{"layer": ...}` each, `{"logits": ...}`, `{"end": ...}`; and
            `{"left_out": ...}` for what was not run, `{"unsupported": ...}` when nothing can be.
    """
    cuda = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if cuda else "the CPU, in Triton's interpreter"
    runs = Runs(Checkpoint.open(job["path"]), "cuda" if cuda else "cpu", job["ids"])
    model, layers = runs.eager.model, [x for x in runs.eager.layers if x.experts is not None]
    version = versions("triton").get("triton", "of torch")  # a build of torch's has another name
    seconds = None if cuda else job["seconds"]
    start = {"device": name, "triton": version, "sparse_layers": len(layers)}
    say({"start": start | {"budget": seconds}})
    if not layers:
        text = f"{type(model).__name__} runs no experts through transformers' interface"
        return say({"unsupported": text})
    cover = Cover(seconds, len(layers))
    try:
        eager = runs.measured(cover, say)
        if cover.affords_logits(cover.spent - cover.experts):
            say({"logits": asdict(runs.compared(eager))})
        else:
            say({"left_out": "the logits: the interpreter would take longer"})
    except UnsupportedError as e:
        return say({"unsupported": e.message})
    except _TimeUpError as e:
        say({"left_out": str(e)})
    say({"end": {"seconds": cover.spent}})


class Runs:
    """The same texts through the same weights, run in several ways.

    Args:
        checkpoint: a local one.
        device: `cpu` or `cuda`.
        ids: token ids, one list a sequence.
    """

    def __init__(self, checkpoint: Checkpoint, device: str, ids: Sequence[Sequence[int]]) -> None:
        self.checkpoint, self.device = checkpoint, device
        self.texts = [torch.tensor([x]) for x in ids]
        self.eager = Runner(checkpoint, device=device)
        stated: torch.dtype = getattr(torch, FLOAT_DTYPES.get(common_dtype(checkpoint), "float32"))
        # fp16 is not emulated in the interpreter
        also = stated == torch.bfloat16 or (device == "cuda" and stated == torch.float16)
        self.dtypes = [torch.float32, *([stated] if also else [])]

    def measured(self, cover: Cover, say: Say) -> Tensor:
        """Run eager in fp32 and measure every layer's experts; the logits, a row a token."""

        @contextmanager
        def watch(layer: Layer) -> Iterator[None]:
            parts: list[Routed] = []
            assert layer.experts is not None
            handle = layer.experts.register_forward_pre_hook(_keep_in(parts), with_kwargs=True)
            if cover.up:
                raise _TimeUpError(f"layers from {layer.index} on, and the logits: the time was up")
            yield
            handle.remove()
            seen = Routed(*(torch.cat(t) for t in zip(*parts, strict=True)))
            say({"layer": asdict(measure(layer, seen, self.dtypes, cover))})

        return logits(self.eager, self.texts, lambda x: watch(x) if x.experts is not None else None)

    def compared(self, eager: Tensor) -> LogitForward:
        """The logits of Triton and of `eager`, both in fp32, against fp64."""
        exact = logits(Runner(self.checkpoint, dtype="float64", device=self.device), self.texts)
        self.eager.model.set_experts_implementation(hook.register(implementation="triton"))
        by_token = [_by_token(o, exact) for o in (eager, logits(self.eager, self.texts))]
        return LogitForward(
            dtype="float32",
            tokens=len(exact),
            errors=Errors(*(float(e.median()) for e in by_token)),
            worst=Errors(*(float(e.max()) for e in by_token)),
        )


def logits(
    runner: Runner, texts: Sequence[Tensor], on_layer: Callable[[Layer], Any] | None = None
) -> Tensor:
    """All tokens' logits, `[tokens, vocabulary]`."""
    found: dict[int, Tensor] = {}
    runner.run(texts, on_layer=on_layer, logits=lambda i, x: found.__setitem__(i, x[0].cpu()))
    return torch.cat([found[i] for i in range(len(texts))])


def measure(
    layer: Layer, seen: Routed, dtypes: Sequence[torch.dtype], cover: Cover
) -> LayerForward:
    """One layer on text and probes, in all dtypes, as many experts as there is time for."""
    module = layer.experts
    assert module is not None
    experts = int(module.num_experts)  # type: ignore[arg-type]
    weights = sum(w.numel() for w in module.parameters()) // experts
    more = probes(seen, experts)
    routed = Routed(*(torch.cat(pair) for pair in zip(seen, more, strict=True)))
    sums, run = {dtype: Squares() for dtype in dtypes}, 0
    for chosen in cover.parts(experts, weights):
        for dtype in dtypes:
            run_part(module, routed, chosen.to(seen.x_ND.device), dtype, sums[dtype])
        run += len(chosen)
    return LayerForward(
        layer=layer.index,
        tokens=len(seen.x_ND),
        probes=len(more.x_ND),
        experts=run,
        num_experts=experts,
        errors={str(d).removeprefix("torch."): s.errors() for d, s in sums.items()},
    )


def _keep_in(parts: list[Routed]) -> Callable[..., None]:
    def keep(module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        x, ids, gates = (*args, *kwargs.values())
        parts.append(Routed(x.flatten(0, -2).clone(), ids.clone(), gates.clone()))

    return keep


def _by_token(ours: Tensor, exact: Tensor) -> Tensor:
    """Relative error of every token's logits."""
    errors = (ours.double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    return torch.nan_to_num(errors, nan=torch.inf)
