"""A vLLM engine in a Ray actor in a placement group."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from actors.engine import EngineSpec
from arun.errors import EngineDead

pytestmark = [pytest.mark.engine, pytest.mark.ray, pytest.mark.timeout(300), pytest.mark.asyncio]


def placement_group_states():
    import ray

    return [group["state"] for group in ray.util.placement_group_table().values()]


async def test_an_engine_lives_in_its_placement_group_and_leaves_nothing(descendants):
    from actors.ray_cluster import RayCluster

    async with RayCluster.connect(num_cpus=4, log_to_driver=False) as cluster:
        async with cluster.engines(EngineSpec(model="tiny", max_model_len=256), name="ray-chat", restarts=0) as pool:
            assert placement_group_states() == ["CREATED"]
            done = await pool.complete([{"role": "user", "content": "hi"}], max_tokens=16, ignore_eos=True)
            assert done.usage.completion_tokens == 16
            [replica] = pool.stats().replicas
            processes = descendants(replica.pid)
            assert processes.commands  # the engine core's, whatever its title is
            stream = pool.generate("a b c", max_tokens=200, ignore_eos=True)
            await anext(stream)
            os.kill(replica.pid, signal.SIGKILL)
            with pytest.raises(EngineDead, match="pool 'ray-chat' has no replica left"):
                async for _ in stream:
                    pass
            assert await asyncio.to_thread(processes.wait_gone, 10) == []
        assert placement_group_states() == ["REMOVED"]
