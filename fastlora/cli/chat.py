from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from fastlora.errors import FastloraError, UsageError

if TYPE_CHECKING:
    from fastlora.export.chat import Conversation
    from fastlora.export.load import Who

_CTRL_C = 130
HELP = """\
/tuned         the model with its adapter answers (so it begins)
/base          the model without it answers
/both          first the base, then the tuned model, whose answer stays in the conversation
/reset         begin anew; what the system says stays
/system TEXT   begin anew, with this as the system's turn; without TEXT, with none
/help          this
Ctrl-C stops an answer; Ctrl-D ends."""


def sampling_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What `chat` and `generate` share."""
    for option in (
        click.option("--seed", type=int, default=0, show_default=True, help="For sampling."),
        click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True,
                     help="Sample among the likeliest tokens of this total probability."),
        click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True,
                     help="0 answers greedily; above it, samples."),
    ):  # fmt: skip
        command = option(command)
    return command


def check_sampling(temperature: float, top_p: float) -> None:
    if top_p < 1 and not temperature:
        raise UsageError(
            "--top-p: has no effect on greedy answers; give a --temperature above 0 too"
        )


@click.command("chat")
@click.argument("run")
@click.option("--system", default="", help="What the system says first.")
@sampling_options
@click.option("--max-new-tokens", type=click.IntRange(1), default=512, show_default=True)
def command(
    run: str, system: str, temperature: float, top_p: float, seed: int, max_new_tokens: int
) -> None:
    """Talk with the model of RUN: a run's folder, such as runs/tiny/1, or a recipe, for its newest finished run.

    Greedily unless --temperature is given; the model's own generation settings are not used. /base, /tuned and
    /both choose who answers, /help lists all commands. Where stdin is no terminal, every line is asked in turn and
    the answers alone go to stdout.
    """
    from fastlora.train.stop import Interrupted, StopSignals

    check_sampling(temperature, top_p)
    try:
        with StopSignals():
            conversation = _load(
                run, seed, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p
            )
    except Interrupted as stopped:
        sys.exit(stopped.exit_code)
    if system:
        conversation.reset(system)
    _talk(conversation, sys.stdin.isatty())


def _load(run: str, seed: int, **sampling: Any) -> Conversation:
    from fastlora.rundir.find import find_run

    found = find_run(run)
    with contextlib.redirect_stdout(sys.stderr):  # libraries print banners
        from fastlora.export.chat import Conversation
        from fastlora.export.load import load_run

        tuned = load_run(found)
        from transformers import set_seed

        set_seed(seed)
    how = "sampling" if sampling["temperature"] else "greedy"
    click.echo(f"{found.path} on {tuned.model.device}, {how}; /help lists commands", err=True)
    if tuned.base_note:
        click.echo(f"note: with the adapter off, {tuned.base_note}", err=True)
    return Conversation(tuned, **sampling)


def _talk(conversation: Conversation, terminal: bool) -> None:
    """At a terminal a mistake is told and the talk goes on; elsewhere it ends the command."""
    who: list[Who] = ["tuned"]
    while (line := _line("+".join(who) + "> " if terminal else "", terminal)) is not None:
        try:
            if line.startswith("/"):
                who = _command(conversation, line, who)
            else:
                _ask(conversation, line, who, terminal)
        except FastloraError as error:
            if not terminal:
                raise
            click.echo(f"{error}", err=True)
        except KeyboardInterrupt:  # before the answer's first token, or behind its last
            if not terminal:
                raise
            click.echo()


def _ask(conversation: Conversation, line: str, who: list[Who], terminal: bool) -> None:
    heard: list[Who] = []

    def write(one: Who) -> Callable[[str], None]:
        if heard:
            click.echo()
        heard.append(one)
        if len(who) > 1:
            click.echo(click.style(f"{one}: ", dim=True), nl=not terminal, err=not terminal)
        return lambda text: click.echo(text.encode("utf-8", "replace").decode(), nl=False)

    answer, whole = conversation.ask(line, who, write)
    click.echo()
    if not whole and not terminal:
        sys.exit(_CTRL_C)
    if not answer.strip():
        click.echo("note: an empty answer; the conversation goes on without this turn", err=True)


def _line(prompt: str, terminal: bool) -> str | None:
    """The next line that says something; None when there is none."""
    if terminal:
        with contextlib.suppress(
            ImportError
        ):  # not in every build of Python; then without line editing
            import readline  # noqa: F401
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            if terminal:
                click.echo()
            return None
        except KeyboardInterrupt:
            if not terminal:
                sys.exit(_CTRL_C)
            click.echo("\nCtrl-D ends", err=True)
            continue
        except UnicodeDecodeError as error:
            raise UsageError(f"stdin: not UTF-8 at byte {error.start}; send UTF-8") from None
        if line:
            return line


def _command(conversation: Conversation, line: str, who: list[Who]) -> list[Who]:
    """Who answers from here on."""
    name, _, text = line.partition(" ")
    match name:
        case "/base":
            return ["base"]
        case "/tuned":
            return ["tuned"]
        case "/both":
            return ["base", "tuned"]
        case "/reset":
            conversation.reset()
        case "/system":
            conversation.reset(text.strip())
        case "/help":
            click.echo(HELP, err=True)
        case _:
            raise UsageError(f"{name}: no such command\n{HELP}")
    return who
