"""World: the clock, the chance and the log of one universe."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from hashlib import blake2b
from random import Random
from typing import Any, TypeVar

__all__ = ("Violation", "World")

T = TypeVar("T")

#: A universe that does more goes round in a circle.
MOST_EVENTS = 50_000


class Violation(AssertionError):
    """An invariant doesn't hold."""


class World:
    """Everything that a universe may depend on. Same seed, same universe.

    Time is counted in whole ticks, so that events collide; what is due at one tick happens in an order that is drawn.

    :ivar now: ticks since the beginning.
    :ivar log: (tick, what happened, details), of numbers and strings.
    :ivar seen: rare paths that were taken, see :meth:`sometimes`.
    """

    __slots__ = ("_broken", "_due", "_events", "_uniform", "log", "now", "seen")

    def __init__(self, universe: str, seed: int) -> None:
        self.now = 0
        self.log: list[tuple[Any, ...]] = []
        self.seen: set[str] = set()
        self._uniform = Random(f"{universe} {seed}").random
        # [tick, what decides among those of one tick, number, what happens or None if that was called off, arguments]
        self._due: list[list[Any]] = []
        self._events = 0
        self._broken: Violation | None = None

    # What chance decides.

    def below(self, n: int) -> int:
        """0 to n - 1."""
        return int(self._uniform() * n)

    def between(self, low: int, high: int) -> int:
        """Low to high, both included."""
        return low + int(self._uniform() * (high - low + 1))

    def chance(self, percent: int) -> bool:
        return self._uniform() * 100 < percent

    def pick(self, choices: Sequence[T]) -> T:
        return choices[int(self._uniform() * len(choices))]

    def shuffle(self, items: list[Any]) -> None:
        for i in range(len(items) - 1, 0, -1):
            j = int(self._uniform() * (i + 1))
            items[i], items[j] = items[j], items[i]

    # What happens.

    def after(self, ticks: int, act: Callable[..., object], *args: Any) -> list[Any]:
        """Let ``act(*args)`` happen so many ticks from now; returns what :meth:`forget` takes."""
        self._events += 1
        entry = [self.now + ticks, self._uniform(), self._events, act, args]
        heapq.heappush(self._due, entry)
        return entry

    def forget(self, entry: list[Any]) -> None:
        """Let it not happen."""
        entry[3] = None

    def run(self, check: Callable[[], None], horizon: int) -> None:
        """Let everything happen that is due, and look after each event whether the invariants hold.

        :param horizon: the tick at which everything must be quiet.
        """
        due = self._due
        while due:
            at, _, number, act, args = heapq.heappop(due)
            if act is None:
                continue
            if at > horizon or number > MOST_EVENTS:
                raise Violation(f"still going on at tick {self.now}, event {number}: {act.__qualname__}{args}")
            self.now = at
            act(*args)
            if self._broken is not None:
                raise self._broken
            check()

    # What is told.

    def note(self, what: str, *details: object) -> None:
        """Log an event."""
        self.log.append((self.now, what, *details))

    def sometimes(self, path: str) -> None:
        """A rare path was taken. Over many seeds each must have been, or they prove nothing about it."""
        self.seen.add(path)

    def broken(self, message: str) -> Violation:
        """What to raise where an invariant doesn't hold; the universe ends with it, even if somebody catches it."""
        self._broken = self._broken or Violation(message)
        return self._broken

    def digest(self) -> str:
        """Hash of the log: equal where every event was."""
        return blake2b("\n".join(map(repr, self.log)).encode(), digest_size=8).hexdigest()
