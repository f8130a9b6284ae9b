"""RayCluster: what only Ray does, and that nothing of it is left."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from actors.bundles import Placement
from actors.ray_cluster import RayCluster
from arun.errors import MisuseError, PlacementError
from tests.actors.programs import ENVIRONMENT, owner_program, wait_gone
from tests.actors.samples import Counter, Stubborn

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]


@pytest.mark.parametrize("how", ["return", "SIGINT", "SIGTERM", "SIGKILL"])
def test_nothing_is_left_of_a_ray_of_our_own_however_the_owner_ends(how: str, tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    with owner_program("tests.actors.ray_owner", how, str(diary)) as (owner, pids):
        assert len(pids) > 3
        if how.startswith("SIG"):
            owner.send_signal(getattr(signal, how))
        more, errors = owner.communicate(timeout=40)
        assert wait_gone(pids, 10) == []
    assert more == ""  # not Ray's word about the killed actor, nor an actor's print
    assert "Traceback" not in errors or how == "SIGINT"
    assert owner.returncode == {"return": 0, "SIGINT": -2, "SIGTERM": -15, "SIGKILL": -9}[how]
    if how in {"return", "SIGINT"}:
        assert diary.read_text() == "diary started\ndiary stopped\n"


@pytest.mark.asyncio
async def test_a_connection_that_was_there_before_is_used_and_left_alone(ray_session: None) -> None:
    import ray

    async with RayCluster.connect() as cluster:
        await cluster.spawn(Counter)
    assert ray.is_initialized()
    with pytest.raises(MisuseError, match=r"connected to Ray already.*'num_cpus': 2"):
        await RayCluster.connect(num_cpus=2).start()


@pytest.mark.asyncio
async def test_an_actor_whose_process_stands_still_is_gone_after_the_grace(ray_session: None) -> None:
    async with RayCluster.connect(grace=0.2) as cluster:
        counter = await cluster.spawn(Counter)
        pid = await counter.pid()
        os.kill(pid, signal.SIGSTOP)
        await cluster.stop(counter)
        assert wait_gone([pid], 0) == []


@pytest.mark.asyncio
async def test_placement_groups_are_removed_with_the_cluster(ray_session: None) -> None:
    from ray.util import placement_group_table

    async with RayCluster.connect() as cluster:
        reservation = await cluster.reserve(Placement(replicas=2))
        await cluster.spawn(Counter, group=reservation.groups[0])
        natives = [group.native for group in reservation.groups]
        assert [placement_group_table(native)["state"] for native in natives] == ["CREATED"] * 2
    assert [placement_group_table(native)["state"] for native in natives] == ["REMOVED"] * 2


@pytest.mark.asyncio
async def test_what_others_hold_is_waited_for_and_then_refused_with_the_numbers(ray_session: None) -> None:
    from ray.util import placement_group_table

    async with RayCluster.connect() as holder, RayCluster.connect(placement_timeout=0.5) as cluster:
        held = await holder.reserve(Placement(replicas=3))
        with pytest.raises(PlacementError, match=r"did not come free in 0\.5 s") as caught:
            await cluster.reserve(Placement(tensor_parallel=2))
        assert "needs    1 replica of 2 workers" in str(caught.value)
        states = [group["state"] for group in placement_group_table().values()]
        assert (states.count("CREATED"), states.count("PENDING")) == (3, 0)
        await held.release()
        await (await holder.reserve(Placement(tensor_parallel=2))).release()


@pytest.mark.asyncio
async def test_a_cancelled_reserve_leaves_no_group(ray_session: None) -> None:
    from ray.util import placement_group_table

    async with RayCluster.connect() as holder, RayCluster.connect() as cluster:
        await holder.reserve(Placement(replicas=4))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(cluster.reserve(Placement(replicas=4)), 0.5)
    assert {group["state"] for group in placement_group_table().values()} <= {"REMOVED"}


@pytest.mark.asyncio
async def test_an_actor_that_does_not_stop_is_killed_after_the_grace(ray_session: None) -> None:
    async with RayCluster.connect(grace=0.2) as cluster:
        stubborn = await cluster.spawn(Stubborn)
        assert await stubborn.ping() == "pong"
        [info] = cluster.list()
        assert info.pid is not None
        await cluster.stop(stubborn)
        assert wait_gone([info.pid], 0) == []


def test_a_ray_client_address_is_refused_with_the_reason() -> None:
    with pytest.raises(MisuseError, match=r"can't use ray://head:10001.*address='auto'"):
        RayCluster.connect("ray://head:10001")


@pytest.mark.asyncio
async def test_a_cluster_that_was_not_entered_says_how_to() -> None:
    with pytest.raises(MisuseError, match="async with RayCluster"):
        await RayCluster.connect().spawn(Counter)


def test_without_ray_the_error_names_the_extra() -> None:
    program = "import sys; sys.modules['ray'] = None; from actors.ray_cluster import RayCluster; RayCluster.connect()"
    done = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, timeout=30, check=False
    )
    assert "MissingExtraError: RayCluster needs the package 'ray'" in done.stderr
    assert "pip install 'arun-runtime[ray]'" in done.stderr


def test_importing_actors_imports_neither_ray_nor_vllm() -> None:
    program = "import actors.ray_cluster, actors.local_cluster, sys; print({'ray', 'vllm', 'torch'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], env=ENVIRONMENT, capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout == "set()\n"
