"""The recursion over many steps: bounded and apart with the defaults, and not without them."""

import warnings

import pytest
import torch
from torch.nn import functional

from hyper_core import PRESETS, AttentionConfig, GeneratedParameters, HyperError, diagnose
from hyper_core.recursion import Recursion

MATRICES, RANK, WIDTH = 12, 4, 48
SMALL = AttentionConfig(hidden=32, heads=4, feed_forward=64)


def make(config=SMALL, outputs="unit_rows", **options):
    p = functional.normalize(torch.randn(MATRICES, RANK, WIDTH), dim=-1).requires_grad_()
    generated = GeneratedParameters({"p": [p]}, config=config, outputs={"p": outputs}, **options)
    return p, generated


def train(p, generated, steps, lr=1e-3):
    """Fit other unit rows with Adam; return the losses."""
    target = functional.normalize(torch.randn(p.shape), dim=-1)
    optimizer = torch.optim.Adam(generated.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        generated.refresh()
        loss = (p - target).square().sum() / MATRICES
        p.grad = None
        optimizer.zero_grad()
        loss.backward()
        generated.backward()
        optimizer.step()
        generated.commit()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("outputs", ["unit_rows", "orthonormal", "free"])
def test_a_thousand_steps_at_fixed_weights_stay_bounded_and_apart(recwarn, outputs):
    p, generated = make(outputs=outputs)
    for _ in range(1000):
        generated.refresh()
        generated.commit()
    figures = diagnose(generated).roles["p"]
    assert 0.5 < p.detach().norm(dim=-1).min() < p.detach().norm(dim=-1).max() < 2
    assert figures.cosine < 0.45
    assert figures.effective_rank > 2
    assert not list(recwarn)


@pytest.mark.parametrize("name", PRESETS)
def test_matrices_and_components_of_every_preset_stay_apart(recwarn, name):
    p, generated = make(config=name)
    for _ in range(20):
        generated.refresh()
        generated.commit()
        tokens = p.detach().flatten(0, 1)
        figures = diagnose(generated).roles["p"]
        # With its sign, unrelated tokens have a mean cosine of zero; a common part adds its square.
        assert (tokens @ tokens.mT - torch.eye(len(tokens))).mean().abs() < 0.04
        assert figures.cosine < 0.2
        assert figures.effective_rank > 0.75 * RANK
    assert not list(recwarn)


@pytest.mark.parametrize("options", [{}, {"outputs": {"p": "unit_rows"}}], ids=["all", "rows"])
def test_a_thousand_trained_steps_with_the_defaults_stay_bounded_apart_and_learn(recwarn, options):
    """With all of them, and with the rows that HyperAdaLoRA has."""
    p = functional.normalize(torch.randn(MATRICES, RANK, WIDTH), dim=-1).requires_grad_()
    generated = GeneratedParameters({"p": [p]}, config=SMALL, **options)
    losses = train(p, generated, 1000)
    figures = diagnose(generated).roles["p"]
    torch.testing.assert_close(
        p.detach().norm(dim=-1), torch.ones(MATRICES, RANK), rtol=0, atol=1e-5 if options else 0.1
    )
    assert losses[-1] < 0.1 * losses[0]
    assert figures.cosine < 0.25
    assert figures.effective_rank > RANK / 2
    assert not list(recwarn)


def test_small_embeddings_make_the_components_of_a_matrix_one():
    """As found in trials, with σ = 0.02: step by step, components become one, and matrices too."""
    generated = make()[1]
    with torch.no_grad():
        generated.hypernetworks["p"].embedding.mul_(0.02)
    figures = []
    for _ in range(100):
        generated.refresh()
        generated.commit()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            figures.append(diagnose(generated).roles["p"])
    first, last = figures[0], figures[-1]
    assert first.effective_rank > 2.5
    assert last.effective_rank < 1.2
    assert first.cosine < 0.25
    assert last.cosine > 0.5
    with pytest.warns(UserWarning, match="collapse into one"):
        found = " ".join(diagnose(generated).warnings)
    assert "to one another, expected at most 0.5: they collapse into one" in found
    assert "their components collapse into one" in found


def test_small_embeddings_learn_later():
    losses = []
    for scale in (1.0, 0.02):
        torch.manual_seed(0)
        p, generated = make()
        with torch.no_grad():
            generated.hypernetworks["p"].embedding.mul_(scale)
        losses.append(train(p, generated, 60)[-1])
    assert losses[0] < 0.6 * losses[1]


def test_outputs_without_a_scale_are_far_from_orthonormal_and_drift_further():
    """With torch's own start of W_out and free outputs; the LayerNorms keep it from infinity."""
    deviations = {}
    for outputs in ("free", "unit_rows"):
        torch.manual_seed(0)
        p, generated = make(outputs=outputs)
        with torch.no_grad():
            for projection in generated.hypernetworks["p"].outputs.values():
                torch.nn.init.kaiming_uniform_(projection.weight[0], a=5**0.5)
        deviations[outputs] = []
        for _ in range(100):
            generated.refresh()
            generated.commit()
            gram = p.detach() @ p.detach().mT - torch.eye(RANK)
            deviations[outputs].append(gram.square().sum((-2, -1)).mean().item())
    assert min(deviations["free"]) > 500
    assert deviations["free"][-1] > 1.5 * deviations["free"][0]
    assert max(deviations["unit_rows"]) <= RANK * (RANK - 1)


def test_the_undamped_residual_recursion_explodes_and_the_damped_one_does_not():
    """P ← P + H(P), as found in trials: a momentum that nothing brakes."""
    norms = {}
    for state in ("static", "damped"):
        torch.manual_seed(0)
        p, generated = make(outputs="free", state=state)
        with torch.no_grad():
            for projection in generated.hypernetworks["p"].outputs.values():
                projection.weight.normal_(std=(32 * WIDTH) ** -0.5)
        for _ in range(300):
            generated.refresh()
            generated.state_p_0.copy_(p.detach())  # what the static state is there not to do
        norms[state] = p.detach().norm(dim=-1).mean().item()
    assert norms["static"] > 50
    assert 0.5 < norms["damped"] < 2
    generated.state_p_0.mul_(1e4)
    with pytest.warns(UserWarning, match="the recursion explodes"):
        diagnose(generated)


@pytest.mark.parametrize("relaxation", [0.25, 1.0])
def test_damped_is_a_weighted_mean_of_the_state_and_the_output(relaxation):
    torch.manual_seed(0)
    recurrent = make(outputs="free")
    torch.manual_seed(0)
    damped = make(outputs="free", state="damped", relaxation=relaxation)
    before = damped[0].detach().clone()
    for _, generated in (recurrent, damped):
        generated.refresh()
    expected = (1 - relaxation) * before + relaxation * recurrent[0]
    torch.testing.assert_close(damped[0].detach(), expected.detach())


def test_an_unknown_state_is_refused():
    with pytest.raises(HyperError, match="state is 'residual', expected one of recurrent, static"):
        Recursion("residual")
