"""Assignment: which request of a pool goes to which replica."""

from __future__ import annotations

__all__ = ("Assignment",)


class Assignment:
    """Which request goes to which replica; plain state, no I/O and no clock.

    A request goes to the replica with the fewest in flight; replicas that have equally many take turns; what finds
    no room waits in order of arrival. Tell it what happened, then do what :meth:`assign` returns.

    :param replicas: how many there are; they are numbered from 0.
    :param limit: most requests in flight per replica.
    """

    def __init__(self, replicas: int, *, limit: int) -> None:
        self._limit = limit
        self._load = dict.fromkeys(range(replicas), 0)
        self._placed: dict[str, int] = {}
        self._waiting: dict[str, None] = {}
        self._turn = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, request_id: str) -> None:
        """A request has come."""
        self._waiting[request_id] = None

    def leave(self, request_id: str) -> None:
        """A request has ended, wherever it was. Told twice, it counts once."""
        self._waiting.pop(request_id, None)
        replica = self._placed.pop(request_id, None)
        if replica in self._load:
            self._load[replica] -= 1

    def lose(self, replica: int) -> None:
        """A replica is gone; its requests are still to :meth:`leave`."""
        self._load.pop(replica, None)

    def assign(self) -> tuple[list[tuple[str, int]], list[str]]:
        """What to do now.

        :returns: requests to start, each with its replica; and requests to stop, because no replica is left.
        """
        starts: list[tuple[str, int]] = []
        if not self._load:
            stops, self._waiting = list(self._waiting), {}
            return starts, stops
        while self._waiting:
            replica = min(self._load, key=self._rank)
            if self._load[replica] >= self._limit:
                break
            request_id = next(iter(self._waiting))
            del self._waiting[request_id]
            self._placed[request_id] = replica
            self._load[replica] += 1
            self._turn = replica + 1
            starts.append((request_id, replica))
        return starts, []

    def _rank(self, replica: int) -> tuple[int, bool, int]:
        return self._load[replica], replica < self._turn, replica
