"""The number of tensor operations depends on the shapes, not on how many matrices there are."""

import pytest
import torch

from lowrank_adapters import (
    SVD,
    FactorStack,
    LoRA,
    accumulate_orthogonality_gradient_,
    orthogonality_penalty,
)

HOST_READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "_to_host"}


def operations(kit, blocks, make):
    """The operations of each call of a training step on the stack, by name."""
    _, layers = kit.adapted(make, blocks=blocks)
    stack = FactorStack(layers)
    groups = [group for group in stack.groups if group.role in "pq"]
    calls = {
        "zero_grads_": stack.zero_grads_,
        "bind_grads_": stack.bind_grads_,
        "check_bound": stack.check_bound,
    }
    if groups:
        values = [group.values for group in groups]
        calls["penalty"] = lambda: orthogonality_penalty(values, len(layers))
        calls["gradient"] = lambda: accumulate_orthogonality_gradient_(groups, 0.1)
        calls["unsquared gradient"] = lambda: accumulate_orthogonality_gradient_(
            groups, 0.1, squared=False
        )
    counted = {}
    for name, call in calls.items():
        with kit.Counted() as mode:
            call()
        counted[name] = mode.operations
    return counted


@pytest.mark.parametrize("make", [SVD(rank=2, alpha=1.0), LoRA(rank=2, alpha=1.0)])
def test_operations_do_not_grow_with_the_matrices(kit, make):
    few, many = (operations(kit, blocks, make) for blocks in (1, 9))
    assert few == many
    assert few["zero_grads_"] == {"zero_": 1}
    assert not few["check_bound"]
    assert not few["bind_grads_"]


def test_gradient_is_two_products_for_each_group(kit):
    _, layers = kit.adapted()
    groups = [group for group in FactorStack(layers).groups if group.role in "pq"]
    with kit.Counted() as mode:
        accumulate_orthogonality_gradient_(groups, 0.1)
    assert mode.operations["bmm"] == len(groups)
    assert mode.operations["baddbmm_"] == len(groups)


def test_no_call_reads_a_tensor_on_the_host(kit):
    for counter in operations(kit, 2, SVD(rank=2, alpha=1.0)).values():
        assert not HOST_READS & counter.keys()


def test_the_counter_sees_a_host_read(kit):
    with kit.Counted() as mode:
        torch.ones(()).item()
    assert HOST_READS & mode.operations.keys()
