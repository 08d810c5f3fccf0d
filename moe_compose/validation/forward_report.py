"""What the forward pass through the Triton kernels was found to be, layer by layer and end to end.

All errors are relative, `‖Δ‖₂ / ‖exact‖₂`, against the same computation in fp64.
"""

from __future__ import annotations

from dataclasses import dataclass

#: In fp32, the error that is rounding in any order of summation.
SINGLE = 2e-6

#: Beyond that, how much worse than transformers' own eager experts the kernels may be.
FACTOR = 1.5


@dataclass(frozen=True, slots=True)
class Errors:
    """The same computation by two implementations, each against fp64.

    Attributes:
        eager: of transformers' own experts.
        triton: of the kernels.
    """

    eager: float
    triton: float

    def met(self, dtype: str) -> bool:
        """Whether the kernels are as exact as eager is."""
        floor = SINGLE if dtype == "float32" else 0.0
        return self.triton <= max(floor, FACTOR * self.eager)


@dataclass(frozen=True, slots=True)
class LayerForward:
    """One layer's routed experts.

    Attributes:
        layer: its index in the model.
        tokens: of real text.
        probes: tokens sent by hand to experts that the text did not reach.
        experts: how many were run.
        num_experts: how many there are.
        errors: by dtype.
    """

    layer: int
    tokens: int
    probes: int
    experts: int
    num_experts: int
    errors: dict[str, Errors]

    @property
    def met(self) -> bool:
        return all(e.met(dtype) for dtype, e in self.errors.items())


@dataclass(frozen=True, slots=True)
class LogitForward:
    """The whole model's logits.

    Attributes:
        dtype: what the model ran in.
        tokens: positions.
        errors: of the median token. A token whose router is nearly tied takes another expert under
            any rounding, which says nothing of the arithmetic.
        worst: of the worst token.
    """

    dtype: str
    tokens: int
    errors: Errors
    worst: Errors

    @property
    def met(self) -> bool:
        return self.errors.met(self.dtype)


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """The forward pass through Triton and through eager.

    Attributes:
        device: what it ran on.
        triton: version of the package.
        text: which text.
        sparse_layers: layers with routed experts in the model.
        layers: those that were run.
        logits: end to end, by dtype; empty if there was no time for it.
        seconds: how long it took.
        budget: how long it was allowed to take, in seconds; None on a GPU.
        left_out: what was not run, and why; empty if all was.
    """

    device: str
    triton: str
    text: str
    sparse_layers: int
    layers: tuple[LayerForward, ...]
    logits: tuple[LogitForward, ...]
    seconds: float
    budget: float | None
    left_out: tuple[str, ...]

    @property
    def met(self) -> bool:
        """Every layer that was run, and the logits if they were."""
        layers, logits = [x.met for x in self.layers], [x.met for x in self.logits]
        return bool(layers) and all(layers + logits)

    @property
    def covered(self) -> str:
        """What was run, in one sentence."""
        least = min(x.experts for x in self.layers)
        most, tokens = self.layers[0].num_experts, max(x.tokens for x in self.layers)
        probes = sum(x.probes for x in self.layers)
        experts = "all" if least == most else f"{least} or more of"
        said = f"{len(self.layers)} of {self.sparse_layers} sparse layers, {experts} {most} experts"
        said += f", {tokens} tokens and {probes} probes"
        if self.logits:
            said += f"; logits of {self.logits[0].tokens} tokens"
        return said

    @property
    def verdict(self) -> str:
        """One sentence with figures."""
        wrong = [f"layer {x.layer}" for x in self.layers if not x.met]
        wrong += [f"logits in {x.dtype}" for x in self.logits if not x.met]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            return f"Triton is less exact than eager in {', '.join(wrong[:3])}{more}"
        by_dtype = []
        for dtype in self.layers[0].errors:
            pairs = [x.errors[dtype] for x in self.layers if dtype in x.errors]
            eager, triton = max(e.eager for e in pairs), max(e.triton for e in pairs)
            by_dtype.append(f"{dtype} {triton:.1e} (eager {eager:.1e})")
        return f"Triton against fp64, worst layer: {', '.join(by_dtype)}; {self.covered}"
