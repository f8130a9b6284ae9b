"""Arrow expressions computed on the columns of a table.

pyarrow.acero imports pandas where that is installed, and takes longer than all of arun.data to load; so this module is
imported only where there is an expression.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.acero as acero

__all__ = ("evaluate",)


def evaluate(table: pa.Table, expression: Any) -> pa.Array:
    """The expression's value for each row."""
    plan = acero.Declaration.from_sequence([
        acero.Declaration("table_source", acero.TableSourceNodeOptions(table)),
        acero.Declaration("project", acero.ProjectNodeOptions([expression], [""])),
    ])
    values = plan.to_table(use_threads=False).column(0)
    return values.chunk(0) if values.num_chunks == 1 else values.combine_chunks()
