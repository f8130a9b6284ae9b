"""Frames: what is packed comes out again however it is cut, and anything else is one ProtocolError."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from arun.channel.codec import FRAME_BYTES, FRAME_MESSAGES, FrameReader, encode_message
from arun.channel.messages import Cancel, Credit, End, Fail, Goodbye, Hello, Item, Open, Ping, Pong, SessionMessage
from arun.channel.outbox import Outbox
from arun.errors import ProtocolError

ids = st.integers(1, 2**63 - 1)
counts = st.integers(1, 2**31 - 1)
payloads = st.builds(
    lambda value: Raw(msgspec.msgpack.encode(value)),
    st.recursive(st.none() | st.integers(-(2**63), 2**63) | st.text() | st.binary(), lambda inner: st.lists(inner)),
)
messages = st.one_of(
    st.builds(Open, ids, st.text(min_size=1, max_size=20), counts, counts, payloads),
    st.builds(Item, ids, payloads),
    st.builds(Credit, ids, counts, counts),
    st.builds(Fail, ids, st.text(min_size=1, max_size=20), st.text(), st.text()),
    st.builds(Goodbye, st.text()),
    *(st.builds(kind, ids) for kind in (End, Cancel)),
    *(st.builds(kind, counts) for kind in (Ping, Pong)),
)


def reader(expected=SessionMessage, frame_bytes=2**22):
    return FrameReader("the peer", expected, frame_bytes)


def pack(*pending):
    outbox = Outbox()
    for message in pending:
        outbox.append(encode_message(message))
    frames = []
    while (frame := outbox.take_frame()) is not None:
        frames.append(frame)
    assert (outbox.size, outbox.taken, outbox.appended) == (0, len(pending), len(pending))
    return frames


def unpack(reader, *chunks):
    for chunk in chunks:
        reader.feed(chunk)
        while (messages := reader.next_frame()) is not None:
            yield from messages


MEBIBYTE = encode_message(Item(1, Raw(msgspec.msgpack.encode(bytes(2**20)))))


def raw(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


@given(st.lists(messages, min_size=1, max_size=40), st.lists(st.integers(1, 50), max_size=50))
def test_messages_survive_any_cut_of_the_bytes(sent, cuts):
    data = b"".join(pack(*sent))
    chunks, start = [], 0
    for cut in cuts:
        chunks.append(data[start : start + cut])
        start += cut
    assert list(unpack(reader(), *chunks, data[start:])) == sent


@given(st.lists(messages, min_size=1, max_size=5), st.data())
def test_a_mutated_frame_gives_legal_messages_or_one_protocol_error(sent, data):
    mutated = bytearray(b"".join(pack(*sent)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mutated) - 1))
        match data.draw(st.sampled_from(["flip", "insert", "delete", "cut"])):
            case "flip":
                mutated[at] ^= 1 << data.draw(st.integers(0, 7))
            case "insert":
                mutated[at:at] = data.draw(st.binary(min_size=1, max_size=8))
            case "delete" if len(mutated) > 1:
                del mutated[at]
            case _:
                del mutated[max(1, at) :]
    try:
        received = list(unpack(reader(), bytes(mutated)))
    except ProtocolError:
        return
    assert all(isinstance(message, SessionMessage) for message in received)


@given(st.binary(max_size=200))
def test_random_bytes_never_raise_anything_but_protocol_error(junk):
    for data in (junk, raw(junk)):
        with contextlib.suppress(ProtocolError):
            list(unpack(reader(), data))


def test_whatever_is_pending_goes_into_one_frame():
    assert len(pack(*(End(n) for n in range(1, 101)))) == 1


def test_a_frame_holds_at_most_4096_messages():
    frames = pack(*(End(1) for _ in range(FRAME_MESSAGES + 1)))
    assert [len(list(unpack(reader(), frame))) for frame in frames] == [FRAME_MESSAGES, 1]


def test_a_frame_has_at_most_one_mebibyte():
    half = Item(1, Raw(msgspec.msgpack.encode(b"x" * (FRAME_BYTES // 2))))
    small = End(1)
    frames = pack(small, half, half, small)
    assert [len(list(unpack(reader(), frame))) for frame in frames] == [2, 2]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\xff\xff\xff\xff", "a frame of 4294967295 bytes"),
        (raw(b""), "a frame of 0 bytes"),
        (raw(b"\x90\xc0"), "a frame of 0 messages"),
        (raw(b"\xc0\xc0"), "a frame of 0 messages"),
        (raw(b"\xdd\xff\xff\xff\xff"), "a frame of 4294967295 messages"),
        (raw(b"\xdc\x10\x01" + encode_message(End(1)) * 4097), "a frame of 4097 messages"),
        (raw(b"\x91\x92\x07\x00"), ">= 1"),
        (raw(b"\x91\x94\x06\x01\xff\x01"), ">= 1"),
        (raw(b"\x91\x94\x06\x01\x01\xce\xff\xff\xff\xff"), "<= 2147483647"),
        (raw(b"\x91\x93\x07\x01\x01"), "at most length 1"),
        (raw(b"\x91\x92\x63\x01"), "Invalid value 99"),
        (raw(encode_message([Hello(1, 1, bytes(32), bytes(32), 1, 1)])), "Invalid value 2"),
        (raw(b"\x91\x92\x0c\xa2\xff\xff"), "utf-8"),
        (raw(b"\x91\x93\x05\x01" + b"\x91" * 200_000), "recursion"),
        (raw(b"\x91\x92\x07\x01\xc0"), "trailing"),
        (raw(b"\x91\x92\x07"), "truncated"),
    ],
)
def test_what_is_refused(data, said):
    with pytest.raises(ProtocolError, match=said):
        list(unpack(reader(), data))


def test_a_large_frame_is_refused_by_its_length_alone():
    with pytest.raises(ProtocolError, match="2 to 100 are legal"):
        list(unpack(reader(frame_bytes=100), (105).to_bytes(4, "big")))


def test_a_reader_that_expects_other_messages_goes_on_with_the_bytes_that_are_there():
    first = reader(Hello)
    hello = Hello(1, 1, bytes(32), bytes(32), 1, 1)
    first.feed(b"".join((*pack(hello), *pack(End(3)), b"\x00")))
    assert first.next_frame() == [hello]
    second = first.switch(SessionMessage, 1000)
    assert second.next_frame() == [End(3)]
    assert second.next_frame() is None
