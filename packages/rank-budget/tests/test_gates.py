"""SoRA's proximal step and SaLoRA's L0 gate against their formulas, number by number."""

import math

import torch

from rank_budget import OneShot, RankAllocator, Triplet
from rank_budget.gates import expected_l0, l0_gate, proximal_gate_


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_the_proximal_step_is_the_minimum_that_defines_it():
    gates = [torch.randn(5, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]
    before = [gate.tolist() for gate in gates]
    proximal_gate_(gates, 0.3)
    grid = torch.linspace(-4, 4, 80001, dtype=torch.float64)
    for gate, values in zip(gates, before, strict=True):
        for found, value in zip(gate.tolist(), values, strict=True):
            best = grid[((grid - value).square() / 2 + 0.3 * grid.abs()).argmin()].item()
            assert abs(found - best) <= 1e-4
            assert (found == 0) == (abs(value) <= 0.3)


def test_the_proximal_step_keeps_parameters_and_takes_no_gradient():
    gate = torch.nn.Parameter(torch.tensor([1.0, 0.1]))
    proximal_gate_([gate], 0.25)
    assert gate.is_leaf
    assert gate.tolist() == [0.75, 0]


def test_the_gate_is_its_formula_with_and_without_noise():
    log_alpha = torch.linspace(-6, 6, 13, dtype=torch.float64, requires_grad=True)
    noise = torch.rand(13, dtype=torch.float64)
    for u in (None, noise):
        found = l0_gate(log_alpha, u)
        for i, a in enumerate(log_alpha.tolist()):
            s = a
            if u is not None:
                s = (math.log(u[i]) - math.log(1 - u[i]) + a) / (2 / 3)
            expected = min(1.0, max(0.0, sigmoid(s) * (1.1 - -0.1) + -0.1))
            assert abs(found[i].item() - expected) < 1e-12
    assert torch.autograd.gradcheck(lambda a: l0_gate(a, noise), log_alpha)


def test_a_pruned_gate_is_closed_by_its_mask():
    log_alpha = torch.nn.Parameter(torch.tensor([3.0, -3.0, 2.0, -1.0]))
    before = log_alpha.tolist()
    log_alpha.grad = torch.zeros(4)
    layer = Triplet(torch.randn(4, 4), log_alpha, torch.randn(4, 4), torch.ones(4).bool())
    allocator = RankAllocator(
        {"w": layer}, OneShot(4, 2, at=1), score=lambda log_alpha, _: expected_l0(log_alpha)
    )
    allocator.step()
    assert log_alpha.tolist() == before
    gates = (l0_gate(log_alpha) * layer.rank_mask).tolist()
    assert gates == [l0_gate(log_alpha)[0].item(), 0, l0_gate(log_alpha)[2].item(), 0]
    assert min(gates[0], gates[2]) > 0.5


def test_the_expected_l0_is_how_often_a_gate_is_not_zero():
    log_alpha = torch.tensor([-2.0, -0.5, 0.0, 1.0], dtype=torch.float64)
    noise = torch.rand(200_000, 4, dtype=torch.float64)
    frequency = (l0_gate(log_alpha, noise) > 0).double().mean(0)
    torch.testing.assert_close(expected_l0(log_alpha), frequency, rtol=0, atol=5e-3)
    exact = [sigmoid(a - 2 / 3 * math.log(0.1 / 1.1)) for a in log_alpha.tolist()]
    torch.testing.assert_close(expected_l0(log_alpha), log_alpha.new_tensor(exact))
