"""What may be computed of a group, and of which type it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.types as pt

from arun.data.barriers.carried import ROW
from arun.errors import MisuseError

__all__ = ("AGGREGATIONS", "Aggregation")


class Aggregation(msgspec.Struct, frozen=True):
    """One value of a group: ``Aggregation("sum", "amount")``.

    Nulls are left out, save by ``first``, ``last`` and ``list``; of nothing but nulls, ``count`` and ``count_distinct``
    are 0 and the others null. Sums of whole numbers are of 64 bits, and an error where that is too few.

    :ivar function: ``count sum mean min max first last list median quantile std var count_distinct any all``.
        ``std`` and ``var`` are the sample's; ``median`` and ``quantile`` interpolate; ``first``, ``last`` and ``list``
        go by the order in which the rows came.
    :ivar column: what it is computed of; None for ``count``: of the rows.
    :ivar argument: of ``quantile``: from 0 to 1.
    """

    function: str
    column: str | None = None
    argument: float | None = None

    def __post_init__(self) -> None:
        if self.function not in AGGREGATIONS:
            raise MisuseError(f"there is no aggregation {self.function!r}; there are {', '.join(AGGREGATIONS)}")
        if self.column is None and self.function != "count":
            raise MisuseError(f"{self.function} is computed of a column: ({self.function!r}, column)")
        if (self.function == "quantile") != (self.argument is not None):
            raise MisuseError(
                f"('quantile', column, 0.9) takes a number from 0 to 1 and no other aggregation does: {self}"
            )
        if self.argument is not None and not 0 <= self.argument <= 1:
            raise MisuseError(f"('quantile', {self.column!r}, {self.argument:g}): it is a number from 0 to 1")

    @classmethod
    def of(cls, spec: Aggregation | str | Sequence[Any]) -> Aggregation:
        """From one, from ``"count"``, or from a tuple such as ``("quantile", "seconds", 0.9)``."""
        if isinstance(spec, cls):
            return spec
        if not isinstance(spec, Sequence):
            raise MisuseError(f"{spec!r} is no aggregation; give 'count', or ('sum', column)")
        return cls(spec) if isinstance(spec, str) else cls(*spec)

    @property
    def ordered(self) -> bool:
        """Whether it depends on the order of the rows."""
        return ROW in AGGREGATIONS[self.function].sql

    def field(self, name: str, schema: pa.Schema) -> pa.Field:
        """Name and type of the result.

        :raises MisuseError: it can't be computed of that column.
        """
        kind = pa.null() if self.column is None else schema.field(self.column).type
        computed = AGGREGATIONS[self.function].kind(kind)
        if computed is None:
            raise MisuseError(f"{self.function} can't be computed of column {self.column!r}, which is of type {kind}")
        return pa.field(name, computed)

    def sql(self, column: str | None, result: pa.DataType) -> str:
        """As an SQL expression over ``column`` (and ``ROW``, if it is ordered).

        :param result: the type that it is to have.
        """
        sql = AGGREGATIONS[self.function].sql.format(x=column or "*", q=self.argument)
        # DuckDB's own sums of whole numbers are of 128 bits.
        if self.function == "sum" and not (pt.is_floating(result) or pt.is_decimal(result)):
            sql = f"{sql}::{'UBIGINT' if pt.is_unsigned_integer(result) else 'BIGINT'}"
        return sql


class _Function(NamedTuple):
    sql: str
    #: the result's type by the column's, or None where it can't be computed
    kind: Callable[[pa.DataType], pa.DataType | None]


def _sum(kind: pa.DataType) -> pa.DataType | None:
    if pt.is_unsigned_integer(kind):
        return pa.uint64()
    if pt.is_integer(kind) or pt.is_boolean(kind) or pt.is_null(kind):
        return pa.int64()
    if pt.is_decimal(kind):
        return pa.decimal128(38, kind.scale)
    return kind if pt.is_duration(kind) else _float(kind)


def _float(kind: pa.DataType) -> pa.DataType | None:
    number = (
        pt.is_integer(kind) or pt.is_floating(kind) or pt.is_decimal(kind) or pt.is_boolean(kind) or pt.is_null(kind)
    )
    return pa.float64() if number else None


def _ordered(kind: pa.DataType) -> pa.DataType | None:
    """The types with a smallest and a largest value."""
    return None if pt.is_nested(kind) else kind


def _boolean(kind: pa.DataType) -> pa.DataType | None:
    return pa.bool_() if pt.is_boolean(kind) or pt.is_null(kind) else None


def _count(_: pa.DataType) -> pa.DataType:
    return pa.int64()


def _same(kind: pa.DataType) -> pa.DataType:
    return kind


def _list(kind: pa.DataType) -> pa.DataType:
    """A cast makes lists of dictionaries of text only, so it is their values."""
    return pa.list_(kind.value_type if pt.is_dictionary(kind) else kind)


AGGREGATIONS: Mapping[str, _Function] = {
    "count": _Function("count({x})", _count),
    "sum": _Function("sum({x})", _sum),
    "mean": _Function("avg({x}::DOUBLE)", _float),
    "min": _Function("min({x})", _ordered),
    "max": _Function("max({x})", _ordered),
    "first": _Function(f"first({{x}} ORDER BY {ROW})", _same),
    "last": _Function(f"last({{x}} ORDER BY {ROW})", _same),
    "list": _Function(f"list({{x}} ORDER BY {ROW})", _list),
    "median": _Function("quantile_cont({x}::DOUBLE, 0.5)", _float),
    "quantile": _Function("quantile_cont({x}::DOUBLE, {q})", _float),
    "std": _Function("stddev_samp({x}::DOUBLE)", _float),
    "var": _Function("var_samp({x}::DOUBLE)", _float),
    "count_distinct": _Function("count(DISTINCT {x})", _count),
    "any": _Function("bool_or({x}::BOOLEAN)", _boolean),
    "all": _Function("bool_and({x}::BOOLEAN)", _boolean),
}
