"""The checker is checked: a history that is well passes, and each planted wrong is refused."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from actors.members.supervision import Supervisor
from tests.faults.checker import Promise, problems
from tests.faults.history import (
    Asked,
    Began,
    Ended,
    EngineRecord,
    Given,
    Left,
    OwnerRecord,
    Sent,
    State,
    Struck,
    Submitted,
)

PROMISE = Promise(watchdog=3, patience=40, restarts=Supervisor(intensity=1, period=10))
Engines = dict[int, list[EngineRecord]]


def history() -> tuple[list[OwnerRecord], Engines]:
    """A request whose first replica is killed after three of its six tokens, and is continued by the second."""
    owner: list[OwnerRecord] = [
        State(time=0, replica=0, state="ready"),
        State(time=0, replica=1, state="ready"),
        Submitted(time=1, request="a", tokens=6, answer=[1, 2, 3, 4, 5, 6]),
        Asked(time=1, request="a"),
        Given(time=2, request="a", epoch=0, token_ids=[1, 2]),
        Asked(time=2, request="a"),
        Given(time=3, request="a", epoch=0, token_ids=[3]),
        Asked(time=3, request="a"),
        Struck(time=3, fault="actor killed", replica=0, pid=10, busy=True),
        State(time=3, replica=0, state="restarting"),
        Given(time=4, request="a", epoch=1, token_ids=[4]),
        Asked(time=4, request="a"),
        State(time=5, replica=0, state="loading model"),
        State(time=6, replica=0, state="ready"),
        Given(time=6, request="a", epoch=1, token_ids=[5, 6], finish="length", usage=6),
        Asked(time=6, request="a"),
        Ended(time=6, request="a", how="finished"),
        Left(time=7, what=[]),
    ]
    engines: Engines = {
        10: [
            Began(time=1, request="a", epoch=0),
            Sent(time=2, request="a", epoch=0, token_ids=[1, 2]),
            Sent(time=3, request="a", epoch=0, token_ids=[3]),
            Sent(time=3, request="a", epoch=0, token_ids=[4]),  # and this one was lost with it
        ],
        11: [
            Began(time=3.5, request="a", epoch=1, resume=[1, 2, 3]),
            Sent(time=4, request="a", epoch=1, token_ids=[4]),
            Sent(time=6, request="a", epoch=1, token_ids=[5, 6]),
        ],
    }
    return owner, engines


def test_a_history_as_promised_is_accepted() -> None:
    assert problems(*history(), PROMISE) == []


def given(owner: list[OwnerRecord], number: int) -> int:
    return [at for at, record in enumerate(owner) if isinstance(record, Given)][number]


def change(owner: list[OwnerRecord], at: int, **fields: object) -> None:
    owner[at] = msgspec.structs.replace(owner[at], **fields)


def doubled_delta(owner: list[OwnerRecord], engines: Engines) -> None:
    owner.insert(given(owner, 1), owner[given(owner, 0)])


def lost_delta(owner: list[OwnerRecord], engines: Engines) -> None:
    del owner[given(owner, 1)]


def changed_token(owner: list[OwnerRecord], engines: Engines) -> None:
    change(owner, given(owner, 0), token_ids=[1, 7])


def swapped_deltas(owner: list[OwnerRecord], engines: Engines) -> None:
    first, second = given(owner, 0), given(owner, 1)
    owner[first], owner[second] = owner[second], owner[first]


def doubled_at_the_seam(owner: list[OwnerRecord], engines: Engines) -> None:
    """Resumed one too early, by the pool: each end for itself looks well."""
    engines[11] = [
        Began(time=3.5, request="a", epoch=1, resume=[1, 2]),
        Sent(time=4, request="a", epoch=1, token_ids=[3]),
        Sent(time=6, request="a", epoch=1, token_ids=[4, 5]),
    ]
    change(owner, given(owner, 2), token_ids=[3])
    change(owner, given(owner, 3), token_ids=[4, 5])


def lost_at_the_seam(owner: list[OwnerRecord], engines: Engines) -> None:
    engines[11] = [
        Began(time=3.5, request="a", epoch=1, resume=[1, 2, 3, 4]),
        Sent(time=4, request="a", epoch=1, token_ids=[5]),
        Sent(time=6, request="a", epoch=1, token_ids=[6]),
    ]
    change(owner, given(owner, 2), token_ids=[5])
    change(owner, given(owner, 3), token_ids=[6], usage=5)


def begun_at_the_beginning(owner: list[OwnerRecord], engines: Engines) -> None:
    engines[11][0] = Began(time=3.5, request="a", epoch=1)


def late_delta_of_an_older_epoch(owner: list[OwnerRecord], engines: Engines) -> None:
    owner.insert(given(owner, 3), Given(time=5, request="a", epoch=0, token_ids=[4]))


def anew_without_being_asked(owner: list[OwnerRecord], engines: Engines) -> None:
    owner.insert(given(owner, 2), Given(time=4, request="a", epoch=1, token_ids=[], attempt=2))


def ended_twice(owner: list[OwnerRecord], engines: Engines) -> None:
    owner.append(Ended(time=7, request="a", how="finished"))


def never_ended(owner: list[OwnerRecord], engines: Engines) -> None:
    del owner[-2]


def delta_after_the_end(owner: list[OwnerRecord], engines: Engines) -> None:
    owner.append(Given(time=7, request="a", epoch=1, token_ids=[]))


def delta_after_the_last_one(owner: list[OwnerRecord], engines: Engines) -> None:
    change(owner, given(owner, 2), finish="stop", usage=4)


def too_short(owner: list[OwnerRecord], engines: Engines) -> None:
    change(owner, given(owner, 3), token_ids=[5], usage=5)


def wrong_usage(owner: list[OwnerRecord], engines: Engines) -> None:
    change(owner, given(owner, 3), usage=3)


def no_finish(owner: list[OwnerRecord], engines: Engines) -> None:
    change(owner, given(owner, 3), finish=None)


def failed_without_need(owner: list[OwnerRecord], engines: Engines) -> None:
    change(owner, -2, how="ReplicaLost", message="lost")


def quarantined_at_the_first_start(owner: list[OwnerRecord], engines: Engines) -> None:
    change(owner, -2, how="RequestQuarantined")
    del engines[11]
    del owner[given(owner, 3)], owner[given(owner, 2)]


def nobody_served_though_somebody_did(owner: list[OwnerRecord], engines: Engines) -> None:
    change(owner, -2, how="EngineDead")


def taken_from_a_replica_that_was_well(owner: list[OwnerRecord], engines: Engines) -> None:
    owner[:] = [record for record in owner if not isinstance(record, Struck)]


def begun_twice(owner: list[OwnerRecord], engines: Engines) -> None:
    engines[12] = [Began(time=4, request="a", epoch=1, resume=[1, 2, 3])]


def begun_by_nobody(owner: list[OwnerRecord], engines: Engines) -> None:
    engines[11].append(Began(time=4, request="b", epoch=0))


def submitted_twice(owner: list[OwnerRecord], engines: Engines) -> None:
    owner.insert(3, owner[2])


def waited_too_long(owner: list[OwnerRecord], engines: Engines) -> None:
    change(owner, given(owner, 0), time=50)


def hung_and_not_found(owner: list[OwnerRecord], engines: Engines) -> None:
    for at, record in enumerate(owner):
        if isinstance(record, Struck):
            change(owner, at, fault="process stopped", time=2)
        elif isinstance(record, State) and record.state == "restarting":
            change(owner, at, time=30)
        elif isinstance(record, State) and record.state == "loading model":
            change(owner, at, time=31)
        elif isinstance(record, State) and record.time > 0:
            change(owner, at, time=32)


def restarted_for_its_connection(owner: list[OwnerRecord], engines: Engines) -> None:
    for at, record in enumerate(owner):
        if isinstance(record, Struck):
            change(owner, at, fault="connection cut")


def one_restart_too_many(owner: list[OwnerRecord], engines: Engines) -> None:
    owner += [State(time=8, replica=0, state="restarting"), State(time=9, replica=0, state="loading model")]


def something_left(owner: list[OwnerRecord], engines: Engines) -> None:
    change(owner, -1, what=["99 EngineCore"])


PLANTED: list[Callable[[list[OwnerRecord], Engines], None]] = [
    doubled_delta, lost_delta, changed_token, swapped_deltas, doubled_at_the_seam, lost_at_the_seam,
    begun_at_the_beginning, late_delta_of_an_older_epoch, anew_without_being_asked, ended_twice, never_ended,
    delta_after_the_end, delta_after_the_last_one, too_short, wrong_usage, no_finish, failed_without_need,
    quarantined_at_the_first_start, nobody_served_though_somebody_did, taken_from_a_replica_that_was_well,
    begun_twice, begun_by_nobody, submitted_twice, waited_too_long, hung_and_not_found,
    restarted_for_its_connection, one_restart_too_many, something_left,
]  # fmt: skip


@pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
def test_a_planted_wrong_is_refused(plant: Callable[[list[OwnerRecord], Engines], None]) -> None:
    owner, engines = history()
    plant(owner, engines)
    assert problems(owner, engines, PROMISE) != []


def test_what_can_not_be_continued_may_fail_or_begin_anew() -> None:
    owner, engines = history()
    change(owner, 2, resumable=False)
    failed = [*owner[: given(owner, 2)], Ended(time=4, request="a", how="ReplicaLost")]
    assert problems(failed, {10: engines[10]}, PROMISE) == []

    change(owner, 2, reroute="restart")
    anew = [Began(time=3.5, request="a", epoch=1), Sent(time=4, request="a", epoch=1, token_ids=[1, 2, 3, 4, 5, 6])]
    owner[given(owner, 3)] = Given(time=6, request="a", epoch=1, token_ids=[1, 2, 3, 4, 5, 6], finish="length", usage=6)
    owner[given(owner, 2)] = Given(time=4, request="a", epoch=1, token_ids=[], attempt=2)
    assert problems(owner, {10: engines[10], 11: anew}, PROMISE) == []
    assert problems(failed[:2] + owner[2:3] + failed[3:], {10: engines[10]}, PROMISE) != []


def test_of_a_killed_owner_only_the_end_is_missing() -> None:
    owner, engines = history()
    cut_short = owner[: given(owner, 2)]
    assert problems(cut_short, engines, PROMISE) == ["a never ended"]
    killed = msgspec.structs.replace(PROMISE, to_the_end=False)
    assert problems(cut_short, engines, killed) == []
