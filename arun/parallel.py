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
from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, cast

import msgspec

from arun.actions import Action, as_action
from arun.collectors import Collector
from arun.context import ApplicationContext
from arun.errors import MisuseError
from arun.fanout import run_fan_out
from arun.guards import Owner, close_unused, shown, spelling
from arun.handles import Handle
from arun.hosted import drive_hosted
from arun.hosting import drive, run_owned
from arun.outcomes import Ok
from arun.policies import Policy, refuse_no_policy
from arun.signatures import where
from arun.sources import Source, maybe_await, refusal, warn_of_unyielded
from arun.state import State
from arun.subgraphs import RunnableGraph
from arun.subtasks import SubGraphTask, Subtasks, subtask

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
    stays_here = True

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
        refuse_no_policy(self.policy, f"{type(self).__qualname__}.policy")
        given = {**inputs, **self._bound}
        if self.executor is not msgspec.UNSET:
            context = context.with_executor(self.executor)
        below = context.child(context.action_name, inputs=given) if given else context
        subtasks = Subtasks(self, below, self.policy)
        collector = Collector(self.display_name, context, self.reduce)
        checks = context.checks

        async def consume(states: AsyncIterator[Any]) -> None:
            reduced: Any = self.reduce(state, states)
            owner = Owner(context, checks) if checks is not None else None
            if isinstance(reduced, AsyncGenerator):
                host = drive_hosted if self.hosted else drive
                await host(cast("AsyncGenerator[Any, None]", reduced), collector.take, None, owner)
            else:
                collector.state = _reduced(self, await run_owned(copy_context(), reduced, owner))

        await run_fan_out(
            lambda: self.tasks(state, context, dict(below.inputs)),
            subtasks.run,
            consume,
            self.policy,
            name=self.display_name,
            reducer=self.reduce,
            admit=subtasks.admit,
            result=self._present,
            checks=checks,
            source_ended=warn_of_unyielded,
        )
        if collector.state is None:
            raise MisuseError(
                f"{where(self.reduce)} ended without yielding a State, of which the last is the result; where there "
                "are no subtasks, a loop over their results yields none: yield one before or after it as well"
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

    def tasks(
        self, state: State, context: ApplicationContext, inputs: dict[str, Any]
    ) -> AsyncGenerator[SubGraphTask, Any]:
        """One subtask a State."""

        async def only() -> tuple[Action]:
            where = f"{type(self).__qualname__}.action"
            return (as_action(await maybe_await(self.action(state, inputs)), where=where),)

        return _product(self, context, only, lambda: self.states(state, context, inputs))


class MapActions(TaskBasedParallelAction):
    """Many actions over one State."""

    @abstractmethod
    def actions(self, state: State, context: ApplicationContext, inputs: dict[str, Any]) -> Any:
        """The actions, as an (async) generator or any (async) iterable."""

    def state(self, state: State, inputs: dict[str, Any]) -> Any:
        """The State that each of them runs on; by default the parent's."""
        return state

    def tasks(
        self, state: State, context: ApplicationContext, inputs: dict[str, Any]
    ) -> AsyncGenerator[SubGraphTask, Any]:
        """One subtask an action."""
        shared: list[State] = []

        async def actions() -> Any:
            one = await maybe_await(self.state(state, inputs))
            if (misuse := refusal(one, self, "state")) is not None:
                raise misuse
            shared.append(one)
            return await maybe_await(self.actions(state, context, inputs))

        return _product(self, context, actions, lambda: shared)


class MapActionsAndStates(TaskBasedParallelAction):
    """Every action over every State: actions outside, States inside; ``states`` is called anew for each action."""

    @abstractmethod
    def actions(self, state: State, context: ApplicationContext, inputs: dict[str, Any]) -> Any:
        """The actions, as an (async) generator or any (async) iterable."""

    @abstractmethod
    def states(self, state: State, context: ApplicationContext, inputs: dict[str, Any]) -> Any:
        """The States, as an (async) generator or any (async) iterable."""

    def tasks(
        self, state: State, context: ApplicationContext, inputs: dict[str, Any]
    ) -> AsyncGenerator[SubGraphTask, Any]:
        """One subtask for every pair."""
        return _product(
            self,
            context,
            lambda: self.actions(state, context, inputs),
            lambda: self.states(state, context, inputs),
        )


async def _product(
    owner: Action, context: ApplicationContext, actions: Callable[[], Any], states: Callable[[], Any]
) -> AsyncGenerator[SubGraphTask, Any]:
    """Every action over every State, the States asked for anew for each action."""
    outer = await Source.of(actions(), owner, "actions", context.checks)
    try:
        async for action in outer.items:
            if not outer.fine(action):
                action = await outer.corrected(action)
            inner = await Source.of(states(), owner, "states", context.checks)
            try:
                async for state in inner.items:
                    if not inner.fine(state):
                        state = await inner.corrected(state)
                    yield subtask(action, state)
            finally:
                await inner.aclose()  # noqa: ASYNC102 - the host that closes this generator has shielded it
    finally:
        await outer.aclose()  # noqa: ASYNC102 - the host that closes this generator has shielded it


def _uses_arguments(method: Any) -> bool:
    """Whether the code of a method reads any argument but the first."""
    code = method.__code__
    arguments = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    return any(instruction.argval in arguments for instruction in dis.get_instructions(code))


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
