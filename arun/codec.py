"""Codec: any value to bytes and back, exactly; and canonical bytes, for keys.

msgpack, written by msgspec, knows None, bool, int of 64 bits, float, str, bytes, list and dict. Everything else is an
extension: one code a kind (the table at the end), whose data is again such bytes. msgspec alone would write a tuple as
a list, a Decimal as a str and a dataclass as a dict, without a word, so the types in a value are looked through first.

Types of the program's own are registered (:func:`arun.register`). Decoding imports nothing by name: an unknown type or
code is an error, as is anything else that is wrong with the bytes.
"""

from __future__ import annotations

import hashlib
import re
import struct
import sys
from collections.abc import Callable, Iterable
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from typing import Any, Final, TypeAlias, cast
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec

from arun.errors import CodecError
from arun.registry import by_name, by_type, unregistered
from arun.state import State

__all__ = ("MAX_BYTES", "MAX_DEPTH", "canonical", "decode", "digest", "encode")

#: Levels of nesting; a value that contains itself ends here, too.
MAX_DEPTH: Final = 100
#: Bytes of one encoded value, unless the caller says otherwise.
MAX_BYTES: Final = 1 << 30

_DIGEST_SIZE: Final = 16
_SHOWN: Final = 8  # levels of a path that an error names

_Ext = msgspec.msgpack.Ext
_pack: Final = msgspec.msgpack.Encoder().encode
_pack_sorted: Final = msgspec.msgpack.Encoder(order="deterministic").encode
_SCALARS: Final = frozenset({type(None), bool, int, float, str, bytes})
_STRINGS: Final = frozenset({str})
_LONG: Final = 16  # from here on a set operation over all items is faster than a look at each


def encode(value: object, *, max_bytes: int = MAX_BYTES) -> bytes:
    """Encode any value of known types; :func:`decode` gives an equal one of the same types, at any depth.

    :raises CodecError: for a value of an unknown type, naming the place, the type and the line to write; for one
        nested deeper than 100 levels, or larger than ``max_bytes``.
    """
    data = _encode(value, exact=True)
    if len(data) > max_bytes:
        raise CodecError(f"the value takes {len(data)} bytes encoded; at most {max_bytes} are allowed")
    return data


def decode(data: bytes | bytearray | memoryview, *, max_bytes: int = MAX_BYTES) -> Any:
    """The value that :func:`encode` was given.

    :raises CodecError: for bytes that are none of the codec's, too many, nested too deep, or of a type or field that is
        not registered here.
    """
    if len(data) > max_bytes:
        raise CodecError(f"{len(data)} bytes to decode; at most {max_bytes} are allowed")
    try:
        return _Reader().read(data)
    except CodecError:
        raise
    except RecursionError:
        raise CodecError(f"the value is nested deeper than {MAX_DEPTH} levels") from None
    except Exception as exc:
        raise CodecError(f"these {len(data)} bytes are no value of arun's codec: {exc}") from exc


def canonical(value: object) -> bytes:
    """Bytes that are the same for equal values of the same types, in every process and on every machine.

    The order of dicts and sets does not count; ``1``, ``1.0`` and ``True`` differ, as do ``0.0`` and ``-0.0``.

    :raises CodecError: as :func:`encode` does.
    """
    return _encode(value, exact=False)


def digest(*parts: bytes) -> bytes:
    """A key of sixteen bytes for a sequence of parts; where one ends and the next begins counts."""
    hashed = hashlib.blake2b(digest_size=_DIGEST_SIZE)
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little"))
        hashed.update(part)
    return hashed.digest()


# -- writing -------------------------------------------------------------------------------------------------


class _Refused(Exception):
    """A value can't be written; the path to it is put together on the way out."""

    def __init__(self, why: str, kind: type[Any]) -> None:
        super().__init__(why)
        self.kind = kind
        self.path: list[str] = []


def _encode(value: object, *, exact: bool) -> bytes:
    try:
        try:
            if _is_plain(value, not exact, 0):
                return _pack(value) if exact else _pack_sorted(value)
            return _pack(_Writer(exact=exact, careful=False).lower(value, 0))
        except (OverflowError, UnicodeEncodeError):  # an int of more than 64 bits, or a str with lone surrogates
            return _pack(_Writer(exact=exact, careful=True).lower(value, 0))
    except _Refused as exc:
        path = "".join(reversed(exc.path[-_SHOWN:])) + ("..." if len(exc.path) > _SHOWN else "")
        name = f"{exc.kind.__module__}.{exc.kind.__qualname__}".removeprefix("builtins.")
        raise CodecError(f"value{path} is of type {name}: {exc}", (*reversed(exc.path),), name, str(exc)) from None
    except RecursionError:
        raise CodecError(f"the value is nested deeper than {MAX_DEPTH} levels, or contains itself") from None
    except (msgspec.MsgspecError, ValueError, TypeError) as exc:
        raise CodecError(f"the value can't be encoded: {exc}") from exc


def _is_plain(value: Any, sortable: bool, depth: int) -> bool:
    """Whether msgspec writes it as it is, up to the size of its ints; if ``sortable``, also in a canonical order."""
    kind = type(value)
    if kind is dict:
        if not (_STRINGS if sortable else _SCALARS).issuperset(map(type, value)):
            return False
        value = value.values()
    elif kind is not list:
        return kind in _SCALARS
    if len(value) > _LONG and _SCALARS.issuperset(map(type, value)):
        return True
    if depth >= MAX_DEPTH:
        return False
    for inner in value:
        kind = type(inner)
        if kind not in _SCALARS and (
            (kind is not dict and kind is not list) or not _is_plain(inner, sortable, depth + 1)
        ):
            return False
    return True


class _Writer:
    """Turns a value into what msgspec writes as it is.

    :ivar exact: keeps the order of dicts; else bytes are canonical and need not be read again.
    :ivar careful: looks at each int and str, because one of them is not for msgspec.
    """

    __slots__ = ("careful", "exact")

    def __init__(self, *, exact: bool, careful: bool) -> None:
        self.exact = exact
        self.careful = careful

    def lower(self, value: Any, depth: int) -> Any:
        kind: type[Any] = type(value)
        if kind in _SCALARS:
            return _careful(value) if self.careful else value
        if depth > MAX_DEPTH:
            raise _Refused(f"it is nested deeper than {MAX_DEPTH} levels, or contains itself", kind)
        if kind is list:
            return self.items(value, depth)
        if kind is dict:
            return self.mapping(value, depth)
        known = _WRITERS.get(kind)
        if known is not None:
            return known(self, value, depth)
        entry = by_type(kind)
        if entry is not None:
            return self.tagged(_OBJECT, [entry.name, entry.take(value)], depth)
        numpy: Any = sys.modules.get("numpy")
        if numpy is not None and (kind is numpy.ndarray or isinstance(value, numpy.generic)):
            return self.numpy(value)
        if isinstance(value, ZoneInfo) and (key := getattr(value, "key", None)):  # None: read from a file
            return _Ext(_ZONE, key.encode())
        raise _Refused(unregistered(kind), kind)

    def items(self, values: Iterable[Any], depth: int) -> list[Any]:
        lowered: list[Any] = []
        try:
            for value in values:
                lowered.append(self.lower(value, depth + 1))  # noqa: PERF401 - its length names the place of an error
        except _Refused as exc:
            exc.path.append(f"[{len(lowered)}]")
            raise
        return lowered

    def mapping(self, value: dict[Any, Any], depth: int) -> Any:
        key: Any = None
        try:
            if self.exact and _SCALARS.issuperset(map(type, value)) and not self.careful:
                lowered: dict[Any, Any] = {}
                for key, inner in value.items():
                    lowered[key] = self.lower(inner, depth + 1)
                return lowered
            pairs: list[tuple[Any, Any]] = []
            for key, inner in value.items():
                pairs.append((self.lower(key, depth + 1), self.lower(inner, depth + 1)))
        except _Refused as exc:
            exc.path.append(f"[{key!r:.80}]")
            raise
        if self.exact:
            return _Ext(_DICT, _pack([part for pair in pairs for part in pair]))
        return _Ext(_DICT, b"".join(sorted(_pack(key) + _pack(inner) for key, inner in pairs)))

    def collection(self, code: int, values: Iterable[Any], depth: int) -> Any:
        if self.exact:
            return _Ext(code, _pack(self.items(values, depth)))
        return _Ext(code, b"".join(sorted(_pack(one) for one in self.items(values, depth))))

    def tagged(self, code: int, value: Any, depth: int) -> Any:
        try:
            return _Ext(code, _pack(self.lower(value, depth + 1)))
        except _Refused as exc:
            if code == _OBJECT and exc.path and exc.path[-1] == "[1]":  # the fields, behind the name
                exc.path.pop()
                if exc.path:
                    exc.path[-1] = "." + exc.path[-1][2:-2]
            raise

    def numpy(self, value: Any) -> Any:
        dtype = value.dtype
        if not _DTYPE.fullmatch(dtype.str):
            raise _Refused(f"arrays of dtype {dtype} aren't stored; convert it to plain numbers or text", type(value))
        if type(value).__name__ != "ndarray":
            data: Any = value.item() if dtype.kind in "US" else value.tobytes()
            return _Ext(_SCALAR, _pack([dtype.str, _careful(data)]))
        order = "F" if self.exact and value.flags.fnc else "C"
        return _Ext(_ARRAY, _pack([dtype.str, list(value.shape), order, value.tobytes(order)]))


def _careful(value: Any) -> Any:
    kind: type[Any] = type(value)
    if kind is int and not -(1 << 63) <= value < 1 << 64:
        return _Ext(_INT, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))
    if kind is str and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return _Ext(_SURROGATES, value.encode("utf-8", "surrogatepass"))
    return value


# -- reading -------------------------------------------------------------------------------------------------


class _Reader:
    """Reads one value; nested extensions are read by recursion, which it counts."""

    __slots__ = ("depth",)

    def __init__(self) -> None:
        self.depth = 0

    def read(self, data: Any) -> Any:
        return msgspec.msgpack.decode(data, ext_hook=self.hook)

    def hook(self, code: int, data: memoryview) -> Any:
        reader = _READERS.get(code)
        if reader is None:
            raise CodecError(f"the value holds something with the unknown code {code}; was it written by a newer arun?")
        self.depth += 1
        if self.depth > MAX_DEPTH + 1:
            raise CodecError(f"the value is nested deeper than {MAX_DEPTH} levels")
        value = reader(self, data)
        self.depth -= 1
        return value

    def mapping(self, data: memoryview) -> dict[Any, Any]:
        flat = self.read(data)
        return dict(zip(flat[::2], flat[1::2], strict=True))

    def object(self, data: memoryview) -> Any:
        name, fields = self.read(data)
        entry = by_name(name)
        if entry is None:
            short = str(name).rpartition(".")[2]
            raise CodecError(
                f"the value holds a {name}, which is not registered here; import the module that defines it, "
                f"and write arun.register({short}) there"
            )
        try:
            return entry.build(fields)
        except Exception as exc:
            raise CodecError(f"a stored {name} does not fit the class as it is now: {exc}") from exc

    def array(self, data: memoryview) -> Any:
        import numpy

        text, shape, order, raw = self.read(data)
        if (
            not _DTYPE.fullmatch(text)
            or order not in {"C", "F"}
            or not all(isinstance(n, int) and n >= 0 for n in shape)
        ):
            raise CodecError("the value holds an array of a dtype or shape that is never written")
        dtype: Any = numpy.dtype(text)
        size = dtype.itemsize
        for n in shape:
            size *= n
        if size != len(raw) or not dtype.itemsize:
            raise CodecError(f"the value holds an array of {len(raw)} bytes whose shape {shape} needs {size}")
        return cast("Any", numpy.ndarray)(shape, dtype, buffer=bytearray(raw), order=order)

    def scalar(self, data: memoryview) -> Any:
        import numpy

        text, raw = self.read(data)
        if not _DTYPE.fullmatch(text):
            raise CodecError("the value holds a number of a dtype that is never written")
        if text[1] in "US":
            return cast("Any", numpy.str_ if text[1] == "U" else numpy.bytes_)(raw)
        return cast("Any", numpy.frombuffer(raw, text, 1))[0]

    def moment(self, data: memoryview) -> datetime:
        year, month, day, hour, minute, second, microsecond, fold, zone = self.read(data)
        return datetime(year, month, day, hour, minute, second, microsecond, zone, fold=fold)

    def clock(self, data: memoryview) -> time:
        hour, minute, second, microsecond, fold, zone = self.read(data)
        return time(hour, minute, second, microsecond, zone, fold=fold)

    def state(self, data: memoryview) -> State:
        fields, action = self.read(data)
        state = State(fields)
        state.action = action
        return state


# -- the table of kinds --------------------------------------------------------------------------------------

_INT: Final = 1
_TUPLE: Final = 2
_SET: Final = 3
_FROZENSET: Final = 4
_DICT: Final = 5
_BYTEARRAY: Final = 6
_DECIMAL: Final = 7
_UUID: Final = 8
_DATETIME: Final = 9
_DATE: Final = 10
_TIME: Final = 11
_TIMEDELTA: Final = 12
_COMPLEX: Final = 13
_FRACTION: Final = 14
_RANGE: Final = 15
_TIMEZONE: Final = 16
_ZONE: Final = 17
_STATE: Final = 18
_OBJECT: Final = 19
_ARRAY: Final = 20
_SCALAR: Final = 21
_SURROGATES: Final = 22
_UNSET: Final = 23

# Bools, numbers of at most 8 (complex: 16) bytes, times and text: the same bytes everywhere, and no pointers in them.
_DTYPE: Final = re.compile(r"[<>|=](b1|[iu][1248]|f[248]|c(8|16)|[mM]8(\[\w+\])?|[US]\d+)")
# What zoneinfo looks up is a file below its own folders, never more than that.
_ZONE_KEY: Final = re.compile(r"[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+){0,2}")

_Write: TypeAlias = Callable[[_Writer, Any, int], Any]
_Read: TypeAlias = Callable[[_Reader, memoryview], Any]


def _zone(_: _Reader, data: memoryview) -> ZoneInfo:
    key = str(data, "utf-8")
    if not _ZONE_KEY.fullmatch(key):
        raise CodecError(f"the value holds a time zone named {key!r:.80}, which is no name of one")
    return ZoneInfo(key)


def _moment(value: datetime) -> list[Any]:
    return [value.year, value.month, value.day, *_clock(value)]


def _clock(value: datetime | time) -> list[Any]:
    return [value.hour, value.minute, value.second, value.microsecond, value.fold, value.tzinfo]


_WRITERS: Final[dict[type[Any], _Write]] = {
    tuple: lambda w, v, depth: _Ext(_TUPLE, _pack(w.items(v, depth))),
    set: lambda w, v, depth: w.collection(_SET, v, depth),
    frozenset: lambda w, v, depth: w.collection(_FROZENSET, v, depth),
    bytearray: lambda w, v, depth: _Ext(_BYTEARRAY, bytes(v)),
    Decimal: lambda w, v, depth: _Ext(_DECIMAL, str(v).encode()),
    UUID: lambda w, v, depth: _Ext(_UUID, v.bytes),
    datetime: lambda w, v, depth: w.tagged(_DATETIME, _moment(v), depth),
    date: lambda w, v, depth: _Ext(_DATE, _pack(v.toordinal())),
    time: lambda w, v, depth: w.tagged(_TIME, _clock(v), depth),
    timedelta: lambda w, v, depth: _Ext(_TIMEDELTA, _pack([v.days, v.seconds, v.microseconds])),
    complex: lambda w, v, depth: _Ext(_COMPLEX, struct.pack("<dd", v.real, v.imag)),
    Fraction: lambda w, v, depth: w.tagged(_FRACTION, [v.numerator, v.denominator], depth),
    range: lambda w, v, depth: w.tagged(_RANGE, [v.start, v.stop, v.step], depth),
    timezone: lambda w, v, depth: w.tagged(_TIMEZONE, list(v.__getinitargs__()), depth),
    State: lambda w, v, depth: w.tagged(_STATE, [v.get_all(), v.action], depth),
    type(msgspec.UNSET): lambda w, v, depth: _Ext(_UNSET, b""),
}

_READERS: Final[dict[int, _Read]] = {
    _INT: lambda r, data: int.from_bytes(data, "little", signed=True),
    _TUPLE: lambda r, data: tuple(r.read(data)),
    _SET: lambda r, data: set(r.read(data)),
    _FROZENSET: lambda r, data: frozenset(r.read(data)),
    _DICT: _Reader.mapping,
    _BYTEARRAY: lambda r, data: bytearray(data),
    _DECIMAL: lambda r, data: Decimal(str(data, "ascii")),
    _UUID: lambda r, data: UUID(bytes=bytes(data)),
    _DATETIME: _Reader.moment,
    _DATE: lambda r, data: date.fromordinal(r.read(data)),
    _TIME: _Reader.clock,
    _TIMEDELTA: lambda r, data: timedelta(*r.read(data)),
    _COMPLEX: lambda r, data: complex(*struct.unpack("<dd", data)),
    _FRACTION: lambda r, data: Fraction(*r.read(data)),
    _RANGE: lambda r, data: range(*r.read(data)),
    _TIMEZONE: lambda r, data: timezone(*r.read(data)),
    _ZONE: _zone,
    _STATE: _Reader.state,
    _OBJECT: _Reader.object,
    _ARRAY: _Reader.array,
    _SCALAR: _Reader.scalar,
    _SURROGATES: lambda r, data: bytes(data).decode("utf-8", "surrogatepass"),
    _UNSET: lambda r, data: msgspec.UNSET,
}
