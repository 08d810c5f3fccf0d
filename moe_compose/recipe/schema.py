"""The JSON schema of a recipe: made from the same dataclasses that the commands are."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from moe_compose.recipe.inputs import Input
from moe_compose.recipe.reading import CONDITIONS, TOP
from moe_compose.recipe.steps import STEPS, Step
from moe_compose.recipe.values import attribute_docs, hints_of, kinds_of, required

_TYPES = {bool: "boolean", int: "integer", float: "number", str: "string", Path: "string"}
_KINDS = {
    **dict.fromkeys(("model", "donor", "stats", "file", "out", "save"), "string"),
    "text": ["string", "number"],
    "whole": "integer",
    "number": "number",
    "flag": "boolean",
    "bytes": ["integer", "string"],
}


def schema() -> dict[str, Any]:
    """A JSON schema (draft 2020-12) of recipes."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "moe-compose recipe",
        "type": "object",
        "required": ["steps"],
        "additionalProperties": False,
        "properties": {
            **{name: _input(i) for name, i in TOP.items()},
            "steps": {
                "type": "array",
                "minItems": 1,
                "items": {"oneOf": [_step(name, step) for name, step in STEPS.items()]},
            },
        },
    }


def _step(name: str, step: Step) -> dict[str, Any]:
    cls = step.options_class
    docs, hints = (attribute_docs(cls), hints_of(cls)) if cls is not None else ({}, {})
    own = {f.name: {"description": docs[f.name], **_type(hints[f.name])} for f in step.fields}
    needed = [f.name for f in step.fields if required(f)]
    needed += [n for n, i in step.inputs.items() if i.required]
    conditions = {
        "type": "object",
        "additionalProperties": False,
        "required": [n for n, i in CONDITIONS.items() if i.required],
        "properties": {n: _input(i) for n, i in CONDITIONS.items()},
    }
    return {
        "type": "object",
        "title": name,
        "description": step.summary,
        "required": ["operation", *needed],
        "additionalProperties": False,
        "properties": {
            "operation": {"const": name},
            **own,
            **{n: _input(i) for n, i in step.inputs.items()},
            **({"assert": conditions} if step.makes == "plan" else {}),
        },
    }


def _input(found: Input) -> dict[str, Any]:
    said: dict[str, Any] = {"description": found.help}
    if found.kind in _KINDS:
        return {**said, "type": _KINDS[found.kind]}
    several = {"type": "array", "items": {"type": "string"}}
    mapping = {"type": "object", "additionalProperties": {"anyOf": [{"type": "string"}, several]}}
    return {**said, "anyOf": [mapping, several, {"type": "string"}]}


def _type(hint: Any) -> dict[str, Any]:
    kinds = [_kind(kind) for kind in kinds_of(hint)]
    if len(kinds) == len(get_args(hint)) or hint is kinds_of(hint)[0]:
        return kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
    return {"anyOf": [*kinds, {"type": "null"}]}


def _kind(kind: Any) -> dict[str, Any]:
    if get_origin(kind) is Literal:
        return {"enum": list(get_args(kind))}
    if get_origin(kind) is tuple:
        return {"type": "array", "items": _kind(get_args(kind)[0])}
    return {"type": _TYPES[kind]}
