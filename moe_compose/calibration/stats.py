"""`ExpertStats`: what calibration measured, per layer, expert and domain.

On disk a folder:

    stats.json              what was measured on what: checkpoint, data, tokens, versions
    stats.safetensors       the sums: `{layer}.{field of LayerStats}`
    similarity-00003.safetensors, ...    with `similarity`, one a layer (see `similarity.py`)

Sums are additive: two processes that each took half of the text give, summed, what one would have
given. The two halves of the data are kept apart, so that it can be said whether there was enough.

Shape suffixes: E experts, H = 2 halves, C domains, M measures (`MEASURES`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_compose.calibration.record import Record, fingerprint
from moe_compose.calibration.similarity import Similarity
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import CheckpointError, OptionError

if TYPE_CHECKING:
    from moe_compose.calibration.criteria import Convergence

#: Sums over the (token, expert) pairs that the router chose, with g the dispatched weight, f the
#: expert's output before it, and w the token's weight in EASY-EP (2504.06792):
#: n, Σg, Σ‖f‖, Σ‖f‖², Σg‖f‖, Σw·g‖f‖.
MEASURES = ("count", "gate", "norm", "norm_sq", "gated_norm", "easy_ep")

#: Fields of `LayerStats` of which two are joined by the larger one.
_MAXIMA = ("peak_HCE", "input_peak_HC")

#: Fields that are of one sample of tokens, which one process draws.
_SAMPLED = ("loo_HCE", "greedy_3E")


@dataclass(frozen=True, kw_only=True, eq=False)
class LayerStats:
    """One layer's sums; all fp64, and laid out in memory as on the disk: what is computed of them
    later (a sum over domains, a criterion) then adds in one order, whether they were measured here
    or read, and comes to the same bits.

    Attributes:
        sums_HCME: the measures.
        peak_HCE: max |f|, the largest absolute element of an expert's outputs.
        together_EE: tokens for which both experts were chosen; on the diagonal, for which one was.
        input_HC: Σ‖x‖ over the tokens, x what the experts are given.
        input_peak_HC: max ‖x‖.
        probability_HCE: Σp, the router's distribution over the experts (softmax of the logits, or
            other scores divided by their sum); None where the router could not be read.
        entropy_HC: Σ −Σ_e p_e ln p_e over the tokens, nats.
        agree_HC: chosen pairs that are among the top-k of the logits: what a correction bias, or
            groups, leave of them.
        logit_E, logit_EE: Σz and Σ z zᵀ of the router's logits.
        loo_HCE: Σ‖y(without e) − y‖² over a sample of tokens, y what the routed experts return;
            None where experts were not masked.
        greedy_3E: in which step each expert goes (`masked_error.removal_steps`): by the sample, and
            by each half of it; None also with too many experts.
    """

    sums_HCME: Tensor  # noqa: N815
    peak_HCE: Tensor  # noqa: N815
    together_EE: Tensor  # noqa: N815
    input_HC: Tensor  # noqa: N815
    input_peak_HC: Tensor  # noqa: N815
    probability_HCE: Tensor | None = None  # noqa: N815
    entropy_HC: Tensor | None = None  # noqa: N815
    agree_HC: Tensor | None = None  # noqa: N815
    logit_E: Tensor | None = None  # noqa: N815
    logit_EE: Tensor | None = None  # noqa: N815
    loo_HCE: Tensor | None = None  # noqa: N815
    greedy_3E: Tensor | None = None  # noqa: N815

    def __post_init__(self) -> None:
        """A table that was measured as the transpose of another is stored as a table of its own."""
        for name, table in self.tensors.items():
            object.__setattr__(self, name, table.contiguous())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that exist, by field."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: t for name, t in found.items() if t is not None}

    def __add__(self, other: LayerStats) -> LayerStats:
        mine, theirs = self.tensors, other.tensors
        found = {
            name: torch.maximum(mine[name], theirs[name])
            if name in _MAXIMA
            else mine[name] + theirs[name]
            for name in mine.keys() & theirs.keys()
        }
        sampled = {name: t for name, t in (theirs | mine).items() if name in _SAMPLED}
        return LayerStats(**found | sampled)


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertStats:
    """Sums by layer, and what they are of. Never changed once made.

    Domains are named; None means all of them. Halves are 0 and 1; None means both.

    Attributes:
        record: what was measured on what.
        layers: layer index → its sums, sparse layers only.
        folder: where similarities lie; None if none were gathered.

    Example:
        >>> stats = ExpertStats.load("stats/")                       # doctest: +SKIP
        >>> (stats.sums(3)["gated_norm"] / stats.sums(3)["count"])   # REAP    # doctest: +SKIP
        tensor([0.5282, 0.9751, ...], dtype=torch.float64)
    """

    record: Record
    layers: Mapping[int, LayerStats]
    folder: Path | None = None

    @property
    def domains(self) -> tuple[str, ...]:
        return self.record.domains

    def experts(self, layer: int) -> int:
        """How many the layer has."""
        return self._layer(layer).sums_HCME.shape[-1]

    def tokens(self, domain: str | None = None, half: int | None = None) -> int:
        """Tokens that were run, padding not counted."""
        table = torch.tensor(self.record.tokens, dtype=torch.int64)
        return int(self._picked(table, domain, half).sum())

    def sums(
        self, layer: int, domain: str | None = None, half: int | None = None
    ) -> dict[str, Tensor]:
        """Measure → `[E]`, fp64; `loo` among them where experts were masked.

        Raises:
            OptionError: no such layer, domain or half.
        """
        found = self._layer(layer)
        picked = self._picked(found.sums_HCME, domain, half)
        sums = dict(zip(MEASURES, picked.sum((0, 1)), strict=True))
        if found.loo_HCE is not None:
            sums["loo"] = self._picked(found.loo_HCE, domain, half).sum((0, 1))
        return sums

    def peak(self, layer: int, domain: str | None = None, half: int | None = None) -> Tensor:
        """max |f| of every expert, `[E]`; 0 where it was never chosen."""
        return self._picked(self._layer(layer).peak_HCE, domain, half).amax((0, 1))

    def load_share(self, layer: int, domain: str | None = None) -> Tensor:
        """The part of all chosen pairs that each expert got, `[E]`; 1/E each if it were even."""
        count = self.sums(layer, domain)["count"]
        return count / count.sum().clamp(min=1)

    def dead(self, layer: int, domain: str | None = None) -> tuple[int, ...]:
        """Experts that no token was sent to."""
        return tuple((self.sums(layer, domain)["count"] == 0).nonzero().flatten().tolist())

    def entropy(self, layer: int, domain: str | None = None) -> tuple[float, float] | None:
        """Of the router, in nats: the mean over tokens, and that of the mean distribution; None
        where the router could not be read. The second is at most ln E; the lower the first beneath
        it, the surer is the router of each token.
        """
        found = self._layer(layer)
        if found.entropy_HC is None or found.probability_HCE is None:
            return None
        tokens = max(self.tokens(domain), 1)
        mean_E = self._picked(found.probability_HCE, domain, None).sum((0, 1)) / tokens
        each = float(self._picked(found.entropy_HC, domain, None).sum()) / tokens
        return each, float(torch.special.entr(mean_E).sum())

    def agreement(self, layer: int, domain: str | None = None) -> float | None:
        """Share of chosen experts that are among the top-k of the router's logits: below 1 where a
        correction bias, or groups, decide otherwise.
        """
        agree = self._layer(layer).agree_HC
        if agree is None:
            return None
        pairs = float(self.sums(layer, domain)["count"].sum())
        return float(self._picked(agree, domain, None).sum()) / max(pairs, 1.0)

    def specialisation(self, layer: int) -> Tensor:
        """Domain by expert, `[C, E]`: an expert's share of the domain's pairs, divided by its
        mean share over the domains. 1 everywhere if domains make no difference, at most C.
        """
        share_CE = torch.stack([self.load_share(layer, d) for d in self.domains])
        mean_E = share_CE.mean(0)
        return torch.where(mean_E > 0, share_CE / mean_E.clamp(min=1e-300), torch.ones(()))

    def similarity(self, layer: int) -> Similarity:
        """What was gathered on the sample of tokens.

        Raises:
            OptionError: it was not asked for, or there is no such layer.
        """
        self._layer(layer)
        if self.folder is None or not self.record.sample:
            raise OptionError(
                "these statistics hold no similarities of experts",
                hint="Gather them with similarity=True (--similarity), into a folder.",
            )
        return Similarity.load(self.folder, layer)

    def convergence(self, ratio: float = 0.5) -> dict[int, Convergence]:
        """Layer → how far the two halves of the data agree: whether there was enough of it.

        Args:
            ratio: of the experts that would be kept.
        """
        from moe_compose.calibration.criteria import convergence

        return {layer: convergence(self, layer, ratio) for layer in self.layers}

    def check(self, source: TensorSource, *, weights: bool = False) -> ExpertStats:
        """Hold the statistics to a checkpoint; returns them.

        Args:
            source: what they are about to be used on.
            weights: also read the routers and compare them: another fine-tune has the same names
                and shapes.

        Raises:
            CheckpointError: they were measured on another one.
        """
        mine, other = self.record.source, source.digest()
        if other != self.record.digest:
            raise CheckpointError(
                f"these statistics were measured on {mine} ({self.record.digest[:8]}), not on "
                f"{source.label} ({other[:8]})",
                hint="Measure this one: moe-compose calibrate.",
            )
        if weights and fingerprint(source) != self.record.routers:
            raise CheckpointError(
                f"{source.label} has the names and shapes of {mine}, which these statistics were "
                "measured on, but other weights",
                hint="Measure this one: moe-compose calibrate.",
            )
        return self

    def __add__(self, other: ExpertStats) -> ExpertStats:
        """Both together: of the same checkpoint and the same domains, on other text.

        Raises:
            OptionError: they are of different checkpoints, layers, domains or arithmetic, or hold
                similarities, which are of one sample.
        """
        if self.layers.keys() != other.layers.keys():
            raise OptionError("the two statistics are of different layers")
        return replace(
            self,
            record=self.record + other.record,
            layers={i: self.layers[i] + other.layers[i] for i in self.layers},
            folder=None,
        )

    def save(self, folder: str | Path) -> Path:
        """Write into a new folder; returns it. See `files.save`."""
        from moe_compose.calibration.files import save

        return save(self, Path(folder))

    @classmethod
    def load(cls, folder: str | Path) -> ExpertStats:
        """Read a folder. See `files.load`."""
        from moe_compose.calibration.files import load

        return load(Path(folder))

    def _layer(self, layer: int) -> LayerStats:
        if layer not in self.layers:
            known = ", ".join(map(str, self.layers))
            raise OptionError(f"layer {layer} has no experts; those that have: {known}")
        return self.layers[layer]

    def _picked(self, table: Tensor, domain: str | None, half: int | None) -> Tensor:
        """The part of `[H, C, ...]` that is asked for, still with both dimensions."""
        if domain is not None and domain not in self.domains:
            raise OptionError(f"no domain {domain!r}; there are {', '.join(self.domains)}")
        if half not in (None, 0, 1):
            raise OptionError(f"half ({half}) must be 0, 1 or None")
        halves = slice(None) if half is None else slice(half, half + 1)
        index = 0 if domain is None else self.domains.index(domain)
        columns = slice(None) if domain is None else slice(index, index + 1)
        return table[halves, columns]


def add_all(parts: Sequence[ExpertStats]) -> ExpertStats:
    """The sum of statistics that several processes gathered, in their order.

    Raises:
        OptionError: none, or of different things.
    """
    remaining: Iterator[ExpertStats] = iter(parts)
    total = next(remaining, None)
    if total is None:
        raise OptionError("there are no statistics to add")
    for part in remaining:
        total = total + part
    return total
