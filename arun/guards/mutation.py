"""Values changed in place, which a State shares and never copies: found at level "strict", by comparing copies.

A copy goes as deep as builtin containers, dataclasses and Structs do; what lies in them is compared by identity, so an
opaque object (a client, an array) that changes inside itself is not seen.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, cast

import msgspec

from arun.errors import MisuseError
from arun.guards.levels import Checks, misuse

__all__ = ("Repeats", "Watched")

_DEPTH: Final = 12
_MUTABLE: Final = (list, dict, set, bytearray, deque)


class Watched:
    """Values as they were."""

    __slots__ = ("_copies", "_values")

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = {key: value for key, value in values.items() if _may_change(value)}
        self._copies = {key: _copy(value, _DEPTH) for key, value in self._values.items()}

    def changed(self) -> list[str]:
        """Keys of those that are not as they were."""
        return [key for key, value in self._values.items() if not _same(self._copies[key], _copy(value, _DEPTH))]


class Repeats:
    """What a generator yielded last, to tell when it yields one object again that it has changed meanwhile."""

    __slots__ = ("_checks", "_last", "_values")

    def __init__(self, checks: Checks) -> None:
        self._checks = checks
        self._last: Watched | None = None
        self._values: dict[str, Any] = {}

    def check(self, values: Mapping[str, Any], tell: Callable[[str], tuple[str, str, int]]) -> MisuseError | None:
        """Compare what is yielded now with what was yielded last.

        :param values: by name; a value that is no field of a State has the name "".
        :param tell: the message, file and line for a name; called only if something is wrong.
        """
        last, before = self._last, self._values
        self._values = dict(values)
        self._last = Watched(values)
        if last is None:
            return None
        for name in last.changed():
            if values.get(name) is before.get(name):
                return misuse(self._checks, *tell(name))
        return None


def _may_change(value: object) -> bool:
    return isinstance(value, (*_MUTABLE, tuple, msgspec.Struct)) or dataclasses.is_dataclass(value)


def _copy(value: Any, depth: int) -> Any:
    """Nested lists of the containers' kinds and contents; leaves are the objects themselves."""
    if not depth:
        return value
    below = depth - 1
    if isinstance(value, dict):
        return [dict, *(part for item in value.items() for part in (item[0], _copy(item[1], below)))]
    if isinstance(value, (list, tuple, deque)):
        return [type(value), *(_copy(one, below) for one in cast("Iterable[Any]", value))]
    if isinstance(value, set):
        return [set, *sorted(value, key=id)]
    if isinstance(value, bytearray):
        return bytes(value)
    if isinstance(value, msgspec.Struct):
        return [type(value), *(_copy(getattr(value, name), below) for name in value.__struct_fields__)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = (field.name for field in dataclasses.fields(value))
        return [type(value), *(_copy(getattr(value, name, None), below) for name in names)]
    return value


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is list and type(other) is list:
        return len(one) == len(other) and all(map(_same, one, other))
    # Small numbers and short strings are made anew by what computes them; being equal is as good as being the same.
    return type(one) is type(other) and isinstance(one, (str, bytes, int, float, complex)) and one == other
