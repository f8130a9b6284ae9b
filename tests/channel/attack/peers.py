"""Peers that speak the protocol by hand, and what to look at while they do."""

from __future__ import annotations

import gc
import os
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import msgspec

from arun.channel import connect_tcp, serve_tcp
from arun.channel.codec import FrameReader, encode_message
from arun.channel.handshake import Secret
from arun.channel.limits import Limits
from arun.channel.messages import Challenge, Goodbye, Hello, SessionMessage, Welcome
from arun.channel.outbox import Outbox

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from arun.channel import Connection, Handler, Server

__all__ = ("NIL", "TOKEN", "RawPeer", "Site", "frame", "open_files", "resident", "site")

TOKEN = b"a token that only the two sides know"
DEFAULT_LIMITS = Limits()
NIL = msgspec.Raw(b"\xc0")


def frame(*messages: Any) -> bytes:
    """One frame of these messages, of which some may be encoded already."""
    outbox = Outbox()
    for message in messages:
        outbox.append(message if isinstance(message, bytes) else encode_message(message))
    taken = outbox.take_frame()
    assert taken is not None
    assert not outbox.size
    return taken


class RawPeer:
    """A client that knows the token, and may say anything."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self._reader: FrameReader[Any] = FrameReader("raw", Challenge, 4096)

    @classmethod
    async def connect(cls, address: Any, *, token: bytes = TOKEN) -> RawPeer:
        """Connect and authenticate."""
        peer = cls(await anyio.connect_tcp(*address))
        [challenge] = await peer.receive()
        nonce = os.urandom(32)
        proof = Secret(token).proof("client", challenge.nonce, nonce)
        await peer.stream.send(frame(Hello(1, 1, nonce, proof, 1024, 2**26)))
        peer._reader = peer._reader.switch(Welcome, 4096)
        await peer.receive()
        peer._reader = peer._reader.switch(SessionMessage, 2**26)
        return peer

    async def receive(self) -> list[Any]:
        """The messages of the next frame."""
        while (messages := self._reader.next_frame()) is None:
            self._reader.feed(await self.stream.receive())
        return messages

    async def goodbye(self) -> Goodbye:
        """Read on to the server's last message."""
        while True:
            for message in await self.receive():
                if isinstance(message, Goodbye):
                    return message

    async def read_on(self) -> None:
        """Throw away what arrives, to the end."""
        try:
            while True:
                await self.stream.receive()
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass


class Site:
    """A server with one honest client."""

    def __init__(self, server: Server, client: Connection) -> None:
        self.server = server
        self.client = client


@asynccontextmanager
async def site(handler: Handler, *, limits: Limits = DEFAULT_LIMITS) -> AsyncIterator[Site]:
    """A TCP server with one honest client; both are closed at the end."""
    server = await serve_tcp(handler, token=TOKEN, limits=limits)
    client = await connect_tcp(*server.address, token=TOKEN)
    try:
        yield Site(server, client)
    finally:
        with anyio.CancelScope(shield=True):
            await client.aclose()
            await server.aclose()


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def open_files() -> int:
    """File descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))
