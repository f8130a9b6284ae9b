"""The planted bugs, each of which its universe must find. A harness that misses one is the bug."""

from __future__ import annotations

import importlib
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait

from tests.simulation.planting import Plant, changed_source, plant

__all__ = ("PLANTS", "find_planted")

_SESSION = "arun.channel.session"

_CHANNEL = (
    Plant(
        "credit granted twice",
        "channel",
        _SESSION,
        "            inbound.items_used = inbound.bytes_used = 0\n        self._credit_due.clear()",
        "        self._credit_due.clear()",
    ),
    Plant(
        "credit for items only",
        "channel",
        _SESSION,
        "if inbound.items_used * 2 < inbound.window and inbound.bytes_used * 2 < inbound.window_bytes:",
        "if inbound.items_used * 2 < inbound.window:",
    ),
    Plant(
        "credit for a stream (its slot) lost on cancel",
        "channel",
        _SESSION,
        "        self._advance(outbound, outbound.id, type(message))\n        self._drop_transfer(outbound)\n"
        "        self._send(message)\n",
        "        cancelled = outbound.state == 'cancelling'\n"
        "        self._advance(outbound, outbound.id, type(message))\n        self._send(message)\n"
        "        if cancelled:\n            return\n",
    ),
    Plant(
        "slot free before the clean-up",
        "channel",
        _SESSION,
        "            effects.interrupted.append(outbound)\n            effects.disturbances += 1\n",
        "            effects.interrupted.append(outbound)\n            del self._outbound[message.stream]\n"
        "            effects.disturbances += 1\n",
    ),
    Plant(
        "cancel after end reopens",
        "channel",
        _SESSION,
        'Cancel: {"open": "cancelling", "closed": "closed"}',
        'Cancel: {"open": "cancelling", "closed": "cancelling"}',
    ),
    Plant(
        "cancel without closing the handler",
        "channel",
        _SESSION,
        "            effects.interrupted.append(outbound)\n            effects.disturbances += 1\n",
        "            effects.disturbances += 1\n",
    ),
    Plant(
        "wake-up lost on last credit",
        "channel",
        _SESSION,
        'than its window")\n        effects.ready.append(outbound)\n',
        'than its window")\n        if outbound.items_left > message.items:\n'
        "            effects.ready.append(outbound)\n",
    ),
    Plant(
        "late item after cancel accepted",
        "channel",
        _SESSION,
        '        if inbound.state != "open":\n            self.late_items += count\n            return\n',
        "",
    ),
    Plant(
        "end after the loss passes for the stream's own",
        "channel",
        _SESSION,
        "        if self._closing is not None:\n            # An End now",
        "        if False:\n            # An End now",
    ),
    Plant(
        "loss not told to who has cancelled",
        "channel",
        _SESSION,
        "                self._send(Cancel(inbound.id))\n            inbound.outcome = lost",
        "                self._send(Cancel(inbound.id))\n                inbound.outcome = lost",
    ),
)

_CONNECTION = (
    Plant(
        "handler closed without aclose",
        "connection",
        "arun.channel.serving",
        "            await aclose()\n    except",
        "            pass\n    except",
    ),
    Plant(
        "cancel does not interrupt the handler",
        "connection",
        "arun.channel.connection",
        "                interrupt.interrupt()\n",
        "                pass\n",
    ),
    Plant(
        "credit due and nobody wakes the writer",
        "connection",
        "arun.channel.stream",
        "            self._connection.wake_writer()\n",
        "            pass\n",
    ),
    Plant(
        "room and nobody is told",
        "connection",
        "arun.channel.connection",
        "            self._room.set()\n            self._room = None\n",
        "            self._room = None\n",
    ),
)

_LEDGER = (
    Plant(
        "reduce before ledger write",
        "ledger",
        "arun.subtasks",
        "    await entry.record()\n    return state",
        "    import asyncio\n    asyncio.get_running_loop().create_task(entry.record())\n    return state",
    ),
    Plant(
        "ledger write before reduce, which never sees it",
        "ledger",
        "arun.subtasks",
        "task.state.scoped(None).patched(entry.restored)",
        "task.state.scoped(None)",
    ),
    Plant(
        "cancelled subtask recorded",
        "ledger",
        "arun.subtasks",
        "    state = await _under_policy(task, handle, context, policy, entry)\n    await entry.record()\n",
        "    import anyio\n"
        "    try:\n"
        "        state = await _under_policy(task, handle, context, policy, entry)\n"
        "    finally:\n"
        "        entry.changes = entry.changes or task.state\n"
        "        with anyio.CancelScope(shield=True):\n"
        "            await entry.record()\n",
    ),
    Plant(
        "occurrence of a finished sibling used again",
        "ledger",
        "arun.ledger",
        "        while known.next in known.finished:\n            known.next += 1\n",
        "",
    ),
    Plant(
        "one of the recorded siblings forgotten",
        "ledger",
        "arun.ledger",
        "        known.left.extend(found)\n",
        "        known.left.extend(found[1:])\n",
    ),
    Plant(
        "sibling does not wait for the look-up",
        "ledger",
        "arun.ledger",
        "            if known.loading is None:\n                return known\n            await known.loading.wait()\n",
        "            return known\n",
    ),
    Plant(
        "what is pending counted off too early",
        "ledger",
        "arun.journal",
        "            self.pending -= len(found)",
        "            self.pending = 0",
    ),
    Plant(
        "retry runs again what finished",
        "ledger",
        "arun.ledger",
        "        self._resuming = again or ledger.journal.pending > 0",
        "        self._resuming = ledger.journal.pending > 0",
    ),
    Plant(
        "write accepted without the lease",
        "ledger",
        "arun.store.memory",
        '        if app.epoch != lease.epoch:\n            raise outdated(lease, f"epoch',
        '        if False:\n            raise outdated(lease, f"epoch',
    ),
    Plant(
        "close without aclose",
        "ledger",
        "arun.kernel",
        "                    await close(source)  # noqa: ASYNC102 - the scope around it is shielded now\n",
        "                    pass\n",
    ),
    Plant(
        "reducer left early and the rest runs on",
        "ledger",
        "arun.fanout",
        "        finally:\n            kernel.cancel()\n",
        "        finally:\n            pass\n",
    ),
)

_POOL = (
    Plant(
        "resume one too early",
        "pool",
        "actors.pools.assignment",
        "entry.epoch, entry.delivered, again)",
        "entry.epoch, max(0, entry.delivered - 1), again)",
    ),
    Plant(
        "resume one too late",
        "pool",
        "actors.pools.assignment",
        "entry.epoch, entry.delivered, again)",
        "entry.epoch, entry.delivered + (entry.epoch > 0), again)",
    ),
    Plant(
        "dead replica picked",
        "pool",
        "actors.pools.assignment",
        '            if replica.state == "ready"\n            and replica is not ward',
        '            if replica.state in {"ready", "stopping"}\n            and replica is not ward',
    ),
    Plant(
        "more in flight than the limit",
        "pool",
        "actors.pools.assignment",
        "            and len(replica.requests) < self._limit",
        "            and len(replica.requests) <= self._limit",
    ),
    Plant(
        "quarantine off by one",
        "pool",
        "actors.pools.assignment",
        "if entry.losses >= self._quarantine and entry.alone:",
        "if entry.losses > self._quarantine and entry.alone:",
    ),
    Plant(
        "a suspect gets company",
        "pool",
        "actors.pools.assignment",
        "            and replica is not ward\n            and not replica.suspect\n",
        "            and replica is not ward\n",
    ),
    Plant(
        "restart while draining",
        "pool",
        "actors.pools.assignment",
        "        known.restart = False\n",
        "",
    ),
    Plant(
        "drained replica gets requests",
        "pool",
        "actors.pools.assignment",
        '        if known.state == "ready":\n            known.state = "draining"',
        '        if known.state == "ready":\n            pass',
    ),
    Plant(
        "place not given back when drained while it is stopped",
        "pool",
        "actors.pools.assignment",
        "            if known.place_kept:",
        "            if False:",
    ),
    Plant(
        "heartbeat from the wrong generation",
        "pool",
        "actors.pools.assignment",
        "return known if known is not None and known.generation == generation else None",
        "return known",
    ),
    Plant(
        "late item after re-route accepted",
        "pool",
        "actors.pools.assignment",
        "if entry is None or entry.epoch != epoch or not entry.running:\n            self.dead_letters",
        "if entry is None or not entry.running:\n            self.dead_letters",
    ),
    Plant(
        "loss told twice counted twice",
        "pool",
        "actors.pools.assignment",
        'if known is None or known.state not in {"starting", "ready", "draining"}:',
        'if known is None or known.state not in {"starting", "ready", "draining", "stopping"}:',
    ),
    Plant(
        "request lost with its replica",
        "pool",
        "actors.pools.assignment",
        "        else:\n            self._wait(entry)\n        return actions + self._assign()",
        "        return actions + self._assign()",
    ),
    Plant(
        "what can't be continued is",
        "pool",
        "actors.pools.assignment",
        '(entry.out and not entry.resumable and entry.reroute != "restart")',
        "False",
    ),
    Plant(
        "priority starvation",
        "pool",
        "actors.pools.waiting",
        "(interactive is None or self._since_batch >= _BATCH_SHARE - 1)",
        "interactive is None",
    ),
    Plant(
        "shed counted as done",
        "pool",
        "actors.pools.assignment",
        "            in_flight = sum(len(replica.requests) for replica in self._replicas.values())\n            raise",
        "            self._new_waiting -= 1\n            in_flight = 0\n            raise",
    ),
    Plant(
        "signs of progress are not heard",
        "pool",
        "actors.pools.assignment",
        "known.tokens, known.progressed = tokens, True",
        "known.tokens = tokens",
    ),
    Plant(
        "watchdog counts who is not waited for",
        "pool",
        "actors.pools.assignment",
        "elif replica.progressed or not any(entry.hungry for entry in replica.requests.values()):",
        "elif replica.progressed or not replica.requests:",
    ),
    Plant(
        "restart before the back-off is over",
        "pool",
        "actors.pools.assignment",
        "        if now < replica.restart_at:\n",
        "        if False:\n",
    ),
    Plant(
        "one restart too many",
        "pool",
        "actors.members.supervision",
        "        if restarts >= supervisor.intensity:",
        "        if restarts > supervisor.intensity:",
    ),
    Plant(
        "restarts counted over a lifetime",
        "pool",
        "actors.members.supervision",
        "        while self._times and now - self._times[0] >= self.supervisor.period:",
        "        while False:",
    ),
)

_BENEATH = ("anyio", "anyio._backends._asyncio", "concurrent.futures.process", "msgspec", "structlog")
"""What arun and the runner import, and no bug is planted in: once for all plants, which saves a third of the time."""

PLANTS: dict[str, Plant] = {bug.name: bug for bug in (*_CHANNEL, *_CONNECTION, *_LEDGER, *_POOL)}


def check_plants(names: Sequence[str]) -> None:
    """Raise LookupError for all plants whose text has gone."""
    gone: list[str] = []
    for name in names:
        try:
            changed_source(PLANTS[name])
        except LookupError as exc:
            gone.append(str(exc))
    if gone:
        raise LookupError("\n".join(gone))


def find_planted(names: Sequence[str], seeds: range, *, jobs: int | None = None) -> Iterator[tuple[str, str | None]]:
    """Plant one bug after the other, each in a process of its own, and run its universe until something is found.

    To be called in a process that has no threads and has not imported arun.

    :return: each name with the first seed that found it and what that said; None if none did.
    """
    check_plants(names)
    for module in _BENEATH:
        importlib.import_module(module)
    context = multiprocessing.get_context("fork")
    left = list(reversed(names))
    running: dict[Connection, tuple[str, multiprocessing.process.BaseProcess]] = {}
    while left or running:
        while left and len(running) < (jobs or os.cpu_count() or 1):
            name = left.pop()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_find_one, args=(PLANTS[name], seeds, theirs))
            process.start()
            theirs.close()
            running[ours] = name, process
        for ready in wait(list(running)):
            assert isinstance(ready, Connection)
            name, process = running.pop(ready)
            try:
                yield name, ready.recv()
            finally:
                ready.close()
                process.join()


def _find_one(bug: Plant, seeds: range, answer: Connection) -> None:
    plant(bug)
    from tests.simulation.runner import quiet, sweep

    quiet()
    found = sweep(seeds, (bug.universe,), jobs=1).findings
    answer.send(f"seed {found[0].seed}: {found[0].error}" if found else None)
