"""The hypernetwork against its twin; what its attention and its embeddings tell apart."""

from dataclasses import dataclass

import pytest
import torch

from hyper_core import (
    PRESETS,
    AttentionConfig,
    ConvConfig,
    HyperError,
    Hypernetwork,
    MLPConfig,
)
from hyper_core.stacked import StackedLinear

CONFIG = AttentionConfig(hidden=4, heads=2, feed_forward=5, layers=2)
BODIES = {
    "attention": CONFIG,
    "conv": ConvConfig(widths=(3, 4), blocks=(1, 1)),
    "mlp": MLPConfig(hidden=4, widths=(5,)),
}
SHAPES = [(2, 3, 5), (1, 2, 4), (2, 3, 4), (1, 2, 5), (2, 3, 5)]
# One label per matrix: networks of unequally many matrices, spread over widths and token counts.
GROUPS = ["a", "b", "c", "b", "a", "c", "a", "d"]
SHARINGS = {
    "all": ("all", [0] * 8),
    "each": ("each", list(range(8))),
    "groups": (GROUPS, [0, 1, 2, 1, 0, 2, 0, 3]),
    "halves": ("aaaabbbb", [0, 0, 0, 0, 1, 1, 1, 1]),
}


def random_stacks(shapes=SHAPES):
    return [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes]


def assert_equals_twin(twin, network, config, networks=None, context=None):
    stacks = random_stacks()
    weights = dict(network.named_parameters())
    found = network(stacks, context)
    expected = twin.hypernetwork(weights, config, stacks, networks, context)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    cotangents = [torch.randn_like(stack) for stack in stacks]
    wanted = [*stacks, *weights.values()]
    torch.testing.assert_close(
        torch.autograd.grad(found, wanted, cotangents),
        torch.autograd.grad(expected, wanted, cotangents),
        rtol=1e-10,
        atol=1e-11,
    )


@pytest.mark.parametrize("embeddings", [True, False])
def test_hypernetwork_equals_the_twin_in_values_and_all_gradients(twin, shaken, embeddings):
    network = shaken(Hypernetwork(SHAPES, CONFIG, embeddings=embeddings).double())
    assert_equals_twin(twin, network, CONFIG)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("sharing", SHARINGS)
def test_shared_grouped_and_separate_networks_equal_the_twin(twin, shaken, body, sharing):
    given, networks = SHARINGS[sharing]
    given = list(given) if len(given) == 8 else given
    network = shaken(Hypernetwork(SHAPES, BODIES[body], sharing=given).double())
    assert network.networks == len(set(networks))
    assert_equals_twin(twin, network, BODIES[body], networks)


def test_context_equals_the_twin(twin, shaken):
    network = shaken(Hypernetwork(SHAPES, CONFIG, context_width=3).double())
    context = torch.randn(8, 3, dtype=torch.float64)
    assert_equals_twin(twin, network, CONFIG, context=context)


def test_a_matrix_of_a_network_of_its_own_is_touched_by_no_other():
    network = Hypernetwork(SHAPES, CONFIG, sharing="each").double()
    stacks = random_stacks()
    found = network(stacks)
    found[0][1].sum().backward()
    for name, parameter in network.named_parameters():
        if name.startswith("trunk."):
            touched = parameter.grad.flatten(1).abs().amax(1) > 0
            assert touched[0:1].logical_not().all(), name
            assert touched[2:].logical_not().all(), name


def test_separate_networks_equal_hypernetworks_of_one_matrix_each():
    shapes = [(3, 2, 5)]
    stacked = Hypernetwork(shapes, CONFIG, sharing="each").double()
    (stack,) = random_stacks(shapes)
    (found,) = stacked([stack])
    for i in range(3):
        single = Hypernetwork([(1, 2, 5)], CONFIG).double()
        state = {k: v[i : i + 1] for k, v in stacked.state_dict().items()}
        state["embedding"] = stacked.embedding[2 * i : 2 * i + 2]
        single.load_state_dict(state)
        torch.testing.assert_close(single([stack[i : i + 1]])[0][0], found[i], rtol=0, atol=1e-14)


def test_every_weight_is_trained_and_known_to_the_twin():
    names = set(Hypernetwork([(2, 3, 5)], CONFIG).state_dict())
    body = {
        f"trunk.body.{layer}.{part}.{kind}"
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
        "trunk.norm.weight",
        "trunk.norm.bias",
        "embedding",
    }


def test_without_embeddings_permuted_tokens_give_permuted_outputs(shaken):
    network = shaken(Hypernetwork([(3, 4, 5)], CONFIG, embeddings=False).double())
    (stack,) = random_stacks([(3, 4, 5)])
    order = torch.tensor([2, 0, 3, 1])
    (found,) = network([stack[:, order]])
    torch.testing.assert_close(found, network([stack])[0][:, order], rtol=1e-12, atol=1e-13)


def test_a_width_does_not_change_what_is_written_for_another(shaken):
    alone = shaken(Hypernetwork([(2, 3, 5)], CONFIG).double())
    both = Hypernetwork([(2, 3, 5), (2, 3, 7)], CONFIG).double()
    state = both.state_dict() | {k: v for k, v in alone.state_dict().items() if k != "embedding"}
    state["embedding"][:6] = alone.state_dict()["embedding"]
    both.load_state_dict(state)
    stacks = random_stacks([(2, 3, 5), (2, 3, 7)])
    torch.testing.assert_close(both(stacks)[0], alone(stacks[:1])[0], rtol=1e-12, atol=1e-13)


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
    network.trunk.body.register_forward_pre_hook(lambda _, x: batches.append(tuple(x[0].shape)))
    network(random_stacks())
    assert sorted(batches) == [(1, 2, 2, 4), (1, 6, 3, 4)]


@pytest.mark.parametrize("sharing", ["all", "each"])
def test_unit_rows_arrive_with_unit_variance_and_leave_with_unit_norm(sharing):
    network = Hypernetwork(
        [(200, 3, 64), (200, 3, 16)],
        AttentionConfig(48, 4, 96) if sharing == "each" else AttentionConfig(),
        sharing=sharing,
        embeddings=False,
    )
    stacks = [torch.nn.functional.normalize(torch.randn(200, 3, w), dim=-1) for w in (64, 16)]
    for stack, route in zip(stacks, network.layouts["all"].routes, strict=True):
        arrived = route(network.inputs[str(stack.shape[2])], stack)
        assert arrived.var().item() == pytest.approx(1.0, abs=0.05)
    for left in network(stacks):
        assert left.square().sum(-1).mean().item() == pytest.approx(1.0, abs=0.1)


def test_embeddings_start_with_the_variance_of_two_and_context_with_that_of_one():
    network = Hypernetwork([(100, 100, 2)], AttentionConfig(), context_width=100)
    added = network.context(torch.randn(100, 100))
    assert network.embedding.shape == (10_000, 312)
    for embedding, variance in ((network.embedding, 2.0), (added, 1.0)):
        assert embedding.var().item() == pytest.approx(variance, rel=0.05)
        assert embedding.mean().item() == pytest.approx(0.0, abs=0.03)


def test_zero_output_gives_exact_zeros_and_still_learns():
    network = Hypernetwork([(2, 3, 5)], CONFIG, zero_output=True)
    (found,) = network([torch.randn(2, 3, 5)])
    assert torch.equal(found, torch.zeros(2, 3, 5))
    found.sum().backward()
    assert network.outputs["5"].weight.grad.abs().min() > 0


def test_a_body_in_bfloat16_is_near_the_one_in_float32_and_gives_float32():
    network = Hypernetwork([(2, 3, 5)], CONFIG)
    stacks = [torch.randn(2, 3, 5)]
    (wide,) = network(stacks)
    network.trunk.dtype = torch.bfloat16
    (narrow,) = network(stacks)
    assert narrow.dtype == torch.float32
    error = (narrow - wide).abs().max() / wide.abs().max()
    assert 0 < error < 0.05
    narrow.sum().backward()
    assert {p.grad.dtype for p in network.parameters()} == {torch.float32}


@dataclass(frozen=True)
class PlainBody:
    """A body of one's own: a linear map, wider than its input, and no norm after it."""

    input_width: int = 4
    output_width: int = 6

    def build(self, networks):
        return StackedLinear(networks, self.input_width, self.output_width)

    def check_tokens(self, matrices, tokens):
        pass


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_body_of_ones_own_needs_four_members(dtype):
    network = Hypernetwork(SHAPES, PlainBody(), sharing="each", body_dtype=dtype)
    stacks = [torch.randn(*shape) for shape in SHAPES]
    written = network(stacks)
    assert [tuple(part.shape) for part in written] == SHAPES
    assert {part.dtype for part in written} == {torch.float32}
    sum(part.sum() for part in written).backward()
    assert network.trunk.body.weight.grad.abs().amax((1, 2)).min() > 0


def test_a_surrounding_narrow_dtype_is_asked_for_at_construction():
    network = Hypernetwork([(2, 3, 5)], CONFIG, body_dtype=torch.bfloat16)
    dtypes = []
    network.trunk.body[0].up.register_forward_hook(lambda _m, _x, y: dtypes.append(y.dtype))
    network([torch.randn(2, 3, 5)])
    assert dtypes == [torch.bfloat16]


@pytest.mark.parametrize("sharing", ["all", "groups"])
def test_compiled_network_writes_the_same(sharing):
    network = Hypernetwork(SHAPES, CONFIG, sharing=SHARINGS[sharing][1]).double()
    stacks = random_stacks()
    expected = network(stacks)
    weights = list(network.parameters())
    cotangents = [torch.randn_like(stack) for stack in stacks]
    wanted = torch.autograd.grad(expected, weights, cotangents)
    network.compile(backend="aot_eager", fullgraph=True)
    found = network(stacks)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        torch.autograd.grad(found, weights, cotangents), wanted, rtol=1e-11, atol=1e-12
    )


def test_the_meta_device_shows_shapes_without_memory():
    with torch.device("meta"):
        network = Hypernetwork([(560, 16, 28672)], AttentionConfig())
    (written,) = network([torch.empty(560, 16, 28672, device="meta")])
    assert written.shape == (560, 16, 28672)
    assert {p.device.type for p in network.parameters()} == {"meta"}


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


@pytest.mark.parametrize(
    ("width", "context", "got", "expected"),
    [
        (3, None, None, (2, 3)),
        (0, torch.zeros(2, 3), (2, 3), None),
        (3, torch.zeros(2, 4), (2, 4), (2, 3)),
    ],
)
def test_wrong_context(width, context, got, expected):
    network = Hypernetwork([(2, 3, 5)], CONFIG, context_width=width)
    with pytest.raises(HyperError) as caught:
        network([torch.zeros(2, 3, 5)], context)
    assert str(caught.value) == (
        f"context has the shape {got}, expected {expected} as context_width says; give a row of "
        "features for each matrix."
    )
