"""EventStream: a run as a response of server-sent events, which ends the run when the client leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from arun.errors import MisuseError
from arun.events import Event, RunFailed
from arun.guards import close_unused, shown
from arun.logs import get_logger
from arun.stream import RunStream
from arun.web.disconnect import disconnected
from arun.web.sse import PING, encode_error, encode_event

__all__ = ("EventStream",)

log = get_logger("arun.web")


class EventStream(Response):
    """Sends the events of a run as they come.

    The run starts when the response does, and not for a HEAD request. When the client leaves, the run is cancelled and
    its clean-up awaited. A failing run ends the stream with its ``RunFailed`` event.

    :param stream: what ``app.astream()`` returned; ``deliver="latest"`` suits browsers.
    :param only: types of the events to send; all by default.
    :param ping: seconds of silence after which a comment line keeps the connection open.
    :raises MisuseError: for what is no such stream.

    >>> @app.post("/ask/stream")
    ... async def ask_stream(question: Question) -> EventStream:
    ...     return EventStream(application.session(prompt=question.prompt).astream(deliver="latest"))
    """

    media_type: str | None = "text/event-stream"

    def __init__(
        self,
        stream: RunStream[Any],
        *,
        only: tuple[type[Event], ...] = (),
        ping: float = 15.0,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if not isinstance(stream, RunStream):  # pyright: ignore[reportUnnecessaryIsInstance]  # users' code
            close_unused(stream)
            raise MisuseError(
                f"EventStream() takes what app.astream() returned, not {shown(stream)}; its only=(...) chooses events, "
                "and for a form of your own there is StreamingResponse"
            )
        self._stream = stream
        self._only = only
        self._ping = ping
        self.status_code = 200
        self.background = None
        self.body = b""
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            if scope["method"] != "HEAD":
                async with anyio.create_task_group() as group:

                    async def watch() -> None:
                        await disconnected(receive)
                        group.cancel_scope.cancel()

                    group.start_soon(watch)
                    await self._send_events(send)
                    group.cancel_scope.cancel()
        finally:
            await self._stream.aclose()

    async def _send_events(self, send: Send) -> None:
        sent: Event | None = None
        try:
            while True:
                event: Event | None = None
                # Safe around this __anext__: a RunStream loses nothing when a wait for it is cancelled.
                with anyio.move_on_after(self._ping):
                    event = await anext(self._stream, _END)
                if event is _END:
                    break
                if event is None:
                    await send(_body(PING))
                elif not self._only or isinstance(event, self._only):
                    sent = event
                    await send(_body(encode_event(event)))
        except OSError:  # the server's word for a client that left in the middle of a write
            return
        except Exception as exc:
            log.exception("event_stream.failed")
            if not isinstance(sent, RunFailed):
                await send(_body(encode_error(f"{type(exc).__qualname__}: {exc}")))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


_END: Any = object()


def _body(data: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": True}
