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
        '        if inbound.state != "open":\n            return\n        if not inbound.items:',
        "        if not inbound.items:",
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

PLANTS: dict[str, Plant] = {bug.name: bug for bug in (*_CHANNEL,)}
