"""Hive partitions: what the names of folders say of all rows below them, as in ``sales/year=2024/part.parquet``.

Read, they are columns behind those of the files: int64 where all values are whole numbers, else text. What a file has
itself is read from the file. Written, they are not in the files.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.compute as pc

from arun.data.files.paths import File
from arun.data.sink import Part, PartWriter
from arun.errors import DataError

__all__ = ("PartitionedPart", "Partitions")

#: Hive's name for no value.
_NULL: Final = "__HIVE_DEFAULT_PARTITION__"
#: Files that one part may have open at a time.
_MOST_FILES: Final = 1000
_WHOLE: Final = re.compile(r"-?\d{1,18}")


class Partitions:
    """What the folders of some files say.

    :ivar schema: the columns, in the order of the folders.
    """

    def __init__(self, files: Iterable[File]) -> None:
        self._texts = {file.path: dict(_said(file.folders)) for file in files}
        values: dict[str, list[str | None]] = {}
        for texts in self._texts.values():
            for name, text in texts.items():
                values.setdefault(name, []).append(text)
        self.schema = pa.schema([(name, _type_of(texts)) for name, texts in values.items()])

    def beside(self, own: pa.Schema) -> pa.Schema:
        """The columns of files, and those of their folders that these lack."""
        return pa.schema([*own, *(field for field in self.schema if field.name not in own.names)])

    def add(self, batch: pa.RecordBatch, file: File, wanted: Sequence[str]) -> pa.RecordBatch:
        """A file's rows with those columns of ``wanted`` that only its folders tell."""
        names = [name for name in self.schema.names if name in wanted and name not in batch.schema.names]
        if not names:
            return batch
        added = [pa.repeat(self._value(file, name), batch.num_rows) for name in names]
        return pa.RecordBatch.from_arrays([*batch.columns, *added], names=[*batch.schema.names, *names])

    def expression(self, file: File, own: Sequence[str]) -> pc.Expression | None:
        """What holds for all rows of a file, by its folders; None if they say nothing."""
        said: list[Any] = []
        for name in self.schema.names:
            if name not in own:
                value = self._value(file, name)
                said.append(pc.field(name) == value if value.is_valid else pc.field(name).is_null())
        return functools.reduce(operator.and_, said) if said else None

    def _value(self, file: File, name: str) -> pa.Scalar:
        kind = self.schema.field(name).type
        text = self._texts[file.path].get(name)
        return pa.scalar(int(text) if text is not None and pa.types.is_integer(kind) else text, kind)


class PartitionedPart:
    """One part that is being written, as a file for each combination of values.

    :param by: columns, which are not written themselves.
    :param begin: begins the file in a folder, such as ``year=2024/lang=en``.
    :param pattern: of the paths of all files, for people.
    """

    def __init__(self, by: Sequence[str], begin: Callable[[str], PartWriter], pattern: str) -> None:
        self._by = by
        self._begin = begin
        self._pattern = pattern
        self._files: dict[str, PartWriter] = {}

    def write(self, block: pa.RecordBatch) -> None:
        """Append a block."""
        for folder, rows in self._divided(block):
            if folder not in self._files:
                if len(self._files) == _MOST_FILES:
                    raise DataError(
                        f"{self._pattern}: {', '.join(self._by)} has more than {_MOST_FILES} values, each a file; "
                        "partition by a column of fewer, or sort by it and make part_bytes smaller"
                    )
                self._files[folder] = self._begin(folder)
            self._files[folder].write(rows)

    def size(self) -> int:
        """Bytes written so far, about."""
        return sum(file.size() for file in self._files.values())

    def commit(self) -> Part:
        """Let all files appear, one after the other."""
        parts = [file.commit() for file in self._files.values()]
        return Part(path=self._pattern, rows=sum(part.rows for part in parts), size=sum(part.size for part in parts))

    def abort(self) -> None:
        """Leave nothing of those that have not appeared."""
        for file in self._files.values():
            file.abort()

    def _divided(self, block: pa.RecordBatch) -> Iterator[tuple[str, pa.RecordBatch]]:
        """The rows by folder, each in their order, without the columns that are in its name."""
        missing = [name for name in self._by if name not in block.schema.names]
        if missing:
            raise DataError(
                f"{self._pattern}: there is no column {missing[0]!r} to partition by; there are "
                f"{', '.join(block.schema.names)}"
            )
        if not block.num_rows:
            return
        codes = pa.repeat(pa.scalar(0), block.num_rows)
        for column in (block.column(name) for name in self._by):
            if pa.types.is_floating(column.type) or pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
                raise DataError(
                    f"{self._pattern}: {column.type} makes no names of folders; partition by another column"
                )
            codes = _paired(codes, column)
        order = pc.call_function("array_sort_indices", [codes])
        ends = pc.call_function("run_end_encode", [codes.take(order)]).run_ends.to_pylist()
        rows = block.take(order)
        rest = rows.select([name for name in block.schema.names if name not in self._by])
        for start, end in zip([0, *ends], ends, strict=False):
            first = [rows.column(name)[start].as_py() for name in self._by]
            folder = "/".join(_folder_of(name, value) for name, value in zip(self._by, first, strict=True))
            yield folder, rest.slice(start, end - start)


def _paired(codes: pa.Array, column: pa.Array) -> pa.Array:
    """A number for each row, the same for rows with the same code and value."""
    encoded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
    wider = pc.call_function("multiply", [codes.cast(pa.int64()), pa.scalar(len(encoded.dictionary) + 1)])
    both = pc.call_function("add", [wider, encoded.indices.cast(pa.int64()).fill_null(len(encoded.dictionary))])
    return both.dictionary_encode().indices


def _folder_of(name: str, value: Any) -> str:
    return f"{quote(name, safe='')}={_NULL if value is None else quote(str(value), safe=' ')}"


def _said(folders: Sequence[str]) -> Iterable[tuple[str, str | None]]:
    for folder in folders:
        name, equals, text = folder.partition("=")
        if equals and name:
            yield unquote(name), None if text == _NULL else unquote(text)


def _type_of(texts: Sequence[str | None]) -> pa.DataType:
    known = [text for text in texts if text is not None]
    return pa.int64() if known and all(_WHOLE.fullmatch(text) for text in known) else pa.string()
