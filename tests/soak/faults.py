"""Rounds of tests/faults, again and again: pools of real processes that are killed, stopped, cut off and removed."""

from __future__ import annotations

import importlib.util
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tests.faults.driver import kill_owner, start, wait_for
from tests.faults.rounds import Setting

NAME = "faults"
HELP = "pools under kill -9, SIGSTOP, cut connections and removed placement groups, EchoEngine and vLLM"

_SIDE_BY_SIDE = 5  # they mostly wait for watchdogs


class _Turn(NamedTuple):
    what: str
    rounds: int
    #: what is wrong, given the first seed
    work: Callable[[int], list[str]]


def run(seconds: float, seed: int) -> int:
    """Do one kind after the other until the time is up; in half an hour over 100 rounds on EchoEngine and 5 on vLLM.

    :return: 0 if every promise held.
    """
    end = time.monotonic() + seconds
    done: Counter[str] = Counter()
    found: list[str] = []
    for turn in itertools.cycle(_turns()):
        found = turn.work(seed)
        seed += turn.rounds
        done[turn.what] += turn.rounds
        if found or time.monotonic() >= end:
            break
    print("  " + ", ".join(f"{count} {what}" for what, count in done.items()), flush=True)
    for problem in found:
        print(f"  {problem}", flush=True)
    return len(found)


def _turns() -> list[_Turn]:
    return list(itertools.chain(_of_echo(), _of_ray(), _of_vllm()))


def _of_echo() -> Iterator[_Turn]:
    def side_by_side(seed: int) -> list[str]:
        programs = [start(Setting(), seed + 2 * number, 2) for number in range(_SIDE_BY_SIDE)]
        return [problem for program in programs for problem in wait_for(program)]

    yield from [_Turn("rounds on EchoEngine", 2 * _SIDE_BY_SIDE, side_by_side)] * 4
    yield _Turn("owners killed", 1, lambda seed: kill_owner(Setting(), seed, after=0))


def _of_ray() -> Iterator[_Turn]:
    setting = Setting(cluster="ray")
    yield _Turn("rounds on EchoEngine in Ray", 4, lambda seed: wait_for(start(setting, seed, 4)))
    yield _Turn("owners of a Ray killed", 1, lambda seed: kill_owner(setting, seed, after=0))


def _of_vllm() -> Iterator[_Turn]:
    if importlib.util.find_spec("vllm") is None:
        return
    local, ray = (Setting(cluster=cluster, engine="vllm", faults=2) for cluster in ("local", "ray"))
    yield _Turn("rounds on vLLM", 2, lambda seed: kill_owner(local, seed, after=2))
    yield _Turn("rounds on vLLM in Ray", 1, lambda seed: kill_owner(ray, seed, after=1))
