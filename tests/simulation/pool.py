"""Universe ``pool``: the core of an engine pool with its supervisors, engines that fail in every way, and consumers.

An engine starts slowly or not at all, serves, crashes with answers under way, hangs, loses its connection and goes on
over another, is slow to stop, and is told of late, twice, or under the number of an earlier generation. A request may
be poison and take each engine with it. What a core does is judged by books of our own: who waits, who runs where, what
was delivered, who was near which loss.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from actors.members.supervision import Backoff, Supervisor
from actors.pools.assignment import PoolCore
from actors.pools.pool_actions import Action, Fail, Start, StartReplica, StopReplica
from arun.errors import PoolBusy
from tests.simulation.world import Violation, World

__all__ = ("PATHS", "play")

PATHS = (
    "a stream broke with deltas on their way",
    "a connection was lost and its replica went on",
    "a stream broke and its deltas were lost",
    "a replica died while it started",
    "a replica died while it was drained",
    "a replica died with nobody on it",
    "a loss was told before its streams were read",
    "a stream was read before its loss was told",
    "a loss was told twice",
    "news of an older generation",
    "a hung replica was found by the watchdog",
    "a replica was started again",
    "a replica was given up",
    "a replica was drained while it served",
    "a replica was drained while it started",
    "a replica was drained while it waited for its restart",
    "a replica was drained while it was stopped for its restart",
    "a replica was dropped after it had been given up",
    "more replicas were wanted",
    "an answer came whole from a lost replica",
    "a replica showed its progress by signs alone",
    "an answer was continued behind its deltas",
    "an answer was begun anew",
    "an answer was lost with its replica",
    "a request was started again before any delta",
    "a request was quarantined at the first suspicion",
    "a suspect was cleared",
    "a suspect was the reason",
    "nobody was left to serve",
    "a request was shed",
    "a request left while it waited",
    "a request left while it ran",
    "a request left between the loss and the end of its stream",
    "a request left after it had failed",
    "a late delta came while another epoch ran",
    "a late delta came when nothing ran",
    "a batch request went before an interactive one",
    "a higher priority overtook",
    "a replica with the prefix was chosen",
)


class Delta(NamedTuple):
    start: int
    tokens: int
    last: bool


class Stream:
    """One epoch of a request on one engine: its deltas in order, then perhaps a break."""

    def __init__(self, request: Request, engine: Engine, epoch: int, start: int) -> None:
        self.request, self.engine, self.epoch = request, engine, epoch
        self.next = self.sent = start
        self.way: deque[Delta | None] = deque()
        self.unread: deque[Delta | None] = deque()
        self.broken = self.aborted = False
        self._last = 0

    def push(self, item: Delta | None) -> None:
        """None: the stream breaks off behind what is before it."""
        if self.broken:
            return
        self.broken = item is None
        pool = self.engine.pool
        self.way.append(item)
        self._last = max(self._last, pool.world.now + pool.world.between(0, pool.latency))
        pool.world.after(self._last - pool.world.now, self._arrive)

    def lose_what_is_on_its_way(self) -> None:
        if self.way:
            self.way.clear()
            self.engine.pool.world.sometimes("a stream broke and its deltas were lost")

    def _arrive(self) -> None:
        if self.way:
            self.unread.append(self.way.popleft())
            if self.request.stream is self:
                self.request.arrived()
            elif not self.aborted:
                self.request.late(self)


class Engine:
    """One generation of a replica."""

    def __init__(self, pool: Pool, number: int, generation: int) -> None:
        self.pool, self.number, self.generation = pool, number, generation
        self.state = "starting"
        #: what the core was told, or has decided
        self.told_ready = self.told_lost = self.stopping = False
        self.streams: list[Stream] = []
        #: when it was last heard of: a delta was read, or a sign told of tokens
        self.heard = pool.world.now
        self.tokens = self.told_tokens = 0
        self._signs = False
        world = pool.world
        if world.chance(pool.faults):
            world.after(world.between(0, 6), self.crash)
        else:
            world.after(world.between(0, 6), self._up)

    @property
    def live(self) -> list[Stream]:
        """Streams that the core counts as running here."""
        return [one for one in self.streams if one.request.stream is one and not one.request.lost]

    def _up(self) -> None:
        if self.state != "starting":
            return
        self.state = "up"
        self.pool.world.note("up", self.number, self.generation)
        self._tell("ready")

    def _give_sign(self) -> None:
        """Say what it does, and again after a while, as long as it does something."""
        self._signs = self.state == "up" and bool(self.live)
        if self._signs:
            world = self.pool.world
            world.after(world.between(0, self.pool.latency), self.pool.signed, self, len(self.live), self.tokens)
            world.after(self.pool.watchdog // 4, self._give_sign)

    def accept(self, stream: Stream) -> None:
        """A request arrives."""
        if self.state in {"dead", "stopped"}:
            self.pool.world.after(1, stream.push, None)  # or one is sent here again and again before its loss is told
        elif self.state == "up":
            self._later(stream)
            if not self._signs:
                self._give_sign()

    def _later(self, stream: Stream) -> None:
        self.pool.world.after(self.pool.world.between(0, self.pool.pace), self._generate, stream)

    def _generate(self, stream: Stream) -> None:
        if self.state != "up" or stream.aborted or stream.broken:
            return
        request, world = stream.request, self.pool.world
        if request.poison and stream.next >= request.poisonous_at:
            self.crash()
            return
        tokens = min(world.between(1, 3), request.total - stream.next)
        stream.next += tokens
        self.tokens += tokens
        last = stream.next == request.total
        if last or not request.whole:
            stream.push(Delta(stream.sent, stream.next - stream.sent, last))
            stream.sent = stream.next
        if not last:
            self._later(stream)

    def crash(self) -> None:
        """It dies; what it has sent may still come, or not."""
        if self.state in {"dead", "stopped"}:
            return
        world = self.pool.world
        world.note("crash", self.number, self.generation, self.state)
        if self.state == "starting":
            world.sometimes("a replica died while it started")
        elif not self.live:
            world.sometimes("a replica died with nobody on it")
        if self.pool.core.state(self.number) == "draining":
            world.sometimes("a replica died while it was drained")
        self.state = "dead"
        self._break(world.chance(30))
        self._tell("lost")

    def hang(self) -> None:
        if self.state == "up":
            self.pool.world.note("hang", self.number, self.generation)
            self.state = "hung"

    def lose_connection(self) -> None:
        """It goes on over another; what was under way on the lost one breaks off."""
        if self.state == "up":
            self.pool.world.note("connection lost", self.number, self.generation)
            if self.live:
                self.pool.world.sometimes("a connection was lost and its replica went on")
            self._break(self.pool.world.chance(30))

    def stop(self) -> None:
        """As StopReplica asks."""
        world = self.pool.world
        self.stopping = True
        world.after(world.between(0, self.pool.stop_time), self._stopped)

    def _stopped(self) -> None:
        self._break(loses=False)
        self.state = "stopped"
        pool = self.pool
        pool.world.note("stopped", self.number, self.generation)
        pool.stopped(self)

    def _break(self, loses: bool) -> None:
        for stream in self.streams:
            if stream.way and not stream.broken:
                self.pool.world.sometimes("a stream broke with deltas on their way")
                if loses:
                    stream.lose_what_is_on_its_way()
            stream.push(None)

    def _tell(self, what: str) -> None:
        pool, world = self.pool, self.pool.world
        world.after(world.between(0, pool.latency), pool.told, what, self)
        if world.chance(10):
            world.after(world.between(0, 40), pool.told, what, self)


class Request:
    """A request and its consumer."""

    def __init__(self, pool: Pool, number: int) -> None:
        world = pool.world
        self.pool, self.id = pool, f"r{number}"
        self.lane: Any = "batch" if world.chance(40) else "interactive"
        self.priority = world.pick((0, 0, 0, 1, -1))
        self.total = world.pick((1, 2, 4, 9))
        self.whole = world.chance(30)
        self.resumable = world.chance(70)
        self.reroute: Any = world.pick(("continue", "continue", "restart", "never"))
        self.poison = world.chance(pool.poison)
        self.poisonous_at = world.pick((0, 0, 2))
        self.prefix: Sequence[int] = world.pick(((), (), (1,), (1, 2), (3,)))
        self.pace = world.pick((0, 0, 2, 9, 70))
        #: waiting, running, failed, over, shed
        self.state = "new"
        self.arrival = 0
        self.stream: Stream | None = None
        self.epoch = -1
        self.delivered = 0
        self.out = False
        self.wants = False
        #: whether it has waited, and something came in this tick
        self.wakes = False
        #: whether the replica that runs it is lost, and its stream is not read to the end
        self.lost = False
        self.losses = 0
        self.alone = False
        self.outcome = ""

    @property
    def suspect(self) -> bool:
        return self.losses >= self.pool.quarantine

    def submit(self) -> None:
        pool, world = self.pool, self.pool.world
        world.note("submit", self.id, self.lane, self.priority)
        fresh = pool.fresh
        try:
            self.state = "waiting"
            pool.arrivals += 1
            self.arrival = pool.arrivals
            actions = pool.core.submit(
                self.id,
                lane=self.lane,
                priority=self.priority,
                prefix=self.prefix,
                resumable=self.resumable,
                reroute=self.reroute,
            )
        except PoolBusy:
            world.sometimes("a request was shed")
            self.state = "shed"
            if fresh < pool.max_waiting:
                raise Violation(f"{self.id} was shed while {fresh} of {pool.max_waiting} wait") from None
            return
        self.wants = True
        pool.do(actions)
        if pool.fresh > pool.max_waiting:
            raise Violation(f"{pool.fresh} wait, {pool.max_waiting} may")

    def arrived(self) -> None:
        """Something of its stream can be read."""
        if self.wants:
            self.wants, self.wakes = False, True
            self.pool.world.after(0, self.read)

    def read(self) -> None:
        """Read what is next, or wait for it."""
        stream, pool = self.stream, self.pool
        self.wakes = False
        if self.state != "running" or stream is None:
            self.wants = self.state in {"waiting", "running"}
            return
        if not stream.unread:
            self.wants = True
            pool.core.hungry(self.id)
            return
        item = stream.unread.popleft()
        if item is None:
            self._cut(stream)
            return
        engine = stream.engine
        if not pool.core.delta(self.id, stream.epoch, item.tokens, pool.load_of(engine)):
            raise Violation(f"{self.id}: a delta of the epoch that runs was a dead letter")
        if not self.lost:
            engine.heard = pool.world.now
        if item.start != self.delivered:
            raise Violation(f"{self.id}: got token {item.start}, wanted {self.delivered}")
        self.out = True
        self.delivered += item.tokens
        pool.world.note("delta", self.id, stream.epoch, item.start, item.tokens)
        if item.last:
            if self.lost:
                pool.world.sometimes("an answer came whole from a lost replica")
            if self.suspect:
                pool.world.sometimes("a suspect was cleared")
            self.leave("complete")
        else:
            pool.world.after(pool.world.between(0, self.pace), self.read)

    def _cut(self, stream: Stream) -> None:
        pool, world = self.pool, self.pool.world
        world.note("cut", self.id, stream.epoch)
        world.sometimes(
            "a loss was told before its streams were read"
            if self.lost
            else "a stream was read before its loss was told"
        )
        expected = "waiting"
        if self.suspect and self.alone:
            expected = "quarantined"
        elif self.reroute == "never" or (self.out and not self.resumable and self.reroute != "restart"):
            expected = "replica_lost"
        self.stream, self.lost, self.state = None, False, "waiting"
        self.wants = True
        self.alone = False
        if world.chance(20):  # what was taken for the end was none
            stream.unread.append(Delta(self.delivered, 1, last=False))
            world.after(world.between(0, 12), self.late, stream)
        actions = pool.core.cut(self.id, stream.epoch)
        told = [action.reason for action in actions if isinstance(action, Fail) and action.request == self.id]
        if expected != "waiting" and told != [expected]:
            raise Violation(f"{self.id}: cut with {self.losses} losses and {self.out=}: {told}, expected {expected}")
        if expected == "waiting" and told not in ([], ["no_replica"]):
            raise Violation(f"{self.id}: failed as {told} after {self.losses} losses")
        pool.do(actions)

    def late(self, stream: Stream) -> None:
        """Something comes of a stream that is not read any more."""
        item = stream.unread.popleft()
        if item is not None:
            if self.state == "running":
                self.pool.world.sometimes("a late delta came while another epoch ran")
            else:
                self.pool.world.sometimes("a late delta came when nothing ran")
            if self.pool.core.delta(self.id, stream.epoch, item.tokens):
                raise Violation(f"{self.id}: a delta of epoch {stream.epoch} was taken, {self.epoch} runs")

    def leave(self, outcome: str) -> None:
        """It has ended."""
        if self.state in {"new", "shed", "over"}:
            return
        world, stream = self.pool.world, self.stream
        if outcome == "left":
            if self.state == "waiting":
                world.sometimes("a request left while it waited")
            elif self.state == "failed":
                world.sometimes("a request left after it had failed")
            elif self.lost:
                world.sometimes("a request left between the loss and the end of its stream")
            else:
                world.sometimes("a request left while it ran")
        world.note("leave", self.id, outcome)
        if self.outcome:
            raise Violation(f"{self.id}: ended twice, {self.outcome} and {outcome}")
        self.outcome, self.state, self.stream = outcome, "over", None
        if stream is not None and world.chance(80):
            stream.aborted = True
        self.pool.do(self.pool.core.leave(self.id))

    def __str__(self) -> str:
        return f"{self.id} ({self.state}, {self.delivered} of {self.total})"


class Pool:
    """What the shell of a pool would be, and our own books of what is the case."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.limit = world.pick((1, 1, 2, 4))
        self.max_waiting = world.pick((1, 3, 30))
        self.quarantine = world.pick((1, 2, 2, 3))
        self.watchdog = world.pick((16, 40))
        self.supervisor = Supervisor(
            intensity=world.pick((0, 1, 3, 6)), period=world.pick((30, 100)), backoff=Backoff(first=2, cap=9)
        )
        self.faults = world.pick((0, 5, 20))
        self.poison = world.pick((0, 0, 10))
        self.latency = world.pick((0, 1, 4))
        self.pace = world.pick((0, 2, 6))
        self.stop_time = world.pick((0, 3))
        self.foreign = world.pick((0, 0, 3))
        self.core = PoolCore(
            limit=self.limit,
            max_waiting=self.max_waiting,
            supervisor=self.supervisor,
            watchdog=self.watchdog,
            quarantine=self.quarantine,
            affinity_margin=world.pick((0, 2)),
        )
        self.requests: dict[str, Request] = {}
        self.engines: dict[int, Engine] = {}
        self.old: list[Engine] = []
        self.unwanted: set[int] = set()
        #: those whose place was to be given back
        self.ended: set[int] = set()
        #: when each replica was found stopped, for those stops that a restart followed
        self.restarts: dict[int, list[int]] = {}
        self.stopped_at: dict[int, int] = {}
        self.arrivals = 0
        self.since_batch = 0
        self._next_tick = -1

    @property
    def fresh(self) -> int:
        """Requests that wait and were never started."""
        return sum(one.state == "waiting" and one.epoch < 0 for one in self.requests.values())

    def load_of(self, engine: Engine) -> int | None:
        return len(engine.live) + self.world.below(self.foreign) if self.foreign else None

    # Inputs of the core.

    def told(self, what: str, engine: Engine) -> None:
        """News of an engine arrives, perhaps for the second time, perhaps of one that is no more."""
        core, world = self.core, self.world
        before = core.state(engine.number)
        if self.engines.get(engine.number) is not engine:
            world.sometimes("news of an older generation")
        if what == "ready":
            actions = core.replica_ready(engine.number, engine.generation)
            engine.told_ready = True
        else:
            if engine.told_lost:
                world.sometimes("a loss was told twice")
            engine.told_lost = True
            actions = core.replica_lost(engine.number, engine.generation, "it crashed")
        if self.engines.get(engine.number) is not engine and (actions or core.state(engine.number) != before):
            raise Violation(f"{what} of generation {engine.generation} of replica {engine.number} changed something")
        self.do(actions)

    def signed(self, engine: Engine, load: int, tokens: int) -> None:
        """A sign of life arrives."""
        if tokens != engine.told_tokens and self.engines.get(engine.number) is engine:
            engine.told_tokens, engine.heard = tokens, self.world.now
            if engine.live and all(stream.request.whole for stream in engine.live):
                self.world.sometimes("a replica showed its progress by signs alone")
        self.core.report(engine.number, engine.generation, load + self.world.below(self.foreign + 1), tokens)

    def stopped(self, engine: Engine) -> None:
        number, now = engine.number, self.world.now
        self.stopped_at[number] = now
        actions = self.core.replica_stopped(number, engine.generation, now)
        if self.core.state(number) == "dead":
            self.world.sometimes("a replica was given up")
            period, intensity = self.supervisor.period, self.supervisor.intensity
            recent = [at for at in self.restarts.get(number, ()) if now - at < period]
            if len(recent) < intensity:
                raise Violation(f"replica {number} was given up after {len(recent)} restarts of {intensity}")
        if self.world.chance(10):
            self.do(actions)
            actions = self.core.replica_stopped(number, engine.generation, now)
            if actions:
                raise Violation(f"replica {number} was stopped twice and it made a difference")
        self.do(actions)

    def scale(self, replicas: int) -> None:
        world = self.world
        world.note("scale", replicas)
        before = {number: self.core.state(number) for number in self.engines}
        serving = [n for n, state in before.items() if state in {"starting", "ready", "waiting"}]
        if replicas > len(serving):
            world.sometimes("more replicas were wanted")
        if "dead" in before.values():
            world.sometimes("a replica was dropped after it had been given up")
        actions = self.core.scale(replicas)
        # Those given up are forgotten, and those that are too many never come again.
        for number in list(self.engines):
            if self.core.state(number) in {None, "draining", "dead"} or not self.core._replicas[number].restart:
                self.unwanted.add(number)
        for action in actions:
            if isinstance(action, StopReplica):
                self.unwanted.add(action.replica)
        self.do(actions)

    def drain(self, number: int) -> None:
        state = self.core.state(number)
        self.world.note("drain", number, str(state))
        if state == "ready" and self.core.in_flight(number):
            self.world.sometimes("a replica was drained while it served")
        elif state == "starting":
            self.world.sometimes("a replica was drained while it started")
        elif state == "waiting":
            self.world.sometimes("a replica was drained while it waited for its restart")
        elif state == "stopping" and number not in self.ended:
            self.world.sometimes("a replica was drained while it was stopped for its restart")
        self.unwanted.add(number)
        self.do(self.core.drain(number))

    def _tick(self, at: int) -> None:
        if self._next_tick == at:
            self._next_tick = -1
            self.do(self.core.tick(self.world.now))

    # Outputs of the core.

    def do(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Start():
                    self._start(action)
                case Fail():
                    self._fail(action)
                case StartReplica():
                    self._start_replica(action)
                case StopReplica():
                    self._stop_replica(action)
        due = self.core.due()
        if due is not None:
            at = max(self.world.now + 1, -(-int(due * 8) // 8))
            if self._next_tick < 0 or at < self._next_tick:
                self._next_tick = at
                self.world.after(at - self.world.now, self._tick, at)

    def _start(self, action: Start) -> None:
        world, request = self.world, self.requests[action.request]
        engine = self.engines[action.replica]
        world.note("start", request.id, action.replica, action.generation, action.epoch, action.resume_from)
        live = engine.live
        if engine.generation != action.generation or not engine.told_ready or engine.stopping:
            raise Violation(f"{request} was sent to replica {action.replica}, which does not serve")
        if engine.number in self.unwanted:
            raise Violation(f"{request} was sent to replica {action.replica}, which is drained")
        if len(live) >= self.limit:
            raise Violation(f"{len(live) + 1} requests on replica {action.replica}, {self.limit} may be")
        if request.state != "waiting" or action.epoch != request.epoch + 1:
            raise Violation(f"{request} of epoch {request.epoch} was started with epoch {action.epoch}")
        if (request.suspect and live) or any(other.request.suspect for other in live):
            raise Violation(f"{request} and {len(live)} others are together, and one of them is suspected")
        if not request.suspect:
            self._judge_turn(request)
        if action.again:
            if request.resumable or request.reroute != "restart" or not request.out:
                raise Violation(f"{request} was begun anew")
            world.sometimes("an answer was begun anew")
            request.delivered, request.out = 0, False
        elif request.out:
            if not request.resumable:
                raise Violation(f"{request} was continued, and can't be")
            world.sometimes("an answer was continued behind its deltas")
        elif request.epoch >= 0:
            world.sometimes("a request was started again before any delta")
        if request.epoch >= 0 and request.reroute == "never":
            raise Violation(f"{request} was started twice, and never wanted that")
        if action.resume_from != request.delivered:
            raise Violation(f"{request} is continued behind token {action.resume_from}")
        request.epoch, request.state = action.epoch, "running"
        stream = request.stream = Stream(request, engine, action.epoch, action.resume_from)
        engine.streams.append(stream)
        world.after(world.between(0, self.latency), engine.accept, stream)
        if request.wants:
            self.core.hungry(request.id)
        if self.core.prefix_hits:
            world.sometimes("a replica with the prefix was chosen")

    def _judge_turn(self, request: Request) -> None:
        """Whether it was its turn among those that wait."""
        waiting = [one for one in self.requests.values() if one.state == "waiting" and not one.suspect]
        for other in waiting:
            if other.lane == request.lane and (other.priority, other.arrival) < (request.priority, request.arrival):
                raise Violation(f"{request} went before {other}")
            if other.lane == request.lane and other.arrival < request.arrival:
                self.world.sometimes("a higher priority overtook")
        others = {other.lane for other in waiting if other is not request}
        if request.lane == "batch":
            if "interactive" in others:
                self.world.sometimes("a batch request went before an interactive one")
                if self.since_batch < 7:
                    raise Violation(f"{request} went before the interactive ones, {self.since_batch} after the last")
            self.since_batch = 0
        else:
            self.since_batch = self.since_batch + 1 if "batch" in others else 0
            if self.since_batch > 7:
                raise Violation(f"{self.since_batch} interactive requests went before a batch one")

    def _fail(self, action: Fail) -> None:
        world, request = self.world, self.requests[action.request]
        world.note("fail", request.id, action.reason)
        if request.state != "waiting":
            raise Violation(f"{request} failed as {action.reason}")
        if action.losses != request.losses:
            raise Violation(f"{request} failed with {action.losses} losses, it had {request.losses}")
        if action.reason == "quarantined":
            first = request.losses == self.quarantine
            world.sometimes("a request was quarantined at the first suspicion" if first else "a suspect was the reason")
        elif action.reason == "no_replica":
            world.sometimes("nobody was left to serve")
            self.since_batch = 0  # all who wait fail, so nobody went before those who come now
            serving = [n for n in self.engines if self._will_serve(n)]
            if serving:
                raise Violation(f"{request} failed for want of a replica, and {serving} will serve")
        else:
            world.sometimes("an answer was lost with its replica")
        request.state = "failed"
        world.after(world.between(0, 3), request.leave, action.reason)

    def _will_serve(self, number: int) -> bool:
        """Whether a replica serves or will: as far as we know it is neither given up nor to be stopped for good."""
        return number not in self.unwanted and self.core.state(number) not in {None, "dead"}

    def _start_replica(self, action: StartReplica) -> None:
        world, number = self.world, action.replica
        world.note("start replica", number, action.generation)
        before = self.engines.get(number)
        if number in self.unwanted:
            raise Violation(f"replica {number} is started, and was drained")
        if before is None:
            if action.generation != 1:
                raise Violation(f"replica {number} begins with generation {action.generation}")
        else:
            world.sometimes("a replica was started again")
            now, at = world.now, self.stopped_at.get(number, -1)
            if before.state != "stopped" or action.generation != before.generation + 1:
                raise Violation(f"replica {number} is started again, its generation {before.generation} is not stopped")
            if now < at + self.supervisor.backoff.first:
                raise Violation(f"replica {number} is started again {now - at} ticks after its stop")
            times = self.restarts.setdefault(number, [])
            times.append(at)
            recent = [one for one in times if at - one < self.supervisor.period]
            if len(recent) > self.supervisor.intensity:
                raise Violation(f"replica {number} was restarted {len(recent)} times of {self.supervisor.intensity}")
            self.old.append(before)
        self.engines[number] = Engine(self, number, action.generation)

    def _stop_replica(self, action: StopReplica) -> None:
        world, engine = self.world, self.engines[action.replica]
        world.note("stop replica", action.replica, action.generation, action.restart)
        if engine.generation != action.generation or engine.number in self.ended:
            raise Violation(f"replica {action.replica}: its generation {action.generation} is stopped twice")
        if action.restart and engine.number in self.unwanted:
            raise Violation(f"replica {action.replica} is to be started again, and was drained")
        if not action.restart:
            self.ended.add(engine.number)
        if engine.stopping:  # nothing runs there, but its place is kept for a restart that will not be
            if engine.state != "stopped" or action.restart:
                raise Violation(f"replica {action.replica}: its generation {action.generation} is stopped twice")
            world.after(world.between(0, self.stop_time), self.stopped, engine)
            return
        live = engine.live
        if live and not engine.told_lost:
            silent = world.now - engine.heard
            if not any(one.request.wants or one.request.wakes for one in live):
                raise Violation(f"replica {action.replica} was given up though nobody waited for it")
            if silent < self.watchdog:
                raise Violation(f"replica {action.replica} was given up after {silent} silent ticks")
            if engine.state == "hung":
                world.sometimes("a hung replica was found by the watchdog")
        for stream in live:
            stream.request.losses += 1
            stream.request.alone = len(live) == 1
            stream.request.lost = True
        engine.stop()

    # Faults.

    def strike(self) -> None:
        up = [engine for engine in self.engines.values() if engine.state in {"starting", "up"}]
        if not up:
            return
        engine = self.world.pick(up)
        self.world.pick((engine.crash, engine.crash, engine.hang, engine.lose_connection))()


def play(world: World) -> None:
    """One universe."""
    pool = Pool(world)
    pool.scale(world.between(1, 3))
    busy = world.pick((1, 20, 80))
    for number in range(world.pick((3, 8, 8, 25))):
        request = Request(pool, number)
        pool.requests[request.id] = request
        world.after(world.below(busy), request.submit)
        if world.chance(15):
            world.after(world.below(busy + 40), request.leave, "left")
    if pool.faults:
        for _ in range(world.between(0, 4)):
            world.after(world.below(busy + 40), pool.strike)
    for _ in range(world.pick((0, 0, 1, 3))):
        world.after(world.below(busy + 40), _change, pool)
    world.after(400, _heal, pool)
    world.run(pool.core.check, horizon=20_000)
    _check_quiet(pool)
    pool.scale(0)
    world.run(pool.core.check, horizon=20_000)
    for engine in pool.engines.values():
        if pool.core.state(engine.number) is not None:
            raise Violation(f"replica {engine.number} is still {pool.core.state(engine.number)}")
        if engine.state != "stopped":
            raise Violation(f"engine {engine.number} was left over, {engine.state}")
        if engine.number not in pool.ended:
            raise Violation(f"the place of replica {engine.number} was never given back")


def _change(pool: Pool) -> None:
    if pool.engines and pool.world.chance(50):
        pool.drain(pool.world.pick(list(pool.engines)))
    else:
        pool.scale(pool.world.between(1, 4))


def _heal(pool: Pool) -> None:
    pool.faults = 0


def _check_quiet(pool: Pool) -> None:
    """What must be true once nothing more happens."""
    for request in pool.requests.values():
        if request.state not in {"over", "shed"}:
            raise Violation(f"{request} never ended")
        if request.outcome == "complete" and request.delivered != request.total:
            raise Violation(f"{request} is complete")
    if pool.core.waiting or pool.core._requests:
        raise Violation(f"the core still has {list(pool.core._requests)}")
