"""Rounds: 64 requests at one pool, faults meanwhile, then everything healed and alive again; written into a history."""

from __future__ import annotations

import math
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Literal

import anyio
import anyio.to_thread
import msgspec

from actors.answers import Reset
from actors.engine import EngineSpec
from actors.local_cluster import LocalCluster
from actors.members.supervision import Backoff, Supervisor
from arun.errors import ArunError
from tests.actors.programs import descendants
from tests.faults.checker import Promise
from tests.faults.engines import FOLDER, RecordedEcho, RecordedVLLM
from tests.faults.history import Asked, Ended, Given, History, Left, Round, State, Struck, Submitted
from tests.faults.nemesis import CORE_FAULTS, FAULTS, GROUP_FAULTS, Strike, drawn, left_over, marked, strike

if TYPE_CHECKING:
    from actors.cluster import Cluster
    from actors.pool import DeltaStream, EnginePool

__all__ = ("ORPHAN_SECONDS", "Setting", "files", "run_rounds")

ORPHAN_SECONDS = 10
"""Within which everything must be gone when its owner is."""

REQUESTS = 64
REPLICAS = 2


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What pool is struck, and how hard.

    :ivar faults: of a round.
    """

    cluster: Literal["local", "ray"] = "local"
    engine: Literal["echo", "vllm"] = "echo"
    faults: int = 3

    @property
    def promise(self) -> Promise:
        """What its pool is opened with."""
        if self.engine == "vllm":
            # Two engines that start at once on two cores take over a minute.
            restarts = Supervisor(intensity=5, period=600.0, backoff=Backoff(first=0.1, cap=1.0))
            return Promise(watchdog=20.0, patience=240.0, restarts=restarts)
        restarts = Supervisor(intensity=3, period=10.0, backoff=Backoff(first=0.05, cap=0.5))
        return Promise(watchdog=3.0, patience=40.0, restarts=restarts)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The faults that there are."""
        core = CORE_FAULTS if self.engine == "vllm" else CORE_FAULTS[:1] if self.cluster == "local" else ()
        return (*FAULTS, *core, *(GROUP_FAULTS if self.cluster == "ray" else ()))

    def spec(self, folder: Path) -> EngineSpec:
        """An engine that writes into the folder."""
        if self.engine == "vllm":
            args = {"max_num_seqs": REQUESTS}
            env = {FOLDER: str(folder)}
            return EngineSpec(model="tiny", engine=RecordedVLLM, max_model_len=1024, engine_args=args, env=env)
        args = {"token_seconds": 0.004}
        return EngineSpec(model="echo", engine=RecordedEcho, engine_args=args, env={FOLDER: str(folder)})

    def open(self) -> Cluster:
        """The cluster that the pool is in."""
        if self.cluster == "ray":
            from actors.ray_cluster import RayCluster

            return RayCluster.connect(num_cpus=4, grace=2)
        return LocalCluster(cpus=4, grace=2)


async def run_rounds(setting: Setting, seeds: range, folder: Path, told: Callable[[str], object]) -> None:
    """Run a round for each seed, all at one pool; what happens is written into the folder.

    :param told: called with a line now and then: how many deltas were given, and the end of each round.
    """
    history = History(folder / "owner.jsonl")
    promise = setting.promise
    before = _files(setting)

    async def left(but: Callable[[], Iterable[int]]) -> None:
        over = await anyio.to_thread.run_sync(lambda: left_over(folder, ORPHAN_SECONDS, but=but))
        history.add(Left(what=list(over.values())))

    async with setting.open() as cluster:
        servers = set(marked(folder))
        pool = cluster.engines(
            setting.spec(folder),
            name="faults",
            replicas=REPLICAS,
            max_in_flight=REQUESTS,
            restarts=promise.restarts,
            watchdog=promise.watchdog,
            quarantine=promise.quarantine,
            on_progress=lambda each: history.add(State(replica=each.replica, state=each.state)),
        )
        async with pool:
            for seed in seeds:
                history.add(Round(seed=seed))
                await _Round(setting, seed, history, cluster, pool, told).run()
                await left(lambda: descendants(os.getpid()))
        await left(lambda: servers)
    await left(tuple)
    history.add(Left(what=sorted(_files(setting) - before)))
    history.close()


class _Round:
    """One round."""

    def __init__(
        self,
        setting: Setting,
        seed: int,
        history: History,
        cluster: Cluster,
        pool: EnginePool,
        told: Callable[[str], object],
    ) -> None:
        self._setting, self._seed, self._history = setting, seed, history
        self._cluster, self._pool, self._told = cluster, pool, told
        self._chance = Random(f"{setting.cluster} {setting.engine} {seed}")
        self._deltas = 0
        self._waiting: set[str] = set()
        self._moved = anyio.Event()
        self._over = False
        self._ends: dict[str, int] = {}

    async def run(self) -> None:
        """Let the requests meet their faults, then wait until both replicas serve again, and see that they do."""
        plans = [_Plan(self._chance, f"{self._seed}-{number}", self._setting) for number in range(REQUESTS)]
        # Within what half of the tokens come in, so that most requests are under way.
        deltas = sum(min(plan.tokens, 60) for plan in plans) // 2
        strikes = drawn(self._chance, self._setting.kinds, self._setting.faults, deltas)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._strike_all, strikes)
            async with anyio.create_task_group() as consumers:
                for plan in plans:
                    consumers.start_soon(self._consume, plan)
            self._over = True
            self._moved.set()
        await self._heal()
        ends = ", ".join(f"{count} {how}" for how, count in sorted(self._ends.items()))
        faults = ", ".join(each.fault for each in strikes)
        stats = self._pool.stats()
        self._told(f"seed {self._seed}: {self._deltas} deltas; {faults}; {ends}; restarts so far: {stats.restarts}")

    # Consumers.

    async def _consume(self, plan: _Plan) -> None:
        history, name = self._history, plan.name
        history.add(
            Submitted(
                request=name,
                tokens=plan.tokens,
                answer=plan.answer,
                resumable=plan.seed is None,
                reroute=plan.reroute,
            )
        )
        how, message = "finished", ""
        try:
            stream = self._pool.generate(
                plan.prompt,
                max_tokens=plan.tokens,
                temperature=0,
                ignore_eos=True,
                seed=plan.seed,
                request_id=name,
                reroute=plan.reroute,
            )
            if not await self._read(stream, plan):
                how = "left"
                await stream.aclose()
        except ArunError as exc:
            how, message = type(exc).__name__, str(exc)
        self._waiting.discard(name)
        history.add(Ended(request=name, how=how, message=message))
        self._ends[how] = self._ends.get(how, 0) + 1

    async def _read(self, stream: DeltaStream, plan: _Plan) -> bool:
        """Read to the end; False where the consumer leaves before."""
        history, name, count = self._history, plan.name, 0
        while True:
            history.add(Asked(request=name))
            self._waiting.add(name)
            delta = await anext(stream, None)
            self._waiting.discard(name)
            if delta is None:
                return True
            attempt = delta.attempt if isinstance(delta, Reset) else None
            history.add(
                Given(
                    request=name,
                    epoch=delta.epoch if attempt is None else attempt - 1,
                    token_ids=delta.token_ids,
                    attempt=attempt,
                    finish=delta.finish_reason,
                    usage=None if delta.usage is None else delta.usage.completion_tokens,
                )
            )
            self._count()
            count += 1
            if count == plan.leaves_after:
                return False
            if count == plan.pauses_after:
                await anyio.sleep(plan.pause)

    def _count(self) -> None:
        self._deltas += 1
        if self._deltas % 100 == 0:
            self._told(f"deltas {self._deltas}")
        self._moved.set()

    # Faults.

    async def _strike_all(self, strikes: list[Strike]) -> None:
        for each in strikes:
            while self._deltas < each.after and not self._over:
                self._moved = anyio.Event()
                await self._moved.wait()
            serving = [replica for replica in self._pool.stats().replicas if replica.state == "ready" and replica.pid]
            if not serving:
                continue
            replica = serving[each.which % len(serving)]
            assert replica.pid is not None  # see above
            # Waiting for a delta of it, not only for a replica.
            busy = replica.in_flight > 0 and len(self._waiting) > self._pool.stats().waiting
            self._history.add(Struck(fault=each.fault, replica=replica.replica, pid=replica.pid, busy=busy))
            strike(each.fault, replica.pid, f"faults-{replica.replica}", self._cluster)

    async def _heal(self) -> None:
        """Wait until all replicas serve, and ask each of them something."""
        pool = self._pool
        while True:
            states = [replica.state for replica in pool.stats().replicas]
            if "dead" in states:
                await pool.scale(REPLICAS)
            elif states == ["ready"] * REPLICAS:
                break
            else:
                await anyio.sleep(0.05)  # the pool's on_progress is the history's
        plans = [_Plan(Random(0), f"{self._seed}-healed-{number}", self._setting) for number in range(2 * REPLICAS)]
        async with anyio.create_task_group() as consumers:
            for plan in plans:
                plan.leaves_after = plan.pauses_after = None
                consumers.start_soon(self._consume, plan)
        held = [f"{info.load.in_flight} requests in engine {info.pid}" for info in await pool.info()]
        stats = pool.stats()
        if stats.in_flight or stats.waiting:
            held.append(f"{stats.in_flight} requests in flight and {stats.waiting} waiting in the pool")
        self._history.add(Left(what=[each for each in held if not each.startswith("0 ")]))


class _Plan:
    """What one consumer asks, and how it reads."""

    def __init__(self, chance: Random, name: str, setting: Setting) -> None:
        self.name = name
        words = [f"{name}.{number}" for number in range(chance.randrange(5, 30))]
        self.prompt = " ".join(words)
        self.seed = chance.randrange(100) if chance.random() < 0.25 else None
        self.reroute: Literal["continue", "restart", "never"] = chance.choice((
            "continue",
            "continue",
            "continue",
            "restart",
            "never",
        ))
        # A slow reader's answer is longer than what may lie unread, so that the engine has to wait for it.
        slow = chance.random() < 0.05
        self.tokens = chance.randrange(300, 400) if slow and setting.engine == "echo" else chance.randrange(10, 60)
        self.pauses_after = chance.randrange(1, 10) if slow else None
        self.pause = setting.promise.watchdog * 1.2 if setting.engine == "echo" else 2.0
        self.leaves_after = chance.randrange(1, self.tokens) if chance.random() < 0.1 else None
        self.answer = _echo(words, self.tokens) if setting.engine == "echo" else None


def _echo(words: list[str], tokens: int) -> list[int]:
    """What an EchoEngine answers."""
    spoken = (words * math.ceil(tokens / len(words)))[:tokens]
    pieces = [spoken[0], *(f" {word}" for word in spoken[1:])]
    return [zlib.crc32(piece.encode()) for piece in pieces]


def files(temporary: Path) -> set[str]:
    """What of ours there is in a folder for temporary files: Ray keeps its logs there, and torch its cache."""
    return {name for name in os.listdir(temporary) if name != "ray" and not name.startswith("torchinductor_")}


def _files(setting: Setting) -> set[str]:
    found = files(Path(tempfile.gettempdir()))
    if setting.engine == "vllm":
        found |= {f"/dev/shm/{name}" for name in os.listdir("/dev/shm") if name.startswith(("psm_", "sem.mp-", "vllm"))}
    return found
