"""``arun demo``: load rows -> ask an engine about every row in two styles, in parallel -> reduce -> write Parquet.

The application is a plain arun program; :func:`build` is all of it. What surrounds it starts the engines and shows the
partial reductions, live with rich in a terminal, as JSON lines elsewhere.
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from arun import (
    Application,
    ApplicationBuilder,
    ApplicationContext,
    MapActionsAndStates,
    Policy,
    RunFinished,
    State,
    action,
)
from arun.cli.display import Display, JsonDisplay, TerminalDisplay, is_terminal
from arun.errors import ArunError, MissingExtraError

__all__ = ("DemoOptions", "build", "run_demo")

STYLES = {
    "where": "In one short sentence: where is the airport {name} ({iata}) of {city}, {state}, {country}?",
    "slogan": "Write one cheerful slogan for the airport {name} in {city}, {state}.",
}


class DemoOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of ``arun demo``; see its --help."""

    rows: int = 64
    model: str = "demo"
    replicas: int = 1
    tensor_parallel: int = 1
    local: bool = False
    json: bool = False
    max_tokens: int = 32
    output: str = "arun-demo.parquet"


@action(reads=["source", "limit"], writes=["rows"])
def load_rows(state: State) -> State:
    """Read the first ``limit`` rows of the CSV file ``source``."""
    return state.update(rows=read_rows(state["source"], state["limit"]))


@action(reads=["row", "max_tokens"], writes=["answer", "tokens", "row", "style"])
async def ask(state: State, style: str, engine: Any) -> AsyncIterator[Any]:
    """Ask about one row; the answer's pieces are streamed as items."""
    messages = [{"role": "user", "content": STYLES[style].format(**state["row"])}]
    answer, tokens = "", 0
    async for delta in engine.generate(messages, max_tokens=state["max_tokens"], temperature=0.0):
        answer += delta.text
        tokens += len(delta.token_ids)
        yield delta.text
    yield state.update(answer=answer.strip(), tokens=tokens, style=style)


class AskAll(MapActionsAndStates):
    """Every style over every row."""

    reads: Sequence[str] = ["rows", "max_tokens"]
    writes: Sequence[str] = ["summary", "answers"]
    policy = Policy(limit=128)

    def actions(self, state: State, context: ApplicationContext, inputs: dict[str, Any]) -> Any:
        return [ask.bind(style=style) for style in STYLES]

    def states(self, state: State, context: ApplicationContext, inputs: dict[str, Any]) -> Any:
        return (state.update(row=row) for row in state["rows"])

    async def reduce(self, state: State, states: AsyncIterator[State]) -> AsyncIterator[State]:
        """A summary after every answer; the answers themselves once, at the end."""
        summary = Summary(len(state["rows"]) * len(STYLES))
        answers: list[dict[str, Any]] = []
        async for done in states:
            summary.add(done)
            answers.append({**done["row"], "style": done["style"], "answer": done["answer"], "tokens": done["tokens"]})
            yield state.update(summary=summary.now())
        yield state.update(summary=summary.now(), answers=answers)


@action(reads=["answers", "output"], writes=["written"])
def write_answers(state: State) -> State:
    """Write the answers to the Parquet file ``output``."""
    pyarrow, parquet = _pyarrow(), _pyarrow("parquet")
    path = Path(state["output"])
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(state["answers"]), path)
    return state.update(written={"path": str(path.resolve()), "rows": len(state["answers"])})


def build(engine: Any, options: DemoOptions) -> Application:
    """The demo's application; ``engine`` is anything with an EnginePool's ``generate``."""
    return (
        ApplicationBuilder()
        .with_actions(load_rows, write_answers, ask_all=AskAll())
        .with_transitions(("load_rows", "ask_all"), ("ask_all", "write_answers"))
        .with_entrypoint("load_rows")
        .with_state(source=str(airports()), limit=options.rows, max_tokens=options.max_tokens, output=options.output)
        .with_resources(engine=engine)
        .build()
    )


def read_rows(source: str, limit: int) -> list[dict[str, Any]]:
    """The first ``limit`` rows of a CSV file.

    :raises ArunError: if it has fewer.
    """
    table = _pyarrow("csv").read_csv(source)
    if table.num_rows < limit:
        raise ArunError(f"--rows {limit} asks for more rows than the file has: {source} has {table.num_rows}")
    rows: list[dict[str, Any]] = table.slice(0, limit).to_pylist()
    return rows


class Summary:
    """Running totals over the answers."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._began = time.perf_counter()
        self._done = dict.fromkeys(STYLES, 0)
        self._tokens = dict.fromkeys(STYLES, 0)
        self._latest: list[dict[str, str]] = []

    def add(self, done: State) -> None:
        """Count one answer."""
        self._done[done["style"]] += 1
        self._tokens[done["style"]] += done["tokens"]
        latest = {"row": done["row"]["name"], "style": done["style"], "answer": done["answer"]}
        self._latest = [*self._latest, latest][-4:]

    def now(self) -> dict[str, Any]:
        """The totals: tokens per second since the first row was asked about, mean answer length in tokens."""
        tokens, seconds = sum(self._tokens.values()), time.perf_counter() - self._began
        return {
            "done": sum(self._done.values()),
            "total": self._total,
            "tokens": tokens,
            "seconds": round(seconds, 2),
            "tokens_per_second": round(tokens / seconds, 1),
            "styles": {
                style: {"done": done, "mean_tokens": round(self._tokens[style] / done, 1) if done else 0.0}
                for style, done in self._done.items()
            },
            "latest": self._latest,
        }


async def run_demo(options: DemoOptions) -> None:
    """Start the engines, run the application, show it, and stop everything again."""
    from actors import EngineSpec, LocalCluster, RayCluster

    read_rows(str(airports()), options.rows)  # tells what is wrong before anything is started
    display: Display = TerminalDisplay(options.model) if is_terminal() and not options.json else JsonDisplay()
    spec = EngineSpec(model=options.model, tensor_parallel_size=options.tensor_parallel, max_model_len=_MODEL_LENGTH)
    with display:
        display.note(f"starting {options.replicas} engine(s) of {options.model} on {_where(options)}")
        cluster = LocalCluster() if options.local else RayCluster.connect()
        async with cluster:
            # All cores: a worker computes with as many threads as its bundle has CPUs.
            cpus = max(1, len(os.sched_getaffinity(0)) // (options.replicas * options.tensor_parallel))
            pool = cluster.engines(spec, replicas=options.replicas, name="demo", cpus=cpus, on_progress=display.replica)
            async with pool, build(pool, options).astream(deliver=0.1) as stream:
                async for event in stream:
                    display.event(event)
                    if isinstance(event, RunFinished):
                        display.finished(event.state["summary"], event.state["written"])


def airports() -> Path:
    """The CSV file of 3,376 airports that the package vega_datasets ships."""
    spec = importlib.util.find_spec("vega_datasets")
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("arun demo", extra="demo", package="vega_datasets")
    return Path(spec.submodule_search_locations[0]) / "_data" / "airports.csv"


_MODEL_LENGTH = 512


def _where(options: DemoOptions) -> str:
    return "plain processes" if options.local else "a local Ray"


def _pyarrow(module: str = "") -> Any:
    try:
        return importlib.import_module(f"pyarrow.{module}" if module else "pyarrow")
    except ImportError as exc:
        raise MissingExtraError("arun demo", extra="demo", package="pyarrow") from exc
