"""What others on the machine can see of a cluster: its listening sockets, and no secret."""

from __future__ import annotations

import base64
import os
import secrets
import signal
import sys
import traceback
from pathlib import Path

import pytest
import structlog

from actors.local_cluster import LocalCluster
from arun.channel import connect_unix, handshake
from arun.errors import ActorDied, ChannelLost
from tests.actors.programs import children
from tests.actors.samples import Counter


def listening(pids: list[int]) -> set[tuple[str, int]]:
    """TCP addresses, IPv4 as in /proc/net/tcp, on which these processes listen."""
    inodes = {}
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                host, port = fields[1].split(":")
                inodes[fields[9]] = (host, int(port, 16))
    found = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(entry)
            except FileNotFoundError:
                continue
            if target.startswith("socket:[") and target[8:-1] in inodes:
                found.add(inodes[target[8:-1]])
    return found


def family(pid: int) -> list[int]:
    """A process and all that it has started."""
    return [pid, *(other for child in children(pid) for other in family(child))]


@pytest.mark.asyncio
async def test_a_local_cluster_listens_on_no_network():
    before = listening([os.getpid()])
    async with LocalCluster() as cluster:
        counter = await cluster.spawn(Counter)
        assert await counter.incr() == 1
        assert len(family(os.getpid())) > 1
        assert listening(family(os.getpid())) == before


@pytest.mark.asyncio
@pytest.mark.ray
async def test_a_ray_actor_listens_on_the_declared_addresses_only():
    import ray

    from actors.ray_cluster import RayCluster

    class Plain:
        def pid(self) -> int:
            return os.getpid()

    async with RayCluster.connect(num_cpus=2) as cluster:
        of_ray, driver = ray.remote(Plain).remote(), listening([os.getpid()])
        rays_own = listening([await of_ray.pid.remote()])
        counter = await cluster.spawn(Counter)
        assert await counter.incr() == 1
        [info] = cluster.list()
        host, port = info.address.split(":")
        address = "".join(f"{int(part):02X}" for part in reversed(host.split("."))), int(port)
        assert host != "0.0.0.0"
        assert info.pid is not None
        mine = listening([info.pid])
        assert address in mine
        ours = {(host, port) for host, port in mine if host == address[0]}
        assert len(ours) == 2, "for messages and for its health, on the node's address"
        assert len(mine - ours) == len(rays_own)
        assert listening([os.getpid()]) == driver


@pytest.fixture
def tokens(monkeypatch):
    """Every secret that this process makes."""
    made = []
    real = secrets.token_bytes

    def recording(count=None):
        value = real(count)
        if sys._getframe(1).f_globals["__name__"] != handshake.__name__:  # nonces are public
            made.append(value)
        return value

    monkeypatch.setattr(secrets, "token_bytes", recording)
    return made


def shown_by(pid: int) -> list[bytes]:
    return [Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ")]


def forms(token: bytes) -> list[bytes]:
    return [token, token.hex().encode(), base64.b64encode(token).rstrip(b"="), repr(token)[2:-1].encode()]


def found(tokens: list[bytes], *places: str | bytes) -> list[int]:
    """Which places show a token."""
    seen = [place.encode(errors="surrogateescape") if isinstance(place, str) else place for place in places]
    return [n for n, place in enumerate(seen) for token in tokens if any(form in place for form in forms(token))]


def files_that_show(tokens: list[bytes], folder: Path) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if found(tokens, path.read_bytes())]


def test_tokens_are_found_where_they_are():
    assert found([b"\x00secret"], "nothing", repr(b"\x00secret"), b"..\x00secret", "0073 00736563726574") == [1, 2, 3]


@pytest.mark.asyncio
async def test_no_token_is_in_argv_environment_logs_repr_or_tracebacks(tokens, capfd):
    logs: list[str] = []
    structlog.configure(
        processors=[structlog.dev.ConsoleRenderer(colors=False)],
        logger_factory=lambda *_: structlog.PrintLogger(_Lines(logs)),
    )
    try:
        async with LocalCluster() as cluster:
            counter = await cluster.spawn(Counter, name="victim")
            [info] = cluster.list()
            assert info.pid is not None
            assert tokens
            for pid in family(os.getpid()):
                assert found(tokens, *shown_by(pid)) == []
            path = info.address.removeprefix("unix:")
            errors: list[BaseException] = []
            try:
                await connect_unix(path, token=secrets.token_bytes(32))
            except ChannelLost as exc:
                errors.append(exc)
            try:
                await connect_unix(path + "-gone", token=secrets.token_bytes(32))
            except ChannelLost as exc:
                errors.append(exc)
            os.kill(info.pid, signal.SIGKILL)
            try:
                await counter.incr()
            except ActorDied as exc:
                errors.append(exc)
            assert len(errors) == 3
            for error in errors:
                assert [line for text in tracebacks(error) for line in text.splitlines() if found(tokens, line)] == []
            assert found(tokens, repr(cluster), repr(counter), repr(cluster.list())) == []
            structlog.get_logger().error("told", exc_info=errors[0])
    finally:
        structlog.reset_defaults()
    out, err = capfd.readouterr()
    assert "told" in "".join(logs)
    assert found(tokens, out, err, *logs) == []


@pytest.mark.asyncio
@pytest.mark.ray
async def test_no_token_of_a_ray_actor_is_in_its_argv_environment_or_ray_s_logs(tokens):
    import ray

    from actors.ray_cluster import RayCluster

    async with RayCluster.connect(num_cpus=2) as cluster:
        counter = await cluster.spawn(Counter)
        assert await counter.incr() == 1
        [info] = cluster.list()
        assert info.pid is not None
        assert tokens
        for pid in (os.getpid(), info.pid):
            assert found(tokens, *shown_by(pid)) == []
        logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    assert files_that_show(tokens, logs) == []


class _Lines:
    def __init__(self, lines: list[str]) -> None:
        self.write = lines.append

    def flush(self) -> None:
        pass


def tracebacks(error: BaseException) -> list[str]:
    """As logs and error pages show them, with the values of local variables."""
    assert error.__traceback__ is not None
    error.with_traceback(error.__traceback__.tb_next)  # without the test's own frame, which knows the tokens
    with_locals = traceback.TracebackException.from_exception(error, capture_locals=True)
    return ["".join(with_locals.format()), "".join(traceback.format_exception(error))]
