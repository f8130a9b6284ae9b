"""Router: the requests of one pool on their way to its replicas and back.

It feeds what happens into a :class:`~actors.pools.assignment.PoolCore` and does what that says. Every request ends
exactly once, in :meth:`Router.end`: with its last delta, its error, or its consumer leaving.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import msgspec

from actors.actor import is_connected
from actors.answers import Reset
from actors.engine import Outcome, Usage
from actors.pools.affinity import prefix_keys
from actors.pools.pool_actions import Fail, Start, StartReplica, StopReplica
from arun.errors import (
    ActorDied,
    ArunError,
    ChannelLost,
    EngineDead,
    EngineError,
    PayloadError,
    ReplicaLost,
    RequestError,
    RequestQuarantined,
)
from arun.logs import get_logger
from arun.runtime import Background, Runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Self

    from actors.actor import ActorStream
    from actors.engine import Delta, GenerateRequest, Pulse
    from actors.pools.assignment import PoolCore
    from actors.pools.fleet import Fleet, Replica
    from actors.pools.pool_actions import Action
    from actors.pools.pool_state import Reroute

__all__ = ("RoutedStream", "Router")

log = get_logger("arun.pool")

_ABORT_SECONDS = 10.0
_MOST_STARTS = 3  # of a request whose answers break off on a replica that goes on
_MOST_CUTS = 5  # of connections under a request without a delta in between

_BEGUN_ANEW = (
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logprobs",
    "prompt_logprobs",
    "bad_words",
    "structured_outputs",
)

_LOSSES = (ActorDied, ChannelLost, EngineDead)
"""What a request raises when its replica can serve no more, and not the request is to blame."""


class Router:
    """Sends requests to replicas as a PoolCore says; the other half of it does so with the replicas themselves.

    :param pool: its name, for messages.
    """

    def __init__(self, pool: str, core: PoolCore, fleet: Fleet) -> None:
        self.core = core
        self._pool = pool
        self._fleet = fleet
        self._routes: dict[str, Route] = {}
        self._post = _thread_safe_post()
        self._stirred = anyio.Event()
        self._sleeping = False
        self._idle: anyio.Event | None = None
        self._resumes = False
        self._closed = False
        self._ticking: Background[None] = Runtime.current().start(self._tick, name=f"clock of pool {pool}")

    def submit(self, request: GenerateRequest, reroute: Reroute = "continue") -> RoutedStream:
        """Send a request to a replica, at once or when there is room.

        :raises RequestError: a request with its id is in flight.
        :raises PoolBusy: too many wait.
        """
        if request.request_id in self._routes:
            raise RequestError(f"pool {self._pool!r} has a request {request.request_id!r} in flight already")
        obstacle = _obstacle(request) if self._resumes else "its engine can't continue an answer"
        actions = self.core.submit(
            request.request_id,
            lane=request.lane,
            priority=request.priority,
            prefix=prefix_keys(request.prompt),
            resumable=obstacle is None,
            reroute=reroute,
        )
        route = self._routes[request.request_id] = Route(request, obstacle, reroute)
        self.do(actions)
        if self._sleeping:
            self._stirred.set()
        return RoutedStream(self, route)

    def do(self, actions: Sequence[Action]) -> None:
        """Carry out what the core says."""
        if self._closed:
            return
        for action in actions:
            match action:
                case Start():
                    self._routes[action.request].start(action, self._fleet.replicas[action.replica])
                case Fail():
                    self._fail(self._routes[action.request], action)
                case StartReplica():
                    self._fleet.start(action.replica, action.generation)
                case StopReplica():
                    self._stop(action)

    async def wait_idle(self) -> None:
        """Wait until no request waits or runs."""
        while self._routes:
            if self._idle is None:
                self._idle = anyio.Event()
            await self._idle.wait()

    def close(self, error: EngineError) -> None:
        """Let every request fail with ``error`` at its next delta."""
        self._closed = True
        self._ticking.cancel()
        for route in list(self._routes.values()):
            route.stop(error)

    # What becomes of replicas; see actors.pools.fleet.ReplicaEvents.

    def ready(self, replica: Replica) -> None:
        self._resumes = replica.resumes
        self.do(self.core.replica_ready(replica.number, replica.generation))

    def lost(self, replica: Replica, generation: int, cause: str) -> None:
        self.do(self.core.replica_lost(replica.number, generation, cause))

    def report(self, replica: Replica, pulse: Pulse) -> None:
        self.core.report(replica.number, replica.generation, pulse.in_flight, pulse.tokens)

    def stopped(self, replica: Replica, generation: int) -> None:
        self.do(self.core.replica_stopped(replica.number, generation, anyio.current_time()))
        if not self._closed and self.core.state(replica.number) == "dead":
            log.error("pool.replica_given_up", pool=self._pool, cause=self.core.given_up[replica.number])
            Runtime.current().start(self._fleet.bury, replica, name=f"end of replica {replica.number}")
        self._stirred.set()

    # For RoutedStream.

    def end(self, route: Route, outcome: Outcome) -> None:
        """A request is through; the first outcome counts."""
        if route.outcome is not None:
            return
        route.outcome = outcome
        if route.replica is not None:
            counts = route.replica.counts
            setattr(counts, outcome, getattr(counts, outcome) + 1)
        del self._routes[route.request.request_id]
        self.do(self.core.leave(route.request.request_id))
        if self._idle is not None and not self._routes:
            self._idle.set()
            self._idle = None

    def cut(self, route: Route, error: Exception) -> None:
        """The stream of a request has broken; it may go on elsewhere."""
        replica = route.replica
        assert replica is not None  # it had a stream
        route.stream, route.replica = None, None
        replica.counts.lost += 1
        pid = replica.pid
        if isinstance(error, ChannelLost) and replica.actor is not None and is_connected(replica.actor):
            route.cuts += 1  # the replica goes on, over another connection
            route.lost_with = (replica.number, pid, str(error))
            if route.cuts >= _MOST_CUTS:
                route.stop(
                    ReplicaLost(
                        f"the connection to replica {replica.number} of pool {self._pool!r} (pid {pid}) was lost: "
                        f"{error}. Request {route.request.request_id!r} is not tried again: it has lost its connection "
                        f"{route.cuts} times without a delta in between"
                    )
                )
                return
        else:
            self.lost(replica, route.generation, str(error))
            route.lost_with = (replica.number, pid, replica.cause)
        self.do(self.core.cut(route.request.request_id, route.epoch))

    def again(self, route: Route) -> bool:
        """The stream of a request has broken, for no fault of its replica's; tells whether it begins anew."""
        if route.reroute != "restart" or route.epoch + 1 >= _MOST_STARTS or route.replica is None:
            return False
        replica, route.stream, route.replica = route.replica, None, None
        replica.counts.lost += 1
        self.do(self.core.cut(route.request.request_id, route.epoch))
        return True

    async def abort(self, route: Route) -> None:
        """End a request whose consumer has left; returns when the engine has let go of it."""
        with anyio.move_on_after(_ABORT_SECONDS, shield=True):
            try:
                if route.stream is not None:
                    await route.stream.aclose()
            finally:
                self.end(route, "aborted")

    def abort_soon(self, route: Route) -> None:
        """The same without waiting, for a stream that was garbage-collected, in whatever thread."""

        def abort() -> None:
            if route.stream is not None:
                route.stream.cancel()
            self.end(route, "aborted")

        self._post(abort)

    # Its own.

    def _stop(self, action: StopReplica) -> None:
        replica = self._fleet.replicas[action.replica]
        if action.cause:
            replica.cause = action.cause
            log.warning(
                "pool.replica_lost",
                pool=self._pool,
                replica=replica.number,
                pid=replica.pid,
                in_flight=replica.counts.in_flight,
                cause=action.cause,
            )
        self._fleet.stop(action.replica, action.generation, restart=action.restart)

    def _fail(self, route: Route, action: Fail) -> None:
        number, pid, cause = route.lost_with
        where = f"replica {number} of pool {self._pool!r} (pid {pid}) was lost: {cause}"
        error: EngineError
        match action.reason:
            case "replica_lost" if route.reroute == "never":
                error = ReplicaLost(f"{where}. Request {route.request.request_id!r} asked for reroute='never'")
            case "replica_lost":
                error = ReplicaLost(
                    f"{where}. {route.tokens} tokens of request {route.request.request_id!r} were delivered, and no "
                    f"other replica can go on with it: {route.obstacle}. Ask again, or with reroute='restart', which "
                    "begins anew"
                )
            case "quarantined":
                log.error("pool.request_quarantined", pool=self._pool, request=route.request.request_id, cause=cause)
                error = RequestQuarantined(
                    f"request {route.request.request_id!r} is not tried again: {action.losses} replicas of pool "
                    f"{self._pool!r} were lost while they ran it, the last one while it ran nothing else. {where}"
                )
            case "no_replica":
                causes = "; ".join(f"replica {number}: {cause}" for number, cause in self.core.given_up.items())
                error = EngineDead(f"pool {self._pool!r} has no replica left. {causes}")
        route.stop(error)

    async def _tick(self) -> None:
        while True:
            due = self.core.due()
            self._stirred = anyio.Event()
            self._sleeping = due is None
            with anyio.move_on_after(None if due is None else max(0.0, due - anyio.current_time())):
                await self._stirred.wait()
            self._sleeping = False
            now = anyio.current_time()
            if due is not None and now >= due:
                self.do(self.core.tick(now))


class Route:
    """One request from the call to its end: waiting, then with a replica, perhaps with another, then with an outcome.

    :ivar obstacle: why no other replica can go on with the answer; None if one can.
    :ivar stream: None while it waits.
    :ivar cuts: connections that were lost under it since the last delta, though the replica went on.
    :ivar tokens: of the answer, delivered so far.
    :ivar delivered: ``list[int]``, these tokens, where another replica may have to continue after them.
    :ivar resumed: how many of them were delivered before the present start.
    :ivar error: what to raise instead of the next delta.
    :ivar lost_with: number, pid and cause of death of the replica that it was on last.
    """

    __slots__ = (
        "changed", "cuts", "delivered", "epoch", "error", "generation", "lost_with", "obstacle", "outcome", "replica",
        "request", "reroute", "reset", "resumed", "stream", "tokens",
    )  # fmt: skip

    def __init__(self, request: GenerateRequest, obstacle: str | None, reroute: Reroute) -> None:
        self.request = request
        self.obstacle = obstacle
        self.reroute: Reroute = reroute
        self.changed: anyio.Event | None = None
        self.stream: ActorStream | None = None
        self.replica: Replica | None = None
        self.generation = 0
        self.epoch = 0
        self.cuts = 0
        self.tokens = 0
        self.delivered: list[int] = []
        self.resumed = 0
        self.reset = False
        self.error: EngineError | None = None
        self.outcome: Outcome | None = None
        self.lost_with: tuple[int, int | None, str] = (-1, None, "")

    def start(self, start: Start, replica: Replica) -> None:
        """Send the request; an error belongs to its consumer, not to whoever made room for it."""
        self.replica, self.generation, self.epoch = replica, start.generation, start.epoch
        self.tokens = self.resumed = start.resume_from
        self.reset = start.again
        replica.counts.started += 1
        try:
            self.stream = replica.actor.generate(self._continued())
        except EngineError as exc:
            self.error = exc
        except PayloadError as exc:
            self.error = RequestError(f"request {self.request.request_id!r} can't be sent to an engine: {exc}")
        except ArunError as exc:
            self.error = EngineError(str(exc))
        self._tell()

    def stop(self, error: EngineError) -> None:
        """Let it fail at its next delta."""
        self.error = error
        if self.stream is not None:
            self.stream.cancel()
        self._tell()

    async def wait(self) -> None:
        """Wait until it is sent or stopped."""
        self.changed = anyio.Event()
        await self.changed.wait()

    def received(self, delta: Delta) -> Delta:
        """Count a delta in, and give it the usage of the whole answer."""
        count = len(delta.token_ids)
        if not count and not self.tokens and delta.usage is not None:  # of a server that tells no token ids
            count = delta.usage.completion_tokens
        self.tokens += count
        self.cuts = 0
        if self.replica is not None:
            self.replica.counts.tokens += count
        if self.obstacle is None:
            self.delivered += delta.token_ids
        if self.resumed and (usage := delta.usage) is not None:
            prompt_tokens = usage.prompt_tokens - self.resumed
            whole = Usage(
                prompt_tokens, usage.completion_tokens + self.resumed, min(usage.cached_tokens, prompt_tokens)
            )
            return msgspec.structs.replace(delta, usage=whole)
        return delta

    def _continued(self) -> GenerateRequest:
        request, sampling = self.request, self.request.sampling
        if not self.epoch:
            return request
        max_tokens = sampling.max_tokens and sampling.max_tokens - self.resumed
        if max_tokens is not None and max_tokens <= 0:
            raise ReplicaLost(
                f"replica {self.lost_with[0]} was lost after the last token of request {request.request_id!r}, before "
                "it told why the answer ended"
            )
        min_tokens = sampling.min_tokens and max(0, sampling.min_tokens - self.resumed)
        left = msgspec.structs.replace(sampling, max_tokens=max_tokens, min_tokens=min_tokens)
        return msgspec.structs.replace(request, sampling=left, resume=self.delivered[: self.resumed], epoch=self.epoch)

    def _tell(self) -> None:
        if self.changed is not None:
            self.changed.set()


class RoutedStream:
    """The :class:`~actors.DeltaStream` of a request that is sent to one replica or another."""

    __slots__ = ("__weakref__", "_route", "_router")

    def __init__(self, router: Router, route: Route) -> None:
        self._router = router
        self._route = route

    @property
    def request_id(self) -> str:
        return self._route.request.request_id

    @property
    def replica(self) -> int | None:
        return None if self._route.replica is None else self._route.replica.number

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        route, router = self._route, self._router
        if route.outcome is not None:
            if route.outcome == "finished" and route.stream is not None:
                await anext(route.stream, None)  # the end of the stream, so that it needs no cancelling
            raise StopAsyncIteration
        core, request_id = router.core, route.request.request_id
        try:
            while True:
                if route.error is not None:
                    raise route.error
                stream = route.stream
                if stream is None:
                    await route.wait()
                    continue
                if route.reset:
                    route.reset = False
                    return Reset(attempt=route.epoch + 1)
                core.hungry(request_id)
                try:
                    delta: Delta = await stream.__anext__()
                except StopAsyncIteration:
                    if route.error is None:
                        raise EngineError("the engine ended the stream before the answer was complete") from None
                    continue
                except ReplicaLost:  # this answer alone broke off; its replica goes on
                    if route.error is None and not router.again(route):
                        raise
                    continue
                except _LOSSES as exc:
                    if route.error is None:
                        router.cut(route, exc)
                    continue
                if core.delta(request_id, delta.epoch, len(delta.token_ids), delta.load):
                    delta = route.received(delta)
                    break
        except Exception as exc:
            if isinstance(exc, EngineError):
                exc.request_id = request_id
            router.end(route, "failed")
            raise
        except BaseException:
            await router.abort(route)  # noqa: ASYNC102 - it shields itself
            raise
        if delta.usage is not None:
            router.end(route, "finished")
        return delta

    async def aclose(self) -> None:
        if self._route.outcome is None:
            await self._router.abort(self._route)

    def __del__(self) -> None:
        if self._route.outcome is None:
            self._router.abort_soon(self._route)


def _obstacle(request: GenerateRequest) -> str | None:
    """Why no other replica can go on with an answer after its first delta, as a phrase; None if one can.

    Another one begins its random numbers, its grammar, its counts of tokens and its search for stop strings anew.
    """
    sampling = request.sampling
    if sampling.n > 1:
        return f"it has n={sampling.n}"
    given = [name for name in _BEGUN_ANEW if getattr(sampling, name) is not None]
    return f"it has {', '.join(given)}" if given else None


def _thread_safe_post() -> Callable[[Callable[[], object]], object]:
    """What runs a function in this event loop, from any thread; does nothing once the loop is closed."""
    loop: Any = anyio.lowlevel.current_token().native_token
    post = loop.call_soon_threadsafe if hasattr(loop, "call_soon_threadsafe") else loop.run_sync_soon

    def post_unless_closed(fn: Callable[[], object]) -> None:
        with suppress(RuntimeError):
            post(fn)

    return post_unless_closed
