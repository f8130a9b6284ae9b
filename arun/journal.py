"""Journal: what a run writes down so that another process can go on with it; and the Store that keeps it.

A store keeps, for each ``app_id`` of a partition, the State that it began with, one record for each committed step with
what the step wrote (never the whole State), and the fan-out ledger: the subtasks of the step under way that have
finished. Values are bytes of :mod:`arun.codec`; a store looks at none of them.

Who runs an application holds its lease. Each lease has an epoch, one higher than the one before, and every write names
it, so that a run that lost its lease (its machine slept, its container was cut off) can write nothing any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, TypeAlias

import msgspec

from arun.codec import decode, encode
from arun.errors import CodecError, MisuseError
from arun.state import State, StateDelta

__all__ = (
    "History",
    "Journal",
    "Lease",
    "OnFinished",
    "Opened",
    "Step",
    "Store",
    "pack",
    "pack_fields",
    "rebuild",
    "unpack",
)

OnFinished: TypeAlias = Literal["raise", "fresh"]


class Lease(msgspec.Struct, frozen=True, weakref=True):
    """The right to write the records of one application, until somebody else gets a later one.

    :ivar epoch: 1, 2, 3, ... over all leases of the application.
    :ivar token: what tells two holders apart.
    """

    app_id: str
    partition_key: str | None
    epoch: int
    token: str


class Opened(msgspec.Struct, frozen=True):
    """What a store knows of an application at the moment of its lease.

    :ivar graph: hash of the graph that it was begun with; None for an application that never began.
    :ivar sequence_id: how many steps are committed.
    :ivar pending: how many finished subtasks of the step under way are in the ledger.
    """

    lease: Lease
    graph: str | None
    sequence_id: int
    pending: int


class Step(msgspec.Struct, frozen=True):
    """A committed step.

    :ivar sequence_id: 0, 1, 2, ...
    :ivar action: the action that ran.
    :ivar delta: what it wrote.
    :ivar base: all fields before it, where they are not those after the step before (``app.update_state()``).
    """

    sequence_id: int
    action: str
    delta: bytes
    base: bytes | None = None


class History(msgspec.Struct, frozen=True):
    """The State that an application began with, and its steps in order."""

    initial: bytes
    steps: list[Step]


class Store(Protocol):
    """Where runs are kept.

    Whatever reads or writes under a lease raises RunConflictError if that is outdated.
    """

    async def open_run(self, app_id: str, partition_key: str | None) -> Opened:
        """Lease the application.

        :raises RunConflictError: while somebody who is alive holds it.
        """
        ...

    async def begin(self, lease: Lease, graph: str, initial: bytes, *, fresh: bool) -> None:
        """Set graph and first State; ``fresh`` forgets all steps and the ledger."""
        ...

    async def load(self, lease: Lease) -> History:
        """Everything that is needed to rebuild the State."""
        ...

    async def commit(self, lease: Lease, step: Step) -> None:
        """Add the next step and forget the ledger, both or neither.

        :raises RunConflictError: if ``step.sequence_id`` is not the number of steps committed so far.
        """
        ...

    async def record(
        self, lease: Lease, parent: bytes, content: bytes, occurrence: int, delta: bytes, key: bytes
    ) -> None:
        """Add a finished subtask to the ledger, and forget those recorded below it, whose parent is ``key``."""
        ...

    async def recall(self, lease: Lease, parent: bytes, content: bytes) -> list[tuple[int, bytes]]:
        """(occurrence, delta) of the finished subtasks of that content, by occurrence."""
        ...

    async def close_run(self, lease: Lease) -> None:
        """Give the lease back; an outdated one is none of our business any more."""
        ...

    async def aclose(self) -> None:
        """Write what is pending and let go of files and threads; idempotent."""
        ...


class Journal:
    """The records of one run, under its lease.

    :ivar pending: finished subtasks that earlier runs left and this one has not asked for yet; while it is 0, nothing
        is looked up.
    """

    __slots__ = ("lease", "pending", "store")

    def __init__(self, store: Store, opened: Opened) -> None:
        self.store = store
        self.lease = opened.lease
        self.pending = opened.pending

    async def commit(self, sequence_id: int, action: str, changes: State, base: State | None) -> None:
        """Write a step down.

        :raises MisuseError: if the action wrote something that can't be stored; nothing is written then.
        """
        before = pack_fields(base) if base is not None else None
        await self.store.commit(self.lease, Step(sequence_id, action, pack(action, changes.delta), before))
        self.pending = 0

    async def recall(self, parent: bytes, content: bytes, *, again: bool = False) -> list[tuple[int, bytes]]:
        """What earlier runs left of a subtask.

        :param again: whether this run may have recorded it, too, which ``pending`` does not count.
        """
        if not (self.pending or again):
            return []
        found = await self.store.recall(self.lease, parent, content)
        if not again:
            self.pending -= len(found)
        return found


def pack(action: str, delta: StateDelta) -> bytes:
    """Encode what an action wrote.

    :raises MisuseError: naming action, key and type of what can't be stored.
    """
    try:
        return encode([delta.written, list(delta.deleted)])
    except CodecError as exc:
        if not exc.kind:
            raise MisuseError(f"what action {action!r} wrote can't be stored: {exc}") from exc
        raise MisuseError(
            f"action {action!r} wrote state{''.join(exc.path[1:])} of type {exc.kind}, which can't be stored: {exc.why}"
        ) from exc


def unpack(delta: bytes) -> StateDelta:
    """The inverse of :func:`pack`."""
    written, deleted = decode(delta)
    return StateDelta(written, frozenset(deleted))


def pack_fields(state: State) -> bytes:
    """Encode all fields of a State.

    :raises MisuseError: naming key and type of what can't be stored.
    """
    try:
        return encode(state.get_all())
    except CodecError as exc:
        if not exc.kind:
            raise MisuseError(f"the State can't be stored: {exc}") from exc
        raise MisuseError(
            f"state{''.join(exc.path)} is of type {exc.kind}, which can't be stored: {exc.why}; "
            "what is no data belongs into with_resources(...)"
        ) from exc


def rebuild(history: History, given: Mapping[str, Any]) -> tuple[State, str | None, dict[str, int]]:
    """(State, last action, how often each action has run) of what a store knows.

    :param given: the fields that the program starts with. Before the first committed step they win over the stored
        ones, later they only serve where the store has none.
    """
    initial: dict[str, Any] = decode(history.initial)
    if not history.steps:
        return State({**initial, **given}), None, {}
    state = State({**given, **initial})
    visits: dict[str, int] = {}
    for step in history.steps:
        if step.base is not None:
            state = State(decode(step.base))
        state = state.committed(state.scoped(None).patched(unpack(step.delta)), step.action)
        visits[step.action] = visits.get(step.action, 0) + 1
    last = history.steps[-1].action
    return state, last, visits
