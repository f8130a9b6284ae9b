"""Link: the caller's way to an actor through all its generations.

A call goes to the generation that is up. While the next one is being started it waits, as long as the mailbox has
room. What happens to it when its generation dies:

    not sent yet                            it goes to the next generation
    sent, ``@method(idempotent=True)``      it is sent again (a stream: if it has given no item yet)
    sent, otherwise                         :class:`~arun.errors.ActorDied`: it may have had its effect

Where only the connection is lost, the generation gets another one, within a moment, and the same holds, but that it is
:class:`~arun.errors.ChannelLost` then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import anyio

from actors.hosts.call_chain import CHAIN, current_chain
from arun.channel import Limits
from arun.errors import ActorDied, ChannelLost, MailboxFull, StreamRefused

if TYPE_CHECKING:
    from actors.interface import Interface, Method
    from arun.channel import Connection

__all__ = ("Line", "Link", "expired", "to_send")


class Line(Protocol):
    """The connection to one generation.

    :ivar how: how that generation ended, as a phrase that continues "the actor"; None while it lives.
    """

    @property
    def number(self) -> int: ...

    @property
    def connection(self) -> Connection: ...

    @property
    def pid(self) -> int | None: ...

    @property
    def how(self) -> str | None: ...

    async def regain(self, lost: Connection) -> bool:
        """Wait a moment, after the connection was lost, for another one or for ``how``; tells whether it is another."""
        ...


class Link:
    """Client side of one actor.

    :ivar line: to the generation that is up; None while there is none.
    :ivar gone: why there will be none any more.
    """

    __slots__ = ("_changed", "_waiting", "gone", "interface", "latest", "line", "name")

    def __init__(self, name: str, interface: Interface) -> None:
        self.name = name
        self.interface = interface
        self.line: Line | None = None
        self.latest: Line | None = None
        self.gone: ActorDied | None = None
        self._changed = anyio.Event()
        self._waiting = 0

    def begun(self, line: Line) -> None:
        """A generation is being started."""
        self.latest = line

    def up(self, line: Line) -> None:
        """A generation is ready."""
        self.line = self.latest = line
        self._tell()

    def down(self) -> None:
        """No generation is up; another may follow."""
        self.line = None

    def end(self, how: str) -> None:
        """No generation follows."""
        self.line = None
        self.gone = self.died(how, self.latest)
        self._tell()

    async def call(self, method: Method, arguments: dict[str, Any]) -> Any:
        """Call a unary method; errors as :class:`~actors.actor.ActorHandle` tells."""
        timeout = method.options.timeout
        if timeout is None:
            return await self._call(method, arguments)
        with anyio.move_on_after(timeout):
            return await self._call(method, arguments)
        raise expired(method, self)

    async def _call(self, method: Method, arguments: dict[str, Any]) -> Any:
        arguments = to_send(arguments)
        while True:
            line = self.line or await self.next_line()
            connection = line.connection
            try:
                if not connection.closed:
                    return await connection.call(method.name, arguments, result_type=method.item_type)
            except StreamRefused:
                raise self.crowded() from None  # which tells of limits that an actor's callers can't set
            except ChannelLost as lost:
                await self.judge(line, connection, lost, may_retry=method.options.idempotent)
            else:
                await self.judge(line, connection, None, may_retry=True)

    async def next_line(self) -> Line:
        """Wait for a generation that is up.

        :raises ActorDied: none will come.
        :raises MailboxFull: as many wait already as the mailbox holds.
        """
        mailbox = self.interface.options.mailbox
        if self._waiting >= mailbox and self.gone is None:
            raise MailboxFull(
                f"{mailbox} calls wait already for the {self.describe()}, which is being started again; try again "
                "later, or give its class a larger @actor(mailbox=...)"
            )
        self._waiting += 1
        try:
            while self.line is None:
                if self.gone is not None:
                    raise self._gone_again(self.gone)
                await self._changed.wait()
        finally:
            self._waiting -= 1
        return self.line

    async def judge(self, line: Line, connection: Connection, lost: ChannelLost | None, *, may_retry: bool) -> None:
        """Say what becomes of a call whose connection was lost; returns if it is to be sent again.

        :param lost: None: it was not sent yet.
        :raises ActorDied: its generation ended.
        :raises ChannelLost: the method raised that itself, or only the connection ended.
        :raises MisuseError: it was made on another event loop, as ``asyncio.run()`` makes one each time.
        """
        connection.refuse_elsewhere()
        if line.how is None:
            if lost is not None and not connection.closed:
                raise lost
            if await line.regain(connection):
                if lost is None or may_retry:
                    return
                raise lost
        if line.how is None:
            raise lost or ChannelLost(f"no connection to the {self.describe(line)}, whose process runs")
        if may_retry:
            if self.line is line:  # its end is known, but not told to us yet
                self.line = None
            return
        raise self.died(line.how, line) from lost

    def died(self, how: str, line: Line | None) -> ActorDied:
        """The error that tells the end of one generation."""
        number = 0 if line is None else line.number
        return ActorDied(f"the {self.describe(line)} {how}", actor=self.name, reason=how, generation=number)

    def crowded(self) -> MailboxFull:
        """The error of a message for which the connection has no room."""
        return MailboxFull(
            f"as many calls and streams of this program as one connection carries are open at the {self.describe()}, "
            f"those that wait and those between two items included: {Limits().streams}. Send fewer at a time, or ask "
            "more actors"
        )

    def describe(self, line: Line | None = None) -> str:
        """Who it is: ``actor 'counter' (Counter, pid 4711)``, from the second generation on with its number."""
        line = line or self.latest
        pid = None if line is None else line.pid
        words = [self.interface.class_name]
        if pid is not None:
            words.append(f"pid {pid}")
        if line is not None and line.number > 1:
            words.append(f"generation {line.number}")
        return f"actor {self.name!r} ({', '.join(words)})"

    def _gone_again(self, gone: ActorDied) -> ActorDied:
        # A new one for each caller: one exception object can't be raised in several tasks.
        return ActorDied(str(gone), actor=gone.actor, reason=gone.reason, generation=gone.generation)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


def to_send(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a message with the chain of calls that it comes from."""
    chain = current_chain()
    return arguments if chain is None else {**arguments, CHAIN: chain}


def expired(method: Method, link: Link) -> TimeoutError:
    """The error of a message that took longer than ``@method(timeout=)`` allows."""
    return TimeoutError(
        f"{method.label} of the {link.describe()} took longer than the {method.options.timeout:g} s that "
        "@method(timeout=...) gives it; it was cancelled there"
    )
