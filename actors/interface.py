"""What an actor class offers to its callers: methods and their types, read from its annotations.

The same ``Interface`` serves both ends. A handle binds arguments with it before anything is sent, and the actor
decodes them by the parameter annotations; so a wrong call fails where it is written.
"""

from __future__ import annotations

import inspect
import types
import typing
import uuid
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from arun.errors import MisuseError
from arun.logs import get_logger

__all__ = ("ActorOptions", "ActorSpec", "Interface", "Method", "MethodOptions", "describe", "specify")

log = get_logger("actors.interface")

LIFECYCLE = ("on_start", "on_stop")
_SPAWN_OPTIONS = (
    "name",
    "concurrency",
    "group",
    "env",
    "restart",
    "restarts",
    "lifetime",
    "get_if_exists",
    "isolation",
)
_PLACED = "group=, of cluster.reserve(Placement(...))"
_RAYS_OPTIONS = {
    "num_cpus": _PLACED,
    "num_gpus": _PLACED,
    "scheduling_strategy": _PLACED,
    "max_restarts": "restarts=",
    "max_task_retries": "@method(idempotent=True)",
    "max_concurrency": "concurrency=",
    "max_pending_calls": "@actor(mailbox=...)",
    "runtime_env": "env=, or RayCluster.connect(runtime_env=...) for all actors",
    "namespace": "the names of detached actors are known to every program on that Ray",
}
_ASYNC_ITERATORS = (AsyncIterator, AsyncGenerator, AsyncIterable)


@dataclass(frozen=True, slots=True)
class ActorOptions:
    """What :func:`actors.actor.actor` says about a class."""

    concurrency: int = 1
    mailbox: int = 1000
    hung_after: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("concurrency", 1), ("mailbox", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise MisuseError(f"{name}={value!r}: it must be a whole number, at least {least}")
        if self.hung_after is not None and not self.hung_after > 0:
            raise MisuseError(f"hung_after={self.hung_after!r}: it must be more than 0 seconds")


@dataclass(frozen=True, slots=True)
class MethodOptions:
    """What :func:`actors.actor.method` says about a method."""

    idempotent: bool = False
    timeout: float | None = None


@dataclass(frozen=True, slots=True)
class Method:
    """One method that callers may use.

    :ivar label: ``Class.method``, for messages.
    :ivar signature: without ``self``; annotations resolved where they can be.
    :ivar streaming: whether it is an async generator.
    :ivar argument_types: per parameter the type that its values are decoded to.
    :ivar item_type: type of the result, or of each item of a stream.
    :ivar options: what ``@method`` says.
    :ivar names: parameters that can be given by name; none where some can't.
    :ivar positional: those that can be given by place as well, in order.
    :ivar required: those without a default.
    """

    name: str
    label: str
    signature: inspect.Signature
    streaming: bool
    argument_types: Mapping[str, Any]
    item_type: Any
    options: MethodOptions = MethodOptions()
    names: frozenset[str] = frozenset()
    positional: tuple[str, ...] = ()
    required: frozenset[str] = frozenset()

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Match arguments to parameters, as a call would.

        :returns: values by parameter name, without those that take their default.
        :raises TypeError: the method does not take these; the message has its signature.
        """
        if not args and not kwargs.keys() - self.names and not self.required - kwargs.keys():
            return kwargs
        if not kwargs and len(self.required) <= len(args) <= len(self.positional):
            return dict(zip(self.positional, args, strict=False))
        try:
            return self.signature.bind(*args, **kwargs).arguments
        except TypeError as exc:
            raise TypeError(f"{self.label}: {exc}; its signature is {self.label}{self.signature}") from None

    def __str__(self) -> str:
        return f"{self.label}{self.signature}"


@dataclass(frozen=True, slots=True)
class Interface:
    """The methods of an actor class and what ``@actor`` says about it."""

    class_name: str
    methods: Mapping[str, Method]
    options: ActorOptions


@dataclass(frozen=True, slots=True)
class ActorSpec:
    """One actor to be: its class, the constructor's arguments, what it offers.

    :ivar key: tells it from every other actor, also from one of the same name in another cluster.
    """

    name: str
    cls: type
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    interface: Interface
    key: str


def specify(
    name: str, cls: type, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, concurrency: int | None
) -> ActorSpec:
    """Check an actor to be as far as that is possible without starting it.

    :raises MisuseError: the class is no actor.
    :raises TypeError: the constructor does not take these arguments.
    """
    spec = ActorSpec(name, cls, args, kwargs, describe(cls, concurrency=concurrency), key=uuid.uuid4().hex)
    try:
        signature = inspect.signature(cls)
    except ValueError:  # a constructor written in C shows no signature; it will judge for itself
        return spec
    try:
        signature.bind(*args, **kwargs)
    except TypeError as exc:
        hint = "".join(
            f" ({option}= is an option of spawn(); give the constructor's {option} by position)"
            for option in _SPAWN_OPTIONS
            if option in signature.parameters and option not in kwargs
        ) + "".join(
            f" ({option}= is Ray's; here: {ours})" for option, ours in _RAYS_OPTIONS.items() if option in kwargs
        )
        raise TypeError(f"{cls.__qualname__}: {exc}; its signature is {cls.__qualname__}{signature}{hint}") from None
    return spec


def describe(cls: type, *, concurrency: int | None = None) -> Interface:
    """Read the interface of an actor class: its public async methods, inherited, static and class methods included.

    :param concurrency: instead of what ``@actor(concurrency=)`` says.
    :raises MisuseError: not a class, no method, a method that is no ``async def``, a type that can't be sent.
    """
    if not inspect.isclass(cls):
        raise MisuseError(f"{cls!r} is no class; spawn(Counter, 3) builds the object itself, in the actor's process")
    options: ActorOptions = getattr(cls, "__arun_actor__", ActorOptions())
    if concurrency is not None:
        options = replace(options, concurrency=concurrency)
    methods = {
        name: _method(cls, name, function)
        for name, function in _functions(cls).items()
        if not name.startswith("_") and name not in LIFECYCLE
    }
    for name in LIFECYCLE:
        hook = inspect.getattr_static(cls, name, None)
        if hook is not None and not inspect.iscoroutinefunction(hook):
            raise MisuseError(f"{cls.__qualname__}.{name} is not async; write `async def {name}(self) -> None:`")
    if not methods:
        raise MisuseError(
            f"{cls.__qualname__} has no public method, so nobody could talk to it; an actor is a class with "
            "`async def` methods"
        )
    return Interface(cls.__qualname__, methods, options)


def _functions(cls: type) -> dict[str, Any]:
    """The methods of a class as it defines them, base classes first, in order of definition.

    Of its static and class methods only the async ones: others are called on the class, and need no actor.
    """
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        found |= vars(base)
    return {
        name: value
        for name, value in found.items()
        if inspect.isfunction(value) or (isinstance(value, (staticmethod, classmethod)) and _is_async(value.__func__))
    }


def _is_async(function: object) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


def _method(cls: type, name: str, definition: Any) -> Method:
    label = f"{cls.__qualname__}.{name}"
    function: Callable[..., Any] = getattr(definition, "__func__", definition)
    streaming = inspect.isasyncgenfunction(function)
    if not streaming and not inspect.iscoroutinefunction(function):
        kind, spelling = (
            ("a plain generator", f"`async def {name}(...)` with `yield`")
            if inspect.isgeneratorfunction(function)
            else ("a plain function", f"`async def {name}(...)`")
        )
        raise MisuseError(
            f"{label} is {kind}, so a call would stall every other message of the actor; write {spelling}, "
            f"or call it `_{name}` if only the actor itself uses it"
        )
    signature = inspect.signature(function)
    parameters = [
        parameter.replace(annotation=_resolve(function, parameter.annotation))
        for parameter in list(signature.parameters.values())[not isinstance(definition, staticmethod) :]
    ]
    result = _resolve(function, signature.return_annotation)
    item_type = _item_type(label, result, streaming=streaming)
    by_name = [p for p in parameters if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}]
    if len(by_name) < len(parameters):
        by_name = []
    positional = [p for p in by_name if p.kind is p.POSITIONAL_OR_KEYWORD]
    argument_types = {parameter.name: _decodable(label, parameter.name, parameter) for parameter in parameters}
    return Method(
        name=name,
        label=label,
        signature=signature.replace(parameters=parameters, return_annotation=result),
        streaming=streaming,
        argument_types=argument_types,
        item_type=item_type,
        options=getattr(function, "__arun_method__", MethodOptions()),
        names=frozenset(p.name for p in by_name),
        positional=tuple(p.name for p in positional),
        required=frozenset(p.name for p in parameters if p.default is p.empty),
    )


def _resolve(function: Callable[..., Any], annotation: Any) -> Any:
    """One annotation as a type, or Any where a name in it is not known at run time.

    One at a time, so that a name known only to type checkers costs no other its type.
    """
    if annotation is inspect.Parameter.empty:
        return annotation
    names = getattr(inspect.unwrap(function), "__globals__", {})
    holder = types.SimpleNamespace(__annotations__={"it": annotation})
    # Linters move what only annotations use under TYPE_CHECKING, these first of all.
    familiar = {kind.__name__: kind for kind in _ASYNC_ITERATORS if kind.__name__ not in names}
    try:
        return typing.get_type_hints(holder, names, familiar, include_extras=True)["it"]
    except Exception as exc:  # noqa: BLE001  # evaluating somebody's annotation may raise anything
        log.warning(
            "actor.annotation_unresolved", method=function.__qualname__, annotation=str(annotation), error=repr(exc)
        )
        return Any


def _item_type(label: str, result: Any, *, streaming: bool) -> Any:
    if result in (inspect.Signature.empty, typing.NoReturn, typing.Never):
        return Any
    iterates = typing.get_origin(result) in _ASYNC_ITERATORS or result in _ASYNC_ITERATORS
    if streaming:
        arguments = typing.get_args(result)
        item = arguments[0] if iterates and arguments else Any
    elif iterates:
        raise MisuseError(
            f"{label} returns an async iterator, which can't be sent; make it an async generator by yielding in it "
            "(`async for item in ...: yield item`)"
        )
    else:
        item = result
    return _checked(item, f"{label}: what it {'yields' if streaming else 'returns'}")


def _decodable(label: str, name: str, parameter: inspect.Parameter) -> Any:
    if parameter.annotation is inspect.Parameter.empty:
        return Any
    checked = _checked(parameter.annotation, f"{label}: its parameter {name}")
    match parameter.kind:
        case inspect.Parameter.VAR_POSITIONAL:
            return list[checked]  # type: ignore[valid-type]  # a type made at run time
        case inspect.Parameter.VAR_KEYWORD:
            return dict[str, checked]  # type: ignore[valid-type]  # as above
        case _:
            return checked


def _checked(annotation: Any, what: str) -> Any:
    try:
        msgspec.msgpack.Decoder(annotation)
    except TypeError as exc:
        raise MisuseError(f"{what} has the type {annotation}, which can't be sent: {exc}") from exc
    return annotation
