"""Detached pools by name in a process that was sent one: a worker of Ray attaches to each once, and keeps it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from actors.ray_cluster import RayCluster

if TYPE_CHECKING:
    from actors.pool import EnginePool

__all__ = ("attached_pool", "start_attached")

_pools: Final[dict[str, tuple[RayCluster, EnginePool]]] = {}
_started: Final[set[str]] = set()


def attached_pool(name: str) -> EnginePool:
    """The detached pool of that name; to be used after :func:`start_attached`."""
    if name not in _pools:
        cluster = RayCluster.connect()
        _pools[name] = cluster, cluster.pool(name)
    return _pools[name][1]


async def start_attached() -> None:
    """Attach to the pools that this process was sent. Always on one event loop; they stay attached."""
    for name, (cluster, pool) in _pools.items():
        if name not in _started:
            await cluster.start()
            await pool.start()
            _started.add(name)
