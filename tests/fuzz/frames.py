"""Mutated frames against the session core: bytes in, and nothing but a ProtocolError or a legal state may come out.

A *universe* is one Session with its FrameReader, a user that behaves and a peer that may say anything. It is a list of
operations, each of them plain data, so a universe that fails is printed as a program that replays it, cut down to the
operations that are needed. Universes come in blocks; a block is made from the seed and its own number only.

usage: python -m tests.fuzz.frames SEED FRAMES
"""

from __future__ import annotations

import base64
import gc
import sys
import time
import zlib
from collections import Counter
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import msgspec

from arun.channel.codec import FRAME_BYTES, SESSION_FRAME_BYTES, FrameReader, decoder_for, encode_message
from arun.channel.halves import Allowed, Arrival, Batch, Effects, Inbound, Outbound
from arun.channel.limits import Limits
from arun.channel.messages import (
    Cancel,
    Challenge,
    Credit,
    End,
    Fail,
    Goodbye,
    Hello,
    Item,
    ItemPart,
    Items,
    LargeItem,
    Open,
    OpenPart,
    Ping,
    Pong,
    SessionMessage,
    Welcome,
)
from arun.channel.session import Session
from arun.errors import ChannelLost, PayloadError, ProtocolError, StreamRefused

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("Failure", "Universe", "block", "fuzz", "replay", "resident", "unpack")

STREAMS = 4
LIMITS = Limits(streams=STREAMS, message_bytes=2**20, window_bytes=300)
BLOCK = 2_000
UNIVERSE_STEPS = 30
MUTANTS = 6  # of each frame
FRAME_LIMIT = SESSION_FRAME_BYTES
HANDSHAKE_BYTES = 4096
RECEIVE_BYTES = 2**16  # that a socket gives at a time

# What a half of a stream may become. Written down once more, so that a change of the session's table shows.
MAY_BECOME = {
    "open": {"open", "cancelling", "closed"},
    "cancelling": {"cancelling", "closed"},
    "closed": {"closed"},
}

Op = tuple[Any, ...]


class Point(msgspec.Struct):
    """A type that items are decoded into."""

    x: int
    tags: list[str] = []


DECODERS = [decoder_for(kind) for kind in (Any, int, str, bytes, Point, dict[str, Point], list[float])]


class Failure(Exception):
    """Something happened that must not."""


class Universe:
    """One session under attack.

    :ivar counts: what happened, by name.
    """

    def __init__(self, counts: Counter[str] | None = None) -> None:
        self.counts: Counter[str] = Counter() if counts is None else counts
        self.session = Session(peer="the peer", limits=LIMITS, allowed=Allowed(STREAMS, 2**20))
        self.reader = _reader()
        self.opened: list[Inbound] = []
        self.serving: list[Outbound] = []
        self.over = False
        self._closed = False
        self._states: dict[Inbound | Outbound, str] = {}
        self._interrupted: set[Outbound] = set()
        self._woken: set[Inbound | Outbound] = set()

    def run(self, ops: list[Op]) -> None:
        """Do these operations, as far as the connection lasts.

        :raises Failure: something happened that must not.
        """
        for op in ops:
            if self.over:
                return
            self.do(op)

    def do(self, op: Op) -> None:
        """Do one operation.

        :raises Failure: something happened that must not.
        """
        try:
            getattr(self, f"_{op[0]}")(*op[1:])
        except Failure:
            raise
        except Exception as exc:
            raise Failure(f"{op[0]} raised {exc!r}") from exc

    # What the peer does.

    def _feed(self, data: bytes) -> None:
        for at in range(0, len(data), RECEIVE_BYTES):
            if not self.over:
                self._receive(data[at : at + RECEIVE_BYTES])

    def _receive(self, data: bytes) -> None:
        session, counts = self.session, self.counts
        self.reader.feed(data)
        if self.reader.held > FRAME_LIMIT + RECEIVE_BYTES:
            raise Failure(f"the reader holds {self.reader.held} bytes")
        while True:
            try:
                messages = self.reader.next_frame()
            except ProtocolError as exc:
                counts["refused by the reader"] += 1
                _look_at(exc)
                # The session never sees what its reader refuses. So it lives on here, with another reader.
                self.reader = _reader()
                return
            if messages is None:
                return
            said = session.outbox.size
            try:
                effects = session.receive(messages)
            except ProtocolError as exc:
                counts["refused by the session"] += 1
                _look_at(exc)
                self.over = True
                self._end("protocol error")
                return
            if session.outbox.size != said:
                raise Failure("receiving made the session talk without a bound")
            counts["accepted"] += 1
            self._take_in(effects)
            self._check()

    def _hello(self, kind: str, data: bytes) -> None:
        """The same bytes, but before authentication."""
        expected: Any = {"challenge": Challenge, "hello": Hello, "welcome": Welcome | Goodbye}[kind]
        reader: FrameReader[Any] = FrameReader("a stranger", expected, HANDSHAKE_BYTES)
        reader.feed(data)
        try:
            said = reader.next_frame()
            self.counts["stranger waited for" if said is None else "stranger understood"] += 1
        except ProtocolError:
            self.counts["stranger refused"] += 1

    def _decode(self, which: int, data: bytes) -> None:
        """The same bytes as the payload of an item of a declared type."""
        try:
            DECODERS[which].decode(msgspec.Raw(data))
            self.counts["payload decoded"] += 1
        except PayloadError:
            self.counts["payload refused"] += 1

    # What the user does.

    def _open(self, window: int) -> None:
        try:
            inbound = self.session.open("method", b"\xc0" if window > 1 else bytes(70_000), window)
        except StreamRefused:
            if len(self.session._inbound) != STREAMS:
                raise Failure("open() was refused with streams to spare") from None
        except ChannelLost:
            if not self._closed:
                raise Failure("open() was refused on a connection that is open") from None
        else:
            self.opened.append(inbound)

    def _take(self, which: int) -> None:
        for inbound in self.opened[which : which + 1]:
            if inbound.items:
                self.session.take(inbound)

    def _cancel(self, which: int) -> None:
        for inbound in self.opened[which : which + 1]:
            self.session.cancel(inbound)
            self._check()

    def _send(self, which: int, size: int) -> None:
        for outbound in self.serving[which : which + 1]:
            if outbound.transfer is None:
                self.session.send(outbound, bytes(size))

    def _finish(self, which: int, fail: bool) -> None:
        for outbound in self.serving[which : which + 1]:
            self.serving.remove(outbound)
            number = outbound.id
            self.session.finish(outbound, Fail(number, "k", "m", "t") if fail else End(number))
            self._check()

    def _write(self) -> None:
        while (frame := self.session.take_frame()) is not None:
            if len(frame) > FRAME_BYTES + 16:
                raise Failure(f"a frame of {len(frame)} bytes was written")
        if self.session.outbox.size or self.session.talkative:
            raise Failure("after all was written there is something to write")
        self._check()

    def _close(self) -> None:
        self._end("this side closed the connection")

    # What must hold.

    def _end(self, reason: str) -> None:
        self._take_in(self.session.close(reason))
        self._closed = True
        for inbound in self.opened:
            if inbound.outcome is None:
                raise Failure(f"stream {inbound.id} waits for ever")
        if left := [outbound.id for outbound in self.serving if outbound not in self._interrupted]:
            raise Failure(f"the handlers of {left} run on after the end")
        if left := [inbound.id for inbound in self.opened if inbound not in self._woken]:
            raise Failure(f"who waits for the items of {left} does so for ever")

    def _take_in(self, effects: Effects) -> None:
        for started in effects.started:
            if self._closed:
                raise Failure("a handler was started after the end")
            self.serving.append(started.outbound)
        for outbound in effects.interrupted:
            if outbound in self._interrupted:
                raise Failure(f"the handler of stream {outbound.id} was interrupted twice")
            self._interrupted.add(outbound)
        # With an outcome, so that whoever waits finds the end when it wakes.
        self._woken.update(half for half in effects.ready if getattr(half, "outcome", None) is not None)
        if effects.goodbye is not None:
            self.counts["goodbye"] += 1
            self._end(effects.goodbye)

    def _check(self) -> None:
        session, states = self.session, self._states
        if len(session._outbound) > STREAMS or len(session._inbound) > STREAMS:
            raise Failure(f"{len(session._outbound)} handlers, {len(session._inbound)} streams of {STREAMS}")
        if len(self.serving) > STREAMS and not self._closed:
            raise Failure(f"{len(self.serving)} handlers run, {STREAMS} may")
        if len(session._credit_due) > STREAMS or len(session._finished) > STREAMS:
            raise Failure("what is due is not bounded by the streams")
        for outbound in session._outbound.values():
            if not 0 <= outbound.items_left <= outbound.window or outbound.bytes_left > outbound.window_bytes:
                raise Failure(f"stream {outbound.id} may send {outbound.items_left} items of {outbound.window}")
            if outbound.state not in MAY_BECOME[states.get(outbound, "open")]:
                raise Failure(f"stream {outbound.id} was {states[outbound]} and is {outbound.state}")
            states[outbound] = outbound.state
        for half in (*session._outbound.values(), *self.opened):
            if half.arriving is not None:
                if not len(half.arriving.data) < half.arriving.size <= LIMITS.message_bytes:
                    raise Failure(f"stream {half.id} waits for {half.arriving.size} bytes")
                if half.state != "open":
                    raise Failure(f"stream {half.id} is {half.state} and collects parts")
        for inbound in self.opened:
            if not 0 <= inbound.items_left <= inbound.window:
                raise Failure(f"stream {inbound.id} gave credit for {inbound.items_left} items of {inbound.window}")
            sizes = [entry.size if isinstance(entry, Batch) else len(entry) for entry in inbound.items]
            held, count = sum(sizes), sum(entry.count if isinstance(entry, Batch) else 1 for entry in inbound.items)
            if count > inbound.window:
                raise Failure(f"stream {inbound.id} holds {count} items, {held} bytes")
            # One item may overshoot the window, and it alone may be as large as a message.
            if held - (sizes[-1] if sizes else 0) > LIMITS.window_bytes:
                raise Failure(f"stream {inbound.id} holds {held} bytes; its window is {LIMITS.window_bytes}")
            if inbound.items and inbound.state == "cancelling" and not self._closed:
                raise Failure(f"stream {inbound.id} was cancelled and holds items")
            if inbound.state not in MAY_BECOME[states.get(inbound, "open")]:
                raise Failure(f"stream {inbound.id} was {states[inbound]} and is {inbound.state}")
            states[inbound] = inbound.state


def _reader() -> FrameReader[Any]:
    return FrameReader("the peer", SessionMessage, FRAME_LIMIT)


def _look_at(error: Exception) -> None:
    if len(str(error)) > 2_000:
        raise Failure(f"an error's text has {len(str(error))} characters") from error


def replay(ops: list[Op]) -> None:
    """Do operations that once failed.

    :raises Failure: they fail still.
    """
    Universe().run(ops)


def block(seed: int, number: int, counts: Counter[str]) -> None:
    """Run one block of universes, ``BLOCK`` mutated frames in all.

    :raises Failure: with the program that replays it.
    """
    draw = _Draw(Random(f"{seed}/{number}"), counts)
    end = counts["mutated"] + BLOCK
    while counts["mutated"] < end:
        universe, done = Universe(counts), []
        try:
            for op in draw.ops(universe):
                done.append(op)
                universe.do(op)
                if universe.over:
                    break
        except Failure as exc:
            raise Failure(f"{exc}\nseed {seed}, block {number}. This replays it:\n\n{_program(done)}") from exc


def fuzz(seed: int, frames: int, *, told: Any = None) -> tuple[Counter[str], list[tuple[int, int]]]:
    """Run blocks until so many mutated frames are through.

    :param told: called with each block's number before it runs.
    :returns: what happened, and after each quarter the resident bytes and Python's allocated blocks.
    :raises Failure: with the program that replays it.
    """
    counts: Counter[str] = Counter()
    sizes: list[tuple[int, int]] = []
    blocks = -(-frames // BLOCK)
    for number in range(blocks):
        if told is not None:
            told(number)
        block(seed, number, counts)
        if number in {blocks * quarter // 4 - 1 for quarter in (1, 2, 3, 4)}:
            gc.collect()
            sizes.append((resident(), sys.getallocatedblocks()))
    return counts, sizes


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


# Making universes.

_NIL = msgspec.Raw(b"\xc0")
_IDS = (1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 2**31, 2**63 - 1)
_DATA = [
    b"\xc0",
    b"\x01",
    b"\xa5hello",
    b"\xc4\x40" + bytes(64),
    b"\xdc\x01\x00" + bytes(256),
    b"\x91" * 200 + b"\xc0",
    b"\x82\xa1x\x01\xa4tags\x91\xa1a",
    b"\x82\xa1a\x81\xa1x\x01\xa1b\x81\xa1x\x02",
    b"\x93" + b"\xcb\x40\x00\x00\x00\x00\x00\x00\x00" * 3,
]
# Mostly such that a mutant of it is well formed, so that mutants get as far as the session.
_PAYLOADS = [msgspec.Raw(data) for data in (*_DATA, *[b"\xc4\x60" + bytes(range(96))] * len(_DATA))]
# Arrays of payloads, one of them empty.
_BATCHES = [msgspec.Raw(b"\x90"), *(msgspec.Raw(msgspec.msgpack.encode(_PAYLOADS[:n])) for n in (1, 2, 3))]


def _pool(*messages: Any) -> list[bytes]:
    return [encode_message(message) for message in messages]


# Well formed, and mostly illegal.
_WILD = _pool(
    *(Open(n, "m", items, items, _NIL) for n in _IDS for items in (1, 2**31 - 1)),
    *(Item(n, payload) for n in _IDS for payload in _PAYLOADS),
    *(Items(n, payload) for n in _IDS for payload in (*_PAYLOADS, *_BATCHES)),
    *(Open(n, "m", 1, 1, _NIL, size) for n in _IDS for size in (1, 100, 2**20, 2**31 - 1)),
    *(LargeItem(n, size) for n in _IDS for size in (1, 100, 2**20, 2**31 - 1)),
    *(kind(n, memoryview(bytes(size))) for n in _IDS for kind in (ItemPart, OpenPart) for size in (0, 1, 100)),
    *(Credit(n, items, size) for n in _IDS for items in (1, 2, 2**31 - 1) for size in (1, 50, 2**31 - 1)),
    *(kind(n) for n in _IDS for kind in (End, Cancel)),
    *(Fail(n, "k", "m" * length, "t") for n in _IDS for length in (0, 300)),
    *(Ping(1), Ping(2**31 - 1), Pong(1), Goodbye(""), Goodbye("over" * 100)),
    Challenge(bytes(32)),
    Hello(1, 1, bytes(32), bytes(32), 1, 2**20),
    Hello(1, 2**31 - 1, bytes(32), bytes(32), 2**31 - 1, 2**31 - 1),
    Welcome(1, bytes(32), 10, 2**20),
    # Numbers that the types refuse.
    *([kind, number, 1, 1] for kind in (4, 6) for number in (0, -1, 2**63, 2**64 - 1, 1.5, True, None, "1")),
    *([6, 1, number, 1] for number in (0, -1, 2**31, 2**64 - 1, 1.0, False, b"")),
    # One element too many, one too few.
    *([kind, 1, 1, 1, 1, 1, 1] for kind in range(17)),
    *([kind] for kind in range(-1, 17)),
)
# Where msgpack hides its surprises: lengths, nesting, extensions, signs, floats that are no numbers, bad UTF-8.
_BITES = [
    *(bytes((first,)) for first in range(0x80, 0x100)),
    b"\xdd\xff\xff\xff\xff",
    b"\xdf\xff\xff\xff\xff",
    b"\xdb\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01",
    b"\xd3\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\xcf\xff\xff\xff\xff\xff\xff\xff\xff",
    b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",
    b"\xd6\xff\x00\x00\x00\x00",
    b"\xa2\xff\xfe",
    b"\x91" * 1_500 + b"\xc0",
    b"\x91" * 120_000,
    b"\x81\xa1a" * 300,
    b"\xc4\x00",
    b"",
]


class _Draw:
    """Draws universes. Everything comes from one stream of numbers between 0 and 1."""

    def __init__(self, random: Random, counts: Counter[str]) -> None:
        self._random = random.random
        self._counts = counts
        self._opens = 0

    def ops(self, universe: Universe) -> Iterator[Op]:
        """What happens next in a universe, as long as it is asked."""
        random, counts = self._random, self._counts
        for _ in range(1 + int(random() * 3)):
            yield "open", 1 + int(random() * 5)
        for _ in range(UNIVERSE_STEPS):
            if random() < 0.4:
                yield self._user(random())
                continue
            self._opens = 0
            messages = [self._legal(universe) for _ in range(1 if random() < 0.7 else 2 + int(random() * 4))]
            if random() < 0.3:
                messages[int(random() * len(messages))] = _WILD[int(random() * len(_WILD))]
                counts["mutated"] += 1
                yield "feed", _framed(self._body(messages))
                continue
            body = self._body(messages)
            for _ in range(MUTANTS):
                mutant = self._mutated(body)
                counts["mutated"] += 1
                where = random()
                if where < 0.92:
                    yield "feed", _framed(mutant)
                elif where < 0.94:  # cut in two, or with a length that lies
                    frame = _framed(mutant, None if random() < 0.5 else int(random() * 2 ** int(random() * 33)))
                    at = int(random() * len(frame))
                    yield "feed", frame[:at]
                    yield "feed", frame[at:]
                elif where < 0.96:
                    yield "hello", ("challenge", "hello", "welcome")[int(random() * 3)], _framed(mutant)
                else:
                    yield "decode", int(random() * len(DECODERS)), self._mutated(_DATA[int(random() * len(_DATA))])
            yield "feed", _framed(body)

    def _legal(self, universe: Universe) -> bytes:
        """A message that is legal now, unless one before it in the same frame has changed that."""
        random = self._random
        session = universe.session
        what = random()
        if what < 0.55 and session._inbound:
            inbound = _any(session._inbound, random())
            if inbound.arriving is not None:
                if what < 0.5:
                    return encode_message(ItemPart(inbound.id, _part(inbound.arriving, random())))
                return encode_message(Fail(inbound.id, "k", "m", "t"))
            if inbound.items_left > 0 and inbound.bytes_left > 0 and what < 0.06:
                return encode_message(LargeItem(inbound.id, 1 + int(random() * 200)))
            if inbound.items_left > 1 and what < 0.2:
                return encode_message(Items(inbound.id, _BATCHES[2]))
            if inbound.items_left > 0 and what < 0.5:
                return encode_message(Item(inbound.id, _PAYLOADS[int(random() * len(_PAYLOADS))]))
            return encode_message(End(inbound.id) if what < 0.53 else Fail(inbound.id, "k", "m", "t"))
        if what < 0.75 and session._outbound:
            outbound = _any(session._outbound, random())
            if outbound.arriving is not None and what < 0.72:
                return encode_message(OpenPart(outbound.id, _part(outbound.arriving, random())))
            owed, bytes_owed = outbound.window - outbound.items_left, outbound.window_bytes - outbound.bytes_left
            if owed > 0 and bytes_owed > 0 and outbound.state == "open" and what < 0.72:
                return encode_message(Credit(outbound.id, 1 + int(random() * owed), 1 + int(random() * bytes_owed)))
            if outbound.state == "open":
                return encode_message(Cancel(outbound.id))
            if outbound.state == "closed":  # late
                return encode_message(Credit(outbound.id, 1, 1) if what < 0.65 else Cancel(outbound.id))
        if what < 0.95 and len(session._outbound) < STREAMS:
            window = 1 + int(random() * 4)
            self._opens += 1
            large = 0 if random() < 0.8 else 1 + int(random() * 200)
            opened = Open(session._last_served + self._opens, "m", window, 1 + int(random() * 300), _NIL, large)
            return encode_message(opened)
        return encode_message(Ping(7)) if what < 0.999 else encode_message(Goodbye("enough"))

    def _user(self, what: float) -> Op:
        random = self._random
        which = int(random() * 4)
        if what < 0.15:
            return "open", 1 + int(random() * 5)
        if what < 0.4:
            return "take", which
        if what < 0.5:
            return "cancel", which
        if what < 0.7:
            return "send", which, int(random() * 100) if random() < 0.98 else 70_000
        if what < 0.9:
            return "finish", int(random() * 2), random() < 0.5
        return ("write",) if what < 0.995 else ("close",)

    def _body(self, messages: list[bytes]) -> bytes:
        count = len(messages)
        if self._random() < 0.0003:
            messages, count = messages * 1500, count * 1500
        header = bytes((0x90 | count,)) if count < 16 else b"\xdc" + (count & 0xFFFF).to_bytes(2, "big")
        return header + b"".join(messages)

    def _mutated(self, body: bytes) -> bytes:
        random = self._random
        for _ in range(1 if random() < 0.8 else 1 + int(random() * 4)):
            at = int(random() * len(body))
            what = random()
            if what < 0.4:  # one bit
                body = body[:at] + bytes((body[at] ^ (1 << int(random() * 8)),)) + body[at + 1 :]
            elif what < 0.75:  # another byte
                body = body[:at] + bytes((int(random() * 256),)) + body[at + 1 :]
            elif what < 0.9:  # something of msgpack's instead, or in between
                body = body[:at] + _BITES[int(random() * len(_BITES))] + body[at + int(random() * 2) :]
            elif what < 0.94:
                body = body[:at] + body[at + 1 + int(random() * 8) :]
            elif what < 0.98:  # a piece of it again, somewhere
                piece = body[at : at + 1 + int(random() * 16)]
                to = int(random() * len(body))
                body = body[:to] + piece + body[to:]
            else:
                body = body[:at]
            if not body:
                return b"\x90"
        return body


def _part(arriving: Arrival, share: float) -> memoryview:
    """Some of what is missing, or all of it."""
    missing = arriving.size - len(arriving.data)
    return memoryview(bytes(missing if share < 0.5 else 1 + int(share * (missing - 1))))


def _framed(body: bytes, length: int | None = None) -> bytes:
    return (len(body) if length is None else length).to_bytes(4, "big") + body


def _any(streams: dict[int, Any], where: float) -> Any:
    keys = list(streams)
    return streams[keys[int(where * len(keys))]]


def _program(ops: list[Op]) -> str:
    """A program that fails as these operations did, without those that are not needed for it."""
    kept = list(ops)
    for op in reversed(ops[:-1]):
        shorter = [other for other in kept if other is not op]
        try:
            replay(shorter)
        except Failure:
            kept = shorter
    lines = "\n".join(f"    ({', '.join(map(_literal, op))})," for op in kept)
    return f"from tests.fuzz.frames import replay, unpack\n\nreplay([\n{lines}\n])\n"


def _literal(value: object) -> str:
    if isinstance(value, bytes) and len(value) > 1_000:
        return f"unpack({base64.b85encode(zlib.compress(value))!r})"
    return repr(value)


def unpack(packed: bytes) -> bytes:
    """Bytes that were too long to be printed as they are."""
    return zlib.decompress(base64.b85decode(packed))


def main(seed: int, frames: int) -> None:
    """Fuzz; print what happened as JSON. Standard error says which block is under way."""
    began = time.perf_counter()
    counts, sizes = fuzz(seed, frames, told=lambda number: print(number, file=sys.stderr, flush=True))
    seconds = time.perf_counter() - began
    print(msgspec.json.encode({"counts": counts, "memory": sizes, "seconds": seconds}).decode())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
