"""Interchange: rows to and from pandas, Hugging Face, Ray Data, and what speaks Arrow's C interface."""

from __future__ import annotations

import datetime
from typing import Any

import pyarrow as pa
import pytest

from arun.data.interchange import (
    arrow_source,
    huggingface_source,
    pandas_source,
    ray_source,
    to_huggingface,
    to_pandas,
    to_ray,
)
from arun.errors import DataError, MisuseError
from tests.data.reading import read, rows

TABLE = pa.table({"n": [1, 2, 3], "s": ["x", None, "z"], "l": [[1], [], None]})


class Foreign:
    """Rows of a library that we don't know."""

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return TABLE.__arrow_c_stream__(requested_schema)


@pytest.mark.parametrize("data", [TABLE, Foreign(), TABLE.to_reader(), TABLE.to_batches()[0]])
def test_what_speaks_arrow_is_taken_over(data: Any) -> None:
    source = arrow_source(data)
    assert source.count() == 3
    assert read(source) == TABLE
    assert read(source.select(["l", "n"])) == TABLE.select(["l", "n"])


def test_tables_are_not_copied() -> None:
    source = arrow_source(TABLE)
    (fragment,) = source.fragments()
    (block,) = source.read(fragment, skip=1)
    assert block.column("n").buffers()[1].address == TABLE["n"].chunk(0).buffers()[1].address
    assert block.column("n").to_pylist() == [2, 3]


def test_a_large_table_has_several_fragments() -> None:
    source = arrow_source(pa.table({"n": range(600_000)}))
    assert [fragment.rows for fragment in source.fragments()] == [1 << 18, 1 << 18, 600_000 - (1 << 19)]
    assert read(source).num_rows == 600_000


def test_what_does_not_speak_arrow_is_refused() -> None:
    with pytest.raises(MisuseError, match="list has no __arrow_c_stream__, so its rows can't be taken over"):
        arrow_source([1])
    with pytest.raises(DataError, match="has no column 'z'; it has n, s, l"):
        arrow_source(TABLE).select(["z"])


def test_a_frame_goes_to_and_fro() -> None:
    import pandas as pd

    when = pd.Timestamp(2024, 1, 2, tz="Europe/Berlin")
    frame = pd.DataFrame({"n": [1, 2], "s": ["x", None], "t": [when, when], "c": pd.Categorical(["a", "b"])})
    source = pandas_source(frame)
    assert rows(source)[0] == {"n": 1, "s": "x", "t": when.to_pydatetime(), "c": "a"}
    back = to_pandas(read(source))
    assert back["t"].tolist() == frame["t"].tolist()
    assert back["c"].tolist() == ["a", "b"]


def test_an_index_with_a_meaning_is_a_column() -> None:
    import pandas as pd

    frame = pd.DataFrame({"n": [1, 2]}, index=pd.Index(["a", "b"], name="key"))
    assert rows(pandas_source(frame)) == [{"n": 1, "key": "a"}, {"n": 2, "key": "b"}]


@pytest.fixture
def datasets() -> Any:
    module = pytest.importorskip("datasets")
    module.disable_progress_bars()
    return module


def test_a_hugging_face_dataset_goes_to_and_fro(datasets: Any) -> None:
    dataset = datasets.Dataset.from_dict({"n": [1, 2, 3], "t": [datetime.date(2024, 1, 1)] * 3, "l": [["x"], [], None]})
    source = huggingface_source(dataset)
    assert source.count() == 3
    assert rows(source) == list(dataset)
    assert to_huggingface(read(source)).to_list() == dataset.to_list()
    assert read(source.select(["l"])).column_names == ["l"]
    assert read(source).schema == source.schema()


def test_a_shuffled_hugging_face_dataset_keeps_its_order(datasets: Any) -> None:
    dataset = datasets.Dataset.from_dict({"n": range(100)}).shuffle(seed=1).select(range(50))
    source = huggingface_source(dataset)
    assert [row["n"] for row in rows(source)] == dataset["n"][:]
    (fragment,) = source.fragments()
    assert [n for block in source.read(fragment, skip=48) for n in block.column("n").to_pylist()] == dataset["n"][48:]


def test_a_streamed_hugging_face_dataset_is_read_as_it_comes(datasets: Any) -> None:
    pulled: list[int] = []

    def make() -> Any:
        for n in range(100_000):
            pulled.append(n)
            yield {"n": n, "l": [] if n < 50_000 else ["x"]}

    source = huggingface_source(datasets.IterableDataset.from_generator(make))
    assert source.schema() is None
    (fragment,) = source.fragments()
    blocks = source.read(fragment, skip=1)
    first = next(blocks)
    assert first.column("n")[0].as_py() == 1
    assert len(pulled) < 50_000
    blocks.close()  # type: ignore[attr-defined]  # it is a generator


def test_a_streamed_dataset_with_known_columns_tells_them(datasets: Any) -> None:
    dataset = datasets.Dataset.from_dict({"n": range(10), "s": ["x"] * 10}).to_iterable_dataset(num_shards=3)
    source = huggingface_source(dataset)
    assert source.schema() == pa.schema([("n", pa.int64()), ("s", pa.string())])
    assert read(source.select(["n"])).to_pydict() == {"n": [*range(10)]}


def test_a_dict_of_splits_is_refused(datasets: Any) -> None:
    with pytest.raises(MisuseError, match="DatasetDict is no Dataset or IterableDataset of Hugging Face; of several"):
        huggingface_source(datasets.DatasetDict())


@pytest.mark.ray
def test_a_ray_dataset_goes_to_and_fro() -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        dataset = to_ray(TABLE)
        source = ray_source(dataset)
        assert source.schema() == TABLE.schema
        assert read(source) == TABLE
        assert read(source.select(["s"])) == TABLE.select(["s"])
        lazy = ray_source(ray.data.range(10).map(lambda row: {"double": row["id"] * 2}))
        blocks = [block for fragment in lazy.fragments() for block in lazy.read(fragment)]
        assert sorted(n for block in blocks for n in block.column("double").to_pylist()) == [*range(0, 20, 2)]
    finally:
        ray.shutdown()
