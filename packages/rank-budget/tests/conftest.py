"""The twins: the rules in plain Python, one component after the other; matrices to prune."""

import math
from collections import Counter
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from rank_budget import BudgetError, RankedMatrices, Triplet


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


class Algorithm1:
    """AdaLoRA's averages and scores, number by number. Factors are {role: rows of numbers}.

    A row belongs to a component: λ has one number in it, P a column, Q a row.
    """

    def __init__(self, beta1, beta2):
        self.beta1, self.beta2 = beta1, beta2
        self.mean, self.spread = {}, {}

    def observe(self, name, values, grads):
        for role, rows in values.items():
            for i, row in enumerate(rows):
                for j, value in enumerate(row):
                    key = (name, role, i, j)
                    now = abs(value * grads[role][i][j])
                    before = self.mean.get(key, 0.0)
                    self.mean[key] = self.beta1 * before + (1 - self.beta1) * now
                    change = abs(now - self.mean[key])
                    before = self.spread.get(key, 0.0)
                    self.spread[key] = self.beta2 * before + (1 - self.beta2) * change

    def score(self, name, component):
        total = 0.0
        for role in ("lam", "p", "q"):
            keys = [k for k in self.mean if k[:3] == (name, role, component)]
            products = [self.mean[key] * self.spread[key] for key in keys]
            total += sum(products) / len(products) if products else 0.0
        return total


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


def rows_of(layer, attribute=lambda tensor: tensor):
    """The rows of a layer's factors, a row per component, as plain numbers."""
    return {
        "p": attribute(layer.p).T.tolist(),
        "lam": attribute(layer.lam).reshape(-1, 1).tolist(),
        "q": attribute(layer.q).tolist(),
    }


def triplet(rank, out, into, *, mask=True, dtype=torch.float64, column=False):
    """Three random tensors with random gradients."""
    shapes = ((out, rank), (rank, 1) if column else (rank,), (rank, into))
    factors = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    for factor in factors:
        factor.grad = torch.randn_like(factor)
    return Triplet(*factors, torch.ones(rank, dtype=torch.bool) if mask else None)


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
    return SimpleNamespace(
        Algorithm1=Algorithm1,
        fixed_pruning=fixed_pruning,
        cubic_budget=cubic_budget,
        prune=prune,
        rows_of=rows_of,
    )


@pytest.fixture(scope="session")
def kit():
    """Helpers that several files of tests use."""
    return SimpleNamespace(Counted=Counted, error_text=error_text, group=group, triplet=triplet)
