from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from actors.assignment import Assignment


def test_equally_loaded_replicas_take_turns():
    assignment = Assignment(3, limit=10)
    for request in "abcdef":
        assignment.submit(request)
    starts, stops = assignment.assign()
    assert starts == [("a", 0), ("b", 1), ("c", 2), ("d", 0), ("e", 1), ("f", 2)]
    assert stops == []


def test_turns_go_on_when_requests_come_one_by_one():
    assignment = Assignment(2, limit=10)
    replicas = []
    for request in "abcd":
        assignment.submit(request)
        [(_, replica)], _ = assignment.assign()
        replicas.append(replica)
        assignment.leave(request)
    assert replicas == [0, 1, 0, 1]


def test_a_request_goes_where_fewest_are_in_flight():
    assignment = Assignment(2, limit=10)
    for request in "abcd":
        assignment.submit(request)
    assignment.assign()
    assignment.leave("b")
    assignment.leave("d")
    assignment.submit("e")
    assert assignment.assign()[0] == [("e", 1)]


def test_what_finds_no_room_waits_in_order_of_arrival():
    assignment = Assignment(1, limit=1)
    for request in "abc":
        assignment.submit(request)
    assert assignment.assign()[0] == [("a", 0)]
    assert assignment.waiting == 2
    assignment.leave("a")
    assert assignment.assign()[0] == [("b", 0)]


def test_a_waiting_request_may_leave():
    assignment = Assignment(1, limit=1)
    for request in "abc":
        assignment.submit(request)
    assignment.assign()
    assignment.leave("b")
    assignment.leave("a")
    assert assignment.assign()[0] == [("c", 0)]


def test_without_a_replica_everything_that_waits_is_stopped():
    assignment = Assignment(1, limit=1)
    assignment.submit("a")
    assignment.submit("b")
    assignment.assign()
    assignment.lose(0)
    assert assignment.assign() == ([], ["b"])
    assignment.leave("a")
    assert assignment.waiting == 0


actions = st.lists(
    st.one_of(
        st.just(("submit", 0)),
        st.tuples(st.just("leave"), st.integers(0, 40)),
        st.tuples(st.just("lose"), st.integers(0, 3)),
    ),
    max_size=80,
)


@given(actions=actions, limit=st.integers(1, 3))
def test_no_replica_is_over_its_limit_nothing_is_lost_and_nobody_overtakes(actions, limit):
    assignment = Assignment(4, limit=limit)
    live = set(range(4))
    submitted: list[str] = []
    placed: dict[str, int] = {}
    gone: set[str] = set()
    for action, number in actions:
        match action:
            case "submit":
                submitted.append(f"r{len(submitted)}")
                assignment.submit(submitted[-1])
            case "leave" if submitted:
                request = submitted[number % len(submitted)]
                assignment.leave(request)
                gone.add(request)
                placed.pop(request, None)
            case "lose":
                assignment.lose(number)
                live.discard(number)
        waiting_before = [r for r in submitted if r not in gone and r not in placed]
        starts, stops = assignment.assign()
        assert [r for r, _ in starts] + stops == waiting_before[: len(starts) + len(stops)]
        for request, replica in starts:
            assert replica in live
            placed[request] = replica
        gone.update(stops)
        loads = Counter(replica for replica in placed.values() if replica in live)
        assert all(load <= limit for load in loads.values())
        waiting = [r for r in submitted if r not in gone and r not in placed]
        assert assignment.waiting == len(waiting)
        if waiting:
            assert live
            assert all(loads[replica] == limit for replica in live)
