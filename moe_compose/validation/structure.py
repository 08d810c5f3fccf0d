"""Is this the checkpoint that its config says it is? Config, class, every tensor name, every shape,
tokenizer.

The reference for names and shapes is transformers itself: the class is built on the meta device and
asked, through its own conversion rules, what it would write to disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moe_compose.architectures import find
from moe_compose.architectures.dialects import CONFIG_DTYPES
from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.checkpoint.source import FLOAT_DTYPES
from moe_compose.validation.quiet import quiet_transformers
from moe_compose.validation.report import Check

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Faults that a report lists one by one.
SHOWN = 20


def capped(problems: list[str]) -> tuple[str, ...]:
    """The first `SHOWN`, and how many more there are."""
    more = len(problems) - SHOWN
    return tuple(problems[:SHOWN]) + ((f"and {more} more",) if more > 0 else ())


def build_on_meta(checkpoint: Checkpoint) -> tuple[PreTrainedModel | None, Check]:
    """The transformers class of the checkpoint, without weights; None when the config is refused.

    Remote code is never run: a config that needs it is refused.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
    except Exception as e:
        # Whatever a model class raises on a bad config, the finding is the same.
        return None, Check("config", "fail", f"transformers refuses the config: {_first_line(e)}")
    stated = checkpoint.config.get("architectures") or []
    name = type(model).__name__
    if name not in stated:
        return model, Check("config", "fail", f"architectures ({stated}) does not name {name}")
    return model, Check("config", "pass", f"accepted by {name}")


def _first_line(e: Exception) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0]


def expected_tensors(model: PreTrainedModel) -> Mapping[str, tuple[int, ...]]:
    """Name → shape of every tensor the class would write to disk, tied ones once."""
    from transformers.core_model_loading import revert_weight_conversion

    kept = model.state_dict()
    for tied in getattr(model, "all_tied_weights_keys", None) or {}:
        kept.pop(tied, None)
    return {n: tuple(t.shape) for n, t in revert_weight_conversion(model, kept).items()}


def check_names(checkpoint: Checkpoint, model: PreTrainedModel) -> Check:
    """Every tensor of the class is there, in its shape, and no other."""
    if checkpoint.config.get("quantization_config"):
        return Check("tensors", "skip", "quantised: names differ from the class's own")
    expected = expected_tensors(model)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    form = find(checkpoint.config)
    layers = checkpoint.config.get("num_hidden_layers")
    ignored = tuple(p.format(n=layers) for p in form.mtp) if form else ()
    problems = [f"{n} is missing" for n in expected if n not in checkpoint.tensors]
    for name, info in checkpoint.tensors.items():
        if name not in expected:
            if name not in tied and not (ignored and name.startswith(ignored)):
                problems.append(f"{name} is unexpected: loaders ignore it or refuse it")
        elif info.shape != expected[name]:
            problems.append(f"{name} has shape {list(info.shape)}, not {list(expected[name])}")
    if problems:
        return Check(
            "tensors", "fail", f"{len(problems)} of {len(expected)} wrong", capped(problems)
        )
    return Check(
        "tensors", "pass", f"all {len(expected)} names and shapes as the class writes them"
    )


def check_dtypes(checkpoint: Checkpoint) -> Check:
    """Floating-point tensors have the config's dtype, but for those that the family pins."""
    stated = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    form = find(checkpoint.config)
    pinned = tuple(t.name.split("{i}")[-1] for t in form.router if t.dtype) if form else ()
    problems = []
    for name, info in checkpoint.tensors.items():
        if info.dtype not in FLOAT_DTYPES or (pinned and name.endswith(pinned)):
            continue
        if stated is not None and CONFIG_DTYPES[info.dtype] != stated:
            problems.append(f"{name} is {CONFIG_DTYPES[info.dtype]}")
    if stated is None:
        return Check("dtypes", "warn", "the config states no dtype; loaders then guess")
    if problems:
        text = f"the config states {stated}; {len(problems)} tensors differ"
        return Check("dtypes", "warn", text, capped(problems))
    return Check("dtypes", "pass", f"as the config states ({stated})")


def load_tokenizer(checkpoint: Checkpoint) -> tuple[Any, Check]:
    """The checkpoint's tokenizer, or None."""
    from transformers import AutoTokenizer

    if not any(name.startswith("tokenizer") for name in checkpoint.files):
        return None, Check("tokenizer", "warn", "the checkpoint has none")
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(checkpoint.path, local_files_only=True)
    except Exception as e:
        return None, Check("tokenizer", "fail", f"does not load: {_first_line(e)}")
    vocabulary = checkpoint.config.get("vocab_size")
    if isinstance(vocabulary, int) and len(tokenizer) > vocabulary:
        text = f"has {len(tokenizer)} tokens, the model {vocabulary}"
        return tokenizer, Check("tokenizer", "fail", text)
    return tokenizer, Check("tokenizer", "pass", f"loads, {len(tokenizer)} tokens")
