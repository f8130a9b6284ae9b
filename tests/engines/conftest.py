from __future__ import annotations

import json
import os
import select
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio

from actors.engine import EngineSpec
from actors.local_cluster import LocalCluster

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

    from actors.pool import EnginePool


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Processes:
    """All descendants that a process has now, to be waited for after it is gone."""

    def __init__(self, root: int) -> None:
        self.commands: dict[int, str] = {}
        self._pidfds: dict[int, int] = {}
        parents = dict(_pids_and_parents())
        for pid in parents:
            ancestor: int | None = parents[pid]
            while ancestor is not None and ancestor != root:
                ancestor = parents.get(ancestor)
            if ancestor == root:
                self._add(pid)

    def _add(self, pid: int) -> None:
        with suppress(ProcessLookupError, FileNotFoundError):
            self._pidfds[pid] = os.pidfd_open(pid)
            self.commands[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()

    def wait_gone(self, timeout: float) -> list[str]:
        """Wait until all have ended; what still runs after ``timeout`` seconds is returned."""
        poll = select.poll()
        running = {fd: pid for pid, fd in self._pidfds.items()}
        for fd in running:
            poll.register(fd, select.POLLIN)
        while running:
            ended = poll.poll(timeout * 1000)
            if not ended:
                break
            for fd, _ in ended:
                poll.unregister(fd)
                os.close(fd)
                del running[fd]
        return [f"{pid} {self.commands[pid]}" for pid in running.values()]


def _pids_and_parents() -> Iterator[tuple[int, int]]:
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(ProcessLookupError, FileNotFoundError):
            # "pid (any name) state parent ...", and the name may have spaces and brackets.
            yield int(stat.parent.name), int(stat.read_text().rpartition(")")[2].split()[1])


@pytest.fixture
def shared_memory() -> Callable[[], set[str]]:
    """What of multiprocessing's and vLLM's there is in /dev/shm."""
    return lambda: {name for name in os.listdir("/dev/shm") if name.startswith(("psm_", "sem.mp-", "vllm"))}


@pytest.fixture
def descendants() -> Callable[[int], Processes]:
    return Processes


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of two random LoRA adapters for the tiny model, of different ranks."""
    return {
        "pirate": make_adapter(tmp_path_factory.mktemp("pirate"), rank=4, seed=1),
        "poet": make_adapter(tmp_path_factory.mktemp("poet"), rank=8, seed=2),
    }


def make_adapter(folder: Path, *, rank: int, seed: int) -> str:
    import numpy as np
    from safetensors.numpy import save_file

    random = np.random.default_rng(seed)
    sizes = {"self_attn.q_proj": (128, 128), "self_attn.v_proj": (128, 64)}
    weights = {}
    for layer in range(2):
        for module, (inputs, outputs) in sizes.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            weights[f"{name}.lora_A.weight"] = random.normal(size=(rank, inputs)).astype("float32")
            weights[f"{name}.lora_B.weight"] = random.normal(size=(outputs, rank)).astype("float32")
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"bias": "none", "task_type": "CAUSAL_LM"}))
    return str(folder)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def tiny_pool(adapters: dict[str, str]) -> AsyncIterator[EnginePool]:
    """One vLLM engine for all tests that leave it alive."""
    spec = EngineSpec(
        model="tiny",
        max_model_len=512,
        adapters=adapters,
        # The random model would go on with white space for ever where JSON allows it.
        engine_args={
            "max_num_seqs": 16,
            "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
        },
    )
    async with LocalCluster(cpus=8) as cluster, cluster.engines(spec, name="tiny") as pool:
        yield pool
