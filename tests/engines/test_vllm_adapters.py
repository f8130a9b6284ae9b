"""LoRA adapters, by name; random ones for the tiny model."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from actors.engine import EngineSpec
from actors.engines.vllm_start import lora_arguments
from actors.local_cluster import LocalCluster
from arun.errors import EngineError, MisuseError, ModelNotFound, RequestError

safetensors = pytest.importorskip("safetensors.numpy")


def make_adapter(folder: Path, *, rank: int, seed: int) -> str:
    random = np.random.default_rng(seed)
    sizes = {"self_attn.q_proj": (128, 128), "self_attn.v_proj": (128, 64)}
    weights = {}
    for layer in range(2):
        for module, (inputs, outputs) in sizes.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            weights[f"{name}.lora_A.weight"] = random.normal(size=(rank, inputs)).astype("float32")
            weights[f"{name}.lora_B.weight"] = random.normal(size=(outputs, rank)).astype("float32")
    safetensors.save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"bias": "none", "task_type": "CAUSAL_LM"}))
    return str(folder)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    return {
        "pirate": make_adapter(tmp_path_factory.mktemp("pirate"), rank=4, seed=1),
        "poet": make_adapter(tmp_path_factory.mktemp("poet"), rank=8, seed=2),
    }


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pool(adapters):
    pytest.importorskip("vllm")
    spec = EngineSpec(model="tiny", max_model_len=256, adapters=adapters)
    async with LocalCluster(cpus=8) as cluster, cluster.engines(spec, name="voices") as pool:
        yield pool


def with_rank(tmp_path, rank):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": rank}))
    return str(tmp_path)


def test_there_is_room_for_all_adapters_at_once_and_for_the_largest_rank(adapters, tmp_path):
    found = lora_arguments({**adapters, "large": with_rank(tmp_path, 20)})
    assert found == {"enable_lora": True, "max_loras": 3, "max_cpu_loras": 3, "max_lora_rank": 32}
    assert lora_arguments({}) == {}


def test_a_rank_beyond_what_vllm_can_do_is_refused(tmp_path):
    with pytest.raises(MisuseError, match="'large' has rank 513; vLLM takes ranks of at most 512"):
        lora_arguments({"large": with_rank(tmp_path, 513)})


@pytest.mark.parametrize("content", [None, "{}", "{", '{"r": "many"}'])
def test_a_folder_without_an_adapter_is_refused_by_name(tmp_path, content):
    if content is not None:
        (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ModelNotFound, match="'pirate' is no LoRA adapter"):
        lora_arguments({"pirate": str(tmp_path)})


@pytest.mark.engine
@pytest.mark.asyncio(loop_scope="module")
async def test_adapters_answer_by_name_and_side_by_side(pool):
    async def likelihoods(adapter):  # of a token that is forced: they differ by rounding only, however vLLM batches
        done = await pool.complete(
            "An engine turns", max_tokens=5, allowed_token_ids=[77], ignore_eos=True, logprobs=0, adapter=adapter
        )
        return [position[0].logprob for position in done.logprobs]

    names = [None, "pirate", "poet"]
    alone = [await likelihoods(name) for name in names]
    nearest = min(math.dist(a, b) for a, b in itertools.combinations(alone, 2))
    for _ in range(3):
        together = await asyncio.gather(*map(likelihoods, names))
        assert max(map(math.dist, alone, together)) < nearest / 3


@pytest.mark.engine
@pytest.mark.asyncio(loop_scope="module")
async def test_an_unknown_adapter_is_refused_with_those_there_are(pool):
    with pytest.raises(RequestError, match=r"no adapter 'parrot'; EngineSpec\.adapters has 'pirate', 'poet'"):
        await pool.complete("An engine", adapter="parrot")


@pytest.mark.engine
@pytest.mark.asyncio(loop_scope="module")
async def test_what_would_kill_the_engine_is_refused(pool):
    with pytest.raises(RequestError, match="prompt_logprobs on a CPU with LoRA adapters"):
        await pool.complete("An engine", prompt_logprobs=0)
    assert (await pool.complete("An engine", max_tokens=2, ignore_eos=True)).usage.completion_tokens == 2


@pytest.mark.engine
@pytest.mark.asyncio(loop_scope="module")
async def test_an_adapter_goes_on_when_its_folder_is_gone(pool, adapters):
    shutil.rmtree(adapters["poet"])
    assert (
        await pool.complete("An engine", max_tokens=2, adapter="poet", ignore_eos=True)
    ).usage.completion_tokens == 2


@pytest.mark.engine
@pytest.mark.asyncio
async def test_an_adapter_that_does_not_load_is_named_at_the_start(tmp_path):
    pytest.importorskip("vllm")
    folder = Path(make_adapter(tmp_path, rank=4, seed=1))
    (folder / "adapter_model.safetensors").unlink()
    async with LocalCluster(cpus=8) as cluster:
        with pytest.raises(EngineError, match=r"adapters: vLLM can't load 'pirate' from .*: .*(found|contain)"):
            await cluster.engines(EngineSpec(model="tiny", max_model_len=256, adapters={"pirate": str(folder)})).start()
