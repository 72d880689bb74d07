"""The twins: the papers' formulas in float64, one number after the other; a small decoder."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_adapters import SVD, AdapterError, inject_adapters_


def dot(first, second):
    return sum(a * b for a, b in zip(first, second, strict=True))


def lora_linear(x, weight, bias, a, b, scaling):
    """One vector x (in): W x + bias + s · B (A x)."""
    hidden = [dot(row, x) for row in a]
    return torch.stack(
        [
            dot(weight[o], x) + bias[o] + scaling * dot(b[o], hidden)
            for o in range(weight.shape[0])
        ]
    )  # fmt: skip


def svd_linear(x, weight, bias, p, lam, q, mask, scaling):
    """One vector x (in): W x + bias + s · P diag(mask · λ) Q x."""
    y = []
    for o in range(weight.shape[0]):
        update = 0
        for k in range(len(lam)):
            if mask[k]:
                update = update + p[o, k] * lam[k] * dot(q[k], x)
        y.append(dot(weight[o], x) + bias[o] + scaling * update)
    return torch.stack(y)


def dora_linear(x, weight, bias, a, b, magnitude, scaling, *, detach_norm):
    """One vector x (in): bias + m · V x / ‖V‖ by row, with V = W + s · B A."""
    y = []
    for o in range(weight.shape[0]):
        row = weight[o]
        for k in range(len(a)):
            row = row + scaling * b[o, k] * a[k]
        norm = dot(row, row).sqrt()
        y.append(bias[o] + magnitude[o] * dot(row, x) / (norm.detach() if detach_norm else norm))
    return torch.stack(y)


def patches(x, kernel, stride, padding, dilation):
    """Each patch of an image x (channels, height, width), in the order of the output: (in,)."""
    channels, height, width = x.shape
    zero = torch.zeros((), dtype=x.dtype)
    found = []
    for top in range(-padding[0], height + padding[0] - dilation[0] * (kernel[0] - 1), stride[0]):
        for left in range(
            -padding[1], width + padding[1] - dilation[1] * (kernel[1] - 1), stride[1]
        ):
            patch = []
            for c in range(channels):
                for i in range(kernel[0]):
                    for j in range(kernel[1]):
                        row, column = top + i * dilation[0], left + j * dilation[1]
                        inside = 0 <= row < height and 0 <= column < width
                        patch.append(x[c, row, column] if inside else zero)
            found.append(torch.stack(patch))
    return found


def update_matrix(p, lam, q, mask, scaling):
    """s · P diag(mask · λ) Q, element by element."""
    update = torch.zeros(p.shape[0], q.shape[1], dtype=torch.float64)
    for o in range(p.shape[0]):
        for i in range(q.shape[1]):
            for k in range(len(lam)):
                if mask[k]:
                    update[o, i] += scaling * p[o, k].double() * lam[k].double() * q[k, i].double()
    return update


def orthogonality(pairs):
    """The mean of ‖Pᵀ P − I‖² + ‖Q Qᵀ − I‖² over pairs (P, Q)."""
    total = 0
    for p, q in pairs:
        for rows in (p.T, q):
            for i in range(len(rows)):
                for j in range(len(rows)):
                    total = total + (dot(rows[i], rows[j]) - (1 if i == j else 0)) ** 2
    return total / len(pairs)


def orthogonality_of_adalora(pairs):
    """The mean of ‖A Aᵀ − I‖_F over all Pᵀ and Q, as AdaLoRA's code has it."""
    norms = []
    for p, q in pairs:
        for rows in (p.T, q):
            squares = 0
            for i in range(len(rows)):
                for j in range(len(rows)):
                    squares = squares + (dot(rows[i], rows[j]) - (1 if i == j else 0)) ** 2
            norms.append(squares.sqrt())
    return sum(norms) / len(norms)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, 3)
        self.mlp = nn.ModuleDict({"w1": nn.Linear(width, 7), "w2": nn.Linear(7, width)})

    def forward(self, x):
        mixed = self.q_proj(x) * self.v_proj(x).sum(-1, keepdim=True)
        return x + self.mlp["w2"](torch.tanh(self.mlp["w1"](mixed)))


class Decoder(nn.Module):
    """Embedding, blocks, head; the head stands first, so that model order is not name order."""

    def __init__(self, blocks=2, width=5):
        super().__init__()
        self.output = nn.Linear(width, 11, bias=False)
        self.embedding = nn.Embedding(11, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.layers:
            x = block(x)
        return self.output(x)


class Counted(TorchDispatchMode):
    """Counts tensor operations by name."""

    def __init__(self):
        super().__init__()
        self.operations = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def shaken(model):
    """Move every factor off its start and mask about a third of the components."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in ("a", "b", "p", "lam", "q"):
                parameter.normal_()
        for name, buffer in model.named_buffers():
            if name.endswith("rank_mask"):
                buffer.copy_(torch.rand(buffer.shape) > 1 / 3)
    return model


def adapted(make=None, blocks=2, width=5, **options):
    """A decoder with adapters off their start, and its layers by name."""
    model = Decoder(blocks, width)
    layers = inject_adapters_(model, make or SVD(rank=3, alpha=4.5), **options)
    return shaken(model), layers


def error_text(call, *args, **options):
    with pytest.raises(AdapterError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def twin():
    return SimpleNamespace(
        dora_linear=dora_linear,
        lora_linear=lora_linear,
        orthogonality=orthogonality,
        orthogonality_of_adalora=orthogonality_of_adalora,
        patches=patches,
        svd_linear=svd_linear,
        update_matrix=update_matrix,
    )


@pytest.fixture(scope="session")
def kit():
    """The models and helpers that several files of tests use."""
    return SimpleNamespace(
        Counted=Counted, Decoder=Decoder, adapted=adapted, error_text=error_text, shaken=shaken
    )
