"""Executors: where the subtasks of parallel actions run.

>>> ApplicationBuilder().with_executor(ProcessExecutor(4))  # everything below, by default
>>> class Render(MapStates):
...     executor = ThreadExecutor()  # this action's subtasks
>>> SubGraphTask(graph=parse, state=state, executor=None)  # this one: here
"""

from __future__ import annotations

from arun.executors.local import Executor, LocalExecutor, ThreadExecutor
from arun.executors.process import ProcessExecutor

__all__ = ("Executor", "LocalExecutor", "ProcessExecutor", "ThreadExecutor")
