"""Features of names: depth and kind."""

import pytest
import torch

from hyper_core import AttentionConfig, GeneratedParameters, HyperError, name_features

NAMES = [f"model.layers.{i}.{kind}" for i in range(5) for kind in ("attn.q", "attn.v", "mlp.up")]


def test_depth_and_kind_have_unit_mean_square():
    features = name_features(NAMES)
    assert features.shape == (15, 4)
    depth, kinds = features[:, 0], features[:, 1:]
    assert depth.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert depth.square().mean().item() == pytest.approx(1.0)
    assert torch.equal(depth[::3], depth[1::3])
    assert (depth[3:] - depth[:-3] > 0).all()
    torch.testing.assert_close(kinds.square().mean(1), torch.ones(15))
    assert torch.equal(kinds[:3] > 0, torch.eye(3).bool())
    assert torch.equal(kinds[:3], kinds[3:6])


def test_names_without_depth_have_depth_zero():
    assert name_features(["embed", "head"])[:, 0].tolist() == [0.0, 0.0]


def test_no_name_is_refused():
    with pytest.raises(HyperError) as caught:
        name_features([])
    assert str(caught.value) == (
        "names is empty, expected one for each matrix; give the modules' names."
    )


def test_features_are_a_context():
    leaves = {"p": [torch.randn(15, 2, 4)]}
    generated = GeneratedParameters(
        leaves, config=AttentionConfig(8, 2, 8), embeddings=False, context_width=4
    )
    leaves["p"][0].copy_(leaves["p"][0][:1].expand(15, -1, -1).clone())
    generated.state_p_0.copy_(leaves["p"][0])
    generated.refresh(name_features(NAMES))
    flat = leaves["p"][0].flatten(1)
    assert (torch.cdist(flat, flat) + 9 * torch.eye(15)).min() > 0.01


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.float64])
def test_a_context_of_another_dtype_is_converted(dtype):
    leaf = torch.randn(2, 3, 4)
    generated = GeneratedParameters({"p": [leaf]}, config=AttentionConfig(8, 2, 8), context_width=2)
    generated.refresh(torch.tensor([1.0, 2.0]))
    expected = leaf.clone()
    generated.refresh(torch.tensor([1, 2], dtype=dtype))
    assert torch.equal(leaf, expected)


def test_a_context_on_another_device_is_moved():
    leaf = torch.empty(2, 3, 4, device="meta")
    generated = GeneratedParameters({"p": [leaf]}, config=AttentionConfig(8, 2, 8), context_width=2)
    for context in (torch.ones(2), torch.ones(2, 2)):
        generated.refresh(context)
        (value,) = generated.generate(context)["p"]
        assert value.is_meta
