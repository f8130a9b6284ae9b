"""Engines and actors as functions of a row. What they call is a Protocol: pools and clusters stand above this."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, cast

import anyio
import msgspec

from arun.data.block import Row
from arun.errors import ActorDied, MisuseError
from arun.guards import shown

__all__ = ("ActorCall", "Ask", "Cluster", "Embed", "Embedder", "Engine", "OpenActors", "PromptOf", "prefix_of")

#: A column, or a function of a row.
PromptOf: TypeAlias = str | Callable[[Row], Any]


class Engine(Protocol):
    """What answers prompts: an :class:`~actors.EnginePool`, or anything of that shape."""

    @property
    def complete(self) -> Callable[..., Awaitable[Any]]:
        """Given a prompt and options, a completion: ``text``, ``finish_reason``, ``usage`` with numbers of tokens."""
        ...


class Embedder(Protocol):
    """What embeds texts: an :class:`~actors.EnginePool` of such an engine, or anything of that shape."""

    @property
    def embed(self) -> Callable[..., Awaitable[Any]]:
        """Given a prompt and options, an embedding: ``data``, little-endian float32, and ``prompt_tokens``."""
        ...


class Cluster(Protocol):
    """What starts actors: a cluster of :mod:`actors`."""

    @property
    def spawn(self) -> Callable[..., Awaitable[Any]]:
        """Given a class and its arguments, start one, and return its handle."""
        ...

    def stop(self, actor: object) -> Awaitable[None]:
        """End it."""
        ...

    @property
    def health(self) -> Callable[[object], Awaitable[Any]]:
        """How it fares: ``state`` is ``"dead"`` once it is not started again any more."""
        ...


class Ask:
    """Asks an engine for each row, and adds the answer to it.

    :param prompt: text, token ids or chat messages; a column or a function of the row.
    :param output: column of the answer; ``{output}_finish_reason``, ``{output}_prompt_tokens`` and
        ``{output}_completion_tokens`` come beside it.
    :param fields: a type that the answer is the JSON of; its fields become columns.
    :param chat: whether a prompt that is text is a user's message.
    :param system: a message before it.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: PromptOf,
        output: str,
        options: Mapping[str, Any],
        *,
        fields: type | None = None,
        chat: bool = False,
        system: str | None = None,
    ) -> None:
        _check_engine(engine, "complete")
        self.engine = engine
        self.prompt = prompt
        self.output = output
        self.options = {"lane": "batch", **options, **({} if fields is None else {"structured_outputs": fields})}
        check_options = getattr(engine, "check_options", None)
        if check_options is not None:  # else each row would fail of them, and be left out by on_error="skip"
            check_options(self.options, chat=chat)
        self.fields = fields
        self.chat = chat
        self.system = system

    @property
    def batch_limit(self) -> int | None:
        """Most rows at a time: as many as the engine takes."""
        return getattr(self.engine, "batch_limit", None)

    @property
    def declared(self) -> tuple[Any, ...]:
        """What makes another answer of it, but for the engine."""
        return (self.prompt, self.output, self.options, self.fields, self.chat, self.system)

    async def __call__(self, row: Row) -> Row:
        completion = await self.engine.complete(self.prompt_of(row), **self.options)
        output, usage = self.output, completion.usage
        answered = {
            **row,
            output: completion.text,
            f"{output}_finish_reason": completion.finish_reason,
            f"{output}_prompt_tokens": usage.prompt_tokens,
            f"{output}_completion_tokens": usage.completion_tokens,
        }
        return answered if self.fields is None else {**answered, **_parsed(completion.text, self.fields)}

    def prompt_of(self, row: Row) -> Any:
        """The prompt of a row."""
        prompt = _value(row, self.prompt)
        if not self.chat:
            return prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return messages if self.system is None else [{"role": "system", "content": self.system}, *messages]


class Embed:
    """Embeds a text of each row; ``{output}_prompt_tokens`` comes beside the vector, float32."""

    def __init__(self, engine: Embedder, prompt: PromptOf, output: str, options: Mapping[str, Any]) -> None:
        _check_engine(engine, "embed")
        self.engine = engine
        self.prompt = prompt
        self.output = output
        self.options = {"lane": "batch", **options}

    @property
    def batch_limit(self) -> int | None:
        """Most rows at a time: as many as the engine takes."""
        return getattr(self.engine, "batch_limit", None)

    @property
    def declared(self) -> tuple[Any, ...]:
        """What makes another vector of it, but for the engine."""
        return (self.prompt, self.output, self.options)

    async def __call__(self, row: Row) -> Row:
        import numpy as np

        embedding = await self.engine.embed(_value(row, self.prompt), **self.options)
        vector = np.frombuffer(embedding.data, "<f4")
        return {**row, self.output: vector, f"{self.output}_prompt_tokens": embedding.prompt_tokens}


class ActorCall:
    """Calls a method of one of several actors for each row: of the one that has the fewest calls at work.

    The actors are started by the run, and stopped at its end. One that has died is started again as its options say;
    if it is not, the others have its rows.

    :param in_flight: most calls of one actor at a time.
    """

    def __init__(
        self,
        cluster: Cluster,
        cls: type[Any],
        method: str,
        *,
        args: Sequence[Any],
        options: Mapping[str, Any],
        replicas: int,
        in_flight: int,
    ) -> None:
        if not callable(getattr(cls, method, None)):
            raise MisuseError(f"map_actor(): {cls.__qualname__} has no method {method!r}")
        self.cluster = cluster
        self.cls = cls
        self.method = method
        self.replicas = replicas
        self.in_flight = in_flight
        self.args = args
        self.options = options

    @property
    def batch_limit(self) -> int:
        """Most rows at a time."""
        return self.replicas * self.in_flight

    async def __call__(self, row: Row) -> Row:
        raise AssertionError("only what open() gives has actors to call")

    async def open(self) -> OpenActors:
        """Start the actors."""
        opened = OpenActors(self.cluster, self.cls.__name__, self.method)
        try:
            for _ in range(self.replicas):
                opened.add(await self.cluster.spawn(self.cls, *self.args, **self.options))
        except BaseException:
            with anyio.CancelScope(shield=True):
                await opened.aclose()
            raise
        return opened


class OpenActors:
    """Started actors, for the length of a run."""

    def __init__(self, cluster: Cluster, name: str, method: str) -> None:
        self._cluster = cluster
        self._name = name
        self._method = method
        self._actors: list[_Loaded] = []
        self._died: Exception | None = None

    def add(self, actor: Any) -> None:
        """One more."""
        self._actors.append(_Loaded(actor))

    async def __call__(self, row: Row) -> Row:
        """Ask one of them.

        :raises ActorDied: it died meanwhile, or all have, for good.
        """
        alive = [one for one in self._actors if not one.dead]
        if not alive:
            raise ActorDied(
                f"every actor {self._name} has died for good: {self._died}. restarts= has them started again"
            ) from self._died
        asked = min(alive, key=lambda one: one.load)
        asked.load += 1
        try:
            return cast("Row", await getattr(asked.actor, self._method)(row))
        except ActorDied as exc:
            self._died = exc
            asked.dead = (await self._cluster.health(asked.actor)).state == "dead"
            raise
        finally:
            asked.load -= 1

    async def aclose(self) -> None:
        """Stop them."""
        while self._actors:
            await self._cluster.stop(self._actors.pop().actor)


class _Loaded:
    """An actor, how many calls it has at work, and whether it is not started again any more."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.load = 0
        self.dead = False


def prefix_of(ask: Ask | Embed) -> Callable[[Row], str]:
    """What rows are grouped by, so that those whose prompts begin alike run together."""

    def prefix(row: Row) -> str:
        try:
            prompt = ask.prompt_of(row) if isinstance(ask, Ask) else _value(row, ask.prompt)
        except Exception:  # noqa: BLE001 - whatever it is, the row's own call tells, and on_error= decides
            return ""
        return prompt if isinstance(prompt, str) else repr(prompt)

    return prefix


def _check_engine(engine: object, method: str) -> None:
    if not callable(getattr(engine, method, None)):
        raise MisuseError(f"{shown(engine)} has no {method}(); give an EnginePool, or anything with such a method")


def _value(row: Row, prompt: PromptOf) -> Any:
    if callable(prompt):
        return prompt(row)
    if prompt not in row:
        raise MisuseError(f"there is no column {prompt!r} with the prompt; the columns are {', '.join(row)}")
    return row[prompt]


def _parsed(text: str, fields: type) -> Row:
    if hasattr(fields, "model_validate_json"):
        return cast("Row", cast("Any", fields).model_validate_json(text).model_dump(mode="json"))
    found: Any = msgspec.to_builtins(msgspec.json.decode(text, type=fields))
    if not isinstance(found, dict):
        raise MisuseError(f"generate(fields={shown(fields)}): its JSON is no object, so it has no fields")
    return cast("Row", found)
