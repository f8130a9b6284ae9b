"""EnginePool in Ray beside AsyncLLM in the caller's process, and batches beside ray.data.llm; the tiny model, on a CPU.

The floor is vLLM without anything between it and who reads its tokens. Each row starts engines, so it takes minutes.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import importlib.util
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

from actors import EngineSpec, RayCluster, tiny_model
from actors.engines.vllm_start import set_environment
from arun import Ok

from .harness import Check, Options, Row

__all__ = ("BATCH_TOKENS", "MODEL_LEN", "ROWS", "children", "prompt", "ray_data_llm", "stopped")

_CONCURRENT = 64
MODEL_LEN = 1024
_TOKENS = 128
BATCH_TOKENS = 64
_BURST = "first_of_64"


def tokens(options: Options) -> list[Row]:
    """64 requests at a time, every delta streamed; and what a request waits for its first."""
    taken = _measured("tokens", options.rounds, options.n(20))
    pool, direct, many = taken["pool"], taken["direct"], _BURST
    ratio = direct["token"] / pool["token"]
    added = {name: (pool[name] - direct[name]) * 1e3 for name in ("first", many)}
    what = f"a token of the tiny model, {_CONCURRENT} requests at a time, RayCluster and pool"
    return [
        Row(what, "us", pool["token"], direct["token"], None, [
            Check("at least 0.95 of AsyncLLM's rate", ratio, 0.95, at_least=True),
        ]),
        Row("its first token, one request at a time", "ms", pool["first"], direct["first"], None, [
            Check("< 3 ms added", added["first"], 3, "ms"),
        ]),
        Row(f"its first token, {_CONCURRENT} requests at once", "ms", pool[many], direct[many], None, [
            Check("< 3 ms added", added[many], 3, "ms"),
        ]),
    ]  # fmt: skip


def batch(options: Options) -> list[Row]:
    """Prompts of mixed length through ``pool.map`` of a pool that is up, and through ray.data.llm.

    Its engine starts with each pipeline, so its time has that in it, too.
    """
    count = options.n(1000)
    taken = _measured("batch", 1, count)
    pool, peer = taken["pool"], taken["peer"]
    return [
        Row(f"a prompt of a batch of {count:,} (peer: ray.data.llm)", "ms", pool["all"] / count, None,
            peer["all"] / count, [
            Check("more prompts/s", peer["all"] / pool["all"], 1, at_least=True),
        ]),
        Row("its first result", "ms", pool["first"], None, peer["first"], [
            Check("at least 5 times sooner", peer["first"] / pool["first"], 5, at_least=True),
        ]),
    ]  # fmt: skip


ROWS: dict[str, Callable[[Options], list[Row]]] = (
    {} if importlib.util.find_spec("vllm") is None else {"pool": tokens, "batch": batch}
)


def _measured(what: str, *numbers: int) -> dict[str, dict[str, float]]:
    """Measure in a process of its own: vLLM sets environment variables and leaves threads behind."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.pool", what, *map(str, numbers)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


# In that process.


async def _tokens(rounds: int, singles: int) -> dict[str, dict[str, float]]:
    model = str(tiny_model())
    spec = EngineSpec(model=model, max_model_len=MODEL_LEN)
    async with RayCluster.connect(num_cpus=2) as cluster, cluster.engines(spec) as pool:
        before = children(os.getpid())
        with _async_llm(model) as direct:
            contestants: dict[str, _Ask] = {"direct": direct, "pool": _through(pool)}
            cores = {
                "direct": children(os.getpid()) - before,
                "pool": {child for replica in pool.stats().replicas if replica.pid for child in children(replica.pid)},
            }
            found: dict[str, dict[str, list[float]]] = {name: {} for name in contestants}
            for number in range(-1, rounds):  # -1: the warm-up
                for name in sorted(contestants, reverse=number % 2 == 0):
                    gc.collect()
                    with stopped(*(cores[other] for other in cores if other != name)):
                        taken = await _round(contestants[name], number)
                        firsts = [(await _answer(contestants[name], prompt(n), 1))[1] for n in range(singles)]
                        bursts = [await _burst(contestants[name], n) for n in range(singles)]
                    if number >= 0:
                        for figure, values in {"token": [taken], "first": firsts, _BURST: bursts}.items():
                            found[name].setdefault(figure, []).extend(values)
    return {
        name: {figure: statistics.median(values) for figure, values in figures.items()}
        for name, figures in found.items()
    }


_Ask = Callable[[str, int], AsyncIterator[int]]
"""Answers a prompt with so many tokens; yields how many each delta has."""


@contextlib.contextmanager
def stopped(*processes: set[int]) -> Iterator[None]:
    """The other contestant's engine: its workers wait in busy loops, and would take a core meanwhile."""
    pids = set[int]().union(*processes)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def children(pid: int) -> set[int]:
    """All processes that a process has started, and those that they have."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError):
            for child in map(int, (task / "children").read_text().split()):
                found |= {child, *children(child)}
    return found


async def _round(ask: _Ask, number: int) -> float:
    """64 consumers, each of which asks 4 times: seconds a token."""
    count = 0

    async def consume(consumer: int) -> None:
        nonlocal count
        for turn in range(4):
            got, _ = await _answer(ask, prompt(number * 1000 + consumer * 10 + turn), _TOKENS)
            count += got

    began = time.perf_counter()
    async with asyncio.TaskGroup() as consumers:
        for consumer in range(_CONCURRENT):
            consumers.create_task(consume(consumer))
    taken = time.perf_counter() - began
    assert count == _CONCURRENT * 4 * _TOKENS, count
    return taken / count


async def _burst(ask: _Ask, number: int) -> float:
    """64 requests at once, for one token each: what the median one waits."""
    firsts: list[float] = []

    async def consume(consumer: int) -> None:
        firsts.append((await _answer(ask, prompt(number * 1000 + consumer), 1))[1])

    async with asyncio.TaskGroup() as consumers:
        for consumer in range(_CONCURRENT):
            consumers.create_task(consume(consumer))
    return statistics.median(firsts)


async def _answer(ask: _Ask, prompt: str, max_tokens: int) -> tuple[int, float]:
    began, first, count = time.perf_counter(), 0.0, 0
    async for delta in ask(prompt, max_tokens):
        first = first or time.perf_counter() - began
        count += delta
    return count, first


def _through(pool: Any) -> _Ask:
    async def ask(prompt: str, max_tokens: int) -> AsyncIterator[int]:
        async for delta in pool.generate(prompt, max_tokens=max_tokens, temperature=0, ignore_eos=True):
            yield len(delta.token_ids)

    return ask


@contextlib.contextmanager
def _async_llm(model: str) -> Any:
    with tempfile.TemporaryDirectory(prefix="arun-bench-") as sockets:
        set_environment(model, sockets=sockets)
        vllm: Any = importlib.import_module("vllm")
        async_llm: Any = importlib.import_module("vllm.v1.engine.async_llm").AsyncLLM
        args = vllm.AsyncEngineArgs(
            model=model,
            max_model_len=MODEL_LEN,
            enforce_eager=True,
            disable_log_stats=True,
        )
        llm = async_llm.from_engine_args(args)
        kind: Any = importlib.import_module("vllm.sampling_params").RequestOutputKind.DELTA
        numbers = iter(range(10**9))

        async def ask(prompt: str, max_tokens: int) -> AsyncIterator[int]:
            params = vllm.SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, output_kind=kind)
            async for output in llm.generate({"prompt": prompt}, params, str(next(numbers))):
                yield len(output.outputs[0].token_ids)

        try:
            yield ask
        finally:
            llm.shutdown()


def prompt(seed: int, words: int = 20) -> str:
    chance = random.Random(seed)
    return " ".join(chance.choice(("runtime", "actor", "stream", "token", "credit", "reader")) for _ in range(words))


async def _batch(_: int, count: int) -> dict[str, dict[str, float]]:
    model = str(tiny_model())
    prompts = [prompt(number, words=5 + number * 7919 % 150) for number in range(count)]
    spec = EngineSpec(model=model, max_model_len=MODEL_LEN)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory(prefix="arun-bench-") as sockets:
        set_environment(model, sockets=sockets)  # before Ray starts, whose workers inherit it
        # As many as Ray Data's stages claim: they only count, and each has an actor waiting for one.
        async with RayCluster.connect(num_cpus=8) as cluster:
            async with cluster.engines(spec) as pool:
                await pool.complete("warm", max_tokens=8)
                began, times = time.perf_counter(), []
                async for outcome in pool.map(prompts, max_tokens=BATCH_TOKENS, temperature=0, ignore_eos=True):
                    assert isinstance(outcome, Ok), outcome
                    times.append(time.perf_counter() - began)
                assert len(times) == count
                found["pool"] = {"all": times[-1], "first": times[0]}
            found["peer"] = await asyncio.to_thread(ray_data_llm, model, prompts)
    return found


def ray_data_llm(model: str, prompts: list[str]) -> dict[str, float]:
    ray_data: Any = importlib.import_module("ray.data")
    llm: Any = importlib.import_module("ray.data.llm")
    ray_data.DataContext.get_current().enable_progress_bars = False
    config = llm.vLLMEngineProcessorConfig(
        model_source=model,
        engine_kwargs={"max_model_len": MODEL_LEN, "enforce_eager": True},
        placement_group_config={"bundles": [{"CPU": 1}]},  # else it wants a GPU
        concurrency=1,
        log_engine_metrics=False,
        chat_template_stage=False,
    )
    params = {"max_tokens": BATCH_TOKENS, "temperature": 0, "ignore_eos": True}
    processor = llm.build_processor(
        config,
        preprocess=lambda row: {"prompt": row["item"], "sampling_params": params},
        postprocess=lambda row: {"text": row["generated_text"]},
    )
    began = time.perf_counter()
    times = [time.perf_counter() - began for _ in processor(ray_data.from_items(prompts)).iter_rows()]
    assert len(times) == len(prompts)
    at_once = sum(each < times[0] + 0.1 for each in times)
    return {"all": times[-1], "first": times[0], "at_once": at_once}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as Ray sets it for an actor with one CPU: all compute alike
    measure = {"tokens": _tokens, "batch": _batch}[sys.argv[1]]
    print(json.dumps(asyncio.run(measure(*map(int, sys.argv[2:])))))
