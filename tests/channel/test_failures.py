"""Errors of handlers, over every transport and on both backends: they arrive as themselves, or tell what they were."""

from __future__ import annotations

import anyio
import msgspec
import pytest
from anyio import wait_all_tasks_blocked

from arun.channel import register_error
from arun.channel.failures import rebuild
from arun.channel.messages import Fail
from arun.codec import encode
from arun.errors import (
    ActorDied,
    ArunError,
    MisuseError,
    RemoteError,
    RequestError,
)

pytestmark = pytest.mark.anyio


async def count_to(method, payload):
    for n in range(msgspec.msgpack.decode(payload)):
        yield n


@register_error
class Overheated(ArunError):
    pass


@register_error
class NoSuchUser(Exception):
    """Makes its text of what it is given, as many do."""

    def __init__(self, user: str = "", tried: int = 0, connection: object = None) -> None:
        super().__init__(f"there is no user {user}")
        self.user = user
        self.tried = tried
        self.connection = connection


@register_error
class Unpicklable(ArunError):
    def __reduce__(self):
        raise TypeError("it can't be pickled")


class Unknown(Exception):
    pass


@pytest.mark.parametrize(
    "error",
    [
        ValueError("five is too many"),
        KeyError("a"),
        RequestError("too long"),
        Overheated("91 degrees"),
        OSError("gone"),
        FileNotFoundError(2, "No such file"),
        KeyError(("a", 1)),
        ValueError(),
        ValueError("a", b"b", 3.5, None),
        NotImplementedError("later"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    ],
    ids=lambda error: repr(error)[:40],
)
async def test_a_registered_error_arrives_as_itself_with_the_remote_traceback(link, error):
    async def deep_in_the_handler():
        raise error

    async def handler(method, payload):
        yield 1
        await deep_in_the_handler()

    connection = await link(handler)
    stream = connection.open("fail")
    assert await anext(stream) == 1
    with pytest.raises(type(error)) as caught:
        await anext(stream)
    assert type(caught.value) is type(error)
    assert caught.value.args == error.args
    assert "deep_in_the_handler" in "".join(caught.value.__notes__)


@pytest.mark.parametrize(
    ("error", "text", "attributes"),
    [
        (OSError(2, "No such file", "a", None, "b"), "[Errno 2] No such file: 'a' -> 'b'",
         {"errno": 2, "filename": "a", "filename2": "b"}),
        (ImportError("no", name="absent", path="/p"), "no", {"name": "absent", "path": "/p"}),
        (ActorDied("gone", actor="a", reason="killed", generation=3), "gone", {"actor": "a", "generation": 3}),
        (NoSuchUser("bob", 3, object()), "there is no user bob", {"user": "bob", "tried": 3, "connection": None}),
        (ValueError("many", *range(9000)), str(("many", *range(9000)))[:16_384], {}),
        (ValueError("odd", object), f"('odd', {object})", {}),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)  # fmt: skip
async def test_the_attributes_of_an_error_arrive_with_it_as_far_as_they_can_be_written(link, error, text, attributes):
    async def handler(method, payload):
        raise error
        yield

    connection = await link(handler)
    with pytest.raises(type(error)) as caught:
        await anext(connection.open("fail"))
    assert str(caught.value) == text
    assert {name: getattr(caught.value, name) for name in attributes} == attributes


async def test_an_error_whose_details_cannot_be_had_arrives_all_the_same(link):
    async def handler(method, payload):
        raise Unpicklable("odd")
        yield

    connection = await link(handler)
    with pytest.raises(Unpicklable, match="odd"):
        await anext(connection.open("fail"))


async def test_a_forged_attribute_of_an_error_does_not_hide_it():
    forged = Fail(1, "builtins.ValueError", "odd", "", encode([None, {"__notes__": 5, "__cause__": 5}]))
    error = rebuild(forged, "peer", "method")
    assert str(error) == "odd"
    assert "raised at peer" in error.__notes__[0]


async def test_any_other_error_arrives_as_remote_error(link):
    async def handler(method, payload):
        raise Unknown("odd")
        yield

    connection = await link(handler)
    with pytest.raises(RemoteError, match=r"Unknown: odd") as caught:
        await connection.call("fail")
    assert caught.value.kind.endswith(".Unknown")
    assert "in handler" in caught.value.remote_traceback


class Wordless(Exception):
    def __str__(self):
        raise ValueError


class Closed(Exception):
    @property
    def args(self):
        raise ValueError


@pytest.mark.parametrize("error", [Wordless(1, 2), Closed()], ids=["its text", "its arguments"])
async def test_an_error_that_cannot_even_say_its_message_arrives(link, error):
    async def handler(method, payload):
        raise error
        yield

    connection = await link(handler)
    with pytest.raises(RemoteError, match=r": \(its text can't be had: that raises ValueError\)"):
        await connection.call("fail")


async def test_a_group_of_errors_names_those_that_are_in_it(link):
    async def handler(method, payload):
        raise ExceptionGroup(
            "several", [ValueError("one"), ExceptionGroup("in it", [Unknown("two"), KeyError("three")])]
        )
        yield

    connection = await link(handler)
    with pytest.raises(RemoteError) as caught:
        await connection.call("fail")
    assert "builtins.ValueError: one; " in str(caught.value)
    assert "Unknown: two; builtins.KeyError: three" in str(caught.value)


async def test_of_a_large_group_the_first_errors_are_named(link):
    async def handler(method, payload):
        raise ExceptionGroup("many", [ExceptionGroup("each", [ValueError(str(n))]) for n in range(1000)])
        yield

    connection = await link(handler)
    with pytest.raises(RemoteError, match=r"ValueError: 0; .*ValueError: 7; \.\.\."):
        await connection.call("fail")


async def test_an_error_passed_on_by_a_process_between_keeps_its_origin(link):
    async def first(method, payload):
        raise Unknown("odd")
        yield

    behind = await link(first)

    async def second(method, payload):
        yield await behind.call(method)

    connection = await link(second)
    with pytest.raises(RemoteError) as caught:
        await connection.call("fail")
    assert str(caught.value).endswith(".Unknown: odd")
    assert str(caught.value).count("Unknown") == 1
    assert "in first" in caught.value.remote_traceback


async def test_texts_of_errors_are_bounded(link):
    async def handler(method, payload):
        raise ValueError("\ud800" + "x" * 1_000_000)
        yield

    connection = await link(handler)
    with pytest.raises(ValueError, match="xxx") as caught:
        await connection.call("fail")
    assert len(str(caught.value)) + len("".join(caught.value.__notes__)) < 100_000


async def test_a_handler_that_cannot_be_iterated_fails_its_stream_only(link):
    connection = await link(lambda method, payload: None if method == "none" else count_to(method, payload))
    with pytest.raises(TypeError, match="async"):
        await connection.call("none")
    assert await connection.call("count", 1) == 0


async def test_an_error_in_the_clean_up_of_a_cancelled_handler_does_not_break_the_connection(link):
    async def handler(method, payload):
        try:
            yield 1
            await anyio.sleep_forever()
        finally:
            raise ValueError("in the clean-up")

    connection = await link(handler)
    stream = connection.open("fail")
    assert await anext(stream) == 1
    await wait_all_tasks_blocked()
    await stream.aclose()
    stream = connection.open("fail")
    assert await anext(stream) == 1
    await stream.aclose()


async def test_an_error_that_cannot_be_rebuilt_is_refused_when_registered():
    class Two(Exception):
        def __init__(self, a, b):
            super().__init__(a, b)

    with pytest.raises(MisuseError, match="defaults"):
        register_error(Two)
