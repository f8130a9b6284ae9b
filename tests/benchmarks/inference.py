"""Batch inference as a dataset's step, beside vLLM's ``LLM.generate`` and ray.data.llm; the tiny model, on a CPU."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from actors import EngineSpec, LocalCluster, tiny_model
from actors.engines.vllm_start import set_environment
from arun.data import from_rows

from .harness import Check, Options, Row
from .pool import BATCH_TOKENS, MODEL_LEN, children, prompt, ray_data_llm, stopped

__all__ = ("ROWS",)


def inference(options: Options) -> Row:
    """Prompts of mixed length, all tokens of each answer."""
    count = options.n(2000)
    taken = _measured(min(options.rounds, 3), count)
    # Its start is as long whatever comes after it, at best.
    started = (taken["ray_best"] - taken["ray_few_best"]) / (count - count // 10) * count
    return Row(
        f"a prompt of {count:,}, as a dataset's step (floor: LLM.generate; peer: ray.data.llm)",
        "ms",
        taken["arun"] / count,
        taken["llm"] / count,
        taken["ray"] / count,
        [
            Check("5 times ray.data.llm's rate", taken["ray"] / taken["arun"], 5, at_least=True),
            Check("1.5 times it without its start", started / taken["arun"], 1.5, at_least=True),
            Check("0.95 of LLM.generate's", taken["llm"] / taken["arun"], 0.95, at_least=True),
        ],
    )


ROWS: dict[str, Callable[[Options], Row]] = (
    {} if importlib.util.find_spec("vllm") is None else {"data_inference": inference}
)


def _measured(*numbers: int) -> dict[str, float]:
    """Measure in a process of its own: vLLM sets environment variables and leaves threads behind."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.inference", *map(str, numbers)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


# In that process.


async def _main(rounds: int, count: int) -> dict[str, float]:
    model = str(tiny_model())
    prompts = [prompt(number, words=5 + number * 7919 % 150) for number in range(count)]
    with tempfile.TemporaryDirectory(prefix="arun-bench-") as sockets:
        set_environment(model, sockets=sockets)
        spec = EngineSpec(model=model, max_model_len=MODEL_LEN)
        async with LocalCluster() as cluster, cluster.engines(spec) as pool:
            answered = from_rows([{"prompt": text} for text in prompts]).generate(
                pool, max_tokens=BATCH_TOKENS, temperature=0, ignore_eos=True
            )

            async def ours() -> float:
                began = time.perf_counter()
                table = await answered.collect()
                taken = time.perf_counter() - began
                assert table.column("answer_completion_tokens").to_pylist() == [BATCH_TOKENS] * count
                return taken

            before = children(os.getpid())
            with _llm(model) as generate:
                llm = children(os.getpid()) - before
                engines = {child for replica in pool.stats().replicas if replica.pid for child in children(replica.pid)}
                found: dict[str, list[float]] = {"arun": [], "llm": []}
                for number in range(-1, rounds):  # -1: the warm-up
                    for name in sorted(found, reverse=number % 2 == 0):
                        gc.collect()
                        with stopped(llm if name == "arun" else engines):
                            taken = await (ours() if name == "arun" else asyncio.to_thread(generate, prompts))
                        if number >= 0:
                            found[name].append(taken)
        few, found["ray"] = [
            [await asyncio.to_thread(_ray, model, some) for _ in range(2)] for some in (prompts[: count // 10], prompts)
        ]
    medians = {name: statistics.median(times) for name, times in found.items()}
    return {**medians, "ray_best": min(found["ray"]), "ray_few_best": min(few)}


@contextlib.contextmanager
def _llm(model: str) -> Iterator[Callable[[list[str]], float]]:
    vllm: Any = importlib.import_module("vllm")
    llm = vllm.LLM(model=model, max_model_len=MODEL_LEN, enforce_eager=True, disable_log_stats=True)
    params = vllm.SamplingParams(max_tokens=BATCH_TOKENS, temperature=0, ignore_eos=True)

    def generate(prompts: list[str]) -> float:
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        taken = time.perf_counter() - began
        assert sum(len(output.outputs[0].token_ids) for output in outputs) == BATCH_TOKENS * len(prompts)
        return taken

    try:
        yield generate
    finally:
        llm.llm_engine.engine_core.shutdown()


def _ray(model: str, prompts: list[str]) -> float:
    import ray

    ray.init(address="local", num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False)
    try:
        return ray_data_llm(model, prompts)["all"]
    finally:
        ray.shutdown()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as Ray sets it for an actor with one CPU: all compute alike
    print(json.dumps(asyncio.run(_main(*map(int, sys.argv[1:])))))
