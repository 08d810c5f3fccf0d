"""What has to be known, and may be refused, before a model is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from moe_compose.architectures import Architecture, MoE, find
from moe_compose.architectures.parts import Locator, count_parameters, layout_of
from moe_compose.calibration.texts import Texts as Given
from moe_compose.calibration.texts import tokens_of
from moe_compose.calibration.tokenizer import vocabulary_of
from moe_compose.calibration.tokens import TokenSet
from moe_compose.checkpoint.source import FLOAT_DTYPES, TensorSource, common_dtype
from moe_compose.errors import OptionError
from moe_compose.recovery.texts import held_out as split_off
from moe_compose.surgery.history import read_history
from moe_compose.surgery.plan import Plan
from moe_compose.surgery.selection import moe_form
from moe_compose.training.batches import Texts
from moe_compose.training.options import Balance, TrainOptions
from moe_compose.training.record import tokens_in

#: Bytes of a number by dtype; of what trains: fp32 copy, gradient, AdamW's two moments.
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}
_TRAINED_BYTES = 16


@dataclass(frozen=True, slots=True)
class Intent:
    """What a training would do and take, before a model is loaded.

    Attributes:
        trained: parameters that train.
        distinct, tokens: tokens that there are to train on, and those of all steps.
        held_out: tokens of held-out text.
        balance: against collapse.
        weights, teacher: bytes of the two models' weights; of their largest layers with the
            objective layer.
        optimizer: bytes of copies, gradients and moments of what trains.
        kept: bytes of hidden states that the objective layer keeps.
    """

    trained: int
    distinct: int
    tokens: int
    held_out: int
    balance: str
    weights: int
    teacher: int
    optimizer: int
    kept: int = 0


def intent(
    source: TensorSource,
    texts: Given,
    held_out: Given | None,
    options: TrainOptions,
    teacher: TensorSource | None,
) -> Intent:
    """What `train_router` would do; reads no weights.

    Raises:
        OptionError, UnsupportedError: as it would.
    """
    form, moe = moe_form(source)
    check_meant(source, moe, options, teacher)
    found = texts_of(source, texts, held_out, options, teacher)
    counts = count_parameters(form, source.config, source.tensors)
    parts, width = options.parts, _BYTES[dtype_of(source, options, options.device or "cpu")]
    experts = counts.by_part.get("experts", 0) * len(parts.experts) // moe.num_experts
    trained = counts.total if parts.everything else counts.by_part.get("router", 0) + experts
    trained += _in_adapters(source, form, moe, options) if parts.lora else 0
    beside = {} if teacher is None else teacher.tensors
    distinct, held = tokens_in(found).values()
    intent = Intent(
        trained=trained,
        distinct=distinct,
        tokens=options.steps * options.batch_tokens,
        held_out=held,
        balance=balance_of(source, options),
        weights=counts.total * width,
        teacher=sum(t.numel for t in beside.values()) * width,
        optimizer=trained * _TRAINED_BYTES,
    )
    if options.objective != "layer" or teacher is None:
        return intent
    hidden = source.tensors[form.embedding].shape[-1]
    return replace(
        intent,
        weights=_largest_layer(source) * width,
        teacher=_largest_layer(teacher) * width,
        optimizer=trained * _TRAINED_BYTES // len(moe.sparse_layers),
        kept=3 * (distinct + held) * hidden * width,
    )


def _in_adapters(source: TensorSource, form: Architecture, moe: MoE, options: TrainOptions) -> int:
    from moe_compose.runtime.runner import Runner
    from moe_compose.runtime.whole import Whole
    from moe_compose.training.adapters import count_adapters, targets_of

    empty = Whole.streamed(source, Runner(source))
    targets = targets_of(empty, form, moe, options.parts.lora)
    return count_adapters(targets, options.lora_rank)


def _largest_layer(source: TensorSource) -> int:
    """Parameters of it."""
    form, counts = find(source.config), Counter[int]()
    assert form is not None
    locator = Locator(layout_of(form, source.tensors), form.layers.integer(source.config))
    for name, info in source.tensors.items():
        if (layer := locator.place(name).layer) is not None:
            counts[layer] += info.numel
    return max(counts.values())


@dataclass(frozen=True, slots=True)
class _Amount:
    """How much text to draw."""

    tokens: int
    seq_len: int
    seed: int


def check_meant(
    source: TensorSource, moe: MoE, options: TrainOptions, teacher: TensorSource | None
) -> None:
    """Refuse what cannot train.

    Raises:
        OptionError: all that is the matter.
    """
    if problems := list(_problems(source, moe, options, teacher)):
        raise OptionError(f"{source.label} cannot be trained like this", problems=problems)


def _problems(
    source: TensorSource, moe: MoE, options: TrainOptions, teacher: TensorSource | None
) -> Iterator[str]:
    routing, objective = moe.routing, options.objective
    if (teacher is None) == (objective in ("distill", "layer")):
        yield (
            f"the objective {objective} needs a teacher"
            if teacher is None
            else f"a teacher has no meaning with the objective {objective}: use distill"
        )
    if objective == "layer":
        yield from _beyond_layers(options)
    if teacher is not None and vocabulary_of(teacher.config) != vocabulary_of(source.config):
        sizes = f"{vocabulary_of(teacher.config)} and {vocabulary_of(source.config)}"
        yield f"teacher and student must have one vocabulary ({sizes})"
    one = moe.top_k == 1 and (routing.renormalise or routing.score == "topk_softmax")
    if one and options.objective != "domain":
        yield (
            "top_k is 1 and the weight is renormalised, so it is always 1 and the router gets no "
            "gradient: route to 2 experts, turn renormalisation off in config.json while it "
            "trains, or use the objective domain"
        )
    if options.parts.lora and options.shard:
        yield "shard has no meaning with adapters, which are small: leave it out"
    if options.balance == "bias" and not routing.selection_bias:
        yield (
            "balance (bias) moves a correction bias for choosing experts, which this family's "
            "router does not have: use switch"
        )


def _beyond_layers(options: TrainOptions) -> Iterator[str]:
    """What layers cannot be trained with one by one."""
    if options.train != "router":
        yield f"the objective layer trains routers only (train {options.train})"
    if options.balance not in (None, "none"):
        yield f"balance ({options.balance}) has no meaning with the objective layer"
    if options.shard:
        yield "shard has no meaning with the objective layer, which holds one layer"


def check_adapter_folder(folder: Path, options: TrainOptions, *, again: bool = False) -> None:
    """Refuse a place that is taken, or has no use.

    Args:
        folder: for the adapters.
        options: of the training.
        again: an earlier run may have left its adapters there.

    Raises:
        OptionError: nothing that trains is an adapter; the folder is not empty.
    """
    if not options.parts.lora:
        raise OptionError(
            f"adapter_out has no meaning with train ({options.train}): no adapters are trained"
        )
    if again and (folder / "adapter_config.json").is_file():
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OptionError(f"adapter_out ({folder}) must be a new or empty folder")


def balance_of(source: TensorSource, options: TrainOptions) -> Balance:
    """As asked; by default against the collapse of equal experts, where they were upcycled."""
    return options.balance or ("switch" if _upcycled(source) else "none")


def _upcycled(source: TensorSource) -> bool:
    if isinstance(source, Plan):
        return source.operation == "upcycle" or any(map(_upcycled, source.sources.values()))
    return any(record.get("operation") == "upcycle" for record in read_history(source))


def dtype_of(source: TensorSource, options: TrainOptions, device: str) -> str:
    """What frozen weights compute in."""
    if options.dtype is not None:
        return options.dtype
    own = FLOAT_DTYPES.get(common_dtype(source), "float32")
    return "float32" if device == "cpu" else "bfloat16" if own == "float16" else own


def texts_of(
    source: TensorSource,
    texts: Given,
    held_out: Given | None,
    options: TrainOptions,
    teacher: TensorSource | None,
) -> Texts:
    """Text to train on and held-out text, as tokens.

    Raises:
        OptionError: text that cannot be used, or is on both sides.
        UnsupportedError: the source has no tokenizer.
    """
    o = options
    used = o.layer_tokens if o.objective == "layer" else o.steps * o.batch_tokens
    wanted = used + (o.eval_tokens if held_out is None else 0)
    tokens = tokens_of(source, texts, _Amount(wanted, o.seq_len, o.seed), teacher)
    if held_out is None:
        every = max(2, sum(tokens.tokens.values()) // o.eval_tokens)
        held, other = split_off(tokens, every), tokens
        chosen = _up_to(tokens, sorted(held), o.eval_tokens)
    else:
        amount = _Amount(o.eval_tokens, o.seq_len, o.seed)
        other = tokens_of(source, held_out, amount, teacher)
        _check_apart(tokens, other)
        same = {s.ids for s in other.sequences}
        held = {i for i, s in enumerate(tokens.sequences) if s.ids in same}
        chosen = list(range(len(other.sequences)))
    fitted = [i for i in range(len(tokens.sequences)) if i not in held]
    if not fitted:
        raise OptionError("all text is held out: nothing is left to train on")
    return Texts(tokens, fitted, other, chosen)


def _up_to(tokens: TokenSet, held: list[int], most: int) -> list[int]:
    """Held-out sequences of about so many tokens, of each domain the same share."""
    share, found = most / len(tokens.domains), []
    for domain in range(len(tokens.domains)):
        taken = 0
        for i in (i for i in held if tokens.sequences[i].domain == domain):
            if taken < share:
                found.append(i)
                taken += len(tokens.sequences[i].ids)
    return found


def _check_apart(tokens: TokenSet, held: TokenSet) -> None:
    mine = {f.sha256 for files in tokens.files for f in files}
    both = sorted({f.name for files in held.files for f in files if f.sha256 in mine})
    if both:
        raise OptionError(
            f"{', '.join(both)} is trained on and held out: the result would flatter itself",
            hint="Give other held-out text, or none: then a part is split off.",
        )
