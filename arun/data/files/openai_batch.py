"""Batches of OpenAI's batch API: JSON lines of requests in, JSON lines of results out."""

from __future__ import annotations

import os
import uuid
from typing import Any, Final

import msgspec
import pyarrow as pa

from arun.batch_lines import BatchError, BatchResponse, BatchResult, result_line
from arun.data.files.jsonl import JsonLinesSource, jsonl_source
from arun.data.files.parts import FileSink, Mode
from arun.data.files.paths import Paths
from arun.errors import DataError

__all__ = ("batch_sink", "batch_source")


def batch_source(paths: Paths, *, filesystem: Any = None) -> JsonLinesSource:
    """Requests of OpenAI batch files: columns ``custom_id``, ``method``, ``url`` and ``body``, the latter JSON as text.

    :param paths: files, folders, globs or URLs; see :mod:`arun.data.files.paths`.
    :param filesystem: of pyarrow or fsspec, where the paths are no URLs.
    """
    return jsonl_source(paths, schema=_REQUESTS, filesystem=filesystem)


def batch_sink(
    path: str | os.PathLike[str], *, mode: Mode = "error", part_bytes: int | None = None, filesystem: Any = None
) -> FileSink:
    """Results as OpenAI's batch API gives them.

    Of the columns ``custom_id`` must be there; ``body`` and ``error`` are JSON as text, or structs, and an error may be
    a plain message; ``status_code`` is 200 where it isn't there, or 500 for an error; ``request_id`` and ``id`` are
    made where they aren't there.

    The parameters are those of :class:`~arun.data.files.FileSink`.
    """
    return FileSink(path, _BatchFormat(), mode=mode, part_bytes=part_bytes, filesystem=filesystem)


_REQUESTS: Final = pa.schema([(name, pa.string()) for name in ("custom_id", "method", "url", "body")])
_RESULTS: Final = ("id", "custom_id", "status_code", "request_id", "body", "error")


class _BatchFormat(msgspec.Struct, frozen=True):
    suffix = ".jsonl"
    word = "openai batch"

    def encoder(self, stream: Any, schema: pa.Schema) -> _BatchEncoder:
        unknown = [name for name in schema.names if name not in _RESULTS]
        if schema.names and ("custom_id" not in schema.names or unknown):
            what = f"not {unknown[0]!r}" if unknown else "'custom_id' at least"
            raise DataError(f"results of a batch have the columns {', '.join(_RESULTS)}, {what}; rename or select them")
        return _BatchEncoder(stream)


class _BatchEncoder:
    pending = 0

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, block: pa.RecordBatch) -> None:
        self._stream.write(b"".join(result_line(_result(row)) for row in block.to_pylist()))

    def close(self) -> None:
        pass


def _result(row: dict[str, Any]) -> BatchResult:
    error, custom_id = row.get("error"), row["custom_id"]
    if custom_id is None:
        raise DataError("a row has no custom_id, which tells whose answer it is")
    request_id = row.get("request_id") or uuid.uuid4().hex
    response = None
    if row.get("body") is not None:
        status = row.get("status_code") or (200 if error is None else 500)
        response = BatchResponse(status_code=status, request_id=request_id, body=_json(row["body"], custom_id))
    return BatchResult(
        id=row.get("id") or f"batch_req_{request_id}",
        custom_id=str(custom_id),
        response=response,
        error=None if error is None else _error(error),
    )


def _json(value: Any, custom_id: object) -> msgspec.Raw:
    if not isinstance(value, str):
        return msgspec.Raw(msgspec.json.encode(value))
    try:
        msgspec.json.decode(value)
    except msgspec.DecodeError as exc:
        raise DataError(f"the body of {custom_id!r} is no JSON: {exc}; encode it with msgspec or json.dumps") from exc
    return msgspec.Raw(value.encode())


def _error(error: Any) -> BatchError:
    try:
        return (
            msgspec.json.decode(error, type=BatchError)
            if isinstance(error, str)
            else msgspec.convert(error, BatchError)
        )
    except msgspec.DecodeError:
        return BatchError(code="error", message=str(error))
