"""One step against a literal twin; the order of its parts; micro-batches and clipping."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

GAMMA, SCALING = 0.1, 4.0 / 3
PRUNING = ["adalora", "hyperadalora recurrent token_rms", "hyperadalora static none"]


def twin_forward(run: Any, factors: dict[str, Tensor], masks: dict[str, Tensor], x: Tensor) -> Any:
    def linear(name: str, x: Tensor) -> Tensor:
        base = run.method.layers[name].base
        if f"{name}.a" in factors:
            update = factors[f"{name}.b"] @ factors[f"{name}.a"]
        else:
            scale = torch.diag(factors[f"{name}.lam"] * masks[name])
            update = factors[f"{name}.p"] @ scale @ factors[f"{name}.q"]
        y = x @ (base.weight + SCALING * update).T
        return y if base.bias is None else y + base.bias

    for block in range(len(run.model)):
        x = x + linear(f"{block}.down", torch.tanh(linear(f"{block}.up", x)))
    return x


def twin_penalty(factors: dict[str, Tensor], matrices: int) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for name, factor in factors.items():
        if name.endswith((".p", ".q")):
            rows = factor.T if name.endswith(".p") else factor
            total = total + ((rows @ rows.T - torch.eye(len(rows))) ** 2).sum() / matrices
    return total


def twin_step(
    run: Any,
    factors: dict[str, Tensor],
    masks: dict[str, Tensor],
    samples: Tensor,
    *,
    prune: int,
    lr: float,
    limit: float,
) -> tuple[float, float, float]:
    """Change ``factors`` and ``masks`` as one step of AdaLoRA or LoRA with plain descent does."""
    names = list(factors)
    leaves = {name: value.clone().requires_grad_() for name, value in factors.items()}
    y = twin_forward(run, leaves, masks, samples)
    loss = sum(((y_i - x_i.flip(-1)) ** 2).sum() for x_i, y_i in zip(samples, y, strict=True))
    loss = loss / len(samples)
    task = torch.autograd.grad(loss, list(leaves.values()), retain_graph=True)
    scores = []
    for name, gradient in zip(names, task, strict=True):
        if name.endswith(".lam"):
            matrix = name.removesuffix(".lam")
            for i in range(len(gradient)):
                score = abs(float(factors[name][i] * gradient[i]))
                if masks[matrix][i]:
                    scores.append((score, matrix, i))
    penalty = twin_penalty(leaves, len(run.method.layers))
    total = loss + GAMMA * penalty if scores else loss
    gradients = torch.autograd.grad(total, list(leaves.values()))
    norm = sum(float((gradient**2).sum()) for gradient in gradients) ** 0.5
    for name, gradient in zip(names, gradients, strict=True):
        factors[name] = factors[name] - lr * gradient * min(1.0, limit / (norm + 1e-6))
    for _, matrix, i in sorted(scores)[:prune]:
        masks[matrix][i] = False
    for matrix, mask in masks.items():
        factors[f"{matrix}.lam"] = factors[f"{matrix}.lam"] * mask
    return float(loss.detach()), float(penalty.detach()), norm


def live_factors(run: Any) -> dict[str, Tensor]:
    return {
        f"{name}.{role}": factor.detach().clone()
        for name, layer in run.method.layers.items()
        for role, factor in layer.factors()
    }


def live_masks(run: Any) -> dict[str, Tensor]:
    return {
        name: layer.rank_mask.clone()
        for name, layer in run.method.layers.items()
        if hasattr(layer, "rank_mask")
    }


@pytest.mark.parametrize("case", ["lora", "adalora"])
def test_steps_equal_the_literal_twin(small: SimpleNamespace, case: str) -> None:
    run = small.build(case, optimizer=torch.optim.SGD, lr=0.02)
    factors, masks = live_factors(run), live_masks(run)
    clipped = set()
    for step in range(1, 10):
        micro_batches = small.batches(step, (2, 1, 3))
        prune = {3: 3, 6: 3}.get(step, 0) if masks else 0
        limit = 1.5 if step % 2 else 1e3
        report = run.step(micro_batches, max_grad_norm=limit)
        loss, penalty, norm = twin_step(
            run, factors, masks, torch.cat(micro_batches), prune=prune, lr=0.02, limit=limit
        )
        clipped.add(norm > limit)
        assert report.loss == pytest.approx(loss, rel=1e-11)
        assert report.penalty == pytest.approx(penalty, rel=1e-11)
        assert report.grad_norm == pytest.approx(norm, rel=1e-11)
        assert (report.tokens, report.finite) == (6, True)
        assert (report.allocation.pruned if report.allocation else 0) == prune
        torch.testing.assert_close(live_factors(run), factors, rtol=1e-10, atol=1e-12)
        assert {name: mask.tolist() for name, mask in live_masks(run).items()} == {
            name: mask.tolist() for name, mask in masks.items()
        }
        assert report.live_ranks == (sum(int(m.sum()) for m in masks.values()) or 12)
    assert clipped == {True, False}
    assert report.live_ranks == (6 if masks else 12)


PARTS = [
    ("refresh", "owner.refresh"),
    ("score", "allocator.score"),
    ("penalty", "penalty"),
    ("pull back", "owner.backward"),
    ("clip", "clip"),
    ("step", "optimizer.step"),
    ("allocate", "allocator.step"),
    ("commit", "owner.commit"),
]


def test_the_order_of_a_step(
    small: SimpleNamespace, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small.build(case)
    seen: list[str] = []

    def record(owner: Any, name: str, part: str) -> None:
        function = getattr(owner, name)

        def recorded(*arguments: Any, **options: Any) -> Any:
            seen.append(part)
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, recorded)

    for part, place in PARTS:
        owner, _, name = place.rpartition(".")
        where = {"owner": run.method.owner, "allocator": run.method.allocator}.get(owner)
        if where is not None:
            record(where, name, part)
    record(run.optimizer, "step", "step")
    record(__import__("hyper_tune.step").step, "accumulate_orthogonality_gradient_", "penalty")
    record(__import__("hyper_tune.step").step, "clip_grads_with_norm_", "clip")

    with run.method.step(run.optimizer, 1.0) as step:
        for x in small.batches(0):
            seen.append("micro-batch")
            step.backward(run.loss_sum(x), tokens=len(x))
    expected = [part for part, _ in PARTS]
    if run.method.allocator is None:
        expected = [part for part in expected if part not in ("score", "penalty", "allocate")]
    assert seen == [expected[0], "micro-batch", "micro-batch", *expected[1:]]


@pytest.mark.parametrize("case", PRUNING)
def test_pruned_components_are_zero_in_the_state(small: SimpleNamespace, case: str) -> None:
    run = small.build(case)
    pruned = 0
    for step in range(1, 10):
        run.method.write_factors_()
        before = live_factors(run)
        report = run.step(small.batches(step))
        pruned += report.allocation.pruned if report.allocation else 0
        masks = live_masks(run)
        after = live_factors(run)
        for name, mask in masks.items():
            assert torch.equal(
                after[f"{name}.lam"][~mask], torch.zeros(int((~mask).sum())).double()
            )
            assert bool((after[f"{name}.lam"][mask] != 0).all())
            if "hyper" in case:
                assert torch.equal(after[f"{name}.lam"][mask], before[f"{name}.lam"][mask])
        assert sum(int((~mask).sum()) for mask in masks.values()) == pruned
        if "recurrent" in case:
            state = run.method.owner.state_dict()
            for role in ("p", "lam", "q"):
                groups = [g.values for g in run.method.stack.groups if g.role == role]
                for position, values in enumerate(groups):
                    assert torch.equal(state[f"state_{role}_{position}"], values)
    assert pruned == 6


def gradients_of(small: SimpleNamespace, case: str, sizes: tuple[int, ...], **options: Any) -> Any:
    run = small.build(case, optimizer=small.Recorder)
    report = run.step(small.batches(0, sizes), **options)
    return report, run.optimizer.seen


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 2), (3, 1)])
def test_any_split_in_micro_batches_gives_the_same_step(
    small: SimpleNamespace, case: str, sizes: tuple[int, ...]
) -> None:
    whole, expected = gradients_of(small, case, (4,), max_grad_norm=None)
    split, found = gradients_of(small, case, sizes, max_grad_norm=None)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
    assert max(float(gradient.abs().max()) for gradient in expected) > 1e-3
    for figure in ("loss", "penalty", "grad_norm"):
        assert getattr(split, figure) == pytest.approx(getattr(whole, figure), rel=1e-11)
    assert split.tokens == whole.tokens == 4


def test_tokens_weigh_the_gradient_not_the_micro_batches(small: SimpleNamespace) -> None:
    run = small.build("lora", optimizer=small.Recorder)
    x = small.batches(0, (4,))[0]
    with run.method.step(run.optimizer) as step:
        step.backward(run.loss_sum(x[:1]), tokens=torch.tensor(5))
        step.backward(run.loss_sum(x[1:]), tokens=2)
    leaves = [parameter.detach().requires_grad_() for parameter in run.method.parameters()]
    assert len(leaves) == len(run.optimizer.seen)
    whole, expected = gradients_of(small, "lora", (4,), max_grad_norm=None)
    torch.testing.assert_close([g * 7 / 4 for g in run.optimizer.seen], expected)
    assert step.report.loss == pytest.approx(whole.loss * 4 / 7, rel=1e-12)
    assert step.report.tokens == 7


@pytest.mark.parametrize("limit", [1e-3, 0.5, 1e3])
def test_clipping_is_torchs(small: SimpleNamespace, case: str, limit: float) -> None:
    free, unclipped = gradients_of(small, case, (4,), max_grad_norm=None)
    report, found = gradients_of(small, case, (4,), max_grad_norm=limit)
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in unclipped]
    for parameter, gradient in zip(parameters, unclipped, strict=True):
        parameter.grad = gradient
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    assert report.grad_norm == free.grad_norm == float(norm)
    for gradient, parameter in zip(found, parameters, strict=True):
        assert torch.equal(gradient, parameter.grad)


def test_a_loss_that_the_step_was_not_told_is_not_divided(
    small: SimpleNamespace, case: str
) -> None:
    told, expected = gradients_of(small, case, (4,), max_grad_norm=None)
    run = small.build(case, optimizer=small.Recorder)
    with run.method.step(run.optimizer) as step:
        (run.loss_sum(small.batches(0, (4,))[0]) / 4).backward()
    assert (step.report.loss, step.report.tokens, step.report.finite) == (None, 0, True)
    assert step.report.grad_norm == pytest.approx(told.grad_norm, rel=1e-12)
    torch.testing.assert_close(run.optimizer.seen, expected, rtol=1e-11, atol=1e-13)


def test_gradients_are_gone_after_the_step(small: SimpleNamespace, case: str) -> None:
    run = small.build(case)
    run.step(small.batches(0))
    assert torch.equal(run.method.stack.grads, torch.zeros_like(run.method.stack.grads))
    for parameter in run.method.parameters():
        assert parameter.grad is None or not parameter.grad.any()
    run.method.stack.check_bound()
