"""Pipe: one direction of a connection."""

from __future__ import annotations

from typing import Protocol

from tests.simulation.world import World

__all__ = ("Pipe",)


class Reader(Protocol):
    def arrived(self, piece: bytes) -> None: ...

    def end_of_stream(self) -> None: ...


class Writer(Protocol):
    def pipe_drained(self) -> None: ...


class Pipe:
    """Bytes from one side to the other: in order, in pieces, each at its time."""

    def __init__(self, world: World, capacity: int, delay: int, pieces: int) -> None:
        self.world = world
        self.capacity, self.delay, self.pieces = capacity, delay, pieces
        self.waiting = 0
        self.broken = False
        self.reader: Reader
        self.writer: Writer
        self._last = 0
        self._queue: list[bytes] = []

    def push(self, frame: bytes) -> None:
        if self.broken:
            return
        world = self.world
        self.waiting += len(frame)
        start = 0
        for _ in range(world.below(self.pieces)):
            end = world.between(start, len(frame))
            if start < end < len(frame):
                world.sometimes("a frame came in pieces")
                self._arrive_later(frame[start:end])
                start = end
        self._arrive_later(frame[start:])

    def push_eof(self) -> None:
        self._arrive_later(b"")

    def _arrive_later(self, piece: bytes) -> None:
        now = self.world.now
        # Only when a piece lands is drawn, never before the one ahead of it: the order of bytes is not ours to change.
        self._last = max(self._last, now + self.world.between(0, self.delay))
        self._queue.append(piece)
        self.world.after(self._last - now, self._arrive)

    def _arrive(self) -> None:
        # Several may be due at this tick, in an order that was drawn; what comes first is always the oldest.
        if not self._queue:
            return
        piece = self._queue.pop(0)
        self.waiting -= len(piece)
        if piece:
            self.reader.arrived(piece)
        else:
            self.reader.end_of_stream()
        self.writer.pipe_drained()

    def cut(self) -> None:
        """Lose what has not arrived."""
        self.broken = True
        if self.waiting:
            self.world.sometimes("the connection broke with items on their way")
        self._queue = []
        self.waiting = 0
