"""Every error that a user of fastlora is shown, drawn in one file.

FastloraError
├── UsageError        exit 2: the command line or the environment is wrong
│   └── RecipeError   exit 2: one or more problems in a recipe, all reported together
├── DataError         exit 1: rows that cannot be trained on
├── EngineError       exit 1: the model or its framework cannot do what the recipe asks
├── RunDirError       exit 1: a run directory that cannot be written, read or resumed
└── GateError         exit 3: a check that the user asked for was not met

Each message says what is wrong, where, and how to mend it.
"""

from __future__ import annotations

from collections.abc import Sequence


class FastloraError(Exception):
    """Base of all errors meant for the user; `exit_code` is the process's exit status."""

    exit_code = 1


class UsageError(FastloraError):
    exit_code = 2


class RecipeError(UsageError):
    """All problems of one recipe; `problems` holds a line each, `source` names the file."""

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        self.source = source
        self.problems = tuple(problems)
        super().__init__("\n".join(f"{source}: {problem}" for problem in self.problems))


class DataError(FastloraError):
    pass


class EngineError(FastloraError):
    pass


class RunDirError(FastloraError):
    pass


class GateError(FastloraError):
    exit_code = 3
