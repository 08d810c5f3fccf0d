"""Every exception that moe-compose raises on purpose.

One small tree. A message states the rule, the value in parentheses and where it was found; `hint`
says what to do next. When an input has several faults they are collected and raised together, so
that a user mends them in one go.
"""

from __future__ import annotations

from collections.abc import Sequence


class MoeComposeError(Exception):
    """Base of all errors of this package.

    Args:
        message: the rule that was broken, with the offending values and where they stand.
        problems: single faults, when there are several; shown one a line under the message.
        hint: what to do next.

    Attributes:
        exit_code: what the command line exits with (1 failed while running, 2 wrong usage, 4 a
            condition does not hold).
    """

    exit_code = 1

    def __init__(self, message: str, *, problems: Sequence[str] = (), hint: str = "") -> None:
        self.message = message
        self.problems = tuple(problems)
        self.hint = hint
        super().__init__(
            "\n".join(
                [message, *(f"  - {p}" for p in self.problems), *([f"  {hint}"] if hint else [])]
            )
        )


class OptionError(MoeComposeError):
    """An option, or a combination of options, that cannot be meant."""

    exit_code = 2


class CheckpointError(MoeComposeError):
    """A checkpoint that is missing, damaged, or hostile."""


class UnsupportedError(MoeComposeError):
    """A model family, a pair of families, or a fact of a model that this operation has no exact
    answer for.
    """

    exit_code = 2


class PlanError(MoeComposeError):
    """A plan that breaks a law: a tensor unaccounted for, a shape its transforms do not give."""


class WriteError(MoeComposeError):
    """The output could not be written: not empty, not writable, no space, another plan's shards."""


class ConditionError(MoeComposeError):
    """A result that is not as good as was demanded of it: a recipe's `assert`, or `max_kl`."""

    exit_code = 4
