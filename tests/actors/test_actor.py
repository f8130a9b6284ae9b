"""What an actor class must be, told when it is spawned and before anything starts."""

from __future__ import annotations

import copy
import pickle
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from rich.pretty import pretty_repr

from actors.actor import actor, method
from actors.hosts.host_main import HostOrder
from actors.interface import describe
from actors.local_cluster import LocalCluster
from arun.errors import MisuseError, PayloadError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from decimal import Overflow as OnlyForTypeCheckers


class Plain:
    def incr(self) -> int:
        return 1


class PlainGenerator:
    def items(self) -> Iterator[int]:
        yield 1


class PlainStart:
    def on_start(self) -> None: ...

    async def ping(self) -> None: ...


class Echo:
    async def echo(self, value: Any) -> Any:
        return value


class Mute:
    async def _hidden(self) -> None: ...


class ReturnsAnIterator:
    async def items(self) -> AsyncIterator[int]:
        return self._items()

    async def _items(self) -> AsyncIterator[int]:
        yield 1


class One(msgspec.Struct): ...


class Other(msgspec.Struct): ...


class TakesTheImpossible:
    async def put(self, value: One | Other) -> None: ...


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (Plain, r"Plain\.incr is a plain function, .* write `async def incr\(\.\.\.\)`, or call it `_incr`"),
        (PlainGenerator, r"PlainGenerator\.items is a plain generator, .* `async def items\(\.\.\.\)` with `yield`"),
        (PlainStart, r"PlainStart\.on_start is not async; write `async def on_start"),
        (Mute, "Mute has no public method"),
        (ReturnsAnIterator, r"ReturnsAnIterator\.items returns an async iterator.*yielding in it"),
        (TakesTheImpossible, r"TakesTheImpossible\.put: its parameter value has the type .* can't be sent"),
        (Plain(), "is no class"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
async def test_a_class_that_is_no_actor_is_refused_with_the_spelling(cls: Any, message: str) -> None:
    async with LocalCluster(isolation="task") as cluster:
        with pytest.raises(MisuseError, match=message):
            await cluster.spawn(cls)
        assert cluster.list() == []


def test_methods_are_the_public_async_ones_of_the_class_and_its_bases() -> None:
    class Base:
        async def inherited(self) -> int: ...

        def _private(self) -> None: ...

    class Actor(Base):
        limit = 3

        async def own(self, text: str) -> AsyncIterator[str]:
            yield text

        async def on_start(self) -> None: ...

        async def on_stop(self) -> None: ...

        @property
        def shape(self) -> str: ...

        @staticmethod
        def helper() -> None: ...

    methods = describe(Actor).methods
    assert list(methods) == ["inherited", "own"]
    assert methods["own"].streaming
    assert methods["own"].item_type is str
    assert methods["inherited"].item_type is int


class Offers:
    unit = "points"

    @property
    def total(self) -> int:
        return 5

    @staticmethod
    @method(timeout=5)
    async def add(a: int, b: int = 1) -> int:
        return a + b

    @classmethod
    async def name(cls, suffix: str) -> str:
        return f"{cls.__name__}{suffix}"

    @staticmethod
    async def count(to: int) -> AsyncIterator[int]:
        for n in range(to):
            yield n


class OffersMore(Offers):
    pass


@pytest.mark.asyncio
async def test_async_static_and_class_methods_are_called_as_any_other() -> None:
    assert describe(OffersMore).methods["add"].options.timeout == 5
    async with LocalCluster() as cluster:
        more = await cluster.spawn(OffersMore)
        assert (await more.add(3, b=4), await more.add(3)) == (7, 4)
        assert await more.name("!") == "OffersMore!"
        assert [n async for n in more.count(3)] == [0, 1, 2]
        with pytest.raises(TypeError, match=r"OffersMore\.add\(a: int, b: int = 1\)"):
            await more.add()  # type: ignore[call-arg]  # wrong on purpose


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["total", "unit"])
async def test_what_a_handle_cannot_show_is_told_with_what_to_write(name: str) -> None:
    async with LocalCluster(isolation="task") as cluster:
        offers = await cluster.spawn(Offers)
        with pytest.raises(
            AttributeError, match="stay in the actor's process; give the class an `async def` that returns"
        ):
            getattr(offers, name)


def test_a_type_that_cannot_be_resolved_counts_as_any_and_costs_no_other_its_type() -> None:
    class Half:
        async def put(self, known: int, unknown: OnlyForTypeCheckers, bare, *rest: str) -> NoSuchName: ...  # type: ignore[no-untyped-def, name-defined]  # noqa: F821

    put = describe(Half).methods["put"]
    assert put.argument_types == {"known": int, "unknown": Any, "bare": Any, "rest": list[str]}
    assert put.item_type is Any


@pytest.mark.parametrize("wrong", [0, 2.5, "3"])
def test_a_concurrency_that_is_no_number_of_messages_is_refused(wrong: Any) -> None:
    with pytest.raises(MisuseError, match="it must be a whole number, at least 1"):
        actor(concurrency=wrong)
    with pytest.raises(MisuseError, match="it must be a whole number, at least 1"):
        describe(Offers, concurrency=wrong)
    with pytest.raises(MisuseError, match="mailbox=-1: it must be a whole number, at least 0"):
        actor(mailbox=-1)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"restarts": -1}, "restarts=-1 .* at least 0; for as often as it takes, a large one"),
        ({"restarts": float("inf")}, "restarts=inf .* it must be a whole number"),
        ({"restarts": "3"}, "restarts='3' .* it must be a whole number"),
        ({"group": 3}, "group=3: it must be one of the groups of a reservation"),
    ],
)
async def test_options_of_the_wrong_kind_are_refused_by_name(options: Any, told: str) -> None:
    async with LocalCluster(isolation="task") as cluster:
        with pytest.raises(MisuseError, match=told):
            await cluster.spawn(Offers, **options)


@pytest.mark.asyncio
async def test_what_ray_would_be_told_is_answered_with_its_name_here() -> None:
    async with LocalCluster(isolation="task") as cluster:
        with pytest.raises(TypeError, match=r"\(max_concurrency= is Ray's; here: concurrency=\)"):
            await cluster.spawn(Offers, max_concurrency=3)  # type: ignore[call-arg]  # wrong on purpose
        offers: Any = await cluster.spawn(Offers)
        with pytest.raises(AttributeError, match=r"Offers\.add\(.*has no 'remote'; it is called as it is"):
            offers.add.remote(1)
        assert await copy.copy(offers.add)(1) == 2


class Pair:
    def __init__(self, name: str) -> None: ...

    async def ping(self) -> None: ...


@pytest.mark.asyncio
async def test_a_constructor_parameter_that_is_also_an_option_of_spawn_is_pointed_out() -> None:
    async with LocalCluster(isolation="task") as cluster:
        with pytest.raises(
            TypeError, match="name= is an option of spawn\\(\\); give the constructor's name by position"
        ):
            await cluster.spawn(Pair, name="x")
        await cluster.spawn(Pair, "x", name="y")


@pytest.mark.asyncio
async def test_a_handle_says_why_it_cannot_be_pickled() -> None:
    async with LocalCluster(isolation="task") as cluster:
        handle = await cluster.spawn(Pair, "x", name="y")
        with pytest.raises(TypeError, match="Send the actor's name"):
            pickle.dumps(handle)


@pytest.mark.asyncio
async def test_an_attribute_of_an_actor_is_not_set_on_its_handle() -> None:
    async with LocalCluster(isolation="task") as cluster:
        handle = await cluster.spawn(Pair, "x", name="y")
        with pytest.raises(AttributeError, match=r"'left' can't be set on the handle of actor 'y'.*; give the class a"):
            handle.left = 1  # type: ignore[attr-defined]  # a mistake


@pytest.mark.asyncio
async def test_a_handle_in_an_argument_is_refused_with_the_way_out() -> None:
    async with LocalCluster(isolation="task") as cluster:
        echo = await cluster.spawn(Echo, name="y")
        for argument in (echo, {"of": [echo]}):
            with pytest.raises(
                PayloadError, match=r"the handle of actor 'y' is one end of a connection\. Call it here"
            ):
                await echo.echo(argument)
        assert await echo.echo(1) == 1


def test_what_a_host_is_told_shows_in_no_traceback() -> None:
    """Rich shows local variables, and of a Struct all fields, where nothing else is said."""
    order = HostOrder(
        blob=b"blobby", token=b"token!", path="/x", status_fd=1, owner_pid=1, grace=1.0, sys_path=[], pythonpath=None
    )
    assert pretty_repr(order) == "HostOrder(path='/x')"
    assert repr(order) == "<HostOrder for /x>"


@pytest.mark.asyncio
@pytest.mark.parametrize("name", ["", 3])
async def test_the_name_of_an_actor_is_text(name: Any) -> None:
    async with LocalCluster(isolation="task") as cluster:
        with pytest.raises(MisuseError, match=f"name={name!r}: an actor's name is text, or left out"):
            await cluster.spawn(Echo, name=name)
