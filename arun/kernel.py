"""The kernel: one bounded, cancel-safe fan-out under everything that is parallel in arun.

Theory of operation::

    source  --yield-->  slot (waits while limit are in flight)  -->  pending
    worker  --takes from pending, runs the subtask in a Context of its own-->  outcome  -->  ready
    reducer --takes from ready, which frees the slot-->

* In flight = yielded and not yet taken by the reducer. It never exceeds ``limit``, so memory is O(limit) for any
  number of subtasks and back-pressure lands on the source's ``yield``.
* ``handle = yield subtask`` has put the subtask in the queue of a worker before the source resumes, and a handle's
  outcome is set before it is queued for the reducer; so awaiting a handle in the source can't deadlock, also with
  ``limit=1``.
* Workers are started on demand and reused. A second one is needed only once a subtask has suspended: until then the
  worker at hand gets through the queue without a task switch. ``_runnable`` counts the workers that will look at the
  queue without anybody's help; when it is 0 and something is pending, one is woken or started.
* Errors travel in-band as outcomes. Only the consumer raises them, after the rest has been cancelled and cleaned up.
* The work side (source and workers) has a cancel scope of its own: a reducer that returns early cancels it, so does
  the first failure under ``on_error="fail"``, and the deadline; the reducer is then told, not cancelled.

No frame of this module yields; the only task groups are in :func:`arun.fanout.run_fan_out` and ``Kernel.work``.
"""

from __future__ import annotations

import inspect
import math
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from threading import get_ident
from typing import Any, Generic, NamedTuple, TypeVar

import anyio
import anyio.lowlevel
from anyio.abc import TaskGroup

from arun.errors import MisuseError, SubtaskFailed, SubtaskSkipped
from arun.guards import Checks, Owner, Yields, begin_run, close_unused, end_run, shown, spelling
from arun.handles import Handle, current_handle
from arun.hosting import BUDGET, GRACE, as_async_iterator, close, in_context, let_go, refuse
from arun.logs import get_logger
from arun.outcomes import Failed, Ok, Outcome, Skipped
from arun.policies import Policy

__all__ = ("FanOutStatistics", "Kernel")

T = TypeVar("T")
log = get_logger("arun.fanout")


class FanOutStatistics(NamedTuple):
    """What a fan-out is doing now and has done so far."""

    #: subtasks yielded by the source
    submitted: int
    #: subtasks yielded whose results have not been taken by the reducer
    in_flight: int
    #: of those, waiting for a worker
    pending: int
    #: of those, ended
    ready: int
    #: subtasks that ended with a result, over all
    succeeded: int
    #: subtasks that ended with an error, over all
    failed: int
    #: workers started
    workers: int


class Kernel(Generic[T]):
    """State and work side of one fan-out; see the module's theory of operation."""

    __slots__ = (
        "_admit",
        "_checks",
        "_consumer",
        "_context",
        "_failures",
        "_group",
        "_idle",
        "_in_flight",
        "_next",
        "_parent",
        "_pending",
        "_reorder",
        "_run",
        "_runnable",
        "_scope",
        "_slot",
        "_source",
        "_source_ended",
        "_submitted",
        "_succeeded",
        "_tell_source_ended",
        "_thread",
        "_token",
        "_workers",
        "ended",
        "failed",
        "name",
        "policy",
        "ready",
    )

    def __init__(
        self,
        source: Callable[[], Any],
        run: Callable[[Handle[T]], Coroutine[Any, Any, T]],
        policy: Policy,
        admit: Callable[[Any], object],
        name: str,
        checks: Checks | None,
        source_ended: Callable[[Owner], None] | None,
    ) -> None:
        self.policy = policy
        self.name = name
        #: ended subtasks that the reducer may take
        self.ready: deque[Handle[T]] = deque()
        #: whether source and workers have ended, clean-up included
        self.ended = False
        self.failed = 0
        self._source = source
        self._run = run
        self._admit = admit
        self._checks = checks
        self._tell_source_ended = source_ended
        self._thread: int | None = None
        self._token: object = None
        self._scope = anyio.CancelScope()
        self._pending: deque[Handle[T]] = deque()
        self._reorder: dict[int, Handle[T]] | None = {} if policy.order == "submitted" else None
        self._next = 0
        self._failures: list[Exception] = []
        self._in_flight = self._submitted = self._succeeded = self._workers = self._runnable = 0
        self._source_ended = False
        self._idle: list[anyio.Event] = []
        self._slot: anyio.Event | None = None
        self._consumer: anyio.Event | None = None
        self._group: TaskGroup | None = None
        #: the caller's contextvars, of which every subtask gets a copy
        self._context: Context = copy_context()
        self._parent = current_handle.get()

    # -- consumer side ---------------------------------------------------------------------------

    def take(self) -> Handle[T]:
        """The next ended subtask; its slot is free from now on."""
        if get_ident() != self._thread:
            self._refuse_elsewhere()
        handle = self.ready.popleft()
        self._in_flight -= 1
        if self._slot is not None:
            self._slot.set()
            self._slot = None
        return handle

    async def wait_ready(self) -> None:
        """Wait until a result is ready or the work has ended.

        :raises MisuseError: if another task waits for the same results.
        """
        if self._consumer is not None:
            raise MisuseError(
                "two tasks read the same results, and each would miss what the other gets; read them in one task, "
                "or combine several reducers over one reading"
            )
        if self._token is not None and anyio.lowlevel.current_token() != self._token:
            self._refuse_elsewhere()
        self._consumer = anyio.Event()
        try:
            await self._consumer.wait()
        finally:
            self._consumer = None

    def _refuse_elsewhere(self) -> None:
        raise MisuseError(
            f"the results of {self.name} are read on another event loop or thread than the one that {self.name} was "
            "started on; read them there, and pass on what you need"
        )

    def raise_failures(self, *, first: bool = False) -> None:
        """Raise what failed, if anything did: one error as itself, several as a group.

        :param first: of several raise the first one, with a note that tells of the others.
        """
        failures, self._failures = self._failures, []
        if first and len(failures) > 1:
            others = len(failures) - 1
            failures[0].add_note(f"{others} more failed before they could be cancelled, such as {failures[1]!r:.200}")
            raise failures[0]
        if len(failures) == 1:
            raise failures[0]
        if failures:
            raise ExceptionGroup(f"{len(failures)} subtasks failed", failures)

    def misuse(self) -> MisuseError | None:
        """The first mistake among what failed, which is told even where nobody reads failures any more."""
        return next((error for error in self._failures if isinstance(error, MisuseError)), None)

    def log_failures(self) -> None:
        """Log what failed and was raised to nobody."""
        for error in self._failures:
            log.warning("fan_out.failed_unread", error=repr(error))
        self._failures = []

    def cancel(self) -> None:
        """Cancel what still runs on the work side."""
        self._scope.cancel()

    def statistics(self) -> FanOutStatistics:
        return FanOutStatistics(
            self._submitted,
            self._in_flight,
            len(self._pending),
            len(self.ready) + len(self._reorder or ()),
            self._succeeded,
            self.failed,
            self._workers,
        )

    # -- work side -----------------------------------------------------------------------------------

    async def work_alone(self) -> None:
        """As :meth:`work`, for a fan-out that may be part of no run of an application."""
        if self._checks is None:
            return await self.work()
        seat = begin_run(self._checks)
        try:
            return await self.work()
        finally:
            end_run(seat)

    async def work(self) -> None:
        """Host the source and run the workers until both have ended."""
        self._thread, self._token = get_ident(), anyio.lowlevel.current_token()
        if self.policy.deadline is not None:
            self._scope.deadline = anyio.current_time() + self.policy.deadline
        try:
            with self._scope:
                async with anyio.create_task_group() as self._group:
                    if self._checks is None:
                        await self._host_source(None)
                    else:
                        await self._host_owned_source(self._checks)
                    self._source_ended = True
                    while self._idle:
                        self._idle.pop().set()
        finally:
            while self._pending:
                handle = self._pending.popleft()
                if inspect.iscoroutine(handle.spec):
                    handle.spec.close()
                self._skip(handle)
            if self._past_deadline():
                log.info("fan_out.deadline_passed", seconds=self.policy.deadline, **self.statistics()._asdict())
                if self._reorder:  # what the cancelled ones held back, in its order
                    self.ready.extend(handle for _, handle in sorted(self._reorder.items()))
                    self._reorder.clear()
            self.ended = True
            self._wake_consumer()

    async def _host_owned_source(self, checks: Checks) -> None:
        owner, context = Owner(_Called(f"the source of {self.name!r}"), checks), copy_context()
        failure: BaseException | None = None
        try:
            await in_context(context, self._host_source(owner), None, owner)
            if owner.unyielded and not self._failures and self._tell_source_ended is not None:
                self._tell_source_ended(owner)
        except Exception as exc:  # noqa: BLE001 - a warning that is an error; travels in-band to the consumer
            self._fail(exc)
        except BaseException as exc:
            failure = exc
            raise
        finally:
            if owner.generators is not None:
                # Closed before its end, it had no say in what it left open.
                early = failure or (self._failures[0] if self._failures else None)
                try:
                    await let_go(owner, context, early)  # noqa: ASYNC102 - shields itself
                except Exception as exc:  # noqa: BLE001 - travels in-band to the consumer
                    self._fail(exc)

    async def _host_source(self, owner: Owner | None) -> None:
        budget = BUDGET
        with anyio.CancelScope() as scope:
            try:
                produced = self._source()
                source = await as_async_iterator(produced)
                if source is None:
                    raise _no_source(self.name, produced)
            except Exception as exc:  # noqa: BLE001 - travels in-band to the consumer
                self._fail(exc)
                return
            send = getattr(source, "asend", None)
            yields = Yields.of(source, owner.checks) if owner is not None else None
            handle: Handle[T] | None = None
            try:
                while True:  # noqa: ASYNC913 - a real checkpoint every BUDGET items
                    if self._in_flight >= self.policy.limit:
                        await self._wait_slot()
                        budget = BUDGET
                    spec = await (send(handle) if send is not None else source.__anext__())
                    misuse = yields.look() if yields is not None else None
                    while True:
                        if misuse is not None:
                            close_unused(spec)
                            spec = await refuse(source, misuse, yields)
                            misuse = yields.look() if yields is not None else None
                            continue
                        try:
                            self._admit(spec)
                            break
                        except MisuseError as exc:  # the source may go on, if it catches this
                            misuse = exc
                    handle = self._submit(spec)
                    budget -= 1
                    if not budget:
                        budget = BUDGET
                        await anyio.lowlevel.checkpoint()
            except StopAsyncIteration:
                pass
            except Exception as exc:  # noqa: BLE001 - travels in-band to the consumer
                self._fail(exc)
            finally:
                # The source's own scopes, if it is suspended in any, nest inside this one.
                scope.shield = True
                scope.deadline = anyio.current_time() + GRACE
                try:
                    await close(source)  # noqa: ASYNC102 - the scope around it is shielded now
                except Exception as exc:  # noqa: BLE001 - travels in-band to the consumer
                    self._fail(exc)

    async def _wait_slot(self) -> None:
        while self._in_flight >= self.policy.limit:
            self._slot = anyio.Event()
            await self._slot.wait()

    def _submit(self, spec: Any) -> Handle[T]:
        handle: Handle[T] = Handle(spec, self._submitted, self._parent, self._token)
        self._submitted += 1
        self._in_flight += 1
        self._pending.append(handle)
        if not self._runnable:
            self._wake_worker()
        return handle

    def _wake_worker(self) -> None:
        if self._idle:
            self._runnable += 1
            self._idle.pop().set()
        elif self._workers < self.policy.limit:
            self._runnable += 1
            self._workers += 1
            assert self._group is not None
            self._group.start_soon(self._work_through, name="arun worker")

    def one_less(self) -> None:
        """A subtask has suspended, so its worker does not look at the queue meanwhile."""
        self._runnable -= 1
        if self._pending and not self._runnable:
            self._wake_worker()

    async def _work_through(self) -> None:
        worker, budget = _Worker(self), BUDGET
        while True:
            while self._pending:
                await self._run_one(self._pending.popleft(), worker)
                budget -= 1
                if not budget:
                    budget = BUDGET
                    await anyio.lowlevel.checkpoint()
            self._runnable -= 1
            if self._source_ended:
                return
            wake = anyio.Event()
            self._idle.append(wake)
            await wake.wait()
            if self._source_ended and not self._pending:
                return

    async def _run_one(self, handle: Handle[T], worker: _Worker) -> None:
        context = self._context.copy()
        context.run(current_handle.set, handle)
        outcome: Outcome[T]
        owner = Owner(handle, self._checks) if self._checks is not None else None
        try:
            outcome = Ok(await in_context(context, self._run(handle), worker.suspend, owner))
        except anyio.get_cancelled_exc_class() as exc:  # noqa: ASYNC103 - re-raised if it is a real cancellation
            if anyio.current_effective_deadline() == -math.inf:
                if owner is not None and owner.generators is not None:
                    await let_go(owner, context, exc)  # noqa: ASYNC102 - shields itself
                self._skip(handle)
                raise
            error = RuntimeError(f"{handle.label()} raised {type(exc).__name__} though nobody had cancelled it")
            outcome = Failed(error)
        except StopAsyncIteration as exc:
            error = RuntimeError(f"{handle.label()} raised StopAsyncIteration, which would end its results early")
            error.__cause__ = exc
            outcome = Failed(error)
        except Exception as exc:  # noqa: BLE001 - travels in-band to the consumer
            outcome = Failed(exc)
        finally:
            if worker.suspended:
                worker.suspended = False
                self._runnable += 1
        if owner is not None and owner.generators is not None:
            try:
                await let_go(owner, context, outcome.error if isinstance(outcome, Failed) else None)
            except Exception as exc:  # noqa: BLE001 - travels in-band to the consumer
                outcome = Failed(exc)
        self._finish(handle, outcome)

    def _finish(self, handle: Handle[T], outcome: Ok[T] | Failed) -> None:
        handle.end(outcome)
        if isinstance(outcome, Ok):
            self._succeeded += 1
        else:
            self.failed += 1
            on_error = handle.on_error or self.policy.on_error
            if on_error == "fail" or isinstance(outcome.error, MisuseError):
                outcome.error.add_note(f"in {handle.label()}")
                self._fail(outcome.error)
                self._in_flight -= 1
                return
            log.info("subtask.failed", subtask=handle.label(), error=repr(outcome.error), on_error=on_error)
        if self._reorder is None:
            self.ready.append(handle)
        else:
            self._reorder[handle.ordinal] = handle
            while (following := self._reorder.pop(self._next, None)) is not None:
                self._next += 1
                self.ready.append(following)
        self._wake_consumer()

    def _skip(self, handle: Handle[T]) -> None:
        """A subtask was cancelled, or never ran."""
        if not self._past_deadline():
            handle.end(Skipped("cancelled"))
            return
        handle.end(Skipped(f"the deadline of {self.policy.deadline:g} s had passed"))
        if self.policy.on_error == "collect":
            if self._reorder is None:
                self.ready.append(handle)
            else:
                self._reorder[handle.ordinal] = handle

    def _past_deadline(self) -> bool:
        return self.policy.deadline is not None and anyio.current_time() >= self._scope.deadline

    def _fail(self, error: Exception) -> None:
        if not self._is_echo(error):
            self._failures.append(error)
        self._scope.cancel()

    def _is_echo(self, error: Exception) -> bool:
        # Of a failure that is known already, told to whoever awaited that subtask's handle.
        cause: BaseException | None = error
        while isinstance(cause, SubtaskFailed):
            cause = cause.__cause__
            if any(cause is known for known in self._failures):
                return True
        return isinstance(cause, SubtaskSkipped) and self._scope.cancel_called

    def wake(self) -> None:
        """End the consumer's wait, though no subtask has ended."""
        self._wake_consumer()

    def _wake_consumer(self) -> None:
        if self._consumer is not None:
            self._consumer.set()


class _Worker:
    """Whether the subtask that one worker runs has suspended."""

    __slots__ = ("_kernel", "suspended")

    def __init__(self, kernel: Kernel[Any]) -> None:
        self._kernel = kernel
        self.suspended = False

    def suspend(self) -> None:
        """It has, so the queue needs another worker."""
        self.suspended = True
        self._kernel.one_less()


class _Called:
    """What an owner is called after that has nothing but a name."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def label(self) -> str:
        return self._name


def _no_source(name: str, produced: Any) -> MisuseError:
    hint = spelling(produced) or "give it an (async) iterable or generator"
    message = f"the source of {name!r} is {shown(produced)}, which can't be iterated over; {hint}"
    close_unused(produced)
    return MisuseError(message)
