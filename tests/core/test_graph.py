"""Graphs are validated when they are built."""

from __future__ import annotations

from typing import Any

import pytest

from arun import ApplicationBuilder, GraphBuilder, MemoryStore, MisuseError, RunnableGraph, State, action, default, when


@action(reads=["n"], writes=["n"], tags=["counts"])
async def count(state: State) -> State:
    return state.increment(n=1)


@action(reads=["n"], writes=["shown"])
async def show(state: State) -> State:
    return state.update(shown=str(state["n"]))


def builder() -> GraphBuilder:
    return GraphBuilder().with_actions(count, show)


def test_a_graph_knows_its_actions_and_transitions() -> None:
    graph = builder().with_transitions((["count"], "show", when(n=3)), ("count", "count")).build()
    assert list(graph.actions) == ["count", "show"]
    assert repr(graph.transitions[0]) == "<count -> show if n=3>"
    assert graph.select(["@tag:counts", "show"], what="halt_after") == {"count", "show"}
    assert graph.select("show", what="halt_after") == {"show"}
    assert graph.reachable("show") == {"show"}


def test_an_action_may_be_there_twice_under_two_names() -> None:
    graph = GraphBuilder().with_actions(count, again=count).build()
    assert [a.display_name for a in graph.actions.values()] == ["count", "again"]
    assert count.name == "count"


def test_graphs_can_be_joined() -> None:
    one = GraphBuilder().with_actions(count).with_transitions(("count", "count", when(n=0))).build()
    joined = GraphBuilder().with_graph(one).with_actions(show).with_transitions(("count", "show")).build()
    assert len(joined.transitions) == 2
    assert len(one.actions) == 1


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: GraphBuilder().build(), "at least one action"),
        (lambda: GraphBuilder().with_actions(count, count), "two actions are named 'count'"),
        (lambda: builder().with_transitions(("count", "shwo")).build(), "did you mean 'show'?"),
        (lambda: builder().with_transitions(("cuont", "show")).build(), "did you mean 'count'?"),
        (lambda: builder().with_transitions(("count", "show"), ("count", "count")).build(), "put the default last"),
        (
            lambda: builder().with_transitions(("count", "show", default), ("count", "count", when(n=1))).build(),
            "never",
        ),
        (lambda: builder().with_transitions(("count",)), r"takes \(from, to\)"),
        (lambda: builder().with_transitions("count", "show"), r"takes \(from, to\) .*, not 'count'"),
        (lambda: builder().with_transitions((count, "show")).build(), "a transition takes the name .*; write 'count'"),
        (lambda: builder().with_transitions((["count"], show)).build(), "a transition takes the name .*; write 'show'"),
        (lambda: builder().with_transitions(("count", "show", "n > 1")), r"expr\('n > 1'\)"),
        (lambda: GraphBuilder().with_actions(lambda state: state), "decorate the function"),
        (lambda: GraphBuilder().with_actions(RunnableGraph), "is a class; pass an instance"),
        (lambda: GraphBuilder().with_actions([count]), "is not an action; pass an Action"),
        (lambda: GraphBuilder().with_actions(x=None), r"with_actions\(x=...\): None is not an action"),
        (lambda: ApplicationBuilder().with_actions(count, show).build(), "with_entrypoint"),
        (
            lambda: ApplicationBuilder().with_actions(count, show).with_entrypoint("count").build(),
            "no transition leads",
        ),
        (lambda: ApplicationBuilder().with_actions(count).with_entrypoint("counts").build(), "did you mean 'count'?"),
        (
            lambda: ApplicationBuilder().with_actions(count).with_entrypoint(count).build(),
            "entrypoint .*; write 'count'",
        ),
        (lambda: ApplicationBuilder().with_store("runs.db"), r"takes a store, such as SQLiteStore\(path\), not a str"),
        (
            lambda: ApplicationBuilder().with_store(MemoryStore),
            r"takes a store, such as SQLiteStore\(path\), not a class",
        ),
        (lambda: RunnableGraph(builder().build(), "count"), "no transition leads from 'count' to: show"),
        (
            lambda: builder().build().select(["@tag:no"], what="halt_after"),
            "tag 'no' was not found; the actions' tags are: counts",
        ),
        (lambda: builder().build().select("sho", what="halt_before"), "halt_before names 'sho'"),
        (lambda: builder().build().select(show, what="halt_before"), "halt_before takes the name .*; write 'show'"),
        (lambda: builder().build().select([show], what="halt_after"), "halt_after takes the name .*; write 'show'"),
    ],
)
def test_a_graph_that_cannot_work_is_refused(build: Any, message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        build()


def test_a_sub_graph_reads_what_it_does_not_write_and_writes_all_that_is_written_in_it() -> None:
    graph = builder().with_transitions(("count", "show")).build()
    inner = RunnableGraph(graph, "count", "show")
    assert (inner.name, inner.reads, inner.writes) == ("count", [], ["n", "shown"])
    assert RunnableGraph.create(inner) is inner
    assert RunnableGraph.create(show).reads == ["n"]


def test_actions_are_found_by_their_tags() -> None:
    @action(reads=[], writes=[], tags=["fast", "cheap"])
    async def one(state: State) -> State:
        return state

    @action(reads=[], writes=[], tags=["fast"])
    async def other(state: State) -> State:
        return state

    graph = GraphBuilder().with_actions(one, other).build()
    assert [found.name for found in graph.get_actions_by_tag("fast")] == ["one", "other"]
    assert [found.name for found in graph.get_actions_by_tag("cheap")] == ["one"]
    with pytest.raises(ValueError, match="'slow' was not found; the actions' tags are: cheap, fast"):
        graph.get_actions_by_tag("slow")
