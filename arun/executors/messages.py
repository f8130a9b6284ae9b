"""What goes between an executor and its workers, over a channel. ``bytes`` are values written by the codec."""

from __future__ import annotations

from typing import Final, TypeAlias

import msgspec

from arun.channel.limits import Limits
from arun.guards import Checks

__all__ = (
    "LIMITS",
    "PREPARE",
    "RUN",
    "WINDOW",
    "Answer",
    "Beat",
    "ByName",
    "ConditionOrder",
    "Emitted",
    "Failure",
    "GraphOrder",
    "Instance",
    "Order",
    "Preparation",
    "Reference",
    "Success",
)

#: What the parent asks a worker for: to take a Preparation, and to run an Order.
PREPARE: Final = "prepare"
RUN: Final = "run"
#: Events of a subtask that may lie unread before its worker has to wait.
WINDOW: Final = 8
#: Both sides belong to one program: a State may be as large as the codec and the channel allow.
LIMITS: Final = Limits(message_bytes=2**30 - 1, window_bytes=2**26)


class ByName(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """An action that a module defines at its top level.

    :ivar name: what ``with_name`` made of its name.
    :ivar bound: what ``bind`` fixed.
    """

    module: str
    qualname: str
    name: str | None
    bound: bytes


class Instance(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """An instance of an action class that a module defines at its top level.

    :ivar values: its attributes.
    :ivar actions: its attributes that are actions themselves.
    :ivar functions: its attributes that are functions: module and qualified name.
    """

    module: str
    qualname: str
    values: bytes
    actions: dict[str, Reference]
    functions: dict[str, tuple[str, str]] = {}


class ConditionOrder(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A condition of a transition: how it was made.

    :ivar kind: "default", "when", "expr", "not", "and", "or" or "function".
    :ivar value: the fields of "when", the source of "expr", ``[module, qualname, name, keys]`` of "function".
    :ivar operands: of "not", "and" and "or".
    """

    kind: str
    value: bytes
    operands: list[ConditionOrder]


class GraphOrder(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """A RunnableGraph."""

    actions: dict[str, Reference]
    transitions: list[tuple[str, str, ConditionOrder]]
    entrypoint: str
    halt_after: list[str]
    name: str | None
    bound: bytes


Reference: TypeAlias = ByName | Instance | GraphOrder


class Preparation(msgspec.Struct, frozen=True, array_like=True):
    """What a fresh worker is told first.

    :ivar sys_path: of the parent, so that the worker finds the modules that the parent finds.
    :ivar pythonpath: PYTHONPATH as the worker's own child processes shall see it.
    :ivar main: the parent's main module: its name if it was started with ``-m``, else the path of its file.
    :ivar main_is_module: which of the two.
    """

    sys_path: list[str]
    pythonpath: str | None
    main: str | None
    main_is_module: bool


class Order(msgspec.Struct, frozen=True, array_like=True):
    """One subtask to run.

    :ivar state: the keys that the action may read.
    :ivar inputs: of the subtask.
    :ivar run_inputs: of the run, as far as the action takes them.
    :ivar resources: names of the program's resources.
    :ivar attempt: which one of the subtask it is, 1 for the first.
    :ivar listening: whether anybody wants the events.
    :ivar beating: whether anybody wants to know that something was yielded.
    :ivar checks: what the guard-rails look for.
    :ivar code: where the worker gets the code that no module has for it.
    :ivar attach: of the resources, those that the worker finds by itself: what each is, and its name where it lives.
    """

    action: Reference
    state: bytes
    inputs: bytes
    run_inputs: bytes
    resources: list[str]
    app_id: str
    partition_key: str | None
    sequence_id: int
    action_name: str
    path: tuple[str, ...]
    attempt: int
    listening: bool
    beating: bool
    checks: Checks | None = None
    code: tuple[str, ...] = ()
    attach: dict[str, tuple[str, str]] = {}


class Emitted(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """An event of the subtask.

    :ivar kind: the name of its class.
    :ivar fields: its own fields, without those that every event has.
    """

    kind: str
    action: str
    path: tuple[str, ...]
    attempt: int
    fields: bytes


class Beat(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The subtask has yielded something."""


class Success(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The subtask has ended: its result and what it wrote."""

    result: bytes
    written: bytes
    deleted: list[str]


class Failure(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """The subtask, or a part of it, raised.

    :ivar kind: qualified name of the error's type.
    :ivar details: its arguments and attributes, as in :class:`~arun.channel.messages.Fail`.
    :ivar notes: added to it in the worker.
    :ivar members: of an ExceptionGroup.
    :ivar cause: its ``__cause__``.
    """

    kind: str
    message: str
    details: bytes
    notes: list[str]
    traceback: str
    members: list[Failure]
    cause: Failure | None


Answer: TypeAlias = Emitted | Beat | Success | Failure
