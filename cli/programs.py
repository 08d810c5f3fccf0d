"""Commands in hints, so that they run as they are printed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path

#: A line that is a command to be copied, and its program.
_LINE = re.compile(r"(?m)^(\s+)(moe-compose|python|pip|tensorboard)(?= )")


def runnable(text: str) -> str:
    """A hint whose commands name their program as it can be typed here."""
    return _LINE.sub(lambda found: found[1] + program(found[2]), text)


def program(name: str) -> str:
    """How a program of this environment is called: by name where that finds it, else by path."""
    here, found = Path(sys.executable).absolute().with_name(name), shutil.which(name)
    if not here.exists() or (found is not None and Path(found).absolute() == here):
        return name
    return shlex.quote(min(str(here), os.path.relpath(here), key=len))
