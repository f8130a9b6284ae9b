"""The logical plan: what a dataset is, as a graph of frozen nodes. Nothing here runs.

====================  ============================================  ============================
node                  stands for                                    inputs
====================  ============================================  ============================
Read                  a source that is read in fragments            none
Iterate               an (async) iterable                           none
OneToOne              one or more steps, fused                      one
AllToAll              an operation that needs to see all rows       one; two for a join
Union, Zip            rows one after the other, side by side        two or more
Write                 a sink; only at a root                        one
====================  ============================================  ============================

A node is what it is by identity: it has an ``id``, and reached by two ways it is one node, which runs once. A rule
never changes a node; ``Plan.rewrite`` makes a new plan, in which whatever was shared is shared still.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias

import msgspec

from arun.data.items import Items
from arun.data.sink import Sink
from arun.data.source import Source
from arun.data.steps import Step

if TYPE_CHECKING:
    import pyarrow as pa

    from arun.data.barriers import Limits, Relation

__all__ = ("AllToAll", "Barrier", "Iterate", "Node", "OneToOne", "Plan", "Read", "Traits", "Union", "Write", "Zip")

# Nodes made in several processes may meet in one plan, so each process counts from somewhere else.
_numbers = itertools.count(secrets.randbits(62))


class Traits(msgspec.Struct, frozen=True, kw_only=True):
    """What rules may rely on.

    :ivar columns: those that it looks at, where it gives all others as they are, or not at all; None: all.
    :ivar keeps_rows: whether exactly the rows of its input come out, in whatever order.
    :ivar row_by_row: whether it makes no difference to the other rows when some are left out before it.
    :ivar scans: whether it reads ``files`` of a relation itself.
    """

    columns: Sequence[str] | None
    keeps_rows: bool
    row_by_row: bool
    scans: bool


class Barrier(Protocol):
    """An operation that needs to see all rows. Immutable."""

    @property
    def label(self) -> str:
        """For people, such as ``sort(id)``."""
        ...

    @property
    def traits(self) -> Traits:
        """What rules may rely on."""
        ...

    def run(self, inputs: Sequence[Relation], limits: Limits) -> AsyncGenerator[pa.RecordBatch]:
        """Blocks to blocks. Whatever it has opened is closed when this generator is."""
        ...


class Read(msgspec.Struct, frozen=True, eq=False):
    """Reads a source.

    :ivar filtered: whether a filter has been pushed into it. A second one is not: Arrow would compute it for the rows
        that the first one leaves out, too, and might fail.
    """

    source: Source
    filtered: bool = False
    id: int = msgspec.field(default_factory=_numbers.__next__)

    @property
    def inputs(self) -> tuple[Node, ...]:
        """None."""
        return ()

    @property
    def label(self) -> str:
        """For people."""
        return f"read {getattr(self.source, 'label', self.source.name)}"

    def over(self, inputs: Sequence[Node]) -> Node:
        """This node with other inputs."""
        return self


class Iterate(msgspec.Struct, frozen=True, eq=False):
    """Iterates over rows or record batches.

    :ivar schema: of the rows; None takes it from them.
    """

    items: Items
    schema: pa.Schema | None = None
    id: int = msgspec.field(default_factory=_numbers.__next__)

    @property
    def inputs(self) -> tuple[Node, ...]:
        """None."""
        return ()

    @property
    def label(self) -> str:
        """For people."""
        return f"iterate over {self.items.name}"

    def over(self, inputs: Sequence[Node]) -> Node:
        """This node with other inputs."""
        return self


class OneToOne(msgspec.Struct, frozen=True, eq=False):
    """Runs steps over each block, as one generator.

    :ivar inline: whether the same generator also runs the source or union that is its input.
    """

    steps: tuple[Step, ...]
    input: Node
    inline: bool = False
    id: int = msgspec.field(default_factory=_numbers.__next__)

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The one."""
        return (self.input,)

    @property
    def label(self) -> str:
        """For people."""
        return " + ".join(step.label for step in self.steps)

    def over(self, inputs: Sequence[Node]) -> Node:
        """This node with other inputs."""
        return OneToOne(self.steps, inputs[0], self.inline)


class AllToAll(msgspec.Struct, frozen=True, eq=False):
    """Runs a barrier.

    :ivar inline: whether the same generator also runs its inputs: they are fused into its map side.
    """

    barrier: Barrier
    inputs: tuple[Node, ...]
    inline: bool = False
    id: int = msgspec.field(default_factory=_numbers.__next__)

    @property
    def label(self) -> str:
        """For people."""
        return self.barrier.label

    def over(self, inputs: Sequence[Node]) -> Node:
        """This node with other inputs."""
        return AllToAll(self.barrier, tuple(inputs), self.inline)


class Union(msgspec.Struct, frozen=True, eq=False):
    """The rows of each input, one input after the other."""

    inputs: tuple[Node, ...]
    id: int = msgspec.field(default_factory=_numbers.__next__)

    @property
    def label(self) -> str:
        """For people."""
        return "union"

    def over(self, inputs: Sequence[Node]) -> Node:
        """This node with other inputs."""
        return Union(tuple(inputs))


class Zip(msgspec.Struct, frozen=True, eq=False):
    """The columns of all inputs, side by side."""

    inputs: tuple[Node, ...]
    id: int = msgspec.field(default_factory=_numbers.__next__)

    @property
    def label(self) -> str:
        """For people."""
        return "zip"

    def over(self, inputs: Sequence[Node]) -> Node:
        """This node with other inputs."""
        return Zip(tuple(inputs))


class Write(msgspec.Struct, frozen=True, eq=False):
    """Writes to a sink."""

    sink: Sink
    input: Node
    id: int = msgspec.field(default_factory=_numbers.__next__)

    @property
    def inputs(self) -> tuple[Node, ...]:
        """The one."""
        return (self.input,)

    @property
    def label(self) -> str:
        """For people."""
        return f"write {self.sink.name}"

    def over(self, inputs: Sequence[Node]) -> Node:
        """This node with other inputs."""
        return Write(self.sink, inputs[0])


Node: TypeAlias = Read | Iterate | OneToOne | AllToAll | Union | Zip | Write


class Plan:
    """One or more roots and all that is below them. Immutable.

    :ivar roots: what is asked for.
    :ivar nodes: each once, inputs before what they go into.
    """

    __slots__ = ("_consumers", "nodes", "roots")

    def __init__(self, roots: Sequence[Node]) -> None:
        self.roots = tuple(roots)
        self.nodes = tuple(_topological(self.roots))
        self._consumers: dict[int, int] = {}
        for node in (*(below for consumer in self.nodes for below in consumer.inputs), *self.roots):
            self._consumers[node.id] = self._consumers.get(node.id, 0) + 1

    def consumers(self, node: Node) -> int:
        """How many read what a node gives. A rule must not pull apart a node that has several: it would run twice."""
        return self._consumers.get(node.id, 0)

    def rewrite(self, change: Callable[[Node, Callable[[Node], bool]], Node]) -> Plan:
        """The plan in which each node, over its rewritten inputs, has been through ``change``.

        :param change: given a node, and a function that tells whether only one reads what another node gives; returns
            the node itself, or what stands in its place. Called once a node, inputs first.
        """
        new: dict[int, Node] = {}
        consumers: dict[int, int] = {}

        def alone(node: Node) -> bool:
            return consumers.get(node.id, 1) < 2

        for node in self.nodes:
            inputs = [new[below.id] for below in node.inputs]
            same = all(a is b for a, b in zip(inputs, node.inputs, strict=True))
            changed = new[node.id] = change(node if same else node.over(inputs), alone)
            consumers[changed.id] = max(consumers.get(changed.id, 1), self._consumers[node.id])
        roots = [new[root.id] for root in self.roots]
        return self if all(a is b for a, b in zip(roots, self.roots, strict=True)) else Plan(roots)


def _topological(roots: Sequence[Node]) -> list[Node]:
    order: list[Node] = []
    seen: set[int] = set()
    # Not recursive: a chain that was built in a loop may be deeper than Python's stack.
    stack: list[tuple[Node, bool]] = [(root, False) for root in reversed(roots)]
    while stack:
        node, below_done = stack.pop()
        if below_done:
            order.append(node)
        elif node.id not in seen:
            seen.add(node.id)
            stack.append((node, True))
            stack.extend((below, False) for below in reversed(node.inputs))
    return order
