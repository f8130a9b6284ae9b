"""Journal: what a run writes down so that another process can go on with it; and the Store that keeps it.

A store keeps, for each ``app_id`` of a partition, the State that it began with, one record for each committed step with
what the step wrote (never the whole State, and of a list that the step appended to no more than it appended), and the
fan-out ledger: the subtasks of the step under way that have finished. Values are bytes of :mod:`arun.codec`; a store
looks at none of them.

Who runs an application holds its lease. Each lease has an epoch, one higher than the one before, and every write names
it, so that a run that lost its lease (its machine slept, its container was cut off) can write nothing any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeAlias

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
    "Rebuilt",
    "Step",
    "Store",
    "lengths_of",
    "pack",
    "pack_fields",
    "rebuild",
    "unpack",
)

OnFinished: TypeAlias = Literal["raise", "fresh"]

_WHOLE: Final[Mapping[str, int]] = {}


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
    :ivar delta: what it wrote; of a list that it appended to, what it appended.
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

    async def commit(self, sequence_id: int, action: str, delta: bytes, base: bytes | None) -> None:
        """Write a step down."""
        await self.store.commit(self.lease, Step(sequence_id, action, delta, base))
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


def pack(action: str, delta: StateDelta, appended_at: Mapping[str, int] = _WHOLE) -> bytes:
    """Encode what an action wrote.

    :param appended_at: the lists of which only what is behind so many items is written, by key. What reads it back must
        have those items.
    :raises MisuseError: naming action, key and type of what can't be stored.
    """
    written = {key: value for key, value in delta.written.items() if key not in appended_at}
    parts: list[Any] = [written, list(delta.deleted)]
    if appended_at:
        parts.append({key: delta.written[key][length:] for key, length in appended_at.items()})
    try:
        return encode(parts)
    except CodecError as exc:
        if appended_at:
            return pack(action, delta)  # fails as well, and names the place in the whole list
        if not exc.kind:
            raise MisuseError(f"what action {action!r} wrote can't be stored: {exc}") from exc
        raise MisuseError(
            f"action {action!r} wrote state{''.join(exc.path[1:])} of type {exc.kind}, which can't be stored: {exc.why}"
        ) from exc


def unpack(delta: bytes) -> StateDelta:
    """The inverse of :func:`pack`, where nothing was left out of lists."""
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


def lengths_of(fields: Mapping[str, Any]) -> dict[str, int]:
    """How many items each list has, by key."""
    return {key: len(value) for key, value in fields.items() if isinstance(value, list)}


class Rebuilt(NamedTuple):
    """What a store knows of an application."""

    state: State
    #: the last committed step's action; None before the first
    position: str | None
    #: how often each action has run
    visits: dict[str, int]
    #: how many items the lists have that are stored, by key
    lengths: dict[str, int]


def rebuild(history: History, given: Mapping[str, Any]) -> Rebuilt:
    """Put together what the records say.

    :param given: the fields that the program starts with. Before the first committed step they win over the stored
        ones, later they only serve where the store has none.
    """
    stored: dict[str, Any] = decode(history.initial)
    if not history.steps:
        stored |= given
        return Rebuilt(State(stored), None, {}, lengths_of(stored))
    missing = {key: value for key, value in given.items() if key not in stored}
    visits: dict[str, int] = {}
    for step in history.steps:
        if step.base is not None:
            stored, missing = decode(step.base), {}
        written, deleted, *appended = decode(step.delta)
        stored |= written
        for key, more in appended[0].items() if appended else ():
            if type(stored[key]) is list:
                stored[key] += more
            else:
                stored[key] = [*stored[key], *more]  # as State.append() makes it
        for key in deleted:
            stored.pop(key, None)
            missing.pop(key, None)
        visits[step.action] = visits.get(step.action, 0) + 1
    last = history.steps[-1].action
    return Rebuilt(State().committed(State(missing | stored), last), last, visits, lengths_of(stored))
