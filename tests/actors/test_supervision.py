"""The supervisor's core: a plain machine, so it is tested against its laws, on any clock."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.members.supervision import Backoff, GiveUp, Restart, Restarts, Supervisor, swept
from arun.errors import MisuseError

supervisors = st.builds(
    Supervisor,
    intensity=st.integers(0, 5),
    period=st.integers(1, 30).map(float),
    backoff=st.builds(
        Backoff,
        first=st.sampled_from([0.0, 0.5, 1.0]),
        factor=st.sampled_from([1.0, 2.0, 3.0]),
        cap=st.sampled_from([1.0, 4.0]),
    ),
)
# Small whole numbers, so that deaths often collide and often fall on the very edge of a period.
gaps = st.lists(st.integers(0, 12), max_size=40)


@given(supervisors, gaps)
def test_no_window_of_a_period_holds_more_restarts_than_the_intensity(supervisor, gaps):
    restarts = Restarts(supervisor)
    now, granted = 0.0, []
    for gap in gaps:
        now += gap
        verdict = restarts.died(now)
        within = [time for time in granted if now - time < supervisor.period]
        if isinstance(verdict, Restart):
            granted.append(now)
            assert len(within) < supervisor.intensity
        else:
            assert len(within) == supervisor.intensity == verdict.restarts


@given(supervisors, gaps)
def test_back_off_grows_to_its_cap_and_begins_anew_after_a_quiet_period(supervisor, gaps):
    restarts, backoff = Restarts(supervisor), supervisor.backoff
    now, previous = 0.0, None
    for gap in gaps:
        now += gap
        verdict = restarts.died(now)
        if isinstance(verdict, GiveUp):
            continue
        delay = verdict.at - now
        if previous is None or now - previous[0] >= supervisor.period:
            assert (verdict.attempt, delay) == (1, backoff.first)
        else:
            assert verdict.attempt == previous[2] + 1
            assert delay == min(backoff.cap, previous[1] * backoff.factor)
        previous = now, delay, verdict.attempt


def test_a_long_life_with_rare_faults_never_uses_up_the_budget():
    restarts = Restarts(Supervisor(intensity=1, period=60.0))
    assert all(isinstance(restarts.died(fault * 61.0), Restart) for fault in range(1000))


def test_a_thousand_restarts_in_a_row_overflow_nothing():
    restarts = Restarts(Supervisor(intensity=10_000, backoff=Backoff(first=1.0, factor=10.0, cap=5.0)))
    assert [restarts.died(0.0).at for _ in range(2000)][-1] == 5.0


@pytest.mark.parametrize(
    ("policy", "abnormal", "restarted"),
    [
        ("permanent", True, True),
        ("permanent", False, True),
        ("transient", True, True),
        ("transient", False, False),
        ("temporary", True, False),
        ("temporary", False, False),
    ],
)
def test_the_policy_says_which_ends_are_followed_by_a_restart(policy, abnormal, restarted):
    verdict = Restarts(Supervisor()).died(0.0, abnormal=abnormal, policy=policy)
    assert isinstance(verdict, Restart) is restarted


def test_an_end_that_is_not_followed_by_a_restart_costs_no_budget():
    restarts = Restarts(Supervisor(intensity=1))
    restarts.died(0.0, policy="temporary")
    assert isinstance(restarts.died(0.0), Restart)


def test_giving_up_says_how_many_restarts_in_what_time():
    restarts = Restarts(Supervisor(intensity=2, period=60.0))
    restarts.died(10.0)
    restarts.died(11.0)
    verdict = restarts.died(12.5)
    assert verdict == GiveUp(
        "it was restarted 2 times in the last 2.5 s, and its supervisor allows 2 in 60 s", restarts=2, exhausted=True
    )


def test_the_strategy_says_what_goes_with_the_dead_one():
    assert swept("rest_for_one", "abc", "b") == ("b", "c")
    assert swept("one_for_one", "abc", "b") == ("b",)
    assert swept("one_for_all", "abc", "b") == ("a", "b", "c")


@pytest.mark.parametrize(
    "wrong", [{"strategy": "all_for_one"}, {"intensity": -1}, {"period": 0.0}, {"period": float("nan")}]
)
def test_a_supervisor_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(MisuseError):
        Supervisor(**wrong)


def test_a_back_off_that_shrinks_is_refused():
    with pytest.raises(MisuseError, match="factor"):
        Backoff(factor=0.5)
