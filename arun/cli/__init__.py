"""The ``arun`` command. Data goes to stdout, everything else to stderr; exit status 0, 1 (failed) or 130 (Ctrl-C)."""

from __future__ import annotations

from typing import Annotated

import typer

import arun
from arun.cli.running import run_command

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


def main() -> None:
    """Entry point of the ``arun`` command."""
    app()
