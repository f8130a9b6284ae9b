"""Ledger: subtasks that finish are written down, and a run that resumes takes them from there instead of running them.

Theory of operation: each subtask has a content key (:mod:`arun.keys`) below the key of its parent, and among siblings
of one content an occurrence number, so that n identical prompts are n subtasks. A run that resumes asks the store, when
a subtask starts, which occurrences of its content have finished. The next of those that nobody has taken is this
subtask's result; once all are taken, it runs under the first number that is free, which is the one that it ran under
before: so what had finished below it is found, too. Siblings of one content can stand for each other, so order never
matters.

Written is what the subtask's action wrote, and only when it has ended well: failure and cancellation leave no trace.
Once a subtask is recorded, what was recorded below it is forgotten, and once the step is committed, all of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import anyio

from arun.actions import Action
from arun.codec import digest
from arun.context import ApplicationContext
from arun.errors import MisuseError
from arun.journal import Journal, pack, unpack
from arun.keys import Keys
from arun.state import State, StateDelta

__all__ = ("Entry", "Ledger", "Siblings")


class Ledger:
    """A place in a run, below which subtasks are recorded.

    :param entered: whether this run may have recorded some there already: the place above is entered again.
    """

    __slots__ = ("_entered", "journal", "key")

    def __init__(self, journal: Journal, key: bytes, *, entered: bool = False) -> None:
        self.journal = journal
        self.key = key
        self._entered = entered

    def siblings(self, owner: str) -> Siblings:
        """For what runs directly below this place; asked for again by a retry, which finds what finished before."""
        again, self._entered = self._entered, True
        return Siblings(self, owner, again=again)


class Entry:
    """One subtask: what an earlier run left of it, or where to record it.

    :ivar restored: what it wrote, if an earlier run finished it.
    :ivar changes: what it wrote, once it has ended.
    :ivar ledger: the place below it.
    """

    __slots__ = ("_action", "_content", "_occurrence", "_parent", "changes", "ledger", "restored")

    def __init__(
        self,
        parent: Ledger,
        action: Action,
        content: bytes,
        occurrence: int,
        restored: StateDelta | None,
        *,
        again: bool = False,
    ) -> None:
        self._parent = parent
        self._action = action
        self._content = content
        self._occurrence = occurrence
        self.restored = restored
        self.changes: State | None = None
        key = digest(parent.key, content, occurrence.to_bytes(8, "little"))
        self.ledger = Ledger(parent.journal, key, entered=again)

    async def record(self) -> None:
        """The subtask has ended well, having written ``changes``.

        :raises MisuseError: if something of it can't be stored.
        """
        journal, parent = self._parent.journal, self._parent
        assert self.changes is not None
        delta = pack(self._action.display_name, self.changes.delta)
        await journal.store.record(journal.lease, parent.key, self._content, self._occurrence, delta, self.ledger.key)


class Siblings:
    """The subtasks of one parallel action, or the steps of one sub-graph, as the ledger knows them."""

    __slots__ = ("_again", "_counts", "_keys", "_known", "_ledger", "_resuming")

    def __init__(self, ledger: Ledger, owner: str, *, again: bool) -> None:
        self._ledger = ledger
        self._keys = Keys(owner)
        self._again = again
        self._resuming = again or ledger.journal.pending > 0
        #: how many of each content have been started, where nothing is looked up
        self._counts: dict[bytes, int] = {}
        self._known: dict[bytes, _Known] = {}

    async def enter(
        self,
        action: Action,
        state: State,
        inputs: Mapping[str, Any],
        context: ApplicationContext,
        *,
        key: str | None = None,
    ) -> Entry:
        """A subtask starts.

        :param key: the key that it was given, which then stands for its content.
        :raises MisuseError: if it can't be told from its siblings.
        """
        if key is None:
            content = self._keys.of(action, state, inputs, context)
        else:
            content = digest(b"key", key.encode(), action.display_name.encode(), repr(action.version).encode())
        return await self._enter(action, content)

    async def step(self, action: Action, visit: int, state: State, context: ApplicationContext) -> Entry | None:
        """A step of a sub-graph starts, the ``visit``-th of that action; None if it can't be told by its content."""
        number = visit.to_bytes(8, "little")
        try:
            content = self._keys.of(action, state, {}, context, b"step", number)
        except MisuseError:
            return None
        return await self._enter(action, content)

    def below(self, action: Action, visit: int) -> Ledger:
        """The place below a step that isn't recorded itself."""
        name = action.display_name.encode()
        key = digest(self._ledger.key, b"step", name, visit.to_bytes(8, "little"))
        return Ledger(self._ledger.journal, key, entered=self._again)

    async def _enter(self, action: Action, content: bytes) -> Entry:
        if not self._resuming:
            count = self._counts.get(content, 0)
            self._counts[content] = count + 1
            return Entry(self._ledger, action, content, count, None)
        known = await self._look_up(content)
        if known.left:
            occurrence, delta = known.left.popleft()
            return Entry(self._ledger, action, content, occurrence, unpack(delta))
        while known.next in known.finished:
            known.next += 1
        known.next += 1
        return Entry(self._ledger, action, content, known.next - 1, None, again=self._again)

    async def _look_up(self, content: bytes) -> _Known:
        """What earlier runs left of a content; the first of its siblings asks, the others wait for the answer."""
        while (known := self._known.get(content)) is not None:
            if known.loading is None:
                return known
            await known.loading.wait()
        known = self._known[content] = _Known()
        known.loading = loading = anyio.Event()
        try:
            found = await self._ledger.journal.recall(self._ledger.key, content, again=self._again)
        except BaseException:
            del self._known[content]  # this sibling was cancelled; the next one asks again
            raise
        finally:
            known.loading = None
            loading.set()
        known.left.extend(found)
        known.finished.update(occurrence for occurrence, _ in found)
        return known


class _Known:
    """Of one content: finished occurrences that nobody has taken, all finished ones, and the number to try next."""

    __slots__ = ("finished", "left", "loading", "next")

    def __init__(self) -> None:
        self.left: deque[tuple[int, bytes]] = deque()
        self.finished: set[int] = set()
        self.next = 0
        self.loading: anyio.Event | None = None
