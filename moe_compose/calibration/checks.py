"""What can be known to go wrong before anything runs."""

from __future__ import annotations

from moe_compose.architectures import MoE, find
from moe_compose.calibration.calls import experts_in
from moe_compose.calibration.options import CalibrateOptions
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import UnsupportedError
from moe_compose.runtime import Runner


def moe_of(source: TensorSource) -> MoE:
    """What the config says of the experts.

    Raises:
        UnsupportedError: a dense family, or one without a form.
    """
    form = find(source.config)
    if form is None or not form.is_moe:
        family = source.config.get("model_type")
        known = "has no experts" if form is not None else "is a family that moe-compose knows not"
        raise UnsupportedError(
            f"{source.label} ({family}) {known}: there is nothing to measure",
            hint="moe-compose ls architectures lists the families.",
        )
    return form.moe(source.config)


def check_layers(runner: Runner, moe: MoE, source: TensorSource, options: CalibrateOptions) -> None:
    """Every sparse layer's experts can be watched.

    Raises:
        UnsupportedError: some cannot, or cannot run one by one, which similarities need, or cannot
            be masked, where that is asked for.
    """
    hidden = [i for i in moe.sparse_layers if experts_in(runner.layers[i], moe) is None]
    if hidden:
        name = type(runner.model).__name__
        raise UnsupportedError(
            f"the experts of {source.label} cannot be watched: {name} computes those of layers "
            f"{', '.join(map(str, hidden))} in a way of its own, where a token's expert and weight "
            "are not told to them"
        )
    if options.similarity and moe.routing.applied_to == "input":
        raise UnsupportedError(
            f"similarities of {source.label} cannot be gathered: its experts do not run one by one",
            hint="Leave --similarity out.",
        )
    if options.loo_tokens and (reason := _unmaskable(moe)):
        raise UnsupportedError(
            f"the experts of {source.label} cannot be masked one by one: {reason}",
            hint="Leave --loo-tokens out.",
        )


def _unmaskable(moe: MoE) -> str:
    """Why what a layer does without an expert cannot be told from its parts; empty if it can."""
    if moe.routing.applied_to == "input":
        return "their weight multiplies their input, so they do not run one by one"
    if moe.routing.hashed_layers:
        return "some layers route by token id"
    if moe.num_experts <= moe.top_k:
        return f"the router picks all {moe.num_experts} of them"
    return ""
