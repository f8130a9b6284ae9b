"""Environment variables that users give to the processes of actors, engines and workers."""

from __future__ import annotations

import os
from collections.abc import Mapping

from arun.errors import MisuseError

__all__ = ("check_environment",)


def check_environment(env: object) -> None:
    """Refuse what a process can't have as its environment variables; shows no value, which may be a secret.

    :raises MisuseError: it is no mapping of names to texts.
    """
    if not isinstance(env, Mapping):
        raise MisuseError(f"env is of type {type(env).__name__}; it must be a dict, such as env={{'NAME': 'value'}}")
    for name, value in env.items():
        if not isinstance(name, str) or not name or "=" in name or not _encodes(name):
            raise MisuseError(f"env: {name!r} can't be the name of an environment variable")
        if not isinstance(value, str):
            raise MisuseError(f"env: the value of {name!r} is of type {type(value).__name__}; it must be text")
        if not _encodes(value):
            raise MisuseError(f"env: the value of {name!r} has a character that no environment variable can have")


def _encodes(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False
