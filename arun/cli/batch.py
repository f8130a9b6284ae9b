"""``arun batch``: an OpenAI batch file through engines of one's own.

    in.jsonl -> requests without a result -> the endpoints of :mod:`arun.web.openai` over a pool -> out.jsonl

Each result is appended as it comes, in one write, so a killed run leaves whole lines and at most one torn one. The next
run drops that, and what failed for the engines' sake, and asks for what has no result.
"""

from __future__ import annotations

import fcntl
import functools
import os
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Container, Iterator, MutableMapping
from pathlib import Path
from typing import Any, Final, Protocol, Self, TypeAlias, cast

import anyio
import msgspec
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from arun.batch_lines import BatchError, BatchRequest, BatchResponse, BatchResult, result_line
from arun.errors import ArunError, DataError
from arun.outcome_stream import fan_out
from arun.outcomes import Ok
from arun.policies import Policy

__all__ = ("BatchOptions", "Todo", "prepare", "run_batch")

_URLS: Final = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
_TOO_MANY: Final = 429
_LETHAL: Final = 422  # engines died of it; those of the next run may be others
_REFUSED: Final = 400
_FAILED: Final = 500
_QUIET_SECONDS: Final = 10.0

_App: TypeAlias = Callable[[Any, Callable[[], Awaitable[Any]], Callable[[Any], Awaitable[None]]], Awaitable[None]]


class BatchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of ``arun batch``; see its --help."""

    input: Path
    output: Path
    model: str
    name: str
    replicas: int = 1
    tensor_parallel: int = 1
    max_model_len: int | None = None
    max_tokens: int = 4096
    engine_args: str = "{}"
    local: bool = False


class Todo(msgspec.Struct, frozen=True):
    """What is to be done.

    :ivar output: descriptor of the file, open for appending, and locked.
    :ivar total: requests of the input.
    :ivar finished: those that have a result, and whether it is an answer.
    :ivar embeds: whether all of them ask for embeddings.
    """

    options: BatchOptions
    engine_args: dict[str, Any]
    output: int
    total: int
    finished: dict[str, bool]
    embeds: bool


def prepare(options: BatchOptions) -> Todo:
    """Look at the input and at what is there of the output, before anything is started.

    :raises DataError: a line of the input is no request, or the output is not of this input.
    """
    try:
        engine_args = msgspec.json.decode(options.engine_args, type=dict[str, Any])
    except msgspec.DecodeError as exc:
        raise DataError(f"--engine-args takes a JSON object: {exc}") from exc
    lines: dict[str, int] = {}
    kinds: dict[str, int] = {}
    for number, request in _requests(options.input):
        if request.custom_id in lines:
            first = lines[request.custom_id]
            raise DataError(f"{options.input}:{number}: the custom_id {request.custom_id!r} is that of line {first}")
        lines[request.custom_id] = number
        kinds.setdefault("embeddings" if request.url == _URLS[-1] else "answers", number)
    if len(kinds) > 1:
        where = " and ".join(f"line {number} for {kind}" for kind, number in kinds.items())
        raise DataError(f"{options.input}: {where}; an engine gives one or the other, so split the file")
    output = _locked(options.output)
    finished = _finished(options.output, lines)
    if finished is None:  # lines had to be dropped, so the file is another one
        os.close(output)
        output = _locked(options.output)
        finished = _finished(options.output, lines) or {}
    return Todo(options, engine_args, output, len(lines), finished, "embeddings" in kinds)


async def run_batch(todo: Todo) -> None:
    """Start the engines, ask for what has no result, append the results.

    :raises ArunError: requests have failed; their lines say why.
    """
    with _Display(todo) as display:
        if len(todo.finished) < todo.total:
            await _run(todo, display)
    if display.failed:
        raise ArunError(
            f"{display.failed} of {todo.total} requests failed; their lines in {todo.options.output} say why"
        )


async def _run(todo: Todo, display: _Display) -> None:
    from actors import EngineSpec, LocalCluster, RayCluster
    from arun.web.openai import openai_app

    options = todo.options
    spec = EngineSpec(
        model=options.model,
        engine="echo" if options.model == "echo" else "vllm",
        runner="pooling" if todo.embeds else "generate",
        tensor_parallel_size=options.tensor_parallel,
        max_model_len=options.max_model_len,
        engine_args=todo.engine_args,
    )
    async with LocalCluster() if options.local else RayCluster.connect() as cluster:
        async with cluster.engines(spec, replicas=options.replicas, on_progress=display.replica) as pool:
            app: _App = openai_app({options.name: pool}, max_tokens=options.max_tokens)
            calls = (
                functools.partial(_answer, app, request)
                for _, request in _requests(options.input)
                if request.custom_id not in todo.finished
            )
            async for outcome in fan_out(calls, Policy(limit=pool.batch_limit, order="completed")):
                result = cast("Ok[BatchResult]", outcome).value  # the first failure is raised
                os.write(todo.output, result_line(result))
                display.advance(result)


# -- one request --------------------------------------------------------------------------------------------------


async def _answer(app: _App, request: BatchRequest) -> BatchResult:
    """What the endpoint says to a request."""
    request_id = uuid.uuid4().hex
    status, body = _REFUSED, b""
    if _streams(request.body):
        body = b'{"error":{"code":"stream","message":"stream: a batch has whole answers; leave it out"}}'
    else:
        status, body = await _post(app, request.url, bytes(request.body))
    error = None
    if status >= _REFUSED:
        told = msgspec.json.decode(body, type=_Told).error
        error = BatchError(code=told.code or told.type, message=told.message)
    response = BatchResponse(status_code=status, request_id=request_id, body=msgspec.Raw(body))
    return BatchResult(id=f"batch_req_{request_id}", custom_id=request.custom_id, response=response, error=error)


class _ToldError(msgspec.Struct):
    message: str
    code: str | None = None
    type: str = "error"


class _Told(msgspec.Struct):
    error: _ToldError


class _Streaming(msgspec.Struct):
    stream: bool | None = None


def _streams(body: msgspec.Raw) -> bool:
    try:
        return bool(msgspec.json.decode(body, type=_Streaming).stream)
    except msgspec.DecodeError:  # the endpoint tells what is wrong
        return False


async def _post(app: _App, url: str, body: bytes) -> tuple[int, bytes]:
    """Call an ASGI app, without a network between."""
    given = [{"type": "http.request", "body": body, "more_body": False}]
    status, parts = 0, list[bytes]()

    async def receive() -> dict[str, Any]:
        if given:
            return given.pop()
        await anyio.sleep_forever()  # this client does not leave
        raise AssertionError

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)
        parts.append(message.get("body", b""))

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": url,
        "raw_path": url.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json")],
    }
    await app(scope, receive, send)
    return status, b"".join(parts)


# -- files ---------------------------------------------------------------------------------------------------------


def _requests(path: Path) -> Iterator[tuple[int, BatchRequest]]:
    """The requests of the input, with the numbers of their lines.

    :raises DataError: a line is none.
    """
    decoder = msgspec.json.Decoder(BatchRequest)
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                request = decoder.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as exc:
                raise DataError(f"{path}:{number}: this is no request of a batch: {exc}") from exc
            if request.method != "POST" or request.url not in _URLS:
                what = f"{request.method} {request.url}"
                raise DataError(f"{path}:{number}: {what} can't be asked for; POST to one of {', '.join(_URLS)}")
            yield number, request


def _locked(path: Path) -> int:
    """Open the output for appending, alone."""
    output = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        os.close(output)
        raise DataError(f"{path} is being written by another process; wait for it, or name another file") from exc
    return output


def _finished(path: Path, asked: Container[str]) -> dict[str, bool] | None:
    """The requests that have a result, and whether it is an answer.

    None where lines had to be dropped, a torn last one or failures that are not the requests' own: the file has been
    replaced by one without them.

    :raises DataError: the file has lines that are no results of this input.
    """
    finished: dict[str, bool] = {}
    dropped: set[int] = set()
    with path.open("rb") as lines:
        for number, line in enumerate(lines):
            if not line.endswith(b"\n"):
                dropped.add(number)
                continue
            result = _result(line)
            if result is None or result.custom_id not in asked:
                what = (
                    "no result of a batch" if result is None else f"of {result.custom_id!r}, which is not in the input"
                )
                raise DataError(f"{path}:{number + 1}: this is {what}; name another file with --output")
            if _may_succeed(result):
                dropped.add(number)
            else:
                finished[result.custom_id] = result.error is None
    if not dropped:
        return finished
    whole = path.with_name(f".{path.name}.new")
    with path.open("rb") as lines, whole.open("wb") as kept:
        kept.writelines(line for number, line in enumerate(lines) if number not in dropped)
    whole.replace(path)
    return None


def _result(line: bytes) -> BatchResult | None:
    try:
        return msgspec.json.decode(line, type=BatchResult)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _may_succeed(result: BatchResult) -> bool:
    """Whether a failure is worth another attempt."""
    status = _FAILED if result.response is None else result.response.status_code
    return status >= _FAILED or status in {_LETHAL, _TOO_MANY}


# -- what a person sees --------------------------------------------------------------------------------------------


class _Replica(Protocol):
    """How far the start of one engine has come (``actors.ReplicaProgress``)."""

    @property
    def replica(self) -> int: ...
    @property
    def state(self) -> str: ...
    @property
    def seconds(self) -> float: ...


class _Display:
    """Progress on stderr: a bar in a terminal, a line every ten seconds elsewhere."""

    def __init__(self, todo: Todo) -> None:
        self.failed = sum(not answered for answered in todo.finished.values())
        self._done, self._total = len(todo.finished), todo.total
        self._output = todo.options.output
        self._told = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("answers", total=todo.total, completed=self._done)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        self._tell(f"{self._total} requests, {self._done} have results from before")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._tell(f"{self._done} of {self._total} requests have results in {self._output}, {self.failed} are failures")
        if self._bar is not None:
            self._bar.stop()

    def replica(self, progress: _Replica) -> None:
        """An engine has come so far."""
        self._tell(f"engine {progress.replica}: {progress.state}, {progress.seconds:.0f} s")

    def advance(self, result: BatchResult) -> None:
        """One more result."""
        self._done += 1
        self.failed += result.error is not None
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
        elif time.monotonic() - self._told > _QUIET_SECONDS:
            self._tell(f"{self._done} of {self._total} requests have results, {self.failed} are failures")

    def _tell(self, text: str) -> None:
        self._told = time.monotonic()
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            typer.echo(text, err=True)
