"""What a quantisation plan can be asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

#: Sensitivity → its formula, with g the dispatched weight, f the expert's output, x the layer's
#: input, n the tokens that chose the expert, N all tokens; and where it is from.
SENSITIVITIES: Mapping[str, tuple[str, str]] = {
    "mc": (
        "(n/N)·(Σg/N) of the expert, as a part of its layer's",
        "significance φ^α·w^β of Mixture Compressor, 2410.06270, with α = β = 1",
    ),
    "weighted-ean": (
        "Σ g‖f‖ of the expert, as a part of its layer's",
        "the error that rounding adds to the layer's output is at most ε·Σ g‖f‖, where ε is the "
        "relative error of an expert's output; sums as in REAP, 2510.13999",
    ),
    "frequency": (
        "n of the expert, as a part of its layer's",
        "QuantMoE-Bench, 2406.08155: experts that are used more often get more bits",
    ),
}

#: Of a whole layer.
OF_LAYER = "Σ g‖f‖ of the layer's experts / Σ‖x‖ of its inputs"

#: Share of the experts that get the lower bits, where nothing is asked.
SHARE = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantPlanOptions:
    """Which experts get how many bits.

    Attributes:
        bits_low: Bits of a weight in the least sensitive experts, 2 to 8.
        bits_high: Bits of a weight in the others.
        share: Share of the experts that get the lower bits; by default 0.25.
        budget: Mean bits of an expert's weight, instead of a share.
        per: What gets its own bits: expert, or layer, as vLLM needs it.
        sensitivity: What decides: mc, weighted-ean, or frequency; by default mc, and between layers
            weighted-ean, the only one that tells them apart.
        method: How llm-compressor rounds: gptq, or rtn (to nearest, without any text).
        group_size: Weights of a row that share a scale; fewer, or all, where it does not divide.
    """

    bits_low: int = 4
    bits_high: int = 8
    share: float | None = None
    budget: float | None = None
    per: Literal["expert", "layer"] = "expert"
    sensitivity: Literal["mc", "weighted-ean", "frequency"] | None = None
    method: Literal["gptq", "rtn"] = "gptq"
    group_size: int = 128

    def problems(self) -> Iterator[str]:
        """Every option that cannot be meant."""
        if not 2 <= self.bits_low < self.bits_high <= 8:
            yield (
                f"bits_low ({self.bits_low}) and bits_high ({self.bits_high}) must be from 2 to 8, "
                "the first below the second"
            )
        if self.share is not None and self.budget is not None:
            yield f"share ({self.share}) and budget ({self.budget}) say the same: give one of them"
        if self.share is not None and not 0 <= self.share <= 1:
            yield f"share ({self.share}) must be from 0 to 1"
        if self.budget is not None and not self.bits_low <= self.budget <= self.bits_high:
            yield f"budget ({self.budget}) must be from {self.bits_low} to {self.bits_high} bits"
        if self.per not in ("expert", "layer"):
            yield f"per ({self.per}) must be expert or layer"
        if self.measure not in SENSITIVITIES:
            yield f"sensitivity ({self.sensitivity}) must be one of {', '.join(SENSITIVITIES)}"
        elif self.per == "layer" and self.measure != "weighted-ean":
            yield f"sensitivity ({self.sensitivity}) is the same for all layers: give weighted-ean"
        if self.method not in ("gptq", "rtn"):
            yield f"method ({self.method}) must be gptq or rtn"
        if self.group_size < 1:
            yield f"group_size ({self.group_size}) must be at least 1"

    @property
    def measure(self) -> str:
        """The sensitivity that decides."""
        return self.sensitivity or ("weighted-ean" if self.per == "layer" else "mc")

    @property
    def formula(self) -> str:
        """What decides, as a formula."""
        return OF_LAYER if self.per == "layer" else SENSITIVITIES[self.measure][0]

    @property
    def reference(self) -> str:
        """Why, and where the formula is from."""
        return SENSITIVITIES[self.measure][1]

    def low_share(self) -> float:
        """Share of the experts that get the lower bits."""
        if self.budget is not None:
            return (self.bits_high - self.budget) / (self.bits_high - self.bits_low)
        return SHARE if self.share is None else self.share
