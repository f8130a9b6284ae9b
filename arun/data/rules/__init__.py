"""Rules: what turns a plan into one that gives the same rows with less work.

A rule is a function ``Plan -> Plan``. It is pure, keeps the rows and, where they have one, their order, and never pulls
apart a node that several others read. The rules of a run are an option::

    RunOptions(rules=(*RULES, mine))
    RunOptions(rules=without(push_limit))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, TypeAlias

from arun.data.logical import Plan
from arun.data.rules.fuse_chains import fuse_chains
from arun.data.rules.fuse_map_side import fuse_map_side
from arun.data.rules.push_filter import push_filter
from arun.data.rules.push_limit import push_limit
from arun.data.rules.push_projection import push_projection
from arun.data.rules.share_subplans import share_subplans

__all__ = (
    "RULES",
    "Rule",
    "fuse_chains",
    "fuse_map_side",
    "optimise",
    "push_filter",
    "push_limit",
    "push_projection",
    "share_subplans",
    "without",
)

Rule: TypeAlias = Callable[[Plan], Plan]

#: In their order: what is fused is not moved any more.
RULES: Final[tuple[Rule, ...]] = (
    share_subplans,
    push_filter,
    push_projection,
    push_limit,
    fuse_chains,
    fuse_map_side,
)


def optimise(plan: Plan, rules: Iterable[Rule] = RULES) -> Plan:
    """Apply rules, one after the other."""
    for rule in rules:
        plan = rule(plan)
    return plan


def without(*rules: Rule) -> tuple[Rule, ...]:
    """The rules but for these."""
    return tuple(rule for rule in RULES if rule not in rules)
