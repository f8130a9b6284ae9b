"""The state machines behind :mod:`arun.reducers`: one Reduction is one reduction under way.

Plain objects without any await: a reducer may hold many side by side (several over one stream, one for each group), and
no scope, task or context variable of one can reach another.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable, Mapping
from operator import itemgetter
from typing import Any, Generic, TypeVar

import msgspec

from arun.errors import MisuseError
from arun.outcomes import Failed, Ok, Skipped
from arun.state import State

__all__ = (
    "Collected",
    "Combined",
    "Count",
    "Failures",
    "First",
    "Grouped",
    "Majority",
    "Merged",
    "Quorum",
    "Reduction",
    "Running",
    "Statistics",
    "Text",
    "Top",
    "feed",
)

R = TypeVar("R")
Function = Callable[[Any], Any]


class Reduction(Generic[R]):
    """One reduction under way. Subclass it for a reducer of your own: ``Reducer(Longest).over(states)``.

    >>> class Longest(Reduction[str]):
    ...     best = ""
    ...
    ...     def add(self, item: State) -> bool:
    ...         longer = len(item["text"]) > len(self.best)
    ...         if longer:
    ...             self.best = item["text"]
    ...         return longer
    ...
    ...     def result(self) -> str:
    ...         return self.best

    :ivar satisfied: whether no further item can change the result.
    :ivar growing: whether ``result()`` costs more with every item; partials are then spaced (see the module).
    """

    satisfied: bool = False
    growing: bool = False

    def add(self, item: Any) -> bool:
        """Take one item; return whether the result has changed."""
        raise MisuseError(f"{type(self).__qualname__} defines no add(item)")

    def fail(self, outcome: Failed | Skipped) -> bool:
        """Take the outcome of a subtask that has no result; return whether the result has changed."""
        return False

    def result(self) -> R:
        """The result so far: a copy, or something that never changes."""
        raise MisuseError(f"{type(self).__qualname__} defines no result()")


class Statistics(msgspec.Struct, frozen=True):
    """Running statistics of numbers.

    :ivar mean: None where there are no numbers, as ``min`` and ``max``.
    :ivar variance: that of a sample, as ``statistics.variance``; None for fewer than two numbers.
    """

    count: int
    sum: float
    mean: float | None = None
    min: float | None = None
    max: float | None = None
    variance: float | None = None


class Combined(Reduction["dict[str, Any]"]):
    def __init__(self, merged: list[Reduction[dict[str, Any]]], named: dict[str, Reduction[Any]]) -> None:
        self._merged = merged
        self._named = named
        self._open: list[Reduction[Any]] = [*merged, *named.values()]
        self.growing = any(one.growing for one in self._open)

    def add(self, item: Any) -> bool:
        changed = False
        for one in self._open:
            if one.add(item):
                changed = True
        self._close_satisfied()
        return changed

    def fail(self, outcome: Failed | Skipped) -> bool:
        changed = False
        for one in self._open:
            if one.fail(outcome):
                changed = True
        self._close_satisfied()
        return changed

    def result(self) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for one in self._merged:
            result |= one.result()
        return result | {name: one.result() for name, one in self._named.items()}

    def _close_satisfied(self) -> None:
        for one in self._open:
            if one.satisfied:
                self._open = [one for one in self._open if not one.satisfied]
                self.satisfied = not self._open
                return


class Grouped(Reduction["dict[Hashable, R]"]):
    growing = True

    def __init__(self, by: Function, start: Callable[[], Reduction[R]], groups: int | None) -> None:
        self._by = by
        self._start = start
        self._groups: dict[Hashable, Reduction[R]] = {}
        self._wanted = groups

    def add(self, item: Any) -> bool:
        group = _hashable(self._by(item), "group_by")
        reduction = self._groups.get(group)
        new = reduction is None
        if reduction is None:
            reduction = self._groups[group] = self._start()
        if reduction.satisfied:
            return False
        changed = reduction.add(item)
        if reduction.satisfied and self._wanted is not None:
            self._wanted -= 1
            self.satisfied = not self._wanted
        return changed or new

    def result(self) -> dict[Hashable, R]:
        return {group: reduction.result() for group, reduction in self._groups.items()}


class Collected(Reduction["list[Any]"]):
    growing = True

    def __init__(self, get: Function, order: Function | None, wanted: int | None = None) -> None:
        self._get = get
        self._order = order
        self._items: list[Any] = []
        self._wanted = wanted

    def add(self, item: Any) -> bool:
        value = self._get(item)
        self._items.append(value if self._order is None else (self._order(item), value))
        self.satisfied = len(self._items) == self._wanted
        return True

    def result(self) -> list[Any]:
        if self._order is None:
            return self._items.copy()
        self._items.sort(key=itemgetter(0))  # cheap: it was sorted, save for the newest
        return [value for _, value in self._items]


class Text(Reduction[str]):
    growing = True

    def __init__(self, get: Function, order: Function | None, separator: str) -> None:
        self._pieces = Collected(get, order)
        self._separator = separator

    def add(self, item: Any) -> bool:
        return self._pieces.add(item)

    def result(self) -> str:
        return self._separator.join(self._pieces.result())


class First(Reduction[Any]):
    def __init__(self, get: Function, default: Any) -> None:
        self._get = get
        self._value = default

    def add(self, item: Any) -> bool:
        self._value = self._get(item)
        self.satisfied = True
        return True

    def result(self) -> Any:
        return self._value


class Quorum(Reduction[Any]):
    def __init__(self, get: Function, k: int, default: Any) -> None:
        self._get = get
        self._k = k
        self._value = default
        self._votes: dict[Hashable, int] = {}

    def add(self, item: Any) -> bool:
        value = _hashable(self._get(item), "quorum")
        votes = self._votes[value] = self._votes.get(value, 0) + 1
        if votes < self._k:
            return False
        self._value = value
        self.satisfied = True
        return True

    def result(self) -> Any:
        return self._value


class Majority(Reduction[Any]):
    def __init__(self, get: Function, among: int | None, default: Any) -> None:
        self._get = get
        self._left = among
        self._leader = default
        self._most = 0
        #: the most votes that a value other than the leader has
        self._second = 0
        self._votes: dict[Hashable, int] = {}

    def add(self, item: Any) -> bool:
        value = _hashable(self._get(item), "majority")
        votes = self._votes[value] = self._votes.get(value, 0) + 1
        leads = votes > self._most
        changed = leads and (votes == 1 or value != self._leader)
        if leads:
            self._second = self._most if changed else self._second
            self._most, self._leader = votes, value
        else:
            self._second = max(self._second, votes)
        self._cast()
        return changed

    def fail(self, outcome: Failed | Skipped) -> bool:
        self._cast()
        return False

    def result(self) -> Any:
        return self._leader

    def _cast(self) -> None:
        if self._left is not None:
            self._left -= 1
            self.satisfied = self._left <= 0 or self._second + self._left <= self._most


class Top(Reduction["list[Any]"]):
    growing = True

    def __init__(self, k: int, get: Function, order: Function) -> None:
        self._k = k
        self._get = get
        self._order = order
        self._seen = 0
        # (what is compared, minus the ordinal, what is kept): of equals, the latest is the smallest.
        self._heap: list[tuple[Any, int, Any]] = []

    def add(self, item: Any) -> bool:
        rank = self._order(item)
        self._seen += 1
        if len(self._heap) < self._k:
            heapq.heappush(self._heap, (rank, -self._seen, self._get(item)))
        elif rank > self._heap[0][0]:
            heapq.heapreplace(self._heap, (rank, -self._seen, self._get(item)))
        else:
            return False
        return True

    def result(self) -> list[Any]:
        return [value for _, _, value in sorted(self._heap, reverse=True)]


class Count(Reduction[int]):
    def __init__(self) -> None:
        self._count = 0

    def add(self, item: Any) -> bool:
        self._count += 1
        return True

    def result(self) -> int:
        return self._count


class Running(Reduction[Statistics]):
    def __init__(self, get: Function) -> None:
        self._get = get
        self._count = 0
        self._sum: float = 0
        self._mean = self._squares = 0.0
        self._min = self._max = 0.0

    def add(self, item: Any) -> bool:
        value = self._get(item)
        self._count += 1
        self._sum += value
        off = value - self._mean
        self._mean += off / self._count
        self._squares += off * (value - self._mean)
        if self._count == 1:
            self._min = self._max = value
        elif value < self._min:
            self._min = value
        elif value > self._max:
            self._max = value
        return True

    def result(self) -> Statistics:
        if not self._count:
            return Statistics(0, 0)
        variance = self._squares / (self._count - 1) if self._count > 1 else None
        return Statistics(self._count, self._sum, self._mean, self._min, self._max, variance)


class Merged(Reduction["dict[str, Any]"]):
    growing = True

    def __init__(self, keys: tuple[str, ...], overwrite: bool) -> None:
        self._keys = keys
        self._overwrite = overwrite
        self._fields: dict[str, Any] = {}

    def add(self, item: Any) -> bool:
        written: Mapping[str, Any] = item.delta.written if isinstance(item, State) and not self._keys else item
        changed = False
        for key in self._keys or written:
            if key not in written:
                continue
            value = written[key]
            if key in self._fields and not self._overwrite and not _same(self._fields[key], value):
                raise MisuseError(
                    f"merge: two subtasks wrote {key!r}: {self._fields[key]!r:.80} and {value!r:.80}; "
                    "name the fields to merge, collect this one, or let the last one win: merge(overwrite=True)"
                )
            self._fields[key] = value
            changed = True
        return changed

    def result(self) -> dict[str, Any]:
        return self._fields.copy()


class Failures(Reduction["list[Failed | Skipped]"]):
    growing = True

    def __init__(self) -> None:
        self._outcomes: list[Failed | Skipped] = []

    def add(self, item: Any) -> bool:
        return False

    def fail(self, outcome: Failed | Skipped) -> bool:
        self._outcomes.append(outcome)
        return True

    def result(self) -> list[Failed | Skipped]:
        return self._outcomes.copy()


def feed(reduction: Reduction[Any], item: Any) -> bool:
    if isinstance(item, Ok):
        return reduction.add(item.value)
    if isinstance(item, (Failed, Skipped)):
        return reduction.fail(item)
    return reduction.add(item)


def _hashable(value: Any, what: str) -> Hashable:
    try:
        hash(value)
    except TypeError as exc:
        raise MisuseError(
            f"{what} compares what subtasks give by hash, and a {type(value).__name__} has none ({exc}); "
            f"give a function that makes it hashable: {what}(..., lambda state: tuple(state['answer']))"
        ) from exc
    return value  # type: ignore[no-any-return]  # it has a hash


def _same(a: Any, b: Any) -> bool:
    try:
        return a is b or bool(a == b)
    except Exception:  # noqa: BLE001 - an == of the user's that has no truth value (arrays): not known to be the same
        return False
