"""The number of tensor operations of a step depends on the shapes, not on how many matrices."""

from collections import Counter
from contextlib import suppress

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hyper_core import AttentionConfig, ConvConfig, GeneratedParameters, MLPConfig

CONFIG = AttentionConfig(hidden=8, heads=2, feed_forward=8)
BODIES = {
    "attention": CONFIG,
    "conv": ConvConfig(widths=(4, 6), blocks=(1, 1)),
    "mlp": MLPConfig(hidden=4, widths=(6,)),
}
HOST_READS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "tolist", "numpy", "cpu"}


class Counted(TorchDispatchMode):
    """Counts tensor operations by name, and the reads of Python that are none."""

    def __init__(self):
        super().__init__()
        self.operations = Counter()
        self._reads = _Reads(self.operations)

    def __enter__(self):
        self._reads.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._reads.__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


class _Reads(TorchFunctionMode):
    """`tolist` and `numpy` dispatch nothing, nor does `cpu` where there is no other device."""

    def __init__(self, operations):
        super().__init__()
        self._operations = operations

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function.__name__ in ("tolist", "numpy", "cpu"):
            self._operations[function.__name__] += 1
        return function(*args, **(kwargs or {}))


def stacks(count):
    return {
        "p": [nn.Parameter(torch.randn(count, 3, 5)), nn.Parameter(torch.randn(count, 2, 4))],
        "lam": [nn.Parameter(torch.randn(2 * count, 3, 1))],
    }


def matrices(count):
    return {"weight": [nn.Parameter(torch.randn(3, 5)) for _ in range(count)]}


def operations(leaves, normalisation, config=CONFIG, sharing="all", output="unit_rows"):
    generated = GeneratedParameters(
        leaves,
        config=config,
        sharing=sharing,
        outputs={next(iter(leaves)): output},
        gradient_normalisation=normalisation,
    )
    for tensors in leaves.values():
        for leaf in tensors:
            leaf.grad = torch.ones_like(leaf)
    counted = []
    for step in (generated.refresh, generated.backward, generated.commit):
        with Counted() as mode:
            step()
        counted.append(mode.operations)
    return counted


@pytest.mark.parametrize("normalisation", ["none", "token_rms"])
@pytest.mark.parametrize("make", [stacks, matrices])
def test_operations_do_not_grow_with_the_matrices(make, normalisation):
    few, many = (operations(make(count), normalisation) for count in (3, 40))
    assert few == many
    assert min(sum(counter.values()) for counter in few) > 0


def thirds(count):
    """Labels that share a network among every third matrix, in an order that is not theirs."""
    return {"p": [i % 3 for i in range(2 * count)], "lam": [i % 3 for i in range(2 * count)]}


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("sharing", ["all", "each", "thirds"])
def test_operations_do_not_grow_with_the_matrices_or_their_networks(body, sharing):
    few, many = (
        operations(
            stacks(count),
            "token_rms",
            BODIES[body],
            thirds(count) if sharing == "thirds" else sharing,
            "orthonormal",
        )
        for count in (4, 40)
    )
    assert few == many


def test_no_step_reads_a_tensor_on_the_host():
    for sharing, output in (("all", "unit_rows"), ("each", "free"), (thirds(3), "orthonormal")):
        for counter in operations(stacks(3), "token_rms", sharing=sharing, output=output):
            assert not HOST_READS & counter.keys()


@pytest.mark.parametrize("read", [torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy])
def test_the_counter_sees_a_host_read(read):
    # The package needs no numpy: where there is none, asking for it is what is counted.
    with Counted() as mode, suppress(RuntimeError):
        read(torch.ones(()))
    assert HOST_READS & mode.operations.keys()
