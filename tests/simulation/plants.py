"""The planted bugs, each of which its universe must find. A harness that misses one is the bug."""

from __future__ import annotations

from tests.simulation.planting import Plant

__all__ = ("PLANTS",)

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
        "slot lost on cancel",
        "channel",
        _SESSION,
        "        self._advance(outbound, outbound.id, type(message))\n        self._send(message)\n",
        "        cancelled = outbound.state == 'cancelling'\n"
        "        self._advance(outbound, outbound.id, type(message))\n        self._send(message)\n"
        "        if cancelled:\n            return\n",
    ),
    Plant(
        "slot free before the clean-up",
        "channel",
        _SESSION,
        "            effects.interrupted.append(outbound)\n            return\n",
        "            effects.interrupted.append(outbound)\n            del self._outbound[message.stream]\n"
        "            return\n",
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
        "            effects.interrupted.append(outbound)\n            return\n",
        "            return\n",
    ),
    Plant(
        "wake-up lost on last credit",
        "channel",
        _SESSION,
        "        effects.ready.append(outbound)\n\n    @property",
        "        if outbound.items_left > message.items:\n            effects.ready.append(outbound)\n\n    @property",
    ),
    Plant(
        "late item after cancel accepted",
        "channel",
        _SESSION,
        '                if inbound.state == "open":\n                    if not inbound.items:',
        "                if True:\n                    if not inbound.items:",
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

_LEDGER = (
    Plant(
        "reduce before ledger write",
        "ledger",
        "arun.parallel",
        "    await entry.record()\n    return state",
        "    import asyncio\n    asyncio.get_running_loop().create_task(entry.record())\n    return state",
    ),
    Plant(
        "ledger write before reduce, which never sees it",
        "ledger",
        "arun.parallel",
        "task.state.scoped(None).patched(entry.restored)",
        "task.state.scoped(None)",
    ),
    Plant(
        "cancelled subtask recorded",
        "ledger",
        "arun.parallel",
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
        "arun.fanout",
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

PLANTS: dict[str, Plant] = {bug.name: bug for bug in (*_CHANNEL, *_LEDGER)}
