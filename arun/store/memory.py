"""MemoryStore: the Store protocol in a dict, for tests and for runs that need not outlive the process."""

from __future__ import annotations

import uuid
import weakref
from typing import Self

import anyio.lowlevel

from arun.errors import RunConflictError
from arun.journal import History, Lease, Opened, Step

__all__ = ("MemoryStore",)


class MemoryStore:
    """Keeps runs as long as it lives itself. Share one among the Applications that are to know of each other."""

    def __init__(self) -> None:
        self._apps: dict[tuple[str, str], _App] = {}

    async def open_run(self, app_id: str, partition_key: str | None) -> Opened:
        """Lease the application."""
        await anyio.lowlevel.checkpoint()
        app = self._apps.setdefault((app_id, partition_key or ""), _App())
        if app.holder is not None and app.holder() is not None:
            raise RunConflictError(
                f"application {app_id!r} is being run already, in this process; wait for that run, "
                "or use another app_id"
            )
        app.epoch += 1
        lease = Lease(app_id, partition_key, app.epoch, uuid.uuid4().hex)
        app.holder = weakref.ref(lease)
        return Opened(lease, app.graph, len(app.steps), sum(map(len, app.ledger.values())))

    async def begin(self, lease: Lease, graph: str, initial: bytes, *, fresh: bool) -> None:
        """Set graph and first State."""
        app = await self._held(lease)
        app.graph, app.initial = graph, initial
        if fresh:
            app.steps.clear()
            app.ledger.clear()

    async def load(self, lease: Lease) -> History:
        """Everything that is needed to rebuild the State."""
        app = await self._held(lease)
        return History(app.initial, list(app.steps))

    async def commit(self, lease: Lease, step: Step) -> None:
        """Add the next step and forget the ledger."""
        app = await self._held(lease)
        if step.sequence_id != len(app.steps):
            raise outdated(lease, f"it commits step {step.sequence_id}, but {len(app.steps)} are committed")
        app.steps.append(step)
        app.ledger.clear()

    async def record(
        self, lease: Lease, parent: bytes, content: bytes, occurrence: int, delta: bytes, key: bytes
    ) -> None:
        """Add a finished subtask to the ledger."""
        app = await self._held(lease)
        app.ledger.setdefault(parent, {})[content, occurrence] = delta
        app.ledger.pop(key, None)

    async def recall(self, lease: Lease, parent: bytes, content: bytes) -> list[tuple[int, bytes]]:
        """The finished subtasks of that content."""
        app = await self._held(lease)
        rows = app.ledger.get(parent, {})
        return sorted((occurrence, delta) for (of, occurrence), delta in rows.items() if of == content)

    async def close_run(self, lease: Lease) -> None:
        """Give the lease back."""
        app = self._apps[lease.app_id, lease.partition_key or ""]
        if app.epoch == lease.epoch:
            app.holder = None

    async def aclose(self) -> None:
        """Nothing to do."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def _held(self, lease: Lease) -> _App:
        await anyio.lowlevel.checkpoint()
        app = self._apps[lease.app_id, lease.partition_key or ""]
        if app.epoch != lease.epoch:
            raise outdated(lease, f"epoch {app.epoch} has begun since")
        return app


class _App:
    __slots__ = ("epoch", "graph", "holder", "initial", "ledger", "steps")

    def __init__(self) -> None:
        self.epoch = 0
        self.holder: weakref.ref[Lease] | None = None
        self.graph: str | None = None
        self.initial = b""
        self.steps: list[Step] = []
        self.ledger: dict[bytes, dict[tuple[bytes, int], bytes]] = {}


def outdated(lease: Lease, why: str) -> RunConflictError:
    """The error of a run that is no longer, or not alone, the one that writes."""
    return RunConflictError(
        f"application {lease.app_id!r} is being run by somebody else, too: this run has epoch {lease.epoch}, and {why}"
        "; nothing that this run does from now on is kept"
    )
