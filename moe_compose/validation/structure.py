"""Is this the checkpoint that its config says it is? Config, class, every tensor name, every shape,
tokenizer.

The reference for names and shapes is transformers itself: the class is built on the meta device and
asked, through its own conversion rules, what it would write to disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_compose.architectures import find
from moe_compose.checkpoint.source import FLOAT_DTYPES, TensorSource
from moe_compose.errors import MoeComposeError
from moe_compose.surgery.selection import group_problem
from moe_compose.validation.report import Check

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

#: Faults that a report lists one by one.
SHOWN = 20


def capped(problems: list[str]) -> tuple[str, ...]:
    """The first `SHOWN`, and how many more there are."""
    more = len(problems) - SHOWN
    return tuple(problems[:SHOWN]) + ((f"and {more} more",) if more > 0 else ())


def build_on_meta(source: TensorSource) -> tuple[PreTrainedModel | None, Check]:
    """The transformers class of a checkpoint or plan, without weights; None when the config is
    refused.

    The class is the one that runs it; a config that needs code of its own is refused.
    """
    from moe_compose.runtime import pretrained

    try:
        model = pretrained.build_on_meta(pretrained.load_config(source.config))
    except MoeComposeError as e:
        return None, Check("config", "fail", e.message)
    stated = source.config.get("architectures") or []
    name = type(model).__name__
    if name not in stated:
        return model, Check("config", "fail", f"architectures ({stated}) does not name {name}")
    return model, Check("config", "pass", f"accepted by {name}")


def expected_tensors(model: PreTrainedModel) -> Mapping[str, torch.Tensor]:
    """Every tensor the class would write to disk, on the meta device, tied ones once."""
    from transformers.core_model_loading import revert_weight_conversion

    kept = model.state_dict()
    for tied in getattr(model, "all_tied_weights_keys", None) or {}:
        kept.pop(tied, None)
    found: Mapping[str, torch.Tensor] = revert_weight_conversion(model, kept)
    return found


def check_names(checkpoint: TensorSource, model: PreTrainedModel) -> Check:
    """Every tensor of the class is there, in its shape, and no other."""
    if checkpoint.config.get("quantization_config"):
        return Check("tensors", "skip", "quantised: names differ from the class's own")
    expected = expected_tensors(model)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    ignored = _mtp_prefixes(checkpoint.config)
    problems = [f"{n} is missing" for n in expected if n not in checkpoint.tensors]
    for name, info in checkpoint.tensors.items():
        if name not in expected:
            if name not in tied and not name.startswith(ignored):
                problems.append(f"{name} is unexpected: loaders ignore it or refuse it")
        elif info.shape != expected[name].shape:
            problems.append(f"{name} has shape {list(info.shape)}, not {[*expected[name].shape]}")
        elif expected[name].is_floating_point() and info.dtype not in FLOAT_DTYPES:
            problems.append(f"{name} is {info.dtype}, not of floating point")
    if problems:
        return Check(
            "tensors", "fail", f"{len(problems)} of {len(expected)} wrong", capped(problems)
        )
    return Check(
        "tensors", "pass", f"all {len(expected)} names and shapes as the class writes them"
    )


def _mtp_prefixes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Of tensors that transformers ignores: layers of multi-token prediction, unless the config
    says that there are none.
    """
    form = find(config)
    if form is None:
        return ()
    stated = [config[key.name] for key in form.mtp_count if key.name in config]
    if stated and not any(stated):
        return ()
    return tuple(p.format(n=config.get("num_hidden_layers")) for p in form.mtp)


def check_routing(checkpoint: TensorSource) -> list[Check]:
    """A token can pass through as many experts as the config says; nothing for a dense model."""
    form = find(checkpoint.config)
    if form is None or not form.is_moe:
        return []
    moe = form.moe(checkpoint.config)
    if not moe.sparse_layers:
        return []
    most = moe.num_experts + moe.zero_experts
    problem = group_problem(moe, range(moe.num_experts))
    if not 1 <= moe.top_k <= most:
        problem = f"top_k ({moe.top_k}) must be between 1 and the number of experts ({most})"
    if problem:
        return [Check("routing", "fail", problem)]
    return [Check("routing", "pass", f"{moe.top_k} of {most} experts")]


def check_dtypes(checkpoint: TensorSource) -> Check:
    """Floating-point tensors have the config's dtype, or the one that the family pins for them: a
    correction bias rounded to 16 bits chooses other experts.
    """
    stated = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if stated is None:
        return Check("dtypes", "warn", "the config states no dtype; loaders then guess")
    form = find(checkpoint.config)
    pins = {t.name.split("{i}")[-1]: t.dtype for t in form.router if t.dtype} if form else {}
    wrong, other = [], []
    for name, info in checkpoint.tensors.items():
        pinned = next((d for end, d in pins.items() if name.endswith(end)), None)
        if info.dtype not in FLOAT_DTYPES:
            continue
        if pinned is not None and info.dtype != pinned:
            wrong.append(f"{name} is {info.dtype}, its family keeps it in {pinned}")
        elif pinned is None and FLOAT_DTYPES[info.dtype] != stated:
            other.append(f"{name} is {FLOAT_DTYPES[info.dtype]}")
    if wrong:
        return Check("dtypes", "fail", f"{len(wrong)} tensors lost precision", capped(wrong))
    if other:
        text = f"the config states {stated}; {len(other)} tensors differ"
        return Check("dtypes", "warn", text, capped(other))
    return Check("dtypes", "pass", f"as the config states ({stated})")


def load_tokenizer(checkpoint: TensorSource, against: TensorSource | None) -> tuple[Any, Check]:
    """The checkpoint's tokenizer, or None.

    It must be there if the source has one, and more tokens than the model has rows are a fault,
    unless the source has the same.
    """
    from moe_compose.runtime.pretrained import first_line
    from moe_compose.runtime.pretrained import load_tokenizer as load

    path = _tokenizer_file(checkpoint)
    if path is None:
        lost = against is not None and _tokenizer_file(against) is not None
        text = "the checkpoint has none" + (", its source has one" if lost else "")
        return None, Check("tokenizer", "fail" if lost else "warn", text)
    try:
        tokenizer = load(path.parent)
    except Exception as e:  # whatever a tokenizer raises, the finding is the same
        return None, Check("tokenizer", "fail", f"does not load: {first_line(e)}")
    vocabulary = checkpoint.config.get("vocab_size")
    if isinstance(vocabulary, int) and len(tokenizer) > vocabulary:
        text = f"has {len(tokenizer)} tokens, the model {vocabulary}"
        inherited = against is not None and against.config.get("vocab_size") == vocabulary
        return tokenizer, Check("tokenizer", "warn" if inherited else "fail", text)
    changed = [
        name
        for name, file in checkpoint.files.items()
        if name in _TOKENIZER_FILES
        and against is not None
        and name in against.files
        and file.read_bytes() != against.files[name].read_bytes()
    ]
    if changed:
        text = f"{', '.join(changed)}: not the source's"
        return tokenizer, Check("tokenizer", "warn", text)
    return tokenizer, Check("tokenizer", "pass", f"loads, {len(tokenizer):,} tokens")


#: What turns text into tokens; settings beside them are rewritten now and then.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")


def _tokenizer_file(source: TensorSource) -> Path | None:
    return source.files.get("tokenizer_config.json") or source.files.get("tokenizer.json")
