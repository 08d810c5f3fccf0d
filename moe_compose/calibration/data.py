"""Text by domain: which files belong to which domain, and what they hold.

Reading comes before everything that takes long: what is wrong with the data is said before a model
is opened, all of it at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from moe_compose.calibration.reading import DataFile, Document, read_documents
from moe_compose.errors import OptionError

__all__ = [
    "DataFile",
    "Document",
    "Domain",
    "domains_of",
    "parse_domains",
    "read_domains",
    "read_texts",
]

#: The domain of data that nobody named.
UNNAMED = "text"

_NAME = re.compile(r"[\w][\w .+-]{0,63}")


@dataclass(frozen=True, slots=True)
class Domain:
    """Documents of one kind.

    Attributes:
        name: `py`, `de`, ...; `text` where nobody named it.
        documents: texts, and chats.
        files: where they came from; empty for texts that were given as such.
    """

    name: str
    documents: tuple[Document, ...]
    files: tuple[DataFile, ...] = ()


def parse_domains(
    domains: Sequence[str] = (), data: Sequence[str | Path] = ()
) -> dict[str, list[str]]:
    """Command-line words as domain → files.

    Args:
        domains: words `name=FILE`; the same name again adds a file to it.
        data: files of one unnamed domain.

    Returns:
        What `read_domains` takes.

    Raises:
        OptionError: both or neither are given, or a word that is no `name=FILE`.

    Example:
        >>> parse_domains(["en=a.txt", "py=b.txt", "en=c.txt"])
        {'en': ['a.txt', 'c.txt'], 'py': ['b.txt']}
    """
    if domains and data:
        raise OptionError(
            "both --domain and --data are given",
            hint="Name every domain (--domain name=FILE), or none (--data FILE).",
        )
    if not domains and not data:
        raise OptionError(
            "there is no text",
            hint="Give --domain name=FILE for each domain, or --data FILE.",
        )
    if data:
        return {UNNAMED: [str(file) for file in data]}
    found: dict[str, list[str]] = {}
    problems = []
    for word in domains:
        name, equals, file = word.partition("=")
        if not equals or not file or not _NAME.fullmatch(name):
            problems.append(f"--domain {word}: it must be name=FILE, such as py=code.txt")
        else:
            found.setdefault(name, []).append(file)
    if problems:
        raise OptionError("these are no domains", problems=problems)
    return found


def read_domains(given: Mapping[str, Sequence[str | Path]]) -> tuple[Domain, ...]:
    """Read and check all files.

    Args:
        given: domain → files: text, JSON lines, `.gz` of either, or `hf:org/name:split:column`.

    Returns:
        The domains, in the order given.

    Raises:
        OptionError: files that are missing, empty, binary, not UTF-8, or JSON lines with the wrong
            keys; all of them at once.

    Example:
        >>> read_domains({"py": ["code.txt"]})[0].name          # doctest: +SKIP
        'py'
    """
    found, problems = [], []
    for name, files in given.items():
        documents: list[Document] = []
        hashed: list[DataFile] = []
        for file in files:
            try:
                more, where = read_documents(file)
            except OptionError as e:
                problems.append(e)
                continue
            documents += more
            hashed.append(where)
        found.append(Domain(name, tuple(documents), tuple(hashed)))
    if len(problems) == 1:
        raise problems[0]
    if problems:
        lines = [line for e in problems for line in (e.message, *e.problems)]
        raise OptionError(f"{len(problems)} sources of text cannot be used", problems=lines)
    return tuple(found)


def read_texts(*words: str, unnamed: str | None = None) -> tuple[Domain, ...]:
    """Texts from files, named or not.

    Args:
        words: `FILE`, or `NAME=FILE`; the same name again adds a file to it.
        unnamed: name for files without one; None: they are one unnamed domain, and then no file
            has a name.

    Raises:
        OptionError: there are none, words that mean nothing, or unreadable text.

    Example:
        >>> texts = read_texts("en=novels.txt", "py=code.txt")      # doctest: +SKIP
    """
    if unnamed is not None:
        words = tuple(w if "=" in w else f"{unnamed}={w}" for w in words)
    named = [w for w in words if "=" in w]
    return read_domains(parse_domains(named, [w for w in words if "=" not in w]))


def domains_of(texts: Sequence[str] | Mapping[str, Sequence[str]]) -> tuple[Domain, ...]:
    """Texts that are in memory already: of one unnamed domain, or by domain.

    Raises:
        OptionError: a domain without text, or a bare string, which would be taken for letters.
    """
    by_name = texts if isinstance(texts, Mapping) else {UNNAMED: texts}
    for name, documents in by_name.items():
        if isinstance(documents, str):
            raise OptionError(f"domain {name} is one string; give a list of texts")
        if odd := next((d for d in documents if not isinstance(d, str)), None):
            raise OptionError(f"domain {name} holds a {type(odd).__name__} among its texts")
        if not any(d.strip() for d in documents):
            raise OptionError(f"domain {name} holds no text")
    return tuple(
        Domain(name, tuple(documents), (_in_memory(documents),))
        for name, documents in by_name.items()
    )


def _in_memory(documents: Sequence[str]) -> DataFile:
    content = "\0".join(documents).encode()
    return DataFile(f"{len(documents)} texts", sha256(content).hexdigest(), len(content))
