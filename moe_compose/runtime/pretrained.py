"""The only place where transformers is asked for a config, a class, or a tokenizer.

Code that came with a checkpoint is never run unless it was asked for by name. So every call states
`trust_remote_code`: left out, transformers asks on the terminal, and whatever stands on stdin
answers. What is in a `config.json` and leads to code, of the checkpoint or of the Hub, is taken out
before transformers sees it: `auto_map`, and attention or experts kernels that are repositories.

There is one way from a config to its class, for running, checking and training: a family that
transformers knows only by its class (Kimi K2, which is a DeepSeek-V3) is that class's everywhere.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_compose.architectures import find
from moe_compose.errors import CheckpointError, MoeComposeError, UnsupportedError
from moe_compose.runtime.quiet import quiet

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

#: Keys of a config, of any depth, that name classes in Python files.
CODE_KEYS = frozenset({"auto_map", "custom_pipelines"})

#: Keys that choose an implementation: transformers' own have plain names, those of the Hub a slash.
KERNEL_KEYS = frozenset(
    f"{prefix}{part}_implementation" for prefix in ("", "_") for part in ("attn", "experts")
)


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def without_code(value: Any) -> Any:
    """A config without what would lead to foreign code, at any depth.

    Example:
        >>> without_code({"vocab_size": 8, "auto_map": {"AutoConfig": "x.Config"}})
        {'vocab_size': 8}
    """
    if isinstance(value, list):
        return [without_code(item) for item in value]
    if not isinstance(value, Mapping):
        return value
    return {
        name: without_code(item)
        for name, item in value.items()
        if name not in CODE_KEYS and not (name in KERNEL_KEYS and "/" in json.dumps(item))
    }


def known_family(config: Mapping[str, Any]) -> Any:
    """The config's family; one that transformers only knows by its class has that class's."""
    import transformers

    family, form = config.get("model_type"), find(config)
    if family in transformers.CONFIG_MAPPING or form is None:
        return family
    known = getattr(getattr(transformers, form.hf_class, None), "config_class", None)
    return getattr(known, "model_type", family)


def load_config(config: Mapping[str, Any]) -> PretrainedConfig:
    """A `config.json` as transformers' own class of it.

    Raises:
        UnsupportedError: the installed transformers knows no causal language model of the family.
        CheckpointError: the class refuses the config.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, __version__

    family = known_family(config)
    if family not in CONFIG_MAPPING:
        raise UnsupportedError(f"transformers {__version__} has no model_type {family!r}")
    plain = {**without_code(config), "model_type": family}
    try:
        # A folder, since only from there AutoConfig applies all of its rules.
        with quiet(), tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(plain))
            found: PretrainedConfig = AutoConfig.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as e:  # whatever a class raises on a bad config, the finding is the same
        raise CheckpointError(f"transformers refuses the config: {first_line(e)}") from e
    if type(found) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedError(
            f"transformers {__version__} has no causal language model for {family!r}"
        )
    return found


def build_on_meta(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """The class of a config on the meta device: names and shapes, no weights.

    Args:
        config: what `load_config` gave.
        options: as `from_config` takes them, such as `dtype`.

    Raises:
        CheckpointError: the class refuses the config.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with quiet(), torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=False, **options
            )
    except MoeComposeError:
        raise
    except Exception as e:  # whatever a class raises on a bad config, the finding is the same
        raise CheckpointError(f"transformers refuses the config: {first_line(e)}") from e
    return model


def load_tokenizer(folder: str | Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer in a folder.

    Args:
        folder: on this machine.
        trust_remote_code: run Python files of that folder where the tokenizer is made of them.

    Raises:
        Exception: whatever a tokenizer raises that does not load.
    """
    from transformers import AutoTokenizer

    with quiet():
        return AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )


def load_model(folder: str | Path, **options: Any) -> PreTrainedModel:
    """A whole model in memory, by transformers itself: a reference for small ones."""
    from transformers import AutoModelForCausalLM

    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, **options
    )
    return found


def new_model(model_type: str, **sizes: Any) -> PreTrainedModel:
    """A model of a family of transformers, with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **sizes)
    found: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return found
