"""EnginePool: N replicas of one engine behind one ``generate()``.

    generate -> Router (which replica, or wait) -> the replica's EngineActor -> deltas -> DeltaStream

What goes where, and what happens when a replica is lost, is decided by :mod:`actors.pools.assignment`;
:mod:`actors.pools.routing` has the requests, :mod:`actors.pools.fleet` the replicas, and
:mod:`actors.pools.owned_engines` puts them together; this module is what users see of them. A detached pool has all
that in its :mod:`actors.pools.pool_supervisor`. A pool holds no cancel scope, so it works as a fixture and in an
``AsyncExitStack``.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

import anyio

from actors.answers import Completion, Embedding, Reset
from actors.finish import finish
from actors.members.supervision import Supervisor
from actors.on_ray.attached_pools import attached_pool
from actors.pools.attached_engines import AttachedEngines, PoolOrder
from actors.pools.batches import calls
from actors.pools.engines import DeltaStream, PoolSettings
from actors.pools.owned_engines import OwnedEngines
from actors.pools.pool_state import Reroute
from actors.pools.pool_stats import PoolStats, ReplicaProgress, ReplicaStats
from actors.requests import to_embed_request, to_request
from arun.errors import MisuseError, RequestError
from arun.guards import shown
from arun.outcome_stream import fan_out
from arun.policies import Policy
from arun.runtime import Runtime

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Callable, Iterable
    from types import TracebackType
    from typing import Self, Unpack

    from actors.bundles import Strategy
    from actors.cluster import Cluster, Lifetime
    from actors.engine import (
        Delta,
        EngineInfo,
        EngineMetrics,
        EngineSpec,
        Lane,
        PromptLike,
        RequestOptions,
    )
    from actors.pools.batches import BatchRequest
    from actors.pools.engines import Engines
    from arun.outcome_stream import FanOut
    from arun.runtime import Background

__all__ = ("DeltaStream", "EnginePool", "PoolOptions", "PoolStats", "ReplicaProgress", "ReplicaStats")

_SUPERVISOR = Supervisor()
_BATCH_LIMIT = 1000  # a connection has 1024 streams, and something beside the batch may want one


class PoolOptions(TypedDict, total=False):
    """What ``cluster.engines()`` takes by name; see :class:`EnginePool`."""

    replicas: int
    name: str | None
    lifetime: Lifetime
    get_if_exists: bool
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

    :param name: of the pool; a detached one needs one.
    :param lifetime: "scope": it ends with the block. "detached": it belongs to a supervisor, an actor in a Ray that
        this program did not start. Leaving the block only lets go of it, :meth:`close` ends it, and
        ``cluster.pool(name)`` attaches to it from any process.
    :param get_if_exists: attach to the detached pool of this name, if there is one, instead of starting it.
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
        lifetime: Lifetime = "scope",
        get_if_exists: bool = False,
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
        settings = PoolSettings(
            replicas=replicas,
            cpus=cpus,
            gpus=gpus,
            strategy=strategy,
            labels=dict(labels),
            wait=wait,
            max_in_flight=max_in_flight,
            max_waiting=max_waiting,
            supervisor=restarts if isinstance(restarts, Supervisor) else Supervisor(intensity=restarts),
            watchdog=watchdog,
            start_timeout=start_timeout,
            quarantine=quarantine,
            affinity_margin=affinity_margin,
        )
        if lifetime == "detached":
            engines: Engines = AttachedEngines(cluster, name, PoolOrder(spec, settings, get_if_exists), self._tell)
        elif lifetime != "scope":
            raise MisuseError(f"lifetime={lifetime!r}: it must be 'scope' or 'detached'")
        elif get_if_exists:
            raise MisuseError("get_if_exists=True needs lifetime='detached': no other pool is known by its name")
        else:
            engines = OwnedEngines(name or f"engines-{uuid.uuid4().hex[:6]}", cluster, spec, settings, self._tell)
        self._stand_on(engines, on_progress)

    @classmethod
    def attached(cls, cluster: Cluster, name: str) -> Self:
        """The detached pool of that name; what ``cluster.pool(name)`` gives."""
        pool = cls.__new__(cls)
        pool._stand_on(AttachedEngines(cluster, name, None, pool._tell), None)
        return pool

    def _stand_on(self, engines: Engines, on_progress: Callable[[ReplicaProgress], object] | None) -> None:
        self.name = engines.pool
        self.on_progress = on_progress
        self._engines = engines
        self._state: Literal["new", "starting", "open", "closed"] = "new"
        self._runtime: Runtime | None = None
        self._closing: Background[None] | None = None
        self._ending: Background[None] | None = None

    async def start(self) -> None:
        """Reserve bundles, start every replica, return when all are ready. Of a detached pool that exists: attach.

        When one fails, the others are stopped, everything is released, and its error is raised.

        :raises PlacementError: the cluster can't hold the replicas.
        :raises ModelNotFound: there is no such model.
        :raises EngineError: an engine did not start; the message has the cause.
        :raises ActorNotFound: there is no detached pool of this name to attach to.
        :raises MisuseError: there is one, though a new one was asked for.
        """
        if self._state != "new":
            raise MisuseError(f"pool {self.name!r} was started before; make a new one with cluster.engines()")
        self._state, self._runtime = "starting", Runtime.current()
        try:
            await self._engines.start()
        except BaseException:
            await self.aclose()
            raise
        self._state = "open"

    def generate(
        self,
        prompt: PromptLike,
        *,
        max_tokens: int | None = 16,
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
        :param max_tokens: most tokens to generate; None: as many as the model's context has room for.
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
        :raises PoolBusy: ``max_waiting`` requests wait already; of a detached pool, raised by the stream.
        """
        if reroute not in get_args(Reroute):
            raise RequestError(f"reroute={reroute!r}: it must be 'continue', 'restart' or 'never'")
        request = to_request(
            request_id or uuid.uuid4().hex,
            prompt,
            {"max_tokens": max_tokens, "temperature": temperature, **options},
            lane=lane,
            priority=priority,
        )
        return self._generating().submit(request, reroute)

    async def complete(
        self,
        prompt: PromptLike,
        *,
        max_tokens: int | None = 16,
        temperature: float | None = None,
        lane: Lane = "interactive",
        priority: int = 0,
        request_id: str | None = None,
        **options: Unpack[RequestOptions],
    ) -> Completion:
        """Ask for an answer and return it whole; parameters and errors as for :meth:`generate`.

        Its tokens are not sent one by one, which spares all processes work. When its replica is lost, it begins anew:
        nobody has seen anything of it.
        """
        began = anyio.current_time()
        request = to_request(
            request_id or uuid.uuid4().hex,
            prompt,
            {"max_tokens": max_tokens, "temperature": temperature, **options},
            lane=lane,
            priority=priority,
            whole=True,
        )
        first: float | None = None
        deltas: list[Delta] = []
        async for delta in self._generating().submit(request, "restart"):
            if first is None:
                first = anyio.current_time() - began - (delta.first_ago or 0.0)
            if isinstance(delta, Reset):
                deltas.clear()
            else:
                deltas.append(delta)
        return Completion.of(request.request_id, deltas, first)

    def check_options(self, options: Mapping[str, Any], *, chat: bool = False) -> None:
        """Look at arguments of :meth:`complete` before there is a prompt, as datasets do; the pool need not be open.

        :param options: by name.
        :param chat: whether the prompts will be chat messages.
        :raises RequestError: an unknown parameter or a value out of range.
        """
        given = dict(options)
        routing = {name: given.pop(name) for name in ("lane", "priority") if name in given}
        given.pop("request_id", None)
        to_request("", [{"role": "user", "content": "?"}] if chat else "?", given, **routing)

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
        many = hasattr(requests, "__iter__") or hasattr(requests, "__aiter__")
        if isinstance(requests, str | bytes | Mapping) or not many:
            raise MisuseError(f"pool.map() was given {shown(requests)}; it takes many requests: pool.map([prompt])")
        if policy is not None and not isinstance(policy, Policy):  # pyright: ignore[reportUnnecessaryIsInstance]  # users' code
            raise MisuseError(
                f"pool.map() was given the policy {shown(policy)}; it takes a Policy, such as Policy(limit=8)"
            )
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
        engines = self._opened()
        if engines.generates:
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
        deltas = [delta async for delta in engines.submit(request)]
        usage = deltas[-1].usage
        return Embedding(request.request_id, deltas[-1].embedding or b"", usage.prompt_tokens if usage else 0)

    async def metrics(self) -> list[EngineMetrics]:
        """What the engines count themselves: queue, batch, KV cache, prefix cache, tokens.

        :raises EngineError: an engine has no metrics.
        :raises ActorDied: a replica's process has ended.
        """
        return await self._opened().metrics()

    async def sleep(self, level: int = 1) -> None:
        """Give the engines' GPU memory back until :meth:`wake`; requests wait meanwhile, running ones are aborted.

        :param level: 1 keeps the weights in the machine's memory, 2 drops them.
        :raises EngineError: the engine can't sleep: it runs on a CPU, or its spec lacks
            ``engine_args={"enable_sleep_mode": True}``.
        """
        await self._opened().sleep(level)

    async def wake(self) -> None:
        """Take the memory again and go on. :raises EngineError: the engine can't sleep."""
        await self._opened().wake()

    def stats(self) -> PoolStats:
        """Every replica with its counts, as the pool sees them now.

        Of a detached pool, as they were up to a second ago.
        """
        return self._engines.stats()

    async def info(self) -> list[EngineInfo]:
        """What the engines say of themselves: their own counts include work that the pool has let go of.

        :raises ActorDied: a replica's process has ended.
        """
        return await self._opened().info()

    async def scale(self, replicas: int) -> None:
        """Have so many replicas: start more and return when they are ready, or drain some and return at once.

        Requests go on meanwhile. Replicas that were given up are replaced.

        :raises PlacementError: the cluster can't hold so many more; nothing has changed.
        :raises EngineError: a new one did not start; the message has the cause.
        """
        await self._opened().scale(replicas)

    async def drain(self, replica: int | None = None) -> None:
        """Let what runs come to its end.

        :param replica: its number: it gets no more requests, and when it has none it is stopped and its bundles are
            given back; returns then. None: the pool takes no more requests; returns when none waits or runs. Its
            engines stay up until it is closed.
        :raises MisuseError: there is no such replica.
        """
        await self._opened().drain(replica)

    @property
    def detached(self) -> bool:
        """Whether other processes may attach to it by its name."""
        return isinstance(self._engines, AttachedEngines)

    @property
    def started(self) -> bool:
        """Whether :meth:`start` was called."""
        return self._state != "new"

    @property
    def ended(self) -> bool:
        """Whether it is over: closed here, or, of a detached pool, ended by whatever program."""
        return self._state == "closed" or (isinstance(self._engines, AttachedEngines) and self._engines.ended)

    @property
    def batch_limit(self) -> int:
        """Requests that :meth:`map` has in flight by default."""
        return min(_BATCH_LIMIT, self._engines.capacity)

    async def aclose(self) -> None:
        """Fail what is in flight, stop the engines, give the bundles back. Idempotent, never cut short.

        Of a detached pool: abort this program's requests and let go of it; the engines go on.
        """
        self._refuse_elsewhere()
        if self._closing is None:
            self._state = "closed"
            self._closing = Runtime.current().start(self._engines.leave, name=f"close of pool {self.name}")
        await finish(self._closing)

    async def close(self) -> None:
        """End the pool, also a detached one, for everybody who has attached to it. Idempotent, never cut short."""
        self._refuse_elsewhere()
        if self._ending is None:
            self._state = "closed"
            self._closing = self._ending = Runtime.current().start(self._engines.end, name=f"end of pool {self.name}")
        await finish(self._ending)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    def __reduce__(self) -> Any:
        if isinstance(self._engines, AttachedEngines):
            return attached_pool, (self.name, self._engines.settings)
        raise MisuseError(
            f"pool {self.name!r} can't be pickled: it holds connections to its engines. Give it to the application "
            "as a resource, and let another process open a pool of its own, or attach to a detached one by its name"
        )

    def _generating(self) -> Engines:
        engines = self._opened()
        if not engines.generates:
            raise RequestError(f"pool {self.name!r} embeds, it does not generate: call pool.embed()")
        return engines

    def _opened(self) -> Engines:
        if self._state != "open":
            raise MisuseError(
                f"pool {self.name!r} is not open; use it inside `async with cluster.engines(...) as pool:`"
            )
        self._refuse_elsewhere()
        return self._engines

    def _refuse_elsewhere(self) -> None:
        try:
            here = self._runtime is None or self._runtime is Runtime.current()
        except anyio.NoEventLoopError:
            here = False
        if not here:
            raise MisuseError(
                f"pool {self.name!r} was opened on another event loop or thread, the only one that can use or close "
                "it; call it there, by asyncio.run_coroutine_threadsafe() for one, or open another pool here"
            )

    def _tell(self, progress: ReplicaProgress) -> None:
        if self.on_progress is not None:
            self.on_progress(progress)
