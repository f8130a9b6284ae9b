"""Real processes, 64 requests in flight, and faults at seeded moments; judged by the history of each request."""

from __future__ import annotations

import pytest

from tests.faults.driver import kill_owner, start, wait_for
from tests.faults.rounds import Setting


@pytest.mark.long
@pytest.mark.timeout(180)
def test_requests_end_as_promised_through_faults_at_seeded_moments() -> None:
    """Ten rounds; side by side, because they mostly wait for watchdogs."""
    programs = [start(Setting(), first, 2) for first in range(0, 10, 2)]
    assert [wait_for(program) for program in programs] == [[]] * 5


def test_nothing_is_left_when_the_owner_of_a_pool_is_killed() -> None:
    assert kill_owner(Setting(), seed=1, after=0) == []


@pytest.mark.ray
def test_requests_end_as_promised_in_ray_also_when_placement_groups_are_removed() -> None:
    assert wait_for(start(Setting(cluster="ray"), 0, 3)) == []


@pytest.mark.ray
def test_nothing_is_left_when_the_owner_of_a_pool_in_ray_is_killed() -> None:
    assert kill_owner(Setting(cluster="ray"), seed=2, after=0) == []


@pytest.mark.ray
@pytest.mark.engine
@pytest.mark.timeout(600)
def test_vllm_in_ray_answers_as_promised_through_faults_and_is_gone_with_its_killed_owner() -> None:
    """One round, and the owner's end within the next: two replicas take a minute to start."""
    assert kill_owner(Setting(cluster="ray", engine="vllm", faults=2), seed=0, after=1) == []
