"""arun: an async-native actor runtime for Python.

Parallel actions, async reducers with partial results, long-lived engines: see the README for the first program.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from arun.actions import Action, FunctionAction, Input, Result, SingleStepAction, action
from arun.application import Application, RunResult
from arun.builder import ApplicationBuilder
from arun.conditions import Condition, default, expr, when
from arun.context import ApplicationContext
from arun.errors import (
    AbandonedWork,
    AlreadyFinishedError,
    ApplicationBusyError,
    ArunError,
    CodecError,
    GraphChangedError,
    MisuseError,
    MisuseWarning,
    RunConflictError,
    StoreError,
    SubtaskFailed,
    SubtaskSkipped,
    WorkerDied,
)
from arun.events import (
    ActionFinished,
    ActionStarted,
    Event,
    Item,
    Partial,
    RunCancelled,
    RunFailed,
    RunFinished,
    RunStarted,
    SubtaskFinished,
    SubtaskRetried,
    SubtaskStarted,
)
from arun.executors import Executor, LocalExecutor, ProcessExecutor, ThreadExecutor
from arun.fanout import FanOutStatistics
from arun.graph import Graph, GraphBuilder
from arun.handles import Handle
from arun.hooks import Hook, hook
from arun.outcome_stream import FanOut, fan_out
from arun.outcomes import Failed, Ok, Outcome, Skipped
from arun.parallel import (
    MapActions,
    MapActionsAndStates,
    MapStates,
    RunnableGraph,
    SubGraphTask,
    TaskBasedParallelAction,
)
from arun.policies import Capacity, Policy, Rate, Retry
from arun.registry import register
from arun.runtime import Runtime
from arun.state import State, StateDelta
from arun.store import MemoryStore, SQLiteStore, Store
from arun.stream import RunStream

if not TYPE_CHECKING:  # to type checkers, every name would be there
    from arun.burr import no_such_name as __getattr__  # noqa: F401 - called by Python

__version__ = "0.1.0"

__all__ = (
    "AbandonedWork",
    "Action",
    "ActionFinished",
    "ActionStarted",
    "AlreadyFinishedError",
    "Application",
    "ApplicationBuilder",
    "ApplicationBusyError",
    "ApplicationContext",
    "ArunError",
    "Capacity",
    "CodecError",
    "Condition",
    "Event",
    "Executor",
    "Failed",
    "FanOut",
    "FanOutStatistics",
    "FunctionAction",
    "Graph",
    "GraphBuilder",
    "GraphChangedError",
    "Handle",
    "Hook",
    "Input",
    "Item",
    "LocalExecutor",
    "MapActions",
    "MapActionsAndStates",
    "MapStates",
    "MemoryStore",
    "MisuseError",
    "MisuseWarning",
    "Ok",
    "Outcome",
    "Partial",
    "Policy",
    "ProcessExecutor",
    "Rate",
    "Result",
    "Retry",
    "RunConflictError",
    "RunCancelled",
    "RunFailed",
    "RunFinished",
    "RunResult",
    "RunStarted",
    "RunStream",
    "RunnableGraph",
    "Runtime",
    "SQLiteStore",
    "SingleStepAction",
    "Skipped",
    "State",
    "StateDelta",
    "Store",
    "StoreError",
    "SubGraphTask",
    "SubtaskFailed",
    "SubtaskFinished",
    "SubtaskRetried",
    "SubtaskSkipped",
    "SubtaskStarted",
    "TaskBasedParallelAction",
    "ThreadExecutor",
    "WorkerDied",
    "action",
    "default",
    "expr",
    "fan_out",
    "hook",
    "register",
    "when",
)
