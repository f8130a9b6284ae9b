"""A source in memory: a list of rows. Tables and the like are in :mod:`arun.data.interchange`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Self, cast

import pyarrow as pa

from arun.data.block import Row, Shaper
from arun.data.source import Fragment
from arun.errors import MisuseError
from arun.guards import shown

if TYPE_CHECKING:
    import pyarrow.compute as pc

__all__ = ("RowSource",)

_FRAGMENT_ROWS: Final = 8192


class RowSource:
    """A list of rows.

    :param rows: dicts; not copied, so leave them alone.
    :param schema: of them; None takes it from the rows.
    """

    name = "rows"

    def __init__(self, rows: Sequence[Mapping[str, Any]], schema: pa.Schema | None = None) -> None:
        for number, row in enumerate(rows):
            if not isinstance(row, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance] - users are not type-checked
                raise MisuseError(f"from_rows(): row {number} is {shown(row)}; a row is a dict")
        self._rows = rows
        self._schema = schema

    def schema(self) -> pa.Schema | None:
        """See :class:`~arun.data.source.Source`."""
        return self._schema

    def fragments(self) -> Iterator[Fragment]:
        """See :class:`~arun.data.source.Source`."""
        return _slices(len(self._rows))

    def read(self, fragment: Fragment, *, skip: int = 0) -> Iterator[pa.RecordBatch]:
        """See :class:`~arun.data.source.Source`."""
        rows = self._rows[fragment.place + skip : fragment.place + fragment.rows]
        yield Shaper("from_rows()", self._schema).batch(cast("Sequence[Row]", rows))

    def count(self) -> int:
        """See :class:`~arun.data.source.Source`."""
        return len(self._rows)

    def select(self, columns: Sequence[str]) -> Self | None:
        """It has them all in memory already."""
        return None

    def where(self, predicate: pc.Expression) -> Self | None:
        """It has nothing to leave unread."""
        return None


def _slices(rows: int) -> Iterator[Fragment]:
    for offset in range(0, rows, _FRAGMENT_ROWS):
        yield Fragment(key=str(offset), rows=min(_FRAGMENT_ROWS, rows - offset), place=offset)
