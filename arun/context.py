"""What a running action knows of where it runs: its application, its place in the run, its inputs and resources."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final, Protocol

import anyio
import msgspec

from arun.events import Event
from arun.guards import Checks
from arun.hooks import Hooks
from arun.policies import Capacity

if TYPE_CHECKING:
    from arun.executors import Executor
    from arun.ledger import Ledger
    from arun.threads import Threads

__all__ = ("ApplicationContext", "Run", "Sink", "current_context")


class Sink(Protocol):
    """Takes the events of a run."""

    @property
    def full(self) -> bool:
        """Whether ``room`` has to be awaited before ``put``."""
        ...

    async def room(self, kind: object) -> None:
        """Wait for room for an event of this kind, which holds up the part of the run that sends it."""

    def put(self, event: Event) -> None:
        """Take an event."""


class Run:
    """One run of an application: numbers its events and hands them to whoever listens.

    :param sink: takes each event, in the order of its number.
    :param hooks: are told of each event before that. Where there is neither, no event is built.
    """

    __slots__ = ("_hooks", "_seq", "_sink", "_turn", "run_id")

    def __init__(self, sink: Sink | None = None, hooks: Hooks | None = None) -> None:
        self.run_id = uuid.uuid4().hex
        self._seq = 0
        self._sink = sink
        self._hooks = hooks
        #: held while one event goes through the hooks, since the next must not overtake it
        self._turn = anyio.Lock(fast_acquire=True) if hooks is not None else None

    @property
    def listening(self) -> bool:
        """Whether anybody takes the events; ask before computing what goes into one."""
        return self._sink is not None or self._hooks is not None

    async def emit(self, kind: Callable[..., Event], **fields: Any) -> None:
        """Number, stamp and deliver one event."""
        sink = self._sink
        if self._turn is None:
            if sink is not None:
                # Numbered only when there is room: waiting senders may be overtaken, or cancelled.
                if sink.full:
                    await sink.room(kind)
                self._seq += 1
                sink.put(kind(run_id=self.run_id, seq=self._seq, time=time.time(), **fields))
        elif sink is not None or (self._hooks is not None and kind in self._hooks):
            async with self._turn:
                await self._emit_in_turn(kind, fields)

    async def _emit_in_turn(self, kind: Callable[..., Event], fields: dict[str, Any]) -> None:
        if self._sink is not None and self._sink.full:
            await self._sink.room(kind)
        event = kind(run_id=self.run_id, seq=self._seq + 1, time=time.time(), **fields)
        assert self._hooks is not None
        await self._hooks.tell(event)
        self._seq += 1  # not before: what a hook has refused never was
        if self._sink is not None:
            self._sink.put(event)


class ApplicationContext(msgspec.Struct, kw_only=True, eq=False):
    """Given to ``states``, ``actions`` and ``tasks`` as ``context`` and to any action as its parameter ``__context``;
    what an action calls gets it from :meth:`get`.

    :ivar app_id: identifier of the application.
    :ivar partition_key: the application's partition, or None.
    :ivar sequence_id: number of the step, 0 for the first.
    :ivar action_name: the action that runs.
    :ivar path: the branches above it, outermost first (see :mod:`arun.events`).
    :ivar inputs: the runtime inputs of the run.
    :ivar resources: what ``with_resources`` injected.
    :ivar ledger: where subtasks that finish below this action are recorded; None without a store.
    """

    app_id: str
    partition_key: str | None
    sequence_id: int
    action_name: str
    path: tuple[str, ...]
    inputs: Mapping[str, Any]
    resources: Mapping[str, Any]
    run: Run
    ledger: Ledger | None = None
    #: which attempt of the subtask above this is, 1 for the first
    attempt: int = 1
    #: tells the idle timeouts above that something was yielded
    beats: tuple[Callable[[], None], ...] = ()
    #: budgets that every leaf action below draws on
    capacities: tuple[Capacity, ...] = ()
    #: what the guard-rails look for; None for nothing
    checks: Checks | None = None
    #: where the subtasks below run; None: here
    executor: Executor | None = None
    #: how plain functions run in threads; None: as many at once as policies allow
    threads: Threads | None = None

    def __repr__(self) -> str:
        return f"<ApplicationContext of {self.label}, application {self.app_id!r}>"

    @classmethod
    def get(cls) -> ApplicationContext | None:
        """The context of the action that this is called in, at any depth and in its threads; None outside of one."""
        return current_context.get()

    @property
    def label(self) -> str:
        """The action and the branches that lead to it, for people."""
        return f"{self.action_name!r} in {'/'.join(self.path)}" if self.path else repr(self.action_name)

    def child(
        self, action_name: str, *branch: str, sequence_id: int | None = None, inputs: Mapping[str, Any] | None = None
    ) -> ApplicationContext:
        """The context of an action below this one, reached through ``branch``.

        :param inputs: inputs for everything below, on top of the run's own.
        """
        child = _copy(self)
        child.action_name = action_name
        child.path = (*self.path, *branch)
        if sequence_id is not None:
            child.sequence_id = sequence_id
        if inputs:
            child.inputs = {**self.inputs, **inputs}
        return child

    def with_executor(self, executor: Executor | None) -> ApplicationContext:
        """This context with another executor for what is below."""
        other = _copy(self)
        other.executor, other.threads = executor, None
        return other

    def with_threads(self, threads: Threads) -> ApplicationContext:
        """This context with another way to run plain functions."""
        other = _copy(self)
        other.threads = threads
        return other

    async def emit(self, kind: Callable[..., Event], **fields: Any) -> None:
        """Send an event in the name of this action."""
        await self.run.emit(kind, action=self.action_name, path=self.path, attempt=self.attempt, **fields)


#: of the innermost action that runs
current_context: Final[ContextVar[ApplicationContext | None]] = ContextVar("arun_context", default=None)
_copy: Callable[[ApplicationContext], ApplicationContext] = ApplicationContext.__copy__  # type: ignore[attr-defined]  # msgspec has it
