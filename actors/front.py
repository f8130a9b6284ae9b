"""PoolFront: several models behind one ``generate()``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio

from actors.pools.batches import calls
from arun.errors import MisuseError, RequestError
from arun.outcome_stream import fan_out
from arun.policies import Policy

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, Iterable, Mapping
    from types import TracebackType
    from typing import Self

    from actors.answers import Completion, Embedding
    from actors.pool import EnginePool
    from actors.pools.batches import BatchRequest
    from actors.pools.engines import DeltaStream
    from actors.pools.pool_stats import PoolStats
    from actors.requests import PromptLike
    from arun.outcome_stream import FanOut

__all__ = ("PoolFront",)


class PoolFront:
    """Pools by the name of their model; each call says by ``model=`` which one it means.

    >>> front = PoolFront({"small": cluster.engines(small), "large": cluster.engines(large, replicas=2)})
    >>> async with front:
    ...     await front.complete("Hello", model="small")

    Entering it starts the pools that are not open yet, all at once, and leaving it closes these.

    :param pools: the first one is meant where a call names no model.
    :raises MisuseError: there is none.
    """

    def __init__(self, pools: Mapping[str, EnginePool]) -> None:
        if not pools:
            raise MisuseError("PoolFront({}): give it at least one pool, by the name of its model")
        self._pools = dict(pools)
        self._started: list[EnginePool] = []

    @property
    def models(self) -> tuple[str, ...]:
        """The names, in the order in which they were given."""
        return tuple(self._pools)

    def pool(self, model: str | None = None) -> EnginePool:
        """The pool of one model.

        :raises RequestError: there is none of that name; the message has those there are.
        """
        if model is None:
            return next(iter(self._pools.values()))
        if model not in self._pools:
            raise RequestError(f"there is no model {model!r} here; there are {', '.join(map(repr, self._pools))}")
        return self._pools[model]

    def generate(self, prompt: PromptLike, *, model: str | None = None, **options: Any) -> DeltaStream:
        """As :meth:`EnginePool.generate`, of the pool of ``model``."""
        return self.pool(model).generate(prompt, **options)

    async def complete(self, prompt: PromptLike, *, model: str | None = None, **options: Any) -> Completion:
        """As :meth:`EnginePool.complete`, of the pool of ``model``."""
        return await self.pool(model).complete(prompt, **options)

    async def embed(self, prompt: PromptLike, *, model: str | None = None, **options: Any) -> Embedding:
        """As :meth:`EnginePool.embed`, of the pool of ``model``."""
        return await self.pool(model).embed(prompt, **options)

    def map(
        self,
        requests: Iterable[BatchRequest] | AsyncIterable[BatchRequest],
        policy: Policy | None = None,
        **options: Any,
    ) -> FanOut[Completion]:
        """As :meth:`EnginePool.map`; ``model`` may be among the options, and in each request."""
        default = Policy(limit=sum(pool.batch_limit for pool in self._pools.values()), on_error="collect")
        return fan_out(calls(self.complete, requests, {"lane": "batch", **options}), policy or default)

    def stats(self) -> dict[str, PoolStats]:
        """Every pool's, by model."""
        return {model: pool.stats() for model, pool in self._pools.items()}

    async def start(self) -> None:
        """Start the pools that are not open; when one fails, those that were started here are closed.

        :raises Exception: as :meth:`EnginePool.start`.
        """
        self._started = [pool for pool in self._pools.values() if not pool.started]
        failures: list[Exception] = []

        async def start(pool: EnginePool) -> None:
            try:
                await pool.start()
            except Exception as exc:  # noqa: BLE001  # whatever it is, it is raised below, and not in a group
                failures.append(exc)
                starting.cancel_scope.cancel()

        try:
            async with anyio.create_task_group() as starting:
                for pool in self._started:
                    starting.start_soon(start, pool)
            if failures:
                raise failures[0]
        except BaseException:
            await self.aclose()  # noqa: ASYNC102 - a pool's aclose() lets no cancellation cut it short
            raise

    async def aclose(self) -> None:
        """Close the pools that :meth:`start` started, the last first. Idempotent."""
        for pool in reversed(self._started):
            await pool.aclose()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()
