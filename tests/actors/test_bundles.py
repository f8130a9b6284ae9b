"""Placement: what it needs, where it goes, what it says when it does not fit."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.bundles import Placement, Reservation, fit
from actors.cluster import ClusterResources, NodeResources
from actors.fitting import Explanation
from actors.local_cluster import LocalCluster
from arun.errors import MisuseError, PlacementError
from tests.actors.samples import Sees


def cluster(*cpus: float, gpus: float = 0, taken: float = 0) -> ClusterResources:
    return ClusterResources(
        tuple(
            NodeResources(name=f"n{i}", cpus=count, cpus_free=count - taken, gpus=gpus, gpus_free=gpus)
            for i, count in enumerate(cpus)
        )
    )


def test_a_replica_has_a_bundle_for_each_worker() -> None:
    placement = Placement(tensor_parallel=2, pipeline_parallel=2, replicas=3, cpus=0.5, gpus=1)
    assert placement.bundles() == [[{"CPU": 0.5, "GPU": 1}] * 4] * 3


def test_a_bundle_names_no_resource_that_it_does_not_need() -> None:
    assert Placement(cpus=1).bundles() == [[{"CPU": 1}]]
    assert Placement(cpus=0, gpus=1).bundles() == [[{"GPU": 1}]]


@pytest.mark.parametrize(
    "wrong",
    [{"replicas": 0}, {"tensor_parallel": 0}, {"cpus": -1}, {"cpus": 0}, {"gpus": 1.5}, {"strategy": "STRICT"}],
    ids=str,
)
def test_impossible_numbers_are_refused_where_they_are_written(wrong: dict[str, object]) -> None:
    with pytest.raises(MisuseError, match=next(iter(wrong))):
        Placement(**wrong)  # type: ignore[arg-type]  # wrong on purpose


@pytest.mark.parametrize(
    ("strategy", "nodes", "expected"),
    [
        ("STRICT_PACK", (1, 2), (("n1", "n1"),)),
        ("STRICT_PACK", (1, 1), (None,)),
        ("PACK", (1, 2), (("n1", "n1"),)),
        ("PACK", (1, 1), (("n0", "n1"),)),
        ("PACK", (1,), (None,)),
        ("SPREAD", (2, 2), (("n0", "n1"),)),
        ("SPREAD", (2,), (("n0", "n0"),)),
        ("SPREAD", (1,), (None,)),
        ("STRICT_SPREAD", (2, 2), (("n0", "n1"),)),
        ("STRICT_SPREAD", (2,), (None,)),
    ],
)
def test_the_strategy_decides_on_which_nodes_two_workers_lie(
    strategy: str, nodes: tuple[int, ...], expected: tuple[tuple[str, ...] | None, ...]
) -> None:
    placement = Placement(tensor_parallel=2, strategy=strategy)  # type: ignore[arg-type]  # a Literal from parametrize
    assert fit(placement, cluster(*nodes)).nodes == expected


def test_what_is_taken_does_not_count_unless_the_cluster_is_judged_idle() -> None:
    busy = cluster(4, taken=3)
    placement = Placement(tensor_parallel=2)
    assert not fit(placement, busy).fits
    assert fit(placement, busy, idle=True).fits


def test_fractions_add_up() -> None:
    assert fit(Placement(replicas=10, cpus=0.1), cluster(1)).fits
    assert not fit(Placement(replicas=11, cpus=0.1), cluster(1)).fits


def test_explain_shows_each_replica_on_its_nodes() -> None:
    found = Placement(tensor_parallel=2, replicas=3, cpus=1, gpus=1).explain(cluster(4, 2, gpus=4))
    assert str(found) == (
        "needs    3 replicas of 2 workers (tensor_parallel 2 x pipeline_parallel 1) with 1 CPU and 1 GPU each, "
        "STRICT_PACK; 6 CPU and 6 GPU in all\n"
        "cluster  2 nodes, 6 of 6 CPU free, 8 of 8 GPU free\n"
        "  node n0: 4 of 4 CPU free, 4 of 4 GPU free\n"
        "  node n1: 2 of 2 CPU free, 4 of 4 GPU free\n"
        "replica 0  bundles 0, 1 on node n0\n"
        "replica 1  bundles 0, 1 on node n0\n"
        "replica 2  bundles 0, 1 on node n1\n"
        "it fits"
    )


def test_explain_is_data_as_well() -> None:
    found = Placement(tensor_parallel=2, replicas=2, cpus=0.5, gpus=1).explain(cluster(1, gpus=3))
    assert found.needed == {"CPU": 2, "GPU": 4}
    assert [node.gpus_free for node in found.nodes] == [3]
    assert [(plan.replica, plan.nodes) for plan in found.replicas] == [(0, ("n0", "n0")), (1, None)]
    assert found.replicas[1].bundles == ({"CPU": 0.5, "GPU": 1},) * 2
    assert found.reason == "room for 1 of 2; each needs 2 workers on one node"
    assert msgspec.json.decode(msgspec.json.encode(found), type=Explanation) == found


@pytest.mark.parametrize(
    ("cpus", "taken", "verdict", "end"),
    [
        (4, 0, "fits", "it fits"),
        (4, 3, "fits later", "replicas 0 to 1  no room\nit does not fit now, but will when others give back"),
        (1, 0, "never", "not even when nothing else is in the cluster: room for 0 of 2; each needs 2 workers on one"),
    ],
)
def test_the_verdict_tells_now_later_and_never_apart(cpus: int, taken: int, verdict: str, end: str) -> None:
    found = Placement(tensor_parallel=2, replicas=2).explain(cluster(cpus, taken=taken))
    assert found.verdict == verdict
    assert end in str(found)


@pytest.mark.parametrize(
    ("selector", "nodes"),
    [
        ("h100", ["n0"]),
        ("!h100", ["n1", "n2"]),
        ("in(h100, a100)", ["n0", "n1"]),
        ("!in(h100,a100)", ["n2"]),
        ("l4", []),
    ],
)
def test_labels_say_which_nodes_will_do(selector: str, nodes: list[str]) -> None:
    kinds: list[dict[str, str]] = [{"gpu": "h100"}, {"gpu": "a100"}, {}]
    resources = ClusterResources(
        tuple(NodeResources(name=f"n{i}", cpus=1, cpus_free=1, labels=labels) for i, labels in enumerate(kinds))
    )
    found = Placement(replicas=3, labels={"gpu": selector}).explain(resources)
    assert [plan.nodes[0] for plan in found.replicas if plan.nodes] == nodes
    assert f"labels   gpu={selector}" in str(found)
    assert found.reason is not None
    assert f"{len(nodes)} of 3 nodes have the labels gpu={selector}" in found.reason


@pytest.mark.parametrize("selector", ["", "-a", "in()", "in(a", "a b", "!!a", "a" * 64])
def test_a_label_selector_that_ray_would_refuse_is_refused_where_it_is_written(selector: str) -> None:
    with pytest.raises(MisuseError, match="write a value"):
        Placement(labels={"gpu": selector})


@pytest.mark.asyncio
async def test_a_local_cluster_waits_for_what_others_hold_if_it_is_told_to() -> None:
    async with LocalCluster(isolation="task", cpus=2) as local:
        held = await local.reserve(Placement(replicas=2))
        with pytest.raises(PlacementError, match="0 of 2 CPU free"):
            await local.reserve(Placement(), wait=0.01)
        with pytest.raises(PlacementError, match="room for 0 of 3"):
            await local.reserve(Placement(replicas=3), wait=3600)
        waiting = asyncio.create_task(local.reserve(Placement(replicas=2), wait=3600))
        await asyncio.sleep(0)
        await held.release()
        got = await waiting
        assert [group.nodes for group in got.groups] == [("local",), ("local",)]


@pytest.mark.asyncio
async def test_an_actor_on_this_machine_sees_the_gpus_of_its_group_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    async with LocalCluster(cpus=8, gpus=4) as local:

        async def seen(reservation: Reservation) -> list[str | None]:
            actors = [await local.spawn(Sees, group=group) for group in reservation.groups]
            return [await actor.devices() for actor in actors]

        first = await local.reserve(Placement(gpus=0.5, replicas=2))
        pairs = await local.reserve(Placement(tensor_parallel=2, gpus=1))
        assert await seen(first) == ["0", "0"]
        assert await seen(pairs) == ["1,2"]
        await first.release()
        wide = await local.reserve(Placement(gpus=2))
        assert await seen(wide) == ["0,3"]
        assert await seen(await local.reserve(Placement())) == [None]
        own = await local.spawn(Sees, group=wide.groups[0], env={"CUDA_VISIBLE_DEVICES": "7"})
        assert await own.devices() == "7"


@pytest.mark.asyncio
async def test_gpus_are_those_that_this_process_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-abc")
    async with LocalCluster(cpus=2, gpus=2) as local:
        groups = (await local.reserve(Placement(gpus=1, replicas=2))).groups
        actors = [await local.spawn(Sees, group=group) for group in groups]
        assert [await actor.devices() for actor in actors] == ["5", "GPU-abc"]


@pytest.mark.asyncio
async def test_parts_of_gpus_do_not_add_up_to_a_whole_one() -> None:
    async with LocalCluster(isolation="task", cpus=8, gpus=2) as local:
        held = [await local.reserve(Placement(gpus=0.6)) for _ in range(2)]
        with pytest.raises(PlacementError, match=r"no single GPU has 0\.8 free; free are 0\.4, 0\.4"):
            await local.reserve(Placement(gpus=0.8))
        for reservation in held:
            await reservation.release()
        await local.reserve(Placement(gpus=1, replicas=2))


@pytest.mark.asyncio
async def test_a_local_cluster_has_the_labels_that_it_was_given() -> None:
    async with LocalCluster(isolation="task", cpus=1, labels={"zone": "a"}) as local:
        with pytest.raises(PlacementError, match="0 of 1 nodes have the labels zone=b"):
            await local.reserve(Placement(labels={"zone": "b"}))
        await local.reserve(Placement(labels={"zone": "a"}))


def test_a_refusal_has_both_sides_numbers_and_the_way_out() -> None:
    refusal = Placement(tensor_parallel=2, replicas=2).refusal(cluster(3))
    assert refusal is not None
    assert "2 replicas of 2 workers" in refusal
    assert "\n" not in refusal
    assert "4 CPU in all" in refusal
    assert "3 of 3 CPU free" in refusal
    assert "room for 1 of 2; each needs 2 workers on one node" in refusal
    assert "Ask for fewer replicas" in refusal


STRATEGIES = ["STRICT_PACK", "PACK", "SPREAD", "STRICT_SPREAD"]


@given(
    nodes=st.lists(st.integers(0, 6), max_size=5),
    workers=st.integers(1, 4),
    replicas=st.integers(1, 4),
    strategy=st.sampled_from(STRATEGIES),
)
def test_a_fit_keeps_the_strategy_and_gives_no_node_more_than_it_has(
    nodes: list[int], workers: int, replicas: int, strategy: str
) -> None:
    placement = Placement(tensor_parallel=workers, replicas=replicas, strategy=strategy)  # type: ignore[arg-type]
    found = fit(placement, cluster(*nodes))
    placed = [where for where in found.nodes if where is not None]
    used = [node for where in placed for node in where]
    assert all(used.count(f"n{i}") <= has for i, has in enumerate(nodes))
    for where in placed:
        assert len(where) == workers
        if strategy == "STRICT_PACK":
            assert len(set(where)) == 1
        if strategy == "STRICT_SPREAD":
            assert len(set(where)) == workers
    # No replica is turned away that the numbers leave room for.
    match strategy:
        case "STRICT_PACK":
            possible = sum(has // workers for has in nodes) >= replicas
        case "STRICT_SPREAD":
            possible = sum(min(has, replicas) for has in nodes) >= replicas * workers
        case _:
            possible = sum(nodes) >= replicas * workers
    assert found.fits == possible
