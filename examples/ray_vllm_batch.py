"""Batch inference: prompts from Parquet, 2D parallel vLLM engines on Ray, answers to Parquet.

    python examples/ray_vllm_batch.py prompts.parquet answers/ --model tiny --replicas 2 --tensor-parallel 2

Each replica has a placement group of its own with a bundle for each of its workers, packed on one node, so that tensors
never cross the network. Rows go to whichever replica has room; a replica that dies costs no row.
"""

import argparse
import asyncio
from pathlib import Path

import anyio

from actors import EngineSpec, RayCluster
from arun.data import from_rows, read_parquet


async def answer(prompts: Path, answers: Path, given: argparse.Namespace) -> None:
    if not await anyio.Path(prompts).exists():
        questions = [{"id": n, "prompt": f"Name {n} things that have wheels."} for n in range(given.rows)]
        await from_rows(questions).write_parquet(prompts).arun()

    spec = EngineSpec(model=given.model, tensor_parallel_size=given.tensor_parallel, max_model_len=512)
    async with (
        RayCluster.connect(given.address) as cluster,
        cluster.engines(spec, replicas=given.replicas, cpus=given.cpus, strategy="STRICT_PACK") as pool,
    ):
        job = (
            read_parquet(prompts)
            .chat(pool, messages="prompt", output="answer", max_tokens=given.max_tokens, temperature=0.0)
            .write_parquet(answers, mode="overwrite")
        )
        print(job.explain())
        report = await job.arun()
        print(f"{report.rows} answers in {report.statistics.seconds:.1f} s by {pool.stats().replicas}")

    for row in await read_parquet(answers).select("id", "prompt", "answer", "answer_finish_reason").take(3):
        print(row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", type=Path, help="Parquet with columns id and prompt; made if it is not there")
    parser.add_argument("answers", type=Path, help="folder for Parquet")
    parser.add_argument("--model", default="tiny", help="a folder, a name on the hub, 'tiny' or 'demo'")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--tensor-parallel", type=int, default=2)
    parser.add_argument("--cpus", type=float, default=1.0, help="of each worker's bundle")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, default=100, help="prompts to make")
    parser.add_argument("--address", help="of a Ray that runs; by default one is started here")
    given = parser.parse_args()
    asyncio.run(answer(given.prompts, given.answers, given))


if __name__ == "__main__":
    main()
