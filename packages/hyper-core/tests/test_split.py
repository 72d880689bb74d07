"""Shares of the matrices: together they are the whole, in values, gradients, state and averages."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hyper_core import (
    AttentionConfig,
    ConvConfig,
    GeneratedParameters,
    HyperError,
    MLPConfig,
    Split,
)

BODIES = {
    "attention": AttentionConfig(hidden=4, heads=2, feed_forward=5),
    "conv": ConvConfig(widths=(4, 6), blocks=(1, 1)),
    "mlp": MLPConfig(hidden=4, widths=(6,)),
}
# Stacks and single matrices of several ranks and widths; of some there are fewer than shares.
SHAPES = {"p": [(5, 3, 4), (1, 2, 3), (2, 3, 6)], "lam": [(7, 3)], "q": [(3, 4), (2, 5), (3, 4)]}
LABELS = {"p": [0, 1, 2, 0, 2, 1, 1, 0], "lam": "each", "q": ["x", "x", "y"]}
STEPS = 2


def make(body, sharing, state, normalisation, seed=0):
    torch.manual_seed(seed)
    leaves = {
        role: [nn.Parameter(torch.randn(*shape, dtype=torch.float64)) for shape in shapes]
        for role, shapes in SHAPES.items()
    }
    generated = GeneratedParameters(
        leaves,
        config=BODIES[body],
        sharing=sharing,
        tokens={"lam": "scalars"},
        outputs={"p": "unit_rows", "q": "orthonormal"},
        state=state,
        gradient_normalisation=normalisation,
        context_width=2,
    )
    with torch.no_grad():
        for weight in generated.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return leaves, generated


def contexts():
    generator = torch.Generator().manual_seed(5)
    counts = {"p": 8, "lam": 7, "q": 3}
    return {
        role: torch.randn(count, 2, generator=generator, dtype=torch.float64)
        for role, count in counts.items()
    }


def fill_gradients(leaves, step):
    """A loss that couples all values; its gradient is the same in all processes."""
    everything = [leaf for tensors in leaves.values() for leaf in tensors]
    total = sum(torch.sin((i + step + 1) * leaf).sum() for i, leaf in enumerate(everything))
    torch.sin(total).backward()


def gathered(processes):
    """The vectors that the processes hand to `Split.gather`, which ends each run at that point."""

    class Stop(Exception):
        pass

    vectors = []

    def take(vector):
        vectors.append(vector)
        raise Stop

    for index, (_, generated) in enumerate(processes):
        with pytest.raises(Stop):
            generated.refresh(contexts(), split=Split(index, len(processes), take))
    return torch.stack(vectors)


def assert_equal_but_for_rounding(found, expected):
    """To 1e-12 of the largest number, in which the others' rounding is counted."""
    largest = max(1.0, *(value.abs().max().item() for value in expected.values()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * largest)


def values_of(leaves):
    return {f"{r}{i}": leaf.detach() for r in leaves for i, leaf in enumerate(leaves[r])}


@pytest.mark.parametrize(
    ("body", "state", "normalisation", "sharing", "count"),
    [
        ("attention", "recurrent", "none", "all", 2),
        ("attention", "recurrent", "token_rms", "grouped", 4),
        ("conv", "damped", "token_rms", "grouped", 3),
        ("mlp", "static", "none", "grouped", 2),
        ("mlp", "static", "token_rms", "all", 1),
    ],
)
def test_shares_together_are_the_undivided_step(body, state, normalisation, sharing, count):
    choices = (body, LABELS if sharing == "grouped" else "all", state, normalisation)
    leaves, whole = make(*choices)
    processes = [make(*choices) for _ in range(count)]
    everyone = [whole, *(generated for _, generated in processes)]
    optimizers = [torch.optim.SGD(generated.parameters(), lr=0.01) for generated in everyone]
    for step in range(STEPS):
        whole.refresh(contexts())
        vectors = gathered(processes)
        for index, (_, generated) in enumerate(processes):
            generated.refresh(contexts(), split=Split(index, count, lambda _, v=vectors: v))
        for own, generated in [(leaves, whole), *processes]:
            fill_gradients(own, step)
            generated.backward()
        total = {
            name: sum(dict(generated.named_parameters())[name].grad for _, generated in processes)
            for name, _ in whole.named_parameters()
        }
        expected = {name: weight.grad for name, weight in whole.named_parameters()}
        assert_equal_but_for_rounding(total, expected)
        assert all(gradient.abs().max() > 1e-4 for gradient in expected.values())
        for own, generated in processes:
            assert_equal_but_for_rounding(values_of(own), values_of(leaves))
            for name, weight in generated.named_parameters():
                weight.grad = total[name].clone()
        for generated, optimizer in zip(everyone, optimizers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            generated.commit()
        for _, generated in processes:
            assert_equal_but_for_rounding(generated.state_dict(), whole.state_dict())
            first = processes[0][1].state_dict()
            assert all(torch.equal(value, first[n]) for n, value in generated.state_dict().items())


def test_a_share_generates_its_matrices_alone():
    """Half of the matrices, half of the rows that the trunk sees."""
    seen = []
    _, generated = make("attention", "all", "recurrent", "none")
    for network in generated.hypernetworks.values():
        network.trunk.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[1]))
    generated.generate(contexts())
    whole, seen[:] = sum(seen), []
    shares = [
        generated.generate(contexts(), Split(index, 2, torch.atleast_2d)) for index in range(2)
    ]
    assert sum(seen) == whole == 18
    assert [[len(stack) for stack in share["p"]] for share in shares] == [[2, 0, 1], [3, 1, 1]]


def test_an_evaluation_may_be_split_and_leaves_nothing_pending():
    leaves, generated = make("mlp", "all", "recurrent", "none")
    generated.refresh(contexts())
    expected = {name: value.clone() for name, value in values_of(leaves).items()}
    vectors = gathered([(leaves, generated)] * 3)
    with torch.no_grad():
        generated.refresh(contexts(), split=Split(1, 3, lambda _: vectors))
    assert_equal_but_for_rounding(values_of(leaves), expected)
    with pytest.raises(HyperError, match="without a pending"):
        generated.backward()


def test_a_split_step_saves_what_an_undivided_one_does():
    _, generated = make("attention", LABELS, "recurrent", "token_rms")
    before = list(generated.state_dict())
    generated.generate(contexts(), Split(0, 2, torch.atleast_2d))
    assert list(generated.state_dict()) == before


@pytest.mark.parametrize(("index", "count"), [(2, 2), (-1, 2), (0, 0)])
def test_no_such_share(index, count):
    with pytest.raises(HyperError, match=f"index {index} of count {count}, expected .* from 0"):
        Split(index, count, torch.atleast_2d)


def test_what_was_gathered_is_not_a_row_for_each_share():
    leaves, generated = make("mlp", "all", "recurrent", "none")
    before = leaves["p"][0].detach().clone()
    with pytest.raises(HyperError, match=r"gather returned the shape \(1, 94\), expected \(2, 94"):
        generated.refresh(contexts(), split=Split(0, 2, torch.atleast_2d))
    assert torch.equal(leaves["p"][0], before)


def test_a_compiled_network_generates_a_share():
    leaf = torch.randn(5, 3, 4)
    generated = GeneratedParameters({"p": [leaf]}, config=BODIES["mlp"], sharing=[0, 1, 0, 2, 1])
    split = Split(1, 2, torch.atleast_2d)
    (expected,) = generated.generate(split=split)["p"]
    del generated.hypernetworks["p"].layouts["[(2, 5)]"]  # as before the first split step
    generated.hypernetworks["p"].compile(backend="aot_eager", fullgraph=True)
    (found,) = generated.generate(split=split)["p"]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("sharing", ["all", "each"])
def test_operations_of_a_share_do_not_grow_with_the_matrices(sharing):
    counted = []
    for matrices in (4, 40):
        leaf = nn.Parameter(torch.randn(matrices, 3, 5))
        generated = GeneratedParameters({"p": [leaf]}, config=BODIES["mlp"], sharing=sharing)
        leaf.grad = torch.ones_like(leaf)
        with Counted() as mode:
            generated.refresh(split=Split(0, 2, lambda mine: torch.stack([mine, mine])))
            generated.backward()
            generated.commit()
        counted.append(mode.operations)
    assert counted[0] == counted[1]
    assert "index_select" not in counted[0]  # the weights of adjacent networks are a view


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))
