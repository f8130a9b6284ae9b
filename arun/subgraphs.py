"""RunnableGraph: a whole graph as an action like any other, so that a subtask may be one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import anyio.lowlevel

from arun.actions import Action, as_action, take_step
from arun.context import ApplicationContext
from arun.graph import Graph, GraphBuilder, check_entrypoint
from arun.hosting import BUDGET
from arun.state import State

__all__ = ("RunnableGraph",)


class RunnableGraph(Action):
    """A graph as an action: runs from the entrypoint until one of ``halt_after`` has run, or no transition leads on.

    :param graph: the graph.
    :param entrypoint: name of its first action.
    :param halt_after: names or ``"@tag:x"`` selectors of the actions that it ends with.
    :raises MisuseError: for names that the graph does not have.
    """

    leaf = False

    def __init__(self, graph: Graph, entrypoint: str, halt_after: str | Iterable[str] | None = ()) -> None:
        check_entrypoint(graph, entrypoint)
        self.graph = graph
        self.entrypoint = entrypoint
        self.halt_after = graph.select(halt_after, what="halt_after")
        self.name = entrypoint
        self.reads = list(graph.unwritten_reads(entrypoint))
        self.writes = sorted({key for inner in graph.actions.values() for key in inner.writes})

    @classmethod
    def create(cls, from_: Any) -> RunnableGraph:
        """A RunnableGraph of one action; a RunnableGraph is returned as it is."""
        if isinstance(from_, RunnableGraph):
            return from_
        only = as_action(from_, where="RunnableGraph.create")
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
            following = None if current in self.halt_after else self.graph.following(current, committed)
            current = following if following is None or isinstance(following, str) else await following
            if entry is not None and current is not None:  # the last step is recorded as the graph's end
                entry.changes = changes
                await entry.record()
        return result, state
