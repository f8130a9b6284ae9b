"""What the runtime needs to know of a callable: which kind of function it is and which arguments it takes."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, cast

from arun.context import ApplicationContext
from arun.errors import MisuseError

__all__ = ("Kind", "Parameters", "describe", "kind_of", "name_of", "refuse_unknown", "where")

Kind = Literal["coroutine", "async generator", "function", "generator"]


class Parameters:
    """The parameters of a function besides the State, looked at once."""

    __slots__ = ("any", "names", "open", "required", "takes_state", "wants_context")

    def __init__(
        self,
        names: tuple[str, ...],
        required: frozenset[str],
        *,
        takes_state: bool = True,
        open_: bool = False,
        wants_context: bool = False,
    ) -> None:
        self.names = names
        self.required = required
        self.takes_state = takes_state
        self.open = open_
        self.wants_context = wants_context
        self.any = bool(names) or open_ or wants_context

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Parameters:
        """The parameters of ``function``, whose first is the State."""
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError) as exc:
            raise MisuseError(f"{function!r} has no signature that can be read, so it can't be an action") from exc
        positional = [p for p in parameters if p.kind not in {p.KEYWORD_ONLY, p.VAR_KEYWORD}]
        rest = [p for p in parameters[1:] if p.kind not in {p.VAR_KEYWORD, p.VAR_POSITIONAL}]
        return cls(
            tuple(p.name for p in rest if p.name != "__context"),
            frozenset(p.name for p in rest if p.default is p.empty and p.name != "__context"),
            takes_state=bool(positional),
            open_=any(p.kind is p.VAR_KEYWORD for p in parameters),
            wants_context=any(p.name == "__context" for p in rest),
        )

    def joined(self, required: Collection[str], optional: Collection[str]) -> Parameters:
        """These and others by name, for a function that takes ``**inputs`` and names them elsewhere."""
        more = [name for name in (*required, *optional) if name not in self.names and name != "__context"]
        return Parameters(
            (*self.names, *more),
            self.required.union(name for name in required if name in more),
            takes_state=self.takes_state,
            open_=self.open,
            wants_context=self.wants_context or "__context" in required or "__context" in optional,
        )

    def unbound(self, bound: Collection[str]) -> tuple[Sequence[str], Sequence[str]]:
        """Names that are not bound: (required, optional)."""
        free = [name for name in self.names if name not in bound]
        return [n for n in free if n in self.required], [n for n in free if n not in self.required]

    def resolve(
        self, action_name: str, bound: Mapping[str, Any], inputs: Mapping[str, Any], context: ApplicationContext
    ) -> dict[str, Any]:
        """The arguments by name: bound first, then the task's and the run's inputs, then resources."""
        sources = (bound, inputs, context.inputs, context.resources)
        kwargs: dict[str, Any] = {**inputs, **bound} if self.open else {}
        for name in self.names:
            for source in sources:
                if name in source:
                    kwargs[name] = source[name]
                    break
            else:
                if name in self.required:
                    known = sorted({*inputs, *context.inputs, *context.resources})
                    raise MisuseError(
                        f"action {action_name!r} needs {name!r}, which is neither bound nor an input nor a resource "
                        f"(there are: {', '.join(known) or 'none'}){_nearest(name, known)}; "
                        f"pass inputs={{{name!r}: ...}}, or with_resources({name}=...)"
                    )
        if self.wants_context:
            kwargs["__context"] = context
        return kwargs


def kind_of(function: Callable[..., Any]) -> Kind:
    """Which kind of function it is, looked at through partials, callable objects and plain wrappers."""
    if isinstance(function, type) or not callable(function):
        raise MisuseError(f"@action takes a function, not {describe(function)}")
    target: Any = function
    while True:
        if isinstance(target, functools.partial):
            target = target.func
        elif not inspect.isroutine(target):
            target = type(target).__call__
        elif inspect.isasyncgenfunction(target):
            return "async generator"
        elif inspect.iscoroutinefunction(target):
            return "coroutine"
        elif inspect.isgeneratorfunction(target):
            return "generator"
        elif "__wrapped__" in getattr(
            target, "__dict__", ()
        ):  # a plain wrapper returns what the function inside returns
            target = vars(target)["__wrapped__"]
        else:
            return "function"


def name_of(function: Callable[..., Any]) -> str:
    """Its own name, or that of what it wraps or is an instance of."""
    target: Any = function
    while isinstance(target, functools.partial):
        target = target.func
    return cast("str", getattr(target, "__name__", type(target).__name__))


def where(function: Callable[..., Any]) -> str:
    """``name at file:line``."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    name = getattr(function, "__qualname__", repr(function))
    return f"{name} at {code.co_filename}:{code.co_firstlineno}" if code else str(name)


def refuse_unknown(action_name: str, given: Collection[str], known: Sequence[str]) -> None:
    """:raises MisuseError: for the first given name that is not known."""
    for name in given:
        if name not in known:
            raise MisuseError(
                f"action {action_name!r} takes no input {name!r}{_nearest(name, known)}; "
                f"it takes: {', '.join(known) or 'none'}"
            )


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def describe(value: object) -> str:
    """Type and value, short, for an error."""
    return "None" if value is None else f"{type(value).__name__} {value!r:.80}"
