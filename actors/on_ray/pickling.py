"""How code travels to other processes, actors' classes and arguments above all: by cloudpickle, over the control plane.

Pickle never crosses a channel; this is for the pipe to a process that we started ourselves, and for Ray's own calls.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import sys
from typing import TYPE_CHECKING, Any, cast

import cloudpickle  # pyright: ignore[reportMissingTypeStubs]  # it has none
import msgspec

from arun.actions import FunctionAction
from arun.errors import MisuseError
from arun.executors.references import dig, name_of_function

if TYPE_CHECKING:
    from actors.interface import ActorSpec

__all__ = ("dumps", "dumps_code", "importable", "loads", "loads_code")


def dumps(spec: ActorSpec) -> bytes:
    """Pickle an actor's class, arguments and interface.

    :raises MisuseError: something in it can't be pickled, or is a Struct class that only this process can import.
    """
    try:
        return _dump(spec)
    except MisuseError:
        raise
    except Exception as exc:  # what a __reduce__ raises is up to its author
        raise MisuseError(
            f"actor {spec.name!r} ({spec.interface.class_name}) can't be sent to a process of its own: {exc}. "
            "Its class and constructor arguments must be picklable; open files, locks and connections in on_start"
        ) from exc


def loads(blob: bytes) -> ActorSpec:
    """Undo :func:`dumps`. The blob must come from the process that owns this one."""
    return cast("ActorSpec", cloudpickle.loads(blob))


def dumps_code(code: object, what: str) -> bytes:
    """Pickle an action, a class or a function that other processes can't import.

    :param what: names it, for the error.
    :raises MisuseError: something that it refers to can't be pickled, or is a Struct class of this process alone.
    """
    try:
        return _dump(code)
    except Exception as exc:  # as above
        raise MisuseError(
            f"{what} can't be sent to a worker: {exc}. No other process can import it, so it goes with all that it "
            "closes over or names in its module; move it into a module of its own, or make such things in the function"
        ) from exc


def loads_code(blob: bytes) -> Any:
    """Undo :func:`dumps_code`. The blob must come from the process that owns this one."""
    return cloudpickle.loads(blob)


def _dump(value: object) -> bytes:
    buffer = io.BytesIO()
    pickler: Any = _Pickler(buffer)
    pickler.dump(value)
    return buffer.getvalue()


class _Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]  # cloudpickle has no types
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type) and issubclass(obj, msgspec.Struct) and not importable(obj):
            # It would be pickled by value, and loading that fails with "Extra positional arguments provided"
            # (msgspec#394).
            raise MisuseError(
                f"{obj.__module__}.{obj.__qualname__} is a msgspec.Struct that other processes can't import, "
                "and such a class can't be sent by value; move it into a module, or make it a dataclass"
            )
        if isinstance(obj, FunctionAction):
            # Its module has the action under the function's name, so the function would be taken for one without.
            with contextlib.suppress(MisuseError):
                return _action_at, (*name_of_function(obj, by_value=True), obj.name, dict(obj.bound))
        if isinstance(obj, msgspec.Meta):  # part of Annotated types, and not picklable by itself
            return functools.partial(msgspec.Meta, **dict(obj.__rich_repr__())), ()
        if isinstance(obj, type) and "__msgspec_cache__" in vars(obj):
            # msgspec leaves an unpicklable note on dataclasses that it met; it makes a new one when needed.
            del obj.__msgspec_cache__  # type: ignore[attr-defined]  # set by msgspec, known to no stub
        by_default: Any = super()
        return by_default.reducer_override(obj)


def _action_at(module: str, qualname: str, name: str | None, bound: dict[str, Any]) -> FunctionAction:
    found: FunctionAction = dig(importlib.import_module(module), qualname)
    return found._copy(name=name, _bound=bound)


def importable(cls: type) -> bool:
    """Whether another process finds this class under its name."""
    if cls.__module__ == "__main__":
        return False
    found: Any = sys.modules.get(cls.__module__)
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is cls
