"""Grouped: rows with equal keys, on their way to one row each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from arun.data.all_to_all import Aggregate
from arun.data.barriers import Aggregation
from arun.data.logical import AllToAll
from arun.errors import MisuseError

if TYPE_CHECKING:
    from arun.data.operations import Operations

__all__ = ("Grouped",)

D = TypeVar("D", bound="Operations")


class Grouped(Generic[D]):
    """Made by :meth:`Dataset.group_by() <arun.data.Dataset.group_by>`."""

    __slots__ = ("_keys", "_rows")

    def __init__(self, rows: D, keys: tuple[str, ...]) -> None:
        self._rows = rows
        self._keys = keys

    def aggregate(self, **results: Aggregation | str | Sequence[Any]) -> D:
        """One row for each group, in no particular order. On DuckDB; spills to disk.

        >>> rows.group_by("lang").aggregate(rows="count", tokens=("sum", "tokens"), p90=("quantile", "tokens", 0.9))

        Null is a key like any other, and so is NaN.

        :param results: by name of the new column: ``"count"``, or a function and what it is computed of; see
            :class:`~arun.data.Aggregation`.
        :raises MisuseError: there is no such function, or a result has the name of a key.
        """
        wanted = {name: Aggregation.of(spec) for name, spec in results.items()}
        taken = sorted(set(self._keys) & set(wanted))
        if taken:
            raise MisuseError(f"aggregate(): {taken[0]!r} is a key and a result; give the result another name")
        if not self._keys and not wanted:
            raise MisuseError("aggregate() without keys and results has nothing to give; give it one of them")
        return type(self._rows)(AllToAll(Aggregate(self._keys, wanted), (self._rows.node,)))
