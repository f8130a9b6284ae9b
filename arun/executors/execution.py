"""One subtask in a worker: its Order in, the Answers out, as the iterator that a channel takes them from."""

from __future__ import annotations

import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Collection, Iterator, Mapping
from typing import Any, Final

import anyio

from arun.actions import perform
from arun.codec import decode
from arun.context import ApplicationContext, Run
from arun.errors import MisuseError, RemoteError
from arun.events import Event
from arun.executors.failures import failure_of
from arun.executors.messages import Answer, Beat, Emitted, Order, Success
from arun.executors.references import Find, action_of, encode_values
from arun.runtime import Background, Runtime
from arun.state import State
from arun.threads import Threads

__all__ = ("Execution", "kill_everything")

_COMMON: Final = frozenset({"run_id", "seq", "time", "action", "path", "attempt"})
_BEAT: Final = Beat()


class Execution:
    """One subtask, as the iterator of what the parent is to know of it.

    :param attached: the resources that the worker has attached to.
    """

    def __init__(self, order: Order, find: Find, attached: Mapping[str, Any] = {}) -> None:
        self._answers = _Answers()
        self._threads = _WorkerThreads()
        self._attached = attached
        self._background: Background[None] = Runtime.current().start(self._run, order, find, name="arun subtask")

    def __aiter__(self) -> AsyncIterator[Answer]:
        return self

    async def __anext__(self) -> Answer:
        answer = await self._answers.take()
        if answer is None:
            await self._background.ended()
            raise StopAsyncIteration
        return answer

    async def aclose(self) -> None:
        """Cancel the subtask, if it still runs, and wait for its clean-up."""
        self._threads.cancelled = True
        self._answers.end()
        self._background.cancel()
        with anyio.CancelScope(shield=True):
            await self._background.ended()

    async def _run(self, order: Order, find: Find) -> None:
        try:
            final: Answer = await self._perform(order, find)
        except Exception as exc:  # noqa: BLE001 - whatever it is, the parent raises it
            final = failure_of(exc)
        except anyio.get_cancelled_exc_class() as exc:  # noqa: ASYNC103 - not ours to pass on: nobody cancelled this
            if self._background.cancelling:
                raise
            final = failure_of(RemoteError("CancelledError", f"the subtask cancelled itself: {exc!r}"))
        finally:
            _flush()
        self._answers.end(final)

    async def _perform(self, order: Order, find: Find) -> Success:
        action = action_of(order.action, find)
        context = ApplicationContext(
            app_id=order.app_id,
            partition_key=order.partition_key,
            sequence_id=order.sequence_id,
            action_name=order.action_name,
            path=order.path,
            inputs=decode(order.run_inputs),
            resources=_Resources(order.resources, self._attached),
            run=Run(self._answers if order.listening else None),
        )
        context.threads, context.attempt, context.checks = self._threads, order.attempt, order.checks
        if order.beating:
            context.beats = (self._answers.beat,)
        state = State(decode(order.state)).scoped(None)
        result, changes = await perform(action, state, decode(order.inputs), context)
        name, delta = action.display_name, changes.delta
        written = encode_values(delta.written, lambda key: f"state[{key!r}], which action {name!r} wrote,")
        answer = encode_values({"result": result}, lambda _: f"the result of action {name!r}")
        return Success(answer, written, sorted(delta.deleted))


class _Resources(Mapping[str, Any]):
    """The resources of the program: those that are attached to are here, the others stay behind."""

    def __init__(self, names: Collection[str], attached: Mapping[str, Any]) -> None:
        self._names = names
        self._attached = attached

    def __getitem__(self, name: str) -> Any:
        if name in self._attached:
            return self._attached[name]
        if name not in self._names:
            raise KeyError(name)
        raise MisuseError(
            f"the resource {name!r} stays in the program's own process; run what needs it there (executor=None, or a "
            "ThreadExecutor for plain functions), or make one in each worker: "
            f"`@functools.cache` on a function `{name}()` at the top level of a module, called by the action. Workers "
            "of a RayExecutor attach to detached pools and actors"
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class _Answers:
    """Events on their way to the channel; a sink of a Run. The channel takes one when the parent has room for it."""

    _CAPACITY: Final = 1

    def __init__(self) -> None:
        self._waiting: deque[Answer] = deque()
        self._ended = False
        self._changed: anyio.Event | None = None
        self._room: anyio.Event | None = None

    @property
    def full(self) -> bool:
        return len(self._waiting) >= self._CAPACITY

    async def room(self, kind: object) -> None:
        while self.full and not self._ended:
            self._room = self._room or anyio.Event()
            await self._room.wait()

    def put(self, event: Event) -> None:
        if not self._ended:
            fields = {name: getattr(event, name) for name in event.__struct_fields__ if name not in _COMMON}
            kind = type(event).__name__
            what = f"what action {event.action!r} yielded"
            data = encode_values(fields, lambda name: f"{what} ({kind}.{name})")
            self._waiting.append(Emitted(kind, event.action, event.path, event.attempt, data))
            self._wake()

    def beat(self) -> None:
        """Tell that something was yielded; one that waits already tells it."""
        if not self._ended and not (self._waiting and isinstance(self._waiting[-1], Beat)):
            self._waiting.append(_BEAT)
            self._wake()

    def end(self, last: Answer | None = None) -> None:
        if last is not None:
            self._waiting.append(last)
        self._ended = True
        self._wake()

    async def take(self) -> Answer | None:
        while not self._waiting:
            if self._ended:
                return None
            self._changed = anyio.Event()
            await self._changed.wait()
        answer = self._waiting.popleft()
        if self._room is not None:
            self._room.set()
            self._room = None
        return answer

    def _wake(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None
        if self._ended and self._room is not None:
            self._room.set()


class _WorkerThreads(Threads):
    """Threads of a subtask. A cancelled subtask waits for a generator's next item, and for a plain function not at all:
    that one takes the process with it, which the parent replaces.

    :ivar cancelled: whether the whole subtask was cancelled; one that cancels a part of itself waits as in any process.
    """

    __slots__ = ("cancelled",)

    def __init__(self) -> None:
        super().__init__()
        self.cancelled = False

    def left_behind(self, *, stepping: bool) -> None:
        if self.cancelled and not stepping:
            kill_everything()


def kill_everything() -> None:
    """End this process and, if it leads a session of its own, all that it started there."""
    if os.getpgid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # closed by the subtask, or at the other end
            pass
