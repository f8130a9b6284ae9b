"""The harness: contestants take turns in one process, and a table says who took how long.

Every contestant is a coroutine function that does some work and returns what a unit of it cost (seconds, or bytes). All
are warmed up once; then in every round each has its turn, in an order that rotates, on an event loop of its own, right
after a full garbage collection and with the collector running, as it does in programs. What counts is the median.

A ratio is the median of the rounds' own ratios: what else the machine does changes from round to round, and within one
it falls on all alike. What only computes is timed with the process's CPU clock, which on an idle machine says what a
watch says, and on a busy one leaves the neighbours out. What waits (threads, timers) is timed with a watch.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

__all__ = ("Check", "Contestant", "Medians", "Options", "Row", "medians", "table")

Contestant = Callable[[], Awaitable[float]]


class Options(NamedTuple):
    """How long to measure."""

    rounds: int
    #: divides the number of steps and subtasks
    shrink: int

    def n(self, full: int) -> int:
        return max(full // self.shrink, 10)


class Check(NamedTuple):
    """A figure that the project has set itself."""

    target: str
    value: float
    bound: float
    unit: str = "x"
    at_least: bool = False

    @property
    def holds(self) -> bool:
        return self.value >= self.bound if self.at_least else self.value <= self.bound


class Row(NamedTuple):
    """One measured thing.

    Floor: the least that Python or a library needs for it; peer: Burr, or Ray where the row says so, doing the same.
    """

    what: str
    #: "us", "ms", "MB", or "" for a count
    unit: str
    arun: float
    floor: float | None
    peer: float | None
    checks: list[Check]


class Medians(dict[str, float]):
    """The median cost of each contestant's unit."""

    def __init__(self, rounds: Mapping[str, list[float]]) -> None:
        super().__init__({name: statistics.median(costs) for name, costs in rounds.items()})
        self._rounds = rounds

    def ratio(self, one: str, other: str) -> float:
        """How many times as much one costs as the other: the median over the rounds."""
        return statistics.median(a / b for a, b in zip(self._rounds[one], self._rounds[other], strict=True))


def medians(contestants: Mapping[str, Contestant], options: Options, *, times: int = 1) -> Medians:
    """The median cost of each contestant's unit, over interleaved rounds.

    :param times: so many times the rounds, for what is short and uneven.
    """
    names = list(contestants)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-1, options.rounds * times):  # -1: the warm-up
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            gc.collect()
            cost = asyncio.run(_await(contestants[name]))
            if turn >= 0:
                taken[name].append(cost)
    return Medians(taken)


def table(rows: list[Row]) -> str:
    """The table, as text."""
    lines: list[tuple[str, ...]] = [("what", "arun", "floor", "peer", "ratio", "target", "holds")]
    for row in rows:
        head = (row.what, *(_shown(cost, row.unit) for cost in (row.arun, row.floor, row.peer)))
        for check in row.checks:
            figures = (f"{_rounded(check.value)} {check.unit}".strip(), check.target, "yes" if check.holds else "NO")
            lines.append((*head, *figures))
            head = ("", "", "", "")
    widths = [max(len(line[column]) for line in lines) for column in range(7)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(
        "  ".join(
            cell.rjust(width) if 0 < column < 5 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


_FACTORS = {"us": 1e6, "ms": 1e3, "MB": 1e-6, "": 1}


def _shown(cost: float | None, unit: str) -> str:
    return "" if cost is None else f"{_rounded(cost * _FACTORS[unit])} {unit}".strip()


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


async def _await(contestant: Contestant) -> float:
    return await contestant()
