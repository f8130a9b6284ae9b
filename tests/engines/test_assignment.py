"""PoolCore alone: no engines, no event loop, no clock."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.members.supervision import Backoff, Supervisor
from actors.pools.affinity import Homes, prefix_keys
from actors.pools.assignment import PoolCore
from actors.pools.pool_actions import Fail, Start, StartReplica, StopReplica
from actors.pools.waiting import WaitingLine
from actors.requests import to_prompt
from arun.errors import PoolBusy

AT_ONCE = Supervisor(intensity=1000, backoff=Backoff(first=0, cap=0))


def opened(replicas=2, **options):
    core = PoolCore(**{"supervisor": AT_ONCE, **options})
    for action in core.scale(replicas):
        core.replica_ready(action.replica, action.generation)
    core.check()
    return core


def where(actions):
    return [(action.request, action.replica) for action in actions if isinstance(action, Start)]


def lose(core, replica, generation=1, now=0.0):
    """A replica dies, its streams are read to their ends, it is stopped and comes back."""
    running = [id_ for id_, entry in core._requests.items() if entry.replica is core._replicas[replica]]
    actions = list(core.replica_lost(replica, generation, "killed"))
    for request in running:
        actions += core.cut(request, core._requests[request].epoch)
        core.check()
    assert StopReplica(replica, generation, True, "killed") in actions
    actions += core.replica_stopped(replica, generation, now)
    core.check()
    for action in list(actions):
        if isinstance(action, StartReplica):
            actions += core.replica_ready(action.replica, action.generation)
    core.check()
    return actions


# -- routing -----------------------------------------------------------------------------------------


def test_equally_loaded_replicas_take_turns():
    core = opened(3)
    assert [where(core.submit(request)) for request in "abcd"] == [[("a", 0)], [("b", 1)], [("c", 2)], [("d", 0)]]


def test_turns_go_on_when_requests_come_one_by_one():
    core = opened(2)
    replicas = []
    for request in "abcd":
        [(_, replica)] = where(core.submit(request))
        replicas.append(replica)
        core.leave(request)
    assert replicas == [0, 1, 0, 1]


def test_a_request_goes_where_fewest_are_in_flight():
    core = opened(2)
    for request in "abcd":
        core.submit(request)
    core.leave("b")
    core.leave("d")
    assert where(core.submit("e")) == [("e", 1)]


def test_what_a_replica_reports_of_other_clients_counts():
    core = opened(2)
    core.submit("a")
    core.delta("a", 0, 1, load=5)
    assert [where(core.submit(request)) for request in "bcde"] == [[("b", 1)], [("c", 1)], [("d", 1)], [("e", 1)]]
    core.report(0, 1, 1, 0)
    assert where(core.submit("f")) == [("f", 0)]


def test_a_shared_beginning_goes_to_the_replica_that_served_it_unless_that_is_much_busier():
    core = opened(2, affinity_margin=2)
    keys = prefix_keys("x" * 600)
    assert where(core.submit("a", prefix=keys)) == [("a", 0)]
    assert [where(core.submit(request, prefix=keys))[0][1] for request in "bcd"] == [0, 0, 1]
    assert core.prefix_hits == 2


def test_what_a_replica_knew_is_gone_with_it():
    core = opened(2)
    keys = prefix_keys("x" * 600)
    core.submit("a", prefix=keys)
    core.leave("a")
    lose(core, 0)
    core.submit("b")
    assert where(core.submit("c", prefix=keys)) == [("c", 0)]  # its turn, not its home
    assert core.prefix_hits == 0


def test_keys_of_a_prompt_are_those_of_its_beginnings():
    text = "".join(chr(97 + number % 26) for number in range(1000))
    assert prefix_keys(text) == (*prefix_keys(text[:700]), prefix_keys(text)[2])
    assert prefix_keys("short") == prefix_keys(list(range(10))) == ()
    assert len(prefix_keys(list(range(200)))) == 3
    assert len(prefix_keys("x" * 1_000_000)) == 64
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert prefix_keys(to_prompt(turns))[:1] == prefix_keys(to_prompt(turns[:1]))


def test_homes_forget_what_was_not_used_for_longest():
    homes = Homes(3)
    homes.served((1, 2), 0, 1)
    homes.served((3,), 1, 1)
    homes.served((1, 4), 2, 1)
    assert len(homes) == 3
    assert [list(homes.find([key])) for key in (1, 2, 3, 4)] == [[(2, 1)], [], [(1, 1)], [(2, 1)]]


# -- waiting -----------------------------------------------------------------------------------------


def test_lanes_and_priorities_decide_who_is_next():
    line = WaitingLine()
    for arrival, (request, lane, priority) in enumerate([
        ("b1", "batch", 0),
        ("i1", "interactive", 1),
        ("i2", "interactive", 0),
        ("b2", "batch", -1),
        ("i3", "interactive", 0),
    ]):
        line.add(request, lane, priority, arrival)
    assert (line.in_lane("interactive"), line.in_lane("batch")) == (3, 2)
    line.remove("i3")
    line.remove("i3")
    assert [line.next() for _ in range(5)] == ["i2", "i1", "b2", "b1", None]


def test_a_batch_request_is_not_starved():
    line = WaitingLine()
    for number in range(20):
        line.add(f"b{number}", "batch", 0, number)
        line.add(f"i{number}", "interactive", 0, 100 + number)
    order = [line.next() for _ in range(16)]
    assert [request for request in order if request.startswith("b")] == ["b0", "b1"]
    assert order[7] == "b0"


def test_those_who_left_do_not_pile_up_behind_who_stays():
    line = WaitingLine()
    line.add("stays", "interactive", -1, 0)
    for number in range(10_000):
        line.add(f"r{number}", "interactive", 0, number)
        line.remove(f"r{number}")
    assert len(line) == 1
    assert len(line._heaps["interactive"]) < 100


def test_more_than_max_waiting_are_refused_with_the_numbers():
    core = opened(1, limit=1, max_waiting=2)
    for request in "abc":
        core.submit(request)
    with pytest.raises(PoolBusy, match="2 requests wait already, 1 are in flight on 1 replicas that take 1 each"):
        core.submit("d")
    core.check()
    core.leave("a")
    core.submit("d")
    assert core.waiting == 2


def test_what_a_lost_replica_gives_back_is_not_refused_and_goes_first():
    core = opened(1, limit=2, max_waiting=1)
    for request in "abc":
        core.submit(request)
    actions = lose(core, 0)
    assert where(actions) == [("a", 0), ("b", 0)]
    with pytest.raises(PoolBusy):
        core.submit("d")


# -- losses ------------------------------------------------------------------------------------------


def test_a_request_goes_on_elsewhere_after_the_tokens_that_were_delivered():
    core = opened(2)
    core.submit("a")
    assert core.delta("a", 0, 1)
    actions = core.replica_lost(0, 1, "killed")
    assert actions == [StopReplica(0, 1, True, "killed")]
    assert core.delta("a", 0, 2)  # had arrived before the end
    assert core.cut("a", 0) == [Start("a", 1, 1, epoch=1, resume_from=3)]
    assert not core.delta("a", 0, 1)
    assert core.delta("a", 1, 1)
    assert (core.dead_letters, core.reroutes) == (1, 1)


def test_what_can_not_be_continued_fails_or_begins_anew_or_has_not_begun():
    core = opened(1)
    for request, reroute in (("fails", "continue"), ("again", "restart"), ("young", "continue"), ("never", "never")):
        core.submit(request, resumable=False, reroute=reroute)
    for request in ("fails", "again"):
        core.delta(request, 0, 4)
    actions = lose(core, 0)
    assert Fail("fails", "replica_lost", 1) in actions
    assert Fail("never", "replica_lost", 1) in actions
    [again] = [action for action in actions if isinstance(action, Start) and action.request == "again"]
    assert (again.epoch, again.resume_from, again.again) == (1, 0, True)
    young = [action for action in actions if isinstance(action, Start) and action.request == "young"]
    assert [(start.resume_from, start.again) for start in young] == [(0, False)]


def test_an_answer_that_arrived_whole_is_not_lost_with_its_replica():
    core = opened(1)
    core.submit("a", resumable=False)
    core.replica_lost(0, 1)
    assert core.delta("a", 0, 5)
    assert core.leave("a") == []
    core.check()


def test_a_request_that_is_alone_whenever_replicas_are_lost_is_quarantined_at_the_second():
    core = opened(2)
    core.submit("bad")
    assert where(lose(core, 0)) == [("bad", 1)]
    assert Fail("bad", "quarantined", 2) in lose(core, 1)
    assert core.quarantined == 1


def test_those_near_a_bad_request_are_tried_alone_and_not_quarantined_with_it():
    core = opened(1)
    for request in ("bad", "x", "y"):
        core.submit(request)
    lose(core, 0, 1)
    actions = lose(core, 0, 2)  # now all three are suspects
    assert where(actions) == [("bad", 0)]
    core.submit("new")
    assert core.in_flight(0) == 1
    actions = lose(core, 0, 3)
    assert Fail("bad", "quarantined", 3) in actions
    core.leave("bad")
    assert where(actions) == [("x", 0)]
    assert where(core.leave("x")) == [("y", 0)]
    assert where(core.leave("y")) == [("new", 0)]


def test_the_budget_decides_whether_a_replica_comes_back():
    core = opened(1, supervisor=Supervisor(intensity=2, period=10, backoff=Backoff(first=1, factor=2, cap=9)))
    core.submit("a")
    core.replica_lost(0, 1, "killed")
    assert core.replica_stopped(0, 1, 100.0) == []
    core.cut("a", 0)
    assert (core.state(0), core.due()) == ("waiting", 101.0)
    assert core.tick(100.9) == []
    assert core.tick(101.0) == [StartReplica(0, 2)]
    assert core.replica_lost(0, 2, "no memory") == [StopReplica(0, 2, True, "no memory")]
    assert core.replica_stopped(0, 2, 101.5) == []
    assert core.tick(103.5) == [StartReplica(0, 3)]
    core.replica_lost(0, 3, "no memory")
    assert core.replica_stopped(0, 3, 104.0) == [Fail("a", "no_replica", 1)]
    assert core.state(0) == "dead"
    assert core.given_up[0].startswith("no memory; it is not started again: it was restarted 2 times")
    assert core.leave("a") == []
    assert core.submit("b") == [Fail("b", "no_replica", 0)]
    core.check()


def test_late_news_of_an_older_generation_changes_nothing():
    core = opened(1)
    lose(core, 0)
    assert core.replica_lost(0, 1) == []
    assert core.replica_stopped(0, 1, 9.0) == []
    assert core.replica_ready(0, 1) == []
    assert core.state(0) == "ready"


# -- the watchdog ------------------------------------------------------------------------------------


def ticks(core, seconds, start=0.0):
    actions = []
    now = start
    while now <= start + seconds:
        actions += core.tick(now)
        now += 1.0
    return actions


def test_a_replica_that_sends_nothing_while_somebody_waits_is_lost():
    core = opened(2, watchdog=8.0)
    core.submit("a")
    core.hungry("a")
    assert ticks(core, 7) == []
    assert core.tick(8.0) == [StopReplica(0, 1, True, "it sent nothing for 8 s while requests waited for it")]


def test_a_slow_consumer_is_no_reason():
    core = opened(1, watchdog=8.0)
    core.submit("a")
    core.hungry("a")
    core.delta("a", 0, 1)
    assert ticks(core, 100) == []


def test_a_replica_that_serves_others_is_not_silent():
    core = opened(1, watchdog=8.0)
    core.submit("a")
    core.submit("b")
    core.hungry("a")
    for second in range(100):
        core.delta("b", 0, 1)
        assert core.tick(float(second)) == []


def test_a_replica_that_reports_tokens_is_not_silent():
    core = opened(1, watchdog=8.0)
    core.submit("a")
    core.hungry("a")
    for second in range(100):
        core.report(0, 1, 1, tokens=second // 5)
        assert core.tick(float(second)) == []
    actions = []
    for second in range(100, 120):
        core.report(0, 1, 1, tokens=19)
        actions += core.tick(float(second))
    assert [type(action) for action in actions] == [StopReplica]


def test_a_program_that_stood_still_blames_nobody():
    core = opened(1, watchdog=8.0)
    core.submit("a")
    core.hungry("a")
    ticks(core, 3)
    assert core.tick(10_000.0) == []


def test_nothing_is_due_while_nothing_is_in_flight():
    core = opened(1, watchdog=8.0)
    assert core.due() is None
    core.submit("a")
    assert core.due() == 1.0
    core.leave("a")
    assert core.due() is None


# -- drain and scale ---------------------------------------------------------------------------------


def test_a_drained_replica_gets_no_more_and_stops_when_it_has_none():
    core = opened(2)
    core.submit("a")
    assert core.drain(0) == []
    assert where(core.submit("b")) == [("b", 1)]
    assert core.leave("a") == [StopReplica(0, 1, False)]
    assert core.replica_stopped(0, 1, 0.0) == []
    assert core.state(0) is None


def test_a_drained_replica_that_is_lost_is_not_started_again_and_its_requests_go_on():
    core = opened(2)
    core.submit("a")
    core.drain(0)
    assert core.replica_lost(0, 1) == [StopReplica(0, 1, False)]
    assert core.replica_stopped(0, 1, 0.0) == []
    assert where(core.cut("a", 0)) == [("a", 1)]


def test_scaling_down_drains_the_latest_and_up_starts_new_ones():
    core = opened(3)
    for request in "abc":
        core.submit(request)
    assert core.scale(1) == []
    assert [core.state(number) for number in range(3)] == ["ready", "draining", "draining"]
    assert core.scale(2) == [StartReplica(3, 1)]
    assert core.leave("c") == [StopReplica(2, 1, False)]


def test_scaling_replaces_what_was_given_up():
    core = opened(2, supervisor=Supervisor(intensity=0))
    core.replica_lost(0, 1, "killed")
    core.replica_stopped(0, 1, 0.0)
    assert core.state(0) == "dead"
    assert core.scale(2) == [StopReplica(0, 1, False), StartReplica(2, 1)]
    core.replica_stopped(0, 1, 0.0)
    assert (core.state(0), core.given_up) == (None, {})


def test_a_replica_that_is_still_starting_may_be_drained():
    core = PoolCore()
    [start] = core.scale(1)
    core.submit("a")
    assert core.drain(0) == [StopReplica(0, 1, False), Fail("a", "no_replica", 0)]
    assert core.replica_ready(0, start.generation) == []


# -- universes ---------------------------------------------------------------------------------------


class World:
    """Replicas and consumers as simple as can be, driven in an order that hypothesis draws."""

    def __init__(self, core):
        self.core = core
        self.now = 0.0
        self.alive: dict[int, int] = {}  # replica: generation that serves
        self.starting: list[StartReplica] = []
        self.stopping: list[StopReplica] = []
        self.streams: dict[str, Start] = {}
        self.broken: dict[str, Start] = {}
        self.delivered: dict[str, list[int]] = {}
        self.losses: dict[str, int] = {}
        self.ended: dict[str, str] = {}
        self.do(core.scale(2))

    def do(self, actions):
        for action in actions:
            match action:
                case Start():
                    assert self.alive.get(action.replica) == action.generation
                    assert action.request not in self.streams
                    assert action.request not in self.ended
                    tokens = self.delivered[action.request]
                    if action.again:
                        tokens.clear()
                    assert action.resume_from == len(tokens)
                    self.streams[action.request] = action
                case Fail():
                    self.ended[action.request] = action.reason
                    self.do(self.core.leave(action.request))
                case StartReplica():
                    assert action.replica not in self.alive
                    assert not any(stop.replica == action.replica for stop in self.stopping)
                    self.starting.append(action)
                case StopReplica():
                    if self.alive.get(action.replica) == action.generation:
                        self.kill(action.replica)
                    self.starting = [start for start in self.starting if start.replica != action.replica]
                    self.stopping.append(action)
        self.core.check()

    def kill(self, replica):
        del self.alive[replica]
        for request, start in list(self.streams.items()):
            if start.replica == replica:
                self.broken[request] = self.streams.pop(request)
                self.losses[request] += 1

    def submit(self, request, draw):
        self.delivered[request], self.losses[request] = [], 0
        try:
            self.do(
                self.core.submit(
                    request,
                    lane=draw(st.sampled_from(["interactive", "batch"])),
                    resumable=draw(st.booleans()),
                    reroute=draw(st.sampled_from(["continue", "restart", "never"])),
                )
            )
        except PoolBusy:
            self.ended[request] = "refused"

    def token(self, request):
        start, tokens = self.streams[request], self.delivered[request]
        self.core.hungry(request)
        assert self.core.delta(request, start.epoch, 1)
        tokens.append(len(tokens))
        if len(tokens) == 4:
            self.streams.pop(request)
            self.ended[request] = "finished"
            self.do(self.core.leave(request))

    def step(self, what, number):
        def pick(things):
            things = list(things)
            return things[number % len(things)] if things else None

        if what == "token" and (request := pick(self.streams)):
            self.token(request)
        elif what == "leave" and (request := pick([*self.streams, *self.broken])):
            self.streams.pop(request, None), self.broken.pop(request, None)
            self.ended[request] = "left"
            self.do(self.core.leave(request))
        elif what == "kill" and (replica := pick(self.alive)) is not None:
            generation = self.alive[replica]
            self.kill(replica)
            self.do(self.core.replica_lost(replica, generation, "killed"))
        elif what == "cut" and (request := pick(self.broken)):
            self.do(self.core.cut(request, self.broken.pop(request).epoch))
        elif what == "started" and (start := pick(self.starting)):
            self.starting.remove(start)
            self.alive[start.replica] = start.generation
            self.do(self.core.replica_ready(start.replica, start.generation))
        elif what == "failed" and (start := pick(self.starting)):
            self.starting.remove(start)
            self.do(self.core.replica_lost(start.replica, start.generation, "no memory"))
        elif what == "stopped" and (stop := pick(self.stopping)):
            self.stopping.remove(stop)
            self.do(self.core.replica_stopped(stop.replica, stop.generation, self.now))
        elif what == "tick":
            self.now += number / 4
            self.do(self.core.tick(self.now))
        elif what == "drain" and (replica := pick(self.alive)) is not None:
            self.do(self.core.drain(replica))
        elif what == "scale":
            self.do(self.core.scale(1 + number % 3))


STEPS = ["token"] * 6 + ["submit"] * 4 + ["started", "stopped", "cut", "tick"] * 3 + ["kill", "kill", "leave"]
STEPS += ["failed", "drain", "scale"]


@settings(max_examples=300, deadline=None)
@given(data=st.data(), steps=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 12)), max_size=150))
def test_whatever_happens_every_request_ends_with_its_tokens_in_order(data, steps):
    supervisor = Supervisor(intensity=20, period=5.0, backoff=Backoff(first=0.5, cap=2.0))
    core = PoolCore(limit=2, max_waiting=5, supervisor=supervisor, watchdog=1000.0)
    world = World(core)
    for count, (what, number) in enumerate(steps):
        if what == "submit":
            world.submit(f"r{count}", data.draw)
        else:
            world.step(what, number)
    # From now on nothing fails, and everybody must get somewhere.
    for _ in range(10_000):
        if not core._requests and not world.stopping:
            break
        for what in ("stopped", "started", "cut", "tick", "token"):
            world.step(what, 8)
    assert set(world.ended) == set(world.delivered)
    for request, how in world.ended.items():
        tokens = world.delivered[request]
        assert tokens == list(range(len(tokens)))
        assert how != "quarantined" or world.losses[request] >= 2
        assert how != "finished" or len(tokens) == 4
    assert core.waiting == core.dead_letters == 0
