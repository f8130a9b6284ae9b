"""Authentication, before anything else is said on a socket.

::

    server                                   client
    Challenge(nonce)                ----->
                                    <-----   Hello(versions, nonce, proof, limits)
    Welcome(version, proof, limits) ----->

A proof is an HMAC-SHA256 under the shared token over both nonces and the prover's role, so it can't be
replayed or reflected, and either side knows that the other has the token. Whoever does not is told
nothing: the connection just closes. Frames are at most 4 KiB here and of the one expected type.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from arun.channel.codec import SESSION_FRAME_BYTES, FrameReader, encode_message
from arun.channel.halves import Allowed
from arun.channel.messages import (
    NEWEST_VERSION,
    OLDEST_VERSION,
    Challenge,
    Goodbye,
    Hello,
    SessionMessage,
    Welcome,
)
from arun.channel.outbox import Outbox
from arun.errors import MisuseError, ProtocolError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from arun.channel.limits import Limits
    from arun.channel.wire import Wire

__all__ = ("Agreed", "Secret", "authenticate_client", "authenticate_to_server")

_NONCE_BYTES = 32
_FRAME_BYTES = 4096


class Secret:
    """The token that both sides share. It shows in no repr, so in no log or traceback either."""

    __slots__ = ("_token",)

    def __init__(self, token: bytes) -> None:
        if not isinstance(token, bytes):  # pyright: ignore[reportUnnecessaryIsInstance]  # users' code
            raise MisuseError(f"a token is bytes, not {type(token).__name__}; make one with secrets.token_bytes(32)")
        if not token:
            raise MisuseError("an empty token protects nothing; make one with secrets.token_bytes(32)")
        self._token = token

    def __repr__(self) -> str:
        return "<Secret>"

    def proof(self, role: Literal["client", "server"], server_nonce: bytes, client_nonce: bytes) -> bytes:
        """What only the given role with this token can say about these nonces."""
        said = b"arun channel " + role.encode() + server_nonce + client_nonce
        return hmac.digest(self._token, said, hashlib.sha256)


class Agreed(NamedTuple):
    """Result of a handshake: the reader of what follows, the peer's limits, and which secret it knows."""

    reader: FrameReader[SessionMessage]
    allowed: Allowed
    secret: Secret


async def authenticate_client(wire: Wire, known: Iterable[Secret], peer: str, limits: Limits) -> Agreed:
    """The server's part.

    :param known: the secrets that it takes, in whatever state they are when the proof has come.
    :raises ProtocolError: the client knows none of them, or sent something else.
    :raises anyio.EndOfStream, anyio.BrokenResourceError: it went away.
    """
    nonce = secrets.token_bytes(_NONCE_BYTES)
    await _send(wire, Challenge(nonce))
    reader: FrameReader[Any] = FrameReader(peer, Hello, _FRAME_BYTES)
    hello: Hello = await _receive(wire, reader, peer)
    for secret in known:
        if hmac.compare_digest(hello.proof, secret.proof("client", nonce, hello.nonce)):
            break
    else:
        raise ProtocolError(f"{peer} has another token")
    version = min(hello.newest, NEWEST_VERSION)
    if version < max(hello.oldest, OLDEST_VERSION):
        reason = f"the server speaks channel versions {OLDEST_VERSION} to {NEWEST_VERSION}"
        await _send(wire, Goodbye(reason))
        raise ProtocolError(f"{peer} speaks channel versions {hello.oldest} to {hello.newest}; {reason}")
    proof = secret.proof("server", nonce, hello.nonce)
    await _send(wire, Welcome(version, proof, limits.streams, limits.message_bytes))
    allowed = Allowed(hello.streams, hello.message_bytes)
    return Agreed(reader.switch(SessionMessage, SESSION_FRAME_BYTES), allowed, secret)


async def authenticate_to_server(wire: Wire, secret: Secret, peer: str, limits: Limits) -> Agreed:
    """The client's part.

    :raises ProtocolError: the server doesn't know the token, speaks another version, or sent something else.
    :raises anyio.EndOfStream, anyio.BrokenResourceError: it closed the connection, as it does for a wrong token.
    """
    challenged: FrameReader[Any] = FrameReader(peer, Challenge, _FRAME_BYTES)
    challenge: Challenge = await _receive(wire, challenged, peer)
    nonce = secrets.token_bytes(_NONCE_BYTES)
    proof = secret.proof("client", challenge.nonce, nonce)
    await _send(wire, Hello(OLDEST_VERSION, NEWEST_VERSION, nonce, proof, limits.streams, limits.message_bytes))
    reader = challenged.switch(Welcome | Goodbye, _FRAME_BYTES)
    welcome: Welcome | Goodbye = await _receive(wire, reader, peer)
    if isinstance(welcome, Goodbye):
        raise ProtocolError(f"{peer} refused: {welcome.reason}; this side speaks {OLDEST_VERSION} to {NEWEST_VERSION}")
    if not hmac.compare_digest(welcome.proof, secret.proof("server", challenge.nonce, nonce)):
        raise ProtocolError(f"{peer} could not prove that it knows the token; is something else listening there?")
    if not OLDEST_VERSION <= welcome.version <= NEWEST_VERSION:
        raise ProtocolError(f"{peer} chose channel version {welcome.version}, which was not offered")
    allowed = Allowed(welcome.streams, welcome.message_bytes)
    return Agreed(reader.switch(SessionMessage, SESSION_FRAME_BYTES), allowed, secret)


async def _send(wire: Wire, message: Challenge | Hello | Welcome | Goodbye) -> None:
    outbox = Outbox()
    outbox.append(encode_message(message))
    await wire.send(outbox.take_frame() or b"")


async def _receive(wire: Wire, reader: FrameReader[Any], peer: str) -> Any:
    while (messages := reader.next_frame()) is None:
        reader.feed(await wire.receive())
    if len(messages) != 1:
        raise ProtocolError(f"{peer} sent {len(messages)} messages before it was authenticated")
    return messages[0]
