"""A step that cannot be taken changes nothing, and the next is as if it had not been."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

Attempt = Callable[[Any, Any], None]


def not_a_number(run: Any, step: Any) -> None:
    step.backward(run.loss_sum(torch.full((2, 5), math.nan, dtype=torch.float64)), tokens=2)


def infinite(run: Any, step: Any) -> None:
    x = torch.linspace(-1e200, 1e200, 10, dtype=torch.float64).view(2, 5)
    step.backward(run.loss_sum(x), tokens=2)


def gradient_alone(run: Any, step: Any) -> None:
    y = run.model(torch.ones(2, 5, dtype=torch.float64))
    loss = torch.sqrt((y - y.detach()).abs().sum())
    assert float(loss.detach()) == 0.0
    step.backward(loss, tokens=2)


def no_tokens(run: Any, step: Any) -> None:
    step.backward(run.loss_sum(torch.ones(2, 5, dtype=torch.float64)) * 0, tokens=0)


def one_of_two(run: Any, step: Any) -> None:
    step.backward(run.loss_sum(torch.ones(2, 5, dtype=torch.float64)), tokens=2)
    not_a_number(run, step)


@pytest.mark.parametrize("attempt", [not_a_number, infinite, gradient_alone, no_tokens, one_of_two])
@pytest.mark.parametrize("good", [0, 2])
def test_a_step_that_is_not_finite_never_was(
    small: SimpleNamespace, case: str, attempt: Attempt, good: int
) -> None:
    run, untouched = small.build(case), small.build(case)
    for step in range(good):
        assert run.step(small.batches(step)) == untouched.step(small.batches(step))
    before = run.state()
    live = run.method.live_ranks

    with run.method.step(run.optimizer, 1.0) as bad:
        attempt(run, bad)
    assert not bad.report.finite
    assert not (math.isfinite(bad.report.loss) and math.isfinite(bad.report.grad_norm))
    assert bad.report.allocation is None
    assert bad.report.live_ranks == live
    assert bad.report.tokens == {no_tokens: 0, one_of_two: 4}.get(attempt, 2)
    small.assert_same_state(run.state(), before)

    for step in range(good, good + 4):
        assert run.step(small.batches(step)) == untouched.step(small.batches(step))
        small.assert_same_state(run.state(), untouched.state())
    if run.method.allocator is not None:
        assert run.method.live_ranks < run.method.total_ranks


class Interruption(Exception):
    pass


def interrupted_at_once(run: Any, step: Any) -> None:
    raise Interruption


def interrupted_later(run: Any, step: Any) -> None:
    step.backward(run.loss_sum(torch.ones(2, 5, dtype=torch.float64)), tokens=2)
    raise Interruption


def gradients_replaced(run: Any, step: Any) -> None:
    step.backward(run.loss_sum(torch.ones(2, 5, dtype=torch.float64)), tokens=2)
    first = next(p for p in run.model.parameters() if p.requires_grad)
    first.grad = None
    step.backward(run.loss_sum(torch.ones(2, 5, dtype=torch.float64)), tokens=2)


@pytest.mark.parametrize("attempt", [interrupted_at_once, interrupted_later, gradients_replaced])
@pytest.mark.parametrize("good", [0, 2])
def test_an_exception_discards_the_step(
    small: SimpleNamespace, case: str, attempt: Attempt, good: int
) -> None:
    run, untouched = small.build(case), small.build(case)
    for step in range(good):
        assert run.step(small.batches(step)) == untouched.step(small.batches(step))
    before = run.state()
    with pytest.raises((Interruption, ValueError)) as caught, run.method.step(run.optimizer) as bad:
        attempt(run, bad)
    if attempt is gradients_replaced:
        assert "do not call zero_grad between the micro-batches of a step" in str(caught.value)
        next(p for p in run.model.parameters() if p.requires_grad).grad = None  # the mistake mended
    assert not hasattr(bad, "report")
    small.assert_same_state(run.state(), before)
    for step in range(good, good + 4):
        assert run.step(small.batches(step)) == untouched.step(small.batches(step))
        small.assert_same_state(run.state(), untouched.state())


def test_a_step_that_is_used_again_starts_anew(small: SimpleNamespace, case: str) -> None:
    run, untouched = small.build(case), small.build(case)
    again = run.method.step(run.optimizer, 1.0)
    for step in range(3):
        with again:
            for x in small.batches(step):
                again.backward(run.loss_sum(x), tokens=len(x))
        assert again.report == untouched.step(small.batches(step))
    small.assert_same_state(run.state(), untouched.state())
