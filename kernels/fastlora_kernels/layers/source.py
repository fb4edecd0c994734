"""What the source of a module's forward says of it: which function does the work, and how that calls its layers.

Read behind torch.compile, and through a forward that does nothing but call a function with its module, which is how
the classes that unsloth writes come to theirs.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Sequence
from types import FunctionType
from typing import Any

_DEEP = 8
"""So many functions may stand one behind the other."""


def worker(forward: Any, as_given: bool = False) -> ast.FunctionDef | None:
    """The function that does what `forward` does, without decorators, annotations and docstring. None if there is no
    source, or a decorator other than torch.compile in between. `as_given`: through functions alone that pass on every
    argument as they got it."""
    for _ in range(_DEEP):
        if getattr(forward, "_torchdynamo_disable", False):
            return None
        function = forward
        # functools.wraps copies the mark that torch.compile leaves: only what wraps the marked function itself does no
        # more than it. What another decorator wraps is not what is called.
        wrapped = getattr(forward, "__wrapped__", None)
        if wrapped is not None and wrapped is getattr(forward, "_torchdynamo_orig_callable", None):
            function = wrapped
        if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
            return None
        tree = function_of(function)
        if tree is None:
            return None
        compiles = [
            function is not forward and "compile" in ast.unparse(one) for one in tree.decorator_list
        ]
        if not all(compiles):
            return None  # some decorators give back what they changed, and do not say so
        call = _only_call(tree)
        further = call and _named(function, call.func.id)  # type: ignore[attr-defined]
        goes_on = callable(further) and (not as_given or _passed_on(tree, call, function, further))
        if not goes_on:
            tree.decorator_list, tree.returns = [], None
            for node in ast.walk(tree.args):
                if isinstance(node, ast.arg):
                    node.annotation = None
            return tree
        forward = further
    return None


def in_order(function: ast.FunctionDef, names: Sequence[str]) -> tuple[str, ...]:
    """The layers `names` of its module in the order in which `function` calls them, if it always calls each once, all
    on one x, in statements on end that do nothing else but to call methods and to add up; else ()."""
    calls: dict[str, ast.Call] = {}
    places: list[int] = []
    if not names or not function.args.args:
        return ()
    module = function.args.args[0].arg
    for place, statement in enumerate(function.body):
        for node in ast.walk(statement):
            name = _layer_of(node, module)
            if name in names:
                if name in calls:
                    return ()
                calls[name] = node  # type: ignore[assignment]
                places.append(place)
    given = {call.args[0].id for call in calls.values()}  # type: ignore[attr-defined]
    if set(calls) != set(names) or len(given) != 1:
        return ()
    first, last = min(places), max(places)
    nodes = [node for one in function.body[first : last + 1] for node in ast.walk(one)]
    uses = [node for node in nodes if isinstance(node, ast.Name) and node.id in given]
    on_end = set(places) == set(range(first, last + 1)) and len(uses) == len(names)
    if not on_end or not all(map(_harmless, nodes)):
        return ()
    return tuple(sorted(calls, key=lambda name: (calls[name].lineno, calls[name].col_offset)))


_HARMLESS = (
    ast.Assign, ast.Return, ast.Name, ast.Tuple, ast.Starred, ast.Attribute, ast.Subscript, ast.Slice, ast.Constant,
    ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop, ast.Load, ast.Store,
)  # fmt: skip


def _harmless(node: ast.AST) -> bool:
    """Of what stands between two of the calls: not skipped, repeated or put off, and writing to no tensor."""
    if isinstance(node, ast.Call):  # of a method, and none that writes to what it is called on
        return isinstance(node.func, ast.Attribute) and not node.func.attr.endswith("_")
    if isinstance(node, ast.keyword):
        return node.arg not in ("inplace", "out")
    if isinstance(getattr(node, "ctx", None), ast.Store):
        return isinstance(node, ast.Name | ast.Tuple)
    return isinstance(node, _HARMLESS)


def function_of(forward: Any) -> ast.FunctionDef | None:
    """`forward` as it was written, without its docstring; None if it has no source, or is no function."""
    try:
        return function_in(inspect.getsource(forward))
    except (OSError, TypeError, SyntaxError):
        return None


def function_in(source: str) -> ast.FunctionDef | None:
    """The function that is all of `source`, without its docstring; None if it is none.

    Raises SyntaxError.
    """
    function = ast.parse(textwrap.dedent(source)).body[0]
    return without_docstring(function) if isinstance(function, ast.FunctionDef) else None


def without_docstring(function: ast.FunctionDef) -> ast.FunctionDef:
    if ast.get_docstring(function) is not None:
        function.body.pop(0)
    return function


def _layer_of(node: ast.AST, module: str) -> str:
    """The name of the layer that is called on one name alone, or ""."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return ""
    holder, alone = node.func.value, len(node.args) == 1 and not node.keywords
    on_name = alone and isinstance(node.args[0], ast.Name)
    is_layer = isinstance(holder, ast.Name) and holder.id == module and on_name
    return node.func.attr if is_layer else ""


def _only_call(tree: ast.FunctionDef) -> ast.Call | None:
    """return f(self, ...), where that is all, and self stands nowhere else in it."""
    if len(tree.body) != 1 or not tree.args.args or not isinstance(tree.body[0], ast.Return):
        return None
    call, module = tree.body[0].value, tree.args.args[0].arg
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.args):
        return None
    named = [node for node in ast.walk(call) if isinstance(node, ast.Name) and node.id == module]
    return call if named == [call.args[0]] else None


def _passed_on(tree: ast.FunctionDef, call: Any, outer: FunctionType, inner: Any) -> bool:
    """Whether each argument goes on as it came, in its order or by its name, and both may be called alike."""
    given = [argument.arg for argument in tree.args.args]
    if tree.args.vararg or tree.args.kwarg or tree.args.kwonlyargs or tree.args.posonlyargs:
        return False
    by_place = [getattr(argument, "id", "") for argument in call.args]
    by_name = [(word.arg, getattr(word.value, "id", "")) for word in call.keywords]
    if any(name != value for name, value in by_name):
        return False
    if by_place + [value for _, value in by_name] != given:
        return False
    try:
        theirs, ours = (inspect.signature(one).parameters.values() for one in (inner, outer))
    except (TypeError, ValueError):  # of a function that is not Python's
        return False
    alike = [[(one.name, one.kind, one.default) for one in each] for each in (theirs, ours)]
    return alike[0] == alike[1]


def _named(function: FunctionType, name: str) -> Any:
    """What `name` stands for in it."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    if name in cells:
        try:
            return cells[name].cell_contents
        except ValueError:  # not yet bound
            return None
    return function.__globals__.get(name)
