"""LocalCluster: actors on this machine, without Ray."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, NoReturn, cast

import anyio

from actors.bundles import Bundle, Group, Placement, Reservation
from actors.cluster import Cluster, ClusterResources, DetachedOrder, Isolation, NodeResources
from actors.hosts.devices import Devices
from actors.hosts.health import Vitals
from actors.hosts.host import Host
from actors.hosts.host_process import HostProcess
from actors.members.body import Body, End
from arun.channel import Connection, memory_pair
from arun.errors import MisuseError, PlacementError
from arun.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

    from actors.interface import ActorSpec

__all__ = ("LocalCluster",)

log = get_logger("actors.local_cluster")


class LocalCluster(Cluster):
    """A cluster of this one machine.

    >>> async with LocalCluster() as cluster:
    ...     counter = await cluster.spawn(Counter, start=3)

    An actor's stdout goes to this process's stderr. Actors end with this process however that ends, SIGKILL included.

    :param isolation: "process": each actor in a process of its own, on a Unix socket. "task": in this process, its
        arguments and results still encoded; it shares the event loop, so a busy actor stalls everybody.
    :param cpus: CPUs to place by; by default those that this process may use.
    :param gpus: GPUs to place by.
    :param labels: of this machine, to place by.
    :param grace: seconds that ``on_stop`` gets before a process is killed.
    :param silence: seconds after which an actor's process that does not even answer for its health is killed.
    """

    has_tasks = True

    def __init__(
        self,
        *,
        isolation: Isolation = "process",
        cpus: float | None = None,
        gpus: float = 0,
        labels: Mapping[str, str] = {},
        grace: float = 5.0,
        silence: float = 30.0,
    ) -> None:
        super().__init__(grace=grace, silence=silence)
        self._isolation = _checked(isolation)
        self._cpus = len(os.sched_getaffinity(0)) if cpus is None else cpus
        self._gpus = gpus
        self._labels = dict(labels)
        self._given_back = anyio.Event()
        self._devices = Devices(gpus)

    async def reserve(self, placement: Placement, *, wait: float | None = None) -> Reservation:
        """Set the placement's CPUs and GPUs aside.

        CPUs are only counted. An actor in a group with GPUs sees these and no others (CUDA_VISIBLE_DEVICES).

        :param wait: seconds to wait for what other reservations hold.
        :raises PlacementError: they are not free, or can never be.
        """
        if wait and placement.refusal(await self.resources(), idle=True) is None:
            with anyio.move_on_after(wait):
                while placement.refusal(await self.resources()) is not None:
                    await self._given_back.wait()
        if self._roster.closed:
            raise MisuseError("this cluster is closed, so nothing can be reserved in it")
        refusal = placement.refusal(await self.resources())
        if refusal is not None:
            raise PlacementError(refusal)
        devices = self._devices.take(placement)
        groups = [Group(replica, bundles, devices[replica]) for replica, bundles in enumerate(placement.bundles())]
        for group in groups:
            group.nodes = ("local",) * len(group.bundles)
        reservation = Reservation(placement, groups, self._give_back)
        self._reservations.append(reservation)
        return reservation

    async def resources(self) -> ClusterResources:
        """This machine as one node."""
        taken = [bundle for reservation in self._reservations for bundle in _bundles(reservation)]
        return ClusterResources((
            NodeResources(
                name="local",
                cpus=self._cpus,
                cpus_free=self._cpus - sum(bundle.get("CPU", 0) for bundle in taken),
                gpus=self._gpus,
                gpus_free=self._gpus - sum(bundle.get("GPU", 0) for bundle in taken),
                labels=self._labels,
            ),
        ))

    def check_detachable(self) -> NoReturn:
        raise MisuseError(
            "nothing can be detached from a LocalCluster: its actors are processes of this program, and end with it. "
            "Start a Ray that runs by itself (`ray start --head`) and use RayCluster.connect('auto')"
        )

    async def _look_for(self, name: str) -> None:
        """There are no others than those in the roster."""

    async def _spawn_detached(self, order: DetachedOrder) -> NoReturn:
        self.check_detachable()

    def _launcher(
        self, *, group: Group | None, env: Mapping[str, str], isolation: Isolation | None
    ) -> Callable[[ActorSpec], Body]:
        isolated = self._isolation if isolation is None else _checked(isolation)
        if isolated == "process":
            seen = Devices.environment(group)
            return lambda spec: HostProcess(spec, env=seen | dict(env), grace=self._grace)
        if env:
            raise MisuseError(f"env={dict(env)} needs isolation='process': a task shares this process's environment")
        return _Task

    async def _give_back(self, reservation: Reservation) -> None:
        await self._roster.stop_all(reservation.groups)
        self._reservations.remove(reservation)
        self._devices.give_back(reservation)
        self._given_back.set()
        self._given_back = anyio.Event()


class _Task:
    """An actor in this process, behind a pair of connections in memory."""

    address = "memory"

    def __init__(self, spec: ActorSpec) -> None:
        self._name = spec.name
        self._host = Host(lambda: spec)
        self._servers: list[Connection] = []
        self._host.begin(self._hang_up)

    @property
    def pid(self) -> int:
        return os.getpid()

    async def connect(self) -> Connection:
        client, server = memory_pair(handler_b=self._host.handle)
        self._servers.append(server)
        return client

    async def reconnect(self) -> Connection:
        return await self.connect()

    async def connect_health(self) -> Connection:
        # No thread: this is the event loop of whoever asks, so it turns.
        client, _ = memory_pair(handler_b=self._tell_health)
        return client

    async def _hang_up(self) -> None:
        for server in self._servers:
            await server.aclose()

    async def _tell_health(self, method: str, payload: object) -> AsyncIterator[Vitals]:
        running, waiting, mailbox = self._host.load()
        yield Vitals(blocked_for=0.0, where="", running=running, waiting=waiting, mailbox=mailbox)

    async def wait_ended(self) -> End:
        with contextlib.suppress(Exception):  # stop() tells about it
            await self._host.wait_ended()
        return End("ended", abnormal=False)

    def kill(self) -> None:
        self._host.stop()

    async def stop(self, grace: float) -> None:
        self._host.stop()
        with anyio.move_on_after(grace) as scope:
            try:
                await self._host.wait_ended()
            except Exception:
                log.exception("actor.stop_failed", actor=self._name)
        if scope.cancelled_caught:
            log.warning("actor.abandoned", actor=self._name, grace=grace)


def _bundles(reservation: Reservation) -> Iterator[Bundle]:
    for group in reservation.groups:
        yield from group.bundles


def _checked(isolation: str) -> Isolation:
    if isolation not in {"process", "task"}:
        raise MisuseError(f"isolation={isolation!r}: it must be 'process' or 'task'")
    return cast("Isolation", isolation)
