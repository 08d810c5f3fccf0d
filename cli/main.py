"""`moe-compose`: the commands, and what an exception means to whoever typed one.

Exit codes: 0 done, 1 failed while running, 2 wrong usage, 3 written or checked but not valid,
4 a condition does not hold, 130 interrupted.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated

import typer
from typer.main import get_command

from moe_compose.errors import MoeComposeError
from moe_compose.version import __version__

from .commands.anchor import anchor
from .commands.calibrate import calibrate
from .commands.change import add_expert, expand, remove_expert, swap_expert
from .commands.compose import compose
from .commands.diff import diff
from .commands.evaluate import evaluate
from .commands.extract import extract
from .commands.inspect import inspect
from .commands.ls import ls
from .commands.merge import merge
from .commands.pack_expert import pack_expert
from .commands.plot import plot
from .commands.prune import prune
from .commands.quant_plan import quant_plan
from .commands.report import report
from .commands.run import run as run_recipe
from .commands.sweep import sweep
from .commands.train_router import train_router
from .commands.tune import tune
from .commands.upcycle import upcycle
from .commands.validate import validate
from .help import WIDEST, Command, Commands, first_sentence
from .output import LogHandler, out
from .programs import runnable

#: The commands, as `--help` groups them.
_COMMANDS = {
    "Make a mixture": (upcycle, compose, anchor),
    "Change its experts": (add_expert, swap_expert, remove_expert, expand, extract, pack_expert),
    "Make it smaller": (prune, merge, sweep, quant_plan),
    "Train it": (train_router,),
    "Look and measure": (inspect, diff, calibrate, plot, evaluate, validate, report),
    "More": (run_recipe, ls, tune),
}

app = typer.Typer(
    name="moe-compose",
    help="Surgery on mixture-of-experts checkpoints, exact and one tensor at a time.",
    cls=Commands,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": WIDEST},
)
for panel, commands in _COMMANDS.items():
    for command in commands:
        app.command(cls=Command, short_help=first_sentence(command), rich_help_panel=panel)(command)


def _show_version(wanted: bool) -> None:
    if wanted:
        out.text(f"moe-compose {__version__}")
        raise typer.Exit


@app.callback()
def root(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks, and log everything.")
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Surgery on mixture-of-experts checkpoints, exact and one tensor at a time."""
    out.debug = debug
    logging.getLogger("moe_compose").setLevel(logging.DEBUG if debug else logging.WARNING)


def main() -> None:
    """The console script."""
    code = run(sys.argv[1:])
    if os.environ.get("RANK", "0") != "0":  # torch's threads may abort an exit that puts all away
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run a command; returns the exit code.

    Args:
        arguments: the command line after the program's name.
    """
    out.reset()
    if "--json" in arguments:  # what is wrong with the flags is a document too
        out.mode = "json"
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # no name breaks a terminal that cannot show it
            stream.reconfigure(errors="backslashreplace")
    logger, handler = logging.getLogger("moe_compose"), LogHandler()
    level = logger.level
    logger.addHandler(handler)
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read the output has seen enough
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        out.settle()
        logger.removeHandler(handler)
        logger.setLevel(level)


def _run(arguments: Sequence[str]) -> int:
    try:
        code = get_command(app).main(
            args=list(arguments) or ["--help"], prog_name="moe-compose", standalone_mode=False
        )
    except MoeComposeError as error:
        out.error(error)
        return error.exit_code
    except typer.TyperException as error:
        return _usage(error)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except BrokenPipeError:
        raise
    except Exception as error:
        hint = "" if out.debug else "moe-compose --debug ... shows where."
        out.failure("Exception", f"{type(error).__name__}: {error}", hint=hint)
        return 1
    if code == 130:
        out.failure("Interrupted", "interrupted", hint=runnable(out.interrupted), code=code)
    return int(code or 0) if arguments else 2


def _usage(error: typer.TyperException) -> int:
    """Wrong usage, in one sentence."""
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "moe-compose"
    message = error.format_message().replace(": Value error, ", ": ").rstrip()
    hint, code = f"{path} --help shows how.", error.exit_code
    out.failure("Usage", message or "wrong usage", hint=hint, code=code)
    return error.exit_code
