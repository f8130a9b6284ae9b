"""A web service that asks an engine pool, and streams partial reductions to browsers.

    python examples/fastapi_stream.py                      # an engine without a model, for a first look
    MODEL=demo CLUSTER=ray python examples/fastapi_stream.py

then open http://127.0.0.1:8000, or: curl -N -X POST localhost:8000/ask/stream -H 'content-type: application/json' \\
    -d '{"prompt": "What is a generator?"}'
"""

import contextlib
import os
import socket
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel

from actors import EnginePool, EngineSpec, LocalCluster, RayCluster
from arun import Application, ApplicationBuilder, MapActions, Partial, RunFailed, RunFinished, State, action
from arun.web import EventStream, cancel_on_disconnect

STYLES = {
    "brief": "Answer in one short sentence: {prompt}",
    "vivid": "Answer with a vivid comparison: {prompt}",
    "doubt": "Name one thing that is often misunderstood about: {prompt}",
}
MAX_TOKENS = int(os.environ.get("MAX_TOKENS", "48"))


@action(reads=["prompt"], writes=["answer"])
async def ask(state: State, style: str, engine: EnginePool) -> AsyncIterator[Any]:
    answer = ""
    messages = [{"role": "user", "content": STYLES[style].format(prompt=state["prompt"])}]
    async for delta in engine.generate(messages, max_tokens=MAX_TOKENS):
        answer += delta.text
        yield delta.text
    yield state.update(answer=answer)


class AskAll(MapActions):
    reads, writes = ["prompt"], ["answers"]

    def actions(self, state: State, context: Any, inputs: dict[str, Any]) -> Any:
        for style in STYLES:
            yield ask.bind(style=style).with_name(style)

    async def reduce(self, state: State, states: AsyncIterator[State]) -> AsyncIterator[State]:
        answers: dict[str, str] = {}
        async for done in states:
            answers[str(done.action)] = done["answer"]
            yield state.update(answers=dict(answers))


class Question(BaseModel):
    prompt: str


class Answers(BaseModel):
    answers: dict[str, str]


def build(pool: EnginePool) -> Application:
    return ApplicationBuilder().with_actions(AskAll().with_name("ask_all")).with_resources(engine=pool).build()


@contextlib.asynccontextmanager
async def lifespan(web: FastAPI) -> AsyncGenerator[None, None]:
    model = os.environ.get("MODEL", "echo")
    if model == "echo":
        spec = EngineSpec(model=model, engine="echo", engine_args={"token_seconds": 0.05})
    else:
        spec = EngineSpec(model=model, max_model_len=512)
    cluster = RayCluster.connect() if os.environ.get("CLUSTER") == "ray" else LocalCluster()
    async with cluster, cluster.engines(spec, replicas=int(os.environ.get("REPLICAS", "1"))) as pool:
        web.state.pool = pool
        web.state.application = build(pool)
        yield


web = FastAPI(lifespan=lifespan)


@web.post("/ask")
async def ask_once(question: Question, request: Request) -> Answers:
    async with cancel_on_disconnect(request):
        _, _, state = await web.state.application.session(prompt=question.prompt).arun()
        return Answers(answers=state["answers"])


@web.post("/ask/stream")
async def ask_stream(question: Question) -> EventStream:
    run = web.state.application.session(prompt=question.prompt).astream(deliver="latest")
    return EventStream(run, only=(Partial, RunFinished, RunFailed))


@web.get("/stats")
async def stats() -> dict[str, Any]:
    return {"in_flight": [replica.in_flight for replica in web.state.pool.stats().replicas]}


@web.get("/")
async def page() -> HTMLResponse:
    return HTMLResponse(PAGE)


PAGE = """<!doctype html><meta charset=utf-8><title>arun</title>
<style>body{font:16px system-ui;max-width:40em;margin:3em auto}dt{font-weight:600}input{width:28em}</style>
<form><input name=prompt value="What is an async generator?"> <button>Ask</button></form><dl></dl>
<script>
document.forms[0].onsubmit = async (submit) => {
  submit.preventDefault()
  const list = document.querySelector("dl"); list.replaceChildren()
  const response = await fetch("/ask/stream", {method: "POST", headers: {"content-type": "application/json"},
    body: JSON.stringify({prompt: submit.target.prompt.value})})
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader()
  for (let buffer = "", chunk; !(chunk = await reader.read()).done;) {
    const messages = (buffer + chunk.value).split("\\n\\n"); buffer = messages.pop()
    for (const message of messages) {
      const data = message.split("\\n").find(line => line.startsWith("data: "))
      const event = data && JSON.parse(data.slice(6))
      if (event?.type !== "Partial" || event.path) continue  // those with a path are a branch's own
      list.replaceChildren(...Object.entries(event.changed.answers).flatMap(([style, answer]) => {
        const dt = document.createElement("dt"), dd = document.createElement("dd")
        dt.textContent = style; dd.textContent = answer
        return [dt, dd]
      }))
    }
  }
}
</script>"""


def main() -> None:
    port = int(os.environ.get("PORT", "8000"))
    try:  # before the engines start, and not after
        listener = socket.create_server(("127.0.0.1", port))
    except OSError as exc:
        sys.exit(f"port {port} of 127.0.0.1 can't be used ({exc.strerror}); choose another one with PORT={port + 1}")
    print(f"http://127.0.0.1:{port}")
    # Open streams end within a second of Ctrl-C.
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(uvicorn.Config(web, timeout_graceful_shutdown=1)).run(sockets=[listener])


if __name__ == "__main__":
    main()
