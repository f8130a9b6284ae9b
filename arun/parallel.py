"""Parallel actions: subtasks yielded as they come, run bounded, reduced as they end. All on the kernel in fanout.py.

``MapStates`` runs one action over many States, ``MapActions`` many actions over one State, ``MapActionsAndStates``
their product, and ``TaskBasedParallelAction`` whatever its ``tasks`` yields. ``RunnableGraph`` makes a graph an action
like any other, so a subtask may be a whole graph.

``states``, ``actions`` and ``tasks`` may be async generators, generators, or return any (async) iterable. Nothing is
listed up front: a subtask starts when it is yielded and a slot is free, so an endless source is fine.
"""

from __future__ import annotations

import dis
import inspect
import time
from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterable, Mapping, Sequence
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, cast

import anyio.lowlevel
import msgspec

from arun.actions import Action, as_action, perform, take_step
from arun.attempts import run_attempts
from arun.collectors import Collector
from arun.context import ApplicationContext
from arun.errors import MisuseError
from arun.events import SubtaskFinished, SubtaskRetried, SubtaskStarted
from arun.fanout import run_fan_out
from arun.graph import Graph, GraphBuilder, check_entrypoint
from arun.guards import Owner, Yields, close_unused, here, shown, spelling
from arun.handles import Handle
from arun.hosted import drive_hosted
from arun.hosting import BUDGET, close, drive, run_owned
from arun.ledger import Entry
from arun.outcomes import Ok
from arun.policies import Policy
from arun.sources import corrected, iterate, maybe_await, not_a_task, note_made, refusal, warn_of_unyielded
from arun.state import State

if TYPE_CHECKING:
    from arun.executors import Executor

__all__ = (
    "MapActions",
    "MapActionsAndStates",
    "MapStates",
    "RunnableGraph",
    "SubGraphTask",
    "TaskBasedParallelAction",
)

_DEFAULT_POLICY = Policy()
_NO_INPUTS: Mapping[str, Any] = {}


class RunnableGraph(Action):
    """A graph as an action: runs from the entrypoint until one of ``halt_after`` has run, or no transition leads on.

    :param graph: the graph.
    :param entrypoint: name of its first action.
    :param halt_after: names or ``"@tag:x"`` selectors of the actions that it ends with.
    :raises MisuseError: for names that the graph does not have.
    """

    leaf = False

    def __init__(self, graph: Graph, entrypoint: str, halt_after: str | Sequence[str] = ()) -> None:
        check_entrypoint(graph, entrypoint)
        self.graph = graph
        self.entrypoint = entrypoint
        self.halt_after = graph.select(halt_after, what="halt_after")
        self.name = entrypoint
        self.reads = list(graph.unwritten_reads(entrypoint))
        self.writes = sorted({key for inner in graph.actions.values() for key in inner.writes})

    @classmethod
    def create(cls, candidate: Any) -> RunnableGraph:
        """A RunnableGraph of one action; a RunnableGraph is returned as it is."""
        if isinstance(candidate, RunnableGraph):
            return candidate
        only = as_action(candidate, where="RunnableGraph.create")
        return cls(GraphBuilder().with_actions(only).build(), only.display_name, [only.display_name])

    @property
    def inputs(self) -> tuple[Sequence[str], Sequence[str]]:
        """Those of the actions in it."""
        names = [inner.input_names for inner in self.graph.actions.values()]
        required = {name for needed, _ in names for name in needed if name not in self._bound}
        optional = {name for _, extra in names for name in extra if name not in self._bound}
        return sorted(required), sorted(optional - required)

    @property
    def takes_any_input(self) -> bool:
        """Whether one of the actions in it does."""
        return any(inner.takes_any_input for inner in self.graph.actions.values())

    @property
    def parts(self) -> Iterable[Action]:
        """The actions in it."""
        return self.graph.actions.values()

    @property
    def required_writes(self) -> frozenset[str]:
        """None: which actions run depends on the State, and each is held to its own writes."""
        return frozenset()

    async def execute(self, state: State, inputs: Mapping[str, Any], context: ApplicationContext) -> tuple[Any, State]:
        current: str | None = self.entrypoint
        committed, result, sequence_id = state, None, 0
        given = {**inputs, **self._bound}
        steps = context.ledger.siblings(self.display_name) if context.ledger is not None else None
        visits: dict[str, int] = {}
        while current is not None:
            action, entry = self.graph.actions[current], None
            step = context.child(current, self.display_name, sequence_id=sequence_id, inputs=given)
            if steps is not None:
                visit = visits[current] = visits.get(current, -1) + 1
                entry = await steps.step(action, visit, committed, step)
                step.ledger = entry.ledger if entry is not None else steps.below(action, visit)
            if entry is not None and entry.restored is not None:
                changes, entry = committed.scoped(None).patched(entry.restored), None
            else:
                result, changes = await take_step(action, committed, step)
            committed = committed.committed(changes, current)
            state = state.absorb(changes)
            sequence_id += 1
            if not sequence_id % BUDGET:  # actions that never await must not starve the loop
                await anyio.lowlevel.checkpoint()
            current = None if current in self.halt_after else await self.graph.following(current, committed)
            if entry is not None and current is not None:  # the last step is recorded as the graph's end
                entry.changes = changes
                await entry.record()
        return result, state


class SubGraphTask:
    """One subtask of a :class:`TaskBasedParallelAction`.

    :param graph: what runs: an action or a :class:`RunnableGraph`.
    :param state: the State that it runs on.
    :param inputs: its inputs, on top of the run's own.
    :param key: a name of it that no sibling has; ``application_id`` is Burr's name for it.
    :param label: what a person calls it; by default the action's name and the fields that ``state`` was given.
    :param executor: where it runs, instead of where the parallel action says; None: here.
    """

    __slots__ = ("_number", "action", "executor", "inputs", "key", "label", "state")

    def __init__(
        self,
        graph: Any,
        state: State,
        inputs: Mapping[str, Any] | None = None,
        *,
        key: str | None = None,
        label: str | None = None,
        executor: Executor | msgspec.UnsetType | None = msgspec.UNSET,
        application_id: str | None = None,
    ) -> None:
        if not isinstance(state, State):  # pyright: ignore[reportUnnecessaryIsInstance]  # users' code
            raise MisuseError(f"SubGraphTask(state=...) takes a State, not a {type(state).__name__}")
        self.action = as_action(graph, where="SubGraphTask(graph=...)")
        self.state = state
        self.inputs: Mapping[str, Any] = inputs or _NO_INPUTS
        self.key = key if key is not None else application_id
        self.label = label
        self.executor = executor
        owner = here.seat.owner
        self._number = 0 if owner is None else note_made(owner)

    def __await__(self) -> Generator[Any, Any, Any]:
        raise MisuseError(
            f"{self.describe()} was awaited, but it has not been started; yield it first, from `tasks`: "
            "`handle = yield SubGraphTask(...)`, then `await handle`"
        )

    def describe(self) -> str:
        """The label."""
        if self.label is not None:
            return self.label
        fields = {**self.action.bound, **self.inputs, **self.state.delta.written}
        shown = ", ".join(f"{name}={_short(value)}" for name, value in fields.items())
        return f"{self.action.display_name}({shown})"


class TaskBasedParallelAction(Action):
    """Runs the subtasks that ``tasks`` yields and reduces their final States as they end.

    :cvar policy: how many at once, in which order, what a failure does.
    :cvar executor: where the subtasks run; by default where the application says. None: here.
    :cvar hosted: True gives the generator of ``reduce`` a task of its own, so that it may yield inside task groups,
        timeouts and cancel scopes. Sources may not: do in the subtasks' actions what needs a scope.
    """

    policy: Policy = _DEFAULT_POLICY
    executor: Executor | msgspec.UnsetType | None = msgspec.UNSET
    leaf = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        reduce = cls.reduce
        abstract = getattr(reduce, "__isabstractmethod__", False)
        if not (abstract or inspect.iscoroutinefunction(reduce) or inspect.isasyncgenfunction(reduce)):
            raise MisuseError(
                f"{cls.__qualname__}.reduce is a plain function; it gets its States as they arrive, so write "
                "`async def reduce(self, state, states)` and `async for done in states:`; return the State, "
                "or yield partial States"
            )

    @abstractmethod
    def tasks(self, state: State, context: ApplicationContext, inputs: dict[str, Any]) -> Any:
        """The subtasks, as an (async) generator or any (async) iterable of :class:`SubGraphTask`.

        In an async generator ``handle = yield SubGraphTask(...)`` gives a started, awaitable handle.
        """

    @abstractmethod
    def reduce(self, state: State, states: AsyncIterator[Any]) -> Any:
        """Combine the subtasks' final States: an ``async def`` that returns the State, or one that yields partial
        States, of which the last is the result. Returning early cancels the subtasks that still run.
        """

    @property
    def inputs(self) -> Sequence[str] | tuple[Sequence[str], Sequence[str]]:
        """None by name; a list, for Burr's ``super().inputs + [...]``."""
        return []

    @property
    def takes_any_input(self) -> bool:
        """True: every input and bound name reaches ``tasks`` in ``inputs`` and the subtasks that declare it."""
        return True

    async def execute(self, state: State, inputs: Mapping[str, Any], context: ApplicationContext) -> tuple[Any, State]:
        given = {**inputs, **self._bound}
        if self.executor is not msgspec.UNSET:
            context = context.with_executor(self.executor)
        policy = self.policy
        collector = Collector(self.display_name, context, f"{type(self).__qualname__}.reduce")
        checks = context.checks
        taken_keys: set[str] = set()
        siblings = context.ledger.siblings(self.display_name) if context.ledger is not None else None

        def admit(task: Any) -> None:
            if not isinstance(task, SubGraphTask):
                raise MisuseError(not_a_task(self, task))
            if task._number:
                owner = here.seat.owner
                if owner is not None and owner.unyielded is not None:
                    owner.unyielded.pop(task._number, None)
            if task.key is not None:
                if task.key in taken_keys:
                    raise MisuseError(
                        f"two subtasks of {self.display_name!r} have the key {task.key!r}; keys are unique"
                    )
                taken_keys.add(task.key)

        async def run_subtask(handle: Handle[State]) -> State:
            task: SubGraphTask = handle.spec
            handle.describe = task.describe
            branch = task.key if task.key is not None else f"{task.action.display_name}[{handle.ordinal}]"
            below = context.child(task.action.display_name, self.display_name, branch, inputs=given)
            if policy.capacity is not None:
                below.capacities = (*below.capacities, policy.capacity)
            entry: Entry | None = None
            if siblings is not None:
                entry = await siblings.enter(task.action, task.state, task.inputs, below, key=task.key)
                below.ledger = entry.ledger
            if context.run.listening:
                return await _observed(task, handle, below, policy, entry)
            return await _through_ledger(task, handle, below, policy, entry)

        async def consume(states: AsyncIterator[Any]) -> None:
            reduced: Any = self.reduce(state, states)
            owner = Owner(context, checks) if checks is not None else None
            if isinstance(reduced, AsyncGenerator):
                host = drive_hosted if self.hosted else drive
                await host(cast("AsyncGenerator[Any, None]", reduced), collector.take, None, owner)
            else:
                collector.state = _reduced(self, await run_owned(copy_context(), reduced, owner))

        await run_fan_out(
            lambda: self.tasks(state, context, {**context.inputs, **given}),
            run_subtask,
            consume,
            policy,
            name=self.display_name,
            admit=admit,
            result=self._present,
            checks=checks,
            source_ended=warn_of_unyielded,
        )
        return collector.performed()

    @property
    def known_subtasks(self) -> Iterable[Action]:
        """The actions of its subtasks, as far as they are known without running it."""
        return ()

    def _present(self, handle: Handle[State]) -> Any:
        outcome = handle.outcome_now
        return outcome.value if isinstance(outcome, Ok) and self.policy.on_error != "collect" else outcome


class MapStates(TaskBasedParallelAction):
    """One action over many States."""

    @abstractmethod
    def action(self, state: State, inputs: dict[str, Any]) -> Any:
        """The action, or a :class:`RunnableGraph`."""

    @abstractmethod
    def states(self, state: State, context: ApplicationContext, inputs: dict[str, Any]) -> Any:
        """The States to run it on, as an (async) generator or any (async) iterable."""

    @property
    def known_subtasks(self) -> Iterable[Action]:
        """What ``action`` returns, where that depends on no State and no input."""
        method = type(self).action
        if inspect.iscoroutinefunction(method) or not inspect.isfunction(method) or _uses_arguments(method):
            return ()
        try:
            action = self.action(State(), {})
        except Exception:  # noqa: BLE001 - what it needs may not be there yet; if it never is, the run raises this
            return ()
        return (action,) if isinstance(action, Action) else ()

    async def tasks(
        self, state: State, context: ApplicationContext, inputs: dict[str, Any]
    ) -> AsyncGenerator[SubGraphTask, Any]:
        """One subtask a State."""
        action = await maybe_await(self.action(state, inputs))
        states = await iterate(self.states(state, context, inputs), self, "states")
        yields = Yields.of(states, context.checks)
        action = as_action(action, where=f"{type(self).__qualname__}.action")
        try:
            async for one in states:
                if not isinstance(one, State) or (yields is not None and not yields.fine()):
                    one = await corrected(one, states, yields, self, "states")
                yield _task(action, one)
        finally:
            await close(states)  # noqa: ASYNC102 - the host that closes this generator has shielded it


class MapActions(TaskBasedParallelAction):
    """Many actions over one State."""

    @abstractmethod
    def actions(self, state: State, context: ApplicationContext, inputs: dict[str, Any]) -> Any:
        """The actions, as an (async) generator or any (async) iterable."""

    def state(self, state: State, inputs: dict[str, Any]) -> Any:
        """The State that each of them runs on; by default the parent's."""
        return state

    async def tasks(
        self, state: State, context: ApplicationContext, inputs: dict[str, Any]
    ) -> AsyncGenerator[SubGraphTask, Any]:
        """One subtask an action."""
        shared = await maybe_await(self.state(state, inputs))
        if (misuse := refusal(shared, self, "state")) is not None:
            raise misuse
        actions = await iterate(self.actions(state, context, inputs), self, "actions")
        yields = Yields.of(actions, context.checks)
        try:
            async for action in actions:
                if not isinstance(action, Action) or (yields is not None and not yields.fine()):
                    action = await corrected(action, actions, yields, self, "actions")
                yield _task(action, shared)
        finally:
            await close(actions)  # noqa: ASYNC102 - the host that closes this generator has shielded it


class MapActionsAndStates(TaskBasedParallelAction):
    """Every action over every State: actions outside, States inside; ``states`` is called anew for each action."""

    @abstractmethod
    def actions(self, state: State, context: ApplicationContext, inputs: dict[str, Any]) -> Any:
        """The actions, as an (async) generator or any (async) iterable."""

    @abstractmethod
    def states(self, state: State, context: ApplicationContext, inputs: dict[str, Any]) -> Any:
        """The States, as an (async) generator or any (async) iterable."""

    async def tasks(
        self, state: State, context: ApplicationContext, inputs: dict[str, Any]
    ) -> AsyncGenerator[SubGraphTask, Any]:
        """One subtask for every pair."""
        actions = await iterate(self.actions(state, context, inputs), self, "actions")
        of_actions = Yields.of(actions, context.checks)
        try:
            async for action in actions:
                if not isinstance(action, Action) or (of_actions is not None and not of_actions.fine()):
                    action = await corrected(action, actions, of_actions, self, "actions")
                states = await iterate(self.states(state, context, inputs), self, "states")
                yields = Yields.of(states, context.checks)
                try:
                    async for one in states:
                        if not isinstance(one, State) or (yields is not None and not yields.fine()):
                            one = await corrected(one, states, yields, self, "states")
                        yield _task(action, one)
                finally:
                    await close(states)  # noqa: ASYNC102 - the host that closes this generator has shielded it
        finally:
            await close(actions)  # noqa: ASYNC102 - the host that closes this generator has shielded it


async def _final_state(task: SubGraphTask, context: ApplicationContext, entry: Entry | None) -> State:
    if task.executor is not msgspec.UNSET:
        context = context.with_executor(task.executor)
    executor = context.executor
    # A parallel action stays here, with its reducer; it is its subtasks that the executor runs.
    if executor is None or isinstance(task.action, TaskBasedParallelAction):
        _, changes = await perform(task.action, task.state, task.inputs, context)
    else:
        _, changes = await executor.run(task.action, task.state, task.inputs, context)
    if entry is not None:
        entry.changes = changes
    return task.state.finished(changes, task.action.display_name)


async def _through_ledger(
    task: SubGraphTask, handle: Handle[State], context: ApplicationContext, policy: Policy, entry: Entry | None
) -> State:
    if entry is None:
        return await _under_policy(task, handle, context, policy, None)
    if entry.restored is not None:
        return task.state.finished(task.state.scoped(None).patched(entry.restored), task.action.display_name)
    state = await _under_policy(task, handle, context, policy, entry)
    await entry.record()
    return state


async def _under_policy(
    task: SubGraphTask, handle: Handle[State], context: ApplicationContext, policy: Policy, entry: Entry | None
) -> State:
    if policy.plain:
        return await _final_state(task, context, entry)
    beats = context.beats

    async def attempt(handle: Handle[State]) -> State:
        context.attempt = handle.attempt
        context.beats = beats if handle.beat is None else (*beats, handle.beat)
        return await _final_state(task, context, entry)

    async def told(handle: Handle[State], error: Exception, wait: float) -> None:
        if context.run.listening:
            await context.emit(
                SubtaskRetried, label=handle.label(), ordinal=handle.ordinal, error=_shown(error), wait=wait
            )

    return await run_attempts(handle, attempt, policy, told)


async def _observed(
    task: SubGraphTask, handle: Handle[State], context: ApplicationContext, policy: Policy, entry: Entry | None
) -> State:
    label = handle.label()
    await context.emit(SubtaskStarted, label=label, ordinal=handle.ordinal)
    started = time.perf_counter()
    try:
        state = await _through_ledger(task, handle, context, policy, entry)
    except Exception as exc:
        seconds = time.perf_counter() - started
        await context.emit(SubtaskFinished, label=label, ordinal=handle.ordinal, seconds=seconds, error=_shown(exc))
        raise
    seconds = time.perf_counter() - started
    restored = entry is not None and entry.restored is not None
    await context.emit(SubtaskFinished, label=label, ordinal=handle.ordinal, seconds=seconds, restored=restored)
    return state


def _uses_arguments(method: Any) -> bool:
    """Whether the code of a method reads any argument but the first."""
    code = method.__code__
    arguments = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    return any(instruction.argval in arguments for instruction in dis.get_instructions(code))


def _shown(error: Exception) -> str:
    return f"{type(error).__qualname__}: {error}"


def _reduced(owner: Action, reduced: Any) -> State:
    if not isinstance(reduced, State):
        hint = spelling(reduced)
        message = (
            f"{type(owner).__qualname__}.reduce returned {shown(reduced)}; {hint + '; ' if hint else ''}"
            "it returns the new State: state.update(...)"
        )
        close_unused(reduced)
        raise MisuseError(message)
    return reduced


def _task(action: Action, state: State) -> SubGraphTask:
    """As SubGraphTask(action, state), of what has been checked and is yielded at once."""
    task = object.__new__(SubGraphTask)
    task.action = action
    task.state = state
    task.inputs = _NO_INPUTS
    task.key = task.label = None
    task.executor = msgspec.UNSET
    task._number = 0
    return task


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."
