"""Schedules against their twins at every step, and what they refuse."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rank_budget import BudgetError, ConstantBudget, CubicBudget, FixedGrowth, FixedPruning, OneShot

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
    cubic = CubicBudget(1000, 0, total_steps=10, warmup=0, cooldown=0)
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
GROWTH = {"initial": 4, "final": 10, "count": 2, "interval": 5}
SHOT = {"initial": 10, "final": 4, "at": 7}
OVER = {"initial": 10, "budget": 4, "interval": 5, "total_steps": 50}
CUBIC = {
    "initial": 10,
    "final": 4,
    "total_steps": 50,
    "warmup": 10,
    "cooldown": 20,
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
        (CubicBudget, CUBIC | {"warmup": -1}, "warmup is -1, but must be 0 or more steps."),
        (CubicBudget, CUBIC | {"cooldown": -1}, "cooldown is -1, but must be 0 or more steps."),
        (
            CubicBudget,
            CUBIC | {"warmup": 1.0},
            "warmup is 1.0, but a fraction must be 0.0 or more and below 1.",
        ),
        (CubicBudget, CUBIC | {"total_steps": 0}, "total_steps is 0, but must be at least 1."),
        (FixedGrowth, GROWTH | {"initial": -1}, "initial is -1, but must be at least 1."),
        (FixedGrowth, GROWTH | {"final": 2}, "final is 2, but must be at least initial = 4."),
        (FixedGrowth, GROWTH | {"count": -1}, "count is -1, but must be 0 or more."),
        (FixedGrowth, GROWTH | {"interval": 0}, "interval is 0, but must be at least 1 step."),
        (FixedGrowth, GROWTH | {"warmup": -1}, "warmup is -1, but must be 0 or more steps."),
        (OneShot, SHOT | {"at": 0}, "at is 0, but must be at least step 1."),
        (OneShot, SHOT | {"final": 11}, "final is 11, but must be 0 to initial = 10."),
        (
            OneShot,
            SHOT | {"at": -0.1},
            "at is -0.1, but a fraction must be 0.0 or more and below 1.",
        ),
        (
            CubicBudget,
            CUBIC | {"total_steps": 30},
            "total_steps is 30, but must be above warmup + cooldown = 30.",
        ),
    ],
)
def test_values_out_of_range(kit, make, options, text):
    assert kit.error_text(make, **options) == text


def test_values_at_the_ends_of_their_ranges():
    assert FixedPruning(1, 0, 0, 1).live_ranks(9) == 1
    assert FixedPruning(3, 3, 1, 1).live_ranks(9) == 3
    cubic = CubicBudget(4, 0, total_steps=1, warmup=0, cooldown=0)
    assert [cubic.live_ranks(step) for step in (0, 1, 2)] == [4, 0, 0]


@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 9), st.integers(1, 7), small)
def test_fixed_growth_equals_a_count_at_every_step(initial, more, count, interval, warmup):
    final = initial + more
    schedule = FixedGrowth(initial, final, count, interval, warmup)
    live = initial
    for step in range(80):
        grows = step > warmup and step % interval == 0 and live < final and count > 0
        if grows:
            live = min(final, live + count)
        assert schedule.live_ranks(step) == live, step
        assert schedule.allocates(step) == grows, step
    if live == final and schedule.end is not None:
        assert schedule.live_ranks(schedule.end) == final
        assert schedule.end == 0 or schedule.live_ranks(schedule.end - 1) < final


@given(st.integers(1, 30), st.integers(0, 30), st.integers(1, 40))
def test_one_shot_changes_once(initial, less, at):
    final = max(0, initial - less)
    schedule = OneShot(initial, final, at)
    assert [schedule.live_ranks(t) for t in range(50)] == [initial] * at + [final] * (50 - at)
    assert [t for t in range(50) if schedule.allocates(t)] == [at] == [schedule.end]


@given(st.integers(1, 40), st.data())
def test_end_is_the_first_step_of_the_final_budget(initial, data):
    final = data.draw(st.integers(0, initial))
    interval, count = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9))
    fixed = FixedPruning(initial, final, count, interval)
    cubic = CubicBudget(initial, final, 90, data.draw(small), data.draw(small), interval)
    last = max(90, interval * initial) + 2
    assert fixed.end == next(t for t in range(last) if fixed.live_ranks(t) == final)
    assert cubic.live_ranks(cubic.end) == final
    for schedule in (fixed, cubic):
        allocated = [t for t in range(last) if schedule.allocates(t)]
        changed = [
            t for t in range(1, last) if schedule.live_ranks(t) != schedule.live_ranks(t - 1)
        ]
        assert set(changed) <= set(allocated)
        assert not allocated or max(allocated) == schedule.end
        assert all(t % interval == 0 or t == schedule.end for t in allocated)


def test_phases_may_be_fractions_and_the_number_of_steps_late():
    late = CubicBudget(12, 4, warmup=0.1, cooldown=0.25, interval=5)
    known = late.with_total_steps(200)
    assert known == CubicBudget(12, 4, 200, warmup=0.1, cooldown=0.25, interval=5)
    steps = CubicBudget(12, 4, 200, warmup=20, cooldown=50, interval=5)
    assert [known.live_ranks(t) for t in range(220)] == [steps.live_ranks(t) for t in range(220)]
    assert OneShot(4, 2, at=0.3).with_total_steps(10).end == 3
    assert FixedGrowth(2, 4, 1, 5, warmup=0.5).with_total_steps(20).live_ranks(14) == 2
    with pytest.raises(BudgetError, match="CubicBudget does not know the number of steps"):
        late.live_ranks(3)
    with pytest.raises(BudgetError, match="the schedule was made for 200"):
        known.with_total_steps(300)


def test_numbers_per_matrix_become_numbers_of_all():
    assert CubicBudget(12, 8, 100).times(3) == CubicBudget(36, 24, 100)
    assert FixedPruning(6, 3, 1, 10).times(4) == FixedPruning(24, 12, 4, 10)


@pytest.mark.parametrize("schedule", [CubicBudget(5, 5, 10), FixedPruning(5, 2, 0, 1)])
def test_nothing_to_prune_is_no_error(schedule):
    assert [schedule.live_ranks(t) for t in range(12)] == [5] * 12


@pytest.mark.parametrize(
    ("schedule", "end"),
    [
        (FixedGrowth(2, 4, count=1, interval=10, warmup=3), 20),
        (FixedPruning(4, 2, count=1, interval=10), 20),
        (CubicBudget(4, 2, total_steps=30, cooldown=10), 20),
        (ConstantBudget(4), 0),
    ],
)
def test_a_schedule_for_more_matrices_ends_at_the_same_step(schedule, end):
    many = schedule.times(6)
    assert schedule.end == many.end == end
    for step in (0, end):
        assert many.live_ranks(step) == 6 * schedule.live_ranks(step)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: FixedPruning(4, 2.5, 1, 1), "budget is 2.5, but must be a whole number."),
        (lambda: FixedPruning(4, 2, 1, 2.5), "interval is 2.5, but must be a whole number."),
        (lambda: FixedPruning(True, 1, 1), "initial is True, but must be a whole number."),
        (lambda: FixedGrowth(2, 4, 0.5), "count is 0.5, but must be a whole number."),
        (lambda: ConstantBudget("4"), "initial is '4', but must be a whole number."),
        (lambda: OneShot(4, None, 1), "final is None, but must be a whole number."),
        (lambda: CubicBudget(4, 2, 10.0), "total_steps is 10.0, but must be a whole number."),
        (lambda: CubicBudget(4, 2, warmup="1"), "warmup is '1', but must be a whole number."),
        (
            lambda: CubicBudget(4, 2, warmup=0.7, cooldown=0.6),
            "cooldown is 0.6, but with warmup = 0.7 must be below 1.0.",
        ),
    ],
)
def test_numbers_that_are_not_whole_and_phases_that_do_not_fit(kit, make, text):
    assert kit.error_text(make) == text
