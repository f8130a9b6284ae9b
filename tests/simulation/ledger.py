"""Universe ``ledger``: an application with nested fan-outs over a store, whose process dies at any moment.

The application, its kernel, the ledger and the store's rules are arun's own, on a :class:`~tests.simulation.loop.Loop`.
Drawn are the tree of subtasks, how long each takes and whether it fails, how long the store takes before and after it
has written, and what goes wrong: the process is killed (what is durable then is all that the next one finds), the run
is cancelled, a reducer leaves early, or another process takes the lease while the old one still runs.
"""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import anyio

from arun import (
    Application,
    ApplicationBuilder,
    ApplicationContext,
    Failed,
    Ok,
    Policy,
    Retry,
    RunConflictError,
    State,
    SubGraphTask,
    TaskBasedParallelAction,
    action,
    expr,
)
from arun.errors import AlreadyFinishedError
from arun.journal import History, Lease, Opened, Step, unpack
from arun.store import MemoryStore
from tests.simulation.loop import Loop
from tests.simulation.world import Violation, World

__all__ = ("PATHS", "play")

PATHS = (
    "killed while subtasks ran",
    "killed before a write",
    "killed between a write and its answer",
    "killed while a nested fan-out was half recorded",
    "killed behind the last step",
    "cancelled while subtasks ran",
    "a cancelled subtask cleaned up for a while",
    "a result was restored",
    "a nested result was restored",
    "one of several equal subtasks was restored",
    "a subtask failed for good",
    "a subtask was tried again",
    "a nested fan-out was tried again",
    "a reducer left early",
    "a run failed and another went on",
    "a process went on without its lease",
    "a write without the lease was refused",
    "a second round over the same items",
)


class Flaky(Exception):
    """What subtasks fail with."""


class Life:
    """One application over all its processes: what the store has, and what must be true of it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.store = MemoryStore()
        self.items = _draw_items(world)
        self.rounds = world.pick((1, 1, 2))
        #: how many equal subtasks there are of each item
        self.wanted = _count(self.items)
        #: how many of them the ledger has, or had before their parent was recorded
        self.recorded: Counter[int] = Counter()
        #: how many bodies have ended well
        self.ended: Counter[int] = Counter()
        self.faults = world.pick((0, 1, 1, 2, 3))
        self.failing = world.pick((0, 0, 10, 30))
        self.early = world.pick((0, 0, 0, 15))
        self.store_delay = world.pick((0, 1, 3))
        self.longest = world.pick((0, 2, 8))
        self.policy = {
            "limit": world.pick((1, 2, 3, 8)),
            "order": world.pick(("completed", "submitted")),
            "on_error": world.pick(("fail", "collect", "skip")),
            "retry": Retry(attempts=world.pick((1, 1, 3)), initial=0, on=Flaky),
        }
        self.listening = world.chance(40)
        self.check = world.pick(("off", "error"))
        self.processes: list[Process] = []
        self.result: State | None = None
        self.left_early = False

    def begin(self) -> None:
        """Start another process, which will take the lease."""
        if len(self.processes) > 12:
            self.heal()
        process = Process(self, len(self.processes))
        self.processes.append(process)
        self.world.note("begin", process.number)
        process.begin()

    def heal(self) -> None:
        """Nothing goes wrong from now on."""
        self.faults = self.failing = 0

    def strike(self) -> None:
        """Something goes wrong with the newest process, or it gets company."""
        if not self.faults or self.result is not None:
            return
        process = self.processes[-1]
        if process.over or not process.alive:
            return
        self.faults -= 1
        kind = self.world.below(4)
        if kind < 2:
            process.kill()
        elif kind == 2:
            if process.running:
                self.world.sometimes("cancelled while subtasks ran")
            self.world.note("cancel", process.number)
            process.task.cancel()
        else:
            self.begin()


class Process:
    """One process of an application, from its start to its end."""

    def __init__(self, life: Life, number: int) -> None:
        self.life, self.number = life, number
        self.loop = Loop(life.world)
        self.loop.process = self
        self.store = SlowStore(self, life.store)
        self.alive = True
        self.over = self.has_lease = False
        self.running: Counter[int] = Counter()
        self.reduced: Counter[int] = Counter()
        self.failed: set[int] = set()

    def begin(self) -> None:
        self.task = self.loop.start(self._run())
        self.task.add_done_callback(self._ended)

    async def _run(self) -> State:
        app, world = _build(self), self.life.world
        if not self.life.listening:
            return (await app.arun()).state
        async with app.astream() as stream:
            async for _ in stream:
                await anyio.sleep(world.between(0, 1))
        return stream.result.state

    def kill(self) -> None:
        """As kill -9: what is durable now is what the next process finds.

        What this one does from here on, it does to a copy; it is cancelled so that nothing is left over.
        """
        world, life = self.life.world, self.life
        if self.running:
            world.sometimes("killed while subtasks ran")
        if any(item >= 100 for item in life.recorded) and self.running:
            world.sometimes("killed while a nested fan-out was half recorded")
        world.note("kill", self.number)
        self.alive = self.has_lease = False
        self.store.inner = copy.deepcopy(life.store)
        self.task.cancel()
        self._go_on()

    def _ended(self, task: asyncio.Task[State]) -> None:
        self.over = True
        error: BaseException | None = asyncio.CancelledError() if task.cancelled() else task.exception()
        if not self.alive:
            return
        world, life = self.life.world, self.life
        world.note("over", self.number, type(error).__name__)
        if error is None:
            life.result = task.result()
            return
        if isinstance(error, AlreadyFinishedError):
            world.sometimes("killed behind the last step")
            life.result = State(error.state)
            return
        if _consists_of(error, RunConflictError, Flaky) and not _consists_of(error, Flaky):
            if self.has_lease:
                raise life.world.broken(f"process {self.number} has the lease and was refused: {error}")
            self._go_on()
            return
        flaky = _consists_of(error, Flaky)
        if not flaky and not isinstance(error, asyncio.CancelledError):
            raise life.world.broken(f"process {self.number} failed: {error!r}") from error
        if flaky:
            world.sometimes("a run failed and another went on")
        self._go_on()

    def _go_on(self) -> None:
        """Somebody starts the next process, if none is left."""
        world, life = self.life.world, self.life
        if all(one.over or not one.alive for one in life.processes):
            world.after(world.between(0, 3), life.begin)

    # Called by the subtasks and reducers.

    def starts(self, item: int) -> None:
        life = self.life
        self.running[item] += 1
        if not self.has_lease:
            return
        life.world.note("starts", self.number, item)
        if item in self.failed:
            life.world.sometimes("a subtask was tried again")
        # What is recorded is not run again: those that run and those recorded are never more than there are.
        if self.running[item] + life.recorded[item] > life.wanted[item]:
            raise life.world.broken(
                f"item {item}: {self.running[item]} run and {life.recorded[item]} are recorded of {life.wanted[item]}"
            )

    def stops(self, item: int) -> None:
        self.running[item] -= 1
        if not self.running[item]:
            del self.running[item]

    def sees(self, item: int) -> None:
        """A reducer is given a result."""
        if not self.has_lease:
            return
        life = self.life
        life.world.note("sees", self.number, item)
        self.reduced[item] += 1
        if self.reduced[item] > life.wanted[item]:
            raise life.world.broken(
                f"item {item} was reduced {self.reduced[item]} times, there are {life.wanted[item]}"
            )
        if self.reduced[item] > life.recorded[item]:
            raise life.world.broken(f"item {item} was reduced before it was recorded")


class SlowStore:
    """The store as one process sees it: takes its time before and after each of the operations of the real one."""

    def __init__(self, process: Process, inner: MemoryStore) -> None:
        self._process = process
        self.inner = inner

    async def _delay(self) -> None:
        world, delay = self._process.life.world, self._process.life.store_delay
        await anyio.sleep(world.between(0, delay))

    async def _before_write(self) -> None:
        await self._delay()
        self._strike("killed before a write")

    async def _after_write(self) -> None:
        process = self._process
        if process.alive and not process.has_lease:
            raise self._process.life.world.broken(f"process {process.number} wrote without its lease")
        self._strike("killed between a write and its answer")
        await self._delay()

    def _strike(self, path: str) -> None:
        process, life = self._process, self._process.life
        if process.has_lease and life.faults and life.world.chance(4):
            life.faults -= 1
            life.world.sometimes(path)
            process.kill()

    async def open_run(self, app_id: str, partition_key: str | None) -> Opened:
        await self._delay()
        process, life = self._process, self._process.life
        durable = self.inner is life.store
        if durable:
            for app in self.inner._apps.values():
                app.holder = None  # as on another machine, once the lease is out
        opened = await self.inner.open_run(app_id, partition_key)
        for older in life.processes if durable else ():  # also where this one was killed before it got the answer
            if older.has_lease and not older.over:
                life.world.sometimes("a process went on without its lease")
            older.has_lease = older is process and process.alive
        return opened

    async def begin(self, lease: Lease, graph: str, initial: bytes, *, fresh: bool) -> None:
        await self._before_write()
        await self._refused(self.inner.begin(lease, graph, initial, fresh=fresh))
        await self._after_write()

    async def load(self, lease: Lease) -> History:
        await self._delay()
        return await self._refused(self.inner.load(lease))

    async def commit(self, lease: Lease, step: Step) -> None:
        await self._before_write()
        process, life = self._process, self._process.life
        durable = self.inner is life.store
        await self._refused(self.inner.commit(lease, step))
        if durable:
            life.world.note("commit", process.number, step.sequence_id)
            life.recorded.clear()
            process.reduced.clear()
            if process.alive and process.running:
                raise self._process.life.world.broken(f"subtasks run on behind the step: {sorted(process.running)}")
        await self._after_write()

    async def record(
        self, lease: Lease, parent: bytes, content: bytes, occurrence: int, delta: bytes, key: bytes
    ) -> None:
        await self._before_write()
        inner = self.inner
        written = unpack(delta).written
        # It lands even if the process is killed in between.
        durable = inner is self._process.life.store
        twice = (content, occurrence) in inner._apps["app", ""].ledger.get(parent, {})
        await self._refused(inner.record(lease, parent, content, occurrence, delta, key))
        if durable:
            if twice:
                raise self._process.life.world.broken(f"recorded twice: {written}")
            self._recorded(written)
        await self._after_write()

    def _recorded(self, written: dict[str, Any]) -> None:
        life = self._process.life
        life.world.note("record", self._process.number, str(written))
        item = written.get("value")
        if item is None:
            raise self._process.life.world.broken(f"recorded though it has not ended: {written}")
        life.recorded[item] += 1
        if life.recorded[item] > life.ended[item]:
            raise self._process.life.world.broken(
                f"item {item} was recorded {life.recorded[item]} times and ended {life.ended[item]} times"
            )

    async def recall(self, lease: Lease, parent: bytes, content: bytes) -> list[tuple[int, bytes]]:
        await self._delay()
        found = await self._refused(self.inner.recall(lease, parent, content))
        await self._delay()
        process = self._process
        for _, delta in found if process.has_lease else ():
            item = unpack(delta).written["value"]
            process.life.world.sometimes("a nested result was restored" if item > 100 else "a result was restored")
            if process.life.wanted[item] > len(found):
                process.life.world.sometimes("one of several equal subtasks was restored")
        return found

    async def _refused(self, operation: Any) -> Any:
        try:
            return await operation
        except RunConflictError:
            if self._process.alive:
                self._process.life.world.sometimes("a write without the lease was refused")
            raise

    async def close_run(self, lease: Lease) -> None:
        await self._delay()
        await self.inner.close_run(lease)

    async def aclose(self) -> None:
        pass


@action(reads=["item"], writes=["value"])
async def work(state: State, process: Process) -> AsyncIterator[Any]:
    """One subtask."""
    life, item = process.life, state["item"]
    world = life.world
    process.starts(item)
    try:
        for piece in range(world.below(3)):
            await anyio.sleep(world.between(0, life.longest))
            if process.has_lease and world.chance(life.failing):
                world.note("fails", process.number, item)
                process.failed.add(item)
                raise Flaky(item)
            yield piece
        yield state.update(value=item)
        life.ended[item] += process.alive
    except asyncio.CancelledError:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(world.between(0, life.longest))
            world.sometimes("a cancelled subtask cleaned up for a while")
        raise
    finally:
        process.stops(item)


class Fan(TaskBasedParallelAction):
    """A fan-out over ``items``: numbers are subtasks, lists are fan-outs of their own, named by their first element."""

    reads, writes = ["items"], ["value", "answers"]

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    async def tasks(
        self, state: State, context: ApplicationContext, inputs: dict[str, Any]
    ) -> AsyncIterator[SubGraphTask]:
        for item in state["items"]:
            if isinstance(item, list):
                yield SubGraphTask(self, state.update(items=item[1:], value=item[0]))
            else:
                yield SubGraphTask(work, state.update(item=item))

    async def reduce(self, state: State, states: AsyncIterator[Any]) -> AsyncIterator[State]:
        process: Process = _running()
        life, number = process.life, state.get("value", 0)
        seen: list[int] = []
        if number in process.failed:
            life.world.sometimes("a nested fan-out was tried again")
        try:
            async for done in states:
                if isinstance(done, Failed):
                    life.world.sometimes("a subtask failed for good")
                    continue
                done = done.value if isinstance(done, Ok) else done
                process.sees(done["value"])
                seen.append(done["value"])
                yield state.update(answers=sorted(seen))
                if process.has_lease and life.world.chance(life.early):
                    life.world.sometimes("a reducer left early")
                    life.left_early = True
                    break
            if number and process.has_lease and life.world.chance(life.failing):
                raise Flaky(number)
            life.ended[number] += process.alive
            yield state.update(answers=sorted(seen), value=number)
        except BaseException:
            if number:
                process.failed.add(number)
                process.reduced.subtract(seen)  # whoever tries again begins anew
            raise


@action(reads=["answers", "rounds", "round"], writes=["round", "kept"])
async def keep(state: State, process: Process) -> State:
    """Between two rounds over the same items."""
    if state["round"]:
        process.life.world.sometimes("a second round over the same items")
    return state.update(round=state["round"] + 1, kept=[*state.get("kept", []), state["answers"]])


def _consists_of(error: BaseException, *kinds: type[BaseException]) -> bool:
    """Whether it is such an error, or several of them."""
    return isinstance(error, kinds) or (isinstance(error, BaseExceptionGroup) and error.split(kinds)[1] is None)


def _running() -> Process:
    loop: Any = asyncio.get_running_loop()
    process: Process = loop.process
    return process


def _build(process: Process) -> Application:
    life = process.life
    return (
        ApplicationBuilder()
        .with_actions(fan=Fan(Policy(**life.policy)), keep=keep)
        .with_transitions(("fan", "keep"), ("keep", "fan", expr("round < rounds")))
        .with_entrypoint("fan")
        .with_state(items=life.items, rounds=life.rounds, round=0)
        .with_resources(process=process)
        .with_identifiers(app_id="app")
        .with_check(life.check)
        .with_store(process.store)
        .build()
    )


def _draw_items(world: World) -> list[Any]:
    """Numbers below 100, some of them equal; lists of numbers above, named by a multiple of 100."""
    items: list[Any] = []
    for place in range(world.between(1, 6)):
        if world.chance(25):
            name = 100 * (place + 1)
            items.append([name, *(name + 1 + world.below(3) for _ in range(world.between(0, 4)))])
        else:
            items.append(1 + world.below(4))
    return items


def _count(items: list[Any]) -> Counter[int]:
    count: Counter[int] = Counter()
    for item in items:
        if isinstance(item, list):
            count[item[0]] += 1
            count.update(item[1:])
        else:
            count[item] += 1
    return count


def play(world: World) -> None:
    """One universe."""
    life = Life(world)
    life.begin()
    for _ in range(life.faults):
        world.after(world.below(40), life.strike)
    world.after(300, life.heal)

    def check() -> None:
        for process in life.processes:
            process.loop.check()

    world.run(check, horizon=5_000)
    if life.result is None:
        raise Violation("the application never ended")
    for process in life.processes:
        process.loop.check_left()
        if process.running:
            raise Violation(f"process {process.number} ended and {sorted(process.running)} did not")
    app = life.store._apps["app", ""]
    if any(app.ledger.values()):
        raise Violation("the ledger still has what was committed")
    if len(app.steps) != 2 * life.rounds:
        raise Violation(f"{len(app.steps)} steps are committed of {2 * life.rounds}")
    if not life.left_early and life.policy["on_error"] == "fail":
        answers = sorted(item[0] if isinstance(item, list) else item for item in life.items)
        if life.result["kept"] != [answers] * life.rounds:
            raise Violation(f"the result is {life.result['kept']}, wanted {answers} in each of {life.rounds} rounds")
