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
    if gpu:
        # It patches the others and wants to be there first.
        answers |= ask([name for name in FOR_GPU if name.startswith("unsloth")])
    answers |= ask(["kernels"], environment=libraries.kernel_environment(answers))
    asked: list[Callable[[], Iterable[Check]]] = [
        libraries.python,
        lambda: libraries.packages(answers, ["torch"]),
        lambda: libraries.gpu(answers["torch"]),
        lambda: libraries.packages(
            answers, [*FOR_GPU, *(name for name in NEEDED if name != "torch")]
        ),
        lambda: libraries.kernels(answers),
        lambda: places.variables(gpu),
        places.folders,
        lambda: places.models(answers["models"]),
    ]
    return [check for one in asked for check in _guarded(one)]


def _guarded(ask_one: Callable[[], Iterable[Check]]) -> list[Check]:
    try:
        return list(ask_one())
    except Exception as error:  # the doctor does not fall ill
        name = getattr(ask_one, "__name__", "doctor")
        return [
            Check(
                name,
                "wrong",
                f"could not be looked at ({type(error).__name__}: {error})",
                "report this",
            )
        ]


def first_to_mend(checks: Iterable[Check]) -> Check | None:
    """The first that is wrong, else the first warning."""
    ranked = sorted(
        (check for check in checks if check.status != "ok"), key=lambda c: c.status != "wrong"
    )
    return ranked[0] if ranked else None
