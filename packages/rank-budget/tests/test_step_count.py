"""A step that does not allocate reads nothing, and whether it counts is known when it matters."""

import math

import pytest
import torch

from rank_budget import (
    CubicBudget,
    FixedPruning,
    NormShare,
    RankAllocator,
    SmoothedSensitivity,
    watch_,
)
from rank_budget.step_count import StepCount

SCORES = {"smoothed": SmoothedSensitivity(), "share": NormShare()}
INTERVAL, DAMAGED = 4, {2, 3, 7, 8, 12}  # 12 is one that would allocate


def build(kit, score, direction="prune"):
    layers = {name: kit.triplet(3, 4, 5, mask=False) for name in "ab"}
    schedule = FixedPruning(6, 2, 1, INTERVAL)
    if direction == "regrow":
        schedule = CubicBudget(6, 2, total_steps=16, cooldown=4, interval=INTERVAL)
    return layers, RankAllocator(layers, schedule, score=SCORES[score], direction=direction)


def draw(layers, call):
    """Values and gradients of a call, of which some are damaged."""
    generator = torch.Generator().manual_seed(call)
    for layer in layers.values():
        for factor in (layer.p, layer.lam, layer.q):
            factor.data.normal_(generator=generator)
            factor.grad = torch.randn(factor.shape, generator=generator, dtype=factor.dtype)
    if call in DAMAGED:
        layers["a"].q.grad[0, 0] = layers["b"].p.data[0, 0] = math.nan


@pytest.mark.parametrize("direction", ["prune", "regrow"])
@pytest.mark.parametrize("score", list(SCORES))
def test_steps_count_as_if_each_flag_were_read_at_once(kit, score, direction):
    (layers, lazy), (others, eager) = (build(kit, score, direction) for _ in range(2))
    taken = 0
    for call in range(1, 24):
        draw(layers, call)
        draw(others, call)
        done = lazy.step()
        assert done == eager.step()
        taken += call not in DAMAGED
        assert (eager.steps, eager.skipped) == (taken, call - taken)  # this reads the flag
        assert done is None or done.step == taken == lazy.steps
    assert (lazy.steps, lazy.skipped) == (taken, len(DAMAGED))
    assert len(lazy.history) >= 3
    one, two = (allocator.state_dict()["score"] for allocator in (lazy, eager))
    assert one.pop("of", None) == two.pop("of", None)
    torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize("score", list(SCORES))
def test_a_step_that_does_not_allocate_reads_nothing(kit, score):
    layers, allocator = build(kit, score)
    optimizer = torch.optim.SGD([layer.lam for layer in layers.values()], lr=0.0)
    watch_(allocator, optimizer, patience=2)
    reads = []
    for _ in range(3 * INTERVAL):
        with kit.Counted() as mode:
            optimizer.step()
            allocator.step()
        reads.append(mode.operations["_local_scalar_dense"])
    assert [call for call, found in enumerate(reads, 1) if found] == [4, 8, 12]
    assert max(reads) == 2  # which steps before it counted, and whether it is finite
    assert allocator.steps == 3 * INTERVAL


def test_flags_that_are_not_read_yet_do_not_pile_up():
    count = StepCount()
    for call in range(3000):
        count.add(torch.tensor(call % 3 > 0))
        assert len(count._open) <= 1000
    assert (count.taken, count.skipped, count.seen) == (2000, 1000, 3000)
