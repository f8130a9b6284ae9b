"""Applications of one action, for the tests of actions."""

from __future__ import annotations

from typing import Any

from arun import Action, Application, ApplicationBuilder, Item, State, action


def app_of(what: Action, **fields: Any) -> Application:
    return ApplicationBuilder().with_actions(what).with_state(**fields).build()


async def run(what: Action, inputs: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    return (await app_of(what, **fields).arun(inputs=inputs)).state.get_all()


async def items_of(what: Action, **fields: Any) -> list[Any]:
    return [v async for e in app_of(what, **fields).astream() if isinstance(e, Item) for v in e.values]


@action(reads=[], writes=["n"])
async def scaled(state: State, by: int, scale: int = 1) -> State:
    return state.update(n=by * scale)
