"""What a run says on stderr."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text


class Notes:
    """Says things on stderr and, when called, remembers them for the manifest."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.said: list[str] = []

    def __call__(self, message: str) -> None:
        self.said.append(message)
        self.say(message)

    def say(self, message: str) -> None:
        # As it stands, on one line: what a user typed is no markup, and a command is there to be copied.
        self.console.print(Text(message), soft_wrap=True)
