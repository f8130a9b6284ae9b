"""What of a plan Ray Data would run, and what it can't: told before anything runs."""

from __future__ import annotations

from typing import Final

from actors.on_ray.pickling import dumps_code
from arun.data.all_to_all import Aggregate, Distinct, Join, RandomShuffle, Repartition, Sort
from arun.data.engines import ActorCall
from arun.data.interchange import StreamingSource, TableSource
from arun.data.logical import AllToAll, Iterate, Node, OneToOne, Read, Union, Write, Zip
from arun.data.sources import RowSource
from arun.data.steps import BatchFunction, Limit, RowFunction, Step
from arun.errors import MisuseError

__all__ = ("refusal", "shown_on_ray")

#: Options of ``spawn`` that mean something in the cluster that they were given for only.
_OF_A_CLUSTER: Final = ("group", "lifetime", "get_if_exists")


def refusal(node: Node) -> str | None:
    """Why a node can't run on Ray Data, and what to do; None if it can."""
    match node:
        case Iterate() if node.items.on_demand:
            return f"{node.items.name} hands blocks to readers in this process; run what it is a split of"
        case Iterate() if not node.items.whole:
            return (
                f"{node.items.name} is not filled yet, and would be computed in this process alone: run it once before "
                "(`await cached.count()`), or leave cache() out"
            )
        case Read(source=RowSource() | TableSource() | StreamingSource()):  # in memory, or another library's
            return None
        case Read():
            return _unsendable(node.source, node.label)
        case Write():
            return _unsendable(node.sink, node.label)
        case OneToOne():
            return next((why for step in node.steps if (why := _step_refusal(step)) is not None), None)
        case AllToAll(barrier=Sort() | Aggregate() | Distinct() | Join() | RandomShuffle() | Repartition()):
            return None
        case AllToAll():
            return f"Ray Data has no {type(node.barrier).__name__}; write its rows to files here, and go on from these"
        case _:
            return None


def _step_refusal(step: Step) -> str | None:
    if not isinstance(step, RowFunction | BatchFunction):
        return None
    if step.executor is not None:
        return f"{step.label} runs on {step.executor!r}, which is of this process; leave executor= out"
    function = step.function
    if isinstance(function, ActorCall):
        given = [name for name in _OF_A_CLUSTER if name in function.options]
        if given:
            return (
                f"{given[0]}= of {step.label} is for its own cluster, and the actors would be Ray Data's; leave it out"
            )
        function = function.cls
    return _unsendable(function, step.label)


def _unsendable(code: object, label: str) -> str | None:
    try:
        dumps_code(code, label)
    except MisuseError as exc:
        return str(exc)
    return None


def shown_on_ray(node: Node) -> str:
    """What a node becomes on Ray Data."""
    match node:
        case Read(source=RowSource() | TableSource()):
            return "put into Ray's object store"
        case Read():
            return "read_datasource"
        case Iterate():
            return "iterated over here, into Ray's object store"
        case OneToOne():
            return " + ".join(_shown_step(step) for step in node.steps)
        case AllToAll(barrier=Join(how="cross")):
            return "map_batches: every block with those of the other side"
        case AllToAll(barrier=Aggregate() | Distinct() | Join()):
            return "map_batches + groupby + map_groups"
        case AllToAll(barrier=Sort()):
            return "map_batches + sort"
        case AllToAll():
            return node.barrier.label
        case Union():
            return "computed, one after the other"
        case Zip():
            return "computed, then a task for each block"
        case Write():
            return "map_batches: a part a block"


def _shown_step(step: Step) -> str:
    if isinstance(step, Limit):
        return f"limit({step.rows})"
    if isinstance(step, RowFunction) and isinstance(step.function, ActorCall):
        return f"map_batches in {step.function.replicas} actors"
    return "map_batches"
