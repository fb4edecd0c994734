"""Is this machine fit to train on? Every question is answered, whatever is broken."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "wrong"]


@dataclass(frozen=True, slots=True)
class Check:
    name: str
    status: Status
    found: str
    remedy: str = ""
    """What mends it: a command where there is one."""


def examine() -> list[Check]:
    """All checks, in the order in which to mend them. Imports the libraries in other processes."""
    from fastlora.doctor import libraries, places
    from fastlora.doctor.ask import ask
    from fastlora.doctor.tested import FOR_GPU, NEEDED

    answers = ask([*NEEDED, "triton", "xformers", "models"])
    gpu = bool(answers["torch"].get("available"))
    if gpu:  # without one it refuses to be imported
        answers |= ask(["unsloth"])  # it patches the others, and wants to come before them
    answers |= ask(["kernels"], environment=libraries.kernel_environment(answers))
    rest = [*FOR_GPU, *(name for name in NEEDED if name != "torch")]
    asked: dict[str, Callable[[], Iterable[Check]]] = {
        "python": libraries.python,
        "torch": lambda: libraries.packages(answers, ["torch"]),
        "gpu": lambda: libraries.gpu(answers["torch"]),
        "packages": lambda: libraries.packages(answers, rest),
        "kernels": lambda: libraries.kernels(answers),
        "variables": lambda: places.variables(gpu),
        "folders": places.folders,
        "base models": lambda: places.models(answers["models"]),
    }
    return [check for name, one in asked.items() for check in _guarded(name, one)]


def _guarded(name: str, look: Callable[[], Iterable[Check]]) -> list[Check]:
    try:
        return list(look())
    except Exception as error:  # the doctor does not fall ill
        found = f"could not be looked at ({type(error).__name__}: {error})"
        return [Check(name, "wrong", found, "report it, with what `fastlora doctor --json` prints")]


def first_to_mend(checks: Iterable[Check]) -> Check | None:
    """The first that is wrong, else the first warning."""
    ranked = sorted(
        (check for check in checks if check.status != "ok"), key=lambda c: c.status != "wrong"
    )
    return ranked[0] if ranked else None
