"""The rule that ends training time, on made series."""

import itertools

import pytest
import torch


def literal_steps_to(losses, target, window):
    for steps in range(1, len(losses) + 1):
        if steps < window and len(losses) >= window:
            continue
        last = losses[max(0, steps - window) : steps]
        if len(losses) < window and steps < len(losses):
            continue
        if sum(last) / len(last) <= target:
            return steps
    return None


@pytest.mark.parametrize(
    ("losses", "target", "window", "expected"),
    [
        ([5.0, 4.0, 3.0, 2.0], 1.0, 2, None),  # never
        ([1.0, 4.0, 3.0, 2.0], 1.0, 1, 1),  # at the first step
        ([1.0, 1.0, 9.0, 9.0], 2.0, 2, 2),  # at the first that has a mean
        ([5.0, 0.0, 5.0, 3.0, 1.0, 1.0], 1.0, 2, 6),  # one low step of a noisy series is not it
        ([5.0, 0.0, 5.0, 3.0, 1.0, 1.0], 3.0, 2, 2),  # it need not stay there
        ([3.0, 1.0], 2.0, 9, 2),  # shorter than the window
        ([float("inf"), 1.0, 1.0], 1.0, 2, 3),  # a skipped step
        ([2.0, 2.0], 2.0, 2, 2),  # equal is reached
    ],
)
def test_the_stopping_rule(recipe, losses, target, window, expected):
    stopping = recipe.stopping
    assert stopping.steps_to(losses, target, window) == expected
    assert literal_steps_to(losses, target, window) == expected
    seconds = [1.0 + i for i in range(len(losses))]
    found = stopping.seconds_to(losses, seconds, target, window)
    assert found == (None if expected is None else sum(seconds[:expected]))


def test_the_stopping_rule_on_noise_is_that_of_its_twin(recipe):
    torch.manual_seed(0)
    for window, target in itertools.product((1, 3, 10), (0.4, 0.6, 0.9)):
        losses = (torch.linspace(1, 0.3, 40) + 0.3 * torch.randn(40)).tolist()
        expected = literal_steps_to(losses, target, window)
        assert recipe.stopping.steps_to(losses, target, window) == expected
    last = recipe.stopping.smoothed(losses, 10)[-1]
    assert recipe.stopping.steps_to(losses, last, 10) is not None
    with pytest.raises(ValueError, match="without steps"):
        recipe.stopping.smoothed([], 3)
