"""The twins: the rules in plain Python, one component after the other; matrices to prune."""

import math
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rank_budget import BudgetError, RankedMatrices


def fixed_pruning(initial, budget, count, interval, step):
    """Count down one step after the other."""
    live = initial
    for t in range(1, step + 1):
        if t % interval == 0:
            live = max(budget, live - count)
    return live


def cubic_budget(initial, final, total, warmup, cooldown, interval, step):
    """AdaLoRA's published code, in exact fractions, at the last step that could prune."""
    live = initial
    for t in range(1, step + 1):
        if t >= total - cooldown:
            live = final
        elif t > warmup and t % interval == 0:
            left = 1 - Fraction(t - warmup, total - cooldown - warmup)
            live = math.floor(final + (initial - final) * left**3)
    return live


def prune(scores, alive, count):
    """Remove the ``count`` live keys of least score, the first of equal ones; NaN is highest."""
    survivors = set(alive)
    for _ in range(min(count, len(survivors))):
        lowest = None
        for key in sorted(survivors):
            worth = math.inf if math.isnan(scores[key]) else scores[key]
            if lowest is None or worth < lowest[0]:
                lowest = (worth, key)
        survivors.remove(lowest[1])
    return survivors


class Counted(TorchDispatchMode):
    """Counts tensor operations by name."""

    def __init__(self):
        super().__init__()
        self.operations = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def group(names, rank=3, *, masks=None):
    """Matrices of equal rank with random values and gradients."""
    shape = (len(names), rank)
    mask = torch.ones(shape, dtype=torch.bool) if masks is None else torch.tensor(masks)
    return RankedMatrices(tuple(names), torch.randn(shape), torch.randn(shape), mask)


def error_text(call, *args, **options):
    with pytest.raises(BudgetError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def twin():
    return SimpleNamespace(fixed_pruning=fixed_pruning, cubic_budget=cubic_budget, prune=prune)


@pytest.fixture(scope="session")
def kit():
    """Helpers that several files of tests use."""
    return SimpleNamespace(Counted=Counted, error_text=error_text, group=group)
