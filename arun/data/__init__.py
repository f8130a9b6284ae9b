"""Lazy datasets: a plan of steps over Arrow blocks, run by the kernel, streaming.

>>> answers = read_parquet("prompts.parquet").map(render).filter(lambda row: row["lang"] == "en")
>>> print(answers.explain())
>>> async for block in answers: ...
>>> await answers.sort("id").write_parquet("answers/").arun()
"""

from __future__ import annotations

from arun.errors import MissingExtraError

try:
    from arun.data.barriers import Aggregation
    from arun.data.dataset import Dataset, run
    from arun.data.declare import BatchOptions, RowOptions, SinkOptions
    from arun.data.execution.statistics import StageStatistics, Statistics, StepStatistics
    from arun.data.grouped import Grouped
    from arun.data.options import RunOptions
    from arun.data.reading import (
        from_arrow,
        from_huggingface,
        from_iterable,
        from_pandas,
        from_ray,
        from_rows,
        read,
        read_csv,
        read_ipc,
        read_jsonl,
        read_openai_batch,
        read_parquet,
    )
    from arun.data.running import Report
    from arun.data.sink import Part, PartWriter, Sink
    from arun.data.source import Fragment, Source
    from arun.data.stream import BatchStream, BlockStream, RowStream
except ModuleNotFoundError as exc:
    if exc.name not in {"fsspec", "pyarrow"}:
        raise
    raise MissingExtraError("arun.data", "data", exc.name) from exc

__all__ = (
    "Aggregation",
    "BatchOptions",
    "BatchStream",
    "BlockStream",
    "Dataset",
    "Fragment",
    "Grouped",
    "Part",
    "PartWriter",
    "Report",
    "RowOptions",
    "RowStream",
    "RunOptions",
    "Sink",
    "SinkOptions",
    "Source",
    "StageStatistics",
    "Statistics",
    "StepStatistics",
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
    "run",
)
