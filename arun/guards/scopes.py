"""Which cancel scopes a suspended generator holds.

A scope that is open across a ``yield`` belongs to the generator and is entered in its host's task: its cancellation
would land in whatever that task awaits next (PEP 789).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from types import AsyncGeneratorType, CodeType
from typing import Any, Final, TypeAlias, cast

from arun.errors import MisuseError
from arun.frames import held, line_at
from arun.guards.levels import Checks, misuse

__all__ = ("Yields", "holds_scope", "is_scope_type")

_Generator: TypeAlias = AsyncGeneratorType[Any, Any]

#: Types whose objects are cancel scopes, or open one, by the package that they come from.
_SCOPES: Final = {
    "anyio": {"CancelScope", "TaskGroup", "BlockingPortal"},
    "asyncio": {"TaskGroup", "Timeout"},
    "async_timeout": {"Timeout"},
    "trio": {"CancelScope", "Nursery", "NurseryManager"},
}
#: How deep context managers that open context managers are followed.
_DEPTH: Final = 6
#: Looks at one instruction of one generator that holds something harmless there, before it is trusted.
_LOOKS: Final = 8


def is_scope_type(candidate: type) -> bool:
    """Whether objects of this type are cancel scopes or open one."""
    known = _known.get(candidate)
    if known is None:
        known = any(base.__name__ in _SCOPES.get(base.__module__.partition(".")[0], ()) for base in candidate.__mro__)
        _known[candidate] = known
    return known


class Yields:
    """Looks at what one generator holds at each of its yields, which is done once for most of them.

    What a ``yield`` is nested in is known by its place in the code. So one at which nothing was open is never looked at
    again, in any generator of that function; one at which something harmless was open may hold something else the next
    time, and is looked at a few times in every generator.
    """

    __slots__ = ("_checks", "_clean", "_generator", "_looks", "inner")

    def __init__(self, generator: _Generator, checks: Checks) -> None:
        #: the generators below, innermost first, that the last mistake is to be raised in before this one
        self.inner: tuple[_Generator, ...] = ()
        self._generator = generator
        self._checks = checks
        self._clean = _clean_yields(generator.ag_code)
        self._looks: dict[int, int] | None = None

    @classmethod
    def of(cls, generator: object, checks: Checks | None) -> Yields | None:
        """Yields of a generator function's generator; None for iterators of any other kind, which hold no frame."""
        if checks is None or type(generator) is not AsyncGeneratorType:
            return None
        return cls(generator, checks)

    def look(self) -> MisuseError | None:
        """What is wrong with the yield at which the generator is suspended."""
        lasti = self._generator.ag_frame.f_lasti  # type: ignore[union-attr]  # it is suspended
        return None if lasti in self._clean else self._look(lasti)

    def fine(self) -> bool:
        """Whether nothing can be wrong with that yield; cheap."""
        return self._generator.ag_frame.f_lasti in self._clean  # type: ignore[union-attr]  # it is suspended

    def _look(self, lasti: int) -> MisuseError | None:
        looks = self._looks
        if looks is not None and looks.get(lasti, 0) >= _LOOKS:
            return None
        if next(held(self._generator), None) is None:
            self._clean.add(lasti)
            return None
        found = _culprit(self._generator, _DEPTH)
        if found is None:
            self._looks = looks = looks or {}
            looks[lasti] = looks.get(lasti, 0) + 1
            return None
        path, scope = found
        self.inner = path[:-1]
        code, line = path[0].ag_code, line_at(path[0])
        return misuse(
            self._checks,
            f"{code.co_qualname} yielded at {code.co_filename}:{line} inside {scope}, whose cancellation would hit "
            "whoever takes what it yields; move the yield outside it, or mark the action hosted: "
            "@action(..., hosted=True), or the class attribute hosted = True",
            code.co_filename,
            line,
        )


def holds_scope(generator: _Generator) -> bool:
    """Whether a suspended generator has a cancel scope open."""
    return _culprit(generator, _DEPTH) is not None


def _culprit(generator: _Generator, depth: int) -> tuple[tuple[_Generator, ...], str] | None:
    """The generator that holds a scope, and those that iterate over it up to this one; and the scope."""
    for one in held(generator):
        if isinstance(one, AsyncGeneratorType):
            found = _culprit(one, depth - 1) if depth else None
            if found is not None:
                return (*found[0], generator), found[1]
        elif (scope := _scope_in(one)) is not None:
            return (generator,), scope
    return None


def _scope_in(manager: object, depth: int = _DEPTH) -> str | None:
    """What a person calls the scope that a context manager or suspended generator is or holds; None for none."""
    if is_scope_type(type(manager)):
        return f"a {type(manager).__name__}"
    if not depth:
        return None
    inside: Iterator[object] = iter(())
    if isinstance(manager, (contextlib._GeneratorContextManager, contextlib._AsyncGeneratorContextManager)):
        inside = held(cast("Any", manager).gen)
    elif isinstance(manager, (contextlib.ExitStack, contextlib.AsyncExitStack)):
        callbacks: Any = getattr(manager, "_exit_callbacks", ())
        inside = (getattr(callback, "__self__", None) for _, callback in callbacks)
    for one in inside:
        found = _scope_in(one, depth - 1)
        if found is not None:
            return f"{found} that {_name(manager)} holds"
    return None


def _name(manager: object) -> str:
    generator: Any = getattr(manager, "gen", None)
    code = getattr(generator, "ag_code", None) or getattr(generator, "gi_code", None)
    return code.co_qualname if code is not None else f"an {type(manager).__name__}"


_known: Final[weakref.WeakKeyDictionary[type, bool]] = weakref.WeakKeyDictionary()
# By id, since a code object's hash covers all of it.
_clean: Final[dict[int, tuple[weakref.ref[CodeType], set[int]]]] = {}


def _clean_yields(code: CodeType) -> set[int]:
    """Offsets of the yields in a function at which nothing is open."""
    number = id(code)
    known = _clean.get(number)
    if known is None:

        def forget(_: object) -> None:
            _clean.pop(number, None)

        known = _clean[number] = (weakref.ref(code, forget), set())
    return known[1]
