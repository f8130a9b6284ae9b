"""Errors on their way from a worker to the program: rebuilt as themselves where their type is known to arun.

Known are the built-in exceptions, arun's own and those of :func:`arun.channel.register_error`; any other arrives as
:class:`~arun.errors.RemoteError`. No type is ever imported by a name that came over the wire.
"""

from __future__ import annotations

from typing import Final

from arun.channel.failures import describe, rebuild
from arun.channel.messages import Fail
from arun.executors.messages import Failure

__all__ = ("failure_of", "raise_failure")

_MOST_MEMBERS: Final = 1000
_DEPTH: Final = 8


def failure_of(error: BaseException, depth: int = _DEPTH) -> Failure:
    """What tells the program of an error that was raised in this worker."""
    fail = describe(1, error)
    members = error.exceptions[:_MOST_MEMBERS] if isinstance(error, BaseExceptionGroup) and depth else ()
    cause = error.__cause__ if depth else None
    return Failure(
        fail.kind,
        _clean(error.message) if isinstance(error, BaseExceptionGroup) else fail.message,
        fail.details,
        [_clean(str(note)) for note in getattr(error, "__notes__", ())],
        fail.traceback,
        [failure_of(member, depth - 1) for member in members],
        failure_of(cause, depth - 1) if cause is not None else None,
    )


def raise_failure(failure: Failure, pid: int) -> None:
    """Raise what a worker raised, with the notes that it had there and its traceback as one more.

    :param pid: of the worker.
    """
    error = _rebuilt(failure)
    error.add_note(f"raised in worker process {pid}; its traceback there:\n{failure.traceback}")
    raise error


def _rebuilt(failure: Failure) -> Exception:
    members = [_rebuilt(member) for member in failure.members]
    error: Exception = ExceptionGroup(failure.message, members) if members else _of_known_type(failure)
    for note in failure.notes:
        error.add_note(note)
    if failure.cause is not None:
        error.__cause__ = _rebuilt(failure.cause)
    return error


def _of_known_type(failure: Failure) -> Exception:
    error = rebuild(Fail(1, failure.kind, failure.message, failure.traceback, failure.details), "", "")
    del error.__notes__  # ours says more
    return error


def _clean(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()
