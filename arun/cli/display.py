"""What a person or a program sees of a run: a live view in a terminal, JSON lines anywhere else."""

from __future__ import annotations

import sys
from typing import Any, Protocol, Self

import msgspec
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from arun.events import Event, Item, Partial, RunFinished, SubtaskFinished, SubtaskStarted

__all__ = ("Display", "JsonDisplay", "TerminalDisplay", "is_terminal")


class ReplicaProgress(Protocol):
    """How far the start of one engine has come (``actors.ReplicaProgress``)."""

    @property
    def replica(self) -> int: ...
    @property
    def state(self) -> str: ...
    @property
    def seconds(self) -> float: ...


class Display(Protocol):
    """Shows a run. A context manager: what it draws on is restored at the end."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exc_info: object) -> None: ...
    def note(self, text: str) -> None:
        """Something about the set-up."""

    def replica(self, progress: ReplicaProgress) -> None:
        """An engine has come so far."""

    def event(self, event: Event) -> None:
        """Something happened in the run."""

    def finished(self, summary: dict[str, Any], written: dict[str, Any]) -> None:
        """The run has ended: what came out and where the file is."""


def is_terminal() -> bool:
    """Whether stdout is a terminal."""
    return sys.stdout.isatty()


class JsonDisplay:
    """One JSON object a line on stdout, as things happen. Answers as they grow (Items) are left out."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def note(self, text: str) -> None:
        self._write({"type": "Note", "text": text})

    def replica(self, progress: ReplicaProgress) -> None:
        seconds = round(progress.seconds, 1)
        self._write({
            "type": "ReplicaProgress",
            "replica": progress.replica,
            "state": progress.state,
            "seconds": seconds,
        })

    def event(self, event: Event) -> None:
        if isinstance(event, Partial) and event.path == ():
            # The whole list of answers comes once, in the file.
            changed = {key: value for key, value in event.changed.items() if key != "answers"}
            self._write({"type": "Partial", "seq": event.seq, "action": event.action, "changed": changed})
        elif isinstance(event, SubtaskFinished):
            self._write({
                "type": "SubtaskFinished",
                "label": event.label,
                "seconds": event.seconds,
                "error": event.error,
            })

    def finished(self, summary: dict[str, Any], written: dict[str, Any]) -> None:
        self._write({"type": "Finished", "summary": summary, **written})

    def _write(self, line: dict[str, Any]) -> None:
        sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
        sys.stdout.flush()


class TerminalDisplay:
    """A live view: engines while they start, then progress, rates, and the latest answers."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._console = Console()
        self._replicas: dict[int, str] = {}
        self._note = ""
        self._running = 0
        self._writing: dict[tuple[str, ...], str] = {}
        self._summary: dict[str, Any] | None = None
        self._live = Live(console=self._console, refresh_per_second=8, get_renderable=self._render, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._live.stop()

    def note(self, text: str) -> None:
        self._note = text

    def replica(self, progress: ReplicaProgress) -> None:
        self._replicas[progress.replica] = f"{progress.state} ({progress.seconds:.0f} s)"

    def event(self, event: Event) -> None:
        match event:
            case SubtaskStarted():
                self._running += 1
            case SubtaskFinished():
                self._running -= 1
                self._writing.pop(event.path, None)
            case Item():
                text = self._writing.get(event.path, "") + "".join(map(str, event.values))
                self._writing[event.path] = text
            case Partial() if "summary" in event.changed:
                self._summary = event.changed["summary"]
            case RunFinished():
                self._running = 0
            case _:
                pass

    def finished(self, summary: dict[str, Any], written: dict[str, Any]) -> None:
        self._live.stop()
        self._console.print(_answers_table("The last answers", summary["latest"]))
        self._console.print(_styles_table(summary))
        self._console.print(f"{written['rows']} answers are in [bold]{written['path']}[/]", soft_wrap=True)

    def _render(self) -> RenderableType:
        if self._summary is None and not self._running:
            lines = [Text(self._note, style="bold")]
            lines += [Text(f"  engine {number}: {state}") for number, state in sorted(self._replicas.items())]
            return Group(*lines)
        parts: list[RenderableType] = []
        if self._summary is not None:
            done, total = self._summary["done"], self._summary["total"]
            parts.append(ProgressBar(total=total, completed=done, width=60))
            rate = self._summary["tokens_per_second"]
            parts.append(Text(f"{done}/{total} answers, {self._running} being written, {rate} tokens/s"))
            parts.append(_styles_table(self._summary))
            parts.append(_answers_table("Latest answers (partial reduction)", self._summary["latest"]))
        writing = [{"row": path[-1], "style": "", "answer": text} for path, text in list(self._writing.items())[:4]]
        parts.append(_answers_table("Being written", writing))
        return Group(*parts)


def _styles_table(summary: dict[str, Any]) -> Table:
    table = Table("style", "answers", "mean tokens", title=f"{summary['tokens']} tokens in {summary['seconds']} s")
    for style, figures in summary["styles"].items():
        table.add_row(style, str(figures["done"]), str(figures["mean_tokens"]))
    return table


def _answers_table(title: str, answers: list[dict[str, str]]) -> Table:
    table = Table("row", "style", "answer", title=title, expand=True)
    for answer in answers:
        table.add_row(Text(answer["row"]), answer["style"], Text(answer["answer"], overflow="ellipsis", no_wrap=True))
    return table
