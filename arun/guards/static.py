"""What can be seen in a generator function before it runs: yields inside scopes, in ``finally`` and in bare ``except``.

The names in ``with`` statements are resolved in the function's own globals and closure, so that an alias is found and
a function of the same name is not taken for another. A user's ``@asynccontextmanager`` is looked into.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from arun.guards.levels import checks_of, default_level, misuse
from arun.guards.scopes import is_scope_type

__all__ = ("check_function", "check_methods")

#: Functions that open a scope, by the package that they come from; types are known to :mod:`arun.guards.scopes`.
_OPENERS: Final = {
    "anyio": {"create_task_group", "fail_after", "move_on_after"},
    "asyncio": {"timeout", "timeout_at"},
    "async_timeout": {"timeout", "timeout_at"},
    "trio": {"fail_after", "fail_at", "move_on_after", "move_on_at", "open_nursery"},
}
_DEPTH: Final = 6
#: the methods that users write as generators
_METHODS: Final = ("run", "run_and_update", "tasks", "states", "actions", "reduce")


def check_function(function: Callable[..., Any], *, hosted: bool = False) -> None:
    """Look at the yields of a generator function; anything else, and what has no source, is left alone.

    :param hosted: whether its generators get a task of their own, so that their scopes may stay open.
    :raises MisuseError: at the default level, for a yield that can't work.
    """
    checks = checks_of(default_level())
    code = _generator_code(function)
    if checks is None or code is None:
        return
    body = _source(code)
    if body is None:
        return
    found = _bad_handler(body) or (None if hosted else _in_scope(body, _names_of(function), _DEPTH))
    if found is None:
        return
    line, what = found
    error = misuse(checks, f"{code.co_qualname} yields at {code.co_filename}:{line} {what}", code.co_filename, line)
    if error is not None:
        raise error


def check_methods(owner: type, *, hosted: bool) -> None:
    """As :func:`check_function`, for the methods that a class of the user's defines."""
    for name in _METHODS:
        method = vars(owner).get(name)
        if isinstance(method, (staticmethod, classmethod)):
            method = method.__func__
        if isinstance(method, types.FunctionType):
            # Hosted are the generators whose items the runtime takes, not the sources of subtasks.
            check_function(method, hosted=hosted and name not in {"tasks", "states", "actions"})


_Found = tuple[int, str]


def _generator_code(function: Callable[..., Any]) -> types.CodeType | None:
    target: Any = inspect.unwrap(function)
    if not isinstance(target, types.FunctionType):
        return None
    kinds = inspect.CO_ASYNC_GENERATOR | inspect.CO_GENERATOR
    return target.__code__ if target.__code__.co_flags & kinds else None


def _source(code: types.CodeType) -> list[ast.stmt] | None:
    """The body of a function with the line numbers of its file."""
    try:
        lines, first = inspect.getsourcelines(code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError, ValueError):  # typed into a shell, or a source that has changed since
        return None
    ast.increment_lineno(tree, first - 1)
    for node in ast.walk(tree):
        if isinstance(node, (ast.AsyncFunctionDef, ast.FunctionDef)) and node.name == code.co_name:
            return node.body
    return None


def _names_of(function: Callable[..., Any]) -> Callable[[str], Any]:
    target: Any = inspect.unwrap(function)
    cells = dict(zip(target.__code__.co_freevars, target.__closure__ or (), strict=True))
    # A name that the function itself binds is unknown before it runs.
    own = set(target.__code__.co_varnames) | set(target.__code__.co_cellvars)

    def resolve(name: str) -> Any:
        if name in cells:
            try:
                return cells[name].cell_contents
            except ValueError:  # bound later
                return None
        if name in own:
            return None
        return target.__globals__.get(name, getattr(builtins, name, None))

    return resolve


_Inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)


def _own(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Nodes and all below them, without functions and classes that are defined there."""
    for node in nodes:
        if not isinstance(node, _Inner):
            yield node
            yield from _own(ast.iter_child_nodes(node))


def _yields(nodes: Iterable[ast.AST]) -> Iterator[int]:
    return (node.lineno for node in _own(nodes) if isinstance(node, (ast.Yield, ast.YieldFrom)))


def _bad_handler(body: list[ast.stmt]) -> _Found | None:
    for node in _own(body):
        if isinstance(node, (ast.Try, ast.TryStar)):
            for line in _yields(node.finalbody):
                return line, "in a finally block, which also runs when the generator is closed; yield before it"
            for handler in node.handlers:
                if _catches_exit(handler):
                    for line in _yields(handler.body):
                        return line, (
                            "where it has caught GeneratorExit, so it can't be closed; catch Exception, not "
                            "BaseException"
                        )
    return None


def _catches_exit(handler: ast.ExceptHandler) -> bool:
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(kind is None or ast.unparse(kind) in {"BaseException", "GeneratorExit"} for kind in kinds)


def _in_scope(body: list[ast.stmt], resolve: Callable[[str], Any], depth: int) -> _Found | None:
    for node in _own(body):
        if isinstance(node, (ast.With, ast.AsyncWith)):
            line = next(_yields(node.body), None)
            if line is None:
                continue
            for item in node.items:
                scope = _scope(item.context_expr, resolve, depth)
                if scope is not None:
                    return line, (
                        f"inside {scope}, whose cancellation would hit whoever takes what it yields; move the yield "
                        "outside it, or mark the action hosted: @action(..., hosted=True), or the class attribute "
                        "hosted = True"
                    )
    return None


def _scope(expression: ast.expr, resolve: Callable[[str], Any], depth: int) -> str | None:
    """What a person calls the scope that an expression of a ``with`` opens; None where none is known."""
    if not isinstance(expression, ast.Call):
        return None
    opened = _value(expression.func, resolve)
    name = getattr(opened, "__name__", None)
    package = str(getattr(opened, "__module__", None)).partition(".")[0]
    if (isinstance(opened, type) and is_scope_type(opened)) or name in _OPENERS.get(package, ()):
        return ast.unparse(expression)
    inner = inspect.unwrap(opened) if isinstance(opened, types.FunctionType) else None
    if inner is None or inner is opened or not depth:
        return None
    code = _generator_code(inner)
    source = _source(code) if code is not None else None
    if source is None:
        return None
    found = _in_scope(source, _names_of(inner), depth - 1)
    if found is None:
        return None
    return f"{ast.unparse(expression)}, which is suspended inside a scope of its own (line {found[0]} of {name})"


def _value(expression: ast.expr, resolve: Callable[[str], Any]) -> Any:
    """What a dotted name stands for; attributes of modules and classes only, since others may run code."""
    if isinstance(expression, ast.Name):
        return resolve(expression.id)
    if isinstance(expression, ast.Attribute):
        owner = _value(expression.value, resolve)
        if isinstance(owner, types.ModuleType):
            return getattr(owner, expression.attr, None)  # anyio and others load their names lazily
        if isinstance(owner, type):
            return inspect.getattr_static(owner, expression.attr, None)
    return None
