"""Names of Burr's that arun has not: what the error says to write instead. docs/how-to/from-burr.md lists all."""

from __future__ import annotations

from typing import Final, NoReturn, TypeVar

__all__ = ("without_burrs_names",)

T = TypeVar("T")
_STREAM: Final = (
    "`async for event in app.astream(...)` gives what every action yields, as Item events, and has .result afterwards"
)
_STORE: Final = (
    "with_store(SQLiteStore(path)) saves every step and resumes; what Burr calls default_state and default_entrypoint "
    "is with_state(...) and with_entrypoint(...)"
)
_PARENT: Final = "subtasks and sub-graphs belong to the run of their parent, and their events name it in .path"

#: by the name of the class
_INSTEAD: Final = {
    "Application": {
        "run": "an application runs on an event loop: `await app.arun(...)`, or asyncio.run(...) around that",
        "step": "an application runs on an event loop: `await app.astep(...)`",
        "iterate": "an application runs on an event loop: `async for action, result, state in app.aiterate(...)`",
        "stream_result": _STREAM,
        "astream_result": _STREAM,
        "stream_iterate": _STREAM,
        "astream_iterate": _STREAM,
        "visualize": "arun draws no graphs; app.graph.actions and app.graph.transitions are there to be drawn",
        "context": "ApplicationContext.get() in an action; outside, app.uid, app.partition_key and app.sequence_id",
        "parent_pointer": _PARENT,
        "spawning_parent_pointer": _PARENT,
    },
    "ApplicationBuilder": {
        "initialize_from": _STORE,
        "with_state_persister": _STORE,
        "with_tracker": "with_hooks(...) and app.astream() tell of every event, and with_store(...) keeps the run",
        "with_typing": "a State takes any values and has no schema; a field may hold a pydantic model or a dataclass",
        "with_parallel_executor": "with_executor(ThreadExecutor(threads=8)), or another; async subtasks need none",
        "with_spawning_parent": _PARENT,
    },
}


def without_burrs_names(cls: type[T]) -> type[T]:
    """Let the class say what to write instead where an attribute is asked for that Burr's class of its name has."""
    for name, hint in _INSTEAD[cls.__name__].items():
        setattr(cls, name, _Elsewhere(name, hint))
    return cls


class _Elsewhere:
    """An attribute that there is not. A ``__getattr__`` would say the same, and make all other attributes slower."""

    __slots__ = ("_hint", "_name")

    def __init__(self, name: str, hint: str) -> None:
        self._name = name
        self._hint = hint

    def __get__(self, instance: object, owner: type) -> NoReturn:
        raise AttributeError(
            f"{owner.__name__!r} object has no attribute {self._name!r}: {self._hint}", name=self._name, obj=instance
        )
