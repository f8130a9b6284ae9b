"""Who waits for whom: a message carries the chain of calls that it comes from, so that a cycle is told, not hung in.

    A.ask --calls--> B.answer --calls--> A.look

``A.look`` needs A's turn, ``A.ask`` holds it and waits, through B, for ``A.look``: for ever, where A takes one message
at a time. The chain that arrives with ``A.look`` has A in it, and that is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import ContextVar

from arun.errors import MisuseError

__all__ = ("CHAIN", "Chain", "Turn", "current_chain", "enter", "refuse_cycle")

CHAIN = "@chain"
"""Name under which a message carries its chain among its arguments; no parameter has such a name."""

Chain = Sequence[tuple[str, str]]
"""Per call that is being waited for, outermost first: the actor's key and ``actor.method``."""


class Turn:
    """The turn of one message.

    :ivar chain: the calls that lead to it, itself included.
    :ivar held: whether the actor is its own now. What a method leaves running in the background calls for itself.
    """

    __slots__ = ("chain", "held")

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.held = False


_turn: ContextVar[Turn | None] = ContextVar("arun_actor_turn", default=None)


def enter(turn: Turn) -> None:
    """Let everything that this task and its children send carry the turn's chain, as long as the turn is held."""
    _turn.set(turn)


def current_chain() -> Chain | None:
    """What a message that is sent now has to carry."""
    turn = _turn.get()
    return turn.chain if turn is not None and turn.held else None


def refuse_cycle(chain: Chain, key: str, label: str, concurrency: int) -> None:
    """Refuse a message whose callers hold every turn of the actor.

    :param key: of the actor.
    :param label: ``actor.method`` that is called.
    :raises MisuseError: they do.
    """
    if sum(caller == key for caller, _ in chain) >= concurrency:
        path = " -> ".join([*(step for _, step in chain), label])
        actor = label.rpartition(".")[0]
        raise MisuseError(
            f"this call would wait for itself: {path}, and {actor!r} takes {concurrency} "
            f"message{'s' * (concurrency != 1)} at a time. Call what it needs as a plain method of its own object, "
            "return first and call afterwards, or give the class @actor(concurrency=...)"
        )
