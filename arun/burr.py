"""Names of Burr's that arun has not: what the error says to write instead. docs/how-to/from-burr.md lists all."""

from __future__ import annotations

import sys
from typing import Final, NoReturn, TypeVar

__all__ = ("no_such_name", "without_burrs_names")

T = TypeVar("T")
_STREAM: Final = (
    "`async for event in app.astream(...)` gives what every action yields, as Item events, and has .result afterwards"
)
_STORE: Final = (
    "with_store(SQLiteStore(path)) saves every step and resumes; what Burr calls default_state and default_entrypoint "
    "is with_state(...) and with_entrypoint(...)"
)
_PARENT: Final = "subtasks and sub-graphs belong to the run of their parent, and their events name it in .path"
_STREAMING: Final = "an Action's run(), and a SingleStepAction's run_and_update(), may yield"
_HOOK: Final = (
    "a hook is a function: @arun.hook(ActionStarted) is Burr's pre_run_step, ActionFinished post_run_step, Item "
    "post_stream_item; RunStarted, RunFinished, RunFailed and RunCancelled are those around a call"
)
_WATCH: Final = "with_hooks(...) and app.astream() tell of every event, and with_store(...) keeps the run"

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
        "with_tracker": _WATCH,
        "with_typing": "a State takes any values and has no schema; a field may hold a pydantic model or a dataclass",
        "with_parallel_executor": "with_executor(ThreadExecutor(threads=8)), or another; async subtasks need none",
        "with_spawning_parent": _PARENT,
    },
}

_HOOKS: Final = (
    "PreRunStepHook", "PostRunStepHook", "PreApplicationExecuteCallHook", "PostApplicationExecuteCallHook",
    "PreStartStreamHook", "PostStreamItemHook", "PostEndStreamHook", "PostApplicationCreateHook",
)  # fmt: skip
_PERSISTERS: Final = (
    "BaseStateLoader", "BaseStateSaver", "BaseStatePersister", "InMemoryPersister", "SQLitePersister",
    "PostgreSQLPersister", "RedisBasePersister", "MongoDBBasePersister",
)  # fmt: skip
#: what a program imports
_IMPORTS: Final = {
    "streaming_action": "@action takes the same generator",
    "map_reduce_action": "write a subclass of MapStates, MapActions or MapActionsAndStates",
    "Placeholder": "write an action that raises NotImplementedError",
    "ApplicationGraph": "it is arun.Graph",
    "SyncOrAsyncGenerator": "states() and tasks() may return any (async) iterable, such as AsyncIterator[State]",
    "SyncOrAsyncGeneratorOrItemOrList": "actions() and states() may return any (async) iterable",
    **dict.fromkeys(("StreamingAction", "AsyncStreamingAction", "SingleStepStreamingAction"), _STREAMING),
    **dict.fromkeys(("StreamingResultContainer", "AsyncStreamingResultContainer"), _STREAM),
    **dict.fromkeys(("LocalTrackingClient", "AsyncTrackingClient", "TracerFactory"), _WATCH),
    **dict.fromkeys(("LifecycleAdapter", *_HOOKS, *(f"{name}Async" for name in _HOOKS)), _HOOK),
    **dict.fromkeys(("SQLLitePersister", *_PERSISTERS, *(f"Async{name}" for name in _PERSISTERS)), _STORE),
}


def no_such_name(name: str) -> NoReturn:
    """As a module's ``__getattr__``: of Burr's names, an import says what to write instead.

    :raises ImportError: for those, since an import drops the message of an AttributeError.
    """
    if name in _IMPORTS:
        raise ImportError(f"arun has no {name!r}, which is Burr's: {_IMPORTS[name]}", name=name)
    raise AttributeError(f"module 'arun' has no attribute {name!r}", name=name, obj=sys.modules["arun"])


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
