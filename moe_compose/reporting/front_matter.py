"""The YAML block at the head of a model card: what the Hub reads of it.

What a source's card says about its licence, languages and data holds for what is made from it; what
it says about its own scores and lineage does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_compose.checkpoint.reader import Checkpoint
from moe_compose.checkpoint.source import TensorSource
from moe_compose.errors import CheckpointError
from moe_compose.surgery.history import MAX_BYTES
from moe_compose.surgery.plan import Plan

#: True of the source alone.
_NOT_INHERITED = frozenset({"model-index", "base_model_relation", "new_version", "eval_results"})
_TAGS = {"upcycle": "upcycled"}


def split_card(text: str) -> tuple[dict[str, Any], str]:
    """A card's metadata and its body. A block that is no YAML mapping stays part of the body, so
    that nothing of it is lost.
    """
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK  # the same as on the Hub's server

    match = REGEX_YAML_BLOCK.match(text)
    if match is None:
        return {}, text.strip()
    try:
        found = yaml.safe_load(match[2])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}, text.strip()
    if not isinstance(found, dict):
        return {}, text.strip()
    return found, text[match.end() :].strip()


def read_card(path: Path | None) -> tuple[dict[str, Any], str]:
    """Metadata and body of a card on disk; nothing where there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    if path is None:
        return {}, ""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES).decode("utf-8-sig", "replace")
    except OSError as error:
        raise CheckpointError(f"cannot read the source's {path.name} ({error.strerror})") from error
    return split_card(re.sub(r"\r\n?", "\n", text))


def front_matter(plan: Plan, inherited: Mapping[str, Any]) -> str:
    """The block of the result's card, between its `---` lines.

    Args:
        plan: what was done.
        inherited: metadata of the source's card.
    """
    import yaml

    data = {k: v for k, v in inherited.items() if k not in _NOT_INHERITED}
    bases = [name for s in leaves(plan) if (name := hub_id(s))]
    if bases:
        data["base_model"] = bases[0] if len(bases) == 1 else bases
    data["library_name"] = "transformers"
    data.setdefault("pipeline_tag", "text-generation")
    tags = data.get("tags")
    wanted = ["moe", "moe-compose", _TAGS.get(plan.operation, plan.operation)]
    data["tags"] = _unique([*_listed(tags), *wanted])
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n"


def leaves(source: TensorSource) -> list[TensorSource]:
    """The checkpoints that a plan starts from, through plans of plans, each once."""
    if not isinstance(source, Plan):
        return [source]
    found: list[TensorSource] = []
    for earlier in source.sources.values():
        found += [leaf for leaf in leaves(earlier) if leaf not in found]
    return found


def hub_id(source: TensorSource) -> str | None:
    """`org/name` of a checkpoint that came from the Hub; None for a folder."""
    if not isinstance(source, Checkpoint) or source.revision is None:
        return None
    return source.label.partition("@")[0]


def _listed(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [str(v) for v in value] if isinstance(value, Sequence) else []


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))
