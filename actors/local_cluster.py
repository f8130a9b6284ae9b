"""LocalCluster: actors on this machine, without Ray."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import anyio

from actors.bundles import Bundle, Group, Placement, Reservation
from actors.cluster import ActorInfo, ClusterResources, NodeResources
from actors.finish import finish
from actors.host import Host
from actors.host_process import HostProcess
from actors.roster import Body, Roster
from arun.channel import Connection, memory_pair
from arun.errors import MisuseError, PlacementError
from arun.logs import get_logger
from arun.runtime import Background, Runtime

if TYPE_CHECKING:
    import builtins
    from collections.abc import Iterator, Mapping
    from types import TracebackType
    from typing import Self, Unpack

    from actors.actor import ActorHandle
    from actors.engine import EngineSpec
    from actors.interface import ActorSpec
    from actors.pool import EnginePool, PoolOptions

__all__ = ("LocalCluster",)

log = get_logger("actors.local_cluster")

Isolation = Literal["process", "task"]

_SOCKET_PATH_BYTES = 100  # the kernel takes 107


class LocalCluster:
    """A cluster of this one machine.

    >>> async with LocalCluster() as cluster:
    ...     counter = await cluster.spawn(Counter, start=3)

    An actor's stdout goes to this process's stderr. Actors end with this process however that ends, SIGKILL included.

    :param isolation: "process": each actor in a process of its own, on a Unix socket. "task": in this process, its
        arguments and results still encoded; it shares the event loop, so a busy actor stalls everybody.
    :param cpus: CPUs to place by; by default those that this process may use.
    :param gpus: GPUs to place by.
    :param grace: seconds that ``on_stop`` gets before a process is killed.
    """

    def __init__(
        self, *, isolation: Isolation = "process", cpus: float | None = None, gpus: float = 0, grace: float = 5.0
    ) -> None:
        self._isolation = _checked(isolation)
        self._cpus = len(os.sched_getaffinity(0)) if cpus is None else cpus
        self._gpus = gpus
        self._grace = grace
        self._roster = Roster(grace=grace)
        self._reservations: list[Reservation] = []
        self._folder = _Folder()
        self._closing: Background[None] | None = None

    async def spawn(
        self,
        cls: type,
        /,
        *args: Any,
        name: str | None = None,
        concurrency: int | None = None,
        group: Group | None = None,
        env: Mapping[str, str] = {},
        isolation: Isolation | None = None,
        **kwargs: Any,
    ) -> ActorHandle:
        """Start an actor; see :meth:`actors.cluster.Cluster.spawn`.

        :param isolation: instead of the cluster's.
        """
        isolated = self._isolation if isolation is None else _checked(isolation)
        if isolated == "task" and env:
            raise MisuseError(f"env={dict(env)} needs isolation='process': a task shares this process's environment")

        def launch(spec: ActorSpec) -> Body:
            if isolated == "task":
                return _Task(spec)
            process = HostProcess(spec, path=self._folder.socket(), env=env, grace=self._grace)
            self._folder.owns(process)
            return process

        return await self._roster.spawn(
            cls, args, kwargs, name=name, concurrency=concurrency, group=group, launch=launch
        )

    async def stop(self, actor: ActorHandle) -> None:
        """End an actor; see :meth:`actors.cluster.Cluster.stop`."""
        await self._roster.stop(actor)

    async def get(self, name: str) -> ActorHandle:
        """The handle of a running actor of this cluster."""
        return self._roster.get(name)

    async def reserve(self, placement: Placement) -> Reservation:
        """Set the placement's CPUs and GPUs aside.

        They are only counted: an actor's process is held to nothing.

        :raises PlacementError: they are not free.
        """
        if self._roster.closed:
            raise MisuseError("this cluster is closed, so nothing can be reserved in it")
        refusal = placement.refusal(await self.resources())
        if refusal is not None:
            raise PlacementError(refusal)
        groups = [Group(replica, bundles) for replica, bundles in enumerate(placement.bundles())]
        reservation = Reservation(placement, groups, self._give_back)
        self._reservations.append(reservation)
        return reservation

    def engines(self, spec: EngineSpec, **options: Unpack[PoolOptions]) -> EnginePool:
        """A pool of engines on this machine; see :meth:`actors.cluster.Cluster.engines`."""
        from actors.pool import EnginePool

        return EnginePool(self, spec, **options)

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
            ),
        ))

    async def aclose(self) -> None:
        """Stop every actor, last started first; see :meth:`actors.cluster.Cluster.aclose`."""
        self._roster.closed = True
        if self._closing is None:
            self._closing = Runtime.current().start(self._close, name="close of LocalCluster")
        await finish(self._closing)

    def list(self) -> builtins.list[ActorInfo]:
        """Every actor that was not stopped, in order of start."""
        return self._roster.infos()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _close(self) -> None:
        await self._roster.stop_all()
        for reservation in reversed(tuple(self._reservations)):
            await reservation.release()
        self._folder.remove()

    async def _give_back(self, reservation: Reservation) -> None:
        await self._roster.stop_all(reservation.groups)
        self._reservations.remove(reservation)


class _Task:
    """An actor in this process, behind a pair of connections in memory."""

    address = "memory"

    def __init__(self, spec: ActorSpec) -> None:
        self._name = spec.name
        self._host = Host(lambda: spec)
        self._client, server = memory_pair(handler_b=self._host.handle)
        self._host.begin(server.aclose)

    @property
    def pid(self) -> int:
        return os.getpid()

    async def connect(self) -> Connection:
        return self._client

    async def wait_ended(self) -> str:
        with contextlib.suppress(Exception):  # stop() tells about it
            await self._host.wait_ended()
        return "ended"

    async def stop(self, grace: float) -> None:
        self._host.stop()
        with anyio.move_on_after(grace) as scope:
            try:
                await self._host.wait_ended()
            except Exception:
                log.exception("actor.stop_failed", actor=self._name)
        if scope.cancelled_caught:
            log.warning("actor.abandoned", actor=self._name, grace=grace)


class _Folder:
    """The folder of a cluster's sockets, made when first needed; lets go of the processes if nobody closed it."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._path: Path | None = None
        self._processes: weakref.WeakSet[HostProcess] = weakref.WeakSet()
        self._last_resort: weakref.finalize[..., _Folder] | None = None

    def socket(self) -> Path:
        """A path for one more socket."""
        if self._path is None:
            self._path = _make_folder()
            self._last_resort = weakref.finalize(self, _let_go, self._path, self._processes)
        return self._path / f"{next(self._numbers)}.sock"

    def owns(self, process: HostProcess) -> None:
        self._processes.add(process)

    def remove(self) -> None:
        if self._last_resort is not None:
            self._last_resort()


def _make_folder() -> Path:
    """A folder that only this user can enter, with a path that leaves room for a socket's."""
    path = Path(tempfile.mkdtemp(prefix="arun-"))
    if len(os.fsencode(path)) <= _SOCKET_PATH_BYTES - len("/99999.sock"):
        return path
    path.rmdir()
    return Path(tempfile.mkdtemp(prefix="arun-", dir="/tmp"))


def _let_go(folder: Path, processes: weakref.WeakSet[HostProcess]) -> None:
    for process in processes:
        process.release()
    shutil.rmtree(folder, ignore_errors=True)


def _bundles(reservation: Reservation) -> Iterator[Bundle]:
    for group in reservation.groups:
        yield from group.bundles


def _checked(isolation: str) -> Isolation:
    if isolation not in {"process", "task"}:
        raise MisuseError(f"isolation={isolation!r}: it must be 'process' or 'task'")
    return cast("Isolation", isolation)
