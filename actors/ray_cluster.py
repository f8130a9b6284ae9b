"""RayCluster: actors placed, started and killed by Ray; their messages go over channels of ours."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
import threading
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import anyio
import anyio.to_thread

from actors.bundles import Group, Placement, Reservation
from actors.cluster import Cluster, ClusterResources, DetachedOrder, Isolation, NodeResources
from actors.finish import finish
from actors.hosts.guards import RayGuard
from actors.interface import specify
from actors.on_ray import detached, pickling
from actors.on_ray.ray_host import RayBody, Way, import_ray
from arun.errors import ActorNotFound, MissingExtraError, MisuseError, PlacementError
from arun.runtime import Background, Runtime

if TYPE_CHECKING:
    import builtins
    from collections.abc import Callable, Generator, Mapping, Sequence
    from typing import Self

    from actors.interface import ActorSpec
    from actors.members.body import Body
    from actors.members.supervision import Supervisor
    from actors.on_ray.detached_host import Card
    from arun.channel import TLSConfig

__all__ = ("RayCluster",)

_NO_NEWS = {
    # Off the main thread Ray leaves the SIGTERM handler alone, which is what we want.
    "ray._private.worker": "SIGTERM handler is not set",
    # Ray's default for a cluster that it starts here, and ours.
    "ray._private.authentication.authentication_token_setup": "Token authentication is enabled",
}
"""Per logger of Ray's, the beginning of a warning that each start would give and that asks nobody to do anything."""


class RayCluster(Cluster):
    """A Ray cluster: one that runs already, or one of this machine, started and stopped with the block.

    >>> async with RayCluster.connect() as cluster:
    ...     counter = await cluster.spawn(Counter, start=3)

    Make it with :meth:`connect`. Actors end with this process, since Ray ends a dead driver's actors; detached ones do
    not. These have one namespace for all programs on that Ray, so a name is taken once.
    """

    def __init__(
        self,
        address: str | None,
        options: Mapping[str, Any],
        *,
        placement_timeout: float,
        grace: float,
        silence: float,
        way: Way,
    ) -> None:
        super().__init__(grace=grace, silence=silence)
        self._way = way
        self._placement_timeout = placement_timeout
        self._session = _RaySession(address, options)
        self._opening: Background[None] | None = None

    @classmethod
    def connect(
        cls,
        address: str | None = None,
        *,
        placement_timeout: float = 10.0,
        grace: float = 5.0,
        silence: float = 30.0,
        transport: Literal["tcp", "ray"] = "tcp",
        tls: TLSConfig | None = None,
        **ray_init_options: Any,
    ) -> RayCluster:
        """A cluster to be entered with ``async with``; nothing starts before.

        :param address: of a running cluster ("auto", "host:port"); by default Ray is started on this machine,
            without a dashboard, with token authentication (Ray's default; RAY_AUTH_MODE decides). A process that is
            connected to Ray already uses that connection, and leaves it as it is.
        :param placement_timeout: seconds that :meth:`reserve` waits for resources that others hold now.
        :param grace: seconds that ``on_stop`` gets before a process is killed.
        :param silence: seconds after which an actor's process that does not even answer for its health is killed.
        :param transport: how messages go: "tcp", to a socket that each actor listens on; or "ray", in Ray's own calls,
            many times slower, where a firewall lets nothing but Ray through.
        :param tls: encrypts those sockets. The paths are those of the nodes and of this machine; every node's
            certificate must be for its address, or all for ``TLSConfig(hostname=...)``.
        :param ray_init_options: for ``ray.init``, for example ``num_cpus=8``.
        :raises MissingExtraError: Ray is not installed.
        :raises MisuseError: the address is a ``ray://`` one; or options that can't go together.
        """
        if importlib.util.find_spec("ray") is None:
            raise MissingExtraError("RayCluster", extra="ray", package="ray")
        if address is not None and address.startswith("ray://"):
            raise MisuseError(
                f"RayCluster can't use {address}: a Ray client is outside of the cluster, out of reach of the actors' "
                "sockets; run this program on a node of the cluster with address='auto', or submit it as a Ray job"
            )
        if transport not in {"tcp", "ray"}:
            raise MisuseError(f"transport={transport!r}: it must be 'tcp' or 'ray'")
        if transport == "ray" and tls is not None:
            raise MisuseError("transport='ray' has no sockets of its own to encrypt; RAY_USE_TLS is for Ray's")
        return cls(
            address,
            ray_init_options,
            placement_timeout=placement_timeout,
            grace=grace,
            silence=silence,
            way=Way(transport, tls),
        )

    async def start(self) -> None:
        """Connect, as ``async with`` does. Ray is started in a thread, so the event loop goes on."""
        if self._roster.closed:
            raise MisuseError("this cluster is closed; connect() again")
        if self._opening is None:
            self._opening = Runtime.current().start(self._session.open, name="start of RayCluster")
        try:
            await finish(self._opening)
        except BaseException:
            await self.aclose()
            raise

    async def reserve(self, placement: Placement, *, wait: float | None = None) -> Reservation:
        """Reserve one placement group a replica.

        :param wait: seconds to wait, also where the cluster as it is now is too small, because it may grow; by default
            ``placement_timeout``, and not for a cluster that is too small.
        :raises PlacementError: the cluster is too small for it, told at once; or what it needs did not come free, or
            the cluster did not grow, in time.
        """
        self._require_open()
        refusal = placement.refusal(await self.resources(), idle=True)
        if refusal is not None and wait is None:
            raise PlacementError(f"{refusal}. Where the cluster grows by itself, wait for it: reserve(wait=seconds)")
        # Nothing is awaited from the first group to the reservation that owns them all.
        groups = _groups(placement)
        reservation = Reservation(placement, groups, self._give_back)
        self._reservations.append(reservation)
        try:
            await self._wait_ready(placement, groups, self._placement_timeout if wait is None else wait)
        except BaseException:
            await reservation.release()  # noqa: ASYNC102 - finish() lets no cancellation cut it short
            raise
        return reservation

    async def holds(self, reservation: Reservation) -> bool:
        """Whether the placement groups of a reservation are still there; a round trip to Ray's head node."""
        return await anyio.to_thread.run_sync(_none_removed, reservation.groups)

    async def resources(self) -> ClusterResources:
        """CPUs and GPUs of every node, in all and free. What actors freed a moment ago may still count as taken."""
        self._require_open()
        return await anyio.to_thread.run_sync(_resources)

    async def stop(self, actor: object) -> None:
        if isinstance(actor, str) and not self._roster.has(actor):
            name: str | None = actor
        else:
            name = self._roster.attached_name(actor)
        if name is None:
            await super().stop(actor)
            return
        self._require_open()
        found = await self._found(name)
        if self._roster.has(name):
            await super().stop(name)
        await finish(Runtime.current().start(detached.end, found, name, self._grace, name=f"end of actor {name}"))

    def is_detached(self, actor: object) -> bool:
        """Whether a handle is of a detached actor, which other processes may attach to by its name."""
        return self._roster.attached_name(actor) is not None

    def check_detachable(self) -> None:
        self._require_open()
        if self._way.transport == "ray":
            raise MisuseError("detached actors listen on sockets: they need RayCluster.connect(transport='tcp')")
        if self._session.started_ray:
            raise MisuseError(
                "nothing detached can be in the Ray of this cluster: this program started it, and it ends with the "
                "block. Start one that runs by itself (`ray start --head`) and use RayCluster.connect('auto')"
            )

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "placement_timeout": self._placement_timeout, **self._way._asdict()}

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    def _launcher(
        self, *, group: Group | None, env: Mapping[str, str], isolation: Isolation | None
    ) -> Callable[[ActorSpec], Body]:
        self._require_open()
        if isolation == "task":
            raise MisuseError("isolation='task' is LocalCluster's: Ray's actors have processes of their own")
        return lambda spec: RayBody(spec, group=group, env=env, way=self._way)

    async def _look_for(self, name: str) -> None:
        self._require_open()
        actor = await self._found(name)
        await self._attach(actor, await detached.card_of(actor, name))

    async def _spawn_detached(self, order: DetachedOrder) -> object:
        self.check_detachable()
        name = order.name
        if name is None:
            raise MisuseError("lifetime='detached' needs name=...: without a name nobody could find the actor again")
        if order.group is not None:
            raise MisuseError(
                f"{order.group!r} is given back when this program ends, and who calls a detached actor in it would "
                "wait for ever (Ray's behaviour). Let a detached actor reserve by itself what it needs, in on_start: "
                "RayCluster.connect(), reserve(), spawn()"
            )
        supervisor = detached.supervisor_of(order.restart, order.restarts)
        if await self._roster.settled(name) is None:
            spec = specify(name, order.cls, order.args, order.kwargs, concurrency=order.concurrency)
            making = Runtime.current().start(self._make, spec, order.env, supervisor, name=f"start of actor {name}")
            try:
                handle = await making.wait()
            except anyio.get_cancelled_exc_class():
                making.cancel()  # nobody else would end what Ray is starting
                with anyio.CancelScope(shield=True):
                    await making.ended()
                raise
            if handle is not None:
                return handle
        if not order.get_if_exists:
            raise MisuseError(
                f"an actor named {name!r} exists already; stop it first, choose another name, or pass "
                "get_if_exists=True to have that one"
            )
        return await self.get(name, order.cls)

    async def _make(self, spec: ActorSpec, env: Mapping[str, str], supervisor: Supervisor | None) -> object | None:
        """Start a detached actor, which ends if it is not ready in the end; None where the name is taken."""
        try:
            create = partial(detached.create, spec, env=env, supervisor=supervisor, tls=self._way.tls)
            actor, card = await anyio.to_thread.run_sync(create)
        except detached.NameTaken:
            return None
        try:
            return await self._attach(actor, card)
        except BaseException:
            ending = Runtime.current().start(detached.end, actor, card.name, self._grace, name=f"end of {card.name}")
            await finish(ending)  # noqa: ASYNC102 - finish() lets no cancellation cut it short
            raise

    async def _attach(self, actor: Any, card: Card) -> object:
        attachment = detached.Attachment(actor, card, self._way.tls, self._roster.forget)
        return await self._roster.attach(pickling.loads(card.spec), attachment)

    async def _found(self, name: str) -> Any:
        """Ray's handle of the detached actor of that name.

        :raises ActorNotFound: there is none; the message has those there are.
        """
        found = await anyio.to_thread.run_sync(detached.find, name)
        if found is None:
            own = ", ".join(repr(info.name) for info in self.list()) or "none"
            others = ", ".join(map(repr, await anyio.to_thread.run_sync(detached.names))) or "none"
            raise ActorNotFound(f"no actor is named {name!r}; this cluster has: {own}; detached in this Ray: {others}")
        return found

    async def _close(self) -> None:
        await super()._close()
        await self._session.close()

    async def _wait_ready(self, placement: Placement, groups: builtins.list[Group], seconds: float) -> None:
        try:
            with anyio.fail_after(seconds):
                for group in groups:
                    native: Any = group.native
                    # In a thread, because Ray sends the code for it to its head node first.
                    await (await anyio.to_thread.run_sync(native.ready))
                    group.nodes = await anyio.to_thread.run_sync(_nodes, native)
        except TimeoutError:
            now = placement.explain(await self.resources())
            if now.verdict == "never":
                why = f"the cluster is too small for this placement, and did not grow in {seconds:g} s"
            else:
                why = f"others hold what this placement needs; it did not come free in {seconds:g} s"
            raise PlacementError(
                f"{why}. As it stands now:\n{now}\nEnd what holds it, ask for less, or wait longer: "
                "reserve(wait=seconds) or RayCluster.connect(placement_timeout=seconds)"
            ) from None

    async def _give_back(self, reservation: Reservation) -> None:
        ray = import_ray()
        # Actors first: who calls an actor whose group is removed under it may wait for ever (ray#57726).
        await self._roster.stop_all(reservation.groups)
        for group in reservation.groups:
            ray.util.remove_placement_group(group.native)
        self._reservations.remove(reservation)

    def _require_open(self) -> None:
        if self._roster.closed:
            raise MisuseError("this cluster is closed; connect() again")
        if self._opening is None or not self._opening.done:
            raise MisuseError("this cluster is not connected yet: write `async with RayCluster.connect() as cluster:`")


class _RaySession:
    """A connection to Ray, held by a thread of its own for as long as it lasts.

    Starting and stopping Ray takes seconds, so the event loop's thread won't do. Nor will a worker thread that may be
    retired: Ray asks the kernel to kill its servers when the thread that started them ends (PR_SET_PDEATHSIG).
    """

    def __init__(self, address: str | None, options: Mapping[str, Any]) -> None:
        self._address = address
        self._options = options
        self._opened: Future[None] = Future()
        #: whether Ray was started here, so that it ends here
        self.started_ray = False
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._hold, name="Ray session", daemon=True)

    async def open(self) -> None:
        self._thread.start()
        await anyio.to_thread.run_sync(self._opened.result)

    async def close(self) -> None:
        self._leave.set()
        if self._thread.is_alive():
            await anyio.to_thread.run_sync(self._thread.join)

    def _hold(self) -> None:
        try:
            with _connected(self._address, self._options) as self.started_ray:
                self._opened.set_result(None)
                self._leave.wait()
        except BaseException as exc:  # noqa: ASYNC103 - in a thread of its own; whoever waits for it gets it
            if self._opened.done():
                raise
            self._opened.set_exception(exc)


@contextlib.contextmanager
def _connected(address: str | None, options: Mapping[str, Any]) -> Generator[bool]:
    """Be connected to Ray; yields whether it was started here. Ends only what it began. Blocks for seconds."""
    ray = import_ray()
    if ray.is_initialized():
        if address is not None or options:
            raise MisuseError(
                "this process is connected to Ray already, so RayCluster.connect() takes that connection and neither "
                f"address nor options can have an effect: address={address!r}, {dict(options)}"
            )
        yield False
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(_stdout_is_the_programs())
        quiet = {"include_dashboard": False} if address is None else {}
        with _without_no_news(), _explained(address):
            ray.init(
                address="local" if address is None else address,
                **{"log_to_driver": False, "logging_level": logging.WARNING, **quiet, **options},
            )
        started = address in {None, "local"}
        if started:
            stack.callback(RayGuard(ray._private.worker._global_node).close)
        stack.callback(ray.shutdown)
        yield started


@contextlib.contextmanager
def _explained(address: str | None) -> Generator[None]:
    """Say what Ray only prints: that it wants its token."""
    try:
        yield
    except ConnectionError as exc:
        if "InvalidAuthToken" not in str(exc.__cause__):
            raise
        raise MisuseError(
            f"the Ray at {address} wants its token: set RAY_AUTH_MODE=token, and have the token in RAY_AUTH_TOKEN or "
            "in ~/.ray/auth_token. Ray looks for it by itself only with address='auto' and no RAY_ADDRESS"
        ) from exc


@contextlib.contextmanager
def _stdout_is_the_programs() -> Generator[None]:
    """Send to stderr what Ray prints: a worker's death and, with log_to_driver, its output. It has no such option."""
    worker = import_ray()._private.worker
    original = worker.print_worker_logs

    def print_to_stderr(data: Any, print_file: Any, *args: Any, **kwargs: Any) -> None:
        original(data, sys.stderr, *args, **kwargs)

    worker.print_worker_logs = print_to_stderr
    try:
        yield
    finally:
        worker.print_worker_logs = original


@contextlib.contextmanager
def _without_no_news() -> Generator[None]:
    def is_news(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(_NO_NEWS[record.name])

    loggers = [logging.getLogger(name) for name in _NO_NEWS]
    for logger in loggers:
        logger.addFilter(is_news)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_news)


def _resources() -> ClusterResources:
    """Ask Ray; a round trip to its head node."""
    ray = import_ray()
    free: dict[str, dict[str, float]] = ray._private.state.available_resources_per_node()
    nodes: list[dict[str, Any]] = [node for node in ray.nodes() if node["Alive"]]
    return ClusterResources(
        tuple(
            NodeResources(
                name=_node_name(node),
                cpus=node["Resources"].get("CPU", 0),
                cpus_free=free.get(node["NodeID"], {}).get("CPU", 0),
                gpus=node["Resources"].get("GPU", 0),
                gpus_free=free.get(node["NodeID"], {}).get("GPU", 0),
                labels=dict(node.get("Labels") or {}),
            )
            for node in nodes
        )
    )


def _groups(placement: Placement) -> list[Group]:
    """Ask Ray for a placement group a replica; for all of them or none."""
    ray = import_ray()
    options: dict[str, Any] = {"strategy": placement.strategy}
    if placement.labels:
        options["bundle_label_selector"] = [placement.labels] * placement.workers
    groups: list[Group] = []
    try:
        for replica, bundles in enumerate(placement.bundles()):
            groups.append(Group(replica, bundles, ray.util.placement_group(bundles, **options)))
    except BaseException:
        for group in groups:
            ray.util.remove_placement_group(group.native)
        raise
    return groups


def _none_removed(groups: Sequence[Group]) -> bool:
    table = import_ray().util.placement_group_table
    return all(table(group.native)["state"] != "REMOVED" for group in groups)


def _nodes(native: Any) -> tuple[str, ...]:
    """Ask Ray for the nodes of a placement group's bundles."""
    ray = import_ray()
    names = {node["NodeID"]: _node_name(node) for node in ray.nodes()}
    by_bundle: dict[int, str] = ray.util.placement_group_table(native)["bundles_to_node_id"]
    return tuple(names.get(by_bundle[bundle], by_bundle[bundle]) for bundle in sorted(by_bundle))


def _node_name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeName']} ({node['NodeID'][:8]})"  # one machine may have several nodes
