"""Subtasks: what a parallel action's ``tasks`` yields, and how each is run, under its policy and through the ledger."""

from __future__ import annotations

import time
from collections.abc import Coroutine, Generator, Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec

from arun.actions import Action, as_action, perform
from arun.attempts import run_attempts
from arun.context import ApplicationContext
from arun.errors import MisuseError
from arun.events import SubtaskFinished, SubtaskRetried, SubtaskStarted
from arun.guards import here
from arun.handles import Handle
from arun.ledger import Entry
from arun.policies import Policy, refuse_no_policy
from arun.sources import not_a_task, note_made
from arun.state import State

if TYPE_CHECKING:
    from arun.executors import Executor

__all__ = ("SubGraphTask", "Subtasks", "subtask")

_UNSET: Final = msgspec.UNSET
_NO_INPUTS: Mapping[str, Any] = {}


class SubGraphTask:
    """One subtask of a :class:`TaskBasedParallelAction`.

    :param graph: what runs: an action or a :class:`RunnableGraph`.
    :param state: the State that it runs on.
    :param inputs: its inputs, on top of the run's own.
    :param key: a name of it that no sibling has; ``application_id`` is Burr's name for it.
    :param label: what a person calls it; by default the action's name and the fields that ``state`` was given.
    :param policy: retry, timeout, idle_timeout, rate and capacity of this subtask alone, and ``on_error="skip"`` to
        leave it out if it fails. What it leaves at its default is as the parallel action's policy says.
    :param executor: where it runs, instead of where the parallel action says; None: here.
    :raises MisuseError: for a policy with limit, order or deadline, which are about all subtasks together.
    """

    __slots__ = ("_number", "action", "executor", "inputs", "key", "label", "policy", "state")

    def __init__(
        self,
        graph: Any,
        state: State,
        inputs: Mapping[str, Any] | None = None,
        *,
        key: str | None = None,
        label: str | None = None,
        policy: Policy | None = None,
        executor: Executor | msgspec.UnsetType | None = _UNSET,
        application_id: str | None = None,
    ) -> None:
        if not isinstance(state, State):  # pyright: ignore[reportUnnecessaryIsInstance]  # users' code
            raise MisuseError(f"SubGraphTask(state=...) takes a State, not a {type(state).__name__}")
        if policy is not None:
            _refuse_of_all(policy)
        self.action = as_action(graph, where="SubGraphTask(graph=...)")
        self.state = state
        self.inputs: Mapping[str, Any] = inputs or _NO_INPUTS
        self.key = key if key is not None else application_id
        self.label = label
        self.policy = policy
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


def subtask(action: Action, state: State) -> SubGraphTask:
    """As ``SubGraphTask(action, state)``, of what has been checked and is yielded at once."""
    task = _blank(SubGraphTask)
    task.action = action
    task.state = state
    task.inputs = _NO_INPUTS
    task.key = task.label = task.policy = None
    task.executor = _UNSET
    task._number = 0
    return task


_blank: Final = object.__new__


class Subtasks:
    """Runs what one parallel action yields.

    :param owner: the parallel action.
    :param context: of which every subtask gets a child.
    """

    __slots__ = ("_below", "_direct", "_keys", "_listening", "_name", "_owner", "_policy", "_siblings")

    def __init__(self, owner: Action, context: ApplicationContext, policy: Policy) -> None:
        self._owner = owner
        self._name = owner.display_name
        self._policy = policy
        self._keys: set[str] = set()
        self._siblings = context.ledger.siblings(self._name) if context.ledger is not None else None
        self._listening = context.run.listening
        self._below = context.child(self._name, self._name)
        if policy.capacity is not None:
            self._below.capacities = (*context.capacities, policy.capacity)
        # Nothing to tell, to record, to repeat or to time.
        self._direct = policy.plain and self._siblings is None and not self._listening

    def admit(self, task: Any) -> None:
        """:raises MisuseError: for what is no subtask, or has the key of another."""
        if not isinstance(task, SubGraphTask):
            raise MisuseError(not_a_task(self._owner, task))
        if task._number:
            owner = here.seat.owner
            if owner is not None and owner.unyielded is not None:
                owner.unyielded.pop(task._number, None)
        if task.key is not None:
            if task.key in self._keys:
                raise MisuseError(f"two subtasks of {self._name!r} have the key {task.key!r}; keys are unique")
            self._keys.add(task.key)

    def run(self, handle: Handle[State]) -> Coroutine[Any, Any, State]:
        """The coroutine that runs a subtask to its final State."""
        task: SubGraphTask = handle.spec
        handle.describe = task.describe
        name = task.action.display_name
        context = self._below.child(name, task.key if task.key is not None else f"{name}[{handle.ordinal}]")
        if self._direct and task.policy is None:
            return _final_state(task, context, None)
        return self._run(task, handle, context)

    async def _run(self, task: SubGraphTask, handle: Handle[State], context: ApplicationContext) -> State:
        policy = self._policy
        if task.policy is not None:
            policy = _merged(policy, task.policy)
            handle.on_error = policy.on_error
            if task.policy.capacity is not None:
                context.capacities = (*context.capacities, task.policy.capacity)
        entry: Entry | None = None
        if self._siblings is not None:
            entry = await self._siblings.enter(task.action, task.state, task.inputs, context, key=task.key)
            context.ledger = entry.ledger
        if self._listening:
            return await _observed(task, handle, context, policy, entry)
        return await _through_ledger(task, handle, context, policy, entry)


#: What is about all subtasks together.
_OF_ALL: Final = ("limit", "order", "deadline")
#: What one subtask may have of its own.
_OF_ONE: Final = ("on_error", "retry", "timeout", "idle_timeout", "rate")
_DEFAULT: Final = Policy()


def _refuse_of_all(policy: Policy) -> None:
    refuse_no_policy(policy, "SubGraphTask(policy=...)")
    for name in _OF_ALL:
        if getattr(policy, name) != getattr(_DEFAULT, name):
            raise MisuseError(
                f"SubGraphTask(policy=Policy({name}={getattr(policy, name)!r})): {name} is about all subtasks "
                "together; set it in the policy of the parallel action"
            )
    if policy.on_error == "collect":
        raise MisuseError(
            "SubGraphTask(policy=Policy(on_error='collect')): what the reducer is given is for the policy of the "
            "parallel action to say; here takes 'skip', or nothing"
        )


def _merged(policy: Policy, own: Policy) -> Policy:
    given = {name: getattr(own, name) for name in _OF_ONE if getattr(own, name) != getattr(_DEFAULT, name)}
    return msgspec.structs.replace(policy, **given)


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


async def _final_state(task: SubGraphTask, context: ApplicationContext, entry: Entry | None) -> State:
    action = task.action
    if task.executor is not _UNSET:
        context = context.with_executor(task.executor)
    executor = context.executor
    if executor is None or action.stays_here:
        _, changes = await perform(action, task.state, task.inputs, context)
    else:
        _, changes = await executor.run(action, task.state, task.inputs, context)
    if entry is not None:
        entry.changes = changes
    return task.state.finished(changes, context.action_name)


def _shown(error: Exception) -> str:
    return f"{type(error).__qualname__}: {error}"


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 40 else shown[:37] + "..."
