"""Files that are written: each under a hidden name in its folder, and renamed when it is whole.

A path with the format's suffix (``answers.parquet``) is one file. Any other is a folder of parts, in which an empty
file ``_SUCCESS`` says that all of them are there. Where a file system renames by copying (object stores), the new name
appears at once, too.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Sequence
from typing import Any, Final, Literal, Protocol, TypeAlias, get_args

import pyarrow as pa
import pyarrow.fs

from arun.data.files.csv import CsvFormat, checked_delimiter, delimiter_of
from arun.data.files.ipc import IpcFormat
from arun.data.files.jsonl import JsonLinesFormat
from arun.data.files.parquet import ParquetFormat
from arun.data.files.partitions import PartitionedPart
from arun.data.files.paths import locate, public
from arun.data.schemas import conflict, conform, unify
from arun.data.sink import Part, PartWriter
from arun.errors import DataError, MisuseError

__all__ = ("Compression", "Encoder", "FileSink", "Format", "Mode", "csv_sink", "ipc_sink", "jsonl_sink", "parquet_sink")

Mode: TypeAlias = Literal["error", "overwrite", "append"]
Compression: TypeAlias = Literal["gzip", "zstd", "bz2"]

_PART_BYTES: Final = 256 << 20
_HELD_BYTES: Final = 8 << 20  # of blocks that wait for a column's type
_SUCCESS: Final = "_SUCCESS"
_TEMPORARY: Final = ".arun-"
_HIDDEN: Final = re.compile(r"^\.arun-whole-\w+-(?=part-)")
_Type: Final = pyarrow.fs.FileType
_ENDINGS: Final = {"gzip": ".gz", "zstd": ".zst", "bz2": ".bz2"}


class Encoder(Protocol):
    """Writes blocks of one schema into a stream."""

    #: bytes that it holds back, about
    pending: int

    def write(self, block: pa.RecordBatch) -> None:
        """Append a block."""

    def close(self) -> None:
        """Write what is held back, and the end of the file; the stream stays open."""


class Format(Protocol):
    """A format of files.

    :ivar suffix: of their names.
    :ivar word: what people call it.
    """

    @property
    def suffix(self) -> str: ...
    @property
    def word(self) -> str: ...

    def encoder(self, stream: Any, schema: pa.Schema) -> Encoder:
        """Begin a file.

        :raises DataError: it can't hold these columns.
        """
        ...


class FileSink:
    """Writes files of any :class:`Format`.

    :param path: a file, by its suffix, or a folder; a URL of either.
    :param mode: what to do where something is already: refuse, replace it, or add parts to the folder. What is replaced
        is there until everything new is.
    :param part_bytes: a part that has grown past this is committed and another one begun; a single file has one.
    :param compression: of whole files, where the format has none of its own; told by the suffix of a single file.
    :param filesystem: of pyarrow or fsspec, where the path is no URL.
    :param partition_by: columns that are folders instead, as in ``year=2024/``.
    """

    resumable: Final = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        how: Format,
        *,
        mode: Mode = "error",
        part_bytes: int | None = None,
        compression: Compression | None = None,
        filesystem: Any = None,
        partition_by: Sequence[str] = (),
    ) -> None:
        given = os.fspath(path)
        self._given = public(given)
        self._how = how
        self._partition_by = (partition_by,) if isinstance(partition_by, str) else tuple(partition_by)
        self._mode = mode
        self._filesystem, self._path = locate(given, filesystem)
        self._path = self._path.rstrip("/")
        endings = {how.suffix + ending: name for name, ending in _ENDINGS.items()} | {how.suffix: None}
        told = [ending for ending in endings if self._path.endswith(ending) and not given.endswith("/")]
        self._is_file = bool(told)
        self._compression = endings[told[0]] if told else compression
        self._suffix = how.suffix + _ENDINGS.get(self._compression or "", "")
        self.name = f"{how.word} {self._given}"
        self.part_bytes = None if self._is_file else part_bytes or _PART_BYTES
        #: of this run, in the names of its parts where there are others
        self._mark = ""
        #: by the parts of this run, when all of them are there; they are hidden till then
        self._replaced: list[str] = []
        #: whether a file of the name of a part would be another run's
        self._alone = False
        #: whether a killed run is gone on with, which needs what this one has hidden
        self._resumes = False
        if mode not in get_args(Mode):
            raise MisuseError(f"{self.name}: mode={mode!r}; it is one of {', '.join(map(repr, get_args(Mode)))}")
        if self._is_file and part_bytes is not None:
            raise MisuseError(f"{self.name} is one file, so part_bytes has no meaning; name a folder for parts")
        if self._is_file and mode == "append":
            raise MisuseError(f"{self.name} is one file, which can't be appended to; name a folder")
        if self._is_file and self._partition_by:
            raise MisuseError(f"{self.name} is one file, which has no folders to partition by; name a folder")
        hidden = [name for name in self._partition_by if name.startswith((".", "_"))]
        if hidden:
            raise MisuseError(f"{self.name}: folders that begin as {hidden[0]!r} does are hidden; rename the column")

    def begin(self, mark: str = "", *, again: bool = False) -> None:
        """Look at what is there already, and make the folder.

        :param mark: in the names of all parts of a job that is checkpointed.
        :param again: an earlier process has begun already; what has the mark is its work.
        """
        self._mark, self._replaced, self._resumes = f"-{mark}" if mark else "", [], bool(mark)
        info = self._filesystem.get_file_info(self._path)
        if self._is_file:
            self._alone = self._mode == "error" and not mark
            self._begin_file(info, again=again)
            return
        if info.type == _Type.File:
            raise DataError(f"{self._given!r} is a file; name a folder, or a file that ends in {self._how.suffix}")
        self._filesystem.create_dir(self._path, recursive=True)
        there = self._filesystem.get_file_info(pyarrow.fs.FileSelector(self._path, recursive=True))
        files = [info.path for info in there if info.type == _Type.File]
        success = f"{self._path}/{_SUCCESS}"
        ours = [path for path in files if mark and path.endswith(f"{self._mark}{self._suffix}")]
        left = [path for path in files if os.path.basename(path).startswith(_TEMPORARY) and not self._is_whole(path)]
        kept = sorted(set(files) - {*ours, *left, success})
        if kept and self._mode == "error":
            raise DataError(
                f"{self._given!r} has files already ({len(kept)}, such as {os.path.basename(kept[0])}); "
                'mode="overwrite" replaces them, mode="append" adds to them'
            )
        if not mark and (kept or self._mode == "append"):
            self._mark = f"-{uuid.uuid4().hex[:8]}"
        self._alone = not self._mark
        # Another run that appends may be writing its own.
        stale = [path for path in left if self._mode != "append" or (mark and f"{self._mark}." in path)]
        for path in (*stale, *{success}.intersection(files)):
            self._filesystem.delete_file(path)
        if self._mode == "overwrite":
            self._replaced = kept

    def missing(self, parts: Sequence[Part]) -> list[Part]:
        """Which of these, that a job has committed, are not there any more."""
        if not parts:
            return []
        if self._is_file:
            there = self._filesystem.get_file_info(self._path).type == _Type.File
            return [] if there else list(parts)
        below = pyarrow.fs.FileSelector(self._path, recursive=True, allow_not_found=True)
        # Parts in the place of others are hidden till the end; of those in several folders only the names are alike.
        names = {_HIDDEN.sub("", info.base_name) for info in self._filesystem.get_file_info(below)}
        return [part for part in parts if os.path.basename(part.path) not in names]

    def part(self, name: str) -> PartWriter:
        """Begin a part, or the only file."""
        if self._is_file:
            return self._file(self._path)
        file = f"{name}{self._mark}{self._suffix}"
        if not self._partition_by:
            return self._file(f"{self._path}/{file}")

        def begin(folder: str) -> PartWriter:
            self._filesystem.create_dir(f"{self._path}/{folder}", recursive=True)
            return self._file(f"{self._path}/{folder}/{file}")

        return PartitionedPart(self._partition_by, begin, f"{self._path}/{'*/' * len(self._partition_by)}{file}")

    def _file(self, path: str) -> _PartFile:
        whole = self._whole if self._replaced else None
        return _PartFile(self._filesystem, path, self._how, self._compression, whole=whole, alone=self._alone)

    def end(self) -> None:
        """Show what is hidden, remove what is replaced, and say that the folder is whole.

        :raises DataError: another run has replaced it before.
        """
        if self._is_file:
            return
        below = pyarrow.fs.FileSelector(self._path, recursive=True)
        there = self._filesystem.get_file_info(below) if self._mark else []
        gone = set(self._replaced).difference(info.path for info in there)
        if gone:
            for info in there if not self._resumes else ():
                if self._is_whole(info.path):
                    self._filesystem.delete_file(info.path)
            raise DataError(
                f"{self._given!r}: another run has replaced {os.path.basename(min(gone))} meanwhile, so what this one "
                "has written is not shown; let one run at a time write to a folder, or append to it"
            )
        for info in there:
            folder, _, name = info.path.rpartition("/")
            if name.startswith(self._whole):
                self._filesystem.move(info.path, f"{folder}/{name.removeprefix(self._whole)}")
        for path in self._replaced:
            self._filesystem.delete_file(path)
        self._filesystem.open_output_stream(f"{self._path}/{_SUCCESS}").close()

    @property
    def _whole(self) -> str:
        """How the names of this run's hidden parts begin."""
        return f"{_TEMPORARY}whole{self._mark}-"

    def _is_whole(self, path: str) -> bool:
        """Whether it is a part of this job that is still hidden."""
        return bool(self._mark) and os.path.basename(path).startswith(self._whole)

    def _begin_file(self, info: Any, *, again: bool) -> None:
        if info.type == _Type.Directory:
            raise DataError(f"{self._given!r} is a folder; name a file, or write a slash behind it for parts")
        if info.type == _Type.File and self._mode == "error" and not again:
            raise DataError(f'{self._given!r} exists already; mode="overwrite" replaces it')
        folder = self._path.rpartition("/")[0]
        if folder:
            self._filesystem.create_dir(folder, recursive=True)


class _PartFile:
    """One file that is being written.

    :param path: that it gets in the end.
    :param whole: what its name begins with when it is whole, while it is to stay hidden.
    :param alone: whether a file of that name would be another run's, and is not replaced.
    """

    def __init__(
        self, filesystem: Any, path: str, how: Format, compression: str | None, *, whole: str | None, alone: bool
    ) -> None:
        folder, slash, name = path.rpartition("/")
        self._path = path
        self._whole = path if whole is None else f"{folder}{slash}{whole}{name}"
        self._temporary = f"{folder}{slash}{_TEMPORARY}{uuid.uuid4().hex[:8]}-{name}"
        self._alone = alone
        self._filesystem = filesystem
        self._how = how
        self._file = filesystem.open_output_stream(self._temporary, compression=None)
        self._stream = self._file if compression is None else pa.CompressedOutputStream(self._file, compression)
        self._schema: pa.Schema | None = None
        self._encoder: Encoder | None = None
        #: until each column has a type: a column that begins with nulls gets that of its first value
        self._held: list[pa.RecordBatch] = []
        self._held_bytes = 0
        self._rows = 0

    def write(self, block: pa.RecordBatch) -> None:
        """Append a block."""
        if not block.schema.names and block.num_rows:
            raise DataError(f"{self._path}: the rows have no columns, and {self._how.word} keeps none without")
        if self._schema is None:
            self._schema = unify([(f"what is written to {self._path}", block.schema.remove_metadata())])
        elif self._encoder is None:
            self._schema = _widened(self._schema, block.schema)
        why = conflict(self._schema, block.schema)
        if why is not None:
            raise DataError(
                f"{self._path}: in a later block {why}; all blocks must have the same columns: cast it, or drop it"
            )
        self._rows += block.num_rows
        if self._encoder is not None:
            self._encoder.write(conform(block, self._schema, name=self._path))
            return
        self._held.append(block)
        self._held_bytes += block.nbytes
        if _is_typed(self._schema) or self._held_bytes > _HELD_BYTES:
            self._begin()

    def size(self) -> int:
        """Bytes written so far, and held back."""
        return int(self._file.tell()) + self._held_bytes + (0 if self._encoder is None else self._encoder.pending)

    def commit(self) -> Part:
        """End the file and give it its name.

        :raises DataError: another run writes there, too.
        """
        (self._encoder or self._begin()).close()
        self._close()
        info = self._filesystem.get_file_info(self._temporary)
        if info.type != _Type.File:  # a run that began later has tidied it away
            raise self._disturbed()
        if isinstance(self._filesystem, pyarrow.fs.LocalFileSystem):
            _sync(self._temporary)
        if not self._name():
            raise self._disturbed()
        return Part(path=self._path, rows=self._rows, size=info.size)

    def _name(self) -> bool:
        """Give it its name; False if that is another run's."""
        if self._alone and isinstance(self._filesystem, pyarrow.fs.LocalFileSystem):
            try:
                os.link(self._temporary, self._whole)
            except FileExistsError:
                return False
            except OSError:
                pass  # a file system without hard links
            else:
                os.unlink(self._temporary)
                return True
        if self._alone and self._filesystem.get_file_info(self._whole).type != _Type.NotFound:
            return False
        self._filesystem.move(self._temporary, self._whole)
        return True

    def _disturbed(self) -> DataError:
        return DataError(
            f"{self._path}: another run has written to this place meanwhile; let one run at a time write to it, or "
            'have each append to a folder, with mode="append"'
        )

    def abort(self) -> None:
        """Remove it."""
        try:
            if self._encoder is not None:
                self._encoder.close()
            self._close()
        except (pa.ArrowException, OSError):
            pass  # a full disk, for one; what can't be written is not wanted any more
        if self._filesystem.get_file_info(self._temporary).type == _Type.File:
            self._filesystem.delete_file(self._temporary)

    def _begin(self) -> Encoder:
        schema = pa.schema([]) if self._schema is None else self._schema
        try:
            self._encoder = self._how.encoder(self._stream, schema)
        except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as exc:
            raise DataError(f"{self._path}: {self._how.word} can't hold these columns: {exc}") from exc
        held, self._held, self._held_bytes = self._held, [], 0
        for block in held:
            self._encoder.write(conform(block, schema, name=self._path))
        return self._encoder

    def _close(self) -> None:
        self._stream.close()
        self._file.close()


def _is_typed(schema: pa.Schema) -> bool:
    def is_typed(kind: pa.DataType) -> bool:
        if pa.types.is_dictionary(kind):
            return True
        return not pa.types.is_null(kind) and all(is_typed(kind.field(i).type) for i in range(kind.num_fields))

    return all(is_typed(field.type) for field in schema)


def _widened(schema: pa.Schema, other: pa.Schema) -> pa.Schema:
    """The same columns, of types that the other's fit in as well; the same where that can't be."""
    if set(schema.names) != set(other.names):
        return schema
    try:
        return unify([("", schema), ("", other)])
    except DataError:
        return schema


def _sync(path: str) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def parquet_sink(
    path: str | os.PathLike[str],
    *,
    mode: Mode = "error",
    part_bytes: int | None = None,
    compression: str = "zstd",
    row_group_bytes: int = 32 << 20,
    filesystem: Any = None,
    partition_by: Sequence[str] = (),
) -> FileSink:
    """Parquet.

    :param compression: ``"zstd"``, ``"snappy"``, ``"gzip"``, ``"lz4"``, ``"brotli"`` or ``"none"``.
    :param row_group_bytes: of Arrow memory that make one row group.

    The other parameters are those of :class:`FileSink`.
    """
    how = ParquetFormat(compression=compression, row_group_bytes=row_group_bytes)
    return FileSink(path, how, mode=mode, part_bytes=part_bytes, filesystem=filesystem, partition_by=partition_by)


def jsonl_sink(
    path: str | os.PathLike[str],
    *,
    mode: Mode = "error",
    part_bytes: int | None = None,
    compression: Compression | None = None,
    filesystem: Any = None,
) -> FileSink:
    """One JSON object a line: dates and times in ISO 8601, binary in base64, maps as objects, NaN as null.

    :param compression: of a folder's parts; a single file's is told by its suffix, such as ``.jsonl.gz``.

    The other parameters are those of :class:`FileSink`.
    """
    return FileSink(
        path,
        JsonLinesFormat(),
        mode=mode,
        part_bytes=part_bytes,
        compression=compression,
        filesystem=filesystem,
    )


def csv_sink(
    path: str | os.PathLike[str],
    *,
    mode: Mode = "error",
    part_bytes: int | None = None,
    delimiter: str | None = None,
    compression: Compression | None = None,
    filesystem: Any = None,
) -> FileSink:
    """CSV with a header: null as nothing, an empty string as ``""``.

    :param delimiter: between values; by default a tab in a file that ends in ``.tsv``, and a comma in others.
    :param compression: of a folder's parts; a single file's is told by its suffix, such as ``.csv.gz``.

    The other parameters are those of :class:`FileSink`.
    """
    own = delimiter_of(os.fspath(path))
    how = CsvFormat(
        delimiter=own if delimiter is None else checked_delimiter(delimiter), suffix=".tsv" if own == "\t" else ".csv"
    )
    return FileSink(path, how, mode=mode, part_bytes=part_bytes, compression=compression, filesystem=filesystem)


def ipc_sink(
    path: str | os.PathLike[str],
    *,
    mode: Mode = "error",
    part_bytes: int | None = None,
    compression: str = "none",
    filesystem: Any = None,
) -> FileSink:
    """Arrow IPC in the file format, which is Feather 2.

    :param compression: of the buffers: ``"zstd"``, ``"lz4"`` or ``"none"``.

    The other parameters are those of :class:`FileSink`.
    """
    how = IpcFormat(compression=compression)
    return FileSink(path, how, mode=mode, part_bytes=part_bytes, filesystem=filesystem)
