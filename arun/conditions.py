"""Conditions: when a transition is taken. Each is evaluated once per step, on the State after it.

>>> when(kind="question", tries__lt=3)
>>> expr("tries < 3 and kind in ('question', 'chat')")
>>> ~when(done=True) & expr("n > 0")
"""

from __future__ import annotations

import ast
import builtins
import inspect
import operator
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ClassVar, Final, NoReturn, cast

from arun.errors import MisuseError
from arun.state import State

__all__ = ("Condition", "as_condition", "default", "expr", "truth", "when")


class Condition:
    """A named predicate on a State, sync or async. Combine with ``~``, ``&`` and ``|``.

    :param keys: the keys that it reads; empty where they aren't known.
    :param resolver: ``State -> bool``, or a coroutine function of that.
    :raises MisuseError: for a text instead of a list of keys, and for a resolver that can't be called.
    :ivar recipe: how it was made, so that another process can make it again: ``("when", fields)``,
        ``("expr", source)``, ``("not", condition)`` and so on; ``("function",)`` for any other resolver.
    """

    __slots__ = ("keys", "name", "recipe", "resolver")

    #: :data:`arun.default`, by its name in Burr
    default: ClassVar[Condition]

    def __init__(
        self,
        keys: Sequence[str],
        resolver: Callable[[State], bool | Awaitable[bool]],
        name: str | None = None,
        *,
        recipe: tuple[Any, ...] = ("function",),
    ) -> None:
        if isinstance(keys, str):
            raise MisuseError(f"Condition(keys={keys!r}): a list of keys is meant: [{keys!r}]")
        if not callable(resolver):
            raise MisuseError(f"Condition(resolver={resolver!r}): it takes a function of a State: lambda state: ...")
        self.keys = tuple(keys)
        self.resolver = resolver
        self.name = name or str(getattr(resolver, "__name__", resolver))
        self.recipe = recipe

    @classmethod
    def lmda(cls, resolver: Callable[[State], bool | Awaitable[bool]], state_keys: Sequence[str]) -> Condition:
        """A Condition of any predicate (Burr's name for it)."""
        return cls(state_keys, resolver)

    @staticmethod
    def when(**fields: Any) -> Condition:
        """:func:`arun.when`, by its name in Burr."""
        return when(**fields)

    @staticmethod
    def expr(source: str) -> Condition:
        """:func:`arun.expr`, by its name in Burr."""
        return expr(source)

    @staticmethod
    def safe_expr(source: str) -> Condition:
        """:func:`arun.expr`, which is as safe as Burr's condition of this name."""
        return expr(source)

    @property
    def needed_keys(self) -> frozenset[str] | None:
        """The keys that it can read; None where that can be any."""
        kind, *operands = self.recipe
        if kind not in {"not", "and", "or"}:
            return frozenset(self.keys) if self.keys or kind != "function" else None
        keys: frozenset[str] = frozenset()
        for operand in operands:
            needed = operand.needed_keys
            if needed is None:
                return None
            keys |= needed
        return keys

    async def holds(self, state: State) -> bool:
        """Evaluate on a State."""
        return await truth(self.resolver(state))

    def __invert__(self) -> Condition:
        async def negated(state: State) -> bool:
            return not await self.holds(state)

        return Condition(self.keys, negated, f"~({self.name})", recipe=("not", self))

    def __and__(self, other: Condition) -> Condition:
        other = as_condition(other)

        async def both(state: State) -> bool:
            return await self.holds(state) and await other.holds(state)

        name = f"({self.name}) & ({other.name})"
        return Condition((*self.keys, *other.keys), both, name, recipe=("and", self, other))

    def __or__(self, other: Condition) -> Condition:
        other = as_condition(other)

        async def either(state: State) -> bool:
            return await self.holds(state) or await other.holds(state)

        name = f"({self.name}) | ({other.name})"
        return Condition((*self.keys, *other.keys), either, name, recipe=("or", self, other))

    def __bool__(self) -> NoReturn:
        raise MisuseError(
            f"{self!r} is true or false of a State only: combine conditions with &, | and ~ instead of `and`, `or` and "
            "`not`; `await condition.holds(state)` evaluates one"
        )

    def __repr__(self) -> str:
        return f"<Condition {self.name}>"


async def truth(holds: Any) -> bool:
    """Whether what a resolver returned is true; awaits it where it can be awaited."""
    return bool(await holds) if inspect.isawaitable(holds) else bool(holds)


default: Final = Condition((), lambda _: True, "default", recipe=("default",))
Condition.default = default


def _not_in(value: Any, among: Any) -> bool:
    return value not in among


_OPERATORS: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "lte": operator.le,
    "gt": operator.gt,
    "gte": operator.ge,
    "in": lambda value, among: value in among,
    "notin": _not_in,
    "contains": operator.contains,
    "is": operator.is_,
    "isnot": operator.is_not,
}


def when(**expected: Any) -> Condition:
    """All fields have the given values; ``key__gt=3`` and the like compare otherwise.

    Suffixes: eq ne lt lte gt gte in notin contains is isnot.

    :raises MisuseError: for no condition at all.
    """
    if not expected:
        raise MisuseError("when() needs at least one condition, for example when(done=True); use default for always")
    tests: list[tuple[str, Callable[[Any, Any], bool], Any]] = []
    for name, value in expected.items():
        key, _, suffix = name.rpartition("__")
        if key and suffix in _OPERATORS:
            tests.append((key, _OPERATORS[suffix], value))
        else:
            tests.append((name, operator.eq, value))

    def all_hold(state: State) -> bool:
        return all(test(state[key], value) for key, test, value in tests)

    shown = ", ".join(f"{name}={_shown(value)}" for name, value in expected.items())
    return Condition([key for key, _, _ in tests], all_hold, shown, recipe=("when", expected))


def _shown(value: Any) -> str:
    # The same in every process: a condition's name is part of its graph's hash.
    if isinstance(value, (set, frozenset)):
        return "{" + ", ".join(sorted(map(repr, value))) + "}"
    return repr(value)


# Calls are allowed to these only; nothing here can reach attributes, imports or I/O.
_FUNCTIONS: Final = {
    name: getattr(builtins, name)
    for name in ("abs", "all", "any", "bool", "float", "int", "len", "max", "min", "round", "sorted", "str", "sum")
}
_ALLOWED: Final = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.UAdd, ast.BinOp, ast.Add,
    ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt,
    ast.GtE, ast.In, ast.NotIn, ast.Is, ast.IsNot, ast.Constant, ast.Name, ast.Load, ast.List, ast.Tuple, ast.Set,
    ast.Dict, ast.Subscript, ast.Slice, ast.IfExp, ast.Call,
)  # fmt: skip


def expr(source: str) -> Condition:
    """A Python expression over the State's fields, parsed once: ``expr("n > 3 and kind in ('a', 'b')")``.

    Allowed are names, constants, literals, comparisons, and/or/not, arithmetic without powers, subscripts,
    ``a if b else c`` and calls of abs all any bool float int len max min round sorted str sum.

    :raises MisuseError: for anything else, naming it and its column.
    """
    if not isinstance(source, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # users' code
        raise MisuseError(f"expr({source!r:.80}): it takes the text of an expression; a function is a condition itself")
    function, keys = _compile(source)

    def evaluate(state: State) -> bool:
        return function(*[state[key] for key in keys])

    return Condition(keys, evaluate, source, recipe=("expr", source))


def as_condition(candidate: Any) -> Condition:
    """A Condition, or any predicate of one State made into one."""
    if isinstance(candidate, Condition):
        return candidate
    if callable(candidate):
        return Condition((), cast("Callable[[State], bool]", candidate))
    hint = f"; write when(...) or expr({candidate!r})" if isinstance(candidate, str) else ""
    raise MisuseError(f"{candidate!r} is not a condition{hint}")


def _compile(source: str) -> tuple[Callable[..., bool], list[str]]:
    """The expression as a function of the State's fields that it names, and these names."""
    try:
        tree = ast.parse(source.strip(), mode="eval")
    except SyntaxError as exc:
        raise MisuseError(f"expr({source!r}) is no Python expression: {exc.msg} at column {exc.offset}") from exc
    except (ValueError, RecursionError, MemoryError) as exc:  # null bytes, or nested too deep
        raise MisuseError(f"expr({source[:80]!r}) is no Python expression: {exc}") from exc
    called: set[ast.AST] = set()
    keys: list[str] = []
    for node in ast.walk(tree):
        if not isinstance(node, _ALLOWED):
            column = getattr(node, "col_offset", 0) + 1
            raise MisuseError(
                f"expr({source!r}): {type(node).__name__} at column {column} is not allowed; "
                "pass a function as the condition instead: lambda state: ..."
            )
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name) or node.func.id not in _FUNCTIONS or node.keywords:
                raise MisuseError(
                    f"expr({source!r}): calls {ast.unparse(node.func)}(); it may call only {', '.join(_FUNCTIONS)}; "
                    "pass a function as the condition instead: lambda state: ..."
                )
            called.add(node.func)
        elif isinstance(node, ast.Name) and node not in called and node.id not in keys:
            keys.append(node.id)
    arguments = ast.arguments(
        posonlyargs=[], args=[ast.arg(key) for key in keys], kwonlyargs=[], kw_defaults=[], defaults=[]
    )
    function = ast.fix_missing_locations(ast.Expression(ast.Lambda(arguments, tree.body)))
    # The syntax is allow-listed and there are no builtins, so this makes a function of an expression and nothing more.
    made = eval(compile(function, "<expr>", "eval"), {"__builtins__": {}, **_FUNCTIONS})
    return cast("Callable[..., bool]", made), keys
