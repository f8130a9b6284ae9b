"""Engines that write down what they begin and what they send, before they do."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import AsyncGenerator
from pathlib import Path

from actors.echo_engine import EchoEngine
from actors.engine import Delta, EngineSpec, GenerateRequest
from actors.vllm_engine import VLLMEngine
from tests.faults.history import Began, History, Sent

__all__ = ("FOLDER", "RecordedEcho", "RecordedVLLM")

FOLDER = "ARUN_FAULTS_FOLDER"
"""The environment variable that names the folder of the history."""


class RecordedEcho(EchoEngine):
    """An EchoEngine whose core, so to speak, dies of SIGUSR1 while its process lives on."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        self._history = _history()
        if threading.current_thread() is threading.main_thread():  # not so in an actor of Ray's
            signal.signal(signal.SIGUSR1, lambda *_: self._die())

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        return _recorded(super().generate(request), request, self._history)

    def _die(self) -> None:
        self._died = self._died or "its core was killed"


class RecordedVLLM(VLLMEngine):
    """A VLLMEngine."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        self._history = _history()

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta, None]:
        return _recorded(super().generate(request), request, self._history)


def _history() -> History:
    return History(Path(os.environ[FOLDER]) / f"engine-{os.getpid()}.jsonl")


async def _recorded(
    deltas: AsyncGenerator[Delta, None], request: GenerateRequest, history: History
) -> AsyncGenerator[Delta, None]:
    history.add(Began(request=request.request_id, epoch=request.epoch, resume=request.resume))
    try:
        async for delta in deltas:
            history.add(Sent(request=request.request_id, epoch=request.epoch, token_ids=delta.token_ids))
            yield delta
    finally:
        await deltas.aclose()
