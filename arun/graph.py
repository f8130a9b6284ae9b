"""Graph: actions and the transitions between them; immutable, validated when built, shared by many runs."""

from __future__ import annotations

import difflib
from collections.abc import Awaitable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

from arun.actions import Action, as_action
from arun.conditions import Condition, as_condition, default, truth
from arun.errors import MisuseError
from arun.signatures import describe
from arun.state import State

__all__ = ("Graph", "GraphBuilder", "Transition", "check_entrypoint")


class Transition:
    """An arrow of the graph: from one action to another when a condition holds."""

    __slots__ = ("condition", "from_", "to")

    def __init__(self, from_: str, to: str, condition: Condition) -> None:
        self.from_ = from_
        self.to = to
        self.condition = condition

    def __repr__(self) -> str:
        return f"<{self.from_} -> {self.to} if {self.condition.name}>"


class Graph:
    """Actions by name and, for each, its transitions in order; the first whose condition holds is taken.

    Build it with :class:`GraphBuilder`, which validates.
    """

    __slots__ = ("_by_source", "actions", "transitions")

    def __init__(self, actions: Mapping[str, Action], transitions: Sequence[Transition]) -> None:
        self.actions = dict(actions)
        self.transitions = tuple(transitions)
        self._by_source: dict[str, list[Transition]] = {}
        for transition in transitions:
            self._by_source.setdefault(transition.from_, []).append(transition)

    def __repr__(self) -> str:
        return f"<Graph {', '.join(self.actions)}; {len(self.transitions)} transitions>"

    def following(self, name: str, state: State) -> str | Awaitable[str | None] | None:
        """The action after ``name``; None where no condition holds, which ends the run.

        To be awaited only where a condition has to be, which spares the others a coroutine.
        """
        return _first(iter(self._by_source.get(name, ())), state)

    def reachable(self, entrypoint: str) -> set[str]:
        """Names of the actions that a run from ``entrypoint`` can get to."""
        found, frontier = {entrypoint}, [entrypoint]
        while frontier:
            for transition in self._by_source.get(frontier.pop(), ()):
                if transition.to not in found:
                    found.add(transition.to)
                    frontier.append(transition.to)
        return found

    def select(self, names: str | Iterable[str] | None, *, what: str) -> frozenset[str]:
        """Resolve action names and ``"@tag:x"`` selectors; None is no name at all.

        :raises MisuseError: for a name or tag that the graph does not have.
        """
        selected: set[str] = set()
        for name in [names] if isinstance(names, (str, Action)) else names or ():
            if str(name).startswith("@tag:"):
                try:
                    tagged = self.get_actions_by_tag(name.removeprefix("@tag:"))
                except ValueError as exc:
                    raise MisuseError(f"{what}={name!r}: {exc}") from None
                selected.update(action.display_name for action in tagged)
            else:
                self.check_name(name, what)
                selected.add(name)
        return frozenset(selected)

    def get_actions_by_tag(self, tag: str) -> list[Action]:
        """The actions that have a tag, in the order in which they were added.

        :raises ValueError: if there is none.
        """
        tagged = [action for action in self.actions.values() if tag in action.tags]
        if not tagged:
            tags = sorted({tag for action in self.actions.values() for tag in action.tags})
            raise ValueError(f"tag {tag!r} was not found; the actions' tags are: {', '.join(tags) or 'none'}")
        return tagged

    def check_name(self, name: str, what: str) -> None:
        """:raises MisuseError: if there is no action of that name."""
        if not isinstance(name, str):  # pyright: ignore[reportUnnecessaryIsInstance]  # users' code
            hint = f"; write {name.display_name!r}" if isinstance(name, Action) else ""
            raise MisuseError(f"{what} takes the name of an action, not {describe(name)}{hint}")
        if name not in self.actions:
            close = difflib.get_close_matches(name, self.actions, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise MisuseError(f"{what} names {name!r}, but the actions are: {', '.join(self.actions)}{hint}")

    def unwritten_reads(self, entrypoint: str) -> dict[str, str]:
        """Keys that a reachable action reads and none writes, so the State must have them: key to the reader's name."""
        reachable = sorted(self.reachable(entrypoint))
        written = {key for name in reachable for key in self.actions[name].writes}
        return {key: name for name in reachable for key in self.actions[name].reads if key not in written}


class GraphBuilder:
    """Builds a :class:`Graph`; every method returns the builder."""

    def __init__(self) -> None:
        self._actions: dict[str, Action] = {}
        self._transitions: list[Transition] = []

    def with_actions(self, *actions: Any, **named: Any) -> Self:
        """Add actions; a keyword gives the name.

        :raises MisuseError: for a name that is taken, or something that is no action.
        """
        for candidate in actions:
            self._add(as_action(candidate, where="with_actions"), None)
        for name, candidate in named.items():
            self._add(as_action(candidate, where=f"with_actions({name}=...)"), name)
        return self

    def with_transitions(
        self, *transitions: tuple[str | Sequence[str], str] | tuple[str | Sequence[str], str, Any]
    ) -> Self:
        """Add ``(from, to)`` or ``(from, to, condition)``; ``from`` may be a list of names."""
        for transition in transitions:
            pair = isinstance(transition, (tuple, list))  # pyright: ignore[reportUnnecessaryIsInstance]  # users' code
            if not pair or not 2 <= len(transition) <= 3:
                raise MisuseError(f"with_transitions takes (from, to) or (from, to, condition), not {transition!r}")
            sources, to = transition[0], transition[1]
            condition = as_condition(transition[2]) if len(transition) == 3 else default
            self._transitions.extend(
                Transition(source, to, condition)
                for source in ([sources] if isinstance(sources, (str, Action)) else sources)
            )
        return self

    def with_graph(self, graph: Graph) -> Self:
        """Add all actions and transitions of another graph."""
        for name, added in graph.actions.items():
            self._add(added, name)
        self._transitions.extend(graph.transitions)
        return self

    def build(self) -> Graph:
        """Validate and make the Graph.

        :raises MisuseError: for a graph without actions, a transition to or from a name that there is not, or a
            transition behind one that is always taken.
        """
        if not self._actions:
            raise MisuseError("a graph needs at least one action: with_actions(...)")
        graph = Graph(self._actions, self._transitions)
        always: set[str] = set()
        for transition in self._transitions:
            graph.check_name(transition.from_, "a transition")
            graph.check_name(transition.to, "a transition")
            if transition.from_ in always:
                raise MisuseError(
                    f"the transition {transition.from_!r} -> {transition.to!r} can never be taken: an earlier one from "
                    f"{transition.from_!r} has no condition; put the default last"
                )
            if transition.condition is default:
                always.add(transition.from_)
        return graph

    def _add(self, added: Action, name: str | None) -> None:
        name = name or added.display_name
        if name in self._actions:
            raise MisuseError(
                f"two actions are named {name!r}; name one of them: with_actions(other_{name}=...) or .with_name(...)"
            )
        self._actions[name] = added if added.name == name else added.with_name(name)


def check_entrypoint(graph: Graph, entrypoint: str) -> None:
    """:raises MisuseError: if the entrypoint is unknown, or actions can't be reached from it."""
    graph.check_name(entrypoint, "the entrypoint")
    unreachable = graph.actions.keys() - graph.reachable(entrypoint)
    if unreachable:
        raise MisuseError(
            f"no transition leads from {entrypoint!r} to: {', '.join(sorted(unreachable))}; "
            "add a transition or remove the action"
        )


def _first(transitions: Iterator[Transition], state: State) -> str | Awaitable[str | None] | None:
    for transition in transitions:
        condition = transition.condition
        if condition is default:
            return transition.to
        try:
            holds = condition.resolver(state)
        except Exception as exc:
            exc.add_note(_where(transition))
            raise
        if holds is True:
            return transition.to
        if holds is not False:
            return _decided(transition, holds, transitions, state)
    return None


async def _decided(transition: Transition, holds: Any, rest: Iterator[Transition], state: State) -> str | None:
    try:
        taken = await truth(holds)
    except Exception as exc:
        exc.add_note(_where(transition))
        raise
    if taken:
        return transition.to
    following = _first(rest, state)
    return following if following is None or isinstance(following, str) else await following


def _where(transition: Transition) -> str:
    return f"in the condition {transition.condition.name} of the transition {transition.from_!r} -> {transition.to!r}"
