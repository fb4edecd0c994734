"""The `fastlora` command."""

from __future__ import annotations

import difflib
import sys
from importlib import import_module

import click

import fastlora
from fastlora.errors import FastloraError

# name -> what `fastlora --help` says of it; the module fastlora.cli.<name> is imported when it is called.
COMMANDS = {
    "run": "Train an adapter as a recipe says.",
    "check": "Say what is wrong with a recipe's data.",
    "plan": "Say what a run will need, and whether it fits.",
    "recipes": "List the bundled recipes, or show one.",
    "bench": "Measure speed and memory of engines on equal work.",
    "chat": "Talk with a run's model, tuned and before.",
    "generate": "Answer the prompts of a file.",
    "report": "Write the page of a run.",
    "doctor": "Check this machine: versions, GPU, kernels, folders.",
    "merge": "Merge a finished run's adapter into 16-bit weights.",
    "export": "Write a finished run's model as GGUF or 16-bit weights.",
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        command = import_module(f"fastlora.cli.{name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except FastloraError as error:
            click.echo(click.style("error: ", fg="red") + str(error), err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            ctx.exit(130)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        near = difflib.get_close_matches(args[0], COMMANDS, n=1)
        if near and args[0] not in COMMANDS:
            ctx.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(ctx, args)


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fastlora.__version__, prog_name="fastlora")
def cli() -> None:
    """The fastest honest way to fine-tune a language model with LoRA/QLoRA on one GPU."""


def main() -> None:
    sys.exit(cli())
