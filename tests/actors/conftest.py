"""Clusters of every kind, for the one suite that all of them must pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from actors.local_cluster import LocalCluster

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from actors.cluster import Cluster


@pytest.fixture(
    params=["process", "task", pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.timeout(120)])],
)
def kind(request: pytest.FixtureRequest) -> str:
    """What kind of cluster."""
    if request.param == "ray":
        request.getfixturevalue("ray_session")
    return str(request.param)


@pytest_asyncio.fixture
async def cluster(kind: str) -> AsyncIterator[Cluster]:
    async with make_cluster(kind) as cluster:
        yield cluster


def make_cluster(kind: str, **options: float) -> Cluster:
    if kind == "ray":
        from actors.ray_cluster import RayCluster

        return RayCluster.connect(**options)  # type: ignore[arg-type]  # options that both have
    return LocalCluster(isolation="task" if kind == "task" else "process", cpus=4, gpus=2, **options)
