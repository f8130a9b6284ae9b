"""arun: an async-native actor runtime for Python.

Parallel actions, async reducers with partial results, long-lived engines: see the README for the first program.
"""

from __future__ import annotations

from arun.actions import Action, FunctionAction, Input, Result, SingleStepAction, action
from arun.application import Application, ApplicationBuilder, RunResult
from arun.conditions import Condition, default, expr, when
from arun.context import ApplicationContext
from arun.errors import ApplicationBusyError, ArunError, MisuseError, MisuseWarning, SubtaskFailed, SubtaskSkipped
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
from arun.fanout import FanOutStatistics
from arun.graph import Graph, GraphBuilder
from arun.handles import Handle
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
from arun.runtime import Runtime
from arun.state import State, StateDelta
from arun.stream import RunStream

__version__ = "0.1.0"

__all__ = (
    "Action",
    "ActionFinished",
    "ActionStarted",
    "Application",
    "ApplicationBuilder",
    "ApplicationBusyError",
    "ApplicationContext",
    "ArunError",
    "Capacity",
    "Condition",
    "Event",
    "Failed",
    "FanOut",
    "FanOutStatistics",
    "FunctionAction",
    "Graph",
    "GraphBuilder",
    "Handle",
    "Input",
    "Item",
    "MapActions",
    "MapActionsAndStates",
    "MapStates",
    "MisuseError",
    "MisuseWarning",
    "Ok",
    "Outcome",
    "Partial",
    "Policy",
    "Rate",
    "Result",
    "Retry",
    "RunCancelled",
    "RunFailed",
    "RunFinished",
    "RunResult",
    "RunStarted",
    "RunStream",
    "RunnableGraph",
    "Runtime",
    "SingleStepAction",
    "Skipped",
    "State",
    "StateDelta",
    "SubGraphTask",
    "SubtaskFailed",
    "SubtaskFinished",
    "SubtaskRetried",
    "SubtaskSkipped",
    "SubtaskStarted",
    "TaskBasedParallelAction",
    "action",
    "default",
    "expr",
    "fan_out",
    "when",
)
