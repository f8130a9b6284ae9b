"""What an EnginePool stands on: engines of its own, or those of a supervisor in another process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import msgspec

from actors.bundles import Strategy
from actors.members.supervision import Supervisor
from arun.errors import MisuseError

if TYPE_CHECKING:
    from typing import Self

    from actors.answers import Delta
    from actors.engine import EngineInfo, EngineMetrics, GenerateRequest
    from actors.pools.pool_state import Reroute
    from actors.pools.pool_stats import PoolStats

__all__ = ("DeltaStream", "Engines", "PoolSettings")

_SUPERVISOR = Supervisor()


class PoolSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How many replicas a pool has, where, and how they are watched; the parameters of :class:`~actors.EnginePool`.

    :raises MisuseError: a number is out of its range.
    """

    replicas: int = 1
    cpus: float = 1.0
    gpus: float | None = None
    strategy: Strategy = "STRICT_PACK"
    labels: dict[str, str] = {}
    wait: float | None = None
    max_in_flight: int = 256
    max_waiting: int = 4096
    supervisor: Supervisor = _SUPERVISOR
    watchdog: float = 60.0
    start_timeout: float = 600.0
    quarantine: int = 2
    affinity_margin: int = 8

    def __post_init__(self) -> None:
        for option, least in _LEAST.items():
            value = getattr(self, option)
            if not isinstance(value, int):
                raise MisuseError(f"{option} is {value!r}; it must be a whole number")
            if value < least:
                raise MisuseError(f"{option} is {value}; it must be at least {least}")
        if self.max_in_flight > _MOST_IN_FLIGHT:
            raise MisuseError(
                f"max_in_flight is {self.max_in_flight}; one replica takes at most {_MOST_IN_FLIGHT} requests at "
                "a time, because that is what a connection carries; add replicas"
            )
        if self.watchdog <= 0 or self.start_timeout <= 0:
            raise MisuseError(
                f"watchdog is {self.watchdog} and start_timeout {self.start_timeout}; both are seconds above 0"
            )


_MOST_IN_FLIGHT = 1000  # a connection has 1024 streams, and health and metrics want some
_LEAST = {"replicas": 1, "max_in_flight": 1, "max_waiting": 0, "quarantine": 1, "affinity_margin": 0}


class DeltaStream(Protocol):
    """The deltas of one answer, in order. Made by ``pool.generate()``.

    Leaving it early aborts the request: ``aclose()`` (``contextlib.aclosing`` calls it) waits until the engine has
    let go of it; being cancelled in ``async for`` does the same; dropping the stream does it in the background.
    """

    @property
    def request_id(self) -> str:
        """As given to ``generate()``, or made up by it."""
        ...

    @property
    def replica(self) -> int | None:
        """The number of the replica that answers; None while the request waits for one."""
        ...

    def __aiter__(self) -> Self: ...

    async def __anext__(self) -> Delta:
        """The next delta.

        :raises RequestError: the engine refused this request.
        :raises ReplicaLost: the replica was lost, and the answer can't be continued by another.
        :raises RequestQuarantined: replicas were lost because of this request.
        :raises EngineDead: the pool has no replica left.
        """
        ...

    async def aclose(self) -> None:
        """Abort the request and wait until the engine has let go of it. Does nothing after the last delta."""
        ...


class Engines(Protocol):
    """The replicas of one pool, wherever they are looked after. What the methods do, EnginePool's of that name tell.

    :ivar pool: its name.
    """

    pool: str

    @property
    def generates(self) -> bool:
        """Whether the engines answer prompts; else they embed them."""
        ...

    @property
    def capacity(self) -> int:
        """Requests that the replicas take at a time, all together."""
        ...

    async def start(self) -> None: ...

    def submit(self, request: GenerateRequest, reroute: Reroute = "continue") -> DeltaStream: ...

    def stats(self) -> PoolStats: ...

    async def info(self) -> list[EngineInfo]: ...

    async def metrics(self) -> list[EngineMetrics]: ...

    async def sleep(self, level: int) -> None: ...

    async def wake(self) -> None: ...

    async def scale(self, replicas: int) -> None: ...

    async def drain(self, replica: int | None) -> None: ...

    async def leave(self) -> None:
        """Let go of them: engines of its own end, others go on."""
        ...

    async def end(self) -> None:
        """End them, for everybody."""
        ...
