"""A million mutated frames, and what proves that the fuzzer would have found something."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from arun.channel import codec, session
from arun.channel.messages import Cancel, Credit
from tests.fuzz import frames

ROOT = Path(__file__).parents[2]
SEED = 20261121
FRAMES = 1_000_000
PROCESSES = 2


@pytest.mark.long
@pytest.mark.timeout(240)
def test_a_million_mutated_frames_break_nothing_and_grow_nothing():
    """In processes of their own: a crash of the decoder is a finding as well, and so is a hang."""
    reports = [
        _report(process)
        for process in [
            subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz.frames", str(SEED + n), str(FRAMES // PROCESSES)],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for n in range(PROCESSES)
        ]
    ]
    counts = {name: sum(report["counts"].get(name, 0) for report in reports) for name in reports[0]["counts"]}
    assert counts["mutated"] >= FRAMES
    # What is never reached proves nothing.
    for name in ("accepted", "refused by the reader", "refused by the session", "payload decoded", "payload refused"):
        assert counts[name] > FRAMES / 1000, counts
    for name in ("stranger refused", "goodbye"):
        assert counts[name] > 100, counts
    for report in reports:
        (_, first_blocks), *_, (_, last_blocks) = report["memory"]
        assert last_blocks - first_blocks < 500, report
        # Resident bytes come and go by arenas of 1 MiB; what was kept would lift all of the later figures.
        early, late = report["memory"][:2], report["memory"][2:]
        assert min(size for size, _ in late) - max(size for size, _ in early) < 2**20, report


def _report(process: subprocess.Popen[str]) -> Any:
    try:
        said, blocks = process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        process.kill()
        _, blocks = process.communicate()
        pytest.fail(f"it hangs in block {blocks.split()[-1]}")
    if process.returncode:
        pytest.fail(f"it ended with {process.returncode}:\n{blocks[-5000:]}")
    return msgspec.json.decode(said)


PLANTED = {
    "a second Cancel interrupts a second time": lambda patch: patch.setitem(
        session.TRANSITIONS[Cancel], "cancelling", "cancelling"
    ),
    "late credit reopens a stream": lambda patch: patch.setitem(session.TRANSITIONS[Credit], "closed", "open"),
    "RecursionError is not refused": lambda patch: patch.setattr(
        codec, "_REFUSED", (msgspec.MsgspecError, UnicodeDecodeError)
    ),
    "UnicodeDecodeError is not refused": lambda patch: patch.setattr(
        codec, "_REFUSED", (msgspec.MsgspecError, RecursionError)
    ),
    "one handler too many": lambda patch: patch.setattr(
        frames, "LIMITS", msgspec.structs.replace(frames.LIMITS, streams=frames.STREAMS + 1)
    ),
    "a frame may have any length": lambda patch: patch.setattr(
        codec.FrameReader, "_check_length", lambda reader, length: None
    ),
    "the end leaves handlers alone": lambda patch: patch.setattr(
        session.Session, "close", lambda core, reason, cause=None: session.Effects()
    ),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found_and_its_program_replays_it(bug, monkeypatch):
    PLANTED[bug](monkeypatch)
    with pytest.raises(frames.Failure) as found:
        frames.fuzz(SEED, 200_000)
    program = str(found.value).partition("replays it:\n")[2]
    with pytest.raises(frames.Failure):
        exec(program, {})
    monkeypatch.undo()
    exec(program, {})
