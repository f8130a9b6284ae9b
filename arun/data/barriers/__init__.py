"""All-to-all operations: blocks in, blocks out, spilled to disk in between; nothing is read that nobody asks for."""

from __future__ import annotations

from arun.data.barriers.aggregation import Aggregation
from arun.data.barriers.grouping import aggregate, aggregated_schema, distinct
from arun.data.barriers.joining import How, join, joined_schema
from arun.data.barriers.limits import Limits
from arun.data.barriers.relation import Relation
from arun.data.barriers.shuffling import random_shuffle, repartition
from arun.data.barriers.sorting import sort

__all__ = (
    "Aggregation",
    "How",
    "Limits",
    "Relation",
    "aggregate",
    "aggregated_schema",
    "distinct",
    "join",
    "joined_schema",
    "random_shuffle",
    "repartition",
    "sort",
)
