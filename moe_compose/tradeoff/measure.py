"""A candidate's plan, and its distance to the original: nothing is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from moe_compose.architectures import MoE
from moe_compose.calibration.texts import Texts, tokens_of
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import OptionError
from moe_compose.evaluation.measure import evaluate
from moe_compose.evaluation.options import EvaluateOptions
from moe_compose.evaluation.result import Evaluation
from moe_compose.recovery.options import RefitOptions
from moe_compose.recovery.refit import refit
from moe_compose.surgery.plan import Plan
from moe_compose.surgery.prune_options import PruneOptions
from moe_compose.tradeoff.result import Candidate

if TYPE_CHECKING:
    from moe_compose.calibration.stats import ExpertStats
    from moe_compose.calibration.tokens import TokenSet
    from moe_compose.surgery.ranking import Ranking

    Evidence = ExpertStats | Ranking | Mapping[int, Sequence[int]] | None


@dataclass(frozen=True, eq=False)
class Bench:
    """What candidates are made from and held to.

    Attributes:
        source: the original.
        moe: what its config says of experts.
        held: text that they are judged on.
        options: how it is run.
        fitted: text that they are refitted to; None: they are not.
        refit: how.
        record: entries for the options of the pruning, as its record holds them.
    """

    source: TensorSource
    moe: MoE
    held: TokenSet
    options: EvaluateOptions
    fitted: TokenSet | None
    refit: RefitOptions
    record: Mapping[str, Any] = field(default_factory=dict)

    def plan(self, evidence: Evidence, options: PruneOptions) -> Plan:
        """A candidate."""
        from moe_compose.calibration.pruning import prune

        plan = prune(self.source, evidence, options)
        plan = replace(plan, options={**plan.options, **self.record})
        if self.fitted is None:
            return plan
        return refit(plan, self.source, self.fitted, self.refit)

    def measured(self, plan: Plan, options: PruneOptions) -> tuple[Candidate, Evaluation]:
        """What a candidate of these options costs and saves."""
        found = evaluate(plan, self.held, against=self.source, options=self.options)
        summary, overall = plan.summary(), found.overall
        assert overall.kl is not None and overall.top1 is not None
        assert options.keep is not None
        candidate = Candidate(
            criterion=options.criterion,
            keep=options.keep,
            share=options.keep / self.moe.num_experts,
            refitted=self.fitted is not None,
            parameters=summary.parameters.total,
            active=summary.parameters.active,
            bytes=summary.bytes,
            loss=overall.loss,
            kl=overall.kl,
            top1=overall.top1,
            domain_kl={n: s.kl for n, s in found.domains.items() if s.kl is not None},
            digest=plan.digest(),
        )
        return candidate, found


def bench(
    source: TensorSource,
    texts: Texts,
    options: EvaluateOptions | None,
    fitted: Any,
    refit: RefitOptions | None,
) -> Bench:
    """Tokenise, and see to it that nothing is judged on what it was fitted to.

    Args:
        source: the original.
        texts: held-out text.
        options: how it is run; greedy decoding is left out.
        fitted: text that candidates are refitted to; None: they are not.
        refit: how.

    Raises:
        OptionError: the two texts share a file or a sequence, or only one of `fitted` and `refit`
            is given.
    """
    from moe_compose.surgery.selection import moe_form

    if refit is not None and fitted is None:
        raise OptionError(
            "refitting needs text of its own",
            hint="Give some that the result is not judged on (--refit-on FILE).",
        )
    options = replace(options or EvaluateOptions(), greedy=0)
    held = tokens_of(source, texts, options)
    how = refit or RefitOptions()
    tokens = None
    if fitted is not None:
        tokens = tokens_of(source, fitted, how)
        check_apart(held, tokens)
    return Bench(source, moe_form(source)[1], held, options, tokens, how)


def check_apart(held: TokenSet, fitted: TokenSet) -> None:
    """Held-out text shares nothing with what was fitted to.

    Raises:
        OptionError: a file, or a sequence, is in both.
    """
    files = [{f.sha256: f.name for fs in x.files for f in fs} for x in (held, fitted)]
    both = sorted(files[0][digest] for digest in files[0].keys() & files[1].keys())
    same = len({s.ids for s in held.sequences} & {s.ids for s in fitted.sequences})
    if both or same:
        what = f"files {', '.join(both)}" if both else f"{same} sequences"
        raise OptionError(
            f"the held-out text shares {what} with the text that is refitted to: its figures would "
            "flatter",
            hint="Give texts that have nothing in common.",
        )
