"""The actor's side: one object, its messages, its life. The same code in a process of ours, in Ray's, and in a task.

Everything, the outcome of the start included, goes over the channel.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import anyio
import msgspec

from actors.hosts.call_chain import CHAIN, Chain, Turn, enter, refuse_cycle
from actors.hosts.turns import Turns
from arun.channel.extensions import unpack
from arun.errors import MailboxFull, MisuseError
from arun.runtime import Background, Runtime

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from actors.interface import ActorSpec, Method

__all__ = ("START", "Host")

START = "@start"
"""Method that starts an actor; answered when it is ready, or with the error that kept it from it.

No class has a method of that name."""


class Host:
    """One actor's object and its life, which is one task, so that ``on_start`` may enter what ``on_stop`` leaves.

    ``on_stop`` is not run where ``on_start`` did not succeed, as with ``__aenter__`` and ``__aexit__``.
    """

    def __init__(self, load: Callable[[], ActorSpec]) -> None:
        self._load = load
        self._serving: _Serving | None = None
        self._error: Exception | None = None
        self._asked = anyio.Event()
        self._started = anyio.Event()
        self._stop = anyio.Event()
        self._life: Background[None] | None = None

    def begin(self, hang_up: Callable[[], Awaitable[None]]) -> None:
        """Begin its life: at :data:`START` the object is built and its ``on_start`` runs; the answer tells how it went.

        :param hang_up: closes the channel and waits until the running messages have cleaned up.
        """
        self._life = Runtime.current().start(self._live, hang_up, name="actor")

    async def start(self) -> None:
        """Start the object, once, whoever asks for it; returns when it is ready.

        :raises Exception: what the constructor or ``on_start`` raised.
        """
        self._asked.set()
        await self._started.wait()
        if self._error is not None:
            raise self._error
        if self._serving is None:
            raise MisuseError("the actor was stopped while it was starting")

    def stop(self) -> None:
        """Ask it to hang up and run ``on_stop``; a start that goes on is cancelled."""
        if self._started.is_set():
            self._stop.set()
        elif self._life is not None:
            self._life.cancel()

    async def wait_ended(self) -> None:
        """Wait for the end.

        :raises Exception: what ``on_stop`` raised.
        """
        if self._life is not None:
            await self._life.wait()

    async def _live(self, hang_up: Callable[[], Awaitable[None]]) -> None:
        # Not before the owner is connected: it could neither tell an early death nor end what it does not know.
        await self._asked.wait()
        # No cancel scope may be open around on_start: what it enters stays entered.
        instance: object | None = None
        try:
            spec = self._load()
            built = spec.cls(*spec.args, **spec.kwargs)
            await _lifecycle(built, "on_start")
            instance, self._serving = built, _Serving(built, spec)
        except Exception as exc:  # noqa: BLE001  # whatever it is, START tells it
            self._error = exc
        finally:
            self._started.set()
        await self._stop.wait()
        await hang_up()
        if instance is not None:
            await _lifecycle(instance, "on_stop")

    def handle(self, method: str, payload: msgspec.Raw) -> AsyncIterator[object] | Awaitable[object]:
        """Answer one message: its result, or the items of a stream."""
        if self._serving is None or method == START:
            return self.start()
        return self._serving.answer(method, payload)

    def load(self) -> tuple[int, int, int]:
        """Messages that run, that wait, and that may wait. From any thread."""
        serving = self._serving
        return (0, 0, 0) if serving is None else (serving.running, serving.waiting, serving.mailbox)


class _Serving:
    """A started actor: how messages become calls, and whose turn it is."""

    def __init__(self, instance: object, spec: ActorSpec) -> None:
        self._callees = {name: _Callee(method, instance) for name, method in spec.interface.methods.items()}
        self._options = spec.interface.options
        self._turns = Turns(self._options.concurrency)
        self._class_name = spec.interface.class_name
        self._name = spec.name
        self._key = spec.key
        self.mailbox = self._options.mailbox
        self.waiting = 0

    @property
    def running(self) -> int:
        return self._turns.running

    def answer(self, method: str, payload: msgspec.Raw) -> AsyncIterator[object] | Awaitable[object]:
        callee = self._callees.get(method)
        if callee is None:
            raise MisuseError(f"{self._class_name} has no method {method!r}; it has {', '.join(self._callees)}")
        return self._items(callee, method, payload) if callee.streaming else self._result(callee, method, payload)

    async def _result(self, callee: _Callee, method: str, payload: msgspec.Raw) -> object:
        args, kwargs, turn = await self._begin(callee, method, payload)
        try:
            return await callee.function(*args, **kwargs)
        finally:
            self._end_turn(turn)

    async def _items(self, callee: _Callee, method: str, payload: msgspec.Raw) -> AsyncIterator[object]:
        args, kwargs, turn = await self._begin(callee, method, payload)
        stream, turns = callee.function(*args, **kwargs), self._turns
        step, release = stream.__anext__, turns.release
        try:
            while True:
                try:
                    item = await step()
                except StopAsyncIteration:
                    return
                finally:
                    turn.held = False
                    release()
                yield item
                if not turns.take():
                    await turns.wait()
                turn.held = True
        finally:
            if stream.ag_frame is not None:  # it stands at a yield: its clean-up is a step like any other
                with anyio.CancelScope(shield=True):
                    await turns.wait()
                    turn.held = True
                    try:
                        await stream.aclose()
                    finally:
                        self._end_turn(turn)

    async def _begin(
        self, callee: _Callee, method: str, payload: msgspec.Raw
    ) -> tuple[tuple[Any, ...], dict[str, Any], Turn]:
        """Wait for the first turn of a message, in its own task."""
        args, kwargs, chain = callee.arguments(payload)
        label = f"{self._name}.{method}"
        if chain:
            refuse_cycle(chain, self._key, label, self._options.concurrency)
        turn = Turn((*chain, (self._key, label)))
        enter(turn)
        if not self._turns.take():
            await self._first_turn(label)
        turn.held = True
        return args, kwargs, turn

    async def _first_turn(self, label: str) -> None:
        if self.waiting >= self._options.mailbox:
            raise MailboxFull(
                f"the mailbox of actor {self._name!r} is full: {self.waiting} messages wait for their turn, and "
                f"{label} was not taken. Send fewer at a time, try again later, or give {self._class_name} a larger "
                "@actor(mailbox=...) or concurrency"
            )
        self.waiting += 1
        try:
            await self._turns.wait()
        finally:
            self.waiting -= 1

    def _end_turn(self, turn: Turn) -> None:
        turn.held = False
        self._turns.release()


class _Callee:
    """One method of the object, with the decoders of its arguments."""

    __slots__ = ("_by_name", "_decoders", "_method", "function", "streaming")

    def __init__(self, method: Method, instance: object) -> None:
        self.function: Callable[..., Any] = getattr(instance, method.name)
        self.streaming = method.streaming
        self._method = method
        self._decoders = {
            name: msgspec.msgpack.Decoder(kind, ext_hook=unpack) for name, kind in method.argument_types.items()
        }
        # Arguments by name alone, as nearly every signature takes them, need no matching.
        self._by_name = all(p.kind in _NAMEABLE for p in method.signature.parameters.values())

    def arguments(self, payload: msgspec.Raw) -> tuple[tuple[Any, ...], dict[str, Any], Chain]:
        """Decode what :meth:`Method.bind` gave to the caller, and the chain of calls that the message comes from.

        :raises MisuseError: a value is not of its parameter's type.
        """
        named = _NAMED.decode(payload)
        chain: Chain = _CHAIN.decode(named.pop(CHAIN)) if CHAIN in named else ()
        values: OrderedDict[str, Any] = OrderedDict()
        for name, raw in named.items():
            try:
                values[name] = self._decoders[name].decode(raw)
            except Exception as exc:  # a type's own __post_init__ may raise anything
                raise MisuseError(f"{self._method.label}: its argument {name} is wrong: {exc}") from exc
        if self._by_name:
            return (), values, chain
        bound = inspect.BoundArguments(self._method.signature, values)
        return bound.args, bound.kwargs, chain


_NAMEABLE = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_NAMED = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])
_CHAIN = msgspec.msgpack.Decoder(list[tuple[str, str]])


async def _lifecycle(instance: object, name: str) -> None:
    hook = getattr(instance, name, None)
    if hook is not None:
        await hook()
