"""Channels over TCP and Unix sockets: servers and clients."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import anyio
from anyio.abc import AnyByteStream, Listener, SocketAttribute, SocketStream
from anyio.streams.tls import TLSStream

from arun.channel.asyncio_wire import AsyncioWire
from arun.channel.connection import Connection
from arun.channel.handshake import Secret, authenticate_client, authenticate_to_server
from arun.channel.limits import Limits
from arun.channel.wire import StreamWire, Wire
from arun.errors import ChannelLost, MisuseError, PortInUse, ProtocolError
from arun.logs import get_logger
from arun.runtime import Runtime

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from arun.channel.serving import Handler
    from arun.channel.tls import TLSConfig

__all__ = ("Server", "connect_tcp", "connect_unix", "serve_tcp", "serve_unix")

log = get_logger("arun.channel")

_DEFAULT_LIMITS = Limits()
# After an accept() that failed, for example because the process has too many files open.
_ACCEPT_PAUSE = 0.1
# Seconds after a logged failure of a stranger in which others' are only counted.
_QUIET_SECONDS = 1.0
# sizeof(sockaddr_un.sun_path) less the final zero, on Linux.
_UNIX_PATH_BYTES = 107


async def connect_tcp(
    host: str,
    port: int,
    *,
    token: bytes,
    tls: TLSConfig | None = None,
    handler: Handler | None = None,
    limits: Limits = _DEFAULT_LIMITS,
) -> Connection:
    """Connect to a server of :func:`serve_tcp` and authenticate.

    :param token: the secret that the server was given.
    :param tls: needed where the server has one.
    :param handler: serves the streams that the server opens; without one they are refused.
    :param limits: what this side allows the server.
    :raises ChannelLost: nobody listens there, or it hung up or stayed silent, as for a wrong token.
    :raises ProtocolError: what listens there doesn't know the token, has another certificate than it should, or is no
        channel server.
    """
    context = None if tls is None else tls.client_context()
    name = None if tls is None else tls.hostname or host

    async def dial() -> Wire:
        wire: Wire
        if _on_asyncio():
            loop = asyncio.get_running_loop()
            # uvloop, which Ray's actors and many web servers run on, knows no happy eyeballs.
            several: Any = {"happy_eyeballs_delay": 0.25} if isinstance(loop, asyncio.BaseEventLoop) else {}
            made = loop.create_connection(AsyncioWire, host, port, ssl=context, server_hostname=name, **several)
            wire = (await made)[1]
        else:
            wire = StreamWire(await _encrypted(await anyio.connect_tcp(host, port), context, name))
        _notice_loss(wire.extra(SocketAttribute.raw_socket), limits)
        return wire

    secret = Secret(token)
    del token  # tracebacks may show local variables
    return await _connect(dial, _tcp_name(host, port), secret, handler, limits, tls=tls is not None)


async def connect_unix(
    path: str | os.PathLike[str], *, token: bytes, handler: Handler | None = None, limits: Limits = _DEFAULT_LIMITS
) -> Connection:
    """Connect to a server of :func:`serve_unix`; parameters and errors as for :func:`connect_tcp`."""
    name = f"unix:{os.fspath(path)}"

    async def dial() -> Wire:
        if _on_asyncio():
            loop = asyncio.get_running_loop()
            return (await loop.create_unix_connection(AsyncioWire, os.fspath(path)))[1]
        return StreamWire(await anyio.connect_unix(path))

    secret = Secret(token)
    del token  # as above
    return await _connect(dial, name, secret, handler, limits, tls=True)  # a Unix socket needs none


async def serve_tcp(
    handler: Handler,
    *,
    token: bytes,
    host: str = "127.0.0.1",
    port: int = 0,
    tls: TLSConfig | None = None,
    limits: Limits = _DEFAULT_LIMITS,
) -> Server:
    """Serve a handler to clients that know the token.

    :param token: the shared secret, for example ``secrets.token_bytes(32)``.
    :param host: one address of this machine; wildcard addresses are refused.
    :param port: 0 takes a free one; ``Server.address`` tells which.
    :param tls: encrypts, with this certificate; clients that come without are dropped.
    :raises PortInUse: somebody else has the port.
    """
    if host in {"", "*", "0.0.0.0", "::"}:
        raise MisuseError(
            f"host {host!r} would offer the channel on every network of this machine; "
            "name one address, such as 127.0.0.1 or the node's own"
        )
    context = None if tls is None else tls.server_context()
    secret, runtime = Secret(token), Runtime.current()
    del token  # tracebacks may show local variables
    try:
        listener = await anyio.create_tcp_listener(local_host=host, local_port=port)
    except OSError as exc:
        if exc.errno != errno.EADDRINUSE:
            raise
        raise PortInUse(
            f"port {port} of {host} is taken by another process (`ss -ltnp 'sport = :{port}'` names it); "
            "stop that, pass another port, or port=0 for a free one"
        ) from exc
    address = (host, listener.extra(SocketAttribute.local_port))
    return Server(listener, address, handler, secret, limits, runtime, context)


async def serve_unix(
    handler: Handler, *, path: str | os.PathLike[str], token: bytes, limits: Limits = _DEFAULT_LIMITS
) -> Server:
    """Serve a handler on a Unix socket with mode 0600, removed by ``Server.aclose()``.

    A socket file that nobody listens on any more is replaced. Parameters as for :func:`serve_tcp`.

    :param path: at most 107 bytes, in an existing folder.
    :raises PortInUse: somebody listens on that path, or it is no socket.
    """
    name = os.fspath(path)
    if len(os.fsencode(name)) > _UNIX_PATH_BYTES:
        raise MisuseError(f"{name!r} is longer than the {_UNIX_PATH_BYTES} bytes that a Unix socket's path may have")
    secret, runtime = Secret(token), Runtime.current()
    del token  # tracebacks may show local variables
    await _refuse_taken_path(name)
    listener = await anyio.create_unix_listener(name, mode=0o600)
    return Server(listener, name, handler, secret, limits, runtime)


class Server:
    """Accepts connections and serves one handler to all of them. Made by ``serve_tcp`` or ``serve_unix``.

    :ivar address: (host, port), or the path of the Unix socket.
    """

    def __init__(
        self,
        listener: Listener[SocketStream],
        address: tuple[str, int] | str,
        handler: Handler,
        secret: Secret,
        limits: Limits,
        runtime: Runtime,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.address = address
        self._name = address if isinstance(address, str) else _tcp_name(*address)
        self._listener = listener
        self._handler = handler
        self._secret = secret
        self._guests: dict[bytes, _Guest] = {}
        self._limits = limits
        self._context = context
        self._half_open = 0
        # Strangers' failures since the last that was logged, and until when none is.
        self._unlogged, self._quiet_until = 0, 0.0
        self._connections: dict[Connection, Secret] = {}
        self._runtime = runtime
        self._accepting = runtime.start(self._accept_all, name=f"channel server {self._name}")
        log.info("server.started", address=self._name)

    def __repr__(self) -> str:
        return f"<Server {self._name}, {self.connections} connections>"

    @property
    def connections(self) -> int:
        """How many authenticated connections there are."""
        return len(self._connections)

    def admit(self, token: bytes, *, on_left: Callable[[], object] | None = None) -> None:
        """Take one more token, that of one more client, so that it can be taken back without touching the others.

        :param on_left: called when a connection with this token has ended.
        """
        self._guests[token] = _Guest(Secret(token), on_left)

    def revoke(self, token: bytes) -> None:
        """Take back what :meth:`admit` gave: the token opens nothing any more, and its connections are closed."""
        guest = self._guests.pop(token, None)
        for connection, secret in self._connections.items():
            if guest is not None and secret is guest.secret:
                connection.close_soon()

    def in_use(self, token: bytes) -> bool:
        """Whether a connection of the client with this token is open."""
        guest = self._guests.get(token)
        return guest is not None and guest.secret in self._connections.values()

    async def aclose(self) -> None:
        """Stop listening, say goodbye to every client, and wait until all handlers have cleaned up.

        Cancelling it only stops the waiting. May be called again.
        """
        for connection in self._connections:
            connection.close_soon()
        self._accepting.cancel()
        await self._accepting.wait()
        for connection in list(self._connections):
            await connection.aclose()

    async def _accept_all(self) -> None:
        try:
            if _on_asyncio():
                await self._accept_on_asyncio()
            async with anyio.create_task_group() as tasks:
                while True:
                    try:
                        await self._listener.serve(self._accept_stream, tasks)
                    except* OSError as exc:
                        log.warning("server.accept_failed", address=self._name, error=repr(exc.exceptions[0]))
                    await anyio.sleep(_ACCEPT_PAUSE)
        finally:
            with anyio.CancelScope(shield=True):
                await self._listener.aclose()
            if isinstance(self.address, str):
                with suppress(FileNotFoundError):
                    os.unlink(self.address)
            log.info("server.stopped", address=self._name)

    async def _accept_on_asyncio(self) -> None:
        """Accept for ever; a task for each client until it is authenticated."""
        loop = asyncio.get_running_loop()
        authenticating: dict[asyncio.Task[None], socket.socket] = {}

        def accept(listening: socket.socket) -> None:
            try:
                sock, _ = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as exc:
                log.warning("server.accept_failed", address=self._name, error=repr(exc))
                loop.remove_reader(listening)
                loop.call_later(_ACCEPT_PAUSE, listen, listening)
                return
            sock.setblocking(False)
            task = loop.create_task(self._accept_socket(sock), name=f"handshake of {self._name}")
            authenticating[task] = sock
            task.add_done_callback(authenticating.pop)

        def listen(listening: socket.socket) -> None:
            if listening.fileno() >= 0:  # else closed meanwhile
                loop.add_reader(listening, accept, listening)

        listeners = getattr(self._listener, "listeners", (self._listener,))
        sockets = [listener.extra(SocketAttribute.raw_socket) for listener in listeners]
        try:
            for listening in sockets:
                listen(listening)
            await anyio.sleep_forever()
        finally:
            for listening in sockets:
                loop.remove_reader(listening)
            with anyio.CancelScope(shield=True):
                for task, sock in tuple(authenticating.items()):
                    task.cancel()
                    await asyncio.wait((task,))
                    sock.close()  # its task may not have begun

    async def _accept_socket(self, sock: socket.socket) -> None:
        async def made() -> Wire:
            wire = AsyncioWire()
            # With TLS, what uvloop returns is a protocol of its own.
            await asyncio.get_running_loop().connect_accepted_socket(lambda: wire, sock, ssl=self._context)
            return wire

        async def drop() -> None:
            sock.close()

        await self._accept(sock, made, drop)

    async def _accept_stream(self, stream: SocketStream) -> None:
        async def made() -> Wire:
            return StreamWire(await _encrypted(stream, self._context))

        await self._accept(stream.extra(SocketAttribute.raw_socket), made, stream.aclose)

    async def _accept(
        self, sock: socket.socket, make: Callable[[], Awaitable[Wire]], drop: Callable[[], Awaitable[None]]
    ) -> None:
        """Authenticate a client.

        :param make: gives its wire, TLS included.
        :param drop: hangs up while there is none.
        """
        peer = self._peer_name(sock)
        if self._half_open >= self._limits.half_open:
            self._warn("authentication.refused", peer=peer, half_open=self._half_open)
            await drop()
            return
        self._half_open += 1
        wire: Wire | None = None
        try:
            with anyio.fail_after(self._limits.handshake_timeout):
                if not isinstance(self.address, str):
                    _notice_loss(sock, self._limits)
                wire = await make()
                agreed = await authenticate_client(wire, self._known(), peer, self._limits)
        except (ProtocolError, anyio.EndOfStream, anyio.BrokenResourceError, OSError) as exc:
            self._warn("authentication.failed", peer=peer, error=repr(exc))
            await (drop() if wire is None else wire.aclose())
            return
        except BaseException:
            with anyio.CancelScope(shield=True):
                await (drop() if wire is None else wire.aclose())
            raise
        finally:
            self._half_open -= 1
        connection = Connection(
            wire,
            runtime=self._runtime,
            peer=peer,
            handler=self._handler,
            limits=self._limits,
            allowed=agreed.allowed,
            reader=agreed.reader,
            on_closed=self._left,
        )
        self._connections[connection] = agreed.secret

    def _known(self) -> Iterator[Secret]:
        yield self._secret
        for guest in tuple(self._guests.values()):
            yield guest.secret

    def _left(self, connection: Connection) -> None:
        secret = self._connections.pop(connection, None)
        for guest in tuple(self._guests.values()):
            if guest.secret is secret and guest.on_left is not None:
                guest.on_left()

    def _warn(self, event: str, **details: object) -> None:
        """Log a stranger's failure; of many in a short time the first, so that strangers can't fill the disk."""
        now = anyio.current_time()
        if now < self._quiet_until:
            self._unlogged += 1
            return
        log.warning(event, **details, unlogged=self._unlogged)
        self._quiet_until, self._unlogged = now + _QUIET_SECONDS, 0

    def _peer_name(self, sock: socket.socket) -> str:
        if isinstance(self.address, str):
            return f"unix:{self.address}"
        try:
            return _tcp_name(*sock.getpeername()[:2])
        except OSError:
            return "a client that has gone"


class _Guest(NamedTuple):
    """A client with a token of its own, and whom to tell when it has left."""

    secret: Secret
    on_left: Callable[[], object] | None


async def socket_wire(sock: socket.socket) -> Wire:
    """The wire of a connected stream socket, which it owns from here on."""
    if _on_asyncio():
        return (await asyncio.get_running_loop().create_connection(AsyncioWire, sock=sock))[1]
    return StreamWire(await SocketStream.from_socket(sock))


async def _connect(
    dial: Callable[[], Awaitable[Wire]],
    peer: str,
    secret: Secret,
    handler: Handler | None,
    limits: Limits,
    *,
    tls: bool,
) -> Connection:
    runtime = Runtime.current()  # refused here, before there is a socket to close
    wire: Wire | None = None
    try:
        with anyio.fail_after(limits.handshake_timeout):
            wire = await dial()
            agreed = await authenticate_to_server(wire, secret, peer, limits)
    except BaseException as exc:
        if wire is not None:
            with anyio.CancelScope(shield=True):
                await wire.aclose()
        explained = _explain(exc, peer, limits, tls)
        if explained is None:
            raise
        raise explained from exc  # noqa: ASYNC104 - only errors are explained, a cancellation is not
    return Connection(
        wire,
        runtime=runtime,
        peer=peer,
        handler=handler,
        limits=limits,
        allowed=agreed.allowed,
        reader=agreed.reader,
    )


def _without(tls: bool) -> str:
    return "" if tls else ". If it has TLS, give this side a TLSConfig, too"


def _explain(exc: BaseException, peer: str, limits: Limits, tls: bool) -> ChannelLost | ProtocolError | None:
    match exc:
        case TimeoutError():
            return ChannelLost(
                f"{peer} did not answer within {limits.handshake_timeout} s (Limits.handshake_timeout){_without(tls)}"
            )
        case ssl.SSLCertVerificationError():
            return ProtocolError(
                f"{peer} has a certificate that is not to be trusted: {exc.verify_message}. It must be valid now, "
                "signed by TLSConfig(authority=...), and for the host connected to or TLSConfig(hostname=...)"
            )
        case ssl.SSLError():
            return ProtocolError(f"{peer} does not speak TLS as it should, or not at all: {exc.reason or exc}")
        case anyio.EndOfStream() | anyio.BrokenResourceError():
            return ChannelLost(
                f"{peer} hung up during authentication: it has another token, too many clients are "
                f"authenticating at once, or it ended; its log tells which{_without(tls)}"
            )
        case OSError():
            return ChannelLost(f"can't connect to {peer}: {exc}; is the server running there?")
        case _:
            return None


async def _refuse_taken_path(path: str) -> None:
    try:
        is_socket = stat.S_ISSOCK(os.stat(path).st_mode)
    except FileNotFoundError:
        return
    if not is_socket:
        raise PortInUse(f"{path} exists and is no socket; remove it, or pass another path")
    try:
        stream = await anyio.connect_unix(path)
    except OSError:  # nobody listens: left over from a process that was killed
        return
    await stream.aclose()
    raise PortInUse(f"another process listens on {path}; stop it, or pass another path")


async def _encrypted(
    stream: SocketStream, context: ssl.SSLContext | None, server_hostname: str | None = None
) -> AnyByteStream:
    """The stream under TLS, if there is a context; for asyncio's transports, asyncio does that.

    :param server_hostname: for a client, whose name the server's certificate must have.
    """
    if context is None:
        return stream
    try:
        return await TLSStream.wrap(
            stream,
            server_side=server_hostname is None,
            hostname=server_hostname,
            ssl_context=context,
            standard_compatible=False,  # a goodbye ends a connection, TLS need not
        )
    except anyio.BrokenResourceError as exc:
        await anyio.aclose_forcefully(stream)
        if isinstance(exc.__cause__, ssl.SSLError):
            raise exc.__cause__ from None
        raise
    except BaseException:
        with anyio.CancelScope(shield=True):
            await anyio.aclose_forcefully(stream)
        raise


def _notice_loss(raw: socket.socket, limits: Limits) -> None:
    """Let the kernel find out whether the other machine is there. It answers for a process that is busy."""
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    seconds = limits.silence
    for name, value in (
        ("TCP_KEEPIDLE", max(1, int(seconds / 3))),
        ("TCP_KEEPINTVL", max(1, int(seconds / 6))),
        ("TCP_KEEPCNT", 4),
        ("TCP_USER_TIMEOUT", int(seconds * 1000)),
    ):
        if hasattr(socket, name):  # not every system has all of them
            raw.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _tcp_name(host: object, port: object) -> str:
    return f"[{host}]:{port}" if ":" in str(host) else f"{host}:{port}"


def _on_asyncio() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
