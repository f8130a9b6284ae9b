"""What a running action knows of where it runs: its application, its place in the run, its inputs and resources."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from arun.events import Event

if TYPE_CHECKING:
    from arun.executors import Executor
    from arun.threads import Threads

__all__ = ("ApplicationContext", "Run", "Sink")


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

    :param sink: takes each event, in the order of its number; None where nobody listens, and then no event is built.
    """

    __slots__ = ("_seq", "_sink", "run_id")

    def __init__(self, sink: Sink | None = None) -> None:
        self.run_id = uuid.uuid4().hex
        self._seq = 0
        self._sink = sink

    @property
    def listening(self) -> bool:
        """Whether anybody takes the events; ask before computing what goes into one."""
        return self._sink is not None

    async def emit(self, kind: Callable[..., Event], **fields: Any) -> None:
        """Number, stamp and deliver one event."""
        sink = self._sink
        if sink is not None:
            # Numbered only when there is room: waiting senders may be overtaken, or cancelled.
            if sink.full:
                await sink.room(kind)
            self._seq += 1
            sink.put(kind(run_id=self.run_id, seq=self._seq, time=time.time(), **fields))


class ApplicationContext:
    """Given to ``states``, ``actions`` and ``tasks`` as ``context`` and to any action as its parameter ``__context``.

    :ivar app_id: identifier of the application.
    :ivar partition_key: the application's partition, or None.
    :ivar sequence_id: number of the step, 0 for the first.
    :ivar action_name: the action that runs.
    :ivar path: the branches above it, outermost first (see :mod:`arun.events`).
    :ivar inputs: the runtime inputs of the run.
    :ivar resources: what ``with_resources`` injected.
    :ivar executor: where the subtasks below run; None: here.
    :ivar threads: how plain functions run in threads; None: as many at once as policies allow.
    """

    __slots__ = (
        "action_name",
        "app_id",
        "executor",
        "inputs",
        "partition_key",
        "path",
        "resources",
        "run",
        "sequence_id",
        "threads",
    )

    def __init__(
        self,
        *,
        app_id: str,
        partition_key: str | None,
        sequence_id: int,
        action_name: str,
        path: tuple[str, ...],
        inputs: Mapping[str, Any],
        resources: Mapping[str, Any],
        run: Run,
        executor: Executor | None = None,
        threads: Threads | None = None,
    ) -> None:
        self.app_id = app_id
        self.partition_key = partition_key
        self.sequence_id = sequence_id
        self.action_name = action_name
        self.path = path
        self.inputs = inputs
        self.resources = resources
        self.run = run
        self.executor = executor
        self.threads = threads

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
        return ApplicationContext(
            app_id=self.app_id,
            partition_key=self.partition_key,
            sequence_id=self.sequence_id if sequence_id is None else sequence_id,
            action_name=action_name,
            path=(*self.path, *branch),
            inputs={**self.inputs, **inputs} if inputs else self.inputs,
            resources=self.resources,
            run=self.run,
            executor=self.executor,
            threads=self.threads,
        )

    def with_executor(self, executor: Executor | None) -> ApplicationContext:
        """This context with another executor for what is below."""
        return self._copy(executor, self.threads)

    def with_threads(self, threads: Threads | None) -> ApplicationContext:
        """This context with another way to run plain functions."""
        return self._copy(self.executor, threads)

    def _copy(self, executor: Executor | None, threads: Threads | None) -> ApplicationContext:
        copy = self.child(self.action_name)
        copy.executor, copy.threads = executor, threads
        return copy

    async def emit(self, kind: Callable[..., Event], **fields: Any) -> None:
        """Send an event in the name of this action."""
        await self.run.emit(kind, action=self.action_name, path=self.path, **fields)
