"""Where datasets come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from arun.data.dataset import Dataset
from arun.data.files import Paths, batch_source, csv_source, ipc_source, jsonl_source, parquet_source
from arun.data.interchange import arrow_source, huggingface_source, pandas_source, ray_source
from arun.data.items import Items, ItemSource
from arun.data.logical import Iterate, Read
from arun.data.source import Source
from arun.data.sources import RowSource

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = (
    "from_arrow",
    "from_huggingface",
    "from_iterable",
    "from_pandas",
    "from_ray",
    "from_rows",
    "read",
    "read_csv",
    "read_ipc",
    "read_jsonl",
    "read_openai_batch",
    "read_parquet",
)


def from_rows(rows: Sequence[Mapping[str, Any]], *, schema: pa.Schema | None = None) -> Dataset:
    """The rows of a list.

    :param rows: dicts.
    :param schema: a ``pyarrow.Schema`` of them; by default it is taken from the rows.
    """
    return read(RowSource(rows, schema))


def from_iterable(items: ItemSource, *, schema: pa.Schema | None = None) -> Dataset:
    """The rows of an (async) iterable, as they come.

    :param items: gives rows, record batches or tables; may be endless. Or a function of no arguments that returns one,
        which is called for each run; an iterator, such as a generator, can be run once only.
    :param schema: a ``pyarrow.Schema`` of the rows; by default it is taken from them.
    """
    return Dataset(Iterate(Items(items), schema))


def from_arrow(data: Any) -> Dataset:
    """The rows of anything that speaks Arrow's C interface: tables and record batches, Polars, DuckDB, and others."""
    return read(arrow_source(data))


def from_pandas(frame: Any) -> Dataset:
    """The rows of a pandas DataFrame. An index that is more than a count becomes columns."""
    return read(pandas_source(frame))


def from_huggingface(dataset: Any) -> Dataset:
    """The rows of a ``datasets.Dataset``, or of an ``IterableDataset``, which is streamed."""
    return read(huggingface_source(dataset))


def from_ray(dataset: Any) -> Dataset:
    """The rows of a ``ray.data.Dataset``, which is executed and streamed when they are read."""
    return read(ray_source(dataset))


def read_parquet(paths: Paths, columns: Sequence[str] | None = None, *, filesystem: Any = None) -> Dataset:
    """The rows of Parquet files. Choices of columns and conditions by expressions are pushed into the reading.

    Folders such as ``year=2024`` are columns, as with every format; a condition on them rules out files.

    :param paths: files, folders, globs or URLs; see ``arun.data.files.paths``.
    :param columns: these only, in this order; None: all.
    :param filesystem: of pyarrow or fsspec, where the paths are no URLs.
    """
    return read(parquet_source(paths, columns, filesystem=filesystem))


def read_jsonl(
    paths: Paths, columns: Sequence[str] | None = None, *, schema: pa.Schema | None = None, filesystem: Any = None
) -> Dataset:
    """The rows of files with one JSON object a line, which may be compressed.

    :param paths: files, folders, globs or URLs; see ``arun.data.files.paths``.
    :param columns: these only, in this order; None: all.
    :param schema: a ``pyarrow.Schema`` of them; by default it is taken from the first 4 MiB.
    :param filesystem: of pyarrow or fsspec, where the paths are no URLs.
    """
    return read(jsonl_source(paths, columns, schema=schema, filesystem=filesystem))


def read_csv(
    paths: Paths,
    columns: Sequence[str] | None = None,
    *,
    delimiter: str | None = None,
    names: Sequence[str] | None = None,
    types: Mapping[str, pa.DataType] | None = None,
    filesystem: Any = None,
) -> Dataset:
    """The rows of CSV files in UTF-8, which may be compressed. One thread reads a file, from its beginning.

    :param paths: files, folders, globs or URLs; see ``arun.data.files.paths``.
    :param columns: these only, in this order; None: all.
    :param delimiter: between values; by default a tab in files that end in ``.tsv``, and a comma in others.
    :param names: of the columns, where the files have no header.
    :param types: of columns that must not be guessed.
    :param filesystem: of pyarrow or fsspec, where the paths are no URLs.
    """
    return read(csv_source(paths, columns, delimiter=delimiter, names=names, types=types, filesystem=filesystem))


def read_ipc(paths: Paths, columns: Sequence[str] | None = None, *, filesystem: Any = None) -> Dataset:
    """The rows of Arrow IPC files (Feather 2) and streams. One thread reads a file, from its beginning.

    :param paths: files, folders, globs or URLs; see ``arun.data.files.paths``.
    :param columns: these only, in this order; None: all.
    :param filesystem: of pyarrow or fsspec, where the paths are no URLs.
    """
    return read(ipc_source(paths, columns, filesystem=filesystem))


def read_openai_batch(paths: Paths, *, filesystem: Any = None) -> Dataset:
    """Requests of OpenAI batch files: columns ``custom_id``, ``method``, ``url`` and ``body``, the latter JSON as text.

    :param paths: files, folders, globs or URLs; see ``arun.data.files.paths``.
    :param filesystem: of pyarrow or fsspec, where the paths are no URLs.
    """
    return read(batch_source(paths, filesystem=filesystem))


def read(source: Source) -> Dataset:
    """The rows of a source of your own.

    :param source: see :class:`~arun.data.source.Source`.
    """
    return Dataset(Read(source))
