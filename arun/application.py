"""Application: a graph, an identity, a State and the wiring that its actions need. Build once, run thousands at a time.

>>> app = (
...     ApplicationBuilder()
...     .with_actions(ask, judge)
...     .with_transitions(("ask", "judge"), ("judge", "ask", when(good=False)))
...     .with_entrypoint("ask")
...     .with_resources(engine=pool)
...     .build()
... )
>>> action, result, state = await app.session(prompt="...").arun(halt_after=["judge"])

``arun`` is a plain coroutine whose task groups live in the caller's task, so ``asyncio.timeout``, ``anyio.fail_after``
and a failing sibling in the caller's task group reach everything that it has started.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Coroutine, Iterable, Mapping
from contextvars import Context, copy_context
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import anyio
import anyio.lowlevel
import msgspec

from arun.actions import Action, take_step
from arun.burr import without_burrs_names
from arun.context import ApplicationContext, Run, Sink
from arun.errors import ApplicationBusyError, MisuseError
from arun.events import RunCancelled, RunFailed, RunFinished, RunStarted
from arun.graph import Graph
from arun.guards import (
    Checks,
    Owner,
    Seat,
    begin_run,
    checks_here,
    end_run,
    shown,
)
from arun.hooks import Hooks
from arun.hosting import BUDGET, GRACE, in_context, let_go
from arun.journal import OnFinished, Store
from arun.resume import Resumable, Resumed
from arun.runtime import Background
from arun.state import State
from arun.stream import Deliver, RunStream

if TYPE_CHECKING:
    from arun.executors import Executor

__all__ = ("Application", "RunResult", "Wiring")

_UNKNOWN: Final = msgspec.UNSET


class RunResult(NamedTuple):
    """How a run ended; unpacks as Burr's ``action, result, state``."""

    #: the action that the run stopped at: the last one run, or the one it halted before
    action: Action | None
    #: what that action returned besides its State; None where it halted before it
    result: Any
    #: the State at the end
    state: State


class Wiring(msgspec.Struct, frozen=True):
    """What all sessions of an application share."""

    graph: Graph
    entrypoint: str
    resources: Mapping[str, Any]
    needed_keys: Mapping[str, str]
    initial: State
    partition_key: str | None
    checks: Checks | None
    store: Store | None = None
    on_finished: OnFinished = "raise"
    graph_hash: str = ""
    executor: Executor | None = None
    hooks: Hooks | None = None


@without_burrs_names
class Application:
    """One identity with one State, running one step after the other. Made by :class:`arun.ApplicationBuilder`.

    It costs microseconds; ``session()`` gives a fresh one that shares graph and wiring.
    """

    def __init__(self, wiring: Wiring, app_id: str, state: State, sequence_id: int = 0) -> None:
        if not isinstance(app_id, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # users' code
            raise MisuseError(
                f"the app_id is {shown(app_id)}; it takes a text; fields of the State go by name: session(prompt=...)"
            )
        self._wiring = wiring
        self.uid = app_id
        self.partition_key = wiring.partition_key
        self._state = state
        self._sequence_id = sequence_id
        self._position: str | None = None
        self._next: Any = wiring.entrypoint
        self._busy = False
        self._seat: Seat | None = None
        #: the contextvars of the caller of the run, of which every step gets a copy
        self._context = Context()
        #: the background work of the run that is going on; None where that runs in its caller's task
        self._owner: Background[Any] | None = None
        self._resumable: Resumable | None = None
        if wiring.store is not None:
            self._resumable = Resumable(wiring.store, app_id, wiring.partition_key, wiring.graph_hash, state)

    def __repr__(self) -> str:
        return f"<Application {self.uid} at step {self._sequence_id}: {self._wiring.graph!r}>"

    @property
    def graph(self) -> Graph:
        """The graph, shared by all sessions."""
        return self._wiring.graph

    @property
    def state(self) -> State:
        """The last committed State."""
        return self._state

    @property
    def sequence_id(self) -> int:
        """How many steps have been committed."""
        return self._sequence_id

    def session(self, app_id: str | None = None, /, **state: Any) -> Application:
        """A fresh Application on the same graph and wiring.

        :param app_id: its identifier; by default a new one.
        :param state: fields on top of the builder's State.
        """
        initial = self._wiring.initial.update(**state) if state else self._wiring.initial
        return Application(self._wiring, app_id or uuid.uuid4().hex, initial.scoped(None))

    def update_state(self, new_state: State) -> None:
        """Replace the State between steps."""
        self._refuse_busy()
        self._state = new_state.scoped(None)
        if self._resumable is not None:
            self._resumable.replaced(self._state)
        if self._position is not None:
            self._next = _UNKNOWN

    def reset_to_entrypoint(self) -> None:
        """Go on at the entrypoint; the State stays."""
        self._refuse_busy()
        self._position, self._next = None, self._wiring.entrypoint

    async def next_action(self) -> Action | None:
        """The action that the next step runs; None at the end."""
        if self._next is _UNKNOWN:
            assert self._position is not None
            following = self._wiring.graph.following(self._position, self._state)
            self._next = following if following is None or isinstance(following, str) else await following
        return self.graph.actions[self._next] if self._next is not None else None

    def get_next_action(self) -> Action | None:
        """As :meth:`next_action`, for graphs whose conditions are plain functions.

        :raises MisuseError: if a condition awaits something.
        """
        deciding: Coroutine[Any, Any, Action | None] = self.next_action()
        try:
            deciding.send(None)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]  # the coroutine's result
        deciding.close()
        raise MisuseError("a condition of this graph awaits something; use `await app.next_action()`")

    def has_next_action(self) -> bool:
        """Whether a step is left; see :meth:`get_next_action`."""
        return self.get_next_action() is not None

    async def load(self) -> None:
        """Take over what the store knows, without running anything; :meth:`arun` does so by itself."""
        await self._acquire()
        try:
            if self._resumable is not None and (resumed := await self._resumable.open(self._sequence_id)) is not None:
                self._take_over(resumed)
        finally:
            with anyio.move_on_after(GRACE, shield=True):
                await self._release()

    # -- running -------------------------------------------------------------------------------------------

    async def arun(
        self,
        *,
        halt_before: str | Iterable[str] | None = (),
        halt_after: str | Iterable[str] | None = (),
        inputs: Mapping[str, Any] | None = None,
    ) -> RunResult:
        """Run until a halt condition holds or no transition leads on. At least one step is run.

        :param halt_before: stop when one of these actions would be next (names or ``"@tag:x"``); wins over
            ``halt_after``.
        :param halt_after: stop when one of these has run.
        :param inputs: runtime inputs, given to every step that declares them.
        :raises ApplicationBusyError: if this Application is running already.
        :raises Exception: what an action raised; the State is then that of the last committed step.
        """
        return await self._run(Run(hooks=self._wiring.hooks), halt_before, halt_after, inputs or {})

    async def astep(self, inputs: Mapping[str, Any] | None = None) -> tuple[Action, Any, State] | None:
        """Run one step; None where there is none left. To hooks it is a run of its own.

        :param inputs: runtime inputs, given to the step if it declares them.
        """
        self._check_inputs(inputs or {})
        run = Run(hooks=self._wiring.hooks)
        try:
            stepped = await self._step_alone(run, inputs or {}, begins=True)
            await self._tell_finished(run, stepped[0] if stepped is not None else None)
        except (Exception, anyio.get_cancelled_exc_class()) as exc:
            await self._tell_broken_off(run, exc)  # noqa: ASYNC102 - shields itself
            raise
        return stepped

    async def aiterate(
        self,
        *,
        halt_before: str | Iterable[str] | None = (),
        halt_after: str | Iterable[str] | None = (),
        inputs: Mapping[str, Any] | None = None,
    ) -> AsyncGenerator[tuple[Action, Any, State], None]:
        """As :meth:`arun`, yielding ``(action, result, state)`` after each step. Nothing runs between two steps.

        To hooks all steps are one run; closing the iterator before the end cancels it.
        """
        before = self.graph.select(halt_before, what="halt_before")
        after = self.graph.select(halt_after, what="halt_after")
        self._check_inputs(inputs or {})
        run = Run(hooks=self._wiring.hooks)
        last: Action | None = None
        try:
            while stepped := await self._step_alone(run, inputs or {}, begins=last is None):
                last = stepped[0]
                yield stepped
                if await self._halts(before) or last.display_name in after:
                    break
            await self._tell_finished(run, last)
        except (Exception, GeneratorExit, anyio.get_cancelled_exc_class()) as exc:
            await self._tell_broken_off(run, exc)  # noqa: ASYNC102 - shields itself
            raise

    def astream(
        self,
        *,
        halt_before: str | Iterable[str] | None = (),
        halt_after: str | Iterable[str] | None = (),
        inputs: Mapping[str, Any] | None = None,
        deliver: Deliver = "every",
    ) -> RunStream[RunResult]:
        """As :meth:`arun`, as an async iterator of Events with ``.result`` afterwards.

        The run starts with the first event asked for and is owned by the Runtime, so the stream is safe in anybody's
        generator. Leaving it (``aclose()``, ``async with``, cancellation, garbage collection) cancels the run; the next
        run of this Application waits for its clean-up.

        :param deliver: "every" event; "latest": while the consumer is slow, Partials of one path are merged and Items
            of one path are joined; a number: as "latest", and delivered together, so many seconds apart,
            or sooner where more than a thousand wait.
        """
        for names, what in ((halt_before, "halt_before"), (halt_after, "halt_after")):
            self.graph.select(names, what=what)

        owner: list[Background[Any]] = []

        async def run(sink: Sink) -> RunResult:
            return await self._run(Run(sink, self._wiring.hooks), halt_before, halt_after, inputs or {}, owner[0])

        return RunStream(run, deliver, owner.append)

    # -- private -----------------------------------------------------------------------------------------------

    async def _run(
        self,
        run: Run,
        halt_before: str | Iterable[str] | None,
        halt_after: str | Iterable[str] | None,
        inputs: Mapping[str, Any],
        owner: Background[Any] | None = None,
    ) -> RunResult:
        before = self.graph.select(halt_before, what="halt_before")
        after = self.graph.select(halt_after, what="halt_after")
        self._check_inputs(inputs)
        await self._acquire(owner)
        try:
            if self._resumable is not None:
                await self._resume(self._resumable, again=True)
            await run.emit(RunStarted, app_id=self.uid)
            result = await self._run_until(run, before, after, inputs)
            await self._tell_finished(run, result.action)
        except (Exception, anyio.get_cancelled_exc_class()) as exc:
            await self._tell_broken_off(run, exc)  # noqa: ASYNC102 - shields itself
            raise
        finally:
            with anyio.move_on_after(GRACE, shield=True):
                await self._release()
        return result

    async def _step_alone(
        self, run: Run, inputs: Mapping[str, Any], *, begins: bool
    ) -> tuple[Action, Any, State] | None:
        await self._acquire()
        try:
            if self._resumable is not None:
                await self._resume(self._resumable, again=False)
            if begins:
                await run.emit(RunStarted, app_id=self.uid)
            return await self._step(run, inputs)
        finally:
            with anyio.move_on_after(GRACE, shield=True):
                await self._release()

    async def _tell_finished(self, run: Run, last: Action | None) -> None:
        if run.listening:
            name = last.display_name if last is not None else ""
            await run.emit(RunFinished, action=name, state=self._state.get_all())

    @staticmethod
    async def _tell_broken_off(run: Run, why: BaseException) -> None:
        if isinstance(why, Exception):
            await run.emit(RunFailed, error=f"{type(why).__qualname__}: {why}")
        else:
            with anyio.CancelScope(shield=True):
                await run.emit(RunCancelled)

    async def _run_until(
        self, run: Run, before: frozenset[str], after: frozenset[str], inputs: Mapping[str, Any]
    ) -> RunResult:
        last: Action | None = None
        result: Any = None
        left = BUDGET
        while True:
            left -= 1
            if not left:  # actions that never await must not starve the loop
                left = BUDGET
                await anyio.lowlevel.checkpoint()
            stepped = await self._step(run, inputs)
            if stepped is None:
                return RunResult(last, result, self._state)
            last, result, _ = stepped
            if before and await self._halts(before):
                return RunResult(await self.next_action(), None, self._state)
            if last.display_name in after:
                return RunResult(last, result, self._state)

    async def _halts(self, before: frozenset[str]) -> bool:
        if not before:
            return False
        following = await self.next_action()
        return following is not None and following.display_name in before

    async def _step(self, run: Run, inputs: Mapping[str, Any]) -> tuple[Action, Any, State] | None:
        if self._next is _UNKNOWN:
            assert self._position is not None
            following = self._wiring.graph.following(self._position, self._state)
            self._next = following if following is None or isinstance(following, str) else await following
        name = self._next
        if name is None:
            return None
        wiring = self._wiring
        action, checks = wiring.graph.actions[name], wiring.checks
        if self._position is None:
            self._check_keys()
        context = ApplicationContext(
            app_id=self.uid,
            partition_key=self.partition_key,
            sequence_id=self._sequence_id,
            action_name=name,
            path=(),
            inputs=inputs,
            resources=wiring.resources,
            run=run,
            checks=checks,
            executor=wiring.executor,
        )
        commit = None
        if self._resumable is not None:
            context.ledger = self._resumable.ledger(name)
            commit = partial(self._resumable.commit, self._sequence_id, name, self._state)
        owner = Owner(context, checks) if checks is not None else None
        own = self._context.copy()
        failure: BaseException | None = None
        try:
            result, changes = await in_context(own, take_step(action, self._state, context, commit), None, owner)
        except BaseException as exc:
            failure = exc
            if isinstance(exc, Exception):
                exc.add_note(f"in action {name!r} of application {self.uid!r}, step {self._sequence_id}")
            raise
        finally:
            if owner is not None and owner.generators is not None:
                await let_go(owner, own, failure)  # noqa: ASYNC102 - shields itself
        self._state = self._state.committed(changes, name)
        self._position, self._next = name, _UNKNOWN
        self._sequence_id += 1
        return action, result, self._state

    async def _resume(self, resumable: Resumable, *, again: bool) -> None:
        """Lease the application and take over what the store knows.

        :param again: whether a run that has ended is run again by whoever calls, even if it ended in this very object.
        """
        resumed = await resumable.open(self._sequence_id)
        if resumed is not None:
            self._take_over(resumed)
        if self._sequence_id and (again or resumed is not None) and await self.next_action() is None:
            if self._wiring.on_finished == "raise":
                raise resumable.finished(self._state, self._position, self._sequence_id)
            self._state = await resumable.restart()
            self._position, self._next, self._sequence_id = None, self._wiring.entrypoint, 0

    def _take_over(self, resumed: Resumed) -> None:
        self._state, self._position, self._sequence_id = resumed
        self._next = _UNKNOWN if resumed.position is not None else self._wiring.entrypoint

    async def _release(self) -> None:
        try:
            if self._resumable is not None:
                await self._resumable.close()
        finally:
            self._busy = False
            if self._seat is not None:
                end_run(self._seat)
                self._seat = None

    async def _acquire(self, owner: Background[Any] | None = None) -> None:
        while self._busy and self._owner is not None and self._owner.cancelling:
            await self._owner.ended()
        self._refuse_busy()
        self._busy, self._owner = True, owner
        self._context = copy_context()
        self._context.run(checks_here.set, self._wiring.checks)
        if self._wiring.checks is not None:
            self._seat = begin_run(self._wiring.checks)

    def _refuse_busy(self) -> None:
        if self._busy:
            streamed = "; what runs is an astream(), which `async with` or aclose() ends where its loop is left early"
            raise ApplicationBusyError(
                f"application {self.uid!r} is running already; one Application runs one step at a time: "
                f"use app.session() for a fresh one per run{streamed if self._owner is not None else ''}"
            )

    def _check_keys(self) -> None:
        for key, reader in self._wiring.needed_keys.items():
            if key not in self._state:
                raise MisuseError(
                    f"action {reader!r} reads {key!r}, which no action writes and the State does not have "
                    f"(it has: {', '.join(self._state) or 'nothing'}); set it with with_state({key}=...) or "
                    f"session({key}=...)"
                )

    def _check_inputs(self, inputs: Mapping[str, Any]) -> None:
        declared: set[str] = set()
        for action in self.graph.actions.values():
            if action.takes_any_input:
                return
            required, optional = action.input_names
            declared |= required | optional
        for name in inputs:
            if name not in declared:
                raise MisuseError(
                    f"inputs has {name!r}, but no action takes it; the actions take: "
                    f"{', '.join(sorted(declared)) or 'no inputs'}"
                )
