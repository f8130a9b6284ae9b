"""Body: where one generation of an actor lives; all that the kinds of clusters differ in."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from arun.channel import Connection

__all__ = ("Body", "End")


class End(NamedTuple):
    """How a body ended.

    :ivar how: a phrase that continues "the actor".
    :ivar abnormal: False where it ended by itself and in good order.
    """

    how: str
    abnormal: bool


class Body(Protocol):
    """A process of ours, a Ray actor, or a task. Made without waiting, so never half made."""

    @property
    def pid(self) -> int | None: ...

    @property
    def address(self) -> str: ...

    async def connect(self) -> Connection:
        """Wait until it listens and connect.

        :raises ChannelLost: it ended first.
        """
        ...

    async def reconnect(self) -> Connection:
        """Connect again, after the connection was lost. After :meth:`connect`.

        :raises ChannelLost: it has ended, or can't be reached.
        :raises ProtocolError: something else listens there by now.
        """
        ...

    async def connect_health(self) -> Connection:
        """Connect to what tells its health (:data:`actors.hosts.health.HEALTH`). After :meth:`connect`.

        :raises ChannelLost: it has ended.
        """
        ...

    async def wait_ended(self) -> End:
        """Wait for its end and tell how."""
        ...

    def kill(self) -> None:
        """End it by force, at once, also when it is stopped by SIGSTOP."""
        ...

    async def stop(self, grace: float) -> None:
        """Let ``on_stop`` run, then end it; after ``grace`` seconds by force. Never raises for the actor's sake."""
        ...
