"""Progress: which rows of a source are finished, as ranges of offsets in its fragments."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

from arun.data.block import place_of
from arun.data.source import Fragment

__all__ = ("Progress", "Ranges", "merged", "ranges_of")

#: (fragment, first offset, offset behind the last), in their order
Ranges: TypeAlias = Sequence[tuple[int, int, int]]


class Progress:
    """What is finished of a source. One thread reads and another one writes.

    :param fragments: of the source, in their order.
    """

    def __init__(self, fragments: Sequence[Fragment]) -> None:
        self._fragments = fragments
        self._finished: dict[int, _Offsets] = {}
        self._rows: dict[int, int] = {
            number: fragment.rows for number, fragment in enumerate(fragments) if fragment.rows is not None
        }
        self._ended: deque[tuple[int, int]] = deque()

    def finish(self, ranges: Iterable[Sequence[int]]) -> None:
        """These rows are finished."""
        for fragment, start, end in ranges:
            self._finished.setdefault(fragment, _Offsets()).add(start, end)

    def end(self, fragment: int, rows: int) -> None:
        """The fragment has been read to its end, and has so many rows."""
        if self._rows.get(fragment) != rows:
            self._rows[fragment] = rows
            self._ended.append((fragment, rows))

    def know(self, ended: Iterable[Sequence[int]]) -> None:
        """An earlier run has read these fragments to their ends."""
        self._rows.update((fragment, rows) for fragment, rows in ended)

    def ended(self) -> list[tuple[int, int]]:
        """The fragments that have ended since this was asked for last, with their rows."""
        return [self._ended.popleft() for _ in range(len(self._ended))]

    def unfinished(self) -> Iterator[tuple[int, Fragment, int]]:
        """The fragments that must be read: number, fragment, and how many of its first rows are finished."""
        for number, fragment in enumerate(self._fragments):
            offsets = self._finished.get(number)
            skip = 0 if offsets is None else offsets.first_gap
            if skip != self._rows.get(number):
                yield number, fragment, skip

    def left(self, fragment: int, offset: int, rows: int) -> list[tuple[int, int]]:
        """The ranges within these rows of a fragment that are not finished."""
        offsets = self._finished.get(fragment)
        return [(offset, offset + rows)] if offsets is None else offsets.gaps(offset, offset + rows)


class _Offsets:
    """A set of integers, as ranges that neither touch nor overlap."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    @property
    def first_gap(self) -> int:
        return self._ends[0] if self._starts and self._starts[0] == 0 else 0

    def pairs(self) -> Iterator[tuple[int, int]]:
        return zip(self._starts, self._ends, strict=True)

    def add(self, start: int, end: int) -> None:
        first = bisect_left(self._ends, start)
        last = bisect_right(self._starts, end)
        if first < last:
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
        self._starts[first:last], self._ends[first:last] = [start], [end]

    def gaps(self, start: int, end: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for index in range(bisect_right(self._ends, start), bisect_left(self._starts, end)):
            if start < self._starts[index]:
                found.append((start, self._starts[index]))
            start = self._ends[index]
        if start < end:
            found.append((start, end))
        return found


def ranges_of(origins: Iterable[int]) -> Ranges:
    """Origins of rows as ranges."""
    ranges: list[tuple[int, int, int]] = []
    first = last = -2
    for origin in sorted(set(origins)):
        if origin != last + 1:
            if last >= 0:
                ranges.append(_range(first, last))
            first = origin
        last = origin
    if last >= 0:
        ranges.append(_range(first, last))
    return ranges


def merged(ranges: Iterable[Sequence[int]]) -> Ranges:
    """The same, but those that touch are one."""
    fragments: dict[int, _Offsets] = {}
    for fragment, start, end in ranges:
        fragments.setdefault(fragment, _Offsets()).add(start, end)
    return [(number, *pair) for number, offsets in sorted(fragments.items()) for pair in offsets.pairs()]


def _range(first: int, last: int) -> tuple[int, int, int]:
    fragment, start = place_of(first)
    return fragment, start, start + last - first + 1
