"""Registered types: which of a program's own classes the codec may write and, above all, read.

Decoding never imports by name, so a class is known by being registered, once, where it is defined::

    @arun.register
    @dataclass
    class Question: ...

A class is written as its registered name and its fields. By default the name is ``module.Qualname``; give ``name=``
to be free to move the class later on.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar, cast, overload

import msgspec

from arun.errors import MisuseError

__all__ = ("Registered", "by_name", "by_type", "register", "registered", "unregistered")

C = TypeVar("C", bound="type[Any]")


class Registered(msgspec.Struct, frozen=True):
    """How the values of one class are taken apart and built."""

    cls: type[Any]
    name: str
    #: value -> what is written for it, again a value of the codec
    take: Callable[[Any], Any]
    #: what was written -> value; any error that it raises means that the bytes don't fit the class
    build: Callable[[Any], Any]
    #: whether ``take`` and ``build`` were given to :func:`register`
    given: bool = False


_by_type: Final[dict[type[Any], Registered]] = {}
_by_name: Final[dict[str, Registered]] = {}
by_type: Final = _by_type.get
by_name: Final = _by_name.get


@overload
def register(cls: C) -> C: ...
@overload
def register(
    cls: C,
    *,
    name: str | None = None,
    encode: Callable[[Any], Any] | None = None,
    decode: Callable[[Any], Any] | None = None,
) -> C: ...
@overload
def register(*, name: str) -> Callable[[C], C]: ...
def register(
    cls: Any = None,
    *,
    name: str | None = None,
    encode: Callable[[Any], Any] | None = None,
    decode: Callable[[Any], Any] | None = None,
) -> Any:
    """Let values of a class be stored and sent: an Enum, dataclass, msgspec Struct, pydantic model or NamedTuple.

    Any other class is registered with both ``encode`` and ``decode``: ``register(Path, encode=str, decode=Path)``.

    :param name: what it is called in stores; by default ``module.Qualname``.
    :param encode: value -> any value that can be stored.
    :param decode: the inverse of ``encode``.
    :raises MisuseError: for a class of another kind without ``encode`` and ``decode``, or a name that is taken.

    >>> @register
    ... @dataclass
    ... class Question:
    ...     text: str
    """
    if cls is None:
        return lambda decorated: register(decorated, name=name)
    if not isinstance(cls, type):
        raise MisuseError(f"register() takes a class, not {cls!r:.80}")
    if (encode is None) != (decode is None):
        raise MisuseError(f"register({cls.__name__}): give both encode= and decode=, or neither")
    name = name or _qualified(cls)
    taken = _by_name.get(name)
    if taken is not None and taken.cls is not cls:
        if _qualified(taken.cls) != _qualified(cls):
            raise MisuseError(f"register({cls.__name__}, name={name!r}): {_qualified(taken.cls)} has that name already")
        del _by_type[taken.cls]  # the same class, defined anew: a reloaded module, a notebook's cell
    if encode is not None and decode is not None:
        entry = Registered(cls, name, encode, decode, given=True)
    else:
        forms = _forms(cls)
        if forms is None:
            raise MisuseError(
                f"register({cls.__name__}): it is no Enum, dataclass, Struct, pydantic model or NamedTuple; "
                f"say how it is stored: register({cls.__name__}, encode=..., decode=...)"
            )
        entry = Registered(cls, name, *forms)
    before = _by_type.get(cls)
    if before is not None:
        _by_name.pop(before.name, None)
    _by_type[cls] = _by_name[name] = entry
    return cls


def registered() -> tuple[Registered, ...]:
    """All classes that are registered now."""
    return tuple(_by_type.values())


def unregistered(kind: type[Any]) -> str:
    """What to write so that values of ``kind`` can be stored."""
    name = kind.__name__
    if _forms(kind) is not None:
        return f"it is not registered; write arun.register({name}) where it is defined, or @arun.register above it"
    return f"say how it is stored: arun.register({name}, encode=..., decode=...)"


def _qualified(cls: type[Any]) -> str:
    # A worker process has the program's main module under the name that multiprocessing gives it.
    module = "__main__" if cls.__module__ == "__mp_main__" else cls.__module__
    return f"{module}.{cls.__qualname__}"


_Forms = tuple[Callable[[Any], Any], Callable[[Any], Any]]


def _forms(cls: type[Any]) -> _Forms | None:
    if issubclass(cls, enum.Flag):
        return (lambda value: value.value), cls
    if issubclass(cls, enum.Enum):
        return (lambda value: value.name), cls.__getitem__
    if issubclass(cls, msgspec.Struct):
        return _struct(cls)
    if dataclasses.is_dataclass(cls):
        return None if issubclass(cls, (dict, list, set, tuple, str, bytes, int, float)) else _dataclass(cls)
    if issubclass(cls, tuple) and hasattr(cls, "_fields"):
        return (lambda value: value._asdict()), lambda fields: cls(**fields)
    pydantic: Any = sys.modules.get("pydantic")
    if pydantic is not None and issubclass(cls, pydantic.BaseModel):
        return _pydantic(cls)
    return None


def _struct(cls: type[msgspec.Struct]) -> _Forms:
    names = cls.__struct_fields__
    return (lambda value: {name: getattr(value, name) for name in names}), lambda fields: cls(**fields)


def _dataclass(cls: type[Any]) -> _Forms:
    fields = dataclasses.fields(cls)
    new = cast("Any", cls).__new__

    def build(given: Any) -> Any:
        rest = dict(given)
        value = new(cls)  # not through __init__, which may change what it is given
        for field in fields:
            if field.name in rest:
                chosen = rest.pop(field.name)
            elif field.default is not dataclasses.MISSING:
                chosen = field.default
            elif field.default_factory is not dataclasses.MISSING:
                chosen = field.default_factory()
            else:
                raise ValueError(f"the field {field.name!r} is missing, and has no default")
            object.__setattr__(value, field.name, chosen)
        _refuse_rest(rest)
        return value

    return (lambda value: {field.name: getattr(value, field.name) for field in fields}), build


def _pydantic(cls: type[Any]) -> _Forms:
    new = cast("Any", cls).__new__

    def build(state: Any) -> Any:
        model = new(cls)
        fields = cast("dict[str, Any]", state["__dict__"])
        known: Mapping[str, Any] = model.__class__.model_fields
        missing = {name: field.get_default(call_default_factory=True) for name, field in known.items()}
        undefined = [name for name in missing if name not in fields and known[name].is_required()]
        if undefined:
            raise ValueError(f"the field {undefined[0]!r} is missing, and has no default")
        model.__setstate__({**state, "__dict__": {**missing, **fields}})
        return model

    return (lambda value: value.__getstate__()), build


def _refuse_rest(rest: Mapping[str, Any]) -> None:
    for name in rest:
        raise ValueError(f"it has no field {name!r} any more")
