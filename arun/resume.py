"""Resumable: one application and what its store knows of it."""

from __future__ import annotations

from typing import NamedTuple

import anyio

from arun.codec import digest
from arun.errors import AlreadyFinishedError, GraphChangedError
from arun.journal import Journal, Store, lengths_of, pack, pack_fields, rebuild
from arun.ledger import Ledger
from arun.state import State

__all__ = ("Resumable", "Resumed")


class Resumed(NamedTuple):
    """Where an application stands."""

    state: State
    #: the last committed step's action; None before the first
    position: str | None
    #: how many steps are committed
    sequence_id: int


class Resumable:
    """Leases an application for a run, reads what is known of it, and writes down what the run commits.

    :param given: the State that the program starts with.
    """

    __slots__ = (
        "_app_id",
        "_base",
        "_epoch",
        "_given",
        "_graph",
        "_journal",
        "_lengths",
        "_partition_key",
        "_store",
        "_visits",
    )

    def __init__(self, store: Store, app_id: str, partition_key: str | None, graph: str, given: State) -> None:
        self._store = store
        self._app_id = app_id
        self._partition_key = partition_key
        self._graph = graph
        self._given = given
        self._journal: Journal | None = None
        #: of the last lease; None before the first
        self._epoch: int | None = None
        #: how often each action has run
        self._visits: dict[str, int] = {}
        #: how many items the lists had when they were written down, by key: one that was changed in place since, which
        #: nobody may, is written as a whole
        self._lengths: dict[str, int] = {}
        #: what somebody set the State to since the last commit
        self._base: State | None = None

    async def open(self, sequence_id: int) -> Resumed | None:
        """Lease the application.

        :param sequence_id: how many steps the caller has seen committed.
        :return: where it stands; None if that is where the caller left it.
        :raises RunConflictError: if somebody else runs it.
        :raises GraphChangedError: if it was begun with another graph.
        """
        opened = await self._store.open_run(self._app_id, self._partition_key)
        self._journal = journal = Journal(self._store, opened)
        lease = journal.lease
        if opened.graph is None:
            await self._store.begin(lease, self._graph, self._begun(), fresh=True)
            self._epoch = lease.epoch
            return None
        if opened.graph != self._graph:
            raise GraphChangedError(
                f"application {self._app_id!r} was begun with another graph ({opened.graph[:8]}, now {self._graph[:8]})"
                ": actions, what they read and write, or transitions differ; let the program that began it finish it, "
                "or use another app_id"
            )
        nobody_between = self._epoch is not None and lease.epoch == self._epoch + 1
        self._epoch = lease.epoch
        if nobody_between and opened.sequence_id == sequence_id:
            return None
        history = await self._store.load(lease)
        state, position, self._visits, self._lengths = rebuild(history, self._given.get_all())
        self._base = None
        if position is None and (initial := pack_fields(state)) != history.initial:
            await self._store.begin(lease, self._graph, initial, fresh=False)
        return Resumed(state, position, opened.sequence_id)

    async def restart(self) -> State:
        """Forget everything; the State to begin with."""
        journal = self._opened()
        await self._store.begin(journal.lease, self._graph, self._begun(), fresh=True)
        journal.pending = 0
        self._visits, self._base = {}, None
        return self._given

    def finished(self, state: State, position: str | None, sequence_id: int) -> AlreadyFinishedError:
        """The error of running what has ended."""
        return AlreadyFinishedError(
            f"the run of application {self._app_id!r} has ended already, with action {position!r} at step "
            f"{sequence_id - 1}; its State is this error's .state; to run it again, use another app_id, or "
            'with_store(..., on_finished="fresh")',
            state.get_all(),
        )

    def replaced(self, state: State) -> None:
        """Somebody has set the State from outside."""
        if self._epoch is None:
            self._given = state
        else:
            self._base = state

    def ledger(self, action: str) -> Ledger:
        """The ledger of the next step, which runs ``action``."""
        visit = self._visits.get(action, 0)
        return Ledger(self._opened(), digest(action.encode(), visit.to_bytes(8, "little")))

    async def commit(self, sequence_id: int, action: str, before: State, changes: State) -> None:
        """Write a step down.

        :raises MisuseError: if the action wrote something that can't be stored; nothing is written then.
        """
        base = pack_fields(self._base) if self._base is not None else None
        delta, lengths = changes.delta, self._lengths
        appended = {key: length for key, length in changes.appended_to(before).items() if lengths.get(key) == length}
        packed = pack(action, delta, appended)
        with anyio.CancelScope(shield=True):
            await self._opened().commit(sequence_id, action, packed, base)
        self._base = None
        lengths |= lengths_of(delta.written)
        self._visits[action] = self._visits.get(action, 0) + 1

    async def close(self) -> None:
        """Give the lease back."""
        journal, self._journal = self._journal, None
        if journal is not None:
            await self._store.close_run(journal.lease)

    def _begun(self) -> bytes:
        self._lengths = lengths_of(self._given)
        return pack_fields(self._given)

    def _opened(self) -> Journal:
        assert self._journal is not None
        return self._journal
