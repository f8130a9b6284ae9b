"""Policies: how a fan-out runs its subtasks. Options only; :mod:`arun.fanout` carries them out."""

from __future__ import annotations

from typing import Literal

import msgspec

__all__ = ("Policy",)


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """Options of a parallel action or of :func:`arun.fan_out`.

    :ivar limit: most subtasks in flight (started or waiting to be taken by the reducer), at least 1.
    :ivar order: "completed": results as subtasks end; "submitted": in the order in which they were yielded.
    :ivar on_error: "fail": the first failure cancels the rest and is raised; "skip": failed subtasks are left out;
        "collect": the reducer gets an :data:`arun.Outcome` for every subtask.
    """

    limit: int = 100
    order: Literal["completed", "submitted"] = "completed"
    on_error: Literal["fail", "skip", "collect"] = "fail"

    def __post_init__(self) -> None:
        if self.limit < 1:
            raise ValueError(f"Policy(limit={self.limit}): the limit is the number of subtasks in flight, at least 1")
        if self.order not in {"completed", "submitted"}:
            raise ValueError(f"Policy(order={self.order!r}): takes 'completed' or 'submitted'")
        if self.on_error not in {"fail", "skip", "collect"}:
            raise ValueError(f"Policy(on_error={self.on_error!r}): takes 'fail', 'skip' or 'collect'")
