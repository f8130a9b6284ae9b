"""Lazy datasets: a plan of steps over Arrow blocks, run by the kernel, streaming.

>>> answers = from_rows(prompts).map(render).filter(lambda row: row["lang"] == "en")
>>> print(answers.explain())
>>> async for block in answers: ...
"""

from __future__ import annotations

from arun.data.dataset import Dataset, run
from arun.data.declare import BatchOptions, RowOptions
from arun.data.options import RunOptions
from arun.data.reading import from_arrow, from_iterable, from_rows, read
from arun.data.running import Report, Statistics
from arun.data.stream import BlockStream, RowStream

__all__ = (
    "BatchOptions",
    "BlockStream",
    "Dataset",
    "Report",
    "RowOptions",
    "RowStream",
    "RunOptions",
    "Statistics",
    "from_arrow",
    "from_iterable",
    "from_rows",
    "read",
    "run",
)
