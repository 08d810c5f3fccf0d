"""What the steps of a recipe that make a model do: each takes where the recipe stands, its options,
and what else is given, and returns a plan. The commands do the same, through the same functions.

In a dry run (`state.dry`) a plan has the names, shapes and options of the real one; what depends on
text stands for what will be measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_compose.calibration.data import parse_domains, read_domains, read_texts
from moe_compose.errors import OptionError
from moe_compose.recipe.inputs import by_name
from moe_compose.recipe.state import State
from moe_compose.surgery.compose_options import WITH_TEXT
from moe_compose.surgery.unchanged import LATER, unchanged

if TYPE_CHECKING:
    from torch import Tensor

    from moe_compose.calibration.data import Domain
    from moe_compose.checkpoint.source import TensorSource
    from moe_compose.composition.options import RoutingOptions
    from moe_compose.surgery.compose_options import ComposeOptions
    from moe_compose.surgery.donors import Donor
    from moe_compose.surgery.expert_options import AddOptions, SwapOptions
    from moe_compose.surgery.plan import Plan
    from moe_compose.training.options import TrainOptions

#: Carries a step out: where the recipe stands, options, what else is given → a plan, or a finding.
Act = Callable[[State, Any, Mapping[str, Any]], Any]

_DRY = "Dry run: nothing is measured on text; names and sizes are the same."


def plain(path: str) -> Act:
    """An operation `f(source, options)`."""

    def act(state: State, options: Any, given: Mapping[str, Any]) -> Plan:
        module, _, name = path.rpartition(".")
        operation = getattr(import_module(f"moe_compose.{module}"), name)
        plan: Plan = operation(state.source(given), options)
        return plan

    return act


def routing(given: Mapping[str, Any], **more: Any) -> RoutingOptions:
    """How router rows follow from text."""
    from moe_compose.composition.options import RoutingOptions

    names = {"text_tokens": "tokens"} | {n: n for n in ("row_scale", "tolerance", "device")}
    found = {field: given[name] for name, field in names.items() if name in given}
    return RoutingOptions(**more | found)


def compose_models(state: State, options: ComposeOptions, given: Mapping[str, Any]) -> Plan:
    """Models become the experts of one."""
    from moe_compose.composition.compose import compose, settled

    texts: dict[str, Any] = dict(by_name(given.get("data", ())))
    scale: dict[str, Any] = {}
    if "from_mergekit" in given:
        origin, words, options, prompts = _of_mergekit(given, options)
        if options.router not in (None, *WITH_TEXT):
            prompts = {}
        if prompts and not texts:
            scale = {"row_scale": 1.0}  # prompts are too short to hold some of them out
        texts = {**prompts, **texts}
    else:
        origin, words = _base_of(given), given["expert"]
    how = routing(given, seed=options.seed, **scale)
    base, donors = state.open(origin), _donors(state, words)
    embeddings = _embeddings(given["embeddings"]) if "embeddings" in given else {}
    if state.dry:
        if texts:
            state.watch.remark(_DRY)
        return _unmeasured(base, donors, settled(donors, options, texts, embeddings))
    with state.layers("measuring router inputs") as count:
        return compose(
            base, donors, options, texts, routing=how, embeddings=embeddings, progress=count
        )


def origin_of(options: ComposeOptions, given: Mapping[str, Any]) -> str:
    """The base that a composition starts from, as it is called."""
    return _of_mergekit(given, options)[0] if "from_mergekit" in given else _base_of(given)


def _base_of(given: Mapping[str, Any]) -> str:
    needed = {"base": "MODEL", "expert": "NAME=MODEL"}
    missing = [f"--{name} {what}" for name, what in needed.items() if name not in given]
    if missing:
        raise OptionError(
            f"nothing says what is composed: {' and '.join(missing)} must be given",
            hint="A config of mergekit-moe does as well: --from-mergekit FILE.",
        )
    return str(given["base"])


def _of_mergekit(
    given: Mapping[str, Any], options: ComposeOptions
) -> tuple[str, tuple[str, ...], ComposeOptions, Mapping[str, Any]]:
    """Base, experts, options and prompts of a config; options that were given win over its own."""
    from moe_compose.surgery.mergekit import read_mergekit

    path = given["from_mergekit"]
    if "base" in given or "expert" in given:
        raise OptionError("--from-mergekit says what is composed: leave out --base and --expert")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as e:
        raise OptionError(f"cannot read --from-mergekit {path}: {e}") from e
    config, usual = read_mergekit(text, path.name), type(options)()
    asked = {f.name: getattr(options, f.name) for f in fields(options)}
    changed = {n: v for n, v in asked.items() if v != getattr(usual, n)}
    words = tuple(f"{name}={model}" for name, model in config.experts.items())
    return config.base, words, replace(config.options, **changed), config.texts


def _donors(state: State, words: tuple[str, ...]) -> dict[str, Donor]:
    """`NAME=MODEL` as name → donor, opened; all that is wrong at once."""
    found: dict[str, Donor] = {}
    problems = []
    for word in words:
        name, _, model = word.partition("=")
        if not name or not model:
            problems.append(f"--expert {word}: it must be NAME=MODEL, such as math=models/math")
        elif name in found:
            problems.append(f"--expert {word}: there is a {name!r} already")
        else:
            found[name] = state.donor(model)
    if problems:
        raise OptionError("these are no experts", problems=problems)
    return found


def _unmeasured(base: TensorSource, donors: Mapping[str, Donor], options: ComposeOptions) -> Plan:
    """The plan with rows of zeros: names and sizes are the same."""
    from moe_compose.surgery.compose import plan_composition

    shared = "mean" if options.shared == "best" else options.shared
    return plan_composition(base, donors, replace(options, shared=shared))


def _embeddings(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(path))
    except (OSError, SafetensorError) as e:
        raise OptionError(f"--embeddings ({path}) is no safetensors file: {e}") from e


def texts_of(given: Mapping[str, Any]) -> tuple[Domain, ...]:
    """Text by domain, or of none, read; a file whose name has a = in it is a file.

    Raises:
        OptionError: there is none, or text that cannot be used.
    """
    data = given.get("data", ())
    plain = [word for word in data if "=" not in word or Path(word).exists()]
    named = [*given.get("domain", ()), *(word for word in data if word not in plain)]
    return read_domains(parse_domains(named, plain))


def add(state: State, options: AddOptions, given: Mapping[str, Any]) -> Plan:
    """One more expert."""
    from moe_compose.surgery.selection import moe_form

    source = state.source(given)
    name = options.name or str(moe_form(source)[1].num_experts)
    return _placed(state, "add_expert", source, options, given, name)


def swap(state: State, options: SwapOptions, given: Mapping[str, Any]) -> Plan:
    """Another expert in the place of one."""
    from moe_compose.surgery.expert_names import index_of, names_of
    from moe_compose.surgery.selection import moe_form

    source = state.source(given)
    count = moe_form(source)[1].num_experts
    at = index_of(source.config, count, options.expert)
    name = options.name or names_of(source.config, count)[at] or str(at)
    return _placed(state, "swap_expert", source, options, given, name)


def _placed(
    state: State,
    verb: str,
    source: TensorSource,
    options: AddOptions | SwapOptions,
    given: Mapping[str, Any],
    name: str,
) -> Plan:
    """An expert put into a model; its row follows from text, but for a dry run."""
    from moe_compose.composition import change
    from moe_compose.composition.options import idle_text

    donor, how = state.donor(given["from"]), routing(given)
    texts = by_name(given.get("data", ()), name)
    plan: Plan
    if state.dry:
        if problems := idle_text(texts, change.router_of(donor, options, texts, name)):
            raise OptionError("these options cannot be meant", problems=problems)
        if texts:
            state.watch.remark(_DRY)
        plan = getattr(import_module(f"moe_compose.surgery.{verb}"), verb)(source, donor, options)
        return plan
    with state.layers("measuring router inputs") as count:
        plan = getattr(change, verb)(source, donor, options, texts, routing=how, progress=count)
    return plan


@dataclass(frozen=True, slots=True)
class Training:
    """What trains, and on what.

    Attributes:
        source: the model.
        texts, held: text to train on, and held-out text; None: a part is split off.
        teacher: what it is to be like, if anything.
        adapter_out: a folder for adapters, if they are to be kept.
    """

    source: TensorSource
    texts: tuple[Domain, ...]
    held: tuple[Domain, ...] | None
    teacher: TensorSource | None
    adapter_out: Path | None

    @classmethod
    def of(cls, state: State, options: TrainOptions, given: Mapping[str, Any]) -> Training:
        """Everything opened and read; what is wrong is said before torch is there."""
        texts = texts_of(given)
        held = read_texts(*given["eval_data"]) if "eval_data" in given else None
        source, adapter_out = state.source(given), given.get("adapter_out")
        teacher = state.open(given["teacher"]) if "teacher" in given else None
        taught = options.objective in ("distill", "layer")
        if teacher is None and taught and "source" not in given:
            teacher = state.before
        if adapter_out is not None:
            from moe_compose.training.setup import check_adapter_folder

            check_adapter_folder(adapter_out, options, again=state.resume or state.overwrite)
        return cls(source, texts, held, teacher, adapter_out)


def train(state: State, options: TrainOptions, given: Mapping[str, Any]) -> Plan:
    """Routers, alone or with more, trained."""
    job = Training.of(state, options, given)
    if not state.dry:
        return trained(state, options, job)
    from moe_compose.surgery.selection import moe_form
    from moe_compose.training.setup import check_meant

    check_meant(job.source, moe_form(job.source)[1], options, job.teacher)
    return unchanged(job.source, "train-router", LATER)


def trained(state: State, options: TrainOptions, job: Training) -> Plan:
    """Carry a training out."""
    from moe_compose.training.train import train_router

    with state.watch.counting(f"training {job.source.label}", "tokens") as count:

        def tell(p: Any) -> None:
            if p.evaluated is not None:
                state.watch.remark(f"{p.evaluated}{' (best so far)' if p.best else ''}")
            elif count is not None:
                count(p.tokens, p.total)

        return train_router(
            job.source,
            job.texts,
            options,
            teacher=job.teacher,
            held_out=job.held,
            folder=state.folder,
            resume=state.resume,
            adapter_out=job.adapter_out,
            overwrite=state.overwrite,
            progress=tell,
        )
