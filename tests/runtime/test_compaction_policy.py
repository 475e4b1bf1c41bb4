"""Compacting a batch or keeping exited rows in it: by hand, what it costs at worst, and from a profile."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.networks import digits, trained
from support.tensors import generator

from e2cm_ext import EarlyExit, Profile
from e2cm_ext.runtime.compaction_policy import CompactionPolicy


def test_costs_of_carrying_and_when_to_compact_by_hand():
    """Two samples take 3, 5 and 9 up to the stages, one takes 2, 3 and 6; moving one takes 1 at exit 0, 5 at exit 1."""
    costs = CompactionPolicy(((0, 2, 3), (0, 3, 5), (0, 6, 9)), ((0, 1, 2), (0, 5, 6)))
    assert costs.carry_cost(0, 1, 2, 1) == (5 - 3) - (3 - 2)
    assert costs.carry_cost(0, 2, 2, 1) == (9 - 3) - (6 - 2)  # exit 1 is off
    assert costs.should_compact(0, 1, 2, 1) and not costs.should_compact(1, 2, 2, 1)
    assert costs.carry_cost(1, 2, 2, 1) == 1
    assert not costs.should_compact(1, 2, 2, 1, spent=3.9) and costs.should_compact(1, 2, 2, 1, spent=4)
    assert costs.carry_cost(1, 2, 4, 2) == 2 * 4 - 4  # twice as many as the table knows


def test_guesses_are_linear_in_the_samples():
    costs = CompactionPolicy.from_flops([100, 300, 200], [5, 10])
    assert costs.carry_cost(0, 1, 8, 6) == 2 * 300 and costs.carry_cost(0, 2, 8, 6) == 2 * 500
    assert costs.should_compact(0, 1, 8, 7) == (300 >= 7 * 10 * 5)
    assert costs.should_compact(0, 1, 8, 1) and not costs.should_compact(1, 2, 80, 79)


@given(st.integers(0, 10**6), st.integers(1, 30), st.floats(0.1, 30))
def test_carrying_costs_no_more_than_moving(seed, exits, price):
    """Before every move, and after the last one, less than its price was paid; without exited rows, nothing is."""
    stages = torch.rand(exits + 1, generator=generator(seed)).add(0.1).tolist()
    passed = tuple((0.0, sum(stages[: j + 1])) for j in range(exits + 1))
    costs = CompactionPolicy(passed, ((price,) * 11,) * exits)
    left = sorted(torch.randint(1, 11, (exits,), generator=generator(seed + 1)).tolist(), reverse=True)
    rows, moves, paid, spent = 10, 0, 0.0, 0.0
    for j, here in enumerate(left):
        carrying = (rows - here) * stages[j + 1]
        assert costs.carry_cost(j, j + 1, rows, here) == pytest.approx(carrying, abs=1e-9)
        if costs.should_compact(j, j + 1, rows, here, paid):
            assert paid + carrying >= price - 1e-9
            rows, moves, paid = here, moves + 1, 0.0
        else:
            paid, spent = paid + carrying, spent + carrying
            assert paid < price + 1e-9
    assert spent <= (moves + 1) * price


def test_from_a_profile():
    stages = torch.tensor([[1.0, 2.0], [2.0, 3.0], [6.0, 11.0]])
    found = Profile(stages, torch.ones(3, 1), (1, 2, 4), ("a",), moves=torch.tensor([[0.5], [0.75], [1.0]]))
    costs = CompactionPolicy.from_profile(found)
    assert costs.cumulative_stages[0] == (0, 1, 2, 4, 6) and costs.cumulative_stages[1] == (0, 3, 5, 11, 17)
    assert costs.moves[0] == pytest.approx((0, 0.5, 0.75, 0.875, 1.0))
    assert costs.carry_cost(0, 1, 4, 2) == 11 - 3


def test_a_network_starts_with_a_guess_and_learns_from_its_profile():
    fit_on, _, _ = digits()
    ee = EarlyExit(trained(), fit_on[0][0][:1]).fit(fit_on[:3], progress=False)
    assert [row[1] for row in ee.compaction.cumulative_stages] == list(itertools.accumulate(ee.costs.stages))
    found = ee.profile(fit_on[0][0], 4, repeats=1, progress=False)
    assert (found.moves > 0).all() and found.moves.shape == found.heads.shape
    assert ee.compaction == CompactionPolicy.from_profile(found)
