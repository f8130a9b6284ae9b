"""Actor classes and the handles that callers hold.

    class Counter:
        def __init__(self, start: int = 0) -> None: ...

        async def incr(self, by: int = 1) -> int: ...       # await counter.incr(2)

        async def watch(self) -> AsyncIterator[int]: ...    # async for n in counter.watch()

An actor takes one message at a time, in order of arrival. A stream holds the actor only while its body runs, not
between its items, so ``incr`` works while somebody watches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, overload

import anyio

from actors.interface import ActorOptions, MethodOptions
from actors.members.link import expired, to_send
from arun.channel import register_type
from arun.errors import ChannelLost, MisuseError, StreamRefused

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from actors.interface import Method
    from actors.members.link import Line, Link
    from arun.channel import Connection, Stream
    from arun.channel.extensions import Buffers

__all__ = ("ActorHandle", "ActorStream", "actor", "method")

C = TypeVar("C", bound=type)
F = TypeVar("F", bound="Callable[..., Any]")


@overload
def actor(cls: C, /) -> C: ...
@overload
def actor(*, concurrency: int = 1, mailbox: int = 1000, hung_after: float | None = None) -> Callable[[C], C]: ...
def actor(
    cls: C | None = None, /, *, concurrency: int = 1, mailbox: int = 1000, hung_after: float | None = None
) -> C | Callable[[C], C]:
    """Say how an actor class takes its messages; without it, or plain, one at a time.

    >>> @actor(concurrency=64)
    ... class Engine: ...

    :param concurrency: messages at a time.
    :param mailbox: messages that may wait for their turn; the next one is refused with
        :class:`~arun.errors.MailboxFull`.
    :param hung_after: seconds that the event loop may stand still before the actor counts as hung and is killed; by
        default a busy actor is left alone for as long as its process answers.
    :raises MisuseError: a value is out of its range.
    """
    options = ActorOptions(concurrency, mailbox, hung_after)

    def mark(cls: C) -> C:
        cls.__arun_actor__ = options  # type: ignore[attr-defined]  # read by interface.describe
        return cls

    return mark if cls is None else mark(cls)


@overload
def method(function: F, /) -> F: ...
@overload
def method(*, idempotent: bool = False, timeout: float | None = None) -> Callable[[F], F]: ...
def method(
    function: F | None = None, /, *, idempotent: bool = False, timeout: float | None = None
) -> F | Callable[[F], F]:
    """Say how a method of an actor is called; without it, or plain, once and for as long as it takes.

    >>> class Catalogue:
    ...     @method(idempotent=True, timeout=5.0)
    ...     async def price(self, item: str) -> float: ...

    :param idempotent: calling it twice is as good as once. A call in flight when the actor dies is then sent again to
        the restarted actor, a stream only if it has given no item yet; other calls fail with
        :class:`~arun.errors.ActorDied`.
    :param timeout: seconds that a call may take, waiting for its turn and for a restart included; of a stream, each
        item. Then it is cancelled in the actor and TimeoutError is raised.
    :raises MisuseError: ``timeout`` is not above 0.
    """
    if timeout is not None and not timeout > 0:
        raise MisuseError(f"@method(timeout={timeout}): it must be more than 0 seconds")

    def mark(function: F) -> F:
        function.__arun_method__ = MethodOptions(idempotent, timeout)  # type: ignore[attr-defined]  # read by interface.describe
        return function

    return mark if function is None else mark(function)


class ActorHandle:
    """The caller's end of an actor. It has the methods of the actor's class and nothing else.

    A coroutine method gives an awaitable, an async generator method an :class:`ActorStream`. What may be raised:
    TypeError at once for arguments that the method does not take; whatever the method raised, with its remote traceback
    as a note (:class:`~arun.errors.RemoteError` for types that can't be rebuilt here);
    :class:`~arun.errors.ActorDied` when the actor's process ended; :class:`~arun.errors.ChannelLost` when only
    the connection to it did; :class:`~arun.errors.MailboxFull` when too many messages wait, or this handle has 1,024
    calls and streams open.

    An actor that is started again keeps its handle: the next call goes to the new generation.
    """

    def __init__(self, link: Link) -> None:
        self.__dict__["_arun_link"] = link
        for method in link.interface.methods.values():
            self.__dict__[method.name] = (_StreamMethod if method.streaming else _UnaryMethod)(link, method)

    def __getattr__(self, name: str) -> Any:
        link = self._arun_link
        raise AttributeError(
            f"the actor {link.name!r} ({link.interface.class_name}) has no method {name!r}; it has "
            f"{', '.join(link.interface.methods)}. Attributes, properties and methods that are not async stay in the "
            "actor's process; give the class an `async def` that returns what you need of them"
        )

    def __setattr__(self, name: str, value: object) -> None:
        link = self._arun_link
        raise AttributeError(
            f"{name!r} can't be set on the handle of actor {link.name!r} ({link.interface.class_name}): its attributes "
            "are in its own process; give the class a method that sets it"
        )

    def __repr__(self) -> str:
        return f"<{self._arun_link.describe()}>"

    def __reduce__(self) -> str:
        raise TypeError(
            f"the handle of actor {self._arun_link.name!r} can't be pickled: it is one end of a connection. "
            "Send the actor's name and use `await cluster.get(name)`"
        )


def _unsendable(handle: ActorHandle) -> tuple[Any, Buffers]:
    raise TypeError(
        f"the handle of actor {object.__getattribute__(handle, '_arun_link').name!r} is one end of a connection. Call "
        "it here and send what it gives; a detached actor is found by its name from everywhere, with "
        "`await cluster.get(name)`"
    )


def _unmade(_: Any, __: memoryview) -> ActorHandle:
    raise ValueError("a handle is not sent")


register_type(ActorHandle, name="actors.ActorHandle", pack=_unsendable, unpack=_unmade)


class ActorStream:
    """The items of one streaming call. Starts at the call; drop, close or cancel it and the method is closed."""

    __slots__ = ("_arguments", "_connection", "_line", "_link", "_method", "_over", "_stream", "_taken")

    def __init__(self, link: Link, method: Method, arguments: dict[str, Any]) -> None:
        self._link = link
        self._method = method
        self._arguments = to_send(arguments)
        self._line: Line | None = None
        self._connection: Connection | None = None
        self._stream: Stream[Any] | None = None
        self._taken = False
        self._over = False
        if link.line is not None:
            self._open(link.line)

    def __aiter__(self) -> ActorStream:
        return self

    async def __anext__(self) -> Any:
        timeout = self._method.options.timeout
        if timeout is None:
            return await self._next()
        with anyio.move_on_after(timeout):
            return await self._next()
        self.cancel()
        raise expired(self._method, self._link)

    def cancel(self) -> None:
        """Ask the actor to close the method; does not wait."""
        self._over = True
        if self._stream is not None:
            self._stream.cancel()

    async def aclose(self) -> None:
        """Close the method and wait until its clean-up has finished or the actor is gone."""
        self._over = True
        if self._stream is not None:
            await self._stream.aclose()

    async def _next(self) -> Any:
        while not self._over:
            if self._stream is None:
                if self._line is not None and self._connection is not None:  # which had ended before
                    await self._link.judge(self._line, self._connection, None, may_retry=True)
                self._open(await self._link.next_line())
                continue
            try:
                item = await self._stream.__anext__()
            except ChannelLost as lost:
                assert self._line is not None  # the stream is on both
                assert self._connection is not None
                stream_again = self._method.options.idempotent and not self._taken
                await self._link.judge(self._line, self._connection, lost, may_retry=stream_again)
                self._line = self._stream = None
            else:
                self._taken = True
                return item
        raise StopAsyncIteration

    def _open(self, line: Line) -> None:
        self._line, self._connection = line, line.connection
        try:
            self._stream = self._connection.open(self._method.name, self._arguments, item_type=self._method.item_type)
        except StreamRefused:
            raise self._link.crowded() from None
        except ChannelLost:  # not sent, so the next generation may have it
            self._stream = None


def link_of(handle: object) -> Link:
    """The link behind a handle.

    :raises MisuseError: it is no handle.
    """
    if not isinstance(handle, ActorHandle):
        raise MisuseError(f"{handle!r} is no handle of an actor; spawn() and get() return those")
    link: Link = object.__getattribute__(handle, "_arun_link")  # a handle's own attributes are its actor's methods
    return link


def is_connected(handle: object) -> bool:
    """Whether a call would be sent to the actor now."""
    line = link_of(handle).line
    return line is not None and line.how is None and not line.connection.closed


class _Bound:
    """A method of one actor, as the handle shows it."""

    __slots__ = ("_link", "_method")

    def __init__(self, link: Link, method: Method) -> None:
        self._link = link
        self._method = method

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked for by copies, before there is anything to show
            raise AttributeError(name)
        raise AttributeError(f"{self!r} has no {name!r}; it is called as it is, without Ray's .remote() and .options()")

    def __repr__(self) -> str:
        return f"<{self._method} of {self._link.describe()}>"


class _UnaryMethod(_Bound):
    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Coroutine[Any, Any, Any]:
        method = self._method
        return self._link.call(method, method.bind(args, kwargs))


class _StreamMethod(_Bound):
    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> ActorStream:
        return ActorStream(self._link, self._method, self._method.bind(args, kwargs))
