"""Whether an actor's event loop turns, told by a thread of its own, so that a busy actor does not look dead.

The thread has an event loop and a channel server of its own. Asked how the actor fares, it asks the actor's loop for a
sign. While the sign stays out the loop is blocked, and the thread tells since when and in which line. Where not
even the thread answers, the process is stopped, or something holds the interpreter; that is judged by whoever asked.
Nothing runs while nobody asks.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from typing import TYPE_CHECKING

import anyio
import msgspec

from arun.errors import MisuseError
from arun.frames import innermost_user_frame, line_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from arun.channel import Handler, Server

__all__ = ("HEALTH", "Health", "HealthThread", "Vitals")

HEALTH = "@health"
"""The method of a health connection."""

_SIGN_SECONDS = 0.25
"""How long the loop may take for its sign before it counts as blocked."""


class Vitals(msgspec.Struct, frozen=True, kw_only=True):
    """What the thread tells; fields as in :class:`actors.members.lives.ActorHealth`."""

    blocked_for: float
    where: str
    running: int
    waiting: int
    mailbox: int


class Health:
    """Answers :data:`HEALTH` for the event loop and the thread that it is made in; from another thread's loop.

    :param load: messages that run, that wait, that may wait; called in that other thread.
    """

    def __init__(self, load: Callable[[], tuple[int, int, int]]) -> None:
        self._load = load
        self._watched = asyncio.get_running_loop()
        self._watched_thread = threading.get_ident()
        self._asked_at = 0.0  # the oldest question without a sign; 0: there is none

    async def answer(self, method: str, payload: msgspec.Raw) -> AsyncIterator[Vitals]:
        """The handler of a health connection."""
        if method != HEALTH:
            raise MisuseError(f"this connection answers {HEALTH!r} only, not {method!r}")
        sign, here = anyio.Event(), asyncio.get_running_loop()
        asked_at = self._asked_at = self._asked_at or anyio.current_time()

        def turned() -> None:
            self._asked_at = 0.0
            here.call_soon_threadsafe(sign.set)

        try:
            self._watched.call_soon_threadsafe(turned)
        except RuntimeError:  # closed: the process is ending
            sign.set()
        with anyio.move_on_after(_SIGN_SECONDS):
            await sign.wait()
        blocked = not sign.is_set()
        running, waiting, mailbox = self._load()
        yield Vitals(
            blocked_for=anyio.current_time() - asked_at if blocked else 0.0,
            where=self._where() if blocked else "",
            running=running,
            waiting=waiting,
            mailbox=mailbox,
        )

    def _where(self) -> str:
        frame = sys._current_frames().get(self._watched_thread)
        return "an unknown line" if frame is None else line_of(innermost_user_frame(frame))


class HealthThread:
    """Serves :class:`Health` in a thread of its own.

    :param serve: starts a channel server with the handler that it is given; called in the new thread's loop.
    :param health: of the event loop that is watched.
    """

    def __init__(self, serve: Callable[[Handler], Awaitable[Server]], health: Health) -> None:
        self._serve = serve
        self._health = health
        self._ready = threading.Event()
        self._server: Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name="actors.health", daemon=True).start()

    def wait_listening(self) -> Server:
        """Block for the milliseconds until it listens.

        :raises OSError: it can't.
        """
        self._ready.wait()
        if self._server is None:
            assert self._error is not None  # one of them is set before _ready is
            raise self._error
        return self._server

    def post(self, do: Callable[[Server], object]) -> None:
        """Let the thread do something with its server; from any thread."""
        server = self.wait_listening()
        assert self._loop is not None  # it listens
        self._loop.call_soon_threadsafe(do, server)

    def _run(self) -> None:
        try:
            asyncio.run(self._listen())
        except BaseException as exc:  # noqa: BLE001, ASYNC103 - wait_listening() raises it
            self._error = exc
            self._ready.set()

    async def _listen(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._server = await self._serve(self._health.answer)
        self._ready.set()
        await asyncio.Event().wait()  # a daemon thread: it ends with the process
