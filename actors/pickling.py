"""How an actor's class and arguments travel to its process: by cloudpickle, over the control plane only.

Pickle never crosses a channel; this is for the pipe to a process that we started ourselves, and for Ray's own calls.
"""

from __future__ import annotations

import functools
import io
import sys
from typing import TYPE_CHECKING, Any, cast

import cloudpickle  # pyright: ignore[reportMissingTypeStubs]  # it has none
import msgspec

from arun.errors import MisuseError

if TYPE_CHECKING:
    from actors.interface import ActorSpec

__all__ = ("dumps", "loads")


def dumps(spec: ActorSpec) -> bytes:
    """Pickle an actor's class, arguments and interface.

    :raises MisuseError: something in it can't be pickled, or is a Struct class that only this process can import.
    """
    buffer = io.BytesIO()
    try:
        pickler: Any = _Pickler(buffer)
        pickler.dump(spec)
    except MisuseError:
        raise
    except Exception as exc:  # what a __reduce__ raises is up to its author
        raise MisuseError(
            f"actor {spec.name!r} ({spec.interface.class_name}) can't be sent to a process of its own: {exc}. "
            "Its class and constructor arguments must be picklable; open files, locks and connections in on_start"
        ) from exc
    return buffer.getvalue()


def loads(blob: bytes) -> ActorSpec:
    """Undo :func:`dumps`. The blob must come from the process that owns this one."""
    return cast("ActorSpec", cloudpickle.loads(blob))


class _Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]  # cloudpickle has no types
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type) and issubclass(obj, msgspec.Struct) and not _importable(obj):
            # It would be pickled by value, and loading that fails with "Extra positional arguments provided"
            # (msgspec#394).
            raise MisuseError(
                f"{obj.__module__}.{obj.__qualname__} is a msgspec.Struct that other processes can't import, "
                "and such a class can't be sent by value; move it into a module, or make it a dataclass"
            )
        if isinstance(obj, msgspec.Meta):  # part of Annotated types, and not picklable by itself
            return functools.partial(msgspec.Meta, **dict(obj.__rich_repr__())), ()
        if isinstance(obj, type) and "__msgspec_cache__" in vars(obj):
            # msgspec leaves an unpicklable note on dataclasses that it met; it makes a new one when needed.
            del obj.__msgspec_cache__  # type: ignore[attr-defined]  # set by msgspec, known to no stub
        by_default: Any = super()
        return by_default.reducer_override(obj)


def _importable(cls: type) -> bool:
    """Whether another process finds this class under its name."""
    if cls.__module__ == "__main__":
        return False
    found: Any = sys.modules.get(cls.__module__)
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is cls
