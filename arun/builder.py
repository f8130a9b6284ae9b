"""ApplicationBuilder: puts a graph, a State, resources and policies of running together, and validates all of it."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Self

import msgspec

from arun.actions import Action
from arun.application import Application, Wiring
from arun.burr import without_burrs_names
from arun.errors import MisuseError
from arun.graph import Graph, GraphBuilder, check_entrypoint
from arun.guards import (
    BLOCKED_AFTER,
    Level,
    checks_of,
    close_unused,
    default_level,
    shown,
    spelling,
)
from arun.hooks import Hook, Hooks
from arun.journal import OnFinished, Store
from arun.keys import graph_hash
from arun.parallel import TaskBasedParallelAction
from arun.state import State

if TYPE_CHECKING:
    from arun.executors import Executor

__all__ = ("ApplicationBuilder",)


@without_burrs_names
class ApplicationBuilder:
    """Builds an :class:`Application`; every method returns the builder."""

    def __init__(self) -> None:
        self._graph = GraphBuilder()
        self._entrypoint: str | None = None
        self._state = State()
        self._resources: dict[str, Any] = {}
        self._executor: Executor | None = None
        self._hooks: list[Hook] = []
        self._app_id: str | None = None
        self._partition_key: str | None = None
        self._sequence_id = 0
        self._store: Store | None = None
        self._on_finished: OnFinished = "raise"
        self._check: Level | None = None
        self._blocked_after = BLOCKED_AFTER

    def with_actions(self, *actions: Any, **named: Any) -> Self:
        """Add actions; a keyword gives the name. See :meth:`arun.GraphBuilder.with_actions`."""
        self._graph.with_actions(*actions, **named)
        return self

    def with_transitions(
        self, *transitions: tuple[str | Sequence[str], str] | tuple[str | Sequence[str], str, Any]
    ) -> Self:
        """Add ``(from, to)`` or ``(from, to, condition)``. See :meth:`arun.GraphBuilder.with_transitions`."""
        self._graph.with_transitions(*transitions)
        return self

    def with_graph(self, graph: Graph) -> Self:
        """Add a graph's actions and transitions."""
        self._graph.with_graph(graph)
        return self

    def with_graphs(self, *graphs: Graph) -> Self:
        """Add several graphs' actions and transitions."""
        for graph in graphs:
            self._graph.with_graph(graph)
        return self

    def with_entrypoint(self, action: str) -> Self:
        """Name the first action; needed where there is more than one."""
        self._entrypoint = action
        return self

    def with_state(self, state: State | None = None, /, **fields: Any) -> Self:
        """Set the first State, or fields of it."""
        self._state = (self._state if state is None else self._state.merge(state)).update(**fields)
        return self

    def with_resources(self, **resources: Any) -> Self:
        """Inject objects (engines, clients, pools) into the actions' parameters of these names.

        They reach everything below, are never part of the State and never stored.

        :raises MisuseError: for a coroutine or an async generator, which no action could use twice.
        """
        for name, resource in resources.items():
            if inspect.iscoroutine(resource) or inspect.isasyncgen(resource):
                message = f"with_resources({name}=...) was given {shown(resource)}; {spelling(resource)}"
                close_unused(resource)
                raise MisuseError(message)
        self._resources.update(resources)
        return self

    def with_executor(self, executor: Executor | None) -> Self:
        """Say where the subtasks of parallel actions run: by default here, in this event loop.

        It reaches everything below; a parallel action's ``executor`` or a ``SubGraphTask``'s overrides it, and None
        there turns it off. The application's own steps, reducers, hooks and stores stay here in any case.
        """
        if executor is not None and (isinstance(executor, type) or not hasattr(executor, "check")):
            raise MisuseError(f"with_executor() takes an executor, such as ThreadExecutor(), not {shown(executor)}")
        self._executor = executor
        return self

    def with_hooks(self, *hooks: Hook) -> Self:
        """Tell functions of what happens in every run, subtasks and sub-graphs included.

        :param hooks: made with :func:`arun.hook`; those of one kind of event are called in this order.
        :raises MisuseError: for what is no hook.
        """
        for one in hooks:
            if not isinstance(one, Hook):  # pyright: ignore[reportUnnecessaryIsInstance]  # users' code
                close_unused(one)
                raise MisuseError(
                    f"with_hooks() was given {shown(one)}; decorate a function with @arun.hook(ActionFinished), or "
                    "other types of events, and pass that"
                )
        self._hooks.extend(hooks)
        return self

    def with_identifiers(
        self, app_id: str | None = None, partition_key: str | None = None, sequence_id: int | None = None
    ) -> Self:
        """Set the application's identity; by default a new ``app_id`` and no partition."""
        self._app_id = app_id
        self._partition_key = partition_key
        self._sequence_id = sequence_id or 0
        return self

    def with_check(self, level: Level, *, blocked_after: float = BLOCKED_AFTER) -> Self:
        """Set how severely the guard-rails look; by default the level of ``ARUN_CHECK``, else "error".

        :param level: "off", "warn" (a warning instead of an error), "error" or "strict" (also what takes copies to
            find). See docs/concepts/guard-rails.md.
        :param blocked_after: seconds that an action may hold the event loop before the watchdog names it in the log.
        """
        checks_of(level, blocked_after)  # refused here rather than in build()
        self._check, self._blocked_after = level, blocked_after
        return self

    def with_store(self, store: Store | None, *, on_finished: OnFinished = "raise") -> Self:
        """Keep runs in a store, and go on with those that it knows.

        ``arun()`` of a known ``app_id`` continues behind the last committed step, with the State rebuilt; the step that
        was under way runs again, and those of its subtasks that had finished are taken from the store. Everything that
        is written to the State must be of types that can be stored (see :func:`arun.register`).

        :param on_finished: what running an application does whose run has ended: "raise" AlreadyFinishedError, or start
            "fresh" with nothing kept.
        """
        if on_finished not in {"raise", "fresh"}:
            raise MisuseError(f"with_store(on_finished={on_finished!r}): takes 'raise' or 'fresh'")
        if store is not None and (isinstance(store, type) or not hasattr(store, "open_run")):
            raise MisuseError(f"with_store() takes a store, such as SQLiteStore(path), not {shown(store)}")
        self._store, self._on_finished = store, on_finished
        return self

    def build(self) -> Application:
        """Validate everything and make the Application.

        :raises MisuseError: for names that don't exist, actions that can't be reached, a missing entrypoint, and
            subtasks that their executor can't run, as far as they are known already.
        """
        graph = self._graph.build()
        entrypoint = self._entrypoint
        if entrypoint is None:
            if len(graph.actions) > 1:
                raise MisuseError(f"with_entrypoint(...) is missing; the actions are: {', '.join(graph.actions)}")
            entrypoint = next(iter(graph.actions))
        check_entrypoint(graph, entrypoint)
        if self._store is not None and self._sequence_id:
            raise MisuseError("with_identifiers(sequence_id=...) and with_store(...): the store knows the sequence_id")
        _check_executors(graph.actions.values(), self._executor)
        wiring = Wiring(
            graph=graph,
            entrypoint=entrypoint,
            resources=dict(self._resources),
            needed_keys=graph.unwritten_reads(entrypoint),
            initial=self._state.scoped(None),
            partition_key=self._partition_key,
            store=self._store,
            on_finished=self._on_finished,
            graph_hash=graph_hash(graph, entrypoint) if self._store is not None else "",
            executor=self._executor,
            hooks=Hooks(self._hooks) if self._hooks else None,
            checks=checks_of(self._check or default_level(), self._blocked_after),
        )
        return Application(wiring, self._app_id or uuid.uuid4().hex, wiring.initial, self._sequence_id)

    async def abuild(self) -> Application:
        """As :meth:`build`, and the State is at once what the store knows, where there is a store."""
        app = self.build()
        await app.load()
        return app


def _check_executors(actions: Iterable[Action], executor: Executor | None) -> None:
    for action in actions:
        if isinstance(action, TaskBasedParallelAction):
            chosen = executor if action.executor is msgspec.UNSET else action.executor
            subtasks = list(action.known_subtasks)
            for subtask in subtasks:
                if chosen is not None and not isinstance(subtask, TaskBasedParallelAction):
                    chosen.check(subtask)
            _check_executors((s for s in subtasks if isinstance(s, TaskBasedParallelAction)), chosen)
        else:
            _check_executors(action.parts, executor)
