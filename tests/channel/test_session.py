"""The session core without any I/O: two sessions, a wire between them, and a model that must agree."""

from __future__ import annotations

from collections import deque

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, precondition, rule

from arun.channel.codec import FrameReader
from arun.channel.limits import Limits
from arun.channel.messages import Cancel, Credit, End, Fail, Item, Open, Ping, Pong, SessionMessage
from arun.channel.session import TRANSITIONS, Allowed, Session
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


class OneStream:
    """What must be true of one stream, whatever the two sessions do."""

    def __init__(self, inbound, window) -> None:
        self.inbound = inbound
        self.window = window
        self.outbound = None
        self.sent: list[int] = []
        self.got: list[int] = []
        self.cancelled = False
        self.interrupted = False
        self.finished = False
        self.lost = False


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
    @rule(target=streams, window=st.integers(1, 5))
    def open(self, window):
        unfinished = [s for s in self.by_id.values() if s.inbound.state != "closed"]
        try:
            stream = OneStream(self.opener.open("m", b"\xc0", window), window)
        except StreamRefused:
            assert len(unfinished) == STREAMS
            return OneStream(None, 0)
        assert len(unfinished) < STREAMS
        self.by_id[stream.inbound.id] = stream
        return stream

    @rule(stream=streams, size=st.integers(0, 40))
    def send(self, stream, size):
        if stream.outbound is None or stream.finished:
            return
        self.sequence += 1
        credit = stream.outbound.items_left > 0 and stream.outbound.bytes_left > 0
        sent = self.server.send(stream.outbound, msgspec.msgpack.encode([self.sequence, "x" * size]))
        assert sent == (credit and not stream.interrupted)
        if sent:
            stream.sent.append(self.sequence)

    @rule(stream=streams)
    def take(self, stream):
        if stream.inbound is not None and stream.inbound.items:
            payload, _ = self.opener.take(stream.inbound)
            stream.got.append(msgspec.msgpack.decode(payload)[0])

    @rule(stream=streams)
    def cancel(self, stream):
        if stream.inbound is not None:
            stream.cancelled = True
            self.opener.cancel(stream.inbound)

    @rule(stream=consumes(streams), fail=st.booleans())
    def finish(self, stream, fail):
        if stream.outbound is not None:
            stream.finished = True
            number = stream.outbound.id
            self.server.finish(stream.outbound, Fail(number, "k", "m", "t") if fail else End(number))

    @rule(end=st.booleans())
    def write(self, end):
        writer, other = (self.opener, self.server) if end else (self.server, self.opener)
        if (frame := writer.take_frame()) is not None:
            self.wires[other].append(frame)

    @rule(end=st.booleans())
    def deliver(self, end):
        receiver = self.opener if end else self.server
        if not self.wires[receiver]:
            return
        self.readers[receiver].feed(self.wires[receiver].popleft())
        effects = receiver.receive(self.readers[receiver].next_frame())
        for started in effects.started:
            self.by_id[started.outbound.id].outbound = started.outbound
        for outbound in effects.interrupted:
            self.by_id[outbound.id].interrupted = True

    @precondition(lambda self: not self.closed)
    @rule(end=st.booleans())
    def close(self, end):
        self.closed = True
        effects = (self.opener if end else self.server).close("the end")
        for outbound in effects.interrupted:
            self.by_id[outbound.id].interrupted = True
        if end:
            for stream in self.by_id.values():
                stream.lost = stream.inbound.state != "closed"

    @invariant()
    def what_must_hold(self):
        for stream in self.by_id.values():
            inbound, outbound = stream.inbound, stream.outbound
            assert stream.got == stream.sent[: len(stream.got)], "in order, no gap, no double"
            assert len(inbound.items) <= stream.window
            assert 0 <= inbound.items_left <= stream.window
            if outbound is not None:
                assert 0 <= outbound.items_left <= stream.window
                assert outbound.bytes_left <= WINDOW_BYTES
            if inbound.state == "closed" and not stream.cancelled and not stream.lost:
                unread = [msgspec.msgpack.decode(item)[0] for item in inbound.items]
                assert stream.got + unread == stream.sent, "all arrived before the End"
            if stream.cancelled:
                assert not inbound.items or inbound.state == "closed"
        running = [s for s in self.by_id.values() if s.outbound is not None and not s.finished]
        assert len(running) <= STREAMS

    def teardown(self):
        """Heal: everything is delivered and consumed, every handler ends; then every stream must have ended."""
        if not hasattr(self, "by_id"):
            return
        for _ in range(4):
            for end in (True, False):
                while (
                    self.wires[self.opener] or self.wires[self.server] or self.opener.talkative or self.server.talkative
                ):
                    self.write(end)
                    self.write(not end)
                    self.deliver(end)
                    self.deliver(not end)
            for stream in self.by_id.values():
                while stream.inbound.items:
                    self.take(stream)
                if stream.outbound is not None and not stream.finished:
                    self.send(stream, 1)
                    stream.finished = True
                    self.server.finish(stream.outbound, End(stream.outbound.id))
        self.what_must_hold()
        if not self.closed:
            assert all(stream.inbound.outcome is not None for stream in self.by_id.values())
            assert not self.opener._inbound
            assert not self.server._outbound


TestUniverse = Universe.TestCase
TestUniverse.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


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
