"""The codec gives back what it was given, exactly; and equal values have equal canonical bytes, in any process."""

from __future__ import annotations

import enum
import math
import random
import struct
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
import numpy as np
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arun import CodecError, MisuseError, State, register
from arun.codec import canonical, decode, encode

ROOT = Path(__file__).parents[2]


@register
class Colour(enum.Enum):
    RED = 1
    BLUE = (1, 2)


def test_a_state_comes_back_from_its_bytes_exactly() -> None:
    fields: dict[str, Any] = {
        "tuple": (1, [2.0, {3}]), "when": datetime(2024, 2, 29, tzinfo=UTC), "money": Decimal("1.10"), "big": 1 << 80,
        "colour": Colour.RED, "point": Point(1, b"2"), "none": None,
    }  # fmt: skip
    state = State(fields).update(more={"a": State({"n": 1})}).wipe(delete=["none"])
    back = State.deserialize(state.serialize())
    assert back == state
    assert list(back) == list(state)
    assert {key: type(value) for key, value in back.items()} == {key: type(value) for key, value in state.items()}
    assert type(back["tuple"][1][1]) is set
    assert type(back["more"]["a"]) is State


def test_a_state_names_the_field_that_has_no_bytes() -> None:
    with pytest.raises(CodecError, match=r"\['client'\].*_Client"):
        State({"n": 1, "client": _Client()}).serialize()


@pytest.mark.parametrize("data", [b"", b"\xc1", encode([1]), encode({"n": 1}), State({"n": 1}).serialize()[:-1]])
def test_what_is_no_state_is_refused(data: bytes) -> None:
    with pytest.raises(CodecError):
        State.deserialize(data)


def test_a_dict_is_no_serialized_state() -> None:
    with pytest.raises(CodecError, match=r"takes the bytes that serialize\(\) gave, not a dict; State\(fields\) makes"):
        State.deserialize({"n": 1})  # type: ignore[arg-type]  # a mistake


class _Client:
    """Something that is no data."""


@register
class Level(enum.IntEnum):
    LOW = 1


@register
class Mode(enum.Flag):
    READ = 1
    WRITE = 2


@register
@dataclass(frozen=True, slots=True)
class Point:
    x: Any
    y: Any = field(default=None)

    def __post_init__(self) -> None:
        if self.x is ...:
            raise AssertionError("decoding runs no __init__ of a dataclass")


@register
class Row(msgspec.Struct):
    a: Any
    b: Any = None


@register
class Model(pydantic.BaseModel):
    a: int
    extra: dict[str, Any] = {}
    _private: int = 0


@register
class Pair(NamedTuple):
    left: Any
    right: Any


def same(a: Any, b: Any) -> bool:
    """Equal, of the same types, at every depth; dicts in the same order, floats bit by bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, Decimal):
        return str(a) == str(b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, (set, frozenset)):
        return len(a) == len(b) and all(any(same(one, other) for other in b) for one in a)
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, (datetime, time)):
        return a.replace(tzinfo=None) == b.replace(tzinfo=None) and a.fold == b.fold and a.tzinfo == b.tzinfo
    if isinstance(a, (Point, Row)):
        names = ("x", "y") if isinstance(a, Point) else ("a", "b")
        return all(same(getattr(a, name), getattr(b, name)) for name in names)
    if isinstance(a, complex):
        return same(a.real, b.real) and same(a.imag, b.imag)
    return bool(a == b)


texts = st.text(st.characters(codec=None, categories=None), max_size=12)  # lone surrogates, too
zones = st.none() | st.just(UTC) | st.just(ZoneInfo("Europe/Berlin")) | st.builds(
    timezone, st.timedeltas(timedelta(hours=-23), timedelta(hours=23)).map(lambda d: timedelta(minutes=d.seconds // 60))
)  # fmt: skip
hashable = st.deferred(
    lambda: (
        st.none()
        | st.booleans()
        | st.integers()
        | st.integers(-(2**70), 2**70)
        | st.floats()
        | texts
        | st.binary(max_size=12)
        | st.decimals(allow_nan=False)
        | st.uuids()
        | st.datetimes(timezones=zones)
        | st.dates()
        | st.times()
        | st.timedeltas()
        | st.complex_numbers()
        | st.fractions()
        | st.builds(range, st.integers(-(2**70), 2**70))
        | st.sampled_from([Colour.RED, Colour.BLUE, Level.LOW, Mode(0), Mode.READ | Mode.WRITE])
        | st.lists(hashable, max_size=3).map(tuple)
        | st.frozensets(hashable, max_size=3)
        | st.builds(Pair, hashable, hashable)
        | st.builds(Point, hashable, hashable)
    )
)
values = st.recursive(
    hashable
    | st.binary(max_size=8).map(bytearray)
    | st.sampled_from([np.float32(1.5), np.int8(-3), np.array([[1, 2], [3, 4]]), np.array("ü"), np.zeros((0, 2))])
    | st.just(msgspec.UNSET),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
        | st.sets(hashable, max_size=4)
        | st.dictionaries(texts, inner, max_size=4)
        | st.dictionaries(hashable, inner, max_size=4)
        | st.builds(Point, inner, inner)
        | st.builds(Row, inner, inner)
    ),
    max_leaves=12,
)


@given(values)
def test_any_value_comes_back_as_it_was(value: Any) -> None:
    assert same(decode(encode(value)), value)


@given(st.lists(st.tuples(hashable, values), max_size=5), st.lists(hashable, max_size=6), st.randoms())
def test_canonical_bytes_do_not_know_the_order_of_dicts_and_sets(pairs: Any, members: Any, rng: random.Random) -> None:
    unique = list(dict(pairs).items())
    shuffled = rng.sample(unique, len(unique))
    elements = list(dict.fromkeys(members))
    other = rng.sample(elements, len(elements))
    assert canonical({"d": dict(unique), "s": set(elements)}) == canonical({"s": set(other), "d": dict(shuffled)})


@given(values, values)
def test_canonical_bytes_are_equal_for_equal_values_only(a: Any, b: Any) -> None:
    assert canonical(a) == canonical(decode(encode(a)))
    if canonical(a) == canonical(b):
        assert canonical(decode(encode(a))) == canonical(decode(encode(b)))
        assert type(a) is type(b)


@pytest.mark.parametrize(
    ("a", "b"), [(1, True), (1, 1.0), ("1", 1), (b"a", "a"), ([1], (1,)), ({1}, frozenset({1})), ({"1": 0}, {1: 0})]
)
def test_canonical_bytes_differ_where_types_do(a: Any, b: Any) -> None:
    assert canonical(a) != canonical(b)
    assert canonical([a]) != canonical([b])


def test_canonical_bytes_are_the_same_in_another_process() -> None:
    program = """
from decimal import Decimal
from arun.codec import canonical
print(canonical({"b": {"x", "y", "z", ("t", 1)}, "a": [1.5, Decimal("1.10")], 3: frozenset("abcdef")}).hex())
"""
    seen = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(seen) == 1


@pytest.mark.parametrize(
    "value",
    [
        2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**4000, math.inf, -0.0, "\ud800",
        Decimal("sNaN12"), Decimal("-0E+5"),
        datetime(2026, 10, 25, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin")), date.max, time(1, fold=1),
        UUID(int=5), Fraction(1, 2**80), Model(a=1, extra={"t": (1, {2})}), Mode.READ, [[]] * 50,
        np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.array(["2026-01-01"], "M8[D]"), np.str_("x"), [{}, ()],
    ],
    ids=repr,
)  # fmt: skip
def test_odd_values_come_back(value: Any) -> None:
    assert same(decode(encode(value)), value)


def test_a_decoded_array_can_be_written_to_and_keeps_its_order() -> None:
    array = decode(encode(np.asfortranarray(np.arange(6.0).reshape(2, 3))))
    array[0, 0] = 9
    assert array.flags.f_contiguous


def test_private_and_set_fields_of_a_model_come_back() -> None:
    model = Model(a=1)
    model._private = 5
    back = decode(encode(model))
    assert (back._private, back.model_fields_set) == (5, {"a"})


def test_a_state_comes_back_with_its_origin() -> None:
    back = decode(encode(State().finished(State({"n": (1,)}), "ask")))
    assert (back.get_all(), back.action) == ({"n": (1,)}, "ask")


def test_a_type_that_is_not_registered_is_named_with_its_place_and_the_line_to_write() -> None:
    @dataclass
    class Config:
        depth: int

    with pytest.raises(CodecError, match=r"\['cfg'\]\[1\]\.x is of type .*Config.*write arun\.register\(Config\)"):
        encode({"cfg": [1, Point(Config(1))]})
    with pytest.raises(CodecError, match=r"arun\.register\(object, encode=\.\.\., decode=\.\.\.\)"):
        encode(object())
    with pytest.raises(CodecError, match="dtype object"):
        encode(np.array([object()]))


def test_subclasses_of_plain_types_are_not_taken_for_them() -> None:
    class Name(str): ...

    class Table(dict[str, int]): ...

    for value in (Name("x"), {Name("x"): 1}, [Table()], Table()):
        with pytest.raises(CodecError):
            encode(value)


def test_any_class_can_be_registered_with_a_form_of_its_own() -> None:
    class Celsius:
        def __init__(self, degrees: float) -> None:
            self.degrees = degrees

    register(Celsius, name="test.celsius", encode=lambda c: c.degrees, decode=Celsius)
    assert decode(encode([Celsius(3.5)]))[0].degrees == 3.5

    with pytest.raises(MisuseError, match=r"encode=.*decode="):
        register(type("Bare", (), {}))
    with pytest.raises(MisuseError, match=r"has that name already"):
        register(Point, name="test.celsius")


def test_a_class_may_get_new_fields_with_defaults_but_not_lose_any() -> None:
    def version(*fields: Any) -> Any:
        cls: Any = type("Versioned", (), {"__annotations__": {name: Any for name, *_ in fields}})
        for name, *default in fields:
            if default:
                setattr(cls, name, default[0])
        return register(dataclass(cls), name="test.versioned")

    before = encode(version(("a",))(1))
    after = version(("a",), ("b", 7))
    assert decode(before) == after(1, 7)
    version(("b", 7))
    with pytest.raises(CodecError, match=r"test\.versioned does not fit the class as it is now.*'a'"):
        decode(before)
    version(("a",), ("c",))
    with pytest.raises(CodecError, match="'c' is missing"):
        decode(before)


def test_what_is_too_deep_or_contains_itself_is_refused_both_ways() -> None:
    endless: list[Any] = []
    endless.append(endless)
    deep: Any = ()
    for _ in range(500):
        deep = (deep,)
    for value in (endless, deep, {"a": endless}):
        with pytest.raises(CodecError, match="nested deeper than 100 levels"):
            encode(value)
    data = b"\x01"
    for _ in range(500):
        data = msgspec.msgpack.encode(msgspec.msgpack.Ext(2, b"\x91" + data))
    for hostile in (data, b"\x91" * 100_000 + b"\x01"):
        with pytest.raises(CodecError):
            decode(hostile)


def test_size_is_limited() -> None:
    with pytest.raises(CodecError, match="at most 10"):
        encode("x" * 20, max_bytes=10)
    with pytest.raises(CodecError, match="at most 10"):
        decode(bytes(20), max_bytes=10)


@given(st.binary(max_size=60) | st.tuples(st.integers(0, 127), st.binary(max_size=40)).map(
    lambda ext: msgspec.msgpack.encode(msgspec.msgpack.Ext(*ext))
))  # fmt: skip
def test_any_bytes_are_a_value_or_one_error(data: bytes) -> None:
    try:
        decode(data)
    except CodecError:
        pass


def test_arrays_of_lying_shape_or_dangerous_dtype_are_refused() -> None:
    for array in (["<f8", [3], "C", b"12345678"], ["|O", [1], "C", b"12345678"], ["<f8", [-1, -1], "C", b"12345678"]):
        data = msgspec.msgpack.encode(msgspec.msgpack.Ext(20, msgspec.msgpack.encode(array)))
        with pytest.raises(CodecError):
            decode(data)


def test_decoding_imports_nothing_by_name() -> None:
    data = msgspec.msgpack.encode(msgspec.msgpack.Ext(19, msgspec.msgpack.encode(["antigravity.Thing", {}])))
    with pytest.raises(CodecError, match=r"antigravity\.Thing, which is not registered here"):
        decode(data)
    assert "antigravity" not in sys.modules
