"""Differences are tested seed by seed with the paired t-test."""

import math
from statistics import fmean

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hft_trl.experiments.frontier import paired

tenths = st.integers(-1000, 1000).map(lambda number: number / 10)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the first import of scipy
@given(st.lists(tenths, min_size=2, max_size=10))
def test_swapping_the_two_runs_turns_the_sign_around(differences):
    ours, theirs = paired(differences), paired([-difference for difference in differences])
    assert ours.seeds == len(differences)
    assert ours.mean == pytest.approx(fmean(differences), abs=1e-9)
    assert theirs.mean == pytest.approx(-ours.mean, abs=1e-9)
    assert ours.ahead == sum(difference > 0 for difference in differences)
    assert paired(differences, better=-1).ahead == theirs.ahead
    assert ours.low <= ours.mean + 1e-9
    assert ours.mean <= ours.high + 1e-9


def test_the_test_is_the_paired_t_test():
    """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t = 2 sqrt(3) with two degrees of freedom."""
    found, t = paired([1, 2, 3]), 2 * math.sqrt(3)
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert found.high - found.mean == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert found.cells(1) == ["+2.0", "-0.5 to +4.5", "0.0742", "3 of 3"]


def test_one_seed_has_no_test():
    found = paired([10.0])
    assert (found.seeds, found.mean, found.ahead) == (1, 10.0, 1)
    assert math.isnan(found.p)
    assert found.cells(1) == ["+10.0", "-", "-", "1 of 1"]
