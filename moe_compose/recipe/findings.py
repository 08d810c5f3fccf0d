"""Steps that make no model: they measure one, write about it, or take something out of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_compose.checkpoint.copying import os_errors, write_file
from moe_compose.errors import CheckpointError, OptionError, WriteError
from moe_compose.recipe.acts import routing, texts_of
from moe_compose.recipe.inputs import by_name
from moe_compose.recipe.recovery import refit_options, refit_text
from moe_compose.recipe.state import State, place_of

if TYPE_CHECKING:
    from moe_compose.calibration.data import Domain
    from moe_compose.calibration.options import CalibrateOptions
    from moe_compose.calibration.quant_options import QuantPlanOptions
    from moe_compose.calibration.quantisation import QuantPlan
    from moe_compose.calibration.stats import ExpertStats
    from moe_compose.checkpoint.source import TensorSource
    from moe_compose.evaluation.options import EvaluateOptions
    from moe_compose.evaluation.result import Evaluation
    from moe_compose.surgery.plan import Plan
    from moe_compose.tradeoff.result import Sweep


def measure(
    state: State, options: CalibrateOptions, given: Mapping[str, Any]
) -> ExpertStats | None:
    """Statistics of a model's experts, for the steps that follow."""
    from moe_compose.calibration.resume import check_place

    options.check()
    place = given.get("save")
    if place is not None and state.dry and not state.resume:
        check_place(place, resume=False, overwrite=state.overwrite)
    texts, source = texts_of(given), state.source(given)
    state.model, state.measuring, state.measured = state.model or source, options, source.digest()
    if state.dry:
        return None
    if place is None and state.folder is not None:
        place = state.folder / "stats"
    state.stats = _kept(state, place, source, texts, options) or measured(
        state, place, source, texts, options
    )
    return state.stats


def _kept(
    state: State,
    place: Path | None,
    source: TensorSource,
    texts: tuple[Domain, ...],
    options: CalibrateOptions,
) -> ExpertStats | None:
    """What an interrupted run measured to the end.

    Raises:
        WriteError: what is there was measured on something else.
    """
    from moe_compose.calibration import files
    from moe_compose.calibration.pruning import check_statistics
    from moe_compose.calibration.stats import ExpertStats
    from moe_compose.calibration.texts import tokens_of

    if not state.resume or place is None or not files.is_stats(place):
        return None
    found, tokens = ExpertStats.load(place), tokens_of(source, texts, options)
    check_statistics(found, source)
    every = sum(tokens.tokens.values())
    sample = min(options.sample, every) if options.similarity else 0
    asked = (tokens.digest(), sample, min(options.loo_tokens, every))
    if asked != (found.record.text, found.record.sample, found.record.loo_tokens):
        raise WriteError(
            f"{place} was measured on other text, on another draw of it, or otherwise",
            hint="Give another place, or start again with --overwrite.",
        )
    return found


def measured(
    state: State,
    place: Path | None,
    source: TensorSource,
    texts: tuple[Domain, ...],
    options: CalibrateOptions,
) -> ExpertStats:
    """Carry a calibration out."""
    from moe_compose.calibration.calibrate import calibrate

    with state.watch.counting(f"measuring {source.label}", "tokens × layers") as count:
        return calibrate(
            source,
            texts,
            options,
            output=place,
            resume=state.resume,
            overwrite=state.overwrite,
            progress=count and (lambda p: count(p.done, p.total)),
        )


def judge(state: State, options: EvaluateOptions, given: Mapping[str, Any]) -> Evaluation | None:
    """Held-out loss, and the distance to another model."""
    from moe_compose.evaluation.measure import evaluate
    from moe_compose.reporting.documents import encode

    path = _free(given, "out", state, ".json")
    texts, source = texts_of(given), state.source(given)
    against = state.open(given["against"]) if "against" in given else None
    if state.dry:
        return None
    beside = "" if against is None else f" beside {against.label}"
    with state.watch.counting(f"evaluating {source.label}{beside}", "tokens") as count:
        found = evaluate(
            source,
            texts,
            against=against,
            options=options,
            keep=None if path is None else path.with_name(f"{path.name}.partial"),
            resume=state.resume,
            progress=count,
        )
    if path is not None:
        write_file(path, encode(found.to_json()))
    return found


def weigh(state: State, options: EvaluateOptions, given: Mapping[str, Any]) -> Sweep | None:
    """Quality against size of pruned models that are never written."""
    from moe_compose.reporting.documents import encode
    from moe_compose.reporting.sweep_plot import check_picture, draw_sweep
    from moe_compose.surgery.prune_options import WITHOUT_STATS
    from moe_compose.tradeoff.sweep import sweep

    asked = _asked(options, given)
    fitted = refit_text(given)
    path, picture = _free(given, "out", state, ".json"), _free(given, "plot", state)
    if picture is not None:
        check_picture(picture)
    texts, source = texts_of(given), state.source(given)
    stats = state.statistics(given, source)
    needy = [c for c in asked.criteria if c not in WITHOUT_STATS]
    if needy and not state.measures(given):
        raise OptionError(
            f"criteria {', '.join(needy)} need statistics: moe-compose calibrate makes them",
            hint="Give them (--stats FOLDER), or, in a recipe, a calibrate step before.",
        )
    if state.dry:
        return None
    with state.watch.counting(f"evaluating candidates of {source.label}", "candidates") as count:
        found = sweep(
            source,
            stats,
            texts,
            asked,
            evaluation=options,
            refit=refit_options(given) if given.get("refit") else None,
            refit_on=fitted,
            progress=count,
        )
    if path is not None:
        write_file(path, encode(found.to_json()))
    if picture is not None:
        draw_sweep(found, picture)
    return found


def _asked(options: EvaluateOptions, given: Mapping[str, Any]) -> Any:
    """What a sweep is of."""
    from moe_compose.tradeoff.options import SweepOptions

    asked = {n: given[n] for n in ("ratios", "criteria", "max_kl") if n in given}
    try:
        if "ratios" in asked:
            asked["ratios"] = tuple(float(x) for x in asked["ratios"].split(",") if x)
    except ValueError as e:
        raise OptionError(f"ratios ({asked['ratios']}) is no list such as 0.125,0.25,0.5") from e
    if "criteria" in asked:
        asked["criteria"] = tuple(filter(None, asked["criteria"].split(",")))
    return SweepOptions(seed=options.seed, **asked)


def plan_bits(state: State, options: QuantPlanOptions, given: Mapping[str, Any]) -> Any:
    """How many bits each expert needs."""
    from moe_compose.calibration.quantisation import plan_quantisation
    from moe_compose.reporting.quant_recipe import check_quant_folder, write_quant_plan

    source, folder = state.source(given), given.get("out")
    if folder is not None:
        check_quant_folder(folder, overwrite=state.overwrite or state.resume)
    if not state.measures(given):
        raise OptionError("quant-plan needs statistics: a calibrate step before it, or stats")
    stats = state.statistics(given, source)
    if state.dry:
        return None
    assert stats is not None
    plan: QuantPlan = plan_quantisation(source, stats, options)
    if folder is not None:
        write_quant_plan(plan, folder, overwrite=True)
    return plan


def tell(state: State, options: None, given: Mapping[str, Any]) -> Path | None:
    """One HTML page about a model."""
    from moe_compose.calibration.stats import ExpertStats
    from moe_compose.checkpoint.reader import Checkpoint
    from moe_compose.reporting.report import check_page, write_report
    from moe_compose.surgery.history import read_json

    source, page = state.source(given), _free(given, "out", state)
    check_page(given["out"])
    coming = state.saved
    if "source" in given:
        coming = place_of(given["source"]) in state.promised
    if not (isinstance(source, Checkpoint) or (state.dry and coming)):
        raise OptionError(
            "report is about a checkpoint that is written",
            hint="Let the step before it say save: FOLDER, or make it the last one.",
        )
    if state.dry:
        return None
    assert isinstance(source, Checkpoint)
    assert page is not None
    sweep = given.get("sweep")
    found = None if sweep is None else read_json(sweep, sweep.parent.name)
    if found is not None and not isinstance(found, dict):
        raise CheckpointError(f"{sweep} is no sweep", hint="Give the file that sweep --out wrote.")
    stats = ExpertStats.load(given["stats"]) if "stats" in given else None
    write_report(source, page, stats=stats, sweep=found, overwrite=state.overwrite or state.resume)
    return page


def pack(state: State, options: None, given: Mapping[str, Any]) -> Plan:
    """One expert as a small checkpoint of its own."""
    from moe_compose.checkpoint.writer import check_destination
    from moe_compose.composition.pack import pack_expert, pack_unmeasured

    folder, source = given["save"], state.source(given)
    base = state.open(given["base"]) if "base" in given else None
    texts = by_name(given.get("data", ()), "text").get("text")
    expert = given.get("expert")
    names: dict[str, Any] = {n: given.get(n) for n in ("name", "target")}
    if state.dry:
        plan = pack_unmeasured(source, expert, base=base, **names)
        if not state.resume:
            check_destination(plan, folder, overwrite=state.overwrite)
        return plan
    with state.layers("measuring router inputs") as count:
        plan = pack_expert(
            source,
            expert,
            base=base,
            texts=texts,
            routing=routing(given),
            progress=count,
            **names,
        )
    _write(state, plan, folder)
    return plan


def _write(state: State, plan: Plan, folder: Path) -> None:
    """A plan of something that is no whole model."""
    from moe_compose.checkpoint import writer
    from moe_compose.reporting.documents import encode

    documents = {name: encode(value) for name, value in plan.reports.items()}
    with state.writing(folder) as progress:
        writer.write(
            plan,
            folder,
            overwrite=state.overwrite,
            resume=state.resume,
            documents=documents,
            progress=progress,
        )


def _free(given: Mapping[str, Any], name: str, state: State, ending: str = "") -> Path | None:
    """A file that may be written, its folder made; asked before anything takes long.

    Raises:
        OptionError: it is a folder, or its name promises something else than what is written.
        WriteError: it is there, or its folder cannot be made.
    """
    path: Path | None = given.get(name)
    if path is None:
        return None
    if not path.name or path.is_dir():
        raise OptionError(f"--{name} ({path}) is a folder", hint="Name a file.")
    begun = path.with_name(f"{path.name}.partial").exists()
    again = state.overwrite or (state.resume and (begun or not state.alone))
    if path.exists() and not again:
        raise WriteError(f"{path} is there already", hint="Replace it with --overwrite.")
    if not path.name.lower().endswith(ending):
        raise OptionError(f"--{name} ({path}) must end in {ending}, which is what is written")
    if not state.dry:
        with os_errors(f"write {path}"):
            path.absolute().parent.mkdir(parents=True, exist_ok=True)
    return path
