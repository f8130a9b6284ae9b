"""The session core without any I/O: two sessions, a wire between them, and a model that must agree."""

from __future__ import annotations

from collections import deque

import msgspec
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, precondition, rule

from arun.channel.codec import FrameReader, encode_message
from arun.channel.halves import Allowed, Batch
from arun.channel.limits import Limits
from arun.channel.messages import Cancel, Credit, End, Fail, Item, Open, Ping, Pong, SessionMessage
from arun.channel.session import TRANSITIONS, Session
from arun.errors import ChannelLost, ProtocolError, StreamRefused

STREAMS = 3
WINDOW_BYTES = 50
NIL = msgspec.Raw(b"\xc0")


def session(**limits) -> Session:
    return Session(peer="the peer", limits=Limits(**limits), allowed=Allowed(limits.get("streams", 1024), 2**20))


def frames(session: Session) -> list[SessionMessage]:
    """Everything that the session has to say."""
    reader = FrameReader("test", SessionMessage, 2**20)
    said = []
    while (frame := session.take_frame()) is not None:
        reader.feed(frame)
        said += reader.next_frame()
    return said


def numbers(entry: msgspec.Raw | Batch) -> list[int]:
    """What was sent as one entry."""
    if isinstance(entry, Batch):
        items = msgspec.msgpack.decode(entry.payloads)
        assert len(items) == entry.count
        assert sum(map(len, map(msgspec.msgpack.encode, items))) == entry.size
    else:
        items = [msgspec.msgpack.decode(entry)]
    return [number for number, _ in items]


class OneStream:
    """What the model knows of one stream."""

    def __init__(self, inbound, window) -> None:
        self.inbound = inbound
        self.window = window
        self.outbound = None
        self.sent: list[int] = []
        self.got: list[int] = []
        self.cancelled = False
        self.interrupted = False
        self.finished = False
        #: the connection was closed, by one of its ends, while the handler ran
        self.cut = False


class Universe(RuleBasedStateMachine):
    """An opener and a serving session; frames travel in order, but only when a rule delivers them."""

    streams = Bundle("streams")

    @initialize()
    def connect(self):
        self.opener = session(streams=STREAMS, window_bytes=WINDOW_BYTES)
        self.server = session(streams=STREAMS, window_bytes=WINDOW_BYTES)
        self.wires = {self.opener: deque(), self.server: deque()}  # what each one is about to receive
        self.readers = {end: FrameReader("peer", SessionMessage, 2**20) for end in self.wires}
        self.by_id: dict[int, OneStream] = {}
        self.closed = False
        self.sequence = 0

    @precondition(lambda self: not self.closed)
    @rule(target=streams, window=st.integers(1, 6))
    def open(self, window):
        unfinished = [s for s in self.by_id.values() if s.inbound.state != "closed"]
        try:
            stream = OneStream(self.opener.open("m", b"\xc0", window), window)
        except StreamRefused:
            assert len(unfinished) == STREAMS
            return multiple()
        assert len(unfinished) < STREAMS
        self.by_id[stream.inbound.id] = stream
        return stream

    @rule(stream=streams, sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6))
    def send(self, stream, sizes):
        for size in sizes:
            if stream.outbound is None or stream.finished:
                return
            self.sequence += 1
            credit = stream.outbound.items_left > 0 and stream.outbound.bytes_left > 0
            sent = self.server.send(stream.outbound, msgspec.msgpack.encode([self.sequence, "x" * size]))
            assert sent == (credit and not stream.interrupted)
            if sent:
                stream.sent.append(self.sequence)

    @rule(stream=streams, count=st.integers(1, 6))
    def take(self, stream, count):
        for _ in range(min(count, len(stream.inbound.items))):
            entry, _ = self.opener.take(stream.inbound)
            stream.got += numbers(entry)

    @rule(stream=streams)
    def cancel(self, stream):
        stream.cancelled = True
        self.opener.cancel(stream.inbound)

    @rule(stream=streams, fail=st.booleans())
    def finish(self, stream, fail):
        if stream.outbound is not None and not stream.finished:
            stream.finished = True
            number = stream.outbound.id
            self.server.finish(stream.outbound, Fail(number, "k", "m", "t") if fail else End(number))

    @rule(from_opener=st.booleans())
    def write(self, from_opener):
        writer, reader = (self.opener, self.server) if from_opener else (self.server, self.opener)
        if (frame := writer.take_frame()) is not None:
            self.wires[reader].append(frame)

    @rule(to_opener=st.booleans())
    def deliver(self, to_opener):
        receiver = self.opener if to_opener else self.server
        if not self.wires[receiver]:
            return
        self.readers[receiver].feed(self.wires[receiver].popleft())
        effects = receiver.receive(self.readers[receiver].next_frame())
        for started in effects.started:
            self.by_id[started.outbound.id].outbound = started.outbound
        self.interrupt(effects.interrupted)

    @rule()
    def exchange(self):
        while any(self.wires.values()) or any(session.talkative for session in self.wires):
            for end in (True, False):
                self.write(end)
                self.deliver(end)

    @precondition(lambda self: not self.closed and self.sequence > 8)
    @rule(by_opener=st.booleans())
    def close(self, by_opener):
        self.closed = True
        running = self.running()
        for stream in self.by_id.values():
            # An opener that closes takes nothing more, also of what has ended over there.
            stream.cut = not stream.finished or (by_opener and stream.inbound.outcome is None)
        effects = (self.opener if by_opener else self.server).close("the end")
        self.interrupt(effects.interrupted)
        assert by_opener or all(stream.interrupted for stream in running)

    def running(self):
        return [s for s in self.by_id.values() if s.outbound is not None and not s.finished]

    def interrupt(self, outbounds):
        for outbound in outbounds:
            stream = self.by_id[outbound.id]
            assert not stream.interrupted, "once"
            stream.interrupted = True

    @invariant()
    def what_must_hold(self):
        for stream in self.by_id.values():
            inbound, outbound = stream.inbound, stream.outbound
            unread = [number for entry in inbound.items for number in numbers(entry)]
            assert stream.got + unread == stream.sent[: len(stream.got) + len(unread)], "in order, no gap, no double"
            assert len(unread) <= stream.window
            assert sum(e.size if isinstance(e, Batch) else len(e) for e in inbound.items) <= WINDOW_BYTES + 50
            assert 0 <= inbound.items_left <= stream.window
            if outbound is not None:
                assert 0 <= outbound.items_left <= stream.window
                assert outbound.bytes_left <= WINDOW_BYTES
                assert stream.cut or not stream.finished or outbound.state == "closed", "nothing reopens"
                assert self.closed or stream.finished or outbound.id in self.server._outbound, "it holds its slot"
            if stream.cancelled:
                assert inbound.state != "open"
                assert not inbound.items
            elif inbound.state == "closed" and not stream.cut:
                assert stream.got + unread == stream.sent, "all arrived before the End"
            if stream.cut:
                assert stream.cancelled or not isinstance(inbound.outcome, End), "a loss never looks like an End"
        assert len(self.running()) <= STREAMS

    def teardown(self):
        """Heal: deliver and consume everything. Then every handler has credit; and they end, every stream has ended."""
        if not hasattr(self, "by_id"):
            return
        for _ in range(2):
            self.exchange()
            for stream in self.by_id.values():
                self.take(stream, len(stream.inbound.items))
        self.exchange()
        if not self.closed:
            for stream in self.running():
                if not stream.interrupted:
                    assert stream.outbound.items_left * 2 > stream.window
                    assert stream.outbound.bytes_left * 2 > WINDOW_BYTES
                self.finish(stream, False)
            self.exchange()
            assert all(stream.inbound.outcome is not None for stream in self.by_id.values())
            assert not self.opener._inbound
            assert not self.server._outbound
        self.what_must_hold()


TestUniverse = Universe.TestCase


def served(core: Session, window=10, window_bytes=1000, stream=1):
    [started] = core.receive([Open(stream, "m", window, window_bytes, NIL)]).started
    return started.outbound


@pytest.mark.parametrize(
    ("before", "message", "said"),
    [
        ([], Item(1, NIL), "Item for stream 1, which is idle"),
        ([], End(1), "End for stream 1, which is idle"),
        ([], Credit(1, 1, 1), "Credit for stream 1, which is idle"),
        ([], Cancel(1), "Cancel for stream 1, which is idle"),
        ([Open(5, "m", 1, 1, NIL)], Open(5, "m", 1, 1, NIL), "Open for stream 5, which is closed"),
        ([Open(5, "m", 1, 1, NIL)], Open(4, "m", 1, 1, NIL), "Open for stream 4, which is closed"),
        ([Open(1, "m", 1, 1, NIL), Cancel(1)], Cancel(1), "Cancel for stream 1, which is cancelling"),
        ([Open(1, "m", 1, 1, NIL), Cancel(1)], Credit(1, 1, 1), "Credit for stream 1, which is cancelling"),
        ([Open(1, "m", 1, 1, NIL)], Credit(1, 1, 1), "more credit on 'm' than its window"),
        ([], Pong(1), "never sent"),
    ],
)
def test_what_the_table_has_no_entry_for_ends_the_connection(before, message, said):
    core = session()
    core.receive(before)
    with pytest.raises(ProtocolError, match=said):
        core.receive([message])


def test_items_after_the_end_are_refused():
    core = session()
    inbound = core.open("m", b"\xc0", 5)
    core.receive([Item(1, NIL), End(1)])
    assert (len(inbound.items), inbound.outcome) == (1, End(1))
    with pytest.raises(ProtocolError, match="Item for stream 1, which is closed"):
        core.receive([Item(1, NIL)])


def test_items_beyond_the_credit_are_refused():
    core = session()
    core.open("m", b"\xc0", 2)
    with pytest.raises(ProtocolError, match="more on 'm' than its credit"):
        core.receive([Item(1, NIL)] * 3)


def test_a_cancel_that_crosses_the_end_is_taken_as_late():
    core = session()
    outbound = served(core)
    core.finish(outbound, End(1))
    assert core.receive([Cancel(1)]).interrupted == []
    frames(core)
    assert core.receive([Credit(1, 1, 1)]).ready == []


def test_opening_beyond_the_limit_is_a_breach_until_the_end_is_written():
    core = session(streams=1)
    outbound = served(core)
    core.receive([Cancel(1)])
    core.finish(outbound, End(1))
    with pytest.raises(ProtocolError, match="beyond the 1 streams"):
        core.receive([Open(2, "m", 1, 1, NIL)])
    assert frames(core) == [End(1)]
    served(core, stream=3)


def test_credit_is_granted_at_half_the_window_in_one_message():
    core = session()
    inbound = core.open("m", b"\xc0", 10)
    core.receive([Item(1, NIL)] * 10)
    frames(core)
    for _ in range(4):
        assert core.take(inbound)[1] is False
    assert frames(core) == []
    for _ in range(3):
        assert core.take(inbound)[1] is True
    assert frames(core) == [Credit(1, 7, 7)]


def test_pings_are_answered_by_the_latest_number_only():
    core = session()
    core.receive([Ping(n) for n in range(1, 1000)])
    assert frames(core) == [Pong(999)]


def test_closing_cancels_what_is_open_and_forgets_the_handlers():
    core = session()
    inbound = core.open("m", b"\xc0", 10)
    outbound = served(core)
    frames(core)
    effects = core.close("the end", ValueError("cause"))
    assert effects.interrupted == [outbound]
    assert set(effects.ready) == {inbound, outbound}
    assert frames(core) == [Cancel(1)]
    core.finish(outbound, End(1))
    assert frames(core) == [], "an End would pass for the stream's own"
    error = inbound.outcome.error()
    assert isinstance(error, ChannelLost)
    assert isinstance(error.__cause__, ValueError)
    assert core.receive([Open(2, "m", 1, 1, NIL)]).started == []
    with pytest.raises(ChannelLost, match="the end"):
        core.open("m", b"\xc0", 1)
    assert core.close("again").interrupted == []


def test_the_table_only_leads_to_states_it_knows():
    states = {"idle", "open", "cancelling", "closed"}
    for row in TRANSITIONS.values():
        assert set(row) | set(row.values()) <= states
        assert row.get("closed", "closed") == "closed", "nothing reopens a stream"


def test_credit_that_is_due_is_not_sent_after_a_cancel():
    core = session()
    inbound = core.open("m", b"\xc0", 2)
    core.receive([Item(1, NIL), Item(1, NIL)])
    assert core.take(inbound)[1] is True
    core.cancel(inbound)
    assert [type(message) for message in frames(core)] == [Open, Cancel]


def test_a_payload_does_not_keep_the_frame_it_came_in():
    core = session()
    inbound = core.open("m", b"\xc0", 2)
    [messages] = [msgspec.msgpack.decode(encode_message([Item(1, NIL), End(1)]), type=list[SessionMessage])]
    core.receive(messages)
    assert inbound.items[0] is not messages[0].payload
