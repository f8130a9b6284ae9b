"""A program that a test kills: a loop of two fan-outs, one of them nested, over a SQLiteStore.

    python killed_program.py STORE LOG SEED

It appends a line to LOG for each subtask when it has run, before it is recorded; the order of the items and how long
each takes depend on SEED. At its end it prints the State.
"""

from __future__ import annotations

import json
import os
import random
import sys
from typing import Any

import anyio

from arun import AlreadyFinishedError, ApplicationBuilder, MapStates, Policy, SQLiteStore, State, action, default, when

ITEMS = 30
ROUNDS = 3
rng = random.Random(sys.argv[3])
log = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def shuffled(items: Any) -> list[Any]:
    items = list(items)
    rng.shuffle(items)
    return items


@action(reads=["item", "round"], writes=["out"])
async def work(state: State) -> State:
    await anyio.sleep(rng.uniform(0, 0.01))
    os.write(log, (json.dumps([state["round"], state["item"]]) + "\n").encode())
    return state.update(out=(state["item"], {state["round"]}))


class Inner(MapStates):
    reads, writes = ["item", "round"], ["out"]
    policy = Policy(limit=3)

    def action(self, state: State, inputs: dict[str, Any]) -> Any:
        return work

    def states(self, state: State, context: Any, inputs: dict[str, Any]) -> Any:
        return [state.update(item=f"{state['item']}/{n}") for n in shuffled(range(4))]

    async def reduce(self, state: State, states: Any) -> State:
        outs = sorted([done["out"] async for done in states])
        return state.update(out=(state["item"], {out[0] for out in outs}))


class Outer(MapStates):
    reads, writes = ["round"], ["round", "outs"]
    policy = Policy(limit=6)

    def action(self, state: State, inputs: dict[str, Any]) -> Any:
        return Inner() if state["round"] % 2 else work

    async def states(self, state: State, context: Any, inputs: dict[str, Any]) -> Any:
        for number in shuffled(range(ITEMS)):
            yield state.update(item=f"{number // 3}")  # each of them three times

    async def reduce(self, state: State, states: Any) -> State:
        outs = [done["out"] async for done in states]
        return state.append(outs=sorted(outs, key=repr)).increment(round=1)


async def main() -> None:
    builder = ApplicationBuilder().with_actions(outer=Outer(), done=done)
    builder.with_transitions(("outer", "outer", when(round__lt=ROUNDS)), ("outer", "done", default))
    builder.with_identifiers(app_id="killed").with_state(round=0, outs=[]).with_entrypoint("outer")
    async with SQLiteStore(sys.argv[1]) as store:
        try:
            state: Any = (await builder.with_store(store).build().arun()).state
        except AlreadyFinishedError as exc:
            state = exc.state
    print(repr(state["outs"]))


@action(reads=["outs"], writes=[])
async def done(state: State) -> State:
    return state


anyio.run(main)
