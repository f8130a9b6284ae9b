import asyncio

from arun import ApplicationBuilder, MapStates, Partial, Policy, State, action


@action(reads=["city"], writes=["greeting"])
async def greet(state: State):
    await asyncio.sleep(len(state["city"]) / 50)
    return state.update(greeting=f"Hello, {state['city']}!")


class GreetAll(MapStates):
    reads, writes, policy = ["cities"], ["greetings"], Policy(limit=8)

    def action(self, state, inputs):
        return greet

    async def states(self, state, context, inputs):
        for city in state["cities"]:
            yield state.update(city=city)

    async def reduce(self, state, states):
        async for done in states:  # as they finish
            state = state.append(greetings=done["greeting"])
            yield state  # a partial reduction


async def main():
    app = ApplicationBuilder().with_actions(GreetAll()).with_state(cities=["Kyoto", "Rio", "Oslo"]).build()
    async for event in app.session().astream():
        if isinstance(event, Partial):
            print(event.changed)
    print((await app.arun()).state["greetings"])


asyncio.run(main())
