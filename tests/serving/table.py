"""What every engine computes of every result of surgery, as a table in Markdown.

tests/serving/environments.sh
python tests/serving/table.py > table.md
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import served
import transformers
from served import ENGINES, NEW_TOKENS, PROMPTS, TOLERANCE

from moe_compose.validation.engines import ask, difference


def main() -> None:
    """Make all results, ask all engines."""
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as work:
        cases = dict(served.results(Path(work)))
        folders = list(cases.values())
        found, heads = {}, []
        for engine in ("transformers", *ENGINES):
            word = ENGINES[engine][0] if engine in ENGINES else engine
            python = served.python_of(engine if engine in ENGINES else "mlx-lm")
            begun = time.monotonic()
            version, found[engine] = ask(word, python, folders, PROMPTS, NEW_TOKENS)
            name = engine.removesuffix(" 4")
            heads.append(f"{name} {version} ({time.monotonic() - begun:.0f} s)")
            print(heads[-1], file=sys.stderr)
        print(f"reference: {heads[0]}\n")
        print("| operation, family |", " | ".join(heads[1:]), "|")
        print("|---|", "---|" * len(ENGINES), sep="")
        for case, folder in cases.items():
            reference = found["transformers"][str(folder)]
            cells = (_cell(found[engine][str(folder)], reference) for engine in ENGINES)
            print(f"| {case} |", " | ".join(cells), "|")


def _cell(answer: dict[str, Any], reference: dict[str, Any]) -> str:
    if "error" in answer:
        return "refused"
    same, largest = difference(answer["answers"], reference["answers"])
    good = same == len(PROMPTS) and largest <= TOLERANCE
    return f"{largest:.1e}" if good else f"**differs: {same} of {len(PROMPTS)}, {largest:.1e}**"


if __name__ == "__main__":
    main()
