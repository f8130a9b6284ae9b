"""Placements on a Ray cluster of several nodes, all on this machine, with GPUs that are only numbers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec
import pytest
import pytest_asyncio

from actors.bundles import Placement
from actors.cluster import ClusterResources
from actors.engine import EngineSpec
from actors.ray_cluster import RayCluster
from arun.errors import PlacementError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180), pytest.mark.asyncio(loop_scope="module")]

NODES = [{"gpu": "h100", "zone": "a"}, {"gpu": "h100", "zone": "b"}, {"gpu": "a100", "zone": "b"}]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Of three nodes with 4 CPUs and 2 GPUs each."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    nodes = Cluster()
    try:
        for labels in NODES:
            nodes.add_node(num_cpus=4, num_gpus=2, labels=labels, include_dashboard=False)
        yield nodes.address
    finally:
        nodes.shutdown()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(address: str) -> AsyncIterator[RayCluster]:
    async with RayCluster.connect(address, placement_timeout=5) as cluster:
        yield cluster


class Where:
    async def node(self) -> str:
        """The beginning of Ray's id of the node that this runs on."""
        import ray

        node_id: str = ray.get_runtime_context().get_node_id()
        return node_id[:8]


async def idle(cluster: RayCluster) -> ClusterResources:
    """What there is when all is free: Ray tells late that something was given back."""
    nodes = (await cluster.resources()).nodes
    return ClusterResources(tuple(msgspec.structs.replace(node, cpus_free=4, gpus_free=2) for node in nodes))


async def test_each_node_is_shown_with_what_it_has_and_its_labels(cluster: RayCluster) -> None:
    nodes = (await cluster.resources()).nodes
    assert [(node.cpus, node.gpus) for node in nodes] == [(4, 2)] * 3
    assert {(node.labels["gpu"], node.labels["zone"]) for node in nodes} == {(n["gpu"], n["zone"]) for n in NODES}


@pytest.mark.parametrize(
    ("strategy", "workers", "nodes"),
    [("STRICT_PACK", 2, 1), ("PACK", 2, 1), ("PACK", 3, 2), ("SPREAD", 2, 2), ("STRICT_SPREAD", 3, 3)],
)
async def test_the_bundles_lie_as_the_strategy_says(
    cluster: RayCluster, strategy: str, workers: int, nodes: int
) -> None:
    placement = Placement(tensor_parallel=workers, gpus=1, strategy=strategy)  # type: ignore[arg-type]  # a Literal
    planned = placement.explain(await idle(cluster))
    reservation = await cluster.reserve(placement)
    [group] = reservation.groups
    await reservation.release()
    assert (planned.verdict, len(group.nodes), len(set(group.nodes))) == ("fits", workers, nodes)
    assert planned.replicas[0].nodes is not None
    assert len(set(planned.replicas[0].nodes)) == nodes


@pytest.mark.parametrize(
    "labels", [{"gpu": "a100"}, {"gpu": "!a100", "zone": "b"}, {"gpu": "in(a100, l4)"}, {"zone": "!in(b, c)"}], ids=str
)
async def test_labels_choose_the_node(cluster: RayCluster, labels: dict[str, str]) -> None:
    placement = Placement(tensor_parallel=2, gpus=1, labels=labels)
    [planned] = placement.explain(await idle(cluster)).replicas
    reservation = await cluster.reserve(placement)
    [group] = reservation.groups
    await reservation.release()
    assert group.nodes == planned.nodes


async def test_labels_that_no_node_has_are_refused_at_once(cluster: RayCluster) -> None:
    with pytest.raises(PlacementError, match="0 of 3 nodes have the labels gpu=l4"):
        await cluster.reserve(Placement(gpus=1, labels={"gpu": "l4"}))


async def test_what_could_never_fit_is_refused_with_the_numbers_and_waited_for_only_on_request(
    cluster: RayCluster,
) -> None:
    wide = Placement(tensor_parallel=3, gpus=1)
    with pytest.raises(PlacementError, match=r"3 GPU in all: room for 0 of 1.* of 6 GPU free.*reserve\(wait=seconds\)"):
        await cluster.reserve(wide)
    with pytest.raises(PlacementError, match=r"too small for this placement, and did not grow in 0\.2 s") as caught:
        await cluster.reserve(wide, wait=0.2)
    assert "not even when nothing else is in the cluster" in str(caught.value)
    assert placement_groups_left() == 0


async def test_who_waits_gets_what_others_give_back(cluster: RayCluster) -> None:
    held = await cluster.reserve(Placement(tensor_parallel=2, replicas=3, gpus=1))
    waiting = asyncio.create_task(cluster.reserve(Placement(gpus=1), wait=60))
    await held.release()
    await (await waiting).release()
    assert placement_groups_left() == 0


async def test_an_actor_runs_on_the_node_of_its_first_bundle(cluster: RayCluster) -> None:
    reservation = await cluster.reserve(Placement(tensor_parallel=2, gpus=1, labels={"gpu": "a100"}))
    [group] = reservation.groups
    where = await cluster.spawn(Where, group=group)
    assert await where.node() in group.nodes[0]
    await reservation.release()
    assert cluster.list() == []
    assert placement_groups_left() == 0


async def test_pools_stand_side_by_side_and_leave_nothing(cluster: RayCluster) -> None:
    spec = EngineSpec(model="echo", engine="echo", tensor_parallel_size=2)
    async with (
        cluster.engines(spec, name="left", gpus=1, labels={"zone": "a"}) as left,
        cluster.engines(spec, name="right", gpus=1, replicas=2, labels={"zone": "b"}) as right,
    ):
        assert (await left.complete("to be")).text == (await right.complete("to be")).text == "to be"
        assert placement_groups_left() == 3
        with pytest.raises(PlacementError, match="did not come free"):
            await cluster.reserve(Placement(gpus=1), wait=0.2)
    assert placement_groups_left() == 0


async def test_a_pool_that_fails_to_start_leaves_no_group(cluster: RayCluster) -> None:
    spec = EngineSpec(model="echo", engine="echo", engine_args={"fail_start": "no"})
    with pytest.raises(Exception, match="no"):
        await cluster.engines(spec, gpus=1).start()
    assert placement_groups_left() == 0


def placement_groups_left() -> int:
    from ray.util import placement_group_table

    return sum(group["state"] != "REMOVED" for group in placement_group_table().values())
