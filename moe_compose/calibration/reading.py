"""One source of text, bytes to documents: plain text, JSON lines, or a data set of the Hub."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from moe_compose.errors import OptionError

#: Documents in a text file are separated so (as in TinyStories and many other sets).
SEPARATOR = "<|endoftext|>"

#: Files of JSON lines end so, before `.gz`.
JSON_LINES = (".jsonl", ".ndjson")

#: Characters taken of a data set of the Hub, at most: it is streamed, never downloaded whole.
HUB_CHARACTERS = 64 << 20

#: A longer document is cut at white space: tokenizers slow down on very long texts.
LONGEST = 1 << 20

#: Faults of one file that are told.
SHOWN = 5

_HUB = re.compile(
    r"hf:(?P<repo>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?"
    r":(?P<split>.+):(?P<column>[^:]+)"
)

#: A chat: `{"role": ..., "content": ...}` in turn.
Messages = tuple[Mapping[str, Any], ...]

#: Text as it is, or a chat that the tokenizer's template turns into text.
Document = str | Messages


@dataclass(frozen=True, slots=True)
class DataFile:
    """Where documents came from.

    Attributes:
        name: the file's name without its folder, or the data set as it was given.
        sha256: of the file's bytes; of a data set, of the documents that were taken.
        bytes: so many were hashed.
    """

    name: str
    sha256: str
    bytes: int


def read_documents(where: str | Path) -> tuple[list[Document], DataFile]:
    """All documents of a file, or the first ones of a data set of the Hub.

    Args:
        where: a text file (documents separated by `<|endoftext|>`) or JSON lines (`.jsonl`: `text`,
            or chat `messages`), either one also with `.gz`; or `hf:org/name:split:column`, with
            `/config` and `@revision` after the name where they are needed.

    Raises:
        OptionError: missing, not UTF-8, binary, empty, wrong keys; the message names the place.
    """
    if str(where).startswith("hf:"):
        return _read_hub(str(where))
    path = Path(where).expanduser()
    try:
        content = path.read_bytes()
    except OSError as e:
        raise OptionError(f"cannot read {path.name or where}: {e.strerror or e}") from e
    file = DataFile(path.name, hashlib.sha256(content).hexdigest(), len(content))
    name = path.name.lower()
    if name.endswith(".gz"):
        content, name = _unpacked(content, path.name), name.removesuffix(".gz")
    text = _decoded(content, path.name)
    if name.endswith(JSON_LINES):
        found = _json_lines(text, path.name)
    else:
        found = [d for d in text.split(SEPARATOR) if d.strip()]
    if not found:
        raise OptionError(f"{path.name} holds no text", hint="Give another file.")
    return [piece for document in found for piece in _cut(document)], file


def _unpacked(content: bytes, name: str) -> bytes:
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as e:
        raise OptionError(f"{name} is no gzip file, or a damaged one: {e}") from e


def _decoded(content: bytes, name: str) -> str:
    """UTF-8 text; zero bytes are a sign of something else that happens to decode."""
    hint = "Give UTF-8 text, or JSON lines in a file that ends in .jsonl."
    zero = content.find(b"\0")
    if zero >= 0:
        raise OptionError(f"{name} is binary, not text (a zero byte at {zero})", hint=hint)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = content.count(b"\n", 0, e.start) + 1
        where = f"byte 0x{content[e.start]:02x} at {e.start}, line {line}"
        raise OptionError(f"{name} is not UTF-8 text ({where})", hint=hint) from e


def _json_lines(text: str, name: str) -> list[Document]:
    """One object a line; all faults of the file at once, each with its line."""
    found: list[Document] = []
    problems: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            document = _document(json.loads(line))
        except (ValueError, RecursionError) as e:
            problems.append(f"{name}:{number}: {e}")
        else:
            found += [document] if document else []
    if problems:
        more = len(problems) - SHOWN
        raise OptionError(
            f"{name} is not JSON lines with a text or messages in each",
            problems=[*problems[:SHOWN], *([f"and {more} more lines"] if more > 0 else [])],
            hint='Each line is {"text": "..."} or {"messages": [{"role": ..., "content": ...}]}.',
        )
    return found


def _document(entry: Any) -> Document:
    """What one line holds; empty where its text is.

    Raises:
        ValueError: neither text nor messages.
    """
    if not isinstance(entry, dict):
        raise ValueError(f"an object is expected, not {type(entry).__name__}")
    if isinstance(entry.get("text"), str):
        text: str = entry["text"]
        return text if text.strip() else ""
    if "text" in entry:
        raise ValueError(f"text must be a string, not {type(entry['text']).__name__}")
    if "messages" not in entry:
        keys = ", ".join(map(repr, list(entry)[:6])) or "none at all"
        raise ValueError(f"neither 'text' nor 'messages' among its keys ({keys})")
    messages = entry["messages"]
    fine = isinstance(messages, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages
    )
    if not fine:
        raise ValueError("messages must be a list of objects with 'role' and 'content'")
    return tuple(messages)


def _cut(document: Document) -> Iterator[Document]:
    """A document, in several pieces if it is longer than `LONGEST` characters."""
    if not isinstance(document, str):
        yield document
        return
    start = 0
    while len(document) - start > LONGEST:
        space = document.rfind(" ", start + 1, start + LONGEST)
        end = space if space > 0 else start + LONGEST
        yield document[start:end]
        start = end
    yield document[start:]


def _read_hub(where: str) -> tuple[list[Document], DataFile]:
    match = _HUB.fullmatch(where)
    if match is None:
        raise OptionError(
            f"no data set ({where})", hint="Data sets are given as hf:org/name:split:column."
        )
    try:
        datasets = import_module("datasets")
    except ImportError as e:
        raise OptionError(
            f"{where} needs the package datasets, which is not installed",
            hint="pip install datasets, or give a file.",
        ) from e
    try:
        rows = datasets.load_dataset(
            match["repo"],
            match["config"],
            revision=match["revision"],
            split=match["split"],
            streaming=True,
        )
        found, size, sha = _taken(rows, match["column"])
    except OptionError:
        raise
    except Exception as e:  # whatever the package raises, the finding is the same
        raise OptionError(f"cannot read {where}: {(str(e) or repr(e)).splitlines()[0]}") from e
    if not found:
        raise OptionError(f"{where} holds no text")
    return found, DataFile(where, sha, size)


def _taken(rows: Any, column: str) -> tuple[list[Document], int, str]:
    """The first documents of a stream, their bytes, and their hash."""
    found: list[Document] = []
    digest, size = hashlib.sha256(), 0
    for number, row in enumerate(rows):
        if column not in row:
            raise OptionError(f"row {number} has no column {column!r} ({', '.join(row)})")
        value = row[column]
        try:
            key = "messages" if isinstance(value, list) else "text"
            document = _document({key: value})
        except ValueError as e:
            raise OptionError(f"row {number}, column {column!r}: {e}") from e
        content = json.dumps(value, sort_keys=True).encode()
        digest.update(content)
        size += len(content)
        found += _cut(document) if document else ()
        if size >= HUB_CHARACTERS:
            break
    return found, size, digest.hexdigest()
