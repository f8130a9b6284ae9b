"""An actor in a process of Ray's: both of its ends.

Ray is the control plane: it starts, places and kills the process and carries class, arguments and token to it. Messages
go over a TCP channel to the address that the process listens on; or, where only Ray may listen, in Ray's own calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import signal
import threading
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import anyio

from actors.hosts.guards import continue_without_parent
from actors.hosts.health import Health, HealthThread
from actors.hosts.host import Host
from actors.members.body import End
from actors.on_ray import pickling
from actors.on_ray.ray_wire import RayDoor, connect_over_ray
from arun.channel import Connection, Server, connect_tcp, serve_tcp
from arun.errors import ChannelLost
from arun.logs import get_logger
from arun.runtime import Runtime
from arun.telemetry import configure_logging_as_parent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from actors.bundles import Group
    from actors.interface import ActorSpec
    from arun.channel import TLSConfig

__all__ = ("Doors", "RayBody", "RayHost", "Way", "Whereabouts", "how_it_died", "import_ray", "open_doors", "placed")

log = get_logger("actors.ray_host")

_KILL_TIMEOUT = 5.0
"""Seconds that a killed process may take to be gone."""


def import_ray() -> Any:
    """Ray, imported when first needed, and without its types, which are partly missing and partly wrong."""
    import ray

    return ray


class Way(NamedTuple):
    """How messages go to Ray's actors.

    :ivar transport: "tcp": to a socket of the actor's; "ray": in Ray's own calls.
    :ivar tls: of those sockets.
    """

    transport: Literal["tcp", "ray"] = "tcp"
    tls: TLSConfig | None = None


class Whereabouts(NamedTuple):
    """Where a Ray actor of ours listens: for messages, and for questions about its health."""

    host: str
    port: int
    health_port: int
    pid: int
    node: str


class Doors(NamedTuple):
    """What a Ray actor of ours listens with."""

    server: Server
    health: HealthThread
    where: Whereabouts


async def open_doors(host: Host, token: bytes, tls: TLSConfig | None) -> Doors:
    """Listen on the node's address, and begin the life of what is behind it.

    :param token: of the owner.
    :param tls: encrypts what goes through them.
    """
    ray = import_ray()
    _end_with_this_thread()
    address = ray.util.get_node_ip_address()
    health = HealthThread(lambda handler: serve_tcp(handler, token=token, host=address, tls=tls), Health(host.load))
    server = await serve_tcp(host.handle, token=token, host=address, tls=tls)
    host.begin(server.aclose)
    where = Whereabouts(
        address,
        int(server.address[1]),
        int(health.wait_listening().address[1]),
        os.getpid(),
        ray.get_runtime_context().get_node_id(),
    )
    return Doors(server, health, where)


class RayHost:
    """The class that Ray makes an actor of: a thin shell around :class:`~actors.hosts.host.Host`, as everywhere."""

    def __init__(self, blob: bytes) -> None:
        configure_logging_as_parent()
        continue_without_parent()  # which is the raylet; without it, Ray ends its workers
        self._blob = blob
        self._host: Host | None = None
        self._doors: dict[str, RayDoor] = {}

    async def listen(self, token: bytes, tls: TLSConfig | None) -> Whereabouts:
        """Listen on the node's address; the object is started over the channel."""
        self._host = Host(lambda: pickling.loads(self._blob))
        return (await open_doors(self._host, token, tls)).where

    async def listen_over_ray(self) -> Whereabouts:
        """As :meth:`listen`, but to :meth:`down` and :meth:`up` only."""
        _end_with_this_thread()
        self._host = host = Host(lambda: pickling.loads(self._blob))
        door = RayDoor(host.handle)
        self._doors = {"messages": door, "health": RayDoor(Health(host.load).answer)}
        host.begin(door.aclose)
        return Whereabouts("", 0, 0, os.getpid(), import_ray().get_runtime_context().get_node_id())

    async def down(self, door: str, wire: str) -> AsyncIterator[bytes]:
        """Frames to a client of that door, see :class:`~actors.on_ray.ray_wire.RayDoor`."""
        frames = self._doors[door].down(wire)
        try:
            async for data in frames:
                yield data
        finally:
            await frames.aclose()

    async def up(self, door: str, wire: str, data: bytes) -> None:
        """Frames from that client."""
        await self._doors[door].up(wire, data)

    async def wait_dead(self) -> None:
        """Never returns: the call fails when the process is gone."""
        await asyncio.Event().wait()

    async def stop(self) -> None:
        """End the object, ``on_stop`` included."""
        if self._host is not None:
            self._host.stop()
            await self._host.wait_ended()


class RayBody:
    """The owner's view of one :class:`RayHost`.

    :param env: environment variables of its process.
    :param group: placement group whose first bundle takes it; by default anywhere, without claim to a CPU.
    :param way: how its messages go.
    """

    def __init__(self, spec: ActorSpec, *, group: Group | None, env: Mapping[str, str], way: Way) -> None:
        ray = import_ray()
        # A restarted process would begin without its state, and a retried call might run twice.
        options: dict[str, Any] = {"max_restarts": 0, "max_task_retries": 0, "num_cpus": 0}
        groups: dict[str, Any] = {}
        if way.transport == "ray":
            # A group has a thread and an event loop of its own, so that a busy actor tells its health.
            groups["concurrency_groups"] = {"health": 1000}
        if env:
            options["runtime_env"] = {"env_vars": dict(env)}
        if group is not None:
            options |= placed(group)
        self._name = spec.name
        self._way = way
        host = ray.remote(**groups)(RayHost) if groups else ray.remote(RayHost)
        self._actor: Any = host.options(**options).remote(pickling.dumps(spec))
        self._where: Whereabouts | None = None
        self._token = secrets.token_bytes(32)
        self._pidfd: int | None = None
        self._end = Runtime.current().start(self._watch_end, name=f"Ray actor {spec.name}")

    @property
    def pid(self) -> int | None:
        return None if self._where is None else self._where.pid

    @property
    def address(self) -> str:
        if self._where is None:
            return ""
        return f"{self._where.host}:{self._where.port}" if self._where.port else f"ray:{self._actor._actor_id.hex()}"

    async def connect(self) -> Connection:
        ray = import_ray()
        try:
            if self._way.transport == "ray":
                where: Whereabouts = await self._actor.listen_over_ray.remote()
            else:
                where = await self._actor.listen.remote(self._token, self._way.tls)
        except ray.exceptions.RayActorError as exc:
            raise ChannelLost(f"Ray could not start the actor {self._name!r}: {exc}") from exc
        self._where = where
        if where.node == ray.get_runtime_context().get_node_id():
            with contextlib.suppress(ProcessLookupError):
                self._pidfd = os.pidfd_open(where.pid)
        return await self.reconnect()

    async def reconnect(self) -> Connection:
        assert self._where is not None  # connected
        if self._way.transport == "ray":
            return await self._connect_over_ray("messages")
        return await connect_tcp(self._where.host, self._where.port, token=self._token, tls=self._way.tls)

    async def connect_health(self) -> Connection:
        assert self._where is not None  # connected
        if self._way.transport == "ray":
            return await self._connect_over_ray("health", concurrency_group="health")
        return await connect_tcp(self._where.host, self._where.health_port, token=self._token, tls=self._way.tls)

    async def wait_ended(self) -> End:
        return await self._end.wait()

    def kill(self) -> None:
        # Ray asks the process to end, which one that is stopped can't do; the kernel needs no answer.
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        import_ray().kill(self._actor, no_restart=True)

    async def stop(self, grace: float) -> None:
        ray = import_ray()
        if self._where is not None and not self._end.done:
            with anyio.move_on_after(grace) as scope:
                try:
                    await self._actor.stop.remote()
                except ray.exceptions.RayActorError:
                    pass  # it is dead already
                except Exception:
                    log.exception("actor.stop_failed", actor=self._name)
            if scope.cancelled_caught:
                self.kill()
        ray.kill(self._actor, no_restart=True)
        with anyio.move_on_after(_KILL_TIMEOUT) as scope:
            await self._end.wait()
            if self._pidfd is not None:
                await anyio.wait_readable(self._pidfd)
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None
        if scope.cancelled_caught:
            log.warning("actor.outlives_kill", actor=self._name, pid=self.pid, seconds=_KILL_TIMEOUT)

    async def _connect_over_ray(self, door: str, **options: Any) -> Connection:
        actor = self._actor
        return await connect_over_ray(
            lambda wire: actor.down.options(num_returns="streaming", **options).remote(door, wire),
            lambda wire, data: actor.up.options(**options).remote(door, wire, data),
            peer=self.address,
        )

    async def _watch_end(self) -> End:
        ray = import_ray()
        try:
            await self._actor.wait_dead.remote()
        except ray.exceptions.RayError as exc:
            # Also when Ray only can't reach it any more: then this makes true what callers are told.
            ray.kill(self._actor, no_restart=True)
            return End(how_it_died(str(exc)), abnormal="INTENDED_USER_EXIT" not in str(exc))
        return End("ended", abnormal=False)


def _end_with_this_thread() -> None:
    """End the process when the present thread ends.

    A message that raises SystemExit ends the event loop that it runs on. In Ray that is one thread of several, and
    without it the process would live on and answer nobody.
    """
    event_loop_thread = threading.current_thread()

    def wait() -> None:
        event_loop_thread.join()
        os._exit(1)

    threading.Thread(target=wait, name="actors.end", daemon=True).start()


def placed(group: Group) -> dict[str, Any]:
    """Ray's options that put an actor into a group's first bundle and whatever it starts into the others."""
    first = group.bundles[0]
    options: dict[str, Any] = {
        "scheduling_strategy": import_ray().util.scheduling_strategies.PlacementGroupSchedulingStrategy(
            placement_group=group.native,
            placement_group_bundle_index=0,
            placement_group_capture_child_tasks=True,
        ),
        "num_cpus": first.get("CPU", 0),
    }
    if len(group.bundles) == 1:  # with more, each worker takes the GPU of its own bundle
        options["num_gpus"] = first.get("GPU", 0)
    return options


def how_it_died(told: str) -> str:
    """What Ray tells about a death, continuing "the actor", without its advice."""
    detail = re.search(
        r"Worker exit type: (\w+) Worker exit detail: (.*?\.)(?= Some common causes|\s*$)", told, re.DOTALL
    )
    if detail is not None:
        return f"died: {detail[2]} (Ray's exit type: {detail[1]})"
    return f"died. Ray says: {told}"
