"""The encoder layer against its twin, and the derivation of its start."""

import pytest
import torch

from hyper_core import AttentionConfig, EncoderLayer, HyperError

CONFIG = AttentionConfig(hidden=6, heads=3, feed_forward=5)


def test_layer_equals_the_twin_in_values_and_all_gradients(twin, shaken):
    layer = shaken(EncoderLayer(CONFIG).double())
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(3, 4, 6, dtype=torch.float64)
    weights = dict(layer.named_parameters())

    found = layer(x)
    expected = torch.stack(
        [torch.stack(twin.encoder_layer(weights, "", 3, list(matrix))) for matrix in x]
    )

    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    wanted = [x, *weights.values()]
    torch.testing.assert_close(
        torch.autograd.grad(found, wanted, cotangent),
        torch.autograd.grad(expected, wanted, cotangent),
        rtol=1e-11,
        atol=1e-12,
    )


def test_every_linear_map_puts_out_unit_variance():
    layer = EncoderLayer(AttentionConfig(hidden=256, heads=4, feed_forward=1024))
    normal = torch.randn(4000, 256)
    up = layer.up(normal)
    for name, found in {
        "query_key_value": layer.query_key_value(normal),
        "attention_output": layer.attention_output(normal),
        "up": up,
        "down": layer.down(torch.nn.functional.gelu(torch.randn(4000, 1024))),
    }.items():
        # The mean of GELU shifts each feature of `down` alike, hence the second moment.
        assert found.square().mean().item() == pytest.approx(1.0, abs=0.03), name


def test_gelu_second_moment_is_that_of_the_derivation(twin):
    u = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = torch.exp(-u * u / 2) / (2 * torch.pi) ** 0.5
    moment = torch.trapezoid(twin.gelu(u) ** 2 * density, u)
    layer = EncoderLayer(AttentionConfig(hidden=4, heads=1, feed_forward=400_000))
    assert (layer.down.weight.var() * 400_000).item() == pytest.approx(1 / moment.item(), rel=5e-3)


def test_all_biases_start_at_zero_and_norms_at_the_identity():
    layer = EncoderLayer(CONFIG)
    for name, parameter in layer.named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith("bias"):
            assert torch.equal(parameter, torch.zeros_like(parameter)), name


def test_a_wrong_shape_names_both_shapes():
    with pytest.raises(HyperError) as caught:
        EncoderLayer(CONFIG)(torch.zeros(3, 5))
    assert str(caught.value) == (
        "the encoder layer got the shape (3, 5), expected (matrices, tokens, 6); "
        "project the tokens to 6 features."
    )
