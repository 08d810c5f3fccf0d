"""`refit`: new down-projections for the experts that are left, so that a layer returns what it
returned before.

Original and result run side by side, a layer of each in memory. Both get the original's inputs: a
layer's output in the result is overwritten with the original's before the next layer sees it. So
the result routes every token just as it would, on inputs that no earlier error has touched, and
whatever surgery the plan holds needs no code here. What a layer's routed experts are given and
return, in both, is kept until the layer is solved: tokens × D numbers, three times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import OptionError, UnsupportedError
from moe_compose.recovery.options import RefitOptions
from moe_compose.recovery.texts import files_of, held_out, uncovered
from moe_compose.surgery.plan import Plan, Preservation
from moe_compose.surgery.replace import ChangedWriter, replace_tensors

if TYPE_CHECKING:
    from torch import Tensor

    from moe_compose.calibration.texts import Texts
    from moe_compose.calibration.tokens import TokenSet
    from moe_compose.recovery.homes import Homes
    from moe_compose.recovery.layer import Refitted
    from moe_compose.runtime import Layer, Runner

#: What was refitted and what it brought, beside the result.
REPORT_NAME = "refit.json"

#: Told of a call of the experts: tokens, choices, dispatched weights, what is returned.
See = Callable[["Tensor", "Tensor", "Tensor", "Tensor"], None]

#: Tells how far it is: layers done, layers in all.
Progress = Callable[[int, int], None]


def refit(
    plan: Plan,
    source: TensorSource,
    texts: Texts,
    options: RefitOptions | None = None,
    *,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Refit the down-projections of a plan's experts to what its source's layers return.

    Ridge least squares per expert, experts in turn (see `ridge`); shapes stay, nothing is trained.
    A layer is changed only if its error falls on sequences that were not fitted to, and an expert
    only if at least as many tokens as it is wide are sent to it.

    Args:
        plan: an MoE with fewer experts.
        source: what it was made from.
        texts: documents, by domain or not, or a `TokenSet`; not those that it will be judged on.
        options: see `RefitOptions`.
        folder: a new one for the changed tensors, to be kept as long as the result is used; None: a
            temporary one, gone with the result.
        progress: told after every layer.

    Returns:
        A plan: the given one with those tensors replaced; `plan.reports["refit.json"]` says what
        each layer gained. The given plan itself if no layer gained anything.

    Raises:
        OptionError: too little text, or models that do not belong together.
        UnsupportedError: quantised experts, or experts that are not two matrices with an activation
            between them.

    Example:
        >>> small = refit(mc.prune(moe, stats, options), moe, texts)   # doctest: +SKIP
        >>> small.reports["refit.json"]["layers"]["0"]                 # doctest: +SKIP
        {'before': 0.51, 'after': 0.22, 'changed': True, ...}
    """
    from moe_compose.calibration.texts import tokens_of
    from moe_compose.recovery.homes import Homes
    from moe_compose.runtime import Runner

    options = options or RefitOptions()
    homes = Homes(plan)
    if homes.moe.routing.applied_to == "input":
        raise UnsupportedError(
            f"experts of {source.label} cannot be refitted: the router's weight multiplies their "
            "input, and what they return is not linear in it"
        )
    tokens = tokens_of(source, texts, options)
    held = held_out(tokens, options.held_out)
    models = [Runner(x, dtype=options.dtype, device=options.device) for x in (source, plan)]
    writer = ChangedWriter(plan.config, folder)
    try:
        run = _Run(homes, tokens, held, options, writer, progress)
        run.through(models[0], models[1])
        changed = writer.finish()
    except BaseException:
        writer.discard()
        raise
    report = run.report()
    if changed is None:
        return plan
    return replace_tensors(
        plan,
        changed,
        operation="refit",
        preservation=Preservation("none", run.summary()),
        options={"refit_tokens": options.tokens, "refit_on": files_of(tokens)},
        notes=(run.summary(), *uncovered(plan, tokens)),
        decided={"text": tokens.digest(), "layers": report["layers"]},
        reports={REPORT_NAME: report},
    )


@dataclass(slots=True)
class _Seen:
    """A layer's calls, batch by batch, without padding."""

    wanted: list[Tensor]
    given: list[tuple[Tensor, Tensor, Tensor, Tensor]]


class _Run:
    """One refit under way."""

    def __init__(
        self,
        homes: Homes,
        tokens: TokenSet,
        held: set[int],
        options: RefitOptions,
        writer: ChangedWriter,
        progress: Progress | None,
    ) -> None:
        import torch

        self._homes, self._options, self._writer = homes, options, writer
        self._progress = progress
        self._rows = tokens.batches(options.batch)
        self._tokens, self._held = tokens, held
        self._seen: dict[int, _Seen] = {}
        self._layers: dict[int, Refitted] = {}
        self._real = [r.real.flatten() for r in self._rows]
        parts = []
        for rows, real_T in zip(self._rows, self._real, strict=True):
            flags = torch.tensor([i in held for i in rows.sequence_B.tolist()])
            parts.append(flags[:, None].expand(rows.batch.ids.shape).flatten()[real_T])
        self._held_T = torch.cat(parts)

    def through(self, original: Runner, result: Runner) -> None:
        """Run both over all batches."""
        from moe_compose.evaluation.meeting import run_beside

        if len(original.layers) != len(result.layers):
            counts = f"{len(original.layers)} and {len(result.layers)}"
            raise OptionError(f"original and result must have the same layers ({counts})")

        def force(index: int, layer: int | None, reference: Tensor, ours: Tensor) -> None:
            ours.copy_(reference)

        run_beside(
            original,
            result,
            [r.batch for r in self._rows],
            force,
            layers=True,
            logits=False,
            on_layer=(self._watch_original, self._watch_result),
        )

    def report(self) -> dict[str, Any]:
        """For the record and the document beside the result."""
        return {
            "error": "‖y − ŷ‖ / ‖y‖ of the routed experts' output, on held-out sequences, given "
            "the original's inputs",
            "options": asdict(self._options),
            "tokens": {
                "fitted": int((~self._held_T).sum()),
                "held_out": int(self._held_T.sum()),
            },
            "layers": {str(i): found.to_json() for i, found in sorted(self._layers.items())},
        }

    def summary(self) -> str:
        """One sentence."""
        found = list(self._layers.values())
        changed = [x for x in found if x.changed]
        before = sum(x.before for x in found) / max(len(found), 1)
        after = sum(x.after if x.changed else x.before for x in found) / max(len(found), 1)
        text = (
            f"down-projections refitted in {len(changed)} of {len(found)} layers: error of the "
            f"routed output {before:.3f} → {after:.3f} (mean over layers, held-out sequences)"
        )
        left = sum(len(x.left) for x in found)
        return text + (f"; {left} experts had too few tokens" if left else "")

    def _watch_original(self, layer: Layer) -> AbstractContextManager[None] | None:
        def see(x: Tensor, ids: Tensor, gates: Tensor, y: Tensor) -> None:
            self._of(layer).wanted.append(y)

        return self._watched(layer, see)

    def _watch_result(self, layer: Layer) -> AbstractContextManager[None] | None:
        context = self._watched(layer, lambda *call: self._of(layer).given.append(call))

        @contextmanager
        def solved() -> Iterator[None]:
            assert context is not None
            with context:
                yield
            self._solve(layer)

        return None if context is None else solved()

    def _of(self, layer: Layer) -> _Seen:
        return self._seen.setdefault(layer.index, _Seen([], []))

    def _watched(self, layer: Layer, see: See) -> AbstractContextManager[None] | None:
        """Tell `see` of every call of a layer's experts, without padding."""
        if layer.index not in self._homes.moe.sparse_layers:
            return None
        if layer.experts is None:
            name = type(layer.module).__name__
            raise UnsupportedError(f"the experts of {name} cannot be watched, so not refitted")
        experts = layer.experts

        def ran(module: Any, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
            x, ids, gates = (*args, *kwargs.values())[:3]
            real_T = self._real[layer.index_of_batch].to(x.device)
            parts = (x.flatten(0, -2), ids.flatten(0, -2), gates.reshape(-1, ids.shape[-1]))
            seen = [part[real_T] for part in (*parts, output.flatten(0, -2))]
            see(seen[0], seen[1], seen[2], seen[3])

        @contextmanager
        def watching() -> Iterator[None]:
            handle = experts.register_forward_hook(ran, with_kwargs=True)
            try:
                yield
            finally:
                handle.remove()

        return watching()

    def _solve(self, layer: Layer) -> None:
        import torch

        from moe_compose.recovery.layer import hidden_of_layer, refit_layer
        from moe_compose.recovery.ridge import Routed

        seen = self._seen.pop(layer.index)
        x_TD, ids_TK, gates_TK, had_TD = (torch.cat(p) for p in zip(*seen.given, strict=True))
        wanted_TD = torch.cat(seen.wanted)
        del seen
        routed = Routed(x_TD, ids_TK, gates_TK, wanted_TD - had_TD, hidden_of_layer(layer))
        held_T = self._held_T.to(x_TD.device)
        found, new = refit_layer(layer, routed, wanted_TD, held_T, self._homes, self._options)
        self._layers[layer.index] = found
        if found.changed:
            self._writer.add(new.tensors, new.rows)
        if self._progress is not None:
            self._progress(len(self._layers), len(self._homes.moe.sparse_layers))
