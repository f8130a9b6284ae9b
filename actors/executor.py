"""RayExecutor: subtasks of parallel actions in long-lived workers of a Ray cluster."""

from __future__ import annotations

import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import anyio

from actors.actor import ActorHandle, link_of
from actors.bundles import Placement
from actors.environment import check_environment
from actors.members.generation import Generation
from actors.on_ray.code_table import CodeTable, Luggage
from actors.on_ray.executor_worker import ExecutorWorker
from actors.pool import EnginePool
from arun.actions import within
from arun.errors import MisuseError, WorkerDied
from arun.executors.messages import RUN, WINDOW, Answer, Order
from arun.executors.orders import order_of, run_order
from arun.executors.pool import Pool
from arun.executors.references import refer_to
from arun.hosting import GRACE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Self

    from actors.bundles import Group, Reservation
    from actors.ray_cluster import RayCluster
    from arun.actions import Action
    from arun.channel import Stream
    from arun.context import ApplicationContext
    from arun.state import State

__all__ = ("RayExecutor",)

_NO_LABELS: Final[Mapping[str, str]] = {}
_NO_ENV: Final[Mapping[str, str]] = {}


class RayExecutor:
    """Runs subtasks in worker processes of a Ray cluster, one subtask a worker at a time.

    >>> async with RayCluster.connect() as cluster, RayExecutor(cluster, workers=4) as executor:
    ...     app = ApplicationBuilder().with_actions(ask_all).with_executor(executor).build()

    Workers are started when they are needed, reused, and replaced when they die. Each has a placement group of its own;
    all groups are reserved together, when the first worker is needed. They end with ``async with executor:``, with
    ``aclose()``, with the cluster, and with this program, however it ends.

    Any action runs. One that a module has at its top level crosses as its name, and the workers must be able to import
    that module. A closure, a lambda and whatever the main module or a notebook defines is pickled by cloudpickle with
    what it refers to; it travels over Ray's control plane, once for all workers, and a worker keeps it. Values cross as
    with a :class:`~arun.ProcessExecutor`: the keys of the State that the action may read, its inputs, items and partial
    States as they come, and what it wrote, by :mod:`arun.codec`. Registered classes of the main module are known to
    the workers, msgspec Structs excepted, which can't be pickled. Workers attach to resources that are detached pools
    or actors, by their names; other resources and contextvars stay behind. A RunnableGraph runs in one worker as a
    whole; a parallel action stays here, and its subtasks go to workers.

    A cancelled async action or generator may clean up; a plain function is killed with its worker. If a worker dies,
    its subtask fails with :class:`~arun.errors.WorkerDied`, which a policy may retry.

    :param workers: most workers at once; subtasks beyond it wait.
    :param cpus: CPUs that each worker reserves; may be a fraction. With neither CPUs nor GPUs, workers go anywhere.
    :param gpus: GPUs that each worker reserves and sees.
    :param labels: of the nodes that will do, as in :class:`~actors.Placement`.
    :param env: environment variables of the workers, on top of this process's own.
    :param wait: seconds to wait for what others hold; by default the cluster's ``placement_timeout``.
    :param grace: seconds that a cancelled subtask may clean up before its worker is killed.
    :raises MisuseError: ``workers`` is less than 1, ``env`` is not all text, or what ``Placement`` refuses.
    """

    def __init__(
        self,
        cluster: RayCluster,
        workers: int,
        *,
        cpus: float = 1.0,
        gpus: float = 0.0,
        labels: Mapping[str, str] = _NO_LABELS,
        env: Mapping[str, str] = _NO_ENV,
        wait: float | None = None,
        grace: float = GRACE,
    ) -> None:
        if workers < 1:
            raise MisuseError(f"RayExecutor(workers={workers}): at least 1")
        check_environment(env)
        self.workers = workers
        self.placement: Placement | None = None
        if cpus or gpus or labels:
            self.placement = Placement(replicas=workers, cpus=cpus, gpus=gpus, labels=dict(labels))
        self.grace = grace
        self._cluster = cluster
        self._env = dict(env)
        self._wait = wait
        self._closed = False
        self._pool: Pool | None = None
        self._reservation: Reservation | None = None
        self._reserving = anyio.Lock()
        self._free: list[Group] = []
        self._table = CodeTable()

    def __repr__(self) -> str:
        return f"<RayExecutor of {self.workers}{', closed' if self._closed else ''}>"

    @property
    def pids(self) -> list[int]:
        """The workers that live."""
        return [] if self._pool is None else self._pool.pids

    def check(self, action: Action) -> None:
        """:raises MisuseError: for an action that can neither be imported by a worker nor be pickled."""
        refer_to(action, Luggage().pack)

    async def run(
        self, action: Action, state: State, inputs: Mapping[str, Any], context: ApplicationContext
    ) -> tuple[Any, State]:
        """See :meth:`arun.executors.Executor.run`.

        :raises MisuseError: the action or a value that it needs can't cross; says which, and what to do.
        :raises PlacementError: the cluster can't hold the workers.
        :raises WorkerDied: its worker ended.
        """
        if context.capacities:  # an action that is more than a leaf counts as one, too: it has a worker of its own
            return await within(context.capacities, action, partial(self._run, action, state, inputs, context))
        return await self._run(action, state, inputs, context)

    async def aclose(self) -> None:
        """End all workers, give back what they reserved, and wait for that. It can't be used again."""
        self._closed = True
        if self._pool is not None:
            await self._pool.aclose()
        async with self._reserving:
            if self._reservation is not None:
                await self._reservation.release()
        await self._table.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def _run(
        self, action: Action, state: State, inputs: Mapping[str, Any], context: ApplicationContext
    ) -> tuple[Any, State]:
        pool = self._current_pool()
        luggage = Luggage()
        reference = refer_to(action, luggage.pack)
        self._table.pack_types(luggage)
        code = await self._table.check_in(luggage)
        try:
            order = order_of(action, reference, state, inputs, context, code, self._attachable(context.resources))
            return await run_order(pool, order, state, context)
        finally:
            self._table.check_out(code)

    def _attachable(self, resources: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
        """The resources that workers find by their names: detached pools and actors."""
        found: dict[str, tuple[str, str]] = {}
        for key, resource in resources.items():
            if isinstance(resource, EnginePool) and resource.detached:
                found[key] = ("pool", resource.name)
            elif isinstance(resource, ActorHandle) and self._cluster.is_detached(resource):
                found[key] = ("actor", link_of(resource).name)
        return found

    def _current_pool(self) -> Pool:
        if self._closed:
            raise MisuseError("this RayExecutor is closed; make another one, or close it later")
        if self._pool is None or self._pool.ended:
            self._pool = Pool(self.workers, self.grace, self._start, "RayExecutor")
        return self._pool

    async def _start(self) -> _RayWorker:
        group = await self._take_group()
        try:
            sys_path = [str(entry) or os.getcwd() for entry in sys.path]
            handle = await self._cluster.spawn(
                ExecutorWorker, sys_path, self._cluster.settings, group=group, env=self._env
            )
        except BaseException:
            self._give_back(group)
            raise
        return _RayWorker(self._cluster, handle, partial(self._give_back, group))

    async def _take_group(self) -> Group | None:
        if self.placement is None:
            return None
        async with self._reserving:
            if self._reservation is None:
                self._reservation = await self._cluster.reserve(self.placement, wait=self._wait)
                self._free = list(self._reservation.groups)
        return self._free.pop()

    def _give_back(self, group: Group | None) -> None:
        if group is not None:
            self._free.append(group)


class _RayWorker:
    """One worker: an actor of one generation, since a subtask is retried by its policy and not by the cluster."""

    def __init__(self, cluster: RayCluster, handle: object, on_end: Callable[[], object]) -> None:
        line = link_of(handle).latest
        assert isinstance(line, Generation)  # spawn() returns when it is ready
        self.pid = line.pid or 0
        self._cluster = cluster
        self._handle = handle
        self._line = line
        self._connection = line.connection  # that its present or last subtask is on
        self._on_end: Callable[[], object] | None = on_end

    @property
    def usable(self) -> bool:
        return self._line.how is None and not self._line.connection.closed

    def open(self, order: Order) -> Stream[Any]:
        self._connection = self._line.connection
        return self._connection.open(RUN, {"order": order}, item_type=Answer, window=WINDOW)

    async def settle(self, stream: Stream[Any], deadline: float) -> None:
        with anyio.CancelScope(deadline=deadline):
            await stream.aclose()
            if self._connection.closed:  # it has taken the process with it
                await self.stop(0.0)
            return
        self._line.body.kill()
        await self.stop(0.0)

    async def death(self, when: str, grace: float) -> WorkerDied:
        if await self._line.regain(self._connection):
            how = "lost its connection to this program, and was stopped"
        else:
            how = self._line.how or "can't be reached any more, and was killed"
        await self.stop(grace)
        return WorkerDied(f"worker process {self.pid} {how}, {when}", pid=self.pid)

    async def stop(self, grace: float) -> None:
        await self._cluster.stop(self._handle)  # within the cluster's grace
        if self._on_end is not None:
            self._on_end()
            self._on_end = None
