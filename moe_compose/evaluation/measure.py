"""`evaluate`: held-out loss of a checkpoint or a plan, and its distance to another one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_compose.calibration.texts import Texts, tokens_of
from moe_compose.calibration.tokenizer import vocabulary_of
from moe_compose.calibration.tokens import TokenSet
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import OptionError
from moe_compose.evaluation.options import EvaluateOptions
from moe_compose.evaluation.result import Evaluation, Greedy
from moe_compose.evaluation.rounds import Kept, key_of, rounds_of
from moe_compose.version import versions

if TYPE_CHECKING:
    from moe_compose.evaluation.sums import Sums
    from moe_compose.runtime import Runner

#: Tokens decoded greedily unless asked otherwise, and bytes of weights up to which.
GREEDY, GREEDY_BYTES = 16, 4 << 30

#: Tells how far it is: tokens done, tokens in all.
Progress = Callable[[int, int], None]


def evaluate(
    source: TensorSource,
    texts: Texts,
    *,
    against: TensorSource | None = None,
    options: EvaluateOptions | None = None,
    keep: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Held-out loss by domain; and with `against`, how far the model is from a reference.

    Models are streamed a layer at a time; with a reference, two layers are in memory at once, one
    of each. Neither logits nor hidden states are kept.

    Args:
        source: a checkpoint, or a plan that was never written.
        texts: held-out text; tokenised by the source's own tokenizer, unless it is tokens already.
        against: the reference, with the same vocabulary.
        options: how much, and how.
        keep: file for finished rounds, so that an interrupted evaluation can go on.
        resume: go on with what is in `keep`.
        progress: called after each round.

    Returns:
        The figures. They don't depend on `keep` and `resume`.

    Raises:
        OptionError: bad text, or vocabularies that differ.
        CheckpointError, UnsupportedError: a model that cannot be run here.
        WriteError: `keep` belongs to another evaluation.

    Example:
        >>> mc.evaluate(plan, ["Once upon a time ..."], against=moe).overall.kl  # doctest: +SKIP
    """
    options = options or EvaluateOptions()
    _check_vocabularies(source, against)
    tokens = tokens_of(source, texts, options, against)
    kept = Kept(keep, key_of(source, against, tokens, options), resume=resume)
    pair = _Pair(source, against, options)
    total = pair.sums(tokens)
    done = 0
    for i, part in enumerate(rounds_of(tokens)):
        if i == len(kept.rounds):
            kept.add(pair.round(part).to_json())
        total.add_json(kept.rounds[i])
        done += sum(part.tokens.values())
        if progress is not None:
            progress(done, sum(tokens.tokens.values()))
    greedy, notes = pair.greedy(tokens)
    kept.done()
    named = list(enumerate(tokens.domains))
    return Evaluation(
        checkpoint=source.label,
        against=None if against is None else against.label,
        domains={name: total.score([i]) for i, name in named},
        overall=total.score([i for i, _ in named]),
        layers=total.layer_scores(),
        greedy=tuple(greedy),
        notes=(*pair.notes, *notes),
        data={
            n: [asdict(f) for f in fs] for n, fs in zip(tokens.domains, tokens.files, strict=True)
        },
        options=asdict(options),
        versions=versions("moe-compose", "torch", "transformers"),
    )


def _check_vocabularies(source: TensorSource, against: TensorSource | None) -> None:
    if against is None:
        return
    mine, theirs = vocabulary_of(source.config), vocabulary_of(against.config)
    if mine != theirs:
        raise OptionError(
            f"the vocabularies differ ({against.label} {theirs}, {source.label} {mine}): their "
            "logits cannot be compared",
            hint="Evaluate each without a reference.",
        )


@dataclass
class _Pair:
    """A model and its reference, run."""

    source: TensorSource
    against: TensorSource | None
    options: EvaluateOptions

    def __post_init__(self) -> None:
        self.model = self._runner(self.source)
        self.reference = None if self.against is None else self._runner(self.against)
        self.layers, self.notes = 0, []
        if self.reference is not None:
            mine, theirs = len(self.model.layers), len(self.reference.layers)
            self.layers = mine if mine == theirs else 0
            if mine != theirs:
                self.notes = [f"layers are not compared: {theirs} in the reference, {mine} here"]

    def _runner(self, source: TensorSource) -> Runner:
        from moe_compose.runtime import Runner

        return Runner(source, dtype=self.options.dtype, device=self.options.device)

    def sums(self, tokens: TokenSet) -> Sums:
        """Sums over nothing yet."""
        from moe_compose.evaluation.sums import Sums

        return Sums(len(tokens.domains), self.layers, compared=self.reference is not None)

    def round(self, tokens: TokenSet) -> Sums:
        """One pass over some text."""
        from moe_compose.evaluation.meeting import run_beside

        sums, rows = self.sums(tokens), tokens.batches(self.options.batch)
        batches = [r.batch for r in rows]
        if self.reference is None:
            self.model.run(batches, logits=lambda i, x: sums.add_logits(rows[i], x, None))
            return sums

        def compare(index: int, layer: int | None, reference: Any, ours: Any) -> None:
            if layer is None:
                sums.add_logits(rows[index], ours, reference)
            else:
                sums.add_layer(layer, rows[index], reference, ours)

        run_beside(self.reference, self.model, batches, compare, layers=self.layers > 0)
        return sums

    def greedy(self, tokens: TokenSet) -> tuple[list[Greedy], list[str]]:
        """Where decoding parts ways, and what was left out."""
        from moe_compose.evaluation.greedy import divergence

        if self.reference is None or self.against is None:
            return [], []
        steps, size = self.options.greedy, sum(t.nbytes for t in self.against.tensors.values())
        if steps is None and size > GREEDY_BYTES:
            text = f"greedy decoding is left out: {GREEDY} passes over {size / 2**30:.0f} GiB"
            return [], [f"{text}; ask for it with --greedy {GREEDY}"]
        steps = GREEDY if steps is None else steps
        return (divergence(self.reference, self.model, tokens, steps) if steps else []), []
