"""Batches for trainers: exact sizes, formats, and no copies that can be done without."""

from __future__ import annotations

import datetime
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arun.data.batches import Cutter, converter, iterate_batches
from arun.errors import DataError, MisuseError


@given(st.lists(st.integers(0, 9), max_size=8), st.none() | st.integers(1, 12))
def test_batches_have_the_rows_of_the_blocks_in_exact_numbers(sizes: list[int], batch_size: int | None) -> None:
    cutter = Cutter(batch_size)
    total, batches = 0, []
    for size in sizes:
        batches += cutter.cut(pa.record_batch({"n": range(total, total + size)}))
        total += size
    rest = cutter.rest()
    batches += [] if rest is None else [rest]
    assert [n for batch in batches for n in batch.column("n").to_pylist()] == [*range(total)]
    if batch_size is not None:
        assert [batch.num_rows for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
        assert all(0 < batch.num_rows <= batch_size for batch in batches[-1:])


def test_a_batch_within_one_block_is_not_copied() -> None:
    block = pa.record_batch({"n": range(10)})
    first, second = Cutter(4).cut(block)
    assert first.column(0).buffers()[1].address == block.column(0).buffers()[1].address
    assert second.column(0).offset == 4


@pytest.mark.anyio
async def test_a_stream_is_cut_and_converted() -> None:
    async def blocks() -> AsyncIterator[pa.RecordBatch]:
        for start in range(0, 10, 3):
            yield pa.record_batch({"n": range(start, min(10, start + 3))})

    batches = [batch["n"].tolist() async for batch in iterate_batches(blocks(), batch_size=4, format="numpy")]
    assert batches == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    dropped = [b.num_rows async for b in iterate_batches(blocks(), batch_size=4, drop_last=True)]
    assert dropped == [4, 4]


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(MisuseError, match="batch_size=0: it takes 1 or more, or None"):
        Cutter(0)
    with pytest.raises(
        MisuseError, match="format='polars': batches come as one of 'arrow', 'numpy', 'torch', 'pandas'"
    ):
        converter("polars")  # type: ignore[arg-type]  # the mistake


def test_numpy_arrays_have_the_shape_of_their_lists() -> None:
    batch = pa.record_batch({
        "n": [1, 2],
        "s": ["x", None],
        "v": pa.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], pa.list_(pa.float32(), 3)),
        "m": pa.array([[[1, 2]], [[3, 4]]], pa.list_(pa.list_(pa.int8(), 2), 1)),
        "t": pa.array([0, 1], pa.timestamp("us")),
        "l": [[1], [2, 3]],
    })
    arrays = converter("numpy")(batch)
    assert {name: array.shape for name, array in arrays.items()} == {
        "n": (2,),
        "s": (2,),
        "v": (2, 3),
        "m": (2, 1, 2),
        "t": (2,),
        "l": (2,),
    }
    assert arrays["s"].tolist() == ["x", None]
    assert arrays["t"].dtype == np.dtype("datetime64[us]")
    assert arrays["m"].tolist() == [[[1, 2]], [[3, 4]]]


def test_numpy_shares_the_memory_of_numbers() -> None:
    column = pa.array([1, 2, 3])
    array = converter("numpy")(pa.record_batch({"n": column}))["n"]
    assert array.ctypes.data == column.buffers()[1].address


def test_tensors_are_those_of_the_columns() -> None:
    torch = pytest.importorskip("torch")
    batch = pa.record_batch({
        "n": [1, 2, 3],
        "v": pa.array([[1, 2], [3, 4], [5, 6]], pa.list_(pa.float32(), 2)),
        "b": [True, False, True],
        "f": [1.0, None, 3.0],
        "x": pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(12, dtype=np.int32).reshape(3, 2, 2)),
    }).slice(1)
    tensors = converter("torch")(batch)
    assert tensors["n"].tolist() == [2, 3]
    assert tensors["v"].tolist() == [[3, 4], [5, 6]]
    assert tensors["b"].tolist() == [False, True]
    assert torch.isnan(tensors["f"]).tolist() == [True, False]
    assert tensors["x"].tolist() == [[[4, 5], [6, 7]], [[8, 9], [10, 11]]]


def test_lists_of_one_length_are_a_tensor_however_deep() -> None:
    pytest.importorskip("torch")
    images = [[[0, 1, 2]], [[3, 4, 5]], [[6, 7, 8]]]
    batch = pa.record_batch({"x": pa.array(images, pa.list_(pa.list_(pa.int16())))})
    tensors = converter("torch")(batch.slice(1).select(["x"]))
    assert tensors["x"].tolist() == images[1:]
    tensors["x"].zero_()
    assert batch["x"].to_pylist() == images


def test_writing_to_a_tensor_changes_no_rows() -> None:
    pytest.importorskip("torch")
    batch = pa.record_batch({
        "n": [1, 2],
        "v": pa.array([[1, 2], [3, 4]], pa.list_(pa.float32(), 2)),
        "b": [True, False],
        "f": [1.0, None],
        "x": pa.FixedShapeTensorArray.from_numpy_ndarray(np.arange(4, dtype=np.int32).reshape(2, 2)),
    })
    before = batch.to_pylist()
    for tensor in converter("torch")(batch).values():
        tensor.zero_()
    assert batch.to_pylist() == before


@pytest.mark.parametrize(
    ("column", "why"),
    [
        (pa.array(["x"]), "the column 'c' is string, which PyTorch has no tensor for; select"),
        (pa.array([[1], [2, 3]]), "the column 'c' is list<item: int64> of 1 to 2 values, .* the same length; pad them"),
        (pa.array([[1], None]), "the column 'c' is list<"),
        (pa.array([datetime.date(2024, 1, 1)]), "the column 'c' is date32"),
        (pa.array([1, None]), "the column 'c' holds null, which a tensor can't; fill it"),
    ],
)
def test_a_column_that_is_no_tensor_is_refused_by_name(column: Any, why: str) -> None:
    pytest.importorskip("torch")
    with pytest.raises(DataError, match=why):
        converter("torch")(pa.record_batch({"c": column}))


def test_pandas_gets_frames() -> None:
    frame = converter("pandas")(pa.record_batch({"n": [1, 2], "s": ["x", None]}))
    assert frame["n"].tolist() == [1, 2]
