"""Where datasets come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from arun.data.dataset import Dataset
from arun.data.items import Items, ItemSource
from arun.data.logical import Iterate, Read
from arun.data.source import Source
from arun.data.sources import RowSource, TableSource

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ("from_arrow", "from_iterable", "from_rows", "read")


def from_rows(rows: Sequence[Mapping[str, Any]], *, schema: pa.Schema | None = None) -> Dataset:
    """The rows of a list.

    :param rows: dicts.
    :param schema: a ``pyarrow.Schema`` of them; by default it is taken from the rows.
    """
    return Dataset(Read(RowSource(rows, schema)))


def from_iterable(items: ItemSource, *, schema: pa.Schema | None = None) -> Dataset:
    """The rows of an (async) iterable, as they come.

    :param items: gives rows, record batches or tables; may be endless. Or a function of no arguments that returns one,
        which is called for each run; an iterator, such as a generator, can be run once only.
    :param schema: a ``pyarrow.Schema`` of the rows; by default it is taken from them.
    """
    return Dataset(Iterate(Items(items), schema))


def from_arrow(table: pa.Table) -> Dataset:
    """The rows of an Arrow table."""
    return Dataset(Read(TableSource(table)))


def read(source: Source) -> Dataset:
    """The rows of a source of your own.

    :param source: see :class:`~arun.data.source.Source`.
    """
    return Dataset(Read(source))
