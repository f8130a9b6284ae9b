"""TLS: real certificates, real sockets, both event loops; and every way in which the two sides may not fit."""

from __future__ import annotations

import datetime
import socket
import ssl
from typing import TYPE_CHECKING, NamedTuple

import anyio
import pytest
import trustme
from structlog.testing import capture_logs

from actors.on_ray import pickling
from arun.channel import Limits, TLSConfig, connect_tcp, serve_tcp
from arun.errors import ChannelLost, MisuseError, ProtocolError

from .attack.peers import open_files
from .conftest import TOKEN

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.anyio

SHORT = Limits(handshake_timeout=0.3)


class Certificates(NamedTuple):
    server: TLSConfig
    client: TLSConfig
    authority: trustme.CA
    folder: Path

    def issue(self, name: str, *hosts: str, **options: object) -> TLSConfig:
        """Another server's, of the same authority."""
        issued = self.authority.issue_cert(*hosts, **options)
        paths = [str(self.folder / f"{name}.{kind}") for kind in ("pem", "key")]
        issued.private_key_pem.write_to_path(paths[1])
        with open(paths[0], "wb") as file:
            file.writelines(part.bytes() for part in issued.cert_chain_pems)
        return TLSConfig(certificate=paths[0], key=paths[1])


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("certificates")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "authority.pem"))
    made = Certificates(TLSConfig(), TLSConfig(authority=str(folder / "authority.pem")), authority, folder)
    return made._replace(server=made.issue("server", "127.0.0.1", "localhost"))


@pytest.fixture(params=["asyncio", "uvloop", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> object:
    """uvloop, too, which has a TLS of its own; Ray's actors run on it."""
    if request.param == "uvloop":
        pytest.importorskip("uvloop").new_event_loop().close()  # its first one opens files for all of them
        return "asyncio", {"use_uvloop": True}
    return request.param


@pytest.fixture(autouse=True)
def no_file_is_left_open(anyio_backend: object) -> Iterator[None]:
    before = open_files()
    yield
    assert open_files() <= before


async def echo(method, payload):
    yield payload
    yield payload


async def test_streams_go_over_tls(runtime, certificates):
    server = await serve_tcp(echo, token=TOKEN, tls=certificates.server)
    connection = await connect_tcp(*server.address, token=TOKEN, tls=certificates.client)
    assert [n async for n in connection.open("echo", 1)] == [1, 1]
    large = b"x" * 3_000_000
    assert [item async for item in connection.open("echo", large)] == [large, large]
    await connection.aclose()
    await server.aclose()


async def test_a_goodbye_crosses_tls_in_both_directions(runtime, certificates):
    server = await serve_tcp(echo, token=TOKEN, tls=certificates.server)
    for ends_first in ("client", "server"):
        connection = await connect_tcp(*server.address, token=TOKEN, tls=certificates.client)
        stream = connection.open("echo", 1)
        assert await anext(stream) == 1
        await (connection if ends_first == "client" else server).aclose()
        await connection.wait_closed()
        with pytest.raises(ChannelLost, match="this side closed" if ends_first == "client" else "said goodbye: this"):
            connection.open("echo")
        assert server.connections == 0


async def test_nothing_is_readable_on_the_way(runtime, certificates):
    seen = bytearray()
    server = await serve_tcp(echo, token=TOKEN, tls=certificates.server)

    async def between(client):
        async with client, await anyio.connect_tcp(*server.address) as behind, anyio.create_task_group() as tasks:

            async def copy(source, target):
                try:
                    while True:
                        data = await source.receive()
                        seen.extend(data)
                        await target.send(data)
                except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
                    tasks.cancel_scope.cancel()

            tasks.start_soon(copy, client, behind)
            await copy(behind, client)

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, between)
        port = listener.extra(anyio.abc.SocketAttribute.local_port)
        connection = await connect_tcp("127.0.0.1", port, token=TOKEN, tls=certificates.client)
        assert await anext(connection.open("the method", "the payload")) == "the payload"
        await connection.aclose()
        tasks.cancel_scope.cancel()
    assert len(seen) > 500
    assert b"the payload" not in seen
    assert b"the method" not in seen
    await server.aclose()


async def test_the_name_to_verify_can_be_given(runtime, certificates):
    server = await serve_tcp(echo, token=TOKEN, tls=certificates.issue("named", "engines.example"))
    named = TLSConfig(authority=certificates.client.authority, hostname="engines.example")
    connection = await connect_tcp(*server.address, token=TOKEN, tls=named)
    assert await anext(connection.open("echo", 1)) == 1
    await connection.aclose()
    await server.aclose()


def test_a_config_can_be_sent_to_another_process(certificates):
    assert pickling.loads(pickling.dumps(certificates.server)) == certificates.server


# What does not fit.


async def test_another_authority_is_refused_naming_the_peer(runtime, certificates, tmp_path):
    trustme.CA().cert_pem.write_to_path(str(tmp_path / "other.pem"))
    await _refused(certificates.server, TLSConfig(authority=str(tmp_path / "other.pem")), "TLSConfig.authority=")


async def test_the_authorities_of_the_system_are_the_default(runtime, certificates):
    await _refused(certificates.server, TLSConfig(), "unable to get local issuer certificate")


async def test_an_expired_certificate_is_refused_naming_the_peer(runtime, certificates):
    expired = certificates.issue(
        "expired", "127.0.0.1", not_after=datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    )
    await _refused(expired, certificates.client, "certificate has expired")


async def test_a_certificate_for_another_host_is_refused_naming_the_peer(runtime, certificates):
    other = certificates.issue("other", "other.example")
    await _refused(other, certificates.client, "IP address mismatch|is not valid for '127.0.0.1'")


async def _refused(server_tls: TLSConfig, client_tls: TLSConfig, said: str) -> None:
    server = await serve_tcp(echo, token=TOKEN, tls=server_tls)
    with capture_logs() as logs:
        with pytest.raises(ProtocolError, match=f"127.0.0.1:{server.address[1]} has a certificate .*({said})"):
            await connect_tcp(*server.address, token=TOKEN, tls=client_tls)
        while "authentication.failed" not in [entry["event"] for entry in logs]:
            await anyio.lowlevel.checkpoint()
    assert server.connections == 0
    await server.aclose()


async def test_a_client_without_tls_is_told_what_may_be_missing_within_the_limit(runtime, certificates):
    server = await serve_tcp(echo, token=TOKEN, tls=certificates.server, limits=SHORT)
    with pytest.raises(ChannelLost, match=f"127.0.0.1:{server.address[1]} .*give this side a TLSConfig, too"):
        await connect_tcp(*server.address, token=TOKEN, limits=SHORT)
    await server.aclose()


async def test_a_server_without_tls_is_named_to_a_client_with_it(runtime, certificates):
    server = await serve_tcp(echo, token=TOKEN)
    with pytest.raises(ProtocolError, match=f"127.0.0.1:{server.address[1]} does not speak TLS"):
        await connect_tcp(*server.address, token=TOKEN, tls=certificates.client)
    await server.aclose()


@pytest.mark.parametrize("said", [b"", b"\x16\x03\x01", b"GET / HTTP/1.1\r\n\r\n", bytes(5000)])
async def test_a_stranger_is_dropped_within_the_limit_and_counts_as_half_open(runtime, certificates, said):
    server = await serve_tcp(echo, token=TOKEN, tls=certificates.server, limits=SHORT)
    async with await anyio.connect_tcp(*server.address) as stranger:
        if said:
            await stranger.send(said)
        with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):  # noqa: PT012 - what comes before is TLS's
            while True:
                assert b"arun" not in await stranger.receive()
    while server._half_open:
        await anyio.lowlevel.checkpoint()
    connection = await connect_tcp(*server.address, token=TOKEN, tls=certificates.client)
    assert await anext(connection.open("echo", 1)) == 1
    await connection.aclose()
    await server.aclose()


async def test_a_silent_server_is_given_up_within_the_limit(runtime, certificates):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ChannelLost, match=f"127.0.0.1:{port} did not answer within 0.3 s"):
            await connect_tcp("127.0.0.1", port, token=TOKEN, tls=certificates.client, limits=SHORT)


async def test_the_token_counts_under_tls_too(runtime, certificates):
    server = await serve_tcp(echo, token=TOKEN, tls=certificates.server)
    with pytest.raises(ChannelLost, match="another token"):
        await connect_tcp(*server.address, token=b"a guess", tls=certificates.client)
    await server.aclose()


async def test_a_server_that_closes_drops_who_is_still_shaking_hands(runtime, certificates):
    server = await serve_tcp(echo, token=TOKEN, tls=certificates.server)
    async with await anyio.connect_tcp(*server.address) as stranger:
        while not server._half_open:
            await anyio.lowlevel.checkpoint()
        await server.aclose()
        with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
            await stranger.receive()


@pytest.mark.parametrize("wrong", ["nothing", "no key", "missing", "swapped", "encrypted"])
async def test_a_server_s_files_are_looked_at_when_it_starts(runtime, certificates, tmp_path, wrong):
    server = certificates.server
    configs = {
        "nothing": TLSConfig(),
        "no key": TLSConfig(certificate=server.certificate),
        "missing": TLSConfig(certificate="/nowhere.pem", key=server.key),
        "swapped": TLSConfig(certificate=server.key, key=server.certificate),
        "encrypted": TLSConfig(certificate=server.certificate, key=str(tmp_path / "encrypted.key")),
    }
    (tmp_path / "encrypted.key").write_bytes(_encrypted(server.key))
    with pytest.raises(MisuseError, match=r"TLSConfig.*key"):
        await serve_tcp(echo, token=TOKEN, tls=configs[wrong])


async def test_a_client_s_files_are_looked_at_before_it_connects(runtime):
    with pytest.raises(MisuseError, match="holds no certificates to trust"):
        await connect_tcp("127.0.0.1", 1, token=TOKEN, tls=TLSConfig(authority="/nowhere.pem"))


async def test_old_versions_of_tls_are_refused(runtime, certificates):
    server = await serve_tcp(echo, token=TOKEN, tls=certificates.server)
    assert certificates.server.server_context().minimum_version >= ssl.TLSVersion.TLSv1_2
    assert certificates.client.client_context().minimum_version >= ssl.TLSVersion.TLSv1_2
    await server.aclose()


def _encrypted(path: str) -> bytes:
    from cryptography.hazmat.primitives import serialization

    with open(path, "rb") as file:
        key = serialization.load_pem_private_key(file.read(), None)
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
