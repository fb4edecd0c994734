"""What is read out of a forward's source: who does the work, and whether its layers follow one another on one x."""

from __future__ import annotations

import ast
import functools
from typing import Any

import pytest
import torch
from fastlora_kernels.layers.source import in_order, worker
from torch import nn

QKV = ("q_proj", "k_proj", "v_proj")


def read(module: type) -> tuple[str, ...]:
    function = worker(module.forward)  # type: ignore[attr-defined]
    return () if function is None else in_order(function, QKV)


def body(forward: Any, as_given: bool = False) -> str:
    function = worker(forward, as_given)
    return "" if function is None else "; ".join(map(ast.unparse, function.body))


class OnEnd(nn.Module):
    def forward(self, x: Any, scale: float = 2.0) -> Any:
        """Not in the order of QKV, one of them in more than a call."""
        shape = x.shape[:-1]
        v = self.v_proj(x)
        q = self.q_proj(x).view(*shape, -1, 4)
        k, n = self.k_proj(x) * scale, shape[0]
        return self.o_proj(q + k + v), n


class InOne(nn.Module):
    def forward(self, x: Any) -> Any:
        return self.o_proj(self.act(self.q_proj(x)) * self.k_proj(x) * self.v_proj(x))


def test_layers_that_follow_one_another() -> None:
    assert read(OnEnd) == ("v_proj", "q_proj", "k_proj")
    assert read(InOne) == QKV


class WritesBetween(nn.Module):
    def forward(self, x: Any) -> Any:
        q = self.q_proj(x)
        x.mul_(2)
        k = self.k_proj(x)
        v = self.v_proj(x)
        return q + k + v


class WritesInOne(nn.Module):
    def forward(self, x: Any) -> Any:
        y = x
        q = self.q_proj(x)
        k = self.k_proj(x) + y.mul_(2)
        v = self.v_proj(x)
        return q + k + v


class Stores(nn.Module):
    def forward(self, x: Any) -> Any:
        y = x
        q = self.q_proj(x)
        y[0] = self.k_proj(x)
        v = self.v_proj(x)
        return q + v


class AddsTo(nn.Module):
    def forward(self, x: Any) -> Any:
        y = x
        q = self.q_proj(x)
        y += self.k_proj(x)
        v = self.v_proj(x)
        return q + v


class Others(nn.Module):
    def forward(self, x: Any, y: Any) -> Any:
        q = self.q_proj(x)
        k = self.k_proj(y)
        v = self.v_proj(y)
        return q + k + v


class Another(nn.Module):
    def forward(self, x: Any) -> Any:
        q = self.q_proj(x)
        x = self.norm(q)
        k = self.k_proj(x)
        v = self.v_proj(x)
        return q + k + v


class Twice(nn.Module):
    def forward(self, x: Any) -> Any:
        q = self.q_proj(x)
        k = self.k_proj(x)
        v = self.v_proj(x)
        return q + k + v + self.q_proj(x)


class Branches(nn.Module):
    def forward(self, x: Any) -> Any:
        if x.sum() > 0:
            q = self.q_proj(x)
            k = self.k_proj(x)
            v = self.v_proj(x)
            return q + k + v
        return x


class Missing(nn.Module):
    def forward(self, x: Any) -> Any:
        q = self.q_proj(x)
        k = self.k_proj(x)
        return q + k + self.v_proj.weight


class Decorated(nn.Module):
    @torch.no_grad()
    def forward(self, x: Any) -> Any:
        q = self.q_proj(x)
        k = self.k_proj(x)
        v = self.v_proj(x)
        return q + k + v


class PutOff(nn.Module):
    def forward(self, x: Any, quiet: Any) -> Any:
        q = self.q_proj(x)
        k = quiet(lambda: self.k_proj(x))
        v = self.v_proj(x)
        return q + k + v


class Perhaps(nn.Module):
    def forward(self, x: Any) -> Any:
        q = self.q_proj(x)
        k = self.k_proj(x)
        v = self.v_proj(x) if self.use else k
        return q + k + v


class InPlace(nn.Module):
    def forward(self, x: Any, functional: Any) -> Any:
        y = x
        q = self.q_proj(x)
        k = self.k_proj(x) + functional.relu(y, inplace=True)
        v = self.v_proj(x)
        return q + k + v


class OfAFunction(nn.Module):
    def forward(self, x: Any, write: Any) -> Any:
        y = x
        q = self.q_proj(x)
        k = self.k_proj(x) * write(y)
        v = self.v_proj(x)
        return q + k + v


class Repeats(nn.Module):
    def forward(self, x: Any) -> Any:
        q = self.q_proj(x)
        k, _ = [self.k_proj(x) for _ in range(2)]
        v = self.v_proj(x)
        return q + k + v


@pytest.mark.parametrize(
    "kind",
    [
        WritesBetween, WritesInOne, Stores, AddsTo, Others, Another, Twice, Branches, Missing,
        Decorated, PutOff, Perhaps, InPlace, OfAFunction, Repeats,
    ],
)  # fmt: skip
def test_others_are_not_said_to(kind: type) -> None:
    assert read(kind) == ()


def work(self: Any, x: Any, scale: Any = 1) -> Any:
    """What all below come to."""
    return self.down(x) * scale


COMPILED = torch.compile(work, backend="eager")
BUILT_IN: Any = torch._C._nn.gelu
NOTHING: Any = None
DISABLED = torch.compiler.disable(work)
NO_GRAD, COMPILED_NO_GRAD = torch.no_grad()(work), torch.no_grad()(COMPILED)
THEN_COMPILED = torch.compile(NO_GRAD, backend="eager")


@functools.wraps(COMPILED)
def UNSLOTHS(*args: Any, **kwargs: Any) -> Any:
    """A wrapper that chooses between two of the same work, and has what torch.compile left on one of them."""
    return COMPILED(*args, **kwargs)


UNSLOTHS.__wrapped__ = work


@functools.wraps(COMPILED)
def TWICE(*args: Any, **kwargs: Any) -> Any:
    """Has the same marks, but for the function that it wraps."""
    return 2 * COMPILED(*args, **kwargs)


def made(inner: Any) -> Any:
    def forward(self: Any, x: Any, scale: Any = 1) -> Any:
        return inner(self, x, scale)

    return forward


def changed(function: Any) -> Any:
    function.__defaults__ = (7,)
    return function


class Passes:
    """Forwards that pass on what they get, and some that do not."""

    def named(self: Any, x: Any, scale: Any = 1) -> Any:
        """With a docstring."""
        return COMPILED(self, x=x, scale=scale)

    def unsloths(self: Any, x: Any, scale: Any = 1) -> Any:
        return UNSLOTHS(self, x, scale=scale)

    def less(self: Any, x: Any, scale: Any = 1) -> Any:
        return work(self, x)

    def others(self: Any, x: Any, scale: Any = 1) -> Any:
        return work(self, x, scale=scale + 1)

    def turned(self: Any, x: Any, scale: Any = 1) -> Any:
        return work(self, scale, x)

    def more(self: Any, x: Any, scale: Any = 1) -> Any:
        return work(self, self.norm(x), scale)

    def off(self: Any, x: Any, scale: Any = 1) -> Any:
        return DISABLED(self, x, scale)

    def no_grad(self: Any, x: Any, scale: Any = 1) -> Any:
        return NO_GRAD(self, x, scale)

    def no_grad_compiled(self: Any, x: Any, scale: Any = 1) -> Any:
        return THEN_COMPILED(self, x, scale)

    def no_grad_over_compiled(self: Any, x: Any, scale: Any = 1) -> Any:
        return COMPILED_NO_GRAD(self, x, scale)

    def twice(self: Any, x: Any, scale: Any = 1) -> Any:
        return TWICE(self, x, scale)

    def named_otherwise(self: Any, y: Any, scale: Any = 1) -> Any:
        return work(self, y, scale)

    def by_default(self: Any, x: Any, scale: Any = 2) -> Any:
        return work(self, x, scale)

    def of_no_python(self: Any, x: Any) -> Any:
        return BUILT_IN(self, x)

    def of_nothing(self: Any, x: Any) -> Any:
        return NOTHING(self, x)

    @changed
    def decorated(self: Any, x: Any, scale: Any = 1) -> Any:
        return work(self, x, scale)


DONE = "return self.down(x) * scale"


def test_who_does_the_work() -> None:
    for as_given in (False, True):
        assert body(work, as_given) == DONE
        assert body(COMPILED, as_given) == DONE
        assert body(Passes.named, as_given) == DONE
        assert body(Passes.unsloths, as_given) == DONE
        assert body(made(COMPILED), as_given) == DONE
        for kind in (
            Passes.off, Passes.no_grad, Passes.no_grad_compiled, Passes.no_grad_over_compiled, Passes.twice,
            Passes.decorated,
        ):  # fmt: skip
            assert body(kind, as_given) == "", kind
    for kind in (
        Passes.less, Passes.others, Passes.turned, Passes.named_otherwise, Passes.by_default,
    ):  # fmt: skip
        assert body(kind) == DONE
        assert body(kind, as_given=True).startswith("return work(self"), kind
    assert body(Passes.of_no_python) == ""
    assert body(Passes.of_no_python, as_given=True) == "return BUILT_IN(self, x)"
    assert body(Passes.of_nothing) == body(Passes.of_nothing, as_given=True)
    assert body(Passes.more).startswith("return work(self, self.norm(x)")


def test_what_has_no_source_is_not_read() -> None:
    assert body(torch.nn.functional.gelu) == ""
    assert body(torch.nn.functional.linear) == ""
    assert body(functools.partial(work)) == ""
    made: dict[str, Any] = {}
    exec("def forward(self, x):\n    return self.down(x)", made)
    assert body(made["forward"]) == ""
