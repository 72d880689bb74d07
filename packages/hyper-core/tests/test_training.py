"""With what training loops do: loss scaling, clipping, accumulation, compilation, contexts."""

import pytest
import torch
from torch import nn

from hyper_core import AttentionConfig, GeneratedParameters

CONFIG = AttentionConfig(hidden=8, heads=2, feed_forward=8)


def make(**options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 1, bias=False))
    leaves = {"weight": [model[0].weight, model[2].weight]}
    return model, GeneratedParameters(leaves, config=CONFIG, **options)


def loss_of(model, seed):
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))
    return (model(x) - x.prod(1, keepdim=True)).square().mean()


@pytest.mark.parametrize("normalisation", ["none", "token_rms"])
def test_scaled_losses_train_as_unscaled_ones_and_a_skipped_step_commits_nothing(normalisation):
    """Step 2 overflows: the scaler skips it; the runs' other steps are the same."""
    runs = []
    for scaled in (False, True):
        model, generated = make(gradient_normalisation=normalisation)
        optimizer = torch.optim.SGD(generated.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=scaled)
        for step in range(5):
            generated.refresh()
            scaler.scale(loss_of(model, step)).backward()
            if step == 2:
                model[0].weight.grad[0, 0] = float("inf")
            scale = scaler.get_scale()
            generated.backward(scale)
            before = [p.detach().clone() for p in generated.parameters()]
            state = {name: b.clone() for name, b in generated.named_buffers()}
            if scaled:
                scaler.step(optimizer)
                scaler.update()
            elif step != 2:
                optimizer.step()
            skipped = scaler.get_scale() < scale if scaled else step == 2
            assert skipped == (step == 2)
            generated.discard() if skipped else generated.commit()
            if skipped:
                torch.testing.assert_close(list(generated.parameters()), before, rtol=0, atol=0)
                torch.testing.assert_close(dict(generated.named_buffers()), state, rtol=0, atol=0)
            model.zero_grad()
            optimizer.zero_grad()
        runs.append(generated)
    assert scaler.get_scale() == 128.0
    torch.testing.assert_close(
        dict(runs[1].state_dict()), dict(runs[0].state_dict()), rtol=1e-5, atol=1e-7
    )


def test_clipping_bounds_the_gradient_of_all_weights():
    model, generated = make()
    generated.refresh()
    (1e4 * loss_of(model, 0)).backward()
    generated.backward()
    before = torch.nn.utils.clip_grad_norm_(generated.parameters(), 1.0)
    assert before > 1
    norms = torch.stack([p.grad.norm() for p in generated.parameters()])
    assert norms.norm().item() == pytest.approx(1.0, abs=1e-4)


def test_accumulated_micro_batches_give_the_gradient_of_their_sum():
    gradients = []
    for split in (True, False):
        model, generated = make()
        generated.refresh()
        if split:
            for seed in range(3):
                loss_of(model, seed).backward()
        else:
            sum(loss_of(model, seed) for seed in range(3)).backward()
        generated.backward()
        gradients.append([p.grad for p in generated.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_a_compiled_model_and_compiled_networks_train_the_same():
    runs = []
    for compiled in (False, True):
        model, generated = make(outputs={"weight": "unit_rows"})
        run = model
        if compiled:
            run = torch.compile(model, backend="aot_eager", fullgraph=True)
            for network in generated.hypernetworks.values():
                network.compile(backend="aot_eager", fullgraph=True)
        optimizer = torch.optim.SGD(generated.parameters(), lr=0.05)
        for step in range(3):
            generated.refresh()
            loss_of(run, step).backward()
            generated.backward()
            optimizer.step()
            generated.commit()
            model.zero_grad()
            optimizer.zero_grad()
        runs.append(generated)
    torch.testing.assert_close(
        dict(runs[1].state_dict()), dict(runs[0].state_dict()), rtol=1e-5, atol=1e-6
    )


def test_context_of_the_step_reaches_all_roles_and_its_weights_learn():
    leaves = {"p": [torch.randn(2, 3, 4)], "q": [torch.randn(3, 5)]}
    generated = GeneratedParameters(leaves, config=CONFIG, context_width=2)
    written = []
    for progress in (0.0, 1.0):
        generated.refresh(torch.tensor([progress, 1 - progress]))
        written.append([leaf.clone() for tensors in leaves.values() for leaf in tensors])
    for start, end in zip(*written, strict=True):
        assert (start - end).abs().amax((-2, -1)).min() > 0.05
    for tensors in leaves.values():
        tensors[0].grad = torch.ones_like(tensors[0])
    generated.backward()
    for network in generated.hypernetworks.values():
        assert network.context.weight.grad.abs().max() > 0


def test_context_rows_follow_the_leaves_where_stacks_do_not():
    """Leaves of other shapes between them, so that the stacks reorder the matrices."""
    shapes = [(3, 4), (3, 5), (3, 4), (2, 3, 5)]
    leaves = [torch.randn(*shape) for shape in shapes]
    generated = GeneratedParameters({"p": leaves}, config=CONFIG, context_width=5)
    generated.refresh(torch.zeros(5, 5))
    before = [leaf.clone() for leaf in leaves]
    context = torch.zeros(5, 5)
    context[1] = 1.0  # the second matrix is the second leaf
    generated.refresh({"p": context})
    changed = [(leaf - old).abs().max() > 1e-3 for leaf, old in zip(leaves, before, strict=True)]
    assert changed == [False, True, False, False]
    context[:] = 0
    context[4] = 1.0  # the last matrix of the last leaf
    generated.refresh({"p": context})
    assert (leaves[3][1] - before[3][1]).abs().max() > 1e-3
    torch.testing.assert_close(leaves[3][0], before[3][0], rtol=0, atol=0)


def test_parameter_groups_hold_every_weight_once_with_its_learning_rate():
    leaves = {"p": [torch.randn(2, 3, 4)], "lam": [torch.randn(2, 3, 1)]}
    generated = GeneratedParameters(leaves, config=CONFIG, context_width=2)
    groups = generated.parameter_groups(
        1e-3, parts={"body": 0.5, "embeddings": 3.0}, roles={"lam": 0.1}
    )
    found = {group["name"]: group["lr"] for group in groups}
    assert found == pytest.approx(
        {
            "p.input_projection": 1e-3,
            "p.body": 5e-4,
            "p.output_projection": 1e-3,
            "p.embeddings": 3e-3,
            "lam.input_projection": 1e-4,
            "lam.body": 5e-5,
            "lam.output_projection": 1e-4,
            "lam.embeddings": 3e-4,
        }
    )
    torch.optim.Adam(groups)
    names = {id(p): name for name, p in generated.named_parameters()}
    parts = {g["name"]: sorted(names[id(p)].split(".", 2)[2] for p in g["params"]) for g in groups}
    assert parts["p.input_projection"] == ["context.weight", "inputs.4.weight"]
    assert parts["p.output_projection"] == ["outputs.4.bias", "outputs.4.weight"]
    assert parts["p.embeddings"] == ["embedding"]
    assert all(name.startswith("trunk.") for name in parts["p.body"])
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(names)
