"""YAML with the line of every entry, so that a fault can be pointed at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moe_compose.errors import OptionError


@dataclass(frozen=True, slots=True)
class Entry:
    """A value and where it stands.

    Attributes:
        line: of its key in a mapping, of itself elsewhere; 0 where it was not written.
        value: key → entry for a mapping, entries for a list, or a plain value.
    """

    line: int
    value: Any


def read_yaml(text: str, where: str) -> Entry:
    """A document as entries.

    Args:
        text: YAML; only plain values, mappings and lists.
        where: what errors call it.

    Raises:
        OptionError: it is no YAML, or has more than one document.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        return Entry(1, None) if node is None else _entry(loader, node)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark is not None else ""
        context = f", {error.context}" if error.context else ""
        raise OptionError(f"{where}{line} is no YAML: {error.problem}{context}") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise OptionError(f"{where} is no YAML: {error}") from error


def _entry(loader: Any, node: Any) -> Entry:
    import yaml

    line = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        loader.flatten_mapping(node)
        found = {}
        for key, value in node.value:
            found[str(key.value)] = Entry(key.start_mark.line + 1, _entry(loader, value).value)
        return Entry(line, found)
    if isinstance(node, yaml.SequenceNode):
        return Entry(line, [_entry(loader, item) for item in node.value])
    return Entry(line, loader.construct_object(node))
