"""WaitingLine: who is next among the requests that no replica has room for."""

from __future__ import annotations

from heapq import heappop, heappush

from actors.requests import Lane

__all__ = ("WaitingLine",)

_BATCH_SHARE = 8
_SLACK = 64


class WaitingLine:
    """Requests in the order in which they start; plain state.

    ``interactive`` goes before ``batch``, but while both wait every eighth start is a ``batch`` one, so that nobody
    starves. Within a lane lower priorities go first, and equal ones in order of arrival.
    """

    __slots__ = ("_entries", "_heaps", "_since_batch")

    def __init__(self) -> None:
        self._heaps: dict[Lane, list[tuple[int, int, str]]] = {"interactive": [], "batch": []}
        self._entries: dict[str, tuple[Lane, int]] = {}
        self._since_batch = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request: str) -> bool:
        return request in self._entries

    def in_lane(self, lane: Lane) -> int:
        """How many wait in one lane."""
        return sum(entry[0] == lane for entry in self._entries.values())

    def add(self, request: str, lane: Lane, priority: int, arrival: int) -> None:
        """A request waits.

        :param arrival: its number in order of arrival; who returns keeps the old one, so goes before later ones.
        """
        self._entries[request] = (lane, arrival)
        heappush(self._heaps[lane], (priority, arrival, request))

    def remove(self, request: str) -> None:
        """It waits no more. Told twice, it counts once."""
        self._entries.pop(request, None)
        if sum(map(len, self._heaps.values())) > 2 * len(self._entries) + _SLACK:
            for lane, heap in self._heaps.items():  # or those who left would pile up behind who stays
                heap[:] = sorted(entry for entry in heap if self._entries.get(entry[2]) == (lane, entry[1]))

    def next(self) -> str | None:
        """Take out who is next."""
        interactive, batch = self._head("interactive"), self._head("batch")
        if interactive is None and batch is None:
            return None
        lane: Lane
        if batch is not None and (interactive is None or self._since_batch >= _BATCH_SHARE - 1):
            lane, self._since_batch = "batch", 0
        else:
            lane = "interactive"
            self._since_batch = self._since_batch + 1 if batch is not None else 0
        request = heappop(self._heaps[lane])[2]
        del self._entries[request]
        return request

    def _head(self, lane: Lane) -> str | None:
        heap = self._heaps[lane]
        while heap and self._entries.get(heap[0][2]) != (lane, heap[0][1]):
            heappop(heap)  # it left, or it waits again under another number
        return heap[0][2] if heap else None
