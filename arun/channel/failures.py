"""Errors that cross a channel: which are rebuilt as themselves, and what the others become.

Only types registered here are ever made from a name that a peer sent; any other arrives as
:class:`~arun.errors.RemoteError`. Nothing is imported by name.
"""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, TypeVar

from arun import errors
from arun.channel.messages import Fail
from arun.errors import ArunError, MissingExtraError, MisuseError, RemoteError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ("describe", "rebuild", "register_error")

_TEXT_CHARS = 16_384
_NAME_CHARS = 512
# Innermost frames that are sent of a traceback.
_FRAMES = 64
# Errors of a group that are told in its message; the traceback has more.
_PARTS = 8

E = TypeVar("E", bound="type[Exception]")

_registry: dict[str, type[Exception]] = {}


def register_error(cls: E) -> E:
    """Let an error arrive at the other side of a channel as itself; usable as a decorator.

    It is rebuilt there as ``cls(message)``, so register it in both processes.

    :param cls: an exception type that can be made from one message.
    :raises MisuseError: it can't.
    """
    try:
        cls("message")
    except TypeError as exc:
        raise MisuseError(
            f"{cls.__qualname__} can't be registered: errors are rebuilt as cls(message), and that raises {exc!r}. "
            "Give its other arguments defaults"
        ) from exc
    _registry[_name(cls)] = cls
    return cls


def describe(stream: int, error: BaseException) -> Fail:
    """The message that carries an error to the peer; long texts are cut, tracebacks at their start."""
    if isinstance(error, RemoteError):  # passed on by a process between: keep where it came from
        kind, remote = error.kind, error.remote_traceback
        message = str(error).removeprefix(f"{kind}: ")
    else:
        kind, remote = _name(type(error)), ""
        message = _message(error)
    trace = f"{remote}\n{''.join(traceback.format_exception(error, limit=-_FRAMES))}".strip()
    return Fail(stream, _clean(kind[:_NAME_CHARS]), _clean(message), _clean(trace[-_TEXT_CHARS:]))


def rebuild(fail: Fail, peer: str, method: str) -> Exception:
    """The error that a Fail describes, with the peer's traceback as a note."""
    error: Exception
    try:
        error = _registry[fail.kind](fail.message)
    except Exception:  # noqa: BLE001  # unknown here, or its constructor wants another message
        error = RemoteError(fail.kind, fail.message, fail.traceback)
    error.add_note(f"raised at {peer} by {method!r}; its traceback there:\n{fail.traceback}")
    return error


def _message(error: BaseException) -> str:
    try:
        only = error.args[0] if len(error.args) == 1 else None
        message = only if isinstance(only, str) else str(error)  # str(KeyError("a")) has quotes
    except Exception as exc:  # noqa: BLE001  # the user's own; without a message the opener would wait for ever
        return f"(its text can't be had: that raises {type(exc).__qualname__})"
    if isinstance(error, BaseExceptionGroup):
        message = f"{message}: {'; '.join(_parts(error))}"
    return message[:_TEXT_CHARS]


def _parts(group: BaseExceptionGroup[BaseException]) -> Iterator[str]:
    """The errors in a group and in the groups in it, as text; no more than a message has room for."""
    left: list[BaseException] = [group]
    told = 0
    while left:
        part = left.pop()
        if isinstance(part, BaseExceptionGroup):
            left += reversed(part.exceptions)
        elif told == _PARTS:
            yield "..."
            return
        else:
            told += 1
            yield f"{_name(type(part))}: {_message(part)}"


def _name(cls: type[BaseException]) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _clean(text: str) -> str:
    """Without lone surrogates: they can't be encoded, and the error would be lost."""
    return text.encode("utf-8", "backslashreplace").decode()


for _value in vars(errors).values():
    if isinstance(_value, type) and issubclass(_value, ArunError) and _value not in {MissingExtraError, RemoteError}:
        register_error(_value)

for _builtin in (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BrokenPipeError,
    BufferError,
    ConnectionAbortedError,
    ConnectionError,
    ConnectionRefusedError,
    ConnectionResetError,
    EOFError,
    Exception,
    FileExistsError,
    FileNotFoundError,
    FloatingPointError,
    ImportError,
    IndexError,
    InterruptedError,
    IsADirectoryError,
    KeyError,
    LookupError,
    MemoryError,
    ModuleNotFoundError,
    NameError,
    NotADirectoryError,
    OSError,
    OverflowError,
    PermissionError,
    RecursionError,
    ReferenceError,
    RuntimeError,
    TimeoutError,
    TypeError,
    ValueError,
    ZeroDivisionError,
):
    register_error(_builtin)
