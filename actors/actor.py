"""Actor classes and the handles that callers hold.

    class Counter:
        def __init__(self, start: int = 0) -> None: ...

        async def incr(self, by: int = 1) -> int: ...       # await counter.incr(2)

        async def watch(self) -> AsyncIterator[int]: ...    # async for n in counter.watch()

An actor takes one message at a time, in order of arrival. A stream holds the actor only while its body runs, not
between its items, so ``incr`` works while somebody watches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from arun.errors import ActorDied, ChannelLost, MisuseError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from actors.interface import Interface, Method
    from arun.channel import Connection, Stream

__all__ = ("ActorHandle", "ActorStream", "actor")

C = TypeVar("C", bound=type)


def actor(*, concurrency: int = 1) -> Callable[[C], C]:
    """Say how many messages an actor class takes at a time; without it, one.

    >>> @actor(concurrency=64)
    ... class Engine: ...

    :raises MisuseError: ``concurrency`` is below 1.
    """
    if concurrency < 1:
        raise MisuseError(f"@actor(concurrency={concurrency}): it must be at least 1")

    def mark(cls: C) -> C:
        cls.__arun_concurrency__ = concurrency  # type: ignore[attr-defined]  # read by interface.describe
        return cls

    return mark


class ActorHandle:
    """The caller's end of an actor. It has the methods of the actor's class and nothing else.

    A coroutine method gives an awaitable, an async generator method an :class:`ActorStream`. What may be raised:
    TypeError at once for arguments that the method does not take; whatever the method raised, with its remote traceback
    as a note (:class:`~arun.errors.RemoteError` for types that can't be rebuilt here);
    :class:`~arun.errors.ActorDied` when the actor's process ended; :class:`~arun.errors.ChannelLost` when only
    the connection to it did.
    """

    def __init__(self, link: Link) -> None:
        self._arun_link = link
        for method in link.interface.methods.values():
            self.__dict__[method.name] = (_StreamMethod if method.streaming else _UnaryMethod)(link, method)

    def __getattr__(self, name: str) -> Any:
        link = self._arun_link
        raise AttributeError(
            f"the actor {link.name!r} ({link.interface.class_name}) has no method {name!r}; it has "
            f"{', '.join(link.interface.methods)}"
        )

    def __repr__(self) -> str:
        return f"<{self._arun_link.describe()}>"

    def __reduce__(self) -> str:
        raise TypeError(
            f"the handle of actor {self._arun_link.name!r} can't be pickled: it is one end of a connection. "
            "Send the actor's name and use `await cluster.get(name)`"
        )


class ActorStream:
    """The items of one streaming call. Starts at the call; drop, close or cancel it and the method is closed."""

    __slots__ = ("_link", "_lost", "_stream")

    def __init__(self, link: Link, method: Method, arguments: dict[str, Any]) -> None:
        self._link = link
        self._stream: Stream[Any] | None = None
        self._lost: ChannelLost | None = None
        try:
            self._stream = link.opened().open(method.name, arguments, item_type=method.item_type)
        except ChannelLost as lost:  # told by __anext__, which can wait to hear how the actor ended
            self._lost = lost

    def __aiter__(self) -> ActorStream:
        return self

    async def __anext__(self) -> Any:
        try:
            if self._stream is None:
                raise self._lost or StopAsyncIteration
            return await self._stream.__anext__()
        except ChannelLost as lost:
            died = await self._link.death()
            if died is None:
                raise
            raise died from lost

    def cancel(self) -> None:
        """Ask the actor to close the method; does not wait."""
        if self._stream is not None:
            self._stream.cancel()

    async def aclose(self) -> None:
        """Close the method and wait until its clean-up has finished or the actor is gone."""
        self._lost = None
        if self._stream is not None:
            await self._stream.aclose()


class Link:
    """Client side of one actor: its connection, and how its process ended.

    :ivar connection: None until the actor is connected to.
    :ivar ended: how the process ended, as a phrase that continues "the actor"; None while it lives.
    """

    __slots__ = ("_pid", "_wait_ended", "connection", "ended", "interface", "name")

    def __init__(
        self,
        name: str,
        interface: Interface,
        *,
        pid: Callable[[], int | None],
        wait_ended: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        self.name = name
        self.interface = interface
        self._pid = pid
        self.connection: Connection | None = None
        self.ended: str | None = None
        self._wait_ended = wait_ended

    def opened(self) -> Connection:
        """The connection.

        :raises ChannelLost: there is none.
        """
        if self.connection is None or self.ended is not None:
            raise ChannelLost(f"no connection to the {self.describe()}")
        return self.connection

    async def connect(self, connect: Callable[[], Coroutine[Any, Any, Connection]]) -> None:
        try:
            self.connection = await connect()
        except ChannelLost as lost:
            died = await self.death()
            if died is None:
                raise
            raise died from lost

    async def call(self, name: str, arguments: Any = None, *, result_type: Any = Any) -> Any:
        try:
            return await self.opened().call(name, arguments, result_type=result_type)
        except ChannelLost as lost:
            died = await self.death()
            if died is None:
                raise
            raise died from lost

    async def death(self) -> ActorDied | None:
        """The error of a call that lost its connection, or None if the actor's process is not to blame."""
        if self.ended is None:
            if self.connection is not None and not self.connection.closed:
                return None  # the method itself raised a ChannelLost of its own
            await self._wait_ended()
        if self.ended is None:
            return None
        return ActorDied(f"the {self.describe()} {self.ended}")

    def describe(self) -> str:
        """Who it is: ``actor 'counter' (Counter, pid 4711)``."""
        pid = self._pid()
        return f"actor {self.name!r} ({self.interface.class_name}{'' if pid is None else f', pid {pid}'})"


def link_of(handle: ActorHandle) -> Link:
    """The link behind a handle."""
    link: Link = object.__getattribute__(handle, "_arun_link")  # a handle's own attributes are its actor's methods
    return link


class _Bound:
    """A method of one actor, as the handle shows it."""

    __slots__ = ("_link", "_method")

    def __init__(self, link: Link, method: Method) -> None:
        self._link = link
        self._method = method

    def __repr__(self) -> str:
        return f"<{self._method} of {self._link.describe()}>"


class _UnaryMethod(_Bound):
    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Coroutine[Any, Any, Any]:
        method = self._method
        return self._link.call(method.name, method.bind(args, kwargs), result_type=method.item_type)


class _StreamMethod(_Bound):
    __slots__ = ()

    def __call__(self, *args: Any, **kwargs: Any) -> ActorStream:
        return ActorStream(self._link, self._method, self._method.bind(args, kwargs))
