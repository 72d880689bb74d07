"""Schedules against their twins at every step, and what they refuse."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rank_budget import ConstantBudget, CubicBudget, FixedPruning

small = st.integers(0, 40)


@given(st.integers(1, 60), st.data())
def test_fixed_pruning_equals_the_twin_at_every_step(twin, initial, data):
    budget = data.draw(st.integers(0, initial))
    count, interval = data.draw(st.integers(0, 70)), data.draw(st.integers(1, 9))
    schedule = FixedPruning(initial, budget, count, interval)
    for step in range(60):
        expected = twin.fixed_pruning(initial, budget, count, interval, step)
        assert schedule.live_ranks(step) == expected, step


@given(st.integers(1, 500), small, small, st.integers(1, 60), st.integers(1, 9), st.data())
def test_cubic_budget_equals_the_twin_at_every_step(
    twin, initial, warmup, cooldown, span, interval, data
):
    final = data.draw(st.integers(0, initial))
    total = warmup + span + cooldown
    schedule = CubicBudget(initial, final, total, warmup, cooldown, interval)
    found = [schedule.live_ranks(step) for step in range(total + 5)]
    phases = (total, warmup, cooldown, interval)
    expected = [twin.cubic_budget(initial, final, *phases, step) for step in range(total + 5)]
    assert found == expected
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1]) == (initial, final)


def test_cubic_budget_does_not_round_a_whole_number_down():
    # 1000 · 0.7³ is 343, but 342.99… in float64.
    cubic = CubicBudget(1000, 0, total_steps=10, warmup_steps=0, cooldown_steps=0)
    assert [cubic.live_ranks(t) for t in range(5)] == [1000, 729, 512, 343, 216]


@given(st.integers(1, 10**6), st.integers(0, 10**9))
def test_constant_budget_never_changes(initial, step):
    assert ConstantBudget(initial).live_ranks(step) == initial


@given(
    st.integers(1, 400),
    st.integers(1, 50),
    st.integers(1, 500),
    st.sampled_from([0.01, 0.1, 0.5, 0.7, 0.999, 1.0]),
    st.data(),
)
def test_fixed_pruning_over_a_run_takes_the_least_count_that_is_in_time(
    initial, interval, total, finish_by, data
):
    budget = data.draw(st.integers(0, initial))
    schedule = FixedPruning.over(
        initial=initial, budget=budget, interval=interval, total_steps=total, finish_by=finish_by
    )
    assert (schedule.initial, schedule.budget, schedule.interval) == (initial, budget, interval)
    deadline = math.floor(total * finish_by)
    if deadline < interval:
        assert schedule.live_ranks(interval) == budget
        assert schedule.count == initial - budget
    else:
        assert schedule.live_ranks(deadline) == budget
        if schedule.count:
            less = FixedPruning(initial, budget, schedule.count - 1, interval)
            assert less.live_ranks(deadline) > budget
        else:
            assert initial == budget


def test_fixed_pruning_over_a_run_finishes_by_seven_tenths_of_it():
    options = {"initial": 100, "budget": 30, "interval": 10, "total_steps": 1000}
    assert FixedPruning.over(**options) == FixedPruning.over(**options, finish_by=0.7)
    assert FixedPruning.over(**options).count == 1


FIXED = {"initial": 10, "budget": 4, "count": 2, "interval": 5}
OVER = {"initial": 10, "budget": 4, "interval": 5, "total_steps": 50}
CUBIC = {
    "initial": 10,
    "final": 4,
    "total_steps": 50,
    "warmup_steps": 10,
    "cooldown_steps": 20,
    "interval": 5,
}


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (ConstantBudget, {"initial": 0}, "initial is 0, but must be at least 1."),
        (FixedPruning, FIXED | {"initial": 0}, "initial is 0, but must be at least 1."),
        (FixedPruning, FIXED | {"budget": 11}, "budget is 11, but must be 0 to initial = 10."),
        (FixedPruning, FIXED | {"budget": -1}, "budget is -1, but must be 0 to initial = 10."),
        (FixedPruning, FIXED | {"count": -1}, "count is -1, but must be 0 or more."),
        (FixedPruning, FIXED | {"interval": 0}, "interval is 0, but must be at least 1 step."),
        (FixedPruning.over, OVER | {"budget": 11}, "budget is 11, but must be 0 to initial = 10."),
        (FixedPruning.over, OVER | {"interval": 0}, "interval is 0, but must be at least 1 step."),
        (FixedPruning.over, OVER | {"total_steps": 0}, "total_steps is 0, but must be at least 1."),
        (
            FixedPruning.over,
            OVER | {"finish_by": 0},
            "finish_by is 0, but must be above 0 and at most 1.",
        ),
        (
            FixedPruning.over,
            OVER | {"finish_by": 1.5},
            "finish_by is 1.5, but must be above 0 and at most 1.",
        ),
        (CubicBudget, CUBIC | {"initial": 0}, "initial is 0, but must be at least 1."),
        (CubicBudget, CUBIC | {"final": 11}, "final is 11, but must be 0 to initial = 10."),
        (CubicBudget, CUBIC | {"final": -1}, "final is -1, but must be 0 to initial = 10."),
        (CubicBudget, CUBIC | {"interval": 0}, "interval is 0, but must be at least 1 step."),
        (CubicBudget, CUBIC | {"warmup_steps": -1}, "warmup_steps is -1, but must be 0 or more."),
        (
            CubicBudget,
            CUBIC | {"cooldown_steps": -1},
            "cooldown_steps is -1, but must be 0 or more.",
        ),
        (
            CubicBudget,
            CUBIC | {"total_steps": 30},
            "total_steps is 30, but must be above warmup_steps + cooldown_steps = 30.",
        ),
    ],
)
def test_values_out_of_range(kit, make, options, text):
    assert kit.error_text(make, **options) == text


def test_values_at_the_ends_of_their_ranges():
    assert FixedPruning(1, 0, 0, 1).live_ranks(9) == 1
    assert FixedPruning(3, 3, 1, 1).live_ranks(9) == 3
    cubic = CubicBudget(4, 0, total_steps=1, warmup_steps=0, cooldown_steps=0)
    assert [cubic.live_ranks(step) for step in (0, 1, 2)] == [4, 0, 0]
