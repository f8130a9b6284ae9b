"""The ``arun`` command. Data goes to stdout, everything else to stderr.

Exit status: 0; 1 where something failed; 2 where it was not started, as what it was given makes no sense; 130 after
Ctrl-C.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import arun
from arun.cli.running import run_command
from arun.errors import ArunError

__all__ = ("app", "main")

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def about(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    """arun: an async-native actor runtime."""
    if version:
        typer.echo(f"arun {arun.__version__}")
        raise typer.Exit


@app.command()
def demo(
    rows: Annotated[int, typer.Option(min=1, help="Rows of the file to ask about.")] = 64,
    model: Annotated[
        str, typer.Option(help="'demo' (SmolLM2-135M), 'tiny' (random), a folder or a hub name.")
    ] = "demo",
    replicas: Annotated[int, typer.Option(min=1, help="Engines.")] = 1,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Workers that share one engine's model.")] = 1,
    local: Annotated[bool, typer.Option("--local", help="Actors in plain processes, without Ray.")] = False,
    json: Annotated[bool, typer.Option("--json", help="JSON lines, also in a terminal.")] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 32,
    output: Annotated[str, typer.Option(help="Where the answers go.")] = "arun-demo.parquet",
) -> None:
    """Ask a real engine about every row of a real file; watch the partial reductions; get a Parquet file."""
    from arun.cli.demo import DemoOptions, run_demo

    options = DemoOptions(
        rows=rows,
        model=model,
        replicas=replicas,
        tensor_parallel=tensor_parallel,
        local=local,
        json=json,
        max_tokens=max_tokens,
        output=output,
    )
    run_command(run_demo, options)


@app.command()
def batch(
    input: Annotated[Path, typer.Argument(help="JSON lines of requests, as OpenAI's batch API takes them.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where results go, as they come.")],
    model: Annotated[
        str, typer.Option(help="A folder or a hub name; 'demo' (SmolLM2-135M), 'tiny' (random), 'echo' (no model).")
    ],
    name: Annotated[str | None, typer.Option(help="What requests call the model, if not --model.")] = None,
    replicas: Annotated[int, typer.Option(min=1, help="Engines.")] = 1,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Workers that share one engine's model.")] = 1,
    max_model_len: Annotated[int | None, typer.Option(min=2, help="Most tokens of a prompt and its answer.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a chat that names no limit.")] = 4096,
    engine_args: Annotated[str, typer.Option(help="Further arguments of the engine, as a JSON object.")] = "{}",
    local: Annotated[bool, typer.Option("--local", help="Actors in plain processes, without Ray.")] = False,
) -> None:
    """Answer an OpenAI batch file with engines of your own.

    Run again after a kill, Ctrl-C or failures of engines, it goes on: requests that have a result are not asked again.
    """
    from arun.cli.batch import BatchOptions, prepare, run_batch

    options = BatchOptions(
        input=input,
        output=output,
        model=model,
        name=name or model,
        replicas=replicas,
        tensor_parallel=tensor_parallel,
        max_model_len=max_model_len,
        max_tokens=max_tokens,
        engine_args=engine_args,
        local=local or model == "echo",
    )
    try:
        todo = prepare(options)
    except (ArunError, OSError) as exc:
        typer.echo(f"arun: {exc}", err=True)
        raise typer.Exit(2) from exc
    run_command(run_batch, todo)


def main() -> None:
    """Entry point of the ``arun`` command."""
    app()
