"""Is this the checkpoint that its config says it is? Config, class, every tensor name, every shape,
tokenizer.

The reference for names and shapes is transformers itself: the class is built on the meta device and
asked, through its own conversion rules, what it would write to disk.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_compose.architectures import find
from moe_compose.checkpoint.source import FLOAT_DTYPES, TensorSource
from moe_compose.validation.report import Check

if TYPE_CHECKING:
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

    Remote code is never run: a config that needs it is refused.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from moe_compose.runtime.quiet import quiet

    try:
        with quiet(), tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(dict(source.config)))
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config)
    except Exception as e:
        # Whatever a model class raises on a bad config, the finding is the same.
        return None, Check("config", "fail", f"transformers refuses the config: {_first_line(e)}")
    stated = source.config.get("architectures") or []
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


def check_names(checkpoint: TensorSource, model: PreTrainedModel) -> Check:
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

    More tokens than the model has rows is a fault, unless the source has the same.
    """
    from transformers import AutoTokenizer

    from moe_compose.runtime.quiet import quiet

    path = checkpoint.files.get("tokenizer_config.json") or checkpoint.files.get("tokenizer.json")
    if path is None:
        return None, Check("tokenizer", "warn", "the checkpoint has none")
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(path.parent, local_files_only=True)
    except Exception as e:
        return None, Check("tokenizer", "fail", f"does not load: {_first_line(e)}")
    vocabulary = checkpoint.config.get("vocab_size")
    if isinstance(vocabulary, int) and len(tokenizer) > vocabulary:
        text = f"has {len(tokenizer)} tokens, the model {vocabulary}"
        inherited = against is not None and against.config.get("vocab_size") == vocabulary
        return tokenizer, Check("tokenizer", "warn" if inherited else "fail", text)
    return tokenizer, Check("tokenizer", "pass", f"loads, {len(tokenizer)} tokens")
