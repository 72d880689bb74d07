"""The number of tensor operations depends on the groups, and none of a step reads a tensor."""

import pytest
import torch

from rank_budget import FixedPruning, RankAllocator

HOST_READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "_to_host"}


def operations(kit, count, score="sensitivity"):
    """Operations of score, step and ranks: of a step that prunes, then of one that does not."""
    matrices = [
        kit.group([f"a{i}" for i in range(count)], 3),
        kit.group([f"b{i}" for i in range(2 * count)], 2),
    ]
    schedule = FixedPruning(initial=7 * count, budget=1, count=2, interval=2)
    allocator = RankAllocator(matrices, schedule, score=score)
    allocator.step()
    counted = []
    for _ in range(2):
        for call in (allocator.score, allocator.step, allocator.ranks):
            with kit.Counted() as mode:
                call()
            counted.append(mode.operations)
    assert [allocation.step for allocation in allocator.history] == [2]
    return counted


@pytest.mark.parametrize("score", ["sensitivity", "magnitude"])
def test_operations_do_not_grow_with_the_matrices(kit, score):
    few, many = (operations(kit, count, score) for count in (2, 50))
    assert few == many


def test_a_step_that_does_not_prune_touches_no_tensor(kit):
    _, _, _, score, step, _ = operations(kit, 3)
    assert not score
    assert not step


def test_score_and_step_read_no_tensor_on_the_host(kit):
    score, step, _, *_ = operations(kit, 3)
    assert sum(score.values()) > 0
    assert sum(step.values()) > 0
    assert not HOST_READS & (score.keys() | step.keys())


def test_the_counter_sees_a_host_read(kit):
    with kit.Counted() as mode:
        torch.ones(()).item()
    assert HOST_READS & mode.operations.keys()
