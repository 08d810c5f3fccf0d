"""What validation found: checks, the receipt of a comparison, and one verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from moe_compose.validation.forward_report import ForwardPass

Status = Literal["pass", "warn", "fail", "skip"]
Verdict = Literal["same", "differs", "refuses", "not run"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: a few words, the same in every report.
        status: `pass`; `fail`: the checkpoint is wrong; `warn`: it works here but not everywhere,
            or deserves a look; `skip`: not looked at, and `detail` says why.
        detail: what was found, with figures.
        problems: single faults, when there are several.
    """

    name: str
    status: Status
    detail: str
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Agreement:
    """How two sets of logits over the same tokens compare. Losses and divergences in nats per
    token.

    Attributes:
        dtype: what both models ran in.
        max_error: largest absolute difference of two logits.
        relative_error: `‖Δ‖₂ / ‖reference‖₂` over all logits.
        median_error: the same token by token, the median of them.
        kl: mean KL(reference ‖ result).
        top1: share of positions where both rank the same token first.
        loss, reference_loss: next-token cross-entropy of the result and of the reference.
        guessing: the loss of equal probabilities, `ln` of the vocabulary.
        noise: median error of the reference itself in `dtype` against fp32; None when `dtype` is
            float32.
        noise_top1: top-1 agreement of the reference in `dtype` with itself in fp32; None likewise.
    """

    dtype: str
    max_error: float
    relative_error: float
    median_error: float
    kl: float
    top1: float
    loss: float
    reference_loss: float
    guessing: float
    noise: float | None = None
    noise_top1: float | None = None


@dataclass(frozen=True, slots=True)
class Receipt:
    """Source and result side by side on real text: the step-0 receipt.

    Attributes:
        against: label of the reference checkpoint.
        text: what text it was (name, and whether it is real text).
        tokens: positions compared.
        agreements: one per dtype, float32 first.
        stated: the preservation class that the plan stated, in words.
        met: whether the measurement meets it.
        verdict: why, in one sentence with figures.
        masked: of a pruned result, the comparison with the source whose removed experts are masked
            out of its routers.
    """

    against: str
    text: str
    tokens: int
    agreements: tuple[Agreement, ...]
    stated: str
    met: bool
    verdict: str
    masked: Agreement | None = None


@dataclass(frozen=True, slots=True)
class Served:
    """What another engine makes of a checkpoint.

    Attributes:
        engine: its name.
        version: of the one that was run; empty if none was.
        verdict: `same` as transformers; `differs`; `refuses`: it does not load or run it;
            `not run`, and `detail` says why.
        detail: what was found, with figures.
        max_error: largest difference of two logprobs, in nats; None if nothing was compared.
        rules: of the portable profile, those that are broken and name this engine.
        asked: somebody gave this engine's interpreter, so anything but `same` is a failure.
    """

    engine: str
    version: str
    verdict: Verdict
    detail: str
    max_error: float | None = None
    rules: tuple[str, ...] = ()
    asked: bool = False

    @property
    def failed(self) -> bool:
        return self.asked and self.verdict != "same"


@dataclass(frozen=True, kw_only=True)
class ValidationReport:
    """All checks of one checkpoint, and the receipt when there was something to compare with.

    Attributes:
        checkpoint: label.
        checks: in the order they were made.
        receipt: the comparison, or None.
        forward: the forward pass through the Triton kernels, or None.
        engines: what other engines make of it, where that was asked.
        versions: of the packages that took part.
    """

    checkpoint: str
    checks: tuple[Check, ...]
    receipt: Receipt | None = None
    forward: ForwardPass | None = None
    engines: tuple[Served, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """No check failed, the stated class was met (where it was measured), and engines whose
        interpreters were given compute the same.
        """
        failed = any(c.status == "fail" for c in self.checks) or any(e.failed for e in self.engines)
        return not failed and (self.receipt is None or self.receipt.met)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `validation.json` holds them."""
        return {"ok": self.ok, **asdict(self)}
