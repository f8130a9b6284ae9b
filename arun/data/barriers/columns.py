"""Columns that a user names."""

from __future__ import annotations

from collections.abc import Iterable

import pyarrow as pa

from arun.errors import MisuseError

__all__ = ("existing",)


def existing(names: Iterable[str], schema: pa.Schema, what: str) -> None:
    """:raises MisuseError: the schema has no such column, or several."""
    for name in names:
        found = len(schema.get_all_field_indices(name))
        if found != 1:
            raise MisuseError(
                f"{what}: there {'is no column' if not found else f'are {found} columns'} {name!r}; "
                f"the columns are {', '.join(map(repr, schema.names)) or 'none'}"
            )
