"""The GPUs of one machine: which bundle has which, so that engines beside each other keep off each other's."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from arun.errors import PlacementError

if TYPE_CHECKING:
    from actors.bundles import Group, Placement, Reservation

__all__ = ("Devices",)

_EPSILON = 1e-6
_Shares = tuple[tuple[int, float], ...]


class Devices:
    """How much of each GPU is free; plain counting, nothing is asked of a driver.

    :param gpus: how many there are; those that CUDA_VISIBLE_DEVICES names, where it is set.
    """

    def __init__(self, gpus: float) -> None:
        self._free = [1.0] * math.ceil(gpus)

    def take(self, placement: Placement) -> list[_Shares]:
        """For each replica the GPUs of its bundles, and what share of each.

        :raises PlacementError: as many are free, but only in parts.
        """
        free = list(self._free)
        taken = [
            tuple(share for _ in range(placement.workers) for share in _take(free, placement.gpus))
            for _ in range(placement.replicas)
        ]
        self._free = free
        return taken

    def give_back(self, reservation: Reservation) -> None:
        """Free what its groups have."""
        for group in reservation.groups:
            for device, share in _shares(group):
                self._free[device] += share

    @staticmethod
    def environment(group: Group | None) -> dict[str, str]:
        """What makes CUDA see the group's GPUs and no others; empty where it has none."""
        devices = dict.fromkeys(device for device, _ in _shares(group))
        if not devices:
            return {}
        visible = list(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")))
        names = [visible[device] if len(visible) > max(devices) else str(device) for device in devices]
        return {"CUDA_VISIBLE_DEVICES": ",".join(names)}


def _take(free: list[float], gpus: float) -> _Shares:
    """The GPUs of one bundle: whole ones, or a part of the fullest that still has it."""
    share = min(gpus, 1.0)
    count = math.ceil(gpus)
    roomy = sorted((device for device, has in enumerate(free) if has >= share - _EPSILON), key=free.__getitem__)
    if len(roomy) < count:
        left = ", ".join(f"{has:g}" for has in free)
        raise PlacementError(f"no single GPU has {share:g} free; free are {left}. Ask for less, or end what holds them")
    for device in roomy[:count]:
        free[device] -= share
    return tuple((device, share) for device in roomy[:count])


def _shares(group: Group | None) -> _Shares:
    return group.native if group is not None and isinstance(group.native, tuple) else ()
