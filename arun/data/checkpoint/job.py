"""Jobs: what a checkpoint is of, and which plans can be gone on with."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import CodeType, EllipsisType
from typing import Any

import msgspec

from arun.data.engines import Ask, Embed
from arun.data.logical import AllToAll, Iterate, Node, OneToOne, Plan, Read, Union, Write, Zip
from arun.data.source import Fragment, Source
from arun.data.steps import BatchFunction, Limit, RowFunction, Step
from arun.errors import CheckpointError

__all__ = ("Job", "StepMark", "job_of", "obstacle", "source_of")


class StepMark(msgspec.Struct, frozen=True):
    """A step: what people call it, and a digest of its function's code."""

    label: str
    digest: str


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What is done to what, and where to.

    :ivar python: that the digests of code are of.
    :ivar steps: as they were asked for, and as they run.
    :ivar columns: of the source.
    :ivar fragments: of the source, by their keys.
    """

    python: str
    sink: str
    steps: list[StepMark]
    columns: str
    fragments: list[str]

    def check(self, earlier: Job, folder: Path) -> None:
        """Whether that is the job that an earlier process has begun.

        :raises CheckpointError: it is another, which is told.
        """
        what = self._difference(earlier)
        if what is not None:
            raise CheckpointError(f"{folder} is a checkpoint of another job: {what}; use another folder, or remove it")

    def _difference(self, earlier: Job) -> str | None:
        if self.sink != earlier.sink:
            return f"that wrote {earlier.sink}, and not {self.sink}"
        labels, before = [step.label for step in self.steps], [step.label for step in earlier.steps]
        if labels != before:
            return f"its steps were {', '.join(before)}, and are {', '.join(labels)}"
        if self.python == earlier.python:
            for step, old in zip(self.steps, earlier.steps, strict=True):
                if step != old:
                    return f"the code or the options of {step.label} have changed"
        return self._other_input(earlier)

    def _other_input(self, earlier: Job) -> str | None:
        if self.fragments != earlier.fragments:
            new, old = set(self.fragments), set(earlier.fragments)
            gone = next((key for key in earlier.fragments if key not in new), None)
            come = next((key for key in self.fragments if key not in old), None)
            changes = [f"no longer {gone!r}"] * (gone is not None) + [f"now {come!r}"] * (come is not None)
            return f"its input is {', '.join(changes) or 'in another order'}"
        if self.columns != earlier.columns:
            return f"the columns of its input were {earlier.columns}, and are {self.columns}"
        return None


def job_of(logical: Plan, plan: Plan, fragments: list[Fragment]) -> Job:
    """What a plan does.

    :param logical: as it was asked for; the rules may have moved some of it into the source.
    :param plan: as it runs.
    """
    (root,) = plan.roots
    assert isinstance(root, Write)
    steps = [StepMark(step.label, _digest(step)) for node in logical.nodes for step in _steps(node)]
    steps += [StepMark(step.label, "") for node in plan.nodes for step in _steps(node)]
    return Job(
        python=str(sys.implementation.cache_tag),
        sink=root.sink.name,
        steps=steps,
        columns=_columns(source_of(plan)),
        fragments=[fragment.key for fragment in fragments],
    )


def source_of(plan: Plan) -> Source:
    """The only source of a plan that has no obstacle."""
    return next(node.source for node in plan.nodes if isinstance(node, Read))


def obstacle(plan: Plan) -> str | None:
    """Why a killed run of this plan could not be gone on with; None where it could."""
    if len(plan.roots) != 1:
        return "several datasets are run as one; give each a checkpoint and a run of its own"
    (root,) = plan.roots
    if not isinstance(root, Write):
        return "nothing is written; end the plan with a sink"
    if not getattr(root.sink, "resumable", False):
        return f"{root.label} can't be gone on with after a kill; sinks that write files can"
    multiplied: Step | None = None
    for node in plan.nodes:
        why = _refused(node)
        if why is not None:
            return why
        for step in _steps(node):
            if isinstance(step, BatchFunction) and step.batch_size is not None and multiplied is not None:
                return (
                    f"{step.label} may part the rows that {multiplied.label} makes of one, so that nobody could tell "
                    "when that one is finished; leave batch_size out"
                )
            if isinstance(step, RowFunction) and step.gives_many:
                multiplied = step
    return None


def _refused(node: Node) -> str | None:
    match node:
        case Read():
            if getattr(node.source, "resumable", False):
                return None
            return f"{node.label}: another run could not tell that it is the same rows; those of files can be told"
        case Iterate():
            return f"{node.label}: nothing is known of rows before they come; write them to a file first"
        case AllToAll():
            return f"{node.label} needs all rows at once; checkpoint what comes before it, and go on from its output"
        case Union() | Zip():
            return f"{node.label} has several inputs; checkpoint each by itself"
        case OneToOne():
            return next((why for step in node.steps if (why := _refused_step(step)) is not None), None)
        case Write():
            return None


def _refused_step(step: Step) -> str | None:
    if isinstance(step, Limit):
        return f"{step.label} counts rows, which another run would count anew"
    if isinstance(step, BatchFunction) and not step.keeps_rows:
        return f"{step.label} may give any rows for those it is given; say keeps_rows=True where it gives one for each"
    return None


def _steps(node: Node) -> tuple[Step, ...]:
    return node.steps if isinstance(node, OneToOne) else ()


def _columns(source: Source) -> str:
    schema: Any = source.schema()
    return ", ".join(f"{field.name} {field.type}" for field in schema or ())


def _digest(step: Step) -> str:
    function = getattr(step, "function", None)
    what = function.declared if isinstance(function, Ask | Embed) else getattr(function, "__code__", None)
    return "" if what is None else hashlib.sha256(_described(what).encode()).hexdigest()[:16]


def _described(value: Any) -> str:
    """The same text in every process, as long as it is the same code or plain value."""
    match value:
        case CodeType():
            return repr((value.co_code, value.co_names, value.co_varnames, [*map(_described, value.co_consts)]))
        case frozenset():  # as in `word in {"a", "b"}`; its order is another in each process
            return repr(sorted(map(_described, value)))
        case tuple() | list():
            return repr([*map(_described, value)])
        case dict():
            return repr([(key, _described(one)) for key, one in value.items()])
        case None | bool() | int() | float() | complex() | str() | bytes() | EllipsisType():
            return repr(value)
        case _ if hasattr(value, "__code__"):
            return _described(value.__code__)
        case _:
            kind = value if isinstance(value, type) else type(value)
            return f"{kind.__module__}.{kind.__qualname__}"
