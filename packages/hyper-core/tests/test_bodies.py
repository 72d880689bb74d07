"""Every body against its twin, and the derivations of their start."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from hyper_core import PRESETS, AttentionConfig, ConvConfig, MLPConfig
from hyper_core.init import GELU_VARIANCE, RELU_VARIANCE, centred_normal_, fan_in_normal_

CONFIGS = {
    "attention": AttentionConfig(hidden=6, heads=3, feed_forward=5, layers=2),
    "attention-pre": AttentionConfig(hidden=6, heads=3, feed_forward=5, layers=2, norm="pre"),
    "conv": ConvConfig(widths=(4, 5), blocks=(1, 2)),
    "conv-wide": ConvConfig(widths=(4,), blocks=(1,), kernel=5),
    "mlp": MLPConfig(hidden=4, widths=(6, 7, 7)),
}
named = pytest.mark.parametrize("name", CONFIGS)


@named
@pytest.mark.parametrize("networks", [1, 2])
def test_body_equals_the_twin_in_values_and_all_gradients(twin, shaken, name, networks):
    config = CONFIGS[name]
    body = shaken(config.build(networks).double())
    x = torch.randn(networks, 2, 4, config.input_width, dtype=torch.float64, requires_grad=True)
    weights = dict(body.named_parameters())

    found = body(x)
    expected = torch.stack(
        [
            torch.stack(
                [
                    torch.stack(twin.body(config, twin.Weights(weights, k), list(matrix)))
                    for matrix in matrices
                ]
            )
            for k, matrices in enumerate(x)
        ]
    )

    assert found.shape == (networks, 2, 4, config.output_width)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn_like(found)
    wanted = [x, *weights.values()]
    torch.testing.assert_close(
        torch.autograd.grad(found, wanted, cotangent),
        torch.autograd.grad(expected, wanted, cotangent),
        rtol=1e-10,
        atol=1e-11,
    )


@named
def test_body_passes_gradcheck(shaken, name):
    config = CONFIGS[name]
    body = shaken(config.build(1).double())
    x = torch.randn(1, 1, 2, config.input_width, dtype=torch.float64, requires_grad=True)
    names, weights = zip(*body.named_parameters(), strict=True)

    def run(x, *values):
        return torch.func.functional_call(body, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *weights))


@pytest.mark.parametrize("name", ["attention", "attention-pre", "mlp"])
def test_permuted_tokens_give_permuted_outputs(shaken, name):
    config = CONFIGS[name]
    body = shaken(config.build(1).double())
    x = torch.randn(1, 3, 4, config.input_width, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(body(x[:, :, order]), body(x)[:, :, order], rtol=1e-12, atol=1e-13)


def test_a_convolution_knows_the_order_of_its_tokens():
    body = CONFIGS["conv"].build(1).double()
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    assert (body(x[:, :, order]) - body(x)[:, :, order]).abs().max() > 0.1


@named
def test_matrices_do_not_see_one_another(shaken, name):
    config = CONFIGS[name]
    body = shaken(config.build(2).double())
    x = torch.randn(2, 3, 4, config.input_width, dtype=torch.float64)
    before = body(x)
    x[1, 2] += torch.randn_like(x[1, 2])
    changed = (body(x) - before).abs().amax((-2, -1))
    assert changed[1, 2] > 1e-3
    changed[1, 2] = 0
    assert changed.max() == 0


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_puts_out_unit_variance_and_lets_the_gradient_through(name):
    config = PRESETS[name]
    body = config.build(1)
    x = torch.randn(1, 40, 6, config.input_width, requires_grad=True)
    y = body(x)
    assert y.var().item() == pytest.approx(1.0, abs=0.05)
    y.backward(torch.randn_like(y))
    assert 0.05 < x.grad.square().mean().sqrt() < 20


def test_tokens_of_a_deep_body_stay_apart():
    for name in ("mlp-15", "conv-resnet18"):
        config = PRESETS[name]
        y = config.build(1)(torch.randn(1, 1, 40, config.input_width))[0, 0]
        cosine = functional.cosine_similarity(y[:20], y[20:])
        assert cosine.abs().mean() < 0.15, name


def test_every_linear_map_of_attention_puts_out_unit_variance():
    layer = AttentionConfig(hidden=256, heads=4, feed_forward=1024).build(1)[0]
    normal = torch.randn(1, 1, 4000, 256)
    for name, found in {
        "query_key_value": layer.query_key_value(normal),
        "attention_output": layer.attention_output(normal),
        "up": layer.up(normal),
        "down": layer.down(functional.gelu(torch.randn(1, 1, 4000, 1024))),
    }.items():
        assert found.square().mean().item() == pytest.approx(1.0, abs=0.03), name
        assert found.mean((0, 1, 2)).square().mean() < 1e-2, name


def test_an_activations_mean_does_not_pass_through_the_next_map():
    """It is common to all tokens, and would make them alike."""
    for activation, map_ in (
        (functional.relu, PRESETS["conv-small"].build(1)[0].first),
        (functional.gelu, MLPConfig(hidden=64, widths=(64, 64)).build(1).layers[0].linear),
        (functional.gelu, PRESETS["attention-small"].build(1)[0].down),
    ):
        features = map_.taps.weight.shape[-1] // 3 if hasattr(map_, "taps") else None
        read = activation(torch.randn(1, 200, 60, features or map_.weight.shape[-1]))
        written = map_(read)
        assert written.square().mean().item() == pytest.approx(1.0, abs=0.06)
        # Beyond a sequence's ends are zeros, not means: each tap by itself has mean zero.
        assert map_(torch.ones_like(read)).abs().max() < 1e-5


def test_variances_are_those_of_the_derivations(twin):
    u = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-u * u / 2) / (2 * torch.pi) ** 0.5
    for variance, activated in (
        (GELU_VARIANCE, twin.gelu(u)),
        (RELU_VARIANCE, u.clamp(min=0)),
    ):
        mean = torch.trapezoid(activated * density, u)
        found = torch.trapezoid((activated - mean) ** 2 * density, u)
        assert found.item() == pytest.approx(variance)


def test_starting_weights_have_the_variance_of_their_fan_in():
    weight = fan_in_normal_(torch.empty(1000, 50))
    assert weight.mean().item() == pytest.approx(0.0, abs=5e-3)
    assert (weight.var() * 50).item() == pytest.approx(1.0, rel=0.02)
    for parts in (1, 5):
        weight = centred_normal_(torch.empty(2000, 50), 0.25, parts)
        assert weight.view(2000, parts, -1).mean(-1).abs().max() < 1e-6
        # Without its mean, a drawn number has the variance σ²·(n − 1)/n, n of them in a part.
        assert (weight.square().mean() * 50 * 0.25).item() == pytest.approx(1.0, rel=0.02)


def test_an_only_feature_starts_finite():
    assert centred_normal_(torch.empty(3, 1), 0.25).isfinite().all()


@named
def test_all_biases_start_at_zero_and_norms_at_the_identity(name):
    for key, parameter in CONFIGS[name].build(2).named_parameters():
        if key.endswith("bias"):
            assert torch.equal(parameter, torch.zeros_like(parameter)), key
        elif parameter.ndim == 2:
            assert torch.equal(parameter, torch.ones_like(parameter)), key


@named
def test_networks_start_apart_and_every_weight_is_stacked(name):
    for key, parameter in CONFIGS[name].build(3).named_parameters():
        assert len(parameter) == 3, key
        if parameter.ndim == 3:
            assert (parameter[0] - parameter[1]).abs().max() > 0, key


def parameters(config):
    return sum(p.numel() for p in config.build(1).parameters())


def test_the_papers_sizes_have_the_layers_that_it_states():
    """The counts themselves are in the documentation, which is compared in its own test."""
    resnet, mlp = PRESETS["conv-resnet18"], PRESETS["mlp-15"]
    assert 2 * sum(resnet.blocks) + 2 == 18
    assert resnet.widths == (64, 128, 256)
    assert len(mlp.widths) + 1 + 2 == 15
    assert {mlp.hidden, *mlp.widths} == {256, 512, 1024}
    linear = sum(p.numel() for p in mlp.build(1).parameters() if p.ndim == 3)
    assert linear == 256 * 512 + 512 * 1024 + 10 * 1024**2 + 1024 * 256
    hidden, forward = 312, 1200
    layer = 4 * hidden**2 + 4 * hidden + 2 * hidden * forward + hidden + forward + 4 * hidden
    assert parameters(PRESETS["attention-tinybert"]) == layer
    assert parameters(replace(PRESETS["attention-tinybert"], layers=2)) == 2 * layer
