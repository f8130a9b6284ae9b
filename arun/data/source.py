"""Sources: where blocks come from, in fragments that can be read by themselves, again, and in any order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

import msgspec

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.compute as pc

__all__ = ("Fragment", "Source")


class Fragment(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a source: a row group, a file, a range of lines.

    :ivar key: what it is called, the same in every run as long as the data is the same; unique in its source.
    :ivar rows: how many, where that is known without reading.
    :ivar size: bytes, where that is known without reading.
    :ivar place: what the source needs to find it again.
    """

    key: str
    rows: int | None = None
    size: int | None = None
    place: Any = None


class Source(Protocol):
    """Something that can be read in fragments. Immutable; every method may block, so it is called in a thread.

    A source whose keys of fragments are others when its rows are others says so by an attribute ``resumable = True``:
    then a checkpoint can go on with it.

    One whose ``select([])`` still gives its rows, as blocks without columns, may say so by ``columnless = True``: then
    a count reads no columns.

    One that reads less than there is, by ``select`` and ``where``, may say so in an attribute ``label``: its name with
    what is read of it, for plans.

    :ivar name: for people, such as ``parquet prompts/*.parquet``.
    """

    @property
    def name(self) -> str: ...

    def schema(self) -> pa.Schema | None:
        """Names and types of its columns; None where only reading tells."""

    def fragments(self) -> Iterable[Fragment]:
        """Its fragments, in the order of its rows. May be lazy."""
        ...

    def read(self, fragment: Fragment, *, skip: int = 0) -> Iterator[pa.RecordBatch]:
        """The rows of a fragment but for the first ``skip``, block by block. Closing the iterator closes the file."""
        ...

    def count(self) -> int | None:
        """How many rows there are, where that is known without reading them."""

    def select(self, columns: Sequence[str]) -> Self | None:
        """The same source with these columns only, read no others; None where it can't."""

    def where(self, predicate: pc.Expression) -> Self | None:
        """The same source with only the rows for which this holds, exactly; None where it can't."""
