"""Frames: a piece of a block between two steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress
from typing import cast

import pyarrow as pa

from arun.data.block import Row, Shaper, row_dicts

__all__ = ("Frame",)


class Frame:
    """A piece of a block as Arrow, as rows, or as both, which then say the same.

    :ivar origins: of the rows, where a checkpoint is kept; else None.
    """

    __slots__ = ("_batch", "_rows", "origins")

    def __init__(self, batch: pa.RecordBatch, origins: Sequence[int] | None) -> None:
        self._batch: pa.RecordBatch | None = batch
        self._rows: list[Row] | None = None
        self.origins = origins

    def __len__(self) -> int:
        return len(self._rows) if self._rows is not None else cast("int", cast("pa.RecordBatch", self._batch).num_rows)

    @property
    def rows_only(self) -> bool:
        """Whether there is no Arrow of it."""
        return self._batch is None

    def rows(self) -> list[Row]:
        """As rows; made once."""
        if self._rows is None:
            self._rows = row_dicts(cast("pa.RecordBatch", self._batch))
        return self._rows

    def batch(self, shaper: Shaper) -> pa.RecordBatch:
        """As Arrow; made once."""
        if self._batch is None:
            self._batch = shaper.batch(cast("list[Row]", self._rows))
        return self._batch

    def become_rows(self, rows: list[Row], origins: Sequence[int] | None) -> None:
        """Something else, as rows."""
        self._rows, self._batch, self.origins = rows, None, origins

    def become_batch(self, batch: pa.RecordBatch, origins: Sequence[int] | None) -> None:
        """Something else, as Arrow."""
        self._rows, self._batch, self.origins = None, batch, origins

    def keep(self, mask: Sequence[bool]) -> None:
        """Only the rows for which ``mask`` is true."""
        if all(mask):
            return
        if self._batch is not None:
            self._batch = self._batch.filter(pa.array(mask, type=pa.bool_()))
        if self._rows is not None:
            self._rows = list(compress(self._rows, mask))
        if self.origins is not None:
            self.origins = list(compress(self.origins, mask))

    def keep_first(self, rows: int) -> None:
        """Only so many rows."""
        if self._batch is not None:
            self._batch = self._batch.slice(0, rows)
        if self._rows is not None:
            self._rows = self._rows[:rows]
        if self.origins is not None:
            self.origins = self.origins[:rows]
