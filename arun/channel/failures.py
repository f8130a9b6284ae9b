"""Errors that cross a channel: which are rebuilt as themselves, and what the others become.

Only types registered here are ever made from a name that a peer sent; any other arrives as
:class:`~arun.errors.RemoteError`. Nothing is imported by name.
"""

from __future__ import annotations

import builtins
import traceback
from typing import TYPE_CHECKING, Any, TypeVar, cast

from arun import errors
from arun.channel.messages import Fail
from arun.codec import decode, encode
from arun.errors import ArunError, MissingExtraError, MisuseError, RemoteError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = ("describe", "rebuild", "register_error")

_TEXT_CHARS = 16_384
_DETAILS_BYTES = 16_384
_NAME_CHARS = 512
# Innermost frames that are sent of a traceback.
_FRAMES = 64
# Errors of a group that are told in its message; the traceback has more.
_PARTS = 8

# The first two would end what they are raised in without a word, and of a group the errors are not sent.
_LEFT_OUT = (StopIteration, StopAsyncIteration, ExceptionGroup)

E = TypeVar("E", bound="type[Exception]")

_registry: dict[str, type[Exception]] = {}


def register_error(cls: E) -> E:
    """Let an error arrive at the other side of a channel as itself; usable as a decorator.

    It is rebuilt there from its ``args``, with the attributes that it had, as far as :mod:`arun.codec` can write them;
    else as ``cls(message)``. Register it in both processes.

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
        message, details = str(error).removeprefix(f"{kind}: "), b""
    else:
        kind, remote = _name(type(error)), ""
        message = _message(error)
        details = _details(error, message)
    trace = f"{remote}\n{''.join(traceback.format_exception(error, limit=-_FRAMES))}".strip()
    return Fail(stream, _clean(kind[:_NAME_CHARS]), _clean(message), _clean(trace[-_TEXT_CHARS:]), details)


def rebuild(fail: Fail, peer: str, method: str) -> Exception:
    """The error that a Fail describes, with the peer's traceback as a note."""
    note = f"raised at {peer} by {method!r}; its traceback there:\n{fail.traceback}"
    error: Exception
    try:
        error = _made(_registry[fail.kind], fail)
        error.add_note(note)
    except Exception:  # noqa: BLE001  # unknown here, or its constructor wants another message
        error = RemoteError(fail.kind, fail.message, fail.traceback)
        error.add_note(note)
    return error


def _made(cls: type[Exception], fail: Fail) -> Exception:
    arguments: Iterable[Any] = (fail.message,)
    attributes: dict[str, Any] = {}
    try:
        if fail.details:
            given, attributes = decode(fail.details)
            arguments = arguments if given is None else given
        error = cls(*arguments)
        error.__setstate__(attributes)
    except Exception:  # noqa: BLE001  # a value of a type that is not known here, or one that can't be set
        error = cls(fail.message)
    if _message(error) != fail.message:  # its constructor makes the text of what it is given
        error.args = (fail.message,)
    return error


def _details(error: BaseException, message: str) -> bytes:
    """What pickle would know of an error besides its type, without what can't be written, and without notes."""
    try:
        _, arguments, *state = cast("tuple[Any, ...]", error.__reduce__())
        attributes = dict(*state)
        attributes.pop("__notes__", None)  # they are in the traceback
        known = {name: value for name, value in attributes.items() if _is_writable(value)}
        given = arguments if arguments != (message,) and _is_writable(arguments) else None
        return encode([given, known], max_bytes=_DETAILS_BYTES) if given is not None or known else b""
    except Exception:  # noqa: BLE001  # the user's own __reduce__, or too much; the message will do
        return b""


def _is_writable(value: object) -> bool:
    try:
        encode(value)
    except Exception:  # noqa: BLE001  # a user's own type may raise anything
        return False
    return True


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

for _value in vars(builtins).values():
    if isinstance(_value, type) and issubclass(_value, Exception) and not issubclass(_value, _LEFT_OUT):
        _registry[_name(_value)] = _value
