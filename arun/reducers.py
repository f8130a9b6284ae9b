"""Ready-made streaming reducers: what a parallel action makes of its subtasks, better with every one that ends.

A :class:`Reducer` is a value: ``collect("answer")``, ``top_k(3, by="score")``. Two ways to use it::

    class AskAll(MapStates):
        ...
        reduce = reducing(answers=collect("answer"), best=top_k(3, by="score"))  # one field of the State each

    class AskAll(MapStates):
        ...
        async def reduce(self, state, states):
            async for answer in quorum(2, "answer").over(states):
                yield state.update(answer=answer)

``over`` takes any async iterator, so also those of :func:`arun.fan_out` and of streams. It yields partial results, of
which the last is the result; on an empty stream that is the one of nothing: ``[]``, ``0``, the default.

*What is reduced.* Reducers take ``of``: the name of a State's field, a function of the State, or nothing for all of it.
Of an outcome (``on_error="collect"``, ``fan_out``) that is an ``Ok``, they see the value; the others are left to
:func:`failures`. In :func:`majority`, a subtask that failed has voted, for nothing.

*Composition.* :func:`combine` runs several over one stream, :func:`group_by` one for each group; both are reducers.

*Early exit.* ``first``, ``first_n``, ``quorum`` and ``majority(among=...)`` are satisfied early; a combination is when
all in it are. ``over`` ends then, and closes the iterator if that can be closed. In a parallel action the kernel
cancels the subtasks that still run, and awaits their clean-up, as soon as ``reduce`` has returned.

*Cost.* An item costs O(1); in ``top_k`` O(log k). A partial is a copy that the reducer never touches again, in plain
types: it may be kept, sent and stored, and is equal when it comes back. A copy of all answers for each of n answers
would be O(n^2), in memory moved here and in bytes sent to a browser. So where the result grows, each item brings a
partial up to 128 items, and after that each 64th part of those there are: a display is never more than 1.6 % behind,
all copies together cost O(n), and the last partial is always complete. (A read-only view of one shared list would save
the copy and not the bytes; and neither msgspec nor ``state.append`` takes it for a list.) ``every=1`` insists.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Hashable
from operator import itemgetter
from typing import Any, Final, Generic, TypeAlias, TypeVar

import anyio

from arun.errors import MisuseError
from arun.hosting import GRACE, close
from arun.outcomes import Failed, Skipped
from arun.reductions import (
    Collected,
    Combined,
    Count,
    Failures,
    First,
    Grouped,
    Majority,
    Merged,
    Quorum,
    Reduction,
    Running,
    Statistics,
    Text,
    Top,
    feed,
)
from arun.state import State

__all__ = (
    "Of",
    "Reducer",
    "Reduction",
    "Statistics",
    "collect",
    "combine",
    "concat",
    "count",
    "failures",
    "first",
    "first_n",
    "group_by",
    "majority",
    "merge",
    "quorum",
    "reducing",
    "statistics",
    "top_k",
)

R = TypeVar("R")

#: What to take of an item: the field of this name, what the function makes of it, or None: all of it.
Of: TypeAlias = str | Callable[[Any], Any] | None

_SHARE: Final = 64


class Reducer(Generic[R]):
    """How to reduce a stream; immutable, and good for any number of runs at a time.

    :param start: makes the :class:`Reduction` of one run.
    """

    __slots__ = ("start",)

    def __init__(self, start: Callable[[], Reduction[R]]) -> None:
        self.start = start

    async def over(self, states: AsyncIterator[Any], *, every: int | None = None) -> AsyncGenerator[R, None]:
        """Reduce ``states``, yielding partial results; the last one is the result, and there is at least one.

        :param states: owned from now on: closed when this ends, if it has ``aclose()``.
        :param every: a partial after so many changes of the result; by default as the module says.
        """
        _at_least(1, every=1 if every is None else every)
        reduction = self.start()
        changes = shown = 0
        last_shown = -1
        try:
            async for item in states:
                changes += feed(reduction, item)
                if reduction.satisfied:
                    break
                step = every or (changes // _SHARE if reduction.growing else 1) or 1
                if changes - shown >= step:
                    shown = last_shown = changes
                    yield reduction.result()
            if changes != last_shown:
                yield reduction.result()
        finally:
            if hasattr(states, "aclose"):
                with anyio.move_on_after(GRACE, shield=True):
                    await close(states)


def reducing(*merged: Reducer[dict[str, Any]], **fields: Reducer[Any]) -> Any:
    """The ``reduce`` of a parallel action: each reducer's result becomes the State's field of its name.

    :param merged: reducers whose results are fields themselves, as those of :func:`merge`.
    :return: a method. (Any, because type checkers have no name for one that is assigned in a class body.)

    >>> class AskAll(MapStates):
    ...     reduce = reducing(answers=collect("answer"), scores=statistics("score"))
    """
    combined = combine(*merged, **fields)

    async def reduce(self: Any, state: State, states: AsyncIterator[Any]) -> AsyncGenerator[State, None]:
        async for values in combined.over(states):
            yield state.update(**values)

    return reduce


# -- composition ----------------------------------------------------------------------------------------------


def combine(*merged: Reducer[dict[str, Any]], **named: Reducer[Any]) -> Reducer[dict[str, Any]]:
    """Several reducers over one stream: a dict of their results. Satisfied when all of them are.

    :param merged: reducers of dicts, whose entries stand beside the named ones.
    """
    if not merged and not named:
        raise MisuseError("nothing to reduce with; name reducers, for example: reducing(answers=collect('answer'))")
    for name, reducer in (*enumerate(merged), *named.items()):
        _check_reducer(reducer, f"{name}=" if isinstance(name, str) else "")
    return Reducer(lambda: Combined([one.start() for one in merged], {k: one.start() for k, one in named.items()}))


def group_by(by: Of, reducer: Reducer[R] | None = None, *, groups: int | None = None) -> Reducer[dict[Hashable, R]]:
    """One reduction for each group: a dict of results by group, in the order in which groups appeared.

    :param by: what tells groups apart; hashable.
    :param reducer: reduces each group; by default ``collect()``.
    :param groups: satisfied once the reductions of so many groups are; by default never.

    >>> group_by("topic", top_k(2, by="score"))
    """
    each: Reducer[Any] = collect() if reducer is None else reducer
    _check_reducer(each, "reducer=")
    _at_least(1, groups=1 if groups is None else groups)
    get = _getter(by)
    return Reducer(lambda: Grouped(get, each.start, groups))


# -- the reducers ------------------------------------------------------------------------------------------------


def collect(of: Of = None, *, by: Of = None) -> Reducer[list[Any]]:
    """A list of all, as they come, or in the order of ``by``."""
    get, order = _getter(of), None if by is None else _getter(by)
    return Reducer(lambda: Collected(get, order))


def first(of: Of = None, *, default: Any = None) -> Reducer[Any]:
    """The first one; ``default`` if there is none. Satisfied by it."""
    get = _getter(of)
    return Reducer(lambda: First(get, default))


def first_n(n: int, of: Of = None) -> Reducer[list[Any]]:
    """A list of the first ``n``. Satisfied when it has them."""
    _at_least(1, n=n)
    get = _getter(of)
    return Reducer(lambda: Collected(get, None, n))


def quorum(k: int, of: Of = None, *, default: Any = None) -> Reducer[Any]:
    """The first value that ``k`` subtasks agree on; ``default`` if none is. Satisfied by it.

    With ``k = n // 2 + 1`` of n subtasks that is the absolute majority.

    :param of: hashable; agreement is equality.
    """
    _at_least(1, k=k)
    get = _getter(of)
    return Reducer(lambda: Quorum(get, k, default))


def majority(of: Of = None, *, among: int | None = None, default: Any = None) -> Reducer[Any]:
    """The value of most subtasks; of several, the one that had so many first. ``default`` if there is none.

    A partial comes whenever another value takes the lead.

    :param of: hashable; votes for equal values count together.
    :param among: how many vote: satisfied once no other value can overtake. A subtask whose failure is collected has
        voted, for nothing. By default all are awaited.
    """
    _at_least(1, among=1 if among is None else among)
    get = _getter(of)
    return Reducer(lambda: Majority(get, among, default))


def top_k(k: int, of: Of = None, *, by: Of = None) -> Reducer[list[Any]]:
    """A list of the ``k`` largest, best first; of equals, the earlier one.

    :param by: what is compared; by default what is kept. For the smallest: ``by=lambda state: -state["cost"]``.
    """
    _at_least(1, k=k)
    get = _getter(of)
    order = get if by is None else _getter(by)
    return Reducer(lambda: Top(k, get, order))


def count() -> Reducer[int]:
    """How many there are."""
    return Reducer(Count)


def statistics(of: Of = None) -> Reducer[Statistics]:
    """Count, sum, mean, minimum, maximum and variance of numbers (Welford's algorithm, Technometrics 4(3), 1962)."""
    get = _getter(of)
    return Reducer(lambda: Running(get))


def concat(of: Of = None, *, separator: str = "", by: Of = None) -> Reducer[str]:
    """One text of all, as they come, or in the order of ``by``: ``concat("text", by="page")``."""
    get, order = _getter(of), None if by is None else _getter(by)
    return Reducer(lambda: Text(get, order, separator))


def merge(*keys: str, overwrite: bool = False) -> Reducer[dict[str, Any]]:
    """The fields that the subtasks wrote, as one dict: ``reduce = reducing(merge("summary", "title"))``.

    :param keys: which fields; a State that lacks one is fine. By default all that was written since the parent's State,
        with what ``states`` or ``tasks`` had set.
    :param overwrite: True: of different values the one that came last stays. By default they are an error, because
        which one comes last may be chance.
    :raises MisuseError: on different values for one field.
    """
    return Reducer(lambda: Merged(keys, overwrite))


def failures() -> Reducer[list[Failed | Skipped]]:
    """The outcomes without a result, which every other reducer leaves out; for ``on_error="collect"``."""
    return Reducer(Failures)


# -- private ---


def _getter(of: Of) -> Callable[[Any], Any]:
    if of is None:
        return _itself
    if isinstance(of, str):
        return itemgetter(of)
    if callable(of):
        return of
    raise MisuseError(f"{of!r:.80} says nothing about what to reduce; give a field's name, a function, or nothing")


def _itself(item: Any) -> Any:
    return item


def _at_least(least: int, **given: int) -> None:
    for name, value in given.items():
        if value < least:
            raise MisuseError(f"{name}={value}: at least {least}")


def _check_reducer(candidate: object, where: str) -> None:
    if not isinstance(candidate, Reducer):
        name = getattr(candidate, "__name__", None)
        hint = f"call it: {name}(...)" if callable(candidate) and name else "for example collect('answer')"
        raise MisuseError(f"{where}{candidate!r:.80} is not a Reducer; {hint}")
