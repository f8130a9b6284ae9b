"""EnginePool: N replicas of one engine behind one ``generate()``.

    generate -> Router (which replica, or wait) -> the replica's EngineActor -> deltas -> DeltaStream

What goes where, and what happens when a replica is lost, is decided by :mod:`actors.assignment`; :mod:`actors.routing`
has the requests, :mod:`actors.fleet` the replicas; this module is what users see of them. A pool holds no cancel
scope, so it works as a fixture and in an ``AsyncExitStack``.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypedDict

import anyio

from actors.answers import Completion, Embedding, Reset
from actors.assignment import PoolCore
from actors.batches import calls
from actors.engine import EngineInfo, EngineMetrics
from actors.finish import finish
from actors.fleet import Fleet, FleetOptions, Replica
from actors.pool_actions import StartReplica
from actors.pool_stats import PoolStats, ReplicaProgress, ReplicaStats, Speed
from actors.requests import to_embed_request, to_request
from actors.routing import DeltaStream, Router
from actors.supervision import Supervisor
from arun.errors import EngineError, MisuseError, RequestError
from arun.logs import get_logger
from arun.outcome_stream import fan_out
from arun.policies import Policy
from arun.runtime import Runtime

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping
    from types import TracebackType
    from typing import Self, Unpack

    from actors.batches import BatchRequest
    from actors.bundles import Strategy
    from actors.cluster import Cluster
    from actors.engine import Delta, EngineSpec, GenerateRequest, Lane, PromptLike, RequestOptions
    from actors.pool_state import Reroute
    from arun.outcome_stream import FanOut
    from arun.runtime import Background

__all__ = ("DeltaStream", "EnginePool", "PoolOptions", "PoolStats", "ReplicaProgress", "ReplicaStats")

log = get_logger("arun.pool")

_PROGRESS_SECONDS = 1.0
_PULSE_SECONDS = 5.0
_SUPERVISOR = Supervisor()
_BATCH_LIMIT = 1024
_SERVING = {"reserving bundles", "preparing model", "loading model", "ready", "restarting"}


class PoolOptions(TypedDict, total=False):
    """What ``cluster.engines()`` takes by name; see :class:`EnginePool`."""

    replicas: int
    name: str | None
    cpus: float
    gpus: float | None
    strategy: Strategy
    labels: Mapping[str, str]
    wait: float | None
    max_in_flight: int
    max_waiting: int
    restarts: int | Supervisor
    watchdog: float
    start_timeout: float
    quarantine: int
    affinity_margin: int
    on_progress: Callable[[ReplicaProgress], object] | None


class EnginePool:
    """Replicas of one engine, each an actor in a placement group of its own.

    >>> async with cluster.engines(EngineSpec(model="tiny"), replicas=2) as pool:
    ...     async for delta in pool.generate("Hello", max_tokens=32):
    ...         print(delta.text, end="")

    A replica whose process dies, whose engine fails or that hangs is started again in its bundles, and what it was
    answering goes on at another replica after the last token that was delivered.

    :param cpus: CPUs of each worker's bundle.
    :param gpus: GPUs of each worker's bundle; by default 1 for a vLLM engine where the cluster has any, else 0.
    :param strategy: how the workers of one replica lie on nodes; see :class:`~actors.bundles.Placement`.
    :param labels: of the nodes that will do; see :class:`~actors.bundles.Placement`.
    :param wait: seconds to wait for resources that others hold, and for a cluster that grows.
    :param max_in_flight: most requests that one replica has at a time; others wait, ``interactive`` before ``batch``.
    :param max_waiting: most requests that wait; more are refused with PoolBusy.
    :param restarts: how often a replica is started again within 60 seconds, or a Supervisor with other numbers. When
        that is used up the replica is dead, and ``scale()`` replaces it.
    :param watchdog: seconds. A replica that sends no delta for so long while consumers wait for one, or answers no
        health check, hangs: it is killed and started again. More than the longest prompt takes to its first token.
    :param start_timeout: seconds that a replica has to start again.
    :param quarantine: a request that was in flight on so many replicas when they were lost is tried once more, alone,
        and if that one is lost too it fails with RequestQuarantined; at once, if it was alone on the last of them.
    :param affinity_margin: how many requests more than the least loaded replica one may have that has answered a prompt
        with the same beginning, and still be preferred.
    :param on_progress: called at every change of a replica's state, and about once a second while the pool starts.
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
        max_waiting: int = 4096,
        restarts: int | Supervisor = _SUPERVISOR,
        watchdog: float = 60.0,
        start_timeout: float = 600.0,
        quarantine: int = 2,
        affinity_margin: int = 8,
        on_progress: Callable[[ReplicaProgress], object] | None = None,
    ) -> None:
        spec.validate()
        for option, value, least in (
            ("replicas", replicas, 1),
            ("max_in_flight", max_in_flight, 1),
            ("max_waiting", max_waiting, 0),
            ("quarantine", quarantine, 1),
            ("affinity_margin", affinity_margin, 0),
        ):
            if value < least:
                raise MisuseError(f"{option} is {value}; it must be at least {least}")
        if watchdog <= 0 or start_timeout <= 0:
            raise MisuseError(f"watchdog is {watchdog} and start_timeout {start_timeout}; both are seconds above 0")
        self.name = name or f"engines-{uuid.uuid4().hex[:6]}"
        self.on_progress = on_progress
        self._spec = spec
        self._max_in_flight = max_in_flight
        self._count = replicas
        self._core = PoolCore(
            limit=max_in_flight,
            max_waiting=max_waiting,
            supervisor=Supervisor(intensity=restarts) if isinstance(restarts, int) else restarts,
            watchdog=watchdog,
            quarantine=quarantine,
            affinity_margin=affinity_margin,
        )
        options = FleetOptions(
            cpus=cpus,
            gpus=gpus,
            strategy=strategy,
            labels=dict(labels),
            wait=wait,
            concurrency=max_in_flight,
            pulse=min(_PULSE_SECONDS, watchdog / 4),
            watchdog=watchdog,
            start_timeout=start_timeout,
        )
        self._fleet = Fleet(self.name, cluster, spec, options, self._tell)
        self._router: Router | None = None
        self._state: Literal["new", "starting", "open", "draining", "closed"] = "new"
        self._closing: Background[None] | None = None
        self._began = 0.0
        self._speeds: dict[int, Speed] = {}

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
            await self._start_replicas()
        except BaseException:
            await self.aclose()
            raise
        finally:
            ticking.cancel()
        self._state = "open"
        log.info("pool.started", pool=self.name, replicas=self._count)

    def generate(
        self,
        prompt: PromptLike,
        *,
        max_tokens: int = 16,
        temperature: float | None = None,
        lane: Lane = "interactive",
        priority: int = 0,
        request_id: str | None = None,
        reroute: Reroute = "continue",
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
        :param reroute: what happens when the replica is lost. ``"continue"``: another one goes on after the last token
            that was delivered; where that would be wrong (seed, n, stop strings, penalties, logprobs, structured
            outputs) and a delta is out, ReplicaLost is raised. ``"restart"``: there, a :class:`~actors.Reset` is
            yielded instead and the answer begins anew. ``"never"``: ReplicaLost is raised always.
        :param options: fields of :class:`~actors.engine.Sampling`, which are vLLM's sampling parameters, and of
            :class:`~actors.engine.RequestOptions`: adapter, tools, chat template.
        :raises RequestError: an unknown parameter or a value out of range. What only the engine can judge, such as
            a prompt that is too long, is raised by the stream.
        :raises PoolBusy: ``max_waiting`` requests wait already.
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
        return self._submit(request, reroute)

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
        """Ask for an answer and return it whole; parameters and errors as for :meth:`generate`.

        When its replica is lost, an answer that can't be continued begins anew: nobody has seen anything of it.
        """
        began = anyio.current_time()
        stream = self.generate(
            prompt,
            max_tokens=max_tokens,
            temperature=temperature,
            lane=lane,
            priority=priority,
            request_id=request_id,
            reroute="restart",
            **options,
        )
        first: float | None = None
        deltas: list[Delta] = []
        async for delta in stream:
            if first is None:
                first = anyio.current_time() - began
            if isinstance(delta, Reset):
                deltas.clear()
            else:
                deltas.append(delta)
        return Completion.of(stream.request_id, deltas, first)

    def map(
        self,
        requests: Iterable[BatchRequest] | AsyncIterable[BatchRequest],
        policy: Policy | None = None,
        **options: Any,
    ) -> FanOut[Completion]:
        """Answer many requests and iterate over their Outcomes as they end.

        >>> async for outcome in pool.map(prompts, max_tokens=64):
        ...     match outcome:
        ...         case Ok(completion): print(completion.text)
        ...         case Failed(error): print(error.request_id, error)

        :param requests: an (async) iterable of prompts, or of mappings with ``prompt`` and other arguments of
            :meth:`generate`; read only as there is room, so it may be endless.
        :param policy: limit, order, retries, and what a failure does; by default as many at a time as the replicas
            take, in order of completion, with every failure as an Outcome.
        :param options: arguments of :meth:`generate` for all requests; the lane is ``"batch"`` unless one is named.
        :return: outcomes. A request without a ``request_id`` gets one that ends in ``-`` and its number, from 0; the
            Completion has it, and an EngineError too.
        """
        policy = policy or Policy(limit=self.batch_limit, on_error="collect")
        return fan_out(calls(self.complete, requests, {"lane": "batch", **options}), policy)

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
        return [await actor.metrics() for actor in self._actors()]

    async def sleep(self, level: int = 1) -> None:
        """Give the engines' GPU memory back until :meth:`wake`; requests wait meanwhile, running ones are aborted.

        :param level: 1 keeps the weights in the machine's memory, 2 drops them.
        :raises EngineError: the engine can't sleep: it runs on a CPU, or its spec lacks
            ``engine_args={"enable_sleep_mode": True}``.
        """
        for actor in self._actors():
            await actor.sleep(level)

    async def wake(self) -> None:
        """Take the memory again and go on. :raises EngineError: the engine can't sleep."""
        for actor in self._actors():
            await actor.wake()

    def stats(self) -> PoolStats:
        """Every replica with its counts, as the pool sees them now."""
        core, now = self._core, anyio.current_time()
        replicas = tuple(self._replica_stats(replica, now) for _, replica in sorted(self._fleet.replicas.items()))
        return PoolStats(
            name=self.name,
            waiting=core.waiting,
            waiting_interactive=core.waiting_in("interactive"),
            waiting_batch=core.waiting_in("batch"),
            in_flight=sum(each.in_flight for each in replicas),
            tokens_per_second=sum(each.tokens_per_second for each in replicas),
            restarts=core.restarts,
            reroutes=core.reroutes,
            dead_letters=core.dead_letters,
            quarantined=core.quarantined,
            prefix_hits=core.prefix_hits,
            replicas=replicas,
        )

    async def info(self) -> list[EngineInfo]:
        """What the engines say of themselves: their own counts include work that the pool has let go of.

        :raises ActorDied: a replica's process has ended.
        """
        return [await actor.info() for actor in self._actors()]

    async def scale(self, replicas: int) -> None:
        """Have so many replicas: start more and return when they are ready, or drain some and return at once.

        Requests go on meanwhile. Replicas that were given up are replaced.

        :raises PlacementError: the cluster can't hold so many more; nothing has changed.
        :raises EngineError: a new one did not start; the message has the cause.
        """
        router = self._opened()
        if replicas < 1:
            raise MisuseError(f"scale({replicas}): a pool has at least 1 replica; aclose() ends it")
        serving = [replica for replica in self._fleet.replicas.values() if replica.state in _SERVING]
        if replicas > len(serving):
            await self._fleet.check_fits(replicas)
        before = set(self._fleet.replicas)
        log.info("pool.scale", pool=self.name, replicas=replicas, serving=len(serving))
        router.do(self._core.scale(replicas))
        for replica in [each for number, each in self._fleet.replicas.items() if number not in before]:
            await replica.settled.wait()
            if replica.state == "dead":
                raise EngineError(f"replica {replica.number} of pool {self.name!r} did not start: {replica.cause}")

    async def drain(self, replica: int | None = None) -> None:
        """Let what runs come to its end.

        :param replica: its number: it gets no more requests, and when it has none it is stopped and its bundles are
            given back; returns then. None: the pool takes no more requests; returns when none waits or runs. Its
            engines stay up until it is closed.
        :raises MisuseError: there is no such replica.
        """
        router = self._opened()
        if replica is None:
            self._state = "draining"
            await router.wait_idle()
            return
        known = self._fleet.replicas.get(replica)
        if known is None:
            numbers = ", ".join(map(str, sorted(self._fleet.replicas)))
            raise MisuseError(f"pool {self.name!r} has no replica {replica}; it has {numbers}")
        if known.state == "ready":
            self._fleet.set_state(known, "draining")
        log.info("pool.drain", pool=self.name, replica=replica, in_flight=known.counts.in_flight)
        router.do(self._core.drain(replica))
        await known.gone.wait()

    @property
    def started(self) -> bool:
        """Whether :meth:`start` was called."""
        return self._state != "new"

    @property
    def batch_limit(self) -> int:
        """Requests that :meth:`map` has in flight by default."""
        return min(_BATCH_LIMIT, self._max_in_flight * max(1, len(self._fleet.replicas) or self._count))

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

    def _opened(self) -> Router:
        if self._router is None or self._state not in {"open", "draining"}:
            raise MisuseError(
                f"pool {self.name!r} is not open; use it inside `async with cluster.engines(...) as pool:`"
            )
        return self._router

    def _submit(self, request: GenerateRequest, reroute: Reroute = "continue") -> DeltaStream:
        router = self._opened()
        if self._state == "draining":
            raise MisuseError(f"pool {self.name!r} is draining, so it takes no more requests")
        return router.submit(request, reroute)

    def _actors(self) -> list[Any]:
        return [replica.actor for replica in self._fleet.replicas.values() if replica.actor is not None]

    def _replica_stats(self, replica: Replica, now: float) -> ReplicaStats:
        counts = replica.counts
        speed = self._speeds.setdefault(replica.number, Speed())
        return ReplicaStats(
            replica=replica.number,
            pid=replica.pid,
            state=replica.state,
            start_seconds=replica.start_seconds,
            restarts=replica.generation - 1,
            in_flight=counts.in_flight,
            started=counts.started,
            finished=counts.finished,
            failed=counts.failed,
            aborted=counts.aborted,
            lost=counts.lost,
            tokens=counts.tokens,
            tokens_per_second=speed.at(now, counts.tokens),
            cause=replica.cause,
        )

    # Starting and stopping.

    async def _start_replicas(self) -> None:
        await self._fleet.check_fits(self._count)
        self._router = router = Router(self.name, self._core, self._fleet)
        self._fleet.report_to(router)
        # Not by router.do(): what keeps the first ones from starting is to be raised here.
        starts = [action for action in self._core.scale(self._count) if isinstance(action, StartReplica)]
        replicas = [self._fleet.add(start.replica) for start in starts]
        await self._for_each(replicas, self._fleet.prepare)
        await self._fleet.prepare_model()
        await self._for_each(replicas, self._fleet.launch)
        now = anyio.current_time()
        for replica in replicas:
            self._speeds[replica.number] = Speed()
            self._speeds[replica.number].at(now, 0)
            self._fleet.serve(replica)

    async def _for_each(self, replicas: list[Replica], do: Callable[[Replica], Awaitable[None]]) -> None:
        failures: list[Exception] = []

        async def one(replica: Replica) -> None:
            try:
                await do(replica)
            except Exception as exc:  # noqa: BLE001  # whatever it is, start() raises it
                exc.add_note(f"replica {replica.number} of pool {self.name!r} did not start")
                failures.append(exc)
                self._fleet.set_state(replica, "dead")
                starting.cancel_scope.cancel()

        async with anyio.create_task_group() as starting:
            for replica in replicas:
                starting.start_soon(one, replica)
        if failures:
            raise failures[0]

    async def _tick(self) -> None:
        while True:
            await anyio.sleep(_PROGRESS_SECONDS)
            for replica in self._fleet.replicas.values():
                if replica.state not in {"ready", "dead"}:
                    self._tell(replica)

    def _tell(self, replica: Replica) -> None:
        if self.on_progress is not None:
            self.on_progress(ReplicaProgress(replica.number, replica.state, anyio.current_time() - self._began))

    async def _close(self) -> None:
        if self._router is not None:
            self._router.close(EngineError(f"pool {self.name!r} was closed before the answer was complete"))
        async with anyio.create_task_group() as ending:
            for replica in reversed(list(self._fleet.replicas.values())):
                ending.start_soon(self._fleet.end, replica)
        log.info("pool.closed", pool=self.name)
