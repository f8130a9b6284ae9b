"""Universe ``connection``: two whole connections with their streams and handlers, over a wire of the simulation.

What the universe ``channel`` does by events of its own is here arun's: waiting and waking, the tasks of handlers, their
interruption and clean-up, goodbyes and their deadline. Consumers iterate, leave early, are cancelled; handlers pause,
fail, and take their time to clean up.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import anyio
import msgspec

from arun.channel.connection import Connection
from arun.channel.halves import Allowed
from arun.channel.limits import Limits
from arun.channel.wire import Carried
from arun.errors import ChannelLost, RemoteError, StreamRefused
from arun.runtime import Runtime
from tests.simulation.loop import Loop, Task
from tests.simulation.pipe import Pipe
from tests.simulation.world import World

__all__ = ("PATHS", "play")

PATHS = (
    "a stream came to its end",
    "a handler failed",
    "a call was answered",
    "a call was cancelled",
    "a stream was left and its clean-up awaited",
    "a consumer was cancelled",
    "a handler was interrupted while it waited",
    "a handler was interrupted while it cleaned up",
    "a handler never began",
    "an open was refused",
    "an open after the end",
    "the connection was lost under a consumer",
    "the connection broke while handlers ran",
    "a goodbye came too late",
    "the clean-up outlived the connection",
)


class Wanted(Exception):
    """What handlers fail with."""


class Plan(msgspec.Struct, array_like=True):
    """What a stream is to be like; sent as its payload."""

    number: int
    items: int
    size: int
    fails: bool
    pause: int
    clean_up: int


class SimulatedWire:
    """A wire whose bytes arrive when the World says."""

    def __init__(self, world: World, loop: Loop, out: Pipe, lag: int) -> None:
        self._world, self._loop, self._out, self._lag = world, loop, out, lag
        self._carried: Carried
        self._state = "idle"
        self._finishing = self._closed = self._eof = self._over = False
        self._finished = anyio.Event()
        self._came: deque[bytes | BaseException] = deque()
        self.peer: SimulatedWire

    # What the connection asks of it.

    def start(self, carried: Carried, runtime: Runtime, name: str) -> None:
        self._carried = carried

    def wake(self) -> None:
        self._wake(self._world.between(0, self._lag))

    def flush(self) -> None:
        self._wake(0)

    def finish(self) -> None:
        self._finishing = True
        self._wake(0)

    async def wait_finished(self) -> None:
        await self._finished.wait()

    async def aclose(self) -> None:
        self._closed = True
        if not (self._eof and self._over) and not self._out.broken:
            self._world.sometimes("a goodbye came too late")
        if not self._eof:
            self._eof = True
            self._out.push_eof()
        self.peer.peer_closed()

    async def receive(self) -> bytes:
        raise NotImplementedError  # only a handshake does

    async def send(self, data: bytes) -> None:
        raise NotImplementedError

    def extra(self, attribute: Any, default: Any = None) -> Any:
        return default

    # Its ends.

    def arrived(self, piece: bytes) -> None:
        self._came.append(piece)
        self._loop.call_soon(self._hand_over)

    def end_of_stream(self) -> None:
        self.arrived(b"")

    def pipe_drained(self) -> None:
        if self._state == "blocked" and self._out.waiting <= self._out.capacity:
            self._state = "woken"
            self._world.after(0, self._write)

    def peer_closed(self) -> None:
        """Nobody reads what is written from now on."""
        if not self._closed and not self._eof:
            self._world.after(self._world.between(0, 3), self.break_, "the peer has gone")

    def break_(self, why: str) -> None:
        self._came.append(ConnectionResetError(why))
        self._loop.call_soon(self._hand_over)

    def _hand_over(self) -> None:
        # In the order in which it came, whichever of the calls comes first.
        what = self._came.popleft()
        if self._closed:
            return
        self._over = self._over or not isinstance(what, bytes) or not what
        if isinstance(what, BaseException):
            self._finished.set()
            self._carried.broke(what)
        elif what:
            self._carried.received(what)
        else:
            self._carried.reached_end()

    def _wake(self, ticks: int) -> None:
        if self._state == "idle":
            self._state = "woken"
            self._world.after(ticks, self._write)

    def _write(self) -> None:
        if self._closed or self._eof:
            return
        frame = self._carried.next_frame()
        if frame is None:
            self._state = "idle"
            if self._finishing:
                self._eof = True
                self._out.push_eof()
                self._finished.set()
            return
        self._out.push(frame)
        self._carried.written()
        if self._out.waiting > self._out.capacity and not self._out.broken:
            self._state = "blocked"
        else:
            self._world.after(0, self._write)


class Served:
    """One run of a handler."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.sent = 0
        self.state = "running"


class Side:
    """One end: its connection, its handler, its consumers."""

    def __init__(self, universe: Universe, name: str, limits: Limits) -> None:
        self.universe, self.name, self.limits = universe, name, limits
        self.served: dict[int, Served] = {}
        self.connection: Connection
        self.peer: Side
        self.wire: SimulatedWire
        self.ends = False
        self.broken = False

    # The handler.

    async def stream(self, plan: Plan) -> AsyncIterator[Any]:
        world = self.universe.world
        served = self._begin(plan)
        try:
            while served.sent < plan.items:
                if plan.pause:
                    await anyio.sleep(world.between(0, plan.pause))
                world.note("yield", self.name, plan.number, served.sent)
                served.sent += 1
                yield (plan.number, served.sent - 1, "x" * plan.size)
            if plan.fails:
                raise Wanted
        except asyncio.CancelledError:
            world.sometimes("a handler was interrupted while it waited")
            raise
        finally:
            await self._clean_up(served)

    async def call(self, plan: Plan) -> Any:
        served = self._begin(plan)
        try:
            await anyio.sleep(self.universe.world.between(0, plan.pause))
            if plan.fails:
                raise Wanted
            return (plan.number, 0, "x" * plan.size)
        finally:
            await self._clean_up(served)

    def handle(self, method: str, payload: msgspec.Raw) -> Any:
        plan = msgspec.msgpack.decode(payload, type=Plan)
        return self.stream(plan) if method == "stream" else self.call(plan)

    def _begin(self, plan: Plan) -> Served:
        world = self.universe.world
        world.note("serve", self.name, plan.number)
        if plan.number in self.served:
            raise world.broken(f"stream {plan.number} is served twice")
        served = self.served[plan.number] = Served(plan)
        running = sum(one.state != "ended" for one in self.served.values())
        if running > self.limits.streams:
            raise world.broken(f"{self.name}: {running} handlers run, {self.limits.streams} may")
        return served

    async def _clean_up(self, served: Served) -> None:
        world = self.universe.world
        served.state = "cleaning up"
        try:
            await anyio.sleep(world.between(0, served.plan.clean_up))
        except asyncio.CancelledError:
            world.sometimes("a handler was interrupted while it cleaned up")
            raise
        finally:
            if self.connection.closed and served.plan.clean_up > self.limits.goodbye_timeout:
                world.sometimes("the clean-up outlived the connection")
            served.state = "ended"
            world.note("served", self.name, served.plan.number)

    # Consumers.

    async def consume(self, plan: Plan, window: int, leaves_after: int, pause: int) -> None:
        world = self.universe.world
        try:
            stream = self.connection.open("stream", plan, window=window)
        except ChannelLost:
            self._expect_end("open")
            world.sometimes("an open after the end")
            return
        except StreamRefused:
            self._expect_full()
            return
        world.note("open", self.name, plan.number)
        taken = 0
        failed = False
        try:
            try:
                while taken != leaves_after:
                    number, index, _ = await anext(stream)
                    if (number, index) != (plan.number, taken):
                        raise world.broken(f"stream {plan.number}: got {(number, index)}, wanted item {taken}")
                    taken += 1
                    world.note("take", self.name, number, index)
                    await anyio.sleep(world.between(0, pause))
            except StopAsyncIteration:
                world.sometimes("a stream came to its end")
                if taken != plan.items:
                    raise world.broken(f"stream {plan.number}: ended after {taken} of {plan.items} items") from None
            except RemoteError:
                world.sometimes("a handler failed")
                failed = True
                if taken != plan.items:
                    raise world.broken(f"stream {plan.number}: failed after {taken} of {plan.items} items") from None
            except ChannelLost:
                self._expect_end(f"stream {plan.number}")
                world.sometimes("the connection was lost under a consumer")
            except asyncio.CancelledError:
                world.sometimes("a consumer was cancelled")
                raise
        finally:
            with anyio.CancelScope(shield=True):
                await stream.aclose()
            served = self.peer.served.get(plan.number)
            if not self.connection.closed:
                # Its clean-up has been awaited, wherever it was when we left.
                if served is None:
                    world.sometimes("a handler never began")
                elif served.state != "ended":
                    raise world.broken(f"stream {plan.number} was closed, its handler is {served.state}")
                else:
                    world.sometimes("a stream was left and its clean-up awaited")
            if failed and not plan.fails:
                raise world.broken(f"stream {plan.number}: failed, and was not to")

    async def ask(self, plan: Plan) -> None:
        world = self.universe.world
        try:
            number, _, _ = await self.connection.call("call", plan)
        except StreamRefused:
            self._expect_full()
        except ChannelLost:
            self._expect_end(f"call {plan.number}")
        except RemoteError:
            if not plan.fails:
                raise world.broken(f"call {plan.number} failed, and was not to") from None
        except asyncio.CancelledError:
            world.sometimes("a call was cancelled")
            raise
        else:
            world.sometimes("a call was answered")
            if number != plan.number or plan.fails:
                raise world.broken(f"call {plan.number} was answered with {number}")

    def _expect_end(self, what: str) -> None:
        if not (self.ends or self.peer.ends or self.broken):
            raise self.universe.world.broken(f"{what}: lost, though nobody ended the connection")

    def _expect_full(self) -> None:
        world = self.universe.world
        world.sometimes("an open was refused")
        if self.connection.session.opened < self.peer.limits.streams:
            raise world.broken(f"{self.name}: refused, with {self.connection.session.opened} streams open")

    async def close(self) -> None:
        self.ends = True
        self.universe.world.note("close", self.name)
        await self.connection.aclose()


class Universe:
    def __init__(self, world: World) -> None:
        self.world = world
        self.loop = Loop(world)
        capacity, delay, pieces = world.pick((0, 60, 400)), world.pick((0, 1, 3, 12)), world.pick((1, 2, 4))
        self.pipes = [Pipe(world, capacity, delay, pieces) for _ in range(2)]
        self.patience = world.pick((3, 10_000))
        limits = [
            Limits(
                streams=world.between(1, 3),
                window_bytes=world.pick((1, 30, 10_000)),
                send_buffer=world.pick((1, 60, 10_000)),
                goodbye_timeout=self.patience,
            )
            for _ in range(2)
        ]
        self.sides = [Side(self, name, limits[i]) for i, name in enumerate("ab")]
        for i, side in enumerate(self.sides):
            side.peer = self.sides[1 - i]
        self.tasks: list[Task] = []

    async def begin(self) -> None:
        """Connect, and let everybody do what they want to."""
        world, sides, runtime = self.world, self.sides, Runtime.current()
        lag = world.pick((0, 1, 4))
        for side, pipe in zip(sides, self.pipes, strict=True):
            side.wire = pipe.writer = SimulatedWire(world, self.loop, pipe, lag)
        for side, pipe in zip(sides, reversed(self.pipes), strict=True):
            pipe.reader = side.wire
            side.wire.peer = side.peer.wire
        for side in sides:
            allowed = Allowed(side.peer.limits.streams, side.peer.limits.message_bytes)
            side.connection = Connection(
                side.wire,
                runtime=runtime,
                peer=side.peer.name,
                handler=side.handle,
                limits=side.limits,
                allowed=allowed,
            )
        busy = world.pick((5, 20, 60))
        for number in range(1, world.between(2, 8)):
            self._plan(number, busy)
        ending = world.below(10)
        if ending < 3:
            world.after(world.below(busy + 20), self._start, world.pick(sides).close())
        elif ending < 5:
            world.after(world.below(busy + 20), self._cut)

    def _plan(self, number: int, busy: int) -> None:
        world, side = self.world, self.world.pick(self.sides)
        items = world.pick((0, 1, 2, 5, 9, 20))
        plan = Plan(
            number,
            items,
            size=world.pick((0, 5, 40)),
            fails=world.chance(15),
            pause=world.pick((0, 0, 1, 5)),
            clean_up=world.pick((0, 0, 2, 15)),
        )
        if world.chance(20):
            what = side.ask(plan)
        else:
            leaves_after = world.between(0, items) if world.chance(25) else -1
            what = side.consume(plan, world.pick((1, 2, 3, 8, 16)), leaves_after, world.pick((0, 0, 1, 4)))
        world.after(world.below(busy), self._start, what, world.between(1, 40) if world.chance(25) else 0)

    def _start(self, what: Any, patience: int = 0) -> None:
        task = self.loop.start(what)
        self.tasks.append(task)
        if patience:
            self.world.after(patience, task.cancel)

    def _cut(self) -> None:
        self.world.note("cut")
        for pipe in self.pipes:
            pipe.cut()
        for side in self.sides:
            side.broken = True
            if any(served.state != "ended" for served in side.served.values()):
                self.world.sometimes("the connection broke while handlers ran")
            self.world.after(self.world.between(0, 5), side.wire.break_, "cut")

    def check(self) -> None:
        self.loop.check()
        for task in self.tasks:
            if task.done() and not task.cancelled() and task.exception() is not None:
                error = task.exception()
                raise self.world.broken(f"a consumer raised {error!r}") from error

    def check_quiet(self) -> None:
        world = self.world
        for task in self.tasks:
            if not task.done():
                raise world.broken(f"waits for ever: {task.get_coro().cr_frame.f_locals.get('plan', task)}")
        for side in self.sides:
            for number, served in side.served.items():
                if served.state != "ended":
                    raise world.broken(f"handler of stream {number} at {side.name} is {served.state}")
            if not side.connection.closed and (side.connection.session._outbound or side.connection.session.opened):
                raise world.broken(f"{side.name}: slots are taken though no stream is open")


def play(world: World) -> None:
    """One universe."""
    universe = Universe(world)
    universe.tasks.append(universe.loop.start(universe.begin()))
    world.run(universe.check, horizon=30_000)
    universe.check_quiet()
    if not any(side.connection.closed for side in universe.sides):
        universe._start(world.pick(universe.sides).close())
        world.run(universe.check, horizon=60_000)
        universe.check_quiet()
    for side in universe.sides:
        if not side.connection._closed.is_set():
            raise world.broken(f"{side.name}: the connection never ended")
    universe.loop.check_left()
