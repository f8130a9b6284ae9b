"""The actor's side: one object, its messages, its life. The same code in a process of ours, in Ray's, and in a task.

``main()`` is what LocalCluster starts. The process reads a :class:`HostOrder` from stdin, listens on a
Unix socket and writes one line to the status pipe when it does. From then on stdin says one thing only: at its end the
actor is to stop, because its owner let go of it or died. Everything else, the outcome of the start included, goes
over the channel.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import select
import signal
import sys
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import anyio
import msgspec

from actors import pickling
from arun.channel import serve_unix
from arun.errors import MisuseError
from arun.logs import get_logger
from arun.runtime import Background, Runtime
from arun.telemetry import configure_logging_as_parent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from actors.interface import ActorSpec, Method

__all__ = ("START", "Host", "HostOrder", "main")

START = "@start"
"""Method that starts an actor; answered when it is ready, or with the error that kept it from it.

No class has a method of that name."""

log = get_logger("actors.host")


class Host:
    """One actor's object and its life, which is one task, so that ``on_start`` may enter what ``on_stop`` leaves.

    ``on_stop`` is not run where ``on_start`` did not succeed, as with ``__aenter__`` and ``__aexit__``.
    """

    def __init__(self, load: Callable[[], ActorSpec]) -> None:
        self._load = load
        self._serving: _Serving | None = None
        self._error: Exception | None = None
        self._asked = anyio.Event()
        self._started = anyio.Event()
        self._stop = anyio.Event()
        self._life: Background[None] | None = None

    def begin(self, hang_up: Callable[[], Awaitable[None]]) -> None:
        """Begin its life: at :data:`START` the object is built and its ``on_start`` runs; the answer tells how it went.

        :param hang_up: closes the channel and waits until the running messages have cleaned up.
        """
        self._life = Runtime.current().start(self._live, hang_up, name="actor")

    def stop(self) -> None:
        """Ask it to hang up and run ``on_stop``; a start that goes on is cancelled."""
        if self._started.is_set():
            self._stop.set()
        elif self._life is not None:
            self._life.cancel()

    async def wait_ended(self) -> None:
        """Wait for the end.

        :raises Exception: what ``on_stop`` raised.
        """
        if self._life is not None:
            await self._life.wait()

    async def _live(self, hang_up: Callable[[], Awaitable[None]]) -> None:
        # Not before the owner is connected: it could neither tell an early death nor end what it does not know.
        await self._asked.wait()
        # No cancel scope may be open around on_start: what it enters stays entered.
        instance: object | None = None
        try:
            spec = self._load()
            built = spec.cls(*spec.args, **spec.kwargs)
            await _lifecycle(built, "on_start")
            instance, self._serving = built, _Serving(built, spec)
        except Exception as exc:  # noqa: BLE001  # whatever it is, START tells it
            self._error = exc
        finally:
            self._started.set()
        await self._stop.wait()
        await hang_up()
        if instance is not None:
            await _lifecycle(instance, "on_stop")

    def handle(self, method: str, payload: msgspec.Raw) -> AsyncIterator[object]:
        """Answer one message: its result as the only item, or the items of a stream."""
        if self._serving is None or method == START:
            return self._outcome()
        return self._serving.answer(method, payload)

    async def _outcome(self) -> AsyncIterator[None]:
        self._asked.set()
        await self._started.wait()
        if self._error is not None:
            raise self._error
        if self._serving is None:
            raise MisuseError("the actor was stopped while it was starting")
        yield None


class _Serving:
    """A started actor: how messages become calls, and whose turn it is."""

    def __init__(self, instance: object, spec: ActorSpec) -> None:
        self._callees = {name: _Callee(method, instance) for name, method in spec.interface.methods.items()}
        self._turn = anyio.Semaphore(spec.interface.concurrency, fast_acquire=True)  # fair: in order of arrival
        self._class_name = spec.interface.class_name

    async def answer(self, method: str, payload: msgspec.Raw) -> AsyncIterator[object]:
        callee = self._callees.get(method)
        if callee is None:
            raise MisuseError(f"{self._class_name} has no method {method!r}; it has {', '.join(self._callees)}")
        args, kwargs = callee.arguments(payload)
        if not callee.streaming:
            async with self._turn:
                result = await callee.function(*args, **kwargs)
            yield result
            return
        stream = callee.function(*args, **kwargs)
        try:
            while True:
                async with self._turn:
                    item = await anext(stream, _END)
                if item is _END:
                    return
                yield item
        finally:
            if stream.ag_frame is not None:  # it stands at a yield: its clean-up is a step like any other
                with anyio.CancelScope(shield=True):
                    async with self._turn:
                        await stream.aclose()


_END = object()


class _Callee:
    """One method of the object, with the decoders of its arguments."""

    __slots__ = ("_decoders", "_method", "function", "streaming")

    def __init__(self, method: Method, instance: object) -> None:
        self.function: Callable[..., Any] = getattr(instance, method.name)
        self.streaming = method.streaming
        self._method = method
        self._decoders = {name: msgspec.msgpack.Decoder(kind) for name, kind in method.argument_types.items()}

    def arguments(self, payload: msgspec.Raw) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Decode what :meth:`Method.bind` gave to the caller.

        :raises MisuseError: a value is not of its parameter's type.
        """
        bound = inspect.BoundArguments(self._method.signature, OrderedDict())
        for name, raw in _NAMED.decode(payload).items():
            try:
                bound.arguments[name] = self._decoders[name].decode(raw)
            except msgspec.ValidationError as exc:
                raise MisuseError(f"{self._method.label}: its argument {name} is wrong: {exc}") from exc
        return bound.args, bound.kwargs


_NAMED = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])


async def _lifecycle(instance: object, name: str) -> None:
    hook = getattr(instance, name, None)
    if hook is not None:
        await hook()


class HostOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What a host process is told on stdin, once.

    :ivar blob: the pickled :class:`~actors.interface.ActorSpec`.
    :ivar token: what callers must know.
    :ivar path: of the Unix socket to listen on.
    :ivar status_fd: where to write one line when it listens.
    :ivar grace: seconds from the end of stdin to being killed.
    :ivar sys_path: the owner's, so that the actor finds the modules that the owner finds.
    :ivar pythonpath: PYTHONPATH as the actor's own child processes shall see it.
    """

    blob: bytes
    token: bytes
    path: str
    status_fd: int
    owner_pid: int
    grace: float
    sys_path: list[str]
    pythonpath: str | None

    def write(self) -> bytes:
        """The order as it goes into the pipe: its length in 8 bytes, then msgpack."""
        body = msgspec.msgpack.encode(self)
        return len(body).to_bytes(8, "big") + body

    @classmethod
    def read(cls, fd: int) -> HostOrder:
        """Read one order.

        :raises EOFError: the writer went away first.
        """
        length = int.from_bytes(_read_exactly(fd, 8), "big")
        return msgspec.msgpack.decode(_read_exactly(fd, length), type=cls)


def main() -> None:
    """Live as the process of one actor."""
    configure_logging_as_parent()
    try:
        order = HostOrder.read(sys.stdin.fileno())
    except EOFError:  # the owner died, or gave up, before it said what to do
        sys.exit(1)
    leash = _take_over_stdin()
    os.set_inheritable(order.status_fd, False)
    sys.path[:] = [*order.sys_path, *(entry for entry in sys.path if entry not in order.sys_path)]
    _set_or_unset("PYTHONPATH", order.pythonpath)
    try:
        asyncio.run(_serve(order, leash))
    finally:
        _kill_what_the_actor_started()


async def _serve(order: HostOrder, leash: int) -> None:
    host = Host(lambda: pickling.loads(order.blob))
    loop = asyncio.get_running_loop()
    threading.Thread(
        target=_watch_owner,
        args=(leash, order.owner_pid, order.grace, lambda: loop.call_soon_threadsafe(host.stop)),
        name="actors.host.leash",
        daemon=True,
    ).start()
    server = await serve_unix(host.handle, path=order.path, token=order.token)
    os.write(order.status_fd, b"listening\n")
    os.close(order.status_fd)
    host.begin(server.aclose)
    try:
        await host.wait_ended()
    except Exception:
        log.exception("actor.stop_failed")
        sys.exit(1)


def _watch_owner(leash: int, owner_pid: int, grace: float, stop: Callable[[], object]) -> None:
    """Wait for the end of stdin or of the owner, ask for a stop, and kill after the grace.

    In a thread, because a busy actor blocks its event loop. The owner is watched as well as stdin, because children
    that it forked hold copies of stdin's other end.
    """
    poll = select.poll()
    poll.register(leash, select.POLLIN | select.POLLHUP)
    try:
        poll.register(os.pidfd_open(owner_pid), select.POLLIN)
        gone = os.getppid() != owner_pid  # it died before that, and the id may be somebody else's by now
    except ProcessLookupError:
        gone = True
    if not gone:
        poll.poll()
    with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending already
        stop()
    time.sleep(grace)
    _kill_process_group()


def _take_over_stdin() -> int:
    """Keep stdin's pipe for ourselves and leave /dev/null to the actor's code."""
    leash = os.dup(0)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    return leash


def _kill_what_the_actor_started() -> None:
    """End the others of this process's group. The owner does so too when it sees this end, if it lives."""
    group = os.getpgid(0)
    if group != os.getpid():  # started by hand: the group is somebody's shell
        return
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != group:
            with contextlib.suppress(ProcessLookupError):
                if os.getpgid(int(entry)) == group:
                    os.kill(int(entry), signal.SIGKILL)


def _kill_process_group() -> None:
    """End this process and everything it started. A host leads a session of its own, unless it was started by hand."""
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def _read_exactly(fd: int, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        piece = os.read(fd, min(count - len(data), 1 << 20))
        if not piece:
            raise EOFError
        data += piece
    return bytes(data)


def _set_or_unset(variable: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(variable, None)
    else:
        os.environ[variable] = value
