"""Detached pools by name in a process that was sent one: a worker of Ray attaches to each once, and keeps it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import anyio

from actors.ray_cluster import RayCluster

if TYPE_CHECKING:
    from collections.abc import Mapping

    from actors.pool import EnginePool

__all__ = ("attached_pool", "start_attached")

_Key = tuple[str, tuple[tuple[str, Any], ...]]

_pools: Final[dict[_Key, tuple[RayCluster, EnginePool]]] = {}
#: of pools that have ended; another one may have their name by now
_left: Final[list[RayCluster]] = []
_starting: Final = anyio.Lock()


def attached_pool(name: str, settings: Mapping[str, Any]) -> EnginePool:
    """The detached pool of that name; to be used after :func:`start_attached`.

    :param settings: of the cluster that it was sent from, as ``RayCluster.connect()`` takes them.
    """
    key = (name, tuple(sorted(settings.items())))
    if key in _pools and _pools[key][1].ended:
        _left.append(_pools.pop(key)[0])
    if key not in _pools:
        cluster = RayCluster.connect(**settings)
        _pools[key] = cluster, cluster.pool(name)
    return _pools[key][1]


async def start_attached() -> None:
    """Attach to the pools that this process was sent. Always on one event loop; they stay attached."""
    async with _starting:
        while _left:
            await _left.pop().aclose()
        for key, (cluster, pool) in list(_pools.items()):
            if pool.started:
                continue
            try:
                await cluster.start()
                await pool.start()
            except BaseException:
                _left.append(_pools.pop(key)[0])
                raise
