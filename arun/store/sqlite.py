"""SQLiteStore: the Store protocol in one file, written by one thread.

Requests queue up for the thread, which takes all that are waiting when it wakes into one transaction (group commit), so
a fan-out of a hundred subtasks in flight pays for one commit, not for a hundred.

The file is in WAL mode. With ``synchronous="normal"`` a commit has reached the operating system when it returns:
killing the process, with -9 too, loses nothing. A power cut or a crash of the machine may lose the last commits,
never the file: the run then resumes from an earlier point. ``synchronous="full"`` waits for the disk at every commit.
"""

from __future__ import annotations

import os
import queue
import sqlite3
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Generic, Literal, Self, TypeVar

import anyio

from arun.errors import ArunError, RunConflictError, StoreError
from arun.journal import History, Lease, Opened, Step
from arun.runtime import post_to_this_loop
from arun.store.memory import outdated

__all__ = ("SQLiteStore",)

T = TypeVar("T")

_LAYOUT: Final = 1  # PRAGMA user_version
_APPLICATION: Final = 0x6172756E  # PRAGMA application_id: "arun"
_MOST: Final = 1000  # requests in one transaction

_SCHEMA: Final = """
CREATE TABLE apps (
    id INTEGER PRIMARY KEY,
    app_id TEXT NOT NULL,
    partition_key TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    holder TEXT,
    graph TEXT,
    initial BLOB,
    sequence_id INTEGER NOT NULL DEFAULT 0,
    UNIQUE (app_id, partition_key)
);
CREATE TABLE steps (
    app INTEGER NOT NULL,
    sequence_id INTEGER NOT NULL,
    action TEXT NOT NULL,
    base BLOB,
    delta BLOB NOT NULL,
    time REAL NOT NULL,
    UNIQUE (app, sequence_id)
);
CREATE TABLE ledger (
    app INTEGER NOT NULL,
    parent BLOB NOT NULL,
    content BLOB NOT NULL,
    occurrence INTEGER NOT NULL,
    delta BLOB NOT NULL,
    UNIQUE (app, parent, content, occurrence)
);
"""

#: leases of this process that somebody still holds, by token
_leases: Final[weakref.WeakValueDictionary[str, Lease]] = weakref.WeakValueDictionary()


class SQLiteStore:
    """Keeps runs in a SQLite file, on a local disk. Many processes may use one file.

    Close it with ``async with`` or ``aclose()``; one that is dropped closes itself.

    :param path: the file; made if it isn't there, but not its folder.
    :param synchronous: "normal" survives kill -9; "full" a power cut, too, and waits for the disk at every commit.
    :param busy_timeout: seconds to wait while another process writes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        synchronous: Literal["normal", "full"] = "normal",
        busy_timeout: float = 30.0,
    ) -> None:
        self.path = Path(path)
        if synchronous not in {"normal", "full"}:
            raise ValueError(f"SQLiteStore(synchronous={synchronous!r}): takes 'normal' or 'full'")
        if str(path) == ":memory:":
            raise ValueError("SQLiteStore(':memory:'): it keeps runs in a file; MemoryStore() keeps them in memory")
        self._options = (synchronous, busy_timeout)
        self._jobs: queue.SimpleQueue[_Job[Any] | None] | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        self._pid = os.getpid()

    def __repr__(self) -> str:
        return f"<SQLiteStore {self.path}{' closed' if self._closed else ''}>"

    async def open_run(self, app_id: str, partition_key: str | None) -> Opened:
        """Lease the application."""

        def work(db: sqlite3.Connection) -> Opened:
            found = db.execute(
                "SELECT id, epoch, holder, graph, sequence_id FROM apps WHERE app_id = ? AND partition_key = ?",
                (app_id, partition_key or ""),
            ).fetchone()
            if found is None:
                epoch, graph, sequence_id, pending = 1, None, 0, 0
                db.execute(
                    "INSERT INTO apps (app_id, partition_key, epoch, holder) VALUES (?, ?, 1, ?)",
                    (app_id, partition_key or "", holder),
                )
            else:
                app, epoch, before, graph, sequence_id = found
                if before is not None and _is_alive(before):
                    raise RunConflictError(
                        f"application {app_id!r} is being run already, by process {before.split()[1]}, in {self.path}; "
                        "wait for that run, or use another app_id"
                    )
                epoch += 1
                db.execute("UPDATE apps SET epoch = ?, holder = ? WHERE id = ?", (epoch, holder, app))
                (pending,) = db.execute("SELECT count(*) FROM ledger WHERE app = ?", (app,)).fetchone()
            lease = Lease(app_id, partition_key, epoch, token)
            _leases[token] = lease
            return Opened(lease, graph, sequence_id, pending)

        token = uuid.uuid4().hex
        holder = f"{_BOOT} {os.getpid()} {_started(os.getpid())} {token}"
        try:
            return await self._do(work)
        except anyio.get_cancelled_exc_class():
            if self._jobs is not None:  # nobody will give that lease back
                self._jobs.put(_Job(lambda db: db.execute("UPDATE apps SET holder = NULL WHERE holder = ?", (holder,))))
            raise

    async def begin(self, lease: Lease, graph: str, initial: bytes, *, fresh: bool) -> None:
        """Set graph and first State."""

        def work(db: sqlite3.Connection) -> None:
            app, _ = _held(db, lease)
            db.execute("UPDATE apps SET graph = ?, initial = ? WHERE id = ?", (graph, initial, app))
            if fresh:
                db.execute("UPDATE apps SET sequence_id = 0 WHERE id = ?", (app,))
                db.execute("DELETE FROM steps WHERE app = ?", (app,))
                db.execute("DELETE FROM ledger WHERE app = ?", (app,))

        await self._do(work)

    async def load(self, lease: Lease) -> History:
        """Everything that is needed to rebuild the State."""

        def work(db: sqlite3.Connection) -> History:
            app, _ = _held(db, lease)
            (initial,) = db.execute("SELECT initial FROM apps WHERE id = ?", (app,)).fetchone()
            rows = db.execute(
                "SELECT sequence_id, action, delta, base FROM steps WHERE app = ? ORDER BY sequence_id", (app,)
            )
            return History(initial, [Step(*row) for row in rows])

        return await self._do(work)

    async def commit(self, lease: Lease, step: Step) -> None:
        """Add the next step and forget the ledger."""

        def work(db: sqlite3.Connection) -> None:
            app, committed = _held(db, lease)
            if step.sequence_id != committed:
                raise outdated(lease, f"it commits step {step.sequence_id}, but {committed} are committed")
            db.execute("UPDATE apps SET sequence_id = ? WHERE id = ?", (step.sequence_id + 1, app))
            db.execute(
                "INSERT INTO steps (app, sequence_id, action, base, delta, time) VALUES (?, ?, ?, ?, ?, ?)",
                (app, step.sequence_id, step.action, step.base, step.delta, time.time()),
            )
            db.execute("DELETE FROM ledger WHERE app = ?", (app,))

        await self._do(work)

    async def record(
        self, lease: Lease, parent: bytes, content: bytes, occurrence: int, delta: bytes, key: bytes
    ) -> None:
        """Add a finished subtask to the ledger."""

        def work(db: sqlite3.Connection) -> None:
            app, _ = _held(db, lease)
            db.execute(
                "INSERT OR REPLACE INTO ledger VALUES (?, ?, ?, ?, ?)", (app, parent, content, occurrence, delta)
            )
            db.execute("DELETE FROM ledger WHERE app = ? AND parent = ?", (app, key))

        await self._do(work)

    async def recall(self, lease: Lease, parent: bytes, content: bytes) -> list[tuple[int, bytes]]:
        """The finished subtasks of that content."""

        def work(db: sqlite3.Connection) -> list[tuple[int, bytes]]:
            app, _ = _held(db, lease)
            return db.execute(
                "SELECT occurrence, delta FROM ledger WHERE app = ? AND parent = ? AND content = ? ORDER BY occurrence",
                (app, parent, content),
            ).fetchall()

        return await self._do(work)

    async def close_run(self, lease: Lease) -> None:
        """Give the lease back."""

        def work(db: sqlite3.Connection) -> None:
            db.execute(
                "UPDATE apps SET holder = NULL WHERE app_id = ? AND partition_key = ? AND epoch = ?",
                (lease.app_id, lease.partition_key or "", lease.epoch),
            )
            _leases.pop(lease.token, None)

        await self._do(work)

    async def aclose(self) -> None:
        """Commit what is pending and close the file; idempotent."""
        self._closed = True
        if self._jobs is not None and self._thread is not None and self._pid == os.getpid():
            ended = _Job[None](lambda _: None)
            jobs, self._jobs = self._jobs, None
            jobs.put(ended)
            jobs.put(None)
            with anyio.CancelScope(shield=True):
                await ended.ended.wait()
                await anyio.to_thread.run_sync(self._thread.join)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if getattr(self, "_jobs", None) is not None:
            self._jobs.put(None)  # type: ignore[union-attr]  # just seen

    async def _do(self, work: Callable[[sqlite3.Connection], T]) -> T:
        if self._closed:
            raise StoreError(f"the store {self.path} is closed; make a new SQLiteStore")
        if self._pid != os.getpid():
            raise StoreError(f"the store {self.path} was opened before this process was forked; make a new SQLiteStore")
        if self._jobs is None:
            self._jobs = queue.SimpleQueue()
            # It holds the queue and never the store, so that a store that is dropped can be collected and end it.
            self._thread = threading.Thread(
                target=_serve, args=(self._jobs, self.path, *self._options), name=f"arun {self.path.name}", daemon=True
            )
            self._thread.start()
        job = _Job(work)
        self._jobs.put(job)
        await job.ended.wait()
        return job.result()


class _Job(Generic[T]):
    """A request to the thread, and its answer."""

    __slots__ = ("ended", "error", "post", "value", "work")

    def __init__(self, work: Callable[[sqlite3.Connection], T]) -> None:
        self.work = work
        self.post = post_to_this_loop()
        self.ended = anyio.Event()
        self.value: T | None = None
        self.error: Exception | None = None

    def result(self) -> T:
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]  # set by the thread


def _serve(jobs: queue.SimpleQueue[_Job[Any] | None], path: Path, synchronous: str, busy_timeout: float) -> None:
    db: sqlite3.Connection | None = None

    def serve_batch(batch: list[_Job[Any]]) -> None:
        nonlocal db
        try:
            db = db or _connect(path, synchronous, busy_timeout)
            _run(db, batch)
        except sqlite3.Error as exc:
            _fail(batch, StoreError(f"the store {path} can't be used: {exc}"), exc)
        except Exception as exc:  # noqa: BLE001 - travels to whoever asked
            _fail(batch, exc, None)
        _answer(batch)

    try:
        # No job is held while this waits: a job knows its store, which could then never be collected.
        while _serve_waiting(jobs, serve_batch):
            pass
    finally:
        if db is not None:
            db.close()


def _serve_waiting(jobs: queue.SimpleQueue[_Job[Any] | None], serve: Callable[[list[_Job[Any]]], None]) -> bool:
    """Wait for a job, and serve it with all that wait behind it; False where the end is among them."""
    batch: list[_Job[Any]] = []
    job = jobs.get()
    while job is not None:
        batch.append(job)
        if len(batch) == _MOST:
            break
        try:
            job = jobs.get_nowait()
        except queue.Empty:
            break
    if batch:
        serve(batch)
    return job is not None


def _run(db: sqlite3.Connection, batch: list[_Job[Any]]) -> None:
    """One transaction for all; if SQLite fails in it, one for each, so that a job suffers for itself only."""
    try:
        db.execute("BEGIN IMMEDIATE")
        for job in batch:
            try:
                job.value = job.work(db)
            except ArunError as exc:  # raised before the job wrote anything
                job.error = exc
        db.execute("COMMIT")
    except Exception as exc:
        if db.in_transaction:
            db.execute("ROLLBACK")
        if len(batch) == 1 or not isinstance(exc, sqlite3.Error):
            raise
        for job in batch:
            job.error = None
            try:
                _run(db, [job])
            except sqlite3.Error as alone:
                _fail([job], StoreError(f"the store failed: {alone}"), alone)


def _fail(batch: list[_Job[Any]], error: Exception, cause: Exception | None) -> None:
    error.__cause__ = cause
    for job in batch:
        job.error = error


def _answer(batch: list[_Job[Any]]) -> None:
    by_loop: dict[Callable[..., object], list[_Job[Any]]] = {}
    for job in batch:
        by_loop.setdefault(job.post, []).append(job)
    for post, jobs in by_loop.items():

        def tell(jobs: list[_Job[Any]] = jobs) -> None:
            for job in jobs:
                job.ended.set()

        try:
            post(tell)
        except RuntimeError:  # that loop is closed, and nobody waits there any more
            pass


def _held(db: sqlite3.Connection, lease: Lease) -> tuple[int, int]:
    """(row of the application, steps committed), if the lease is good."""
    app, epoch, committed = db.execute(
        "SELECT id, epoch, sequence_id FROM apps WHERE app_id = ? AND partition_key = ?",
        (lease.app_id, lease.partition_key or ""),
    ).fetchone()
    if epoch != lease.epoch:
        raise outdated(lease, f"epoch {epoch} has begun since")
    return app, committed


def _connect(path: Path, synchronous: str, busy_timeout: float) -> sqlite3.Connection:
    if not path.parent.is_dir():
        raise StoreError(f"the store {path} can't be used: there is no folder {path.parent}; make it first")
    db = sqlite3.connect(path, timeout=busy_timeout, isolation_level=None)
    deadline = time.monotonic() + busy_timeout
    try:
        while True:
            try:
                _prepare(db, path)
                break
            except sqlite3.OperationalError as exc:
                # Turning to WAL mode does not wait for another process that does the same.
                if "locked" not in str(exc) or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        db.execute(f"PRAGMA synchronous = {synchronous}")
    except BaseException:
        db.close()
        raise
    return db


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise StoreError(f"{path} is on a file system without shared memory ({mode} mode); put it on a local disk")
    db.execute("BEGIN IMMEDIATE")
    (layout,) = db.execute("PRAGMA user_version").fetchone()
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if not tables and not layout:
        for statement in _SCHEMA.split(";"):
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {_LAYOUT}")
        db.execute(f"PRAGMA application_id = {_APPLICATION}")
    elif application != _APPLICATION:
        raise StoreError(f"{path} is a SQLite file, but none of arun's; choose another path")
    elif layout != _LAYOUT:
        age = "a newer" if layout > _LAYOUT else "an older"
        raise StoreError(
            f"{path} was written by {age} arun (layout {layout}, this one knows {_LAYOUT}); "
            "use that version of arun for it, or another file"
        )
    db.execute("COMMIT")


# -- who holds a lease -------------------------------------------------------------------------------------------


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "-"


def _started(pid: int) -> str:
    """When a process started, in ticks since the boot; a pid is used again, a pid and a start are not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return "-"


_BOOT: Final = _boot_id()


def _is_alive(holder: str) -> bool:
    """Whether a holder still runs, as far as can be seen from here. If it does all the same, its epoch is over."""
    boot, pid, started, token = holder.split()
    if boot != _BOOT:
        return False
    if int(pid) == os.getpid():
        return token in _leases
    return started != "-" and _started(int(pid)) == started
