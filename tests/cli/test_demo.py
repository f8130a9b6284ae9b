"""``arun demo`` as a user runs it: a process of its own, real engines, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet
import pytest


class Demo:
    """A running ``arun demo --json``."""

    def __init__(self, cwd: Path, *arguments: str) -> None:
        self.mark = f"ARUN_TEST_MARK={uuid.uuid4().hex}"
        name, value = self.mark.split("=")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "arun.cli", "demo", "--json", *arguments],
            cwd=cwd,
            env={**os.environ, name: value},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def lines(self) -> Iterator[dict[str, Any]]:
        """What it prints, decoded, as it comes."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            yield msgspec.json.decode(line)

    def until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Read to the first line that is wanted."""
        for line in self.lines():
            if wanted(line):
                return line
        _, errors = self.process.communicate()
        pytest.fail(f"the demo ended early: {errors}")

    def end(self) -> tuple[int, str]:
        """Wait for its end: exit status and stderr."""
        _, errors = self.process.communicate()
        return self.process.returncode, errors

    def left_over(self) -> list[str]:
        """Command lines of the processes that it or its children started and that still run."""
        found: list[str] = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except (OSError, ProcessLookupError):
                pass
        return found


Start = Callable[..., Demo]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start demos in an empty folder; those that a failing test leaves behind are killed."""
    started: list[Demo] = []

    def start_one(*arguments: str) -> Demo:
        started.append(Demo(tmp_path, *arguments))
        return started[-1]

    yield start_one
    for demo in started:
        with demo.process:
            demo.process.kill()


def check_answers(finished: dict[str, Any], path: Path, rows: int) -> None:
    assert finished["type"] == "Finished"
    assert finished["path"] == str(path)
    table = pyarrow.parquet.read_table(path)
    assert table.num_rows == finished["rows"] == finished["summary"]["done"] == rows * 2
    assert set(table["style"].to_pylist()) == {"where", "slogan"}
    assert table["iata"].to_pylist().count("00M") == 2
    assert all(1 <= tokens <= 8 for tokens in table["tokens"].to_pylist())
    assert sum(table["tokens"].to_pylist()) == finished["summary"]["tokens"]


def check_partials(lines: list[dict[str, Any]], total: int) -> None:
    """The first partial reduction came while most rows still ran, and they only grow."""
    partials = [line["changed"]["summary"]["done"] for line in lines if line["type"] == "Partial"]
    assert partials[0] < total / 2
    assert partials == sorted(partials)
    assert partials[-1] == total
    first = next(number for number, line in enumerate(lines) if line["type"] == "Partial")
    assert sum(line["type"] == "SubtaskFinished" for line in lines[:first]) < total / 2


@pytest.mark.engine
@pytest.mark.ray
@pytest.mark.timeout(400)
def test_rows_are_answered_by_engines_in_ray_actors(start: Start, tmp_path: Path) -> None:
    output = tmp_path / "answers" / "demo.parquet"
    demo = start("--rows", "48", "--model", "tiny", "--max-tokens", "8", "--output", str(output))
    lines = list(demo.lines())
    assert demo.end() == (0, "")
    check_answers(lines[-1], output, 48)
    check_partials(lines, 96)
    states = [line["state"] for line in lines if line["type"] == "ReplicaProgress"]
    assert states[0] == "reserving bundles"
    assert "loading model" in states
    assert states[-1] == "ready"
    assert demo.left_over() == []


@pytest.mark.engine
@pytest.mark.timeout(400)
def test_ctrl_c_while_rows_are_answered_leaves_nothing(start: Start, tmp_path: Path) -> None:
    demo = start("--local", "--rows", "256", "--model", "tiny")
    demo.until(lambda line: line["type"] == "Partial" and 0 < line["changed"]["summary"]["done"] < 512)
    demo.process.send_signal(signal.SIGINT)
    assert demo.end() == (130, "arun: interrupted; everything that was started has been stopped\n")
    assert demo.left_over() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.engine
@pytest.mark.timeout(400)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_engine_starts_leaves_nothing(start: Start, number: signal.Signals) -> None:
    demo = start("--local", "--model", "tiny")
    demo.until(lambda line: line["type"] == "ReplicaProgress" and line["seconds"] > 1)
    demo.process.send_signal(number)
    assert demo.end()[0] == 130
    assert demo.left_over() == []


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "./no/such/folder"], ["there is no folder './no/such/folder'", "'tiny'"]),
        (["--model", "tiny", "--replicas", "4000"], ["4000", "CPU"]),
        (["--model", "tiny", "--rows", "5000"], ["--rows 5000", "3376"]),
    ],
)
def test_what_cannot_work_is_one_paragraph(start: Start, arguments: list[str], told: list[str]) -> None:
    demo = start("--local", *arguments)
    list(demo.lines())
    status, errors = demo.end()
    assert status == 1
    assert errors.startswith("arun: ")
    assert errors.count("\n") == 1
    for words in told:
        assert words in errors
    assert demo.left_over() == []
