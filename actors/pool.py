"""EnginePool: N replicas of one engine behind one ``generate()``.

    generate -> Router (which replica, or wait) -> the replica's EngineActor -> deltas -> DeltaStream

This module starts and stops the replicas; :mod:`actors.routing` has the requests. A pool holds no
cancel scope, so it works as a fixture and in an ``AsyncExitStack``.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Literal, NoReturn

import anyio
import msgspec

from actors.bundles import Placement
from actors.engine import Completion, Embedding, EngineActor, EngineInfo, EngineMetrics, to_embed_request, to_request
from actors.finish import finish
from actors.routing import DeltaStream, Replica, ReplicaState, ReplicaStats, Router
from arun.errors import EngineError, MisuseError, RequestError
from arun.logs import get_logger
from arun.runtime import Runtime

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType
    from typing import Self, Unpack

    from actors.bundles import Reservation, Strategy
    from actors.cluster import Cluster
    from actors.engine import Delta, EngineSpec, GenerateRequest, Lane, PromptLike, RequestOptions
    from arun.runtime import Background

__all__ = ("DeltaStream", "EnginePool", "PoolStats", "ReplicaProgress", "ReplicaStats")

log = get_logger("arun.pool")

_HEADROOM = 16  # messages besides requests that an engine's actor takes at a time
_PROGRESS_SECONDS = 1.0


class ReplicaProgress(msgspec.Struct, frozen=True):
    """Where the start of one replica is.

    :ivar seconds: since the pool's start.
    """

    replica: int
    state: ReplicaState
    seconds: float


class PoolStats(msgspec.Struct, frozen=True):
    """A pool at one moment.

    :ivar waiting: requests that no replica has room for yet.
    """

    name: str
    waiting: int
    replicas: tuple[ReplicaStats, ...]


class EnginePool:
    """Replicas of one engine, each an actor in a placement group of its own.

    >>> async with cluster.engines(EngineSpec(model="tiny"), replicas=2) as pool:
    ...     async for delta in pool.generate("Hello", max_tokens=32):
    ...         print(delta.text, end="")

    :param cpus: CPUs of each worker's bundle.
    :param max_in_flight: most requests that one replica has at a time; others wait in order of arrival.
    :param on_progress: called about once a second and at every change while the replicas start.
    """

    def __init__(
        self,
        cluster: Cluster,
        spec: EngineSpec,
        *,
        replicas: int = 1,
        name: str | None = None,
        cpus: float = 1.0,
        gpus: float | None = None,
        strategy: Strategy = "STRICT_PACK",
        labels: Mapping[str, str] = {},
        wait: float | None = None,
        max_in_flight: int = 256,
        on_progress: Callable[[ReplicaProgress], object] | None = None,
    ) -> None:
        spec.validate()
        if replicas < 1 or max_in_flight < 1:
            raise MisuseError(f"replicas is {replicas} and max_in_flight {max_in_flight}; both must be at least 1")
        self.name = name or f"engines-{uuid.uuid4().hex[:6]}"
        self.on_progress = on_progress
        self._cluster = cluster
        self._spec = spec
        self._cpus = cpus
        self._gpus = gpus
        self._strategy: Strategy = strategy
        self._labels = dict(labels)
        self._wait = wait
        self._max_in_flight = max_in_flight
        self._replicas = [Replica(number) for number in range(replicas)]
        self._router: Router | None = None
        self._reservation: Reservation | None = None
        self._state: Literal["new", "starting", "open", "closed"] = "new"
        self._closing: Background[None] | None = None
        self._began = 0.0

    async def start(self) -> None:
        """Reserve bundles, start every replica, return when all are ready.

        When one fails, the others are stopped, everything is released, and its error is raised.

        :raises PlacementError: the cluster can't hold the replicas.
        :raises ModelNotFound: there is no such model.
        :raises EngineError: an engine did not start; the message has the cause.
        """
        if self._state != "new":
            raise MisuseError(f"pool {self.name!r} was started before; make a new one with cluster.engines()")
        self._state = "starting"
        self._began = anyio.current_time()
        ticking = Runtime.current().start(self._tick, name=f"progress of pool {self.name}")
        try:
            await self._reserve()
            await self._start_replicas()
        except BaseException:
            await self.aclose()
            raise
        finally:
            ticking.cancel()
        self._router = Router(self.name, self._replicas, limit=self._max_in_flight)
        self._state = "open"
        log.info("pool.started", pool=self.name, replicas=len(self._replicas))

    def generate(
        self,
        prompt: PromptLike,
        *,
        max_tokens: int = 16,
        temperature: float | None = None,
        lane: Lane = "interactive",
        priority: int = 0,
        request_id: str | None = None,
        **options: Unpack[RequestOptions],
    ) -> DeltaStream:
        """Ask for an answer and return its deltas as they come. The request is submitted at once, by the call itself.

        :param prompt: text; token ids, ``list[int]``, shorter than the model's context; or chat messages, a list
            of ``{"role": ..., "content": ...}``.
        :param max_tokens: most tokens to generate.
        :param temperature: 0 is greedy; None is the model's own default.
        :param lane: ``"interactive"`` is served before ``"batch"``.
        :param priority: within a lane, lower is served first.
        :param request_id: unique in this pool; by default a random one.
        :param options: fields of :class:`~actors.engine.Sampling`, which are vLLM's sampling parameters, and of
            :class:`~actors.engine.RequestOptions`: adapter, tools, chat template.
        :raises RequestError: an unknown parameter or a value out of range. What only the engine can judge, such as
            a prompt that is too long, is raised by the stream.
        """
        request = to_request(
            request_id or uuid.uuid4().hex,
            prompt,
            {"max_tokens": max_tokens, "temperature": temperature, **options},
            lane=lane,
            priority=priority,
        )
        if self._spec.runner == "pooling":
            raise RequestError(f"pool {self.name!r} embeds, it does not generate: call pool.embed()")
        return self._submit(request)

    async def complete(
        self,
        prompt: PromptLike,
        *,
        max_tokens: int = 16,
        temperature: float | None = None,
        lane: Lane = "interactive",
        priority: int = 0,
        request_id: str | None = None,
        **options: Unpack[RequestOptions],
    ) -> Completion:
        """Ask for an answer and return it whole; parameters and errors as for :meth:`generate`."""
        began = anyio.current_time()
        stream = self.generate(
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            lane=lane,
            priority=priority,
            request_id=request_id,
            **options,
        )
        first: float | None = None
        deltas: list[Delta] = []
        async for delta in stream:
            if first is None:
                first = anyio.current_time() - began
            deltas.append(delta)
        return Completion.of(stream.request_id, deltas, first)

    async def embed(
        self,
        prompt: PromptLike,
        *,
        dimensions: int | None = None,
        normalize: bool | None = None,
        lane: Lane = "interactive",
        priority: int = 0,
        request_id: str | None = None,
    ) -> Embedding:
        """The vector of a text, of token ids or of chat messages; for a pool of ``EngineSpec(runner="pooling")``.

        :param dimensions: of the vector; None is the model's own. Only models trained for it can shorten it.
        :param normalize: to length 1; None is the model's own default.
        :raises RequestError: the pool generates, or the engine refuses the prompt or the dimensions.
        """
        if self._spec.runner != "pooling":
            raise RequestError(
                f"pool {self.name!r} generates, it does not embed: open one with EngineSpec(..., runner='pooling')"
            )
        request = to_embed_request(
            request_id or uuid.uuid4().hex,
            prompt,
            {"dimensions": dimensions, "normalize": normalize},
            lane=lane,
            priority=priority,
        )
        deltas = [delta async for delta in self._submit(request)]
        usage = deltas[-1].usage
        return Embedding(request.request_id, deltas[-1].embedding or b"", usage.prompt_tokens if usage else 0)

    async def metrics(self) -> list[EngineMetrics]:
        """What the engines count themselves: queue, batch, KV cache, prefix cache, tokens.

        :raises EngineError: an engine has no metrics.
        :raises ActorDied: a replica's process has ended.
        """
        return [await replica.actor.metrics() for replica in self._replicas if replica.actor is not None]

    async def sleep(self, level: int = 1) -> None:
        """Give the engines' GPU memory back until :meth:`wake`; requests wait meanwhile, running ones are aborted.

        :param level: 1 keeps the weights in the machine's memory, 2 drops them.
        :raises EngineError: the engine can't sleep: it runs on a CPU, or its spec lacks
            ``engine_args={"enable_sleep_mode": True}``.
        """
        for replica in self._replicas:
            if replica.actor is not None:
                await replica.actor.sleep(level)

    async def wake(self) -> None:
        """Take the memory again and go on. :raises EngineError: the engine can't sleep."""
        for replica in self._replicas:
            if replica.actor is not None:
                await replica.actor.wake()

    def stats(self) -> PoolStats:
        """Every replica with its counts, as the pool sees them now."""
        waiting = 0 if self._router is None else self._router.waiting
        return PoolStats(self.name, waiting, tuple(replica.stats() for replica in self._replicas))

    async def info(self) -> list[EngineInfo]:
        """What the engines say of themselves: their own counts include work that the pool has let go of.

        :raises ActorDied: a replica's process has ended.
        """
        return [await replica.actor.info() for replica in self._replicas if replica.actor is not None]

    async def aclose(self) -> None:
        """Fail what is in flight, stop the engines, give the bundles back. Idempotent, never cut short."""
        if self._closing is None:
            self._state = "closed"
            self._closing = Runtime.current().start(self._close, name=f"close of pool {self.name}")
        await finish(self._closing)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __reduce__(self) -> NoReturn:
        raise MisuseError(
            f"pool {self.name!r} can't be pickled: it holds connections to its engines. Give it to the application "
            "as a resource, and let another process open a pool of its own"
        )

    def _submit(self, request: GenerateRequest) -> DeltaStream:
        if self._router is None or self._state != "open":
            raise MisuseError(
                f"pool {self.name!r} is not open; use it inside `async with cluster.engines(...) as pool:`"
            )
        return self._router.submit(request)

    # Starting and stopping.

    async def _reserve(self) -> None:
        for replica in self._replicas:
            self._tell(replica, "reserving bundles")
        resources = await self._cluster.resources()
        vllm = self._spec.engine == "vllm"
        placement = Placement(
            tensor_parallel=self._spec.tensor_parallel_size,
            pipeline_parallel=self._spec.pipeline_parallel_size,
            replicas=len(self._replicas),
            cpus=self._cpus,
            gpus=self._gpus if self._gpus is not None else 1.0 if vllm and resources.gpus else 0.0,
            strategy=self._strategy,
            labels=self._labels,
        )
        if vllm and not placement.gpus and placement.workers > 1 and self._strategy != "STRICT_PACK":
            raise MisuseError(
                f"strategy={self._strategy!r}: without GPUs vLLM runs all {placement.workers} workers of a replica on "
                "one node; use STRICT_PACK"
            )
        if vllm and len(resources.nodes) == 1:  # the engines will run here, so what is missing is told at once
            from actors.vllm_engine import check_here, resolve_here

            check_here(self._spec)
            self._reservation = await self._cluster.reserve(placement, wait=self._wait)
            for replica in self._replicas:
                self._tell(replica, "preparing model")
            self._spec = await resolve_here(self._spec)
        else:
            self._reservation = await self._cluster.reserve(placement, wait=self._wait)

    async def _tick(self) -> None:
        while True:
            await anyio.sleep(_PROGRESS_SECONDS)
            for replica in self._replicas:
                if replica.state not in {"ready", "dead"}:
                    self._tell(replica, replica.state)

    async def _start_replicas(self) -> None:
        failures: list[Exception] = []

        async def start(replica: Replica) -> None:
            self._tell(replica, "loading model")
            try:
                await self._start_replica(replica)
            except Exception as exc:  # noqa: BLE001  # whatever it is, start() raises it
                exc.add_note(f"replica {replica.number} of pool {self.name!r} did not start")
                failures.append(exc)
                self._tell(replica, "dead")
            else:
                self._tell(replica, "ready")
            if failures:
                starting.cancel_scope.cancel()

        async with anyio.create_task_group() as starting:
            for replica in self._replicas:
                starting.start_soon(start, replica)
        if failures:
            raise failures[0]

    def _tell(self, replica: Replica, state: ReplicaState) -> None:
        replica.state = state
        if self.on_progress is not None:
            self.on_progress(ReplicaProgress(replica.number, state, anyio.current_time() - self._began))

    async def _start_replica(self, replica: Replica) -> None:
        assert self._reservation is not None  # start() reserves first
        replica.actor = await self._cluster.spawn(
            EngineActor,
            self._spec,
            name=f"{self.name}-{replica.number}",
            concurrency=self._max_in_flight + _HEADROOM,
            group=self._reservation.groups[replica.number],
            env=self._spec.env,
        )
        info: EngineInfo = await replica.actor.info()
        replica.pid, replica.start_seconds = info.pid, info.start_seconds

    async def _close(self) -> None:
        if self._router is not None:
            self._router.close(EngineError(f"pool {self.name!r} was closed before the answer was complete"))
        try:
            async with anyio.create_task_group() as stopping:
                for replica in reversed(self._replicas):
                    stopping.start_soon(self._stop_replica, replica)
        finally:
            if self._reservation is not None:
                await self._reservation.release()  # noqa: ASYNC102 - finish() lets no cancellation cut it short
        log.info("pool.closed", pool=self.name)

    async def _stop_replica(self, replica: Replica) -> None:
        if replica.actor is not None:
            await self._cluster.stop(replica.actor)
        if replica.state != "dead":
            replica.state = "stopped"
