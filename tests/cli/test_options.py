"""Field = keyword = flag = help: the options of a command are those of its dataclass.

Run: pytest tests/cli/test_options.py
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest
import typer
from moe_compose_cli.commands import upcycle as module
from moe_compose_cli.main import app
from moe_compose_cli.parameters import attribute_docs, flag_of, size_in_bytes, with_options
from typer.main import get_command

from moe_compose.surgery.upcycle_options import UpcycleOptions


@dataclass(frozen=True, kw_only=True)
class Options:
    """Some.

    Attributes:
        size, weight: Two of
            a kind.
        names: Any, [bold]text[/bold] too.
    """

    size: int = 1
    weight: float | None = None
    names: tuple[str, ...] = ()


def parameters_of(command: str) -> dict[str, Any]:
    group: Any = get_command(app)
    return {p.name: p for p in group.commands[command].params}


def test_every_field_is_a_flag_with_its_default_and_its_help() -> None:
    flags, docs = parameters_of("upcycle"), attribute_docs(UpcycleOptions)
    assert docs.keys() == {f.name for f in fields(UpcycleOptions)}
    for field in fields(UpcycleOptions):
        flag = flags[field.name]
        assert flag.opts == [f"--{field.name.replace('_', '-')}"]
        assert flag.help == docs[field.name]
        assert (tuple(flag.default) if flag.multiple else flag.default) == field.default
        assert flag.help.endswith(".")


def test_shared_flags_are_there_too() -> None:
    flags = {flag for p in parameters_of("upcycle").values() for flag in p.opts}
    assert flags >= {
        "--dry-run", "--json", "--quiet", "-q", "--resume", "--overwrite", "--shard-size",
        "--validate", "--data",
    }  # fmt: skip


def test_flags_arrive_as_options() -> None:
    app = typer.Typer()
    seen: list[tuple[str, Options, bool]] = []

    @app.command()
    @with_options(Options)
    def do(what: str, options: Options, loud: bool = False) -> None:
        seen.append((what, options, loud))

    words = ["x", "--size", "3", "--names", "a", "--names", "b", "--loud"]
    get_command(app).main(args=words, standalone_mode=False)
    assert seen == [("x", Options(size=3, names=("a", "b")), True)]
    assert attribute_docs(Options) == {
        "size": "Two of a kind.",
        "weight": "Two of a kind.",
        "names": "Any, [bold]text[/bold] too.",
    }


def test_allow_may_be_repeated_and_method_is_checked() -> None:
    flags = parameters_of("upcycle")
    assert flags["allow"].multiple
    assert flag_of("num_experts") == "--num-experts"
    assert module.UpcycleOptions is UpcycleOptions


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500MB", 5 * 10**8),
        ("1.5gb", 1_500_000_000),
        ("12 KB", 12000),
        ("7", 7),
        ("7B", 7),
        (9, 9),
        ("2TB", 2 * 10**12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "5GiB", "GB", "1e9", "0.1B", "5 5"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="no size in bytes"):
        size_in_bytes(text)
