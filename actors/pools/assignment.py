"""PoolCore: every decision of an engine pool. Plain state: no I/O, no clock, no random numbers.

Theory of operation
-------------------

A *request* waits, runs on a replica, waits again after that was lost, and ends. Each start is an *epoch* of
the request, from 0. A *replica* is a place for an engine; each engine in it is a *generation*, from 1::

    request:   waiting --Start--> running --cut()--> waiting | Fail
               and from each of these  --leave()--> ended

    replica:   starting --replica_ready()--> ready --drain()--> draining --StopReplica--> stopping --> gone
               any of these --replica_lost()--> stopping --replica_stopped()--> waiting --tick()--> starting
                                                                    or dead, when the budget is used up
               waiting, dead --drain()--> StopReplica --> stopping --> gone

The shell tells what happened by calling the inputs and does what the returned actions say, in their order.
Inputs that come late (an older epoch, an older generation, a request or replica that is no more) change nothing.

A loss has two steps, because what a replica has sent before its end may still lie unread at this side.
``replica_lost()`` says that it serves no more; ``cut()`` says for one request that its stream is read to the
end without an end of the answer. So a delivered token is never asked for again, and an answer that has arrived
whole is not lost.

Invariants, which :meth:`PoolCore.check` asserts as far as they show in the state, hold after every input:

1. A request that was submitted and has not left is in one place: in the waiting line, among the suspects,
   running, or failed (told by one Fail; it is then only to leave). It waits only while there is no room.
2. A replica has at most ``limit`` requests that are not cut, all started in its present generation; only a
   ready or draining replica has any, and only a ready one is given any.
3. The epochs of a request are 0, 1, 2, ... A delta of another epoch than the running one is a dead letter:
   counted, not delivered.
4. ``Start.resume_from`` is the number of tokens delivered before it, or 0 with ``again=True`` where the
   request asked for that instead of being continued. So tokens are neither lost nor doubled.
5. What can't be continued is never started again after a delta, unless it asked for ``reroute="restart"``;
   what asked for ``reroute="never"`` is never started twice.
6. Of two waiting requests in one lane, the one of lower priority goes first, then the earlier; while both lanes
   wait, every eighth start is a ``batch`` one and the others are ``interactive``.
7. A request that was running on ``quarantine`` replicas when they were lost is a *suspect*: it is started only
   alone on a replica, which takes no other request meanwhile. If that replica is lost too, the request was
   the reason: it is failed and never started again. So requests that were only near a bad one are not taken
   for it; one that was alone all the time is failed at the ``quarantine``-th loss.
8. A replica is started again only after it was stopped, only as often as its supervisor allows, never before
   its back-off is over, and never when it was draining. At most one of its generations is not stopped. The last
   StopReplica of each replica, and no other, is one without ``restart``, which gives its place back.
9. When no replica serves or will serve again, whatever waits is failed. So with a shell that answers
   StartReplica and StopReplica, cuts what is broken, and ticks at :meth:`PoolCore.due`, every request ends.
10. At most ``max_waiting`` requests wait that were never started; more are refused by PoolBusy. What a lost
    replica gives back is never refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from actors.members.supervision import GiveUp, Supervisor
from actors.pools.affinity import Homes
from actors.pools.pool_actions import Action, Fail, FailReason, Start, StartReplica, StopReplica
from actors.pools.pool_state import ReplicaEntry, RequestEntry, Reroute, State
from actors.pools.waiting import WaitingLine
from actors.requests import Lane
from arun.errors import PoolBusy

__all__ = ("PoolCore",)

_HOMES = 16_384
_SUPERVISOR = Supervisor()


class PoolCore:
    """Which request starts where, is continued, is failed; which replica is started, stopped, given up.

    :param limit: most requests of ours that one replica has at a time.
    :param max_waiting: most requests that wait for their first start.
    :param supervisor: how often a replica is started again, and how soon.
    :param watchdog: seconds. A replica that sends no delta and reports no token for so long, while consumers wait for
        one, is lost. Of the time between two ticks at most a quarter of this counts, so a program that stood still
        blames nobody.
    :param quarantine: lost replicas that make a request a suspect.
    :param affinity_margin: how many requests more than the least loaded one a replica may have and still be chosen for
        what it has in its cache.
    """

    def __init__(
        self,
        *,
        limit: int = 256,
        max_waiting: int = 4096,
        supervisor: Supervisor = _SUPERVISOR,
        watchdog: float = 60.0,
        quarantine: int = 2,
        affinity_margin: int = 8,
    ) -> None:
        self._limit = limit
        self._max_waiting = max_waiting
        self._supervisor = supervisor
        self._watchdog = watchdog
        self._quarantine = quarantine
        self._margin = affinity_margin
        self._replicas: dict[int, ReplicaEntry] = {}
        self._requests: dict[str, RequestEntry] = {}
        self._line = WaitingLine()
        self._new_waiting = 0
        self._suspects: deque[RequestEntry] = deque()
        self._homes = Homes(_HOMES)
        self._next_replica = 0
        self._arrivals = 0
        self._turn = 0
        self._now = 0.0
        #: deltas of an older epoch, or of a request that is no more
        self.dead_letters = 0
        #: starts of a request beyond its first
        self.reroutes = 0
        #: starts on a replica that had served the beginning of the prompt
        self.prefix_hits = 0
        #: requests that were failed because they were the reason for losses
        self.quarantined = 0
        #: replicas that were started again
        self.restarts = 0
        #: causes of the replicas that were given up, by number
        self.given_up: dict[int, str] = {}

    # -- what is the case ----------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Requests that no replica has room for yet."""
        return len(self._line) + len(self._suspects)

    def waiting_in(self, lane: Lane) -> int:
        """Those of one lane."""
        return self._line.in_lane(lane) + sum(request.lane == lane for request in self._suspects)

    def state(self, replica: int) -> State | None:
        """Of one replica; None when it is no more."""
        known = self._replicas.get(replica)
        return None if known is None else known.state

    def in_flight(self, replica: int) -> int:
        """Requests of ours that one replica has."""
        known = self._replicas.get(replica)
        return 0 if known is None else len(known.requests)

    def due(self) -> float | None:
        """When to tick next, on the clock of the ``now`` that was passed in; None: when something has happened."""
        due = [replica.restart_at for replica in self._replicas.values() if replica.state == "waiting"]
        if any(replica.requests for replica in self._replicas.values()):
            due.append(self._now + self._watchdog / 8)
        return min(due, default=None)

    # -- requests ------------------------------------------------------------------------------------

    def submit(
        self,
        request: str,
        *,
        lane: Lane = "interactive",
        priority: int = 0,
        prefix: Sequence[int] = (),
        resumable: bool = True,
        reroute: Reroute = "continue",
    ) -> list[Action]:
        """A request has come.

        :param request: its id, of no other request that has not left.
        :param prefix: keys of the beginnings of its prompt, shortest first; see :mod:`actors.pools.affinity`.
        :param resumable: whether it may be continued by another replica after deltas were delivered.
        :param reroute: what else to do: fail (``"continue"``), or begin anew (``"restart"``); ``"never"`` fails always.
        :raises PoolBusy: too many wait; nothing has changed.
        """
        assert request not in self._requests, f"request {request!r} is known already"
        if self._new_waiting >= self._max_waiting and not self._open(self._ward()):
            in_flight = sum(len(replica.requests) for replica in self._replicas.values())
            raise PoolBusy(
                f"{self._new_waiting} requests wait already, {in_flight} are in flight on {len(self._replicas)} "
                f"replicas that take {self._limit} each; try again later, raise max_waiting, or add replicas"
            )
        self._arrivals += 1
        entry = RequestEntry(request, self._arrivals, lane, priority, prefix, resumable, reroute)
        self._requests[request] = entry
        self._wait(entry)
        return self._assign()

    def hungry(self, request: str) -> None:
        """The consumer of a request waits for a delta. The next delta ends that."""
        entry = self._requests.get(request)
        if entry is not None:
            entry.hungry = True

    def delta(self, request: str, epoch: int, tokens: int, load: int | None = None) -> bool:
        """A delta is about to be delivered.

        :param tokens: how many it has.
        :param load: requests that its replica has in all, those of other clients included.
        :return: whether to deliver it; if not, it is a dead letter.
        """
        entry = self._requests.get(request)
        if entry is None or entry.epoch != epoch or not entry.running:
            self.dead_letters += 1
            return False
        entry.hungry = False
        entry.out = True
        entry.delivered += tokens
        replica = entry.replica
        if replica is not None:
            replica.progressed = True
            if load is not None:
                replica.foreign = max(0, load - len(replica.requests))
        return True

    def cut(self, request: str, epoch: int) -> list[Action]:
        """The stream of a request is read to its end, and the answer is not complete."""
        entry = self._requests.get(request)
        if entry is None or entry.epoch != epoch or not entry.running:
            return []
        self._release(entry)
        actions = self._stop_drained()
        if entry.losses >= self._quarantine and entry.alone:
            self.quarantined += 1
            actions.append(self._fail(entry, "quarantined"))
        elif entry.reroute == "never" or (entry.out and not entry.resumable and entry.reroute != "restart"):
            actions.append(self._fail(entry, "replica_lost"))
        else:
            self._wait(entry)
        return actions + self._assign()

    def leave(self, request: str) -> list[Action]:
        """A request has ended: complete, failed, or its consumer has left. Told twice, it counts once."""
        entry = self._requests.pop(request, None)
        if entry is None:
            return []
        if request in self._line:
            self._line.remove(request)
            self._new_waiting -= entry.epoch < 0
        elif entry in self._suspects:
            self._suspects.remove(entry)
        self._release(entry)
        return [*self._stop_drained(), *self._assign()]

    # -- replicas ------------------------------------------------------------------------------------

    def scale(self, replicas: int) -> list[Action]:
        """Have so many replicas. Those given up are forgotten; those too many are drained, the latest first."""
        actions: list[Action] = []
        for number in [number for number, replica in self._replicas.items() if replica.state == "dead"]:
            actions += self.drain(number)
        self.given_up.clear()
        serving = [replica for replica in self._replicas.values() if self._will_serve(replica)]
        for _ in range(replicas - len(serving)):
            replica = ReplicaEntry(self._next_replica, self._supervisor)
            self._next_replica += 1
            self._replicas[replica.number] = replica
            actions.append(StartReplica(replica.number, replica.generation))
        # First those that serve nobody now, then the latest.
        serving.sort(key=lambda replica: (replica.state == "ready", -replica.number))
        for replica in serving[: max(0, len(serving) - replicas)]:
            actions += self.drain(replica.number)
        return [*actions, *self._assign()]

    def drain(self, replica: int) -> list[Action]:
        """Give a replica no more requests, and stop it when it has none."""
        known = self._replicas.get(replica)
        if known is None:
            return []
        known.restart = False
        if known.state == "ready":
            known.state = "draining"
        elif known.state in {"starting", "waiting", "dead"}:
            return [self._stop(known), *self._assign()]
        return [*self._stop_drained(), *self._assign()]

    def replica_ready(self, replica: int, generation: int) -> list[Action]:
        """A replica that was to start can serve."""
        known = self._of_generation(replica, generation)
        if known is None or known.state != "starting":
            return []
        known.state = "ready"
        return self._assign()

    def replica_lost(self, replica: int, generation: int, cause: str = "") -> list[Action]:
        """A replica failed, to start or to serve. Told several times, it counts once."""
        known = self._of_generation(replica, generation)
        if known is None or known.state not in {"starting", "ready", "draining"}:
            return []
        return [self._lose(known, cause), *self._assign()]

    def report(self, replica: int, generation: int, load: int, tokens: int) -> None:
        """A replica says how many requests it has in all, and how many tokens it has generated."""
        known = self._of_generation(replica, generation)
        if known is not None:
            known.foreign = max(0, load - len(known.requests))
            if tokens != known.tokens:
                known.tokens, known.progressed = tokens, True

    def replica_stopped(self, replica: int, generation: int, now: float) -> list[Action]:
        """What StopReplica asked for is done: nothing of that generation runs any more."""
        known = self._of_generation(replica, generation)
        if known is None or known.state != "stopping":
            return []
        if not known.restart:
            if known.place_kept:  # drained while it was being stopped for a restart
                return [self._stop(known), *self._assign()]
            del self._replicas[replica]
            return self._assign()
        verdict = known.restarts.died(now)
        if isinstance(verdict, GiveUp):
            known.state = "dead"
            self.given_up[replica] = f"{known.cause}; it is not started again: {verdict.reason}"
            return self._assign()
        known.state, known.restart_at = "waiting", verdict.at
        return self._restart(known, now)

    def tick(self, now: float) -> list[Action]:
        """Time has passed: start what waited for it, and give up what is silent for too long.

        :param now: seconds; never less than in an earlier input.
        """
        passed = min(now - self._now, self._watchdog / 4)
        self._now = now
        actions: list[Action] = []
        for replica in list(self._replicas.values()):
            if replica.state == "waiting":
                actions += self._restart(replica, now)
            elif replica.progressed or not any(entry.hungry for entry in replica.requests.values()):
                replica.progressed, replica.silent = False, None
            elif replica.silent is None:
                replica.silent = 0.0  # counted from now: who knows when the last tick was
            else:
                replica.silent += passed
                if replica.silent >= self._watchdog:
                    actions.append(
                        self._lose(replica, f"it sent nothing for {replica.silent:.3g} s while requests waited for it")
                    )
        return [*actions, *self._assign()]

    # -- decisions -----------------------------------------------------------------------------------

    def _assign(self) -> list[Action]:
        if not self.waiting:
            return []
        if not any(map(self._will_serve, self._replicas.values())):
            return self._fail_waiting()
        actions: list[Action] = []
        while (ward := self._ward()) is not None and not ward.requests:
            actions.append(self._start(self._suspects.popleft(), ward))
            ward.suspect = True
        open_ = self._open(ward)
        while open_ and (request := self._line.next()) is not None:
            entry = self._requests[request]
            self._new_waiting -= entry.epoch < 0
            replica = self._choose(entry, open_)
            actions.append(self._start(entry, replica))
            if len(replica.requests) >= self._limit:
                open_.remove(replica)
        return actions

    def _choose(self, entry: RequestEntry, among: Sequence[ReplicaEntry]) -> ReplicaEntry:
        least = min(among, key=lambda replica: (replica.load, replica.number < self._turn, replica.number))
        for number, generation in self._homes.find(entry.prefix):
            home = self._of_generation(number, generation)
            if home in among and home is not None and home.load <= least.load + self._margin:
                self.prefix_hits += 1
                return home
        self._turn = least.number + 1
        return least

    def _start(self, entry: RequestEntry, replica: ReplicaEntry) -> Start:
        again = entry.out and not entry.resumable
        if again:
            entry.delivered, entry.out = 0, False
        if not replica.requests:
            replica.progressed, replica.silent = False, None
        entry.epoch += 1
        self.reroutes += entry.epoch > 0
        entry.running, entry.hungry, entry.replica = True, False, replica
        replica.requests[entry.id] = entry
        if entry.prefix:
            self._homes.served(entry.prefix, replica.number, replica.generation)
        return Start(entry.id, replica.number, replica.generation, entry.epoch, entry.delivered, again)

    def _wait(self, entry: RequestEntry) -> None:
        if entry.losses >= self._quarantine:
            self._suspects.append(entry)
        else:
            self._line.add(entry.id, entry.lane, entry.priority, entry.arrival)
            self._new_waiting += entry.epoch < 0

    def _release(self, entry: RequestEntry) -> None:
        entry.running = False
        replica, entry.replica = entry.replica, None
        if replica is not None:
            del replica.requests[entry.id]
            replica.suspect = False

    def _fail(self, entry: RequestEntry, reason: FailReason) -> Fail:
        entry.failed = True
        return Fail(entry.id, reason, entry.losses)

    def _fail_waiting(self) -> list[Action]:
        failed: list[Action] = [self._fail(entry, "no_replica") for entry in self._suspects]
        self._suspects.clear()
        while (request := self._line.next()) is not None:
            failed.append(self._fail(self._requests[request], "no_replica"))
        self._new_waiting = 0
        return failed

    def _lose(self, replica: ReplicaEntry, cause: str) -> StopReplica:
        for entry in replica.requests.values():
            entry.losses += 1
            entry.alone = len(replica.requests) == 1
            entry.replica = None
        replica.requests = {}
        replica.suspect = False
        replica.restart = replica.restart and replica.state != "draining"
        replica.cause = cause
        return self._stop(replica, cause)

    def _stop(self, replica: ReplicaEntry, cause: str = "") -> StopReplica:
        replica.state = "stopping"
        replica.place_kept = replica.restart
        replica.foreign, replica.progressed, replica.silent = 0, False, None
        return StopReplica(replica.number, replica.generation, replica.restart, cause)

    def _stop_drained(self) -> list[Action]:
        drained = [each for each in self._replicas.values() if each.state == "draining" and not each.requests]
        return [self._stop(replica) for replica in drained]

    def _restart(self, replica: ReplicaEntry, now: float) -> list[Action]:
        if now < replica.restart_at:
            return []
        replica.state = "starting"
        replica.generation += 1
        replica.tokens = 0
        self.restarts += 1
        return [StartReplica(replica.number, replica.generation)]

    def _will_serve(self, replica: ReplicaEntry) -> bool:
        if replica.state == "stopping":
            return replica.restart
        return replica.state in {"starting", "ready", "waiting"}

    def _ward(self) -> ReplicaEntry | None:
        """Where the next suspect goes once it is empty; it takes nobody else until then."""
        if not self._suspects:
            return None
        ready = (replica for replica in self._replicas.values() if replica.state == "ready" and not replica.suspect)
        return min(ready, key=lambda replica: (len(replica.requests), replica.number), default=None)

    def _open(self, ward: ReplicaEntry | None) -> list[ReplicaEntry]:
        """Those that have room for a request that is no suspect."""
        return [
            replica
            for replica in self._replicas.values()
            if replica.state == "ready"
            and replica is not ward
            and not replica.suspect
            and len(replica.requests) < self._limit
        ]

    def _of_generation(self, replica: int, generation: int) -> ReplicaEntry | None:
        known = self._replicas.get(replica)
        return known if known is not None and known.generation == generation else None

    # -- for tests -----------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert the invariants that can be seen in the state alone.

        :raises AssertionError: one does not hold.
        """
        placed: dict[str, ReplicaEntry] = {}
        for replica in self._replicas.values():
            for id_, entry in replica.requests.items():
                assert id_ not in placed, f"{id_} is on two replicas"
                assert entry.replica is replica, f"{id_} does not know where it is"
                placed[id_] = replica
            assert len(replica.requests) <= self._limit, f"replica {replica.number} is over its limit"
            assert not replica.requests or replica.state in {"ready", "draining"}, f"{replica.state} with requests"
            assert not replica.suspect or len(replica.requests) == 1, "a suspect has company"
        fresh = waiting = 0
        suspects = set(map(id, self._suspects))
        for id_, entry in self._requests.items():
            waits, suspected = id_ in self._line, id(entry) in suspects
            assert waits + suspected + entry.running + entry.failed == 1, f"{id_} is not in one place"
            assert (id_ in placed) == (entry.replica is not None), f"{id_} is on a replica that does not know it"
            assert entry.replica is None or entry.running, f"{id_} is on a replica and does not run"
            assert not suspected or entry.losses >= self._quarantine, f"{id_} is suspected of nothing"
            waiting += waits or suspected
            fresh += waits and entry.epoch < 0
        assert fresh == self._new_waiting <= self._max_waiting, f"{fresh} wait, {self._new_waiting} counted"
        assert waiting == self.waiting, "somebody waits who has left"
        if self.waiting:
            assert any(map(self._will_serve, self._replicas.values())), "requests wait for nobody"
            ward = self._ward()
            assert ward is None or ward.requests, "a suspect waits for a replica that is empty"
            assert not self._line or not self._open(ward), "requests wait though there is room"
