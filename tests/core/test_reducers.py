"""Reducers: what each makes of a stream, to its end and with an early exit; composed; against plain Python."""

from __future__ import annotations

import math
import statistics as plain
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from itertools import pairwise
from typing import Any

import anyio
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arun import (
    ApplicationBuilder,
    Failed,
    MapActions,
    MapStates,
    MisuseError,
    Ok,
    Partial,
    Policy,
    Runtime,
    Skipped,
    State,
    action,
    fan_out,
)
from arun.reducers import (
    Reducer,
    Reduction,
    Statistics,
    collect,
    combine,
    concat,
    count,
    failures,
    first,
    first_n,
    group_by,
    majority,
    merge,
    quorum,
    reducing,
    statistics,
    top_k,
)

pytestmark = pytest.mark.anyio


class Stream:
    """An async iterator over plain items that tells how many were taken and whether it was closed."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.items = iter(items)
        self.taken = 0
        self.closed = False

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        for item in self.items:
            self.taken += 1
            return item
        raise StopAsyncIteration

    async def aclose(self) -> None:
        self.closed = True


async def partials(reducer: Reducer[Any], items: Iterable[Any], every: int | None = None) -> list[Any]:
    return [partial async for partial in reducer.over(Stream(items), every=every)]


def run(reducer: Reducer[Any], items: Iterable[Any], every: int | None = None) -> list[Any]:
    """As ``partials``, for properties: hypothesis calls plain functions, and nothing here waits for a loop."""
    generator = reducer.over(_NeverWaits(items), every=every)
    shown = []
    while True:
        try:
            generator.__anext__().send(None)
        except StopIteration as stop:
            shown.append(stop.value)
        except StopAsyncIteration:
            return shown


class _NeverWaits:
    def __init__(self, items: Iterable[Any]) -> None:
        self.items = iter(items)

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        for item in self.items:
            return item
        raise StopAsyncIteration


VOTES = [State({"answer": answer}) for answer in ["a", "b", "b", "a", "b"]]

# what, items, all partials, how many items it took
CASES: list[tuple[Reducer[Any], list[Any], list[Any], int]] = [
    (collect("answer"), VOTES[:3], [["a"], ["a", "b"], ["a", "b", "b"]], 3),
    (collect(), [1, 2], [[1], [1, 2]], 2),
    (collect(lambda n: n * n), [1, 2], [[1], [1, 4]], 2),
    (collect(by=lambda n: -n), [1, 3, 2], [[1], [3, 1], [3, 2, 1]], 3),
    (first("answer"), VOTES, ["a"], 1),
    (first_n(2, "answer"), VOTES, [["a"], ["a", "b"]], 2),
    (quorum(2, "answer"), VOTES, ["b"], 3),
    (quorum(4, "answer", default="?"), VOTES, ["?"], 5),
    (majority("answer"), VOTES, ["a", "b"], 5),
    (majority("answer", among=5), VOTES, ["a", "b"], 5),
    (majority(among=5), [1, 1, 1, 2, 3], [1], 3),
    (majority(among=4), [1, 2, 1, 2], [1], 3),
    (majority(among=4), [1, 1, 2, 2], [1], 2),
    (top_k(2), [1, 3, 2, 1, 5], [[1], [3, 1], [3, 2], [5, 3]], 5),
    (top_k(1, "id", by="cost"), [{"id": 1, "cost": 2}, {"id": 2, "cost": 2}, {"id": 3, "cost": 1}], [[1]], 3),
    (count(), "abc", [1, 2, 3], 3),
    (
        statistics(),
        [1, 3, 2],
        [
            Statistics(1, 1, 1.0, 1, 1, None),
            Statistics(2, 4, 2.0, 1, 3, 2.0),
            Statistics(3, 6, 2.0, 1, 3, 1.0),
        ],
        3,
    ),
    (group_by(len), ["a", "bb", "c"], [{1: ["a"]}, {1: ["a"], 2: ["bb"]}, {1: ["a", "c"], 2: ["bb"]}], 3),
    (group_by(len, first(), groups=2), ["a", "b", "cc", "d"], [{1: "a"}, {1: "a", 2: "cc"}], 3),
    (concat(separator=" "), ["x", "y"], ["x", "x y"], 2),
    (concat("t", by="at"), [{"t": "y", "at": 2}, {"t": "x", "at": 1}], ["y", "xy"], 2),
    (merge(), [State().update(a=1), State({"old": 0}).scoped(None).update(b=2)], [{"a": 1}, {"a": 1, "b": 2}], 2),
    (merge("a", overwrite=True), [State({"a": 1, "b": 1}), State({"b": 2}), State({"a": 3})], [{"a": 1}, {"a": 3}], 3),
    (failures(), [Ok(1), Skipped("late")], [[Skipped("late")]], 2),
    (combine(n=count(), all=collect()), [7, 8], [{"n": 1, "all": [7]}, {"n": 2, "all": [7, 8]}], 2),
    (combine(one=first(), two=first_n(2)), [7, 8, 9], [{"one": 7, "two": [7]}, {"one": 7, "two": [7, 8]}], 2),
    (combine(merge("a"), n=count()), [State({"a": 1})], [{"a": 1, "n": 1}], 1),
]


@pytest.mark.parametrize(("reducer", "items", "shown", "taken"), CASES)
async def test_partials_and_how_much_of_the_stream_they_took(
    reducer: Reducer[Any], items: Any, shown: list[Any], taken: int
) -> None:
    stream = Stream(items)
    assert [partial async for partial in reducer.over(stream)] == shown
    assert stream.taken == taken
    assert stream.closed


@pytest.mark.parametrize(("reducer", "items", "shown", "taken"), CASES)
async def test_a_consumer_that_leaves_early_closes_the_stream(
    reducer: Reducer[Any], items: Any, shown: list[Any], taken: int
) -> None:
    stream = Stream(items)
    generator = reducer.over(stream)
    assert await generator.__anext__() == shown[0]
    await generator.aclose()
    assert stream.closed


@pytest.mark.parametrize(("reducer", "items", "shown", "taken"), CASES)
async def test_partials_are_never_touched_again_and_reducers_are_used_again(
    reducer: Reducer[Any], items: Any, shown: list[Any], taken: int
) -> None:
    kept = [(partial, msgspec.msgpack.encode(partial)) for partial in await partials(reducer, items)]
    assert all(msgspec.msgpack.encode(partial) == encoded for partial, encoded in kept)
    assert [partial for partial, _ in kept] == await partials(reducer, items) == shown


@pytest.mark.parametrize(
    ("reducer", "nothing"),
    [
        (collect("answer"), []),
        (first("answer"), None),
        (first("answer", default="none"), "none"),
        (first_n(2), []),
        (quorum(2), None),
        (majority(among=3, default="-"), "-"),
        (top_k(2), []),
        (count(), 0),
        (statistics(), Statistics(0, 0)),
        (group_by("topic"), {}),
        (concat("text"), ""),
        (merge(), {}),
        (failures(), []),
        (combine(n=count(), best=top_k(1)), {"n": 0, "best": []}),
    ],
)
async def test_of_an_empty_stream_there_is_one_partial(reducer: Reducer[Any], nothing: Any) -> None:
    assert await partials(reducer, []) == [nothing]


async def test_outcomes_are_unwrapped_and_failures_go_where_they_are_asked_for() -> None:
    down = Failed(OSError("down"))
    outcomes = [Ok(State({"n": 1})), down, Ok(State({"n": 3})), Skipped("deadline")]
    combined = combine(numbers=collect("n"), sum=statistics("n"), errors=failures())
    last = (await partials(combined, outcomes))[-1]
    assert last["numbers"] == [1, 3]
    assert last["sum"].sum == 4
    assert last["errors"] == [down, Skipped("deadline")]


async def test_a_failed_subtask_has_voted() -> None:
    stream = Stream([Ok("a"), Ok("a"), Failed(OSError()), Ok("b"), Ok("b")])
    assert [leader async for leader in majority(among=5).over(stream)] == ["a"]
    assert stream.taken == 3


async def test_where_the_result_grows_partials_are_spaced_and_the_last_is_complete() -> None:
    n = 20_000
    sizes = [len(partial) for partial in await partials(collect(), range(n))]
    assert sizes[:127] == list(range(1, 128))
    assert sizes[-1] == n
    assert sum(sizes) < 70 * n
    assert all(after - before <= max(1, after / 64) for before, after in pairwise(sizes))


async def test_every_says_how_often() -> None:
    assert len(await partials(collect(), range(1000), every=1)) == 1000
    assert await partials(count(), range(10), every=4) == [4, 8, 10]
    with pytest.raises(MisuseError, match="every=0: at least 1"):
        await partials(count(), [1], every=0)


async def test_a_reducer_of_ones_own() -> None:
    class Longest(Reduction[str]):
        best = ""

        def add(self, item: str) -> bool:
            longer = len(item) > len(self.best)
            if longer:
                self.best = item
            return longer

        def result(self) -> str:
            return self.best

    grouped = group_by(lambda text: text[0], Reducer(Longest))
    assert (await partials(grouped, ["a", "bb", "aaa", "b"]))[-1] == {"a": "aaa", "b": "bb"}


# -- in parallel actions -----------------------------------------------------------------------------------------


class Leaves:
    """Leaf actions that end at once or never, and what of them was cleaned up."""

    def __init__(self) -> None:
        self.started: list[int] = []
        self.cleaned: list[int] = []

    def action(self) -> Any:
        @action(reads=["n", "ends"], writes=["answer", "score"])
        async def answer(state: State) -> State:
            self.started.append(state["n"])
            try:
                if not state["ends"]:
                    await anyio.sleep_forever()
                return state.update(answer="even" if state["n"] % 2 == 0 else "odd", score=state["n"])
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.lowlevel.checkpoint()
                self.cleaned.append(state["n"])

        return answer


def ask_all(leaves: Leaves, ends: list[bool], reduce_: Any, writes_: list[str], policy_: Policy | None = None) -> Any:
    class AskAll(MapStates):
        reads = ()
        writes = writes_
        policy = policy_ or Policy()
        reduce = reduce_

        def action(self, state: State, inputs: dict[str, Any]) -> Any:
            return leaves.action()

        async def states(self, state: State, context: Any, inputs: dict[str, Any]) -> Any:
            for n, one in enumerate(ends):
                yield State().update(n=n, ends=one)

    return ApplicationBuilder().with_actions(ask_all=AskAll()).build()


@pytest.mark.parametrize(
    ("reducer", "wanted"),
    [
        (first("answer"), "even"),
        (first_n(3, "answer"), ["even", "odd", "even"]),
        (quorum(2, "answer"), "even"),
        (majority("answer", among=3), "even"),
        (group_by("answer", first("score"), groups=2), {"even": 0, "odd": 1}),
        (combine(a=first("score"), b=first_n(2, "score")), {"a": 0, "b": [0, 1]}),
    ],
)
async def test_early_exit_cancels_the_siblings_and_awaits_their_clean_up(reducer: Reducer[Any], wanted: Any) -> None:
    leaves = Leaves()
    app = ask_all(leaves, [True] * 3 + [False] * 20, reducing(out=reducer), ["out"], Policy(order="submitted"))
    _, _, state = await app.arun()
    assert state["out"] == wanted
    assert len(leaves.started) > 3
    assert sorted(leaves.cleaned) == sorted(leaves.started)


@pytest.mark.parametrize(
    "reducer",
    [
        collect("answer"),
        top_k(2, "score"),
        count(),
        statistics("score"),
        group_by("answer"),
        concat("answer"),
        merge("score", overwrite=True),
        majority("answer"),
        failures(),
    ],
)
async def test_an_action_that_returns_early_from_a_reducer_without_end_cancels_the_siblings(
    reducer: Reducer[Any],
) -> None:
    leaves = Leaves()

    async def reduce(self: Any, state: State, states: AsyncIterator[Any]) -> State:
        seen = Stream([await states.__anext__(), await states.__anext__()])
        return state.update(out=[partial async for partial in reducer.over(seen)][-1])

    app = ask_all(leaves, [True, True] + [False] * 20, reduce, ["out"], Policy(order="submitted"))
    _, _, state = await app.arun()
    assert "out" in state
    assert len(leaves.started) > 2
    assert sorted(leaves.cleaned) == sorted(leaves.started)


async def test_partial_states_arrive_while_others_still_run() -> None:
    leaves = Leaves()
    fields = {"answers": collect("answer"), "best": top_k(1, "score")}
    app = ask_all(leaves, [True, True, False], reducing(**fields), ["answers", "best"])
    seen: list[dict[str, Any]] = []
    async with Runtime(), app.astream() as stream:
        async for event in stream:
            if isinstance(event, Partial):
                seen.append(event.changed)
            if len(seen) == 2:
                break
    assert seen == [{"answers": ["even"], "best": [0]}, {"answers": ["even", "odd"], "best": [1]}]
    assert sorted(leaves.cleaned) == [0, 1, 2]


async def test_reducing_within_ones_own_reduce() -> None:
    class AskAll(MapStates):
        reads = ("words",)
        writes = ("lengths",)

        def action(self, state: State, inputs: dict[str, Any]) -> Any:
            @action(reads=["word"], writes=["length"])
            async def measure(state: State) -> State:
                return state.update(length=len(state["word"]))

            return measure

        def states(self, state: State, context: Any, inputs: dict[str, Any]) -> Any:
            return (State().update(word=word) for word in state["words"])

        async def reduce(self, state: State, states: AsyncIterator[State]) -> Any:
            async for lengths in collect("length").over(states):
                yield state.update(lengths=lengths)

    app = ApplicationBuilder().with_actions(all=AskAll()).with_state(words=["a", "bb", "ccc"]).build()
    _, _, state = await app.arun()
    assert state["lengths"] == [1, 2, 3]


async def test_the_fields_of_different_branches_are_merged() -> None:
    @action(reads=["text"], writes=["title"])
    async def title(state: State) -> State:
        return state.update(title=state["text"].title())

    @action(reads=["text"], writes=["length"])
    async def length(state: State) -> State:
        return state.update(length=len(state["text"]))

    class Both(MapActions):
        reads = ("text",)
        writes = ("title", "length", "n")
        reduce = reducing(merge(), n=count())

        def actions(self, state: State, context: Any, inputs: dict[str, Any]) -> Any:
            return [title, length]

    app = ApplicationBuilder().with_actions(both=Both()).with_state(text="ab cd").build()
    _, _, state = await app.arun()
    assert (state["title"], state["length"], state["n"]) == ("Ab Cd", 5, 2)


@pytest.mark.parametrize("reducer", [first(), first_n(1), quorum(1), majority(among=1)])
async def test_leaving_a_fan_out_early_cancels_what_still_runs(reducer: Reducer[Any]) -> None:
    cleaned: list[str] = []

    async def at_once() -> str:
        return "done"

    async def never() -> str:
        try:
            await anyio.sleep_forever()
        finally:
            cleaned.append("never")
        return ""

    async with Runtime():
        shown = [partial async for partial in reducer.over(fan_out([never(), at_once()]))]
    assert shown in (["done"], [["done"]])
    assert cleaned == ["never"]


# -- misuse ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: reducing(), "nothing to reduce with"),
        (lambda: reducing(answers=collect), r"is not a Reducer; call it: collect\(...\)"),
        (lambda: group_by("topic", collect), "is not a Reducer; call it"),
        (lambda: combine("answer"), "is not a Reducer; for example"),
        (lambda: first_n(0), "n=0: at least 1"),
        (lambda: quorum(0), "k=0: at least 1"),
        (lambda: top_k(0), "k=0: at least 1"),
        (lambda: majority(among=0), "among=0: at least 1"),
        (lambda: group_by(len, groups=0), "groups=0: at least 1"),
        (lambda: collect(3), "says nothing about what to reduce"),
    ],
)
def test_misuse_is_refused_where_it_is_written(make: Any, message: str) -> None:
    with pytest.raises(MisuseError, match=message):
        make()


@pytest.mark.parametrize("reducer", [quorum(2), majority(), group_by(None)])
async def test_what_has_no_hash_is_refused(reducer: Reducer[Any]) -> None:
    with pytest.raises(MisuseError, match="a list has none"):
        await partials(reducer, [["a"]])


async def test_two_values_for_one_merged_field_are_refused() -> None:
    with pytest.raises(MisuseError, match="two subtasks wrote 'a': 1 and 2"):
        await partials(merge("a"), [State({"a": 1}), State({"a": 2})])
    assert await partials(merge("a"), [State({"a": 1}), State({"a": 1})]) == [{"a": 1}, {"a": 1}]


async def test_a_field_that_is_not_there_is_an_error_that_names_it() -> None:
    with pytest.raises(KeyError, match="state has no key 'answer'; it has: n"):
        await partials(collect("answer"), [State({"n": 1})])


# -- against plain Python ----------------------------------------------------------------------------------------

numbers = st.lists(st.integers(-1000, 1000), max_size=300)


@given(items=numbers, every=st.none() | st.integers(1, 7))
def test_partials_grow_from_prefix_to_prefix_up_to_the_whole(items: list[int], every: int | None) -> None:
    shown = run(collect(), items, every)
    assert shown[-1] == items
    assert all(partial == items[: len(partial)] for partial in shown)
    assert run(collect(by=abs), items, every)[-1] == sorted(items, key=abs)
    assert run(concat(str, separator=","), items, every)[-1] == ",".join(map(str, items))
    assert run(count(), items, every)[-1] == len(items)


@given(items=numbers, k=st.integers(1, 10))
def test_top_k_is_the_head_of_the_sorted_list(items: list[int], k: int) -> None:
    pairs = list(enumerate(items))
    best = sorted(pairs, key=lambda pair: pair[1], reverse=True)[:k]
    assert run(top_k(k, by=lambda pair: pair[1]), pairs)[-1] == best


@given(items=numbers, n=st.integers(1, 10))
def test_first_n_is_the_head_of_the_list(items: list[int], n: int) -> None:
    assert run(first_n(n), items)[-1] == items[:n]
    assert run(first(default=None), items)[-1] == (items[0] if items else None)


@given(items=st.lists(st.integers(-(10**6), 10**6) | st.floats(-1e6, 1e6), max_size=50))
def test_running_statistics_are_those_of_the_list(items: list[float]) -> None:
    got = run(statistics(), items)[-1]
    assert got.count == len(items)
    assert (got.min, got.max) == ((min(items), max(items)) if items else (None, None))
    if items:
        assert math.isclose(got.sum, math.fsum(items), abs_tol=1e-6)
        assert math.isclose(got.mean, math.fsum(items) / len(items), abs_tol=1e-6)
    if len(items) > 1:
        assert math.isclose(got.variance, plain.variance(map(float, items)), rel_tol=1e-6, abs_tol=1e-6)


@given(items=numbers)
def test_groups_are_those_of_a_dict_of_lists(items: list[int]) -> None:
    groups: dict[int, list[int]] = {}
    for item in items:
        groups.setdefault(item % 7, []).append(item)
    got = run(group_by(lambda n: n % 7, combine(all=collect(), n=count())), items)[-1]
    assert got == {group: {"all": of, "n": len(of)} for group, of in groups.items()}
    assert list(got) == list(groups)


@given(votes=st.lists(st.sampled_from("abc"), max_size=15), k=st.integers(1, 5))
def test_quorum_is_the_first_to_reach_it(votes: list[str], k: int) -> None:
    reached = next((v for i, v in enumerate(votes) if votes[: i + 1].count(v) == k), None)
    assert run(quorum(k), votes)[-1] == reached


@given(votes=st.lists(st.sampled_from("abcd") | st.none(), max_size=15))
def test_an_early_majority_is_the_final_one_and_as_early_as_can_be(votes: list[str | None]) -> None:
    """None stands for a failed subtask."""
    outcomes = [Failed(OSError()) if vote is None else Ok(vote) for vote in votes]
    all_votes = run(majority(), outcomes)
    stream = _Counted(outcomes)
    early = run(majority(among=len(votes) or 1), stream)
    assert early == all_votes[: len(early)]
    assert early[-1] == all_votes[-1]
    tally = Counter(vote for vote in votes if vote is not None)
    assert tally[all_votes[-1]] == max(tally.values(), default=0)
    # One item earlier, somebody else could still have won.
    before = [vote for vote in votes[: stream.taken - 1] if vote is not None]
    if before and stream.taken <= len(votes):
        (_, most), *others = Counter(before).most_common()
        assert (others[0][1] if others else 0) + len(votes) - stream.taken + 1 > most


class _Counted:
    def __init__(self, items: Iterable[Any]) -> None:
        self.items = iter(items)
        self.taken = 0

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> Any:
        item = next(self.items)
        self.taken += 1
        return item
