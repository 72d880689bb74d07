"""Steps of DoRA and DyLoRA, learned and generated, against literal twins in one autograd graph."""

import hashlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hyper_tune import MethodConfig, SamplingSettings, UserError, assemble

ALPHA, RANK = 4.0, 3
LEARNED = ["dora", "dora scalar", "dylora", "dylora each"]
GENERATED = [
    "hyperdora recurrent none",
    "hyperdora static none",
    "hyperdora static none scalar",
    "hyperdylora recurrent none",
    "hyperdylora static none each",
]


def twin_rank(run: Any, step: int, name: str) -> int:
    """DyLoRA's draw: the hash of seed and step (and matrix), 1 to RANK."""
    state = run.method.sampled.state_dict()
    text = f"{state['seed']} {step}" if state["shared"] else f"{state['seed']} {step} {name}"
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    return 1 + number % RANK


def twin_linear(run: Any, name: str, factors: dict[str, Tensor], x: Tensor, step: int) -> Tensor:
    """One adapted layer of either method, by its paper's formula."""
    base = run.method.layers[name].base
    a, b = factors[f"{name}.a"], factors[f"{name}.b"]
    bias = 0 if base.bias is None else base.bias
    if run.method.sampled is not None:
        rank = twin_rank(run, step, name)
        return x @ base.weight.T + ALPHA / rank * (x @ a[:rank].T @ b[:, :rank].T) + bias
    weight = base.weight + ALPHA / RANK * (b @ a)
    if f"{name}.scale" in factors:
        weight = base.weight + factors[f"{name}.scale"] * ALPHA / RANK * (b @ a)
    if f"{name}.magnitude" in factors:
        norms = torch.stack([row.norm() for row in weight]).detach()
        weight = torch.diag(factors[f"{name}.magnitude"] / norms) @ weight
    return x @ weight.T + bias


def twin_loss(run: Any, factors: dict[str, Tensor], x: Tensor, step: int) -> Tensor:
    """The mean of the fixture's loss over the samples."""
    y = x
    for block in range(len(run.model)):
        up = twin_linear(run, f"{block}.up", factors, y, step)
        y = y + twin_linear(run, f"{block}.down", factors, torch.tanh(up), step)
    return ((y - x.flip(-1)) ** 2).sum() / len(x)


def factors_of(run: Any) -> dict[str, Tensor]:
    return {
        f"{name}.{role}": factor.detach().clone()
        for name, layer in run.method.layers.items()
        for role, factor in layer.factors()
    }


@pytest.mark.parametrize("case", LEARNED)
def test_steps_equal_the_literal_twin(small: SimpleNamespace, case: str) -> None:
    run = small.build(case, optimizer=torch.optim.SGD, lr=0.02)
    factors = factors_of(run)
    ranks = set()
    for step in range(8):
        micro_batches = small.batches(step, (2, 1, 3))
        report = run.step(micro_batches, max_grad_norm=None)
        leaves = {name: value.requires_grad_() for name, value in factors.items()}
        loss = twin_loss(run, leaves, torch.cat(micro_batches), step)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        factors = {
            name: (value - 0.02 * gradient).detach()
            for (name, value), gradient in zip(leaves.items(), gradients, strict=True)
        }
        assert report.loss == pytest.approx(float(loss.detach()), rel=1e-12)
        norm = sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5
        assert report.grad_norm == pytest.approx(norm, rel=1e-12)
        torch.testing.assert_close(factors_of(run), factors, rtol=1e-11, atol=1e-13)
        if run.method.sampled is not None:
            ranks.add(tuple(twin_rank(run, step, name) for name in run.method.layers))
    if "dylora" in case:
        assert len(ranks) >= 3
        assert any(len(set(drawn)) > 1 for drawn in ranks) == ("each" in case)


def generated_in_the_graph(run: Any, static: bool) -> dict[str, Tensor]:
    """A and B of each layer as functions of the hypernetworks' weights; rows of A of norm one."""
    owner = getattr(run.method.owner, "generated", run.method.owner)
    factors = {}
    for role in ("a", "b"):
        groups = [group for group in run.method.stack.groups if group.role == role]
        before = [owner.get_buffer(f"state_{role}_{i}") for i in range(len(groups))]
        after = owner.hypernetworks[role](before)
        for group, start, output in zip(groups, before, after, strict=True):
            value = start + output if static else output
            for name, rows in zip(group.names, value.unbind(), strict=True):
                unit = torch.stack([row / row.norm() for row in rows]) if role == "a" else rows.T
                factors[f"{name}.{role}"] = unit
    return factors


@pytest.mark.parametrize("case", GENERATED)
def test_gradients_of_a_step_equal_one_graphs(small: SimpleNamespace, case: str) -> None:
    run = small.build(case, optimizer=small.Recorder)
    static = "static" in case
    names = [name for name, _ in run.method.owner.named_parameters()]
    micro_batches = small.batches(3, (2, 1, 3))

    factors = generated_in_the_graph(run, static)
    learned = {}
    for group in run.method.stack.groups:
        if group.role in ("magnitude", "scale"):
            for name, row in zip(group.names, group.values, strict=True):
                leaf = row[0].detach().clone().requires_grad_()
                learned[f"{name}.{group.role}"] = leaf
    loss = twin_loss(run, factors | learned, torch.cat(micro_batches), step=0)
    generators = [p for n, p in run.method.owner.named_parameters() if not is_own(n)]
    expected = torch.autograd.grad(loss, [*generators, *learned.values()])
    by_generator = expected[: len(generators)]

    report = run.step(micro_batches, max_grad_norm=None)
    found = dict(zip(names, run.optimizer.seen, strict=True))
    assert report.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    generated_names = [name for name in names if not is_own(name)]
    assert len(generated_names) == len(by_generator) > 10
    for name, gradient in zip(generated_names, by_generator, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-11, atol=1e-13, msg=name)
    assert max(float(gradient.abs().max()) for gradient in by_generator) > 1e-2
    own = dict(zip(learned, expected[len(generators) :], strict=True))
    positions: dict[str, int] = {}
    for group in run.method.stack.groups:
        if group.role in ("magnitude", "scale"):
            position = positions.setdefault(group.role, 0)
            positions[group.role] += 1
            wanted = torch.stack([own[f"{name}.{group.role}"] for name in group.names])
            gradient = found[f"{group.role}.{position}"][:, 0]
            torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-13)
            assert gradient.abs().min() > 0
    assert bool(positions) == ("dora" in case)


def is_own(name: str) -> bool:
    """Whether a trained tensor is a learned factor."""
    return name.startswith(("magnitude.", "scale."))


@pytest.mark.parametrize("case", ["dylora", "hyperdylora static none each"])
def test_all_ranks_are_in_use_between_steps(small: SimpleNamespace, case: str) -> None:
    run = small.build(case)
    masks = [layer.rank_mask for layer in run.method.layers.values()]
    seen = set()
    for step in range(8):
        assert all(bool(mask.all()) for mask in masks)
        with run.method.step(run.optimizer) as block:
            seen.add(tuple(int(mask.sum()) for mask in masks))
            block.backward(run.loss_sum(small.batches(step)[0]), tokens=2)
    assert len(seen) > 1
    assert all(bool(mask.all()) for mask in masks)
    with pytest.raises(KeyError), run.method.step(run.optimizer):
        raise KeyError
    assert all(bool(mask.all()) for mask in masks)


def test_a_step_that_was_skipped_is_drawn_again(small: SimpleNamespace) -> None:
    run = small.build("dylora")
    drawn = []
    for bad in (False, True, True, False, False, False):
        x = small.batches(0)[0] * (float("nan") if bad else 1)
        with run.method.step(run.optimizer) as block:
            drawn.append(int(run.method.layers["0.up"].rank_mask.sum()))
            block.backward(run.loss_sum(x), tokens=2)
        assert block.report.finite is not bad
    expected = [twin_rank(run, step, "") for step in (0, 1, 1, 1, 2, 3)]
    assert drawn == expected
    assert len(set(drawn)) > 1


def test_a_rank_is_chosen_for_a_block(small: SimpleNamespace) -> None:
    run = small.build("dylora")
    layer = run.method.layers["0.up"]
    whole = layer.as_lora()
    with run.method.at_rank(2):
        a, b = layer.as_lora()
    torch.testing.assert_close(a, whole[0][:2])
    torch.testing.assert_close(b, whole[1][:, :2] * RANK / 2)
    assert bool(layer.rank_mask.all())
    for rank in (0, 4, 2.0, True):
        with pytest.raises(UserError, match="must be a whole number of 1 to"):
            run.method.at_rank(rank).__enter__()
    message = "rank is 2, but lora has no nested ranks to choose from; leave it out, or train dylo"
    with pytest.raises(UserError, match=message):
        small.build("lora").method.at_rank(2).__enter__()


def test_the_seed_of_the_draws_follows_torchs() -> None:
    config = MethodConfig("dylora", init_rank=3, sampling=SamplingSettings(lowest=2, draw="each"))
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        method = assemble(torch.nn.Sequential(torch.nn.Linear(4, 4)), config, total_steps=9)
        states.append(method.state_dict()["sampled"])
    assert states[0] == states[1] != states[2]
    assert states[0] | {"seed": 0} == {
        "seed": 0, "lowest": 2, "highest": 3, "shared": False, "steps": 0
    }  # fmt: skip
