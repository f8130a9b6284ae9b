import asyncio

from arun import ApplicationBuilder, MapStates, Partial, action

@action(reads=["city"], writes=["greeting"])
async def greet(state):
    await asyncio.sleep(len(state["city"]) / 50)  # what takes long: an engine, a database, another service
    return state.update(greeting=f"Hello, {state['city']}!")

class GreetAll(MapStates):
    reads, writes = ["cities"], ["greetings"]
    def action(self, state, inputs):
        return greet

    def states(self, state, context, inputs):
        return (state.update(city=city) for city in state["cities"])  # read only as slots come free

    async def reduce(self, state, states):
        yield (state := state.update(greetings=[]))  # a partial reduction; the last one is the result
        async for done in states:  # as they finish
            yield (state := state.append(greetings=done["greeting"]))

async def main():
    app = ApplicationBuilder().with_actions(GreetAll()).with_state(cities=["Kyoto", "Rio", "Oslo"]).build()
    async for event in app.session().astream():
        print(event.changed if isinstance(event, Partial) else type(event).__name__)
    print((await app.arun()).state["greetings"])

asyncio.run(main())
