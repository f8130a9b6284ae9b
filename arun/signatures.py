"""What the runtime needs to know of a callable: which kind of function it is and which arguments it takes."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Final, Literal, cast

from arun.context import ApplicationContext
from arun.errors import MisuseError

__all__ = ("Kind", "Parameters", "describe", "kind_of", "name_of", "refuse_no_lists", "refuse_unknown", "where")

Kind = Literal["coroutine", "async generator", "function", "generator"]
_CONTEXT: Final = "__context"


class Parameters:
    """The parameters of a function besides the State, looked at once."""

    __slots__ = ("any", "context_name", "names", "of_method", "open", "required", "takes_state")

    def __init__(
        self,
        names: tuple[str, ...],
        required: frozenset[str],
        *,
        takes_state: bool = True,
        of_method: bool = False,
        open_: bool = False,
        context_name: str | None = None,
    ) -> None:
        self.names = names
        self.required = required
        self.takes_state = takes_state
        #: whether the function is a method that is not bound to any object
        self.of_method = of_method
        self.open = open_
        #: the parameter that takes the ApplicationContext
        self.context_name = context_name
        self.any = bool(names) or open_ or context_name is not None

    @classmethod
    def of(cls, function: Callable[..., Any]) -> Parameters:
        """The parameters of ``function``, whose first is the State."""
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError) as exc:
            raise MisuseError(f"{function!r} has no signature that can be read, so it can't be an action") from exc
        positional = [p for p in parameters if p.kind not in {p.KEYWORD_ONLY, p.VAR_KEYWORD}]
        named = {p.name: p for p in parameters[1:] if p.kind not in {p.VAR_KEYWORD, p.VAR_POSITIONAL}}
        context_name = next((name for name in _context_names(function) if name in named), None)
        named.pop(context_name or "", None)
        return cls(
            tuple(named),
            frozenset(name for name, p in named.items() if p.default is p.empty),
            takes_state=bool(positional),
            of_method=bool(positional) and positional[0].name == "self",
            open_=any(p.kind is p.VAR_KEYWORD for p in parameters),
            context_name=context_name,
        )

    def joined(self, required: Collection[str], optional: Collection[str]) -> Parameters:
        """These and others by name, for a function that takes ``**inputs`` and names them elsewhere."""
        more = [name for name in (*required, *optional) if name not in self.names and name != _CONTEXT]
        return Parameters(
            (*self.names, *more),
            self.required.union(name for name in required if name in more),
            takes_state=self.takes_state,
            open_=self.open,
            context_name=self.context_name or (_CONTEXT if _CONTEXT in required or _CONTEXT in optional else None),
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
                    if name.startswith("__"):
                        raise MisuseError(
                            f"action {action_name!r} asks for {name!r}; {_CONTEXT} is the only such name that there is"
                        )
                    known = sorted({*inputs, *context.inputs, *context.resources})
                    raise MisuseError(
                        f"action {action_name!r} needs {name!r}, which is neither bound nor an input nor a resource "
                        f"(there are: {', '.join(known) or 'none'}){_nearest(name, known)}; "
                        f"pass inputs={{{name!r}: ...}}, or with_resources({name}=...)"
                    )
        if self.context_name is not None:
            kwargs[self.context_name] = context
        return kwargs


def _context_names(function: Callable[..., Any]) -> Iterator[str]:
    """``__context``, and what Python makes of that name in the class whose method the function is."""
    yield _CONTEXT
    owner = str(getattr(function, "__qualname__", "")).rpartition(".")[0].rpartition(".")[2]
    if owner.isidentifier():
        yield f"_{owner.lstrip('_')}{_CONTEXT}"


def kind_of(function: Callable[..., Any]) -> Kind:
    """Which kind of function it is, looked at through partials, callable objects and plain wrappers."""
    if isinstance(function, type) or not callable(function):
        raise MisuseError(f"@action takes a function, not {describe(function)}")
    target: Any = function
    while True:
        if isinstance(target, functools.partial):
            target = target.func
        elif isinstance(target, staticmethod):
            target = cast("staticmethod[..., Any]", target).__func__
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


def refuse_no_lists(where: str, **given: object) -> None:
    """:raises MisuseError: for a text or None where a list of names is meant."""
    for what, keys in given.items():
        if isinstance(keys, str) or keys is None:
            names = "" if keys is None else repr(keys)
            raise MisuseError(f"{where}: {what}={keys!r}; a list of names is meant: {what}=[{names}]")


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
