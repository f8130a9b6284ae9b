"""Lines of OpenAI's batch API: requests in, results out.

https://platform.openai.com/docs/api-reference/batch: the objects of a request's input and output.
"""

from __future__ import annotations

import msgspec

__all__ = ("BatchError", "BatchRequest", "BatchResponse", "BatchResult", "result_line")


class BatchRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the input.

    :ivar custom_id: unique in its file.
    :ivar url: the endpoint, such as ``/v1/chat/completions``.
    :ivar body: of the request, as JSON.
    """

    custom_id: str
    method: str = "POST"
    url: str
    body: msgspec.Raw


class BatchResponse(msgspec.Struct, frozen=True, kw_only=True):
    """What the endpoint answered.

    :ivar body: as JSON.
    """

    status_code: int
    request_id: str
    body: msgspec.Raw


class BatchError(msgspec.Struct, frozen=True, kw_only=True):
    """Why there is no answer."""

    code: str
    message: str


class BatchResult(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the output."""

    id: str
    custom_id: str
    response: BatchResponse | None
    error: BatchError | None


def result_line(result: BatchResult) -> bytes:
    """The line of the output file, with its end."""
    return msgspec.json.encode(result) + b"\n"
