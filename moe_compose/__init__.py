"""moe-compose: surgery on mixture-of-experts checkpoints, exact and one tensor at a time.

Example:
    >>> import moe_compose as mc
    >>> dense = mc.Checkpoint.open("Qwen/Qwen3-0.6B")  # doctest: +SKIP
    >>> plan = mc.upcycle(dense, mc.UpcycleOptions(num_experts=8, top_k=2))  # doctest: +SKIP
    >>> moe = mc.write(plan, "out/")  # doctest: +SKIP
    >>> report = mc.validate(moe, against=dense, preservation=plan.preservation)  # doctest: +SKIP

Names are loaded when they are first used, so that `import moe_compose` costs next to nothing and
reading headers or planning never waits for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moe_compose.version import __version__

if TYPE_CHECKING:
    from moe_compose import kernels as kernels
    from moe_compose import training as training
    from moe_compose.calibration.aimer import rank_by_weights
    from moe_compose.calibration.calibrate import calibrate
    from moe_compose.calibration.data import read_texts
    from moe_compose.calibration.merging import group_and_align, merge
    from moe_compose.calibration.options import CalibrateOptions
    from moe_compose.calibration.pruning import prune
    from moe_compose.calibration.quant_options import QuantPlanOptions
    from moe_compose.calibration.quantisation import QuantPlan, plan_quantisation
    from moe_compose.calibration.sequence import merge_in_sequence
    from moe_compose.calibration.stats import ExpertStats
    from moe_compose.checkpoint.reader import Checkpoint
    from moe_compose.composition.change import add_expert, remove_expert, swap_expert
    from moe_compose.composition.compose import compose
    from moe_compose.composition.initialise import route_by_text
    from moe_compose.composition.options import RoutingOptions
    from moe_compose.composition.pack import pack_expert
    from moe_compose.composition.statistics import RouterStats
    from moe_compose.errors import (
        CheckpointError,
        ConditionError,
        MoeComposeError,
        OptionError,
        PlanError,
        UnsupportedError,
        WriteError,
    )
    from moe_compose.evaluation.measure import evaluate
    from moe_compose.evaluation.options import EvaluateOptions
    from moe_compose.evaluation.result import Evaluation
    from moe_compose.recipe.reading import Recipe, read_recipe
    from moe_compose.recipe.running import rehearse, run_recipe
    from moe_compose.recipe.state import Watch
    from moe_compose.recovery.options import RefitOptions
    from moe_compose.recovery.refit import refit
    from moe_compose.reporting.card import model_card
    from moe_compose.reporting.diff import diff
    from moe_compose.reporting.difference import Difference
    from moe_compose.reporting.inspect import inspect
    from moe_compose.reporting.inspection import Inspection
    from moe_compose.reporting.publish import record_validation, write
    from moe_compose.reporting.quant_recipe import write_quant_plan
    from moe_compose.reporting.report import html_report, write_report
    from moe_compose.surgery.anchor import anchor
    from moe_compose.surgery.compose_options import ComposeOptions
    from moe_compose.surgery.donors import Donor
    from moe_compose.surgery.expand import expand
    from moe_compose.surgery.expert_options import (
        AddOptions,
        AnchorOptions,
        ExpandOptions,
        RemoveOptions,
        SwapOptions,
    )
    from moe_compose.surgery.extract import extract
    from moe_compose.surgery.extract_options import ExtractOptions
    from moe_compose.surgery.groups import ExpertGroups, Grouping
    from moe_compose.surgery.merge_options import MergeOptions
    from moe_compose.surgery.plan import Plan
    from moe_compose.surgery.prune_options import PruneOptions
    from moe_compose.surgery.ranking import Ranking
    from moe_compose.surgery.replace import Changed, replace_tensors
    from moe_compose.surgery.upcycle import upcycle
    from moe_compose.surgery.upcycle_options import UpcycleOptions
    from moe_compose.tradeoff.fewest import fewest
    from moe_compose.tradeoff.options import SweepOptions
    from moe_compose.tradeoff.result import Sweep
    from moe_compose.tradeoff.sweep import sweep
    from moe_compose.training.options import TrainOptions
    from moe_compose.training.train import train_router
    from moe_compose.validation import validate
    from moe_compose.validation.report import ValidationReport

#: Public name → the module it lives in, in reading order.
_HOME = {
    "Checkpoint": "checkpoint.reader",
    "inspect": "reporting.inspect",
    "Inspection": "reporting.inspection",
    "UpcycleOptions": "surgery.upcycle_options",
    "upcycle": "surgery.upcycle",
    "ComposeOptions": "surgery.compose_options",
    "compose": "composition.compose",
    "RoutingOptions": "composition.options",
    "RouterStats": "composition.statistics",
    "route_by_text": "composition.initialise",
    "Donor": "surgery.donors",
    "AnchorOptions": "surgery.expert_options",
    "anchor": "surgery.anchor",
    "AddOptions": "surgery.expert_options",
    "add_expert": "composition.change",
    "SwapOptions": "surgery.expert_options",
    "swap_expert": "composition.change",
    "RemoveOptions": "surgery.expert_options",
    "remove_expert": "composition.change",
    "ExpandOptions": "surgery.expert_options",
    "expand": "surgery.expand",
    "ExtractOptions": "surgery.extract_options",
    "extract": "surgery.extract",
    "pack_expert": "composition.pack",
    "Plan": "surgery.plan",
    "write": "reporting.publish",
    "validate": "validation",
    "ValidationReport": "validation.report",
    "record_validation": "reporting.publish",
    "read_texts": "calibration.data",
    "CalibrateOptions": "calibration.options",
    "calibrate": "calibration.calibrate",
    "ExpertStats": "calibration.stats",
    "PruneOptions": "surgery.prune_options",
    "prune": "calibration.pruning",
    "Ranking": "surgery.ranking",
    "rank_by_weights": "calibration.aimer",
    "MergeOptions": "surgery.merge_options",
    "merge": "calibration.merging",
    "merge_in_sequence": "calibration.sequence",
    "group_and_align": "calibration.merging",
    "ExpertGroups": "surgery.groups",
    "Grouping": "surgery.groups",
    "Changed": "surgery.replace",
    "replace_tensors": "surgery.replace",
    "RefitOptions": "recovery.options",
    "refit": "recovery.refit",
    "TrainOptions": "training.options",
    "train_router": "training.train",
    "EvaluateOptions": "evaluation.options",
    "evaluate": "evaluation.measure",
    "Evaluation": "evaluation.result",
    "SweepOptions": "tradeoff.options",
    "sweep": "tradeoff.sweep",
    "Sweep": "tradeoff.result",
    "fewest": "tradeoff.fewest",
    "Recipe": "recipe.reading",
    "read_recipe": "recipe.reading",
    "rehearse": "recipe.running",
    "run_recipe": "recipe.running",
    "Watch": "recipe.state",
    "diff": "reporting.diff",
    "Difference": "reporting.difference",
    "html_report": "reporting.report",
    "write_report": "reporting.report",
    "QuantPlanOptions": "calibration.quant_options",
    "plan_quantisation": "calibration.quantisation",
    "QuantPlan": "calibration.quantisation",
    "write_quant_plan": "reporting.quant_recipe",
    "model_card": "reporting.card",
    "MoeComposeError": "errors",
    "OptionError": "errors",
    "CheckpointError": "errors",
    "ConditionError": "errors",
    "UnsupportedError": "errors",
    "PlanError": "errors",
    "WriteError": "errors",
}

#: Subpackages that are used by name: `mc.kernels.moe_forward(...)`.
_ROOMS = ("kernels", "training")

__all__ = [  # noqa: RUF022 - reading order
    "Checkpoint",
    "inspect",
    "Inspection",
    "UpcycleOptions",
    "upcycle",
    "ComposeOptions",
    "compose",
    "RoutingOptions",
    "RouterStats",
    "route_by_text",
    "Donor",
    "AnchorOptions",
    "anchor",
    "AddOptions",
    "add_expert",
    "SwapOptions",
    "swap_expert",
    "RemoveOptions",
    "remove_expert",
    "ExpandOptions",
    "expand",
    "ExtractOptions",
    "extract",
    "pack_expert",
    "Plan",
    "write",
    "validate",
    "ValidationReport",
    "record_validation",
    "read_texts",
    "CalibrateOptions",
    "calibrate",
    "ExpertStats",
    "PruneOptions",
    "prune",
    "Ranking",
    "rank_by_weights",
    "MergeOptions",
    "merge",
    "merge_in_sequence",
    "group_and_align",
    "ExpertGroups",
    "Grouping",
    "Changed",
    "replace_tensors",
    "RefitOptions",
    "refit",
    "TrainOptions",
    "train_router",
    "EvaluateOptions",
    "evaluate",
    "Evaluation",
    "SweepOptions",
    "sweep",
    "Sweep",
    "fewest",
    "Recipe",
    "read_recipe",
    "rehearse",
    "run_recipe",
    "Watch",
    "diff",
    "Difference",
    "html_report",
    "write_report",
    "QuantPlanOptions",
    "plan_quantisation",
    "QuantPlan",
    "write_quant_plan",
    "model_card",
    "MoeComposeError",
    "OptionError",
    "CheckpointError",
    "ConditionError",
    "UnsupportedError",
    "PlanError",
    "WriteError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"{__name__}.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
