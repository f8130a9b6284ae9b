"""Ten thousand seeds, the rare paths that they must have taken, replay bit for bit, and the planted bugs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import structlog

from tests.simulation.planting import changed_source
from tests.simulation.plants import PLANTS
from tests.simulation.runner import UNIVERSES, play, quiet, replay, sweep

SEEDS = 10_000


@pytest.fixture
def quietly() -> Iterator[None]:
    before = structlog.get_config()
    quiet()
    yield
    structlog.configure(**before)


@pytest.mark.long
@pytest.mark.usefixtures("quietly")
@pytest.mark.parametrize("universe", list(UNIVERSES))
def test_no_seed_breaks_an_invariant_and_every_rare_path_is_taken(universe: str) -> None:
    swept = sweep(range(SEEDS), (universe,), jobs=1)  # the tests themselves run side by side
    assert not swept.findings, "\n".join(map(str, swept.findings))
    assert swept.never == []
    assert swept.universes == SEEDS // UNIVERSES[universe].every


@pytest.mark.usefixtures("quietly")
def test_several_processes_see_what_one_sees() -> None:
    alone, together = sweep(range(250), jobs=1), sweep(range(250), jobs=2)
    assert together._replace(seconds=0) == alone._replace(seconds=0)


def test_a_seed_replays_bit_for_bit() -> None:
    logs = {(universe, seed): play(universe, seed)[0].digest() for universe in UNIVERSES for seed in range(7)}
    assert len(set(logs.values())) == len(logs)
    # Elsewhere: other addresses, another order of hashes, and with something before it.
    program = (
        "from tests.simulation import replay\n"
        f"for (universe, seed), log in reversed({sorted(logs.items())!r}):\n"
        "    replay(universe, seed=seed, log=log, show=0)"
    )
    for hashes in ("1", "2"):
        subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "PYTHONHASHSEED": hashes})


def test_another_log_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"has the event log \w+, not 00"):
        replay("channel", seed=1, log="00", show=0)


@pytest.mark.long
@pytest.mark.parametrize("universe", list(UNIVERSES))
def test_every_planted_bug_is_found(universe: str) -> None:
    """In a process of its own, that has not imported what is to be changed."""
    names = [name for name, bug in PLANTS.items() if bug.universe == universe]
    command = [sys.executable, "-m", "tests.simulation", "--jobs", "1", "--seeds", str(SEEDS), "--plants", *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(names)} of {len(names)} planted bugs were found" in done.stdout


def test_what_a_harness_must_find_is_planted() -> None:
    """Mistakes that were made elsewhere, or nearly."""
    assert set(PLANTS) >= {
        "resume one too early",
        "resume one too late",
        "credit granted twice",
        "credit for a stream (its slot) lost on cancel",
        "cancel after end reopens",
        "ledger write before reduce, which never sees it",
        "reduce before ledger write",
        "dead replica picked",
        "quarantine off by one",
        "restart while draining",
        "heartbeat from the wrong generation",
        "late item after re-route accepted",
        "close without aclose",
        "wake-up lost on last credit",
        "priority starvation",
        "shed counted as done",
    }


def test_a_plant_whose_text_has_gone_is_refused() -> None:
    gone = next(iter(PLANTS.values()))._replace(old="no such text")
    with pytest.raises(LookupError, match="let the plant follow it"):
        changed_source(gone)


def test_a_finding_prints_a_program_that_replays_it() -> None:
    name = "late item after cancel accepted"
    found = subprocess.run(
        [sys.executable, "-c", _PLANT.format(name=name) + _SWEEP], capture_output=True, text=True, check=True
    )
    program = "\n".join(line.strip() for line in found.stdout.splitlines() if line.startswith("    "))
    assert program.startswith("from tests.simulation import replay\nreplay('channel', seed=")
    planted = f"{_PLANT.format(name=name)}{program}"
    again = subprocess.run([sys.executable, "-c", planted], capture_output=True, text=True, check=False)
    assert "keeps items after the cancel" in again.stderr
    # Without the bug, it is another universe, and says so.
    healthy = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "RuntimeError: seed" in healthy.stderr


_PLANT = """
from tests.simulation.planting import plant
from tests.simulation.plants import PLANTS
plant(PLANTS[{name!r}])
"""
_SWEEP = """
from tests.simulation.runner import sweep
print(sweep(range(1000), ("channel",), jobs=1).findings[0])
"""
