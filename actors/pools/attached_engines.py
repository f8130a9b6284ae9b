"""AttachedEngines: the replicas of a detached pool, as a program sees them that shares them with others."""

from __future__ import annotations

import contextlib
import weakref
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import anyio

from actors.answers import Delta, Reset
from actors.finish import finish
from actors.members.supervision import Supervisor
from actors.pools.pool_stats import PoolStats, ReplicaProgress
from actors.pools.pool_supervisor import Answered, PoolFacts, PoolSupervisor, PoolView
from arun.errors import (
    ActorDied,
    ActorNotFound,
    ChannelLost,
    EngineDead,
    EngineError,
    MailboxFull,
    MisuseError,
    PoolBusy,
    ReplicaLost,
)
from arun.runtime import Background, Runtime

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from actors.actor import ActorStream
    from actors.cluster import Cluster
    from actors.engine import EngineInfo, EngineMetrics, EngineSpec, GenerateRequest
    from actors.pools.engines import PoolSettings
    from actors.pools.pool_state import Reroute

__all__ = ("AttachedEngines", "PoolOrder")

_ABORT_SECONDS = 10.0
_SUPERVISOR = Supervisor()
_PREFIX = "pool/"
"""What the name of a pool's supervisor has before the pool's."""


class PoolOrder(NamedTuple):
    """A detached pool to be.

    :ivar get_if_exists: take the one there is.
    """

    spec: EngineSpec
    settings: PoolSettings
    get_if_exists: bool


class AttachedEngines:
    """A client of one :class:`~actors.pools.pool_supervisor.PoolSupervisor`; as :class:`~actors.pools.engines.Engines`.

    :param order: of the pool to start; None for one that exists.
    :param tell: called at every change of a replica's state.
    """

    def __init__(
        self,
        cluster: Cluster,
        pool: str | None,
        order: PoolOrder | None,
        tell: Callable[[ReplicaProgress], object],
    ) -> None:
        if pool is None:
            raise MisuseError("lifetime='detached' needs name=...: without a name nobody could attach to the pool")
        self.pool = pool
        self._cluster = cluster
        self._order = order
        self._tell = tell
        self._supervisor: Any = None
        #: whether there is something to end: not where a start was refused, which may be because of another's pool
        self._to_end = order is None
        self._facts = PoolFacts(generates=True, capacity=1, stats=PoolStats(name=pool))
        self._watching: Background[None] | None = None
        self._streams: weakref.WeakSet[AttachedStream] = weakref.WeakSet()

    @property
    def generates(self) -> bool:
        return self._facts.generates

    @property
    def capacity(self) -> int:
        return self._facts.capacity

    @property
    def ended(self) -> bool:
        return self._watching is not None and self._watching.done

    @property
    def settings(self) -> dict[str, Any]:
        """Of its cluster, for a process that is to attach in this one's place."""
        return self._cluster.settings

    async def start(self) -> None:
        self._to_end = created = False
        self._cluster.check_detachable()
        try:
            supervisor = await self._cluster.get(self._actor, PoolSupervisor)
        except ActorNotFound as missing:
            if self._order is None:
                raise ActorNotFound(
                    f"there is no detached pool {self.pool!r}; start it with cluster.engines(spec, name={self.pool!r}, "
                    f"lifetime='detached'). In full: {missing}"
                ) from None
            supervisor, created = await self._create(self._order)
        else:
            if self._order is not None and not self._order.get_if_exists:
                raise MisuseError(
                    f"there is a detached pool {self.pool!r} already: cluster.pool({self.pool!r}) attaches to it, and "
                    "so does get_if_exists=True"
                )
        self._supervisor, self._to_end = supervisor, True
        self._watching = Runtime.current().start(self._watch, name=f"view of pool {self.pool}")
        try:
            self._facts = await self._supervisor.opened()
        except BaseException:
            if created:
                ending = Runtime.current().start(self.end, name=f"end of pool {self.pool}")
                await finish(ending)  # noqa: ASYNC102 - finish() lets no cancellation cut it short
            raise

    def submit(self, request: GenerateRequest, reroute: Reroute = "continue") -> AttachedStream:
        stream = AttachedStream(self.pool, self._supervisor, request, reroute)
        self._streams.add(stream)
        return stream

    def stats(self) -> PoolStats:
        return self._facts.stats

    async def info(self) -> list[EngineInfo]:
        info: list[EngineInfo] = await self._supervisor.info()
        return info

    async def metrics(self) -> list[EngineMetrics]:
        metrics: list[EngineMetrics] = await self._supervisor.metrics()
        return metrics

    async def sleep(self, level: int) -> None:
        await self._supervisor.sleep(level)

    async def wake(self) -> None:
        await self._supervisor.wake()

    async def scale(self, replicas: int) -> None:
        await self._supervisor.scale(replicas)

    async def drain(self, replica: int | None) -> None:
        await self._supervisor.drain(replica)

    async def leave(self) -> None:
        for stream in tuple(self._streams):
            stream.stop(EngineError(f"pool {self.pool!r} was closed before the answer was complete"))
        if self._watching is not None:
            self._watching.cancel()
            await self._watching.ended()

    async def end(self) -> None:
        await self.leave()
        if not self._to_end:
            return
        self._to_end = False
        if self._supervisor is None:  # never attached to
            await self._cluster.stop(self._actor)
            return
        # Without haste; the actor's own end has a deadline.
        with contextlib.suppress(ActorDied, ChannelLost):
            await self._supervisor.end()
        with contextlib.suppress(ActorNotFound):  # somebody else was faster
            await self._cluster.stop(self._actor)

    @property
    def _actor(self) -> str:
        return f"{_PREFIX}{self.pool}"

    async def _create(self, order: PoolOrder) -> tuple[Any, bool]:
        """The supervisor, and whether it is new: another program may have been faster."""
        try:
            supervisor = await self._cluster.spawn(
                PoolSupervisor,
                self.pool,
                order.spec,
                order.settings,
                self._cluster.settings,
                name=self._actor,
                lifetime="detached",
                restarts=_SUPERVISOR,
            )
        except MisuseError:
            if not order.get_if_exists:
                raise
            return await self._cluster.get(self._actor, PoolSupervisor), False
        return supervisor, True

    async def _watch(self) -> None:
        heard = True
        while heard:  # else the supervisor is gone for good
            heard = False
            with contextlib.suppress(ActorDied, ChannelLost):
                async for view in self._supervisor.watch():
                    heard = True
                    self._see(view)

    def _see(self, view: PoolView) -> None:
        self._facts = PoolFacts(self._facts.generates, view.capacity, view.stats)
        for progress in view.progress:
            self._tell(progress)


class AttachedStream:
    """The :class:`~actors.DeltaStream` of a request to a detached pool."""

    __slots__ = (
        "__weakref__", "_attempt", "_began", "_error", "_outcome", "_pool", "_replica", "_request", "_reroute",
        "_stream", "_supervisor", "_tokens",
    )  # fmt: skip

    def __init__(self, pool: str, supervisor: Any, request: GenerateRequest, reroute: Reroute) -> None:
        self._pool = pool
        self._supervisor = supervisor
        self._request = request
        self._reroute: Reroute = reroute
        self._stream = self._opened()
        self._replica: int | None = None
        self._attempt = 1
        #: whether anything has come since the stream was opened
        self._began = False
        self._tokens = 0
        self._error: EngineError | None = None
        self._outcome: Literal["finished", "failed", "aborted"] | None = None

    @property
    def request_id(self) -> str:
        return self._request.request_id

    @property
    def replica(self) -> int | None:
        return self._replica

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        if self._outcome is not None:
            if self._outcome == "finished":
                await anext(self._stream, None)  # the end of the stream, so that it needs no cancelling
            raise StopAsyncIteration
        try:
            delta = await self._next()
        except EngineError as exc:
            exc.request_id = self.request_id
            self._outcome = "failed"
            raise
        except Exception:
            self._outcome = "failed"
            raise
        except BaseException:
            await self.aclose()  # noqa: ASYNC102 - it shields itself
            raise
        if delta.usage is not None:
            self._outcome = "finished"
        return delta

    async def aclose(self) -> None:
        if self._outcome is None:
            self._outcome = "aborted"
            with anyio.move_on_after(_ABORT_SECONDS, shield=True):
                await self._stream.aclose()

    def stop(self, error: EngineError) -> None:
        """Let it fail at its next delta."""
        if self._outcome is None:
            self._error = error
            self._stream.cancel()

    async def _next(self) -> Delta:
        try:
            answered: Answered = await anext(self._stream)
        except StopAsyncIteration:
            raise self._error or EngineError("the pool ended the stream before the answer was complete") from None
        except MailboxFull as exc:
            raise PoolBusy(f"pool {self._pool!r} is being started again, and many wait for it already: {exc}") from exc
        except (ActorDied, ChannelLost) as exc:
            return self._begin_anew(exc)
        self._began = True
        if answered.attempt:
            self._tokens = 0
            self._attempt += 1
            return Reset(attempt=self._attempt)
        self._replica = answered.replica
        self._tokens += len(answered.delta.token_ids)
        return answered.delta

    def _begin_anew(self, lost: ActorDied | ChannelLost) -> Delta:
        """What follows from the loss of the supervisor."""
        if self._error is not None:
            raise self._error
        if not self._began:  # else it would have been asked again: there is none any more
            raise EngineDead(f"pool {self._pool!r} is out of reach: {lost}") from lost
        if self._reroute != "restart":
            raise ReplicaLost(
                f"the supervisor of pool {self._pool!r} was lost: {lost}. {self._tokens} tokens of request "
                f"{self.request_id!r} were delivered, and nobody can go on with it. Ask again, or with "
                "reroute='restart', which begins anew"
            ) from lost
        self._stream, self._began = self._opened(), False
        self._tokens, self._attempt = 0, self._attempt + 1
        return Reset(attempt=self._attempt)

    def _opened(self) -> ActorStream:
        try:
            stream: ActorStream = self._supervisor.generate(self._request, self._reroute)
        except MailboxFull as exc:
            raise PoolBusy(
                f"this program has as many requests at pool {self._pool!r} as a connection takes: {exc}"
            ) from exc
        return stream
