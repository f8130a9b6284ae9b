"""Extension types: arrays, tensors and tables arrive equal, without a copy of their memory, or are refused."""

from __future__ import annotations

import array
import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from arun.channel import decode_payload, register_type
from arun.channel.codec import Scattered, decoder_for, encode_payload
from arun.channel.extensions import encode_scattered
from arun.errors import MisuseError, PayloadError

LARGE = 200_000


class Embedded(msgspec.Struct):
    text: str
    vector: np.ndarray
    more: dict[str, np.ndarray] = {}


async def double(method, payload):
    yield decode_payload(payload, np.ndarray) * 2


def table() -> pa.Table:
    return pa.table({
        "n": pa.array(range(LARGE)),
        "text": pa.array(["some text", None] * (LARGE // 2)),
        "kind": pa.array(["a", "b"] * (LARGE // 2)).dictionary_encode(),
        "tags": pa.array([["x"], []] * (LARGE // 2)),
    })


def torch() -> Any:
    import torch  # not at the top: it takes every process that collects the tests a second and a half

    return torch


MAKERS: dict[str, Callable[[], Any]] = {
    "small": lambda: np.arange(10),
    "large": lambda: np.arange(LARGE, dtype="f4").reshape(100, -1),
    "Fortran order": lambda: np.arange(LARGE).reshape(100, -1).T,
    "strided": lambda: np.arange(LARGE * 2)[::2],
    "no dimension": lambda: np.array(1.5),
    "nothing in it": lambda: np.empty((3, 0, 2), "i8"),
    "big-endian": lambda: np.arange(LARGE, dtype=">i4"),
    "times": lambda: np.arange("2026-01", "2027-01", dtype="M8[D]"),
    "texts": lambda: np.array(["a", "bcd"]),
    "read-only": lambda: np.frombuffer(bytes(LARGE), "u1"),
    "tensor": lambda: torch().arange(LARGE).reshape(2, -1),
    "small tensor": lambda: torch().ones(3, dtype=torch().bfloat16),
    "transposed tensor": lambda: torch().ones(300, 500).T,
    "empty tensor": lambda: torch().empty(0, 4),
    "tensor with a gradient": lambda: torch().ones(LARGE, requires_grad=True),
    "tensor without dimension": lambda: torch().tensor(7),
    "table": table,
    "slice of a table": lambda: table().slice(5, 100),
    "empty table": lambda: table().slice(0, 0),
    "batch": lambda: pa.record_batch({"n": list(range(LARGE))}),
}


@functools.cache
def made(name: str) -> Any:
    return MAKERS[name]()


def assert_same(there: Any, here: Any) -> None:
    assert type(there) is type(here)
    if isinstance(here, np.ndarray):
        assert there.dtype == here.dtype
        assert not there.flags.writeable
        assert there.flags.aligned
        np.testing.assert_array_equal(there, here)
    elif type(here).__module__ == "torch":
        assert there.dtype == here.dtype
        assert there.shape == here.shape
        assert torch().equal(there, here)
    else:
        assert there.equals(here)


@pytest.mark.anyio
@pytest.mark.parametrize("name", MAKERS)
async def test_what_is_sent_arrives_equal(link, name):
    async def same(method, payload):
        value = decode_payload(payload, type(made(name)))
        assert_same(value, made(name))
        yield value
        yield {"again": [value, 1]}

    connection = await link(same)
    stream = connection.open("same", made(name))
    assert_same(await anext(stream), made(name))
    again = await anext(stream)
    assert_same(again["again"][0], made(name))
    assert [item async for item in stream] == []


@pytest.mark.anyio
@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(1.5), np.int64(3), np.uint8(4), np.bool_(True)])
async def test_a_number_of_numpy_s_arrives_as_one_of_python_s(link, number):
    async def mean(method, payload):
        yield {"mean": number}

    arrived = (await (await link(mean)).call("mean"))["mean"]
    assert arrived == number
    assert type(arrived) is type(number.item())


@pytest.mark.anyio
async def test_arrays_lie_in_structs_beside_other_values(link):
    sent = Embedded("a", np.arange(LARGE), {"b": np.arange(3), "c": np.ones(LARGE)})

    async def handler(method, payload):
        yield decode_payload(payload, Embedded)
        yield sent

    connection = await link(handler)
    got = [item async for item in connection.open("same", sent, item_type=Embedded)]
    for item in got:
        assert item.text == "a"
        assert_same(item.vector, sent.vector)
        assert_same(item.more["b"], sent.more["b"])
        assert_same(item.more["c"], sent.more["c"])
    assert len(got) == 2


@pytest.mark.anyio
async def test_arrays_go_through_a_call(link):
    connection = await link(double)
    got = await connection.call("double", np.ones((500, 500)), result_type=np.ndarray)
    assert got.sum() == 500_000


@pytest.mark.anyio
async def test_a_generator_may_use_its_array_again_for_the_next_item(link):
    async def refill(method, payload):
        page = np.zeros(LARGE, "i8")
        for n in range(5):
            page.fill(n)
            yield page

    connection = await link(refill)
    assert [(page[0], page[-1]) async for page in connection.open("refill")] == [(n, n) for n in range(5)]


# No copy.


@pytest.mark.parametrize("name", ["large", "Fortran order", "big-endian", "read-only", "tensor", "batch"])
def test_what_is_encoded_is_the_value_s_own_memory(name):
    value = made(name)
    payload = encode_payload(value, "it", 2**30)
    assert isinstance(payload, Scattered)
    own = {address(value)} if name != "batch" else {address(column) for column in value.columns}
    pieces = {np.frombuffer(piece, "u1").ctypes.data for piece in payload.pieces if len(piece) > 1000}
    assert own == pieces


@pytest.mark.parametrize("name", ["large", "Fortran order", "big-endian", "tensor", "batch"])
def test_what_is_decoded_is_a_view_of_what_arrived(name):
    arrived = bytearray(b"".join(encode_payload(made(name), "it", 2**30).pieces))
    value = decoder_for(Any).decode(msgspec.Raw(arrived))
    assert_same(value, made(name))
    start = np.frombuffer(arrived, "u1").ctypes.data
    at = address(value if name != "batch" else value.column(0)) - start
    assert 0 < at < len(arrived)
    assert at % (64 if name != "batch" else 8) == 0


def address(value: Any) -> int:
    if type(value).__module__ == "torch":
        return value.data_ptr()
    if isinstance(value, pa.Array):
        return value.buffers()[1].address
    return value.ctypes.data


# What is refused.


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: np.array([object()]), "dtype object can't be sent"),
        (lambda: np.zeros(3, [("a", "i4"), ("b", "O")]), "can't be sent; its elements"),
        (lambda: torch().ones(3, device="meta"), r"copy it to the CPU first: tensor.cpu\(\)"),
        (lambda: torch().eye(3).to_sparse(), "layout torch.sparse_coo"),
        (lambda: [np.ones(3), object()], "objects of type object is unsupported"),
    ],
    ids=["objects", "a field of objects", "on no device", "sparse", "an object beside an array"],
)
def test_what_cannot_be_sent_is_refused_with_the_reason(make, said):
    with pytest.raises(PayloadError, match=said):
        encode_payload(make(), "it", 2**30)


def forged(name: str, described: Any, memory: bytes) -> bytes:
    """An extension as a peer could write it."""
    described = msgspec.msgpack.encode((name, described))
    head = len(described).to_bytes(4, "big") + (8 + len(described)).to_bytes(4, "big")
    return msgspec.msgpack.encode(msgspec.msgpack.Ext(97, head + described + memory))


def ipc(data: Any, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, data.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write(data)
    return sink.getvalue().to_pybytes()


def lying_offsets() -> bytes:
    """A column of texts whose offsets point outside of it."""
    told = ipc(pa.record_batch({"a": ["xy", "z"]}))
    return _changed(told, array.array("i", [0, 2, 3]), array.array("i", [0, 10**9, 3]))


def lying_indices() -> bytes:
    """A column of kinds that are not in its dictionary."""
    kinds = pa.array(["x", "y", "x"]).dictionary_encode()
    return _changed(
        ipc(pa.record_batch([kinds], names=["a"])), array.array("i", [0, 1, 0]), array.array("i", [0, 9, 0])
    )


def _changed(told: bytes, before: array.array[int], after: array.array[int]) -> bytes:
    assert before.tobytes() in told
    return told.replace(before.tobytes(), after.tobytes())


TABLE = ipc(table())


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        (forged("numpy", ("|O", (1,), False), bytes(8)), "not one of numpy's own"),
        (forged("numpy", ("i4,O", (1,), False), bytes(12)), "not one of numpy's own"),
        (forged("numpy", ("V8", (1,), False), bytes(8)), "not one of numpy's own"),
        (forged("numpy", (7, (1,), False), bytes(8)), "not one of numpy's own"),
        (forged("numpy", ("<i8", (10**6,), False), bytes(8)), "needs 8000000 bytes"),
        (forged("numpy", ("<i8", (2**62, 4), False), b""), "needs"),
        (forged("numpy", ("<i8", (-1, -1), False), bytes(8)), "shape"),
        (forged("numpy", ("<i8", ("a",), False), bytes(8)), "shape"),
        (forged("numpy", ("<i8", (1,) * 100, False), bytes(8)), "shape"),
        (forged("numpy", ("nonsense", (1,), False), bytes(8)), "nonsense"),
        (forged("numpy", None, bytes(8)), "can't be made"),
        (forged("torch", ("float32", (10**6,)), bytes(8)), "needs 4000000 bytes"),
        (forged("torch", ("qint8", (8,)), bytes(8)), "none that is sent"),
        (forged("torch", ("float32", (-2,)), bytes(8)), "shape"),
        (forged("arrow", None, b""), "can't be made"),
        (forged("arrow", None, bytes(1000)), "can't be made"),
        (forged("arrow", None, TABLE[: len(TABLE) // 2]), "can't be made"),
        (forged("arrow", None, lying_offsets()), "can't be made"),
        (forged("arrow", None, lying_indices()), "can't be made"),
        (forged("arrow", None, ipc(table(), compression="zstd")), "columns are compressed"),
        (forged("arrow.batch", None, TABLE[:400]), "can't be made"),
        (forged("os.system", "true", b""), "knows nothing about"),
        (msgspec.msgpack.encode(msgspec.msgpack.Ext(97, b"")), "malformed"),
        (msgspec.msgpack.encode(msgspec.msgpack.Ext(97, b"\xff" * 20)), "malformed"),
        (msgspec.msgpack.encode(msgspec.msgpack.Ext(97, b"\0\0\0\x01\0\0\0\x09\x91\x91")), "malformed"),
    ],
)
def test_what_a_peer_may_not_say(payload, said):
    with pytest.raises(PayloadError, match=said):
        decode_payload(payload)


@pytest.mark.anyio
async def test_a_refusal_names_the_peer_and_leaves_the_connection(link):
    async def lie(method, payload):
        yield msgspec.Raw(forged("numpy", ("|O", (1,), False), bytes(8)))

    connection = await link(lie)
    with pytest.raises(PayloadError, match="numpy") as caught:
        await connection.call("lie")
    assert any(f"sent by {connection.peer}" in note for note in caught.value.__notes__)
    with pytest.raises(PayloadError, match="numpy") as caught:
        await anext(connection.open("lie"))
    assert any(f"sent by {connection.peer}" in note for note in caught.value.__notes__)
    assert not connection.closed


@given(st.binary(max_size=60), st.integers(0, 7), st.data())
def test_a_mutated_table_is_a_table_or_refused(junk, kind, data):
    """Only what pyarrow itself finds whole may come out: this process reads it afterwards."""
    stream = bytearray(ipc(pa.record_batch({"n": [1, 2, 3], "t": ["a", None, "c"], "l": [[1], [], [2, 3]]})))
    at = data.draw(st.integers(0, len(stream) - 1))
    if kind < 5:
        stream[at] ^= 1 << kind
    else:
        stream[at : at + len(junk)] = junk
    try:
        value = decode_payload(forged("arrow", None, bytes(stream)))
    except PayloadError:
        return
    value.validate(full=True)
    value.to_pylist()


@given(hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(min_dims=0, min_side=0)))
def test_any_array_of_numpy_s_own_types_survives(value):
    decoded = decode_payload(b"".join(_pieces(encode_scattered([value, "x", value]))))
    for got in (decoded[0], decoded[2]):
        assert got.dtype == value.dtype
        assert got.tobytes() == value.tobytes()
        assert got.shape == value.shape


def _pieces(payload: bytes | Scattered) -> list[Any]:
    return payload.pieces if isinstance(payload, Scattered) else [payload]


# Types of others.


class Image:
    def __init__(self, width: int, pixels: bytes) -> None:
        self.width = width
        self.pixels = pixels

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Image) and (self.width, self.pixels) == (other.width, other.pixels)


def test_other_types_can_be_registered_once_by_each_name():
    register_type(
        Image, name="image", pack=lambda it: (it.width, [it.pixels]), unpack=lambda w, it: Image(w, bytes(it))
    )
    image = Image(3, b"abcdef")
    assert decode_payload(encode_payload({"i": image}, "it", 100)) == {"i": image}
    assert decode_payload(encode_payload(image, "it", 100), Image) == image
    with pytest.raises(MisuseError, match="'image' is registered already"):
        register_type(complex, name="image", pack=lambda it: (None, []), unpack=lambda _, it: 1j)
    with pytest.raises(MisuseError, match="msgspec encodes a set itself"):
        register_type(set, name="set", pack=lambda it: (None, []), unpack=lambda _, it: set())


def test_the_channel_imports_no_numpy_torch_or_pyarrow():
    program = (
        "import sys, arun.channel\n"
        "assert not {'numpy', 'torch', 'pyarrow'} & set(sys.modules), 'imported'\n"
        "from arun.channel.codec import encode_payload\n"
        "try: encode_payload(object(), 'it', 9)\n"
        "except TypeError: pass\n"
        "assert not {'numpy', 'torch', 'pyarrow'} & set(sys.modules), 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
