"""What an all-to-all operation reads: blocks as they come, or Parquet files that DuckDB scans itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import pyarrow as pa

from arun.data.barriers.carried import ROW, carried_schema, column, scanned
from arun.data.barriers.limits import Limits
from arun.data.block import unify
from arun.data.spill import SpillingQueue

__all__ = ("Relation", "Table")


class Relation(msgspec.Struct, frozen=True, kw_only=True):
    """The rows that go into an all-to-all operation.

    :ivar schema: names and types of its columns; None where only the blocks tell.
    :ivar blocks: read and closed by who reads the operation's result, in whose task; None if DuckDB scans ``files``.
    :ivar first: a block that comes before those.
    :ivar settled: whether the first block has the types of all.
    :ivar files: paths of Parquet files, whose columns of ``schema`` are read.
    """

    schema: pa.Schema | None
    blocks: AsyncIterator[pa.RecordBatch] | None = None
    first: pa.RecordBatch | None = None
    settled: bool = True
    files: tuple[str, ...] = ()

    @classmethod
    def of_blocks(
        cls, blocks: AsyncIterator[pa.RecordBatch], schema: pa.Schema | None = None, *, settled: bool = False
    ) -> Relation:
        """Rows that come block by block.

        :param schema: what the blocks are held to. By default what all of them fit into, which only the last one tells:
            so they wait, in memory or on disk, before any of them is looked at.
        :param settled: promises that the first block has the types of all, so that they need not wait.
        """
        return cls(schema=schema, blocks=blocks, settled=settled)

    @classmethod
    def of_files(cls, paths: Sequence[str], schema: pa.Schema) -> Relation | None:
        """All rows of local Parquet files, in order, for DuckDB to scan.

        :param schema: the columns wanted, each of the same type in every file.
        :return: None if DuckDB would read something else than Arrow does, so that the blocks have to be given.
        """
        names = {name.casefold() for name in schema.names}
        exact = (
            len(names) == len(schema)
            and all(scanned(field.type, field.name) for field in schema)
            and not any(set("*?[") & set(path) or "://" in path for path in paths)
        )
        return cls(schema=schema, files=tuple(paths)) if exact and paths else None

    async def known(self, otherwise: pa.Schema | None, limits: Limits) -> Relation:
        """The same rows with a schema: their own, or ``otherwise`` if there is no block."""
        if self.schema is not None or self.blocks is None:
            return self
        if self.settled:
            first = await anext(self.blocks, None)
            return msgspec.structs.replace(self, first=first, schema=otherwise if first is None else first.schema)
        queue = SpillingQueue(memory=limits.memory // 2, folder=limits.folder)
        reader, schemas = queue.reader(), dict[pa.Schema, None]()
        try:
            async for block in self.blocks:
                schemas[block.schema] = None
                await queue.put(block)
            queue.end()
            return Relation(schema=unify(schemas) if schemas else otherwise, blocks=reader)
        except BaseException:
            queue.release()
            raise

    def table(self, name: str, what: str, *, numbered: bool) -> Table:
        """As what DuckDB knows these rows, once their schema is known.

        :param numbered: whether each row has its number in a column ``ROW``.
        """
        carried = carried_schema(self.schema, what)
        if self.blocks is not None:
            return Table(self, carried, f'"{name}"', name, numbered)
        columns = [
            f"{scanned(own.type, _quoted(own.name))} AS {column(at)}" for at, own in enumerate(self.schema or ())
        ]
        if numbered:
            number = "file_row_number" if len(self.files) == 1 else "(file_index << 40) + file_row_number"
            columns.append(f"{number} AS {ROW}")
        files = ", ".join(f"'{path.replace(chr(39), chr(39) * 2)}'" for path in self.files)
        scan = f"(SELECT {', '.join(columns)} FROM read_parquet([{files}], hive_partitioning=false)) AS {name}"
        return Table(self, carried, scan, name, numbered)


class Table(msgspec.Struct, frozen=True):
    """A relation inside a query.

    :ivar sql: for a FROM clause.
    :ivar name: its name in the query.
    """

    relation: Relation
    carried: pa.Schema
    sql: str
    name: str
    numbered: bool

    def column(self, name: str) -> str:
        """A column of the relation, as an SQL expression."""
        return f"{self.name}.{column(self.index(name))}"

    def index(self, name: str) -> int:
        return int(self.schema.get_field_index(name))

    @property
    def schema(self) -> Any:
        return self.relation.schema

    @property
    def columns(self) -> str:
        """All its columns, for a SELECT."""
        return ", ".join(f"{self.name}.{name}" for name in self.carried.names)


def _quoted(name: str) -> str:
    """An identifier of SQL."""
    return '"' + name.replace('"', '""') + '"'
