"""Steps: the one-to-one operations of a plan, as data. What runs them is :mod:`arun.data.execution`.

===================  ======================================  ============  ==========================================
step                 made by                                 keeps rows    runs
===================  ======================================  ============  ==========================================
RowFunction          map, filter, flat_map, with_column,     map only      plain: in a thread, a block at a time;
                     generate, chat, embed, map_actor                      async, or with a concurrency: row by row
BatchFunction        map_batches                             if it says    in a thread, a batch at a time
Select, Drop,        the methods of these names              yes           beside what is before it
Rename, Expression
Where                filter(expression)                      no            beside what is before it
Limit                limit                                   no            beside what is before it
===================  ======================================  ============  ==========================================

A step *keeps rows* when it gives one row for each row that it is given, in their order. Rules rely on it, so it is
checked while the step runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import msgspec

from arun.data.batches import BatchFormat
from arun.data.block import Row
from arun.policies import Retry
from arun.signatures import Kind, kind_of, name_of

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.compute as pc

    from arun.executors import Executor

__all__ = (
    "BatchFunction",
    "Drop",
    "Expression",
    "Limit",
    "OnError",
    "Rename",
    "RowFunction",
    "Select",
    "Step",
    "Where",
)

OnError: TypeAlias = Literal["fail", "skip", "collect"]


class RowFunction(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A user's function of one row.

    :ivar operation: what its result means: a row, whether the row stays, rows, or the value of ``column``.
    :ivar concurrency: most rows at a time, each call in a thread of its own if it is plain; None: a plain function
        takes a block at a time in one thread, an async one as many rows as a Policy has by default.
    :ivar ordered: whether results come in the order of the rows.
    :ivar on_error: "fail": raise; "skip": leave the row out; "collect": keep the row as it was given, with the error
        as text in ``error_column``, which is null in all other rows. A row that has one already is passed by.
    :ivar retry: which errors are worth another call with the same row, before ``on_error`` decides.
    :ivar schema: of the rows that it gives; None takes it from them.
    :ivar fuse: False makes it a stage of its own.
    :ivar prefix: gives what rows are grouped by, so that those with a common beginning run together; None keeps order.
    :ivar title: what a person calls the step; by default it goes by operation and function.
    """

    function: Callable[[Row], Any]
    operation: Literal["map", "filter", "flat_map", "with_column"] = "map"
    column: str = ""
    concurrency: int | None = None
    ordered: bool = True
    executor: Executor | None = None
    on_error: OnError = "fail"
    error_column: str = "error"
    retry: Retry | None = None
    schema: pa.Schema | None = None
    fuse: bool = True
    prefix: Callable[[Row], Any] | None = None
    title: str | None = None

    @property
    def kind(self) -> Kind:
        """Which kind of function it is."""
        return kind_of(self.function)

    @property
    def plain(self) -> bool:
        """Whether it is neither async nor asked to run row by row or elsewhere."""
        return self.kind in {"function", "generator"} and self.concurrency is None and self.executor is None

    @property
    def gives_many(self) -> bool:
        """Whether it gives any number of rows: ``flat_map``, and ``map`` of a generator."""
        return self.operation == "flat_map" or (self.operation == "map" and "generator" in self.kind)

    @property
    def streams(self) -> bool:
        """Whether it is an async generator, whose rows come one by one."""
        return self.gives_many and self.kind == "async generator"

    @property
    def keeps_rows(self) -> bool:
        """See the module."""
        return self.operation != "filter" and not self.gives_many and self.ordered and self.on_error != "skip"

    @property
    def label(self) -> str:
        """For people, such as ``map(render)``."""
        column = f"{self.column}, " if self.column else ""
        return self.title or f"{self.operation}({column}{name_of(self.function)})"


class BatchFunction(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A user's function of one batch.

    :ivar format: of what it is given and gives; a record batch, a dict of NumPy arrays or PyTorch tensors, or a pandas
        DataFrame.
    :ivar batch_size: rows of each batch but the last; None takes blocks as they come.
    :ivar concurrency: most batches at a time; None is one.
    :ivar keeps_rows: whether it gives as many rows as it is given, in their order.
    """

    function: Callable[[Any], Any]
    format: BatchFormat = "arrow"
    batch_size: int | None = None
    concurrency: int | None = None
    ordered: bool = True
    executor: Executor | None = None
    fuse: bool = True
    keeps_rows: bool = False

    @property
    def kind(self) -> Kind:
        """Which kind of function it is."""
        return kind_of(self.function)

    @property
    def plain(self) -> bool:
        """Whether it can run where the step before it does."""
        alone = self.concurrency is None and self.executor is None and self.batch_size is None
        return alone and self.kind in {"function", "generator"}

    @property
    def label(self) -> str:
        """For people."""
        return f"map_batches({name_of(self.function)})"


class Select(msgspec.Struct, frozen=True, eq=False):
    """Keep these columns, in this order."""

    columns: tuple[str, ...]
    fuse: ClassVar[bool] = True
    plain: ClassVar[bool] = True
    keeps_rows: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """For people."""
        return f"select({', '.join(self.columns)})"


class Drop(msgspec.Struct, frozen=True, eq=False):
    """Leave these columns out."""

    columns: tuple[str, ...]
    fuse: ClassVar[bool] = True
    plain: ClassVar[bool] = True
    keeps_rows: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """For people."""
        return f"drop({', '.join(self.columns)})"


class Rename(msgspec.Struct, frozen=True, eq=False):
    """Give columns other names.

    :ivar names: old to new.
    """

    names: Mapping[str, str]
    fuse: ClassVar[bool] = True
    plain: ClassVar[bool] = True
    keeps_rows: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """For people."""
        return f"rename({', '.join(f'{old} -> {new}' for old, new in self.names.items())})"


class Expression(msgspec.Struct, frozen=True, eq=False):
    """Compute a column by Arrow."""

    column: str
    expression: pc.Expression
    fuse: ClassVar[bool] = True
    plain: ClassVar[bool] = True
    keeps_rows: ClassVar[bool] = True

    @property
    def label(self) -> str:
        """For people."""
        return f"with_column({self.column}, {self.expression})"


class Where(msgspec.Struct, frozen=True, eq=False):
    """Keep the rows for which an expression holds, by Arrow."""

    expression: pc.Expression
    fuse: ClassVar[bool] = True
    plain: ClassVar[bool] = True
    keeps_rows: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """For people."""
        return f"filter({self.expression})"


class Limit(msgspec.Struct, frozen=True, eq=False):
    """Keep the first rows, and read no more."""

    rows: int
    fuse: ClassVar[bool] = True
    plain: ClassVar[bool] = True
    keeps_rows: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """For people."""
        return f"limit({self.rows})"


Step: TypeAlias = RowFunction | BatchFunction | Select | Drop | Rename | Expression | Where | Limit
