"""Splits whose consumers may be anywhere: the run that they share is an actor's, and each pulls its blocks from there.

::

    coordinator (an actor):  run -> deal --+--  pull()  -- consumer 0, here
                                           +--  pull()  -- consumer 1, in a worker of Ray

A consumer that dies is noticed by its connection: it has a stream open for as long as it iterates. Where the Ray runs
by itself the coordinator is detached, so that a worker finds it by name; it ends when nobody has referred to it for a
while.
"""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio
import pyarrow as pa

from actors.actor import actor
from actors.on_ray import detached
from actors.ray_cluster import RayCluster
from arun.data import Dataset, RunOptions, from_iterable
from arun.data.split import Splits
from arun.errors import MisuseError
from arun.hosting import close
from arun.runtime import Background, Runtime
from arun.threads import run_in_thread

if TYPE_CHECKING:
    from actors.cluster import Cluster

__all__ = ("SplitCoordinator", "split")

#: Most bytes of rows sent in one message; larger blocks are cut.
_MESSAGE: Final = 16 * 2**20


async def split(
    dataset: Dataset,
    consumers: int,
    *,
    cluster: Cluster,
    name: str | None = None,
    equal: bool = False,
    by: str | Sequence[str] = (),
    options: RunOptions | None = None,
    linger: float = 60.0,
) -> tuple[Dataset, ...]:
    """Datasets that share one run, for consumers that may be in other processes; see :meth:`arun.data.Dataset.split`.

    The run is that of an actor. On a Ray that runs by itself the datasets can be pickled, and so be given to tasks and
    actors of Ray: there they find it by its name. Else they can be read in this process only.

    :param name: of the actor; by default one of its own.
    :param linger: seconds that a detached actor goes on when nobody refers to it: a worker may still have to start.
    :raises MisuseError: the plan can't be sent to another process; an option means nothing.
    """
    settings = options or RunOptions()
    Splits(dataset.astream, consumers, equal=equal, by=by, memory=1)  # refuses here, not there
    name = name or f"split-{uuid.uuid4().hex[:12]}"
    lifetime = _lifetime(cluster)
    coordinator = await cluster.spawn(
        SplitCoordinator,
        dataset,
        consumers,
        equal,
        by,
        settings,
        name if lifetime == "detached" else None,
        linger,
        name=name,
        lifetime=lifetime,
        # A turn for each consumer's presence and pull, and for those of iterations that are about to end.
        concurrency=4 * consumers + 4,
    )
    owner = _Owner(coordinator, name, None if lifetime == "detached" else cluster)
    return tuple(from_iterable(RemotePart(owner, name, consumer, consumers)) for consumer in range(consumers))


def _lifetime(cluster: Cluster) -> Any:
    try:
        cluster.check_detachable()
    except MisuseError:
        return "scope"
    return "detached"


@actor()
class SplitCoordinator:
    """Runs a dataset for the consumers of its splits.

    :param own_name: of this actor, if it is detached and has to end by itself.
    """

    def __init__(
        self,
        dataset: Dataset,
        consumers: int,
        equal: bool,
        by: str | Sequence[str],
        options: RunOptions,
        own_name: str | None,
        linger: float,
    ) -> None:
        self._splits = Splits(
            lambda: dataset.astream(options),
            consumers,
            equal=equal,
            by=by,
            memory=options.memory_limit,
            folder=options.folder,
            most=_MESSAGE,
        )
        self._own_name = own_name
        self._linger = linger
        self._present = 0
        self._leaving: Background[None] | None = None

    async def own(self) -> AsyncIterator[None]:
        """Keep the coordinator for as long as this is open."""
        self._arrived()
        try:
            yield
            await anyio.sleep_forever()
        finally:
            self._left()

    async def iterate(self, consumer: int) -> AsyncIterator[int]:
        """Begin an iteration: gives the number of its run, and is open for as long as the consumer iterates."""
        number = self._splits.begin(consumer)
        self._arrived()
        try:
            yield number
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await self._splits.leave(number, consumer)
            self._left()

    async def pull(self, number: int, consumer: int) -> bytes | None:
        """The next block of a consumer, as an Arrow stream; None at the end."""
        block = await self._splits.pull(number, consumer)
        return None if block is None else await run_in_thread(lambda: _encoded(block))

    async def on_stop(self) -> None:
        """End the runs."""
        await self._splits.aclose()

    def _arrived(self) -> None:
        self._present += 1
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None

    def _left(self) -> None:
        self._present -= 1
        if not self._present and self._own_name is not None:
            self._leaving = Runtime.current().start(self._end, self._own_name, name="end of a split's coordinator")

    async def _end(self, name: str) -> None:
        await anyio.sleep(self._linger)
        self._leaving = None  # it is not called back any more
        await detached.end(await run_in_thread(lambda: detached.find(name)), name, grace=5.0)


class _Owner:
    """What the splits of this process share: the coordinator lives for as long as one of them does."""

    def __init__(self, coordinator: SplitCoordinator, name: str, cluster: Cluster | None) -> None:
        self.coordinator = coordinator
        self.name = name
        self.cluster = cluster
        self._presence = coordinator.own()


class RemotePart:
    """The blocks of one consumer, pulled from a coordinator: called for an iteration of them.

    :param owner: None in a process that it was sent to, which finds the coordinator by its name.
    """

    on_demand = True

    def __init__(self, owner: _Owner | None, name: str, consumer: int, consumers: int) -> None:
        self.__name__ = f"split {consumer + 1} of {consumers}"
        self._owner = owner
        self._where = (name, consumer, consumers)

    async def __call__(self) -> AsyncGenerator[pa.RecordBatch, None]:
        name, consumer, _ = self._where
        attached: RayCluster | None = None
        iteration: Any = None
        try:
            if self._owner is None:
                attached = RayCluster.connect("auto" if not _in_ray() else None)
                await attached.start()
                coordinator = await attached.get(name, SplitCoordinator)
            else:
                coordinator = self._owner.coordinator
            iteration = coordinator.iterate(consumer)
            number = await anext(iteration)
            while (encoded := await coordinator.pull(number, consumer)) is not None:
                yield await run_in_thread(partial(_decoded, encoded))
        finally:
            with anyio.CancelScope(shield=True):
                if iteration is not None:
                    await close(iteration)
                if attached is not None:
                    await attached.aclose()

    def __reduce__(self) -> Any:
        if self._owner is not None and self._owner.cluster is not None:
            raise MisuseError(
                f"{self.__name__} is of an actor that ends with this program, so nobody else can find it; to send it "
                "to another process, split on a Ray that runs by itself (`ray start --head`, "
                "RayCluster.connect('auto'))"
            )
        return RemotePart, (None, *self._where)


def _in_ray() -> bool:
    import ray

    return bool(ray.is_initialized())


def _encoded(block: pa.RecordBatch) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, block.schema) as writer:
        writer.write_batch(block)
    return sink.getvalue().to_pybytes()  # type: ignore[no-any-return]  # bytes


def _decoded(encoded: bytes) -> pa.RecordBatch:
    with pa.ipc.open_stream(encoded) as reader:
        return reader.read_next_batch()
