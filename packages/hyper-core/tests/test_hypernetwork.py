"""The hypernetwork against its twin; what its attention and its embeddings tell apart."""

import pytest
import torch

from hyper_core import PRESETS, AttentionConfig, HyperError, Hypernetwork

CONFIG = AttentionConfig(hidden=4, heads=2, feed_forward=5, layers=2)
SHAPES = [(2, 3, 5), (1, 2, 4), (2, 3, 4), (1, 2, 5), (2, 3, 5)]


def random_stacks(shapes=SHAPES):
    return [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("embeddings", [True, False])
def test_hypernetwork_equals_the_twin_in_values_and_all_gradients(twin, shaken, embeddings):
    network = shaken(Hypernetwork(SHAPES, CONFIG, embeddings=embeddings).double())
    stacks = random_stacks()
    weights = dict(network.named_parameters())
    cotangents = [torch.randn_like(stack) for stack in stacks]

    found = network(stacks)
    expected = twin.hypernetwork(weights, CONFIG.heads, CONFIG.layers, stacks)

    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    wanted = [*stacks, *weights.values()]
    torch.testing.assert_close(
        torch.autograd.grad(found, wanted, cotangents),
        torch.autograd.grad(expected, wanted, cotangents),
        rtol=1e-10,
        atol=1e-11,
    )


def test_every_weight_is_trained_and_known_to_the_twin():
    names = set(Hypernetwork([(2, 3, 5)], CONFIG).state_dict())
    body = {
        f"body.{layer}.{part}.{kind}"
        for layer in range(2)
        for part in (
            "query_key_value",
            "attention_output",
            "attention_norm",
            "up",
            "down",
            "output_norm",
        )
        for kind in ("weight", "bias")
    }
    assert names == body | {
        "inputs.5.weight",
        "outputs.5.weight",
        "outputs.5.bias",
        "norm.weight",
        "norm.bias",
        "matrix_embedding",
        "token_embedding",
    }


def test_without_embeddings_permuted_tokens_give_permuted_outputs(shaken):
    network = shaken(Hypernetwork([(3, 4, 5)], CONFIG, embeddings=False).double())
    (stack,) = random_stacks([(3, 4, 5)])
    order = torch.tensor([2, 0, 3, 1])
    (found,) = network([stack[:, order]])
    torch.testing.assert_close(found, network([stack])[0][:, order], rtol=1e-12, atol=1e-13)


def test_embeddings_tell_equal_matrices_and_equal_tokens_apart():
    size = PRESETS["attention-small"]
    equal = torch.full((3, 2, 64), 1 / 8)
    (apart,) = Hypernetwork([(3, 2, 64)], size)([equal])
    (alike,) = Hypernetwork([(3, 2, 64)], size, embeddings=False)([equal])
    rows = apart.flatten(0, 1)
    assert (torch.cdist(rows, rows) + 9 * torch.eye(6)).min() > 0.4
    torch.testing.assert_close(alike, alike[:1, :1].expand_as(alike), rtol=1e-4, atol=1e-5)


def test_matrices_of_all_widths_and_equal_rank_share_one_batch():
    network = Hypernetwork(SHAPES, CONFIG).double()
    batches = []
    network.body.register_forward_pre_hook(lambda _, x: batches.append(tuple(x[0].shape)))
    network(random_stacks())
    assert sorted(batches) == [(2, 2, 4), (6, 3, 4)]


def test_unit_rows_arrive_with_unit_variance_and_leave_with_unit_norm():
    network = Hypernetwork([(200, 3, 64), (200, 3, 16)], AttentionConfig(), embeddings=False)
    stacks = [torch.nn.functional.normalize(torch.randn(200, 3, w), dim=-1) for w in (64, 16)]
    for stack in stacks:
        arrived = network.inputs[str(stack.shape[2])](stack)
        assert arrived.var().item() == pytest.approx(1.0, abs=0.05)
    for left in network(stacks):
        assert left.square().sum(-1).mean().item() == pytest.approx(1.0, abs=0.1)


def test_embeddings_start_with_unit_variance():
    network = Hypernetwork([(100, 100, 2)], AttentionConfig())
    assert network.matrix_embedding.shape == (100, 312)
    assert network.token_embedding.shape == (100, 312)
    for embedding in (network.matrix_embedding, network.token_embedding):
        assert embedding.std().item() == pytest.approx(1.0, abs=0.03)
        assert embedding.mean().item() == pytest.approx(0.0, abs=0.03)


def test_zero_output_gives_exact_zeros_and_still_learns():
    network = Hypernetwork([(2, 3, 5)], CONFIG, zero_output=True)
    (found,) = network([torch.randn(2, 3, 5)])
    assert torch.equal(found, torch.zeros(2, 3, 5))
    found.sum().backward()
    assert network.outputs["5"].weight.grad.abs().min() > 0


@pytest.mark.parametrize(
    ("shapes", "shown"),
    [([], "[]"), ([(2, 0, 3)], "[(2, 0, 3)]"), ([(2, 3)], "[(2, 3)]")],
)
def test_wrong_shapes_at_construction(shapes, shown):
    with pytest.raises(HyperError) as caught:
        Hypernetwork(shapes, CONFIG)
    assert str(caught.value) == (
        f"shapes is {shown}, expected at least one (matrices, tokens, width), all above 0; "
        "give the shape of each stack."
    )


def test_wrong_stacks_name_both_shapes():
    with pytest.raises(HyperError) as caught:
        Hypernetwork([(2, 3, 5)], CONFIG)([torch.zeros(2, 3, 4)])
    assert str(caught.value) == (
        "stacks has the shapes [(2, 3, 4)], expected [(2, 3, 5)]; "
        "make another Hypernetwork for other shapes."
    )
