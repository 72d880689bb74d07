"""Gradients of one training step under many arrangements, for the tests to compare.

Run as a script, alone or by torchrun: `leaf_gradients.py OUTPUT` writes, per arrangement, the
gradients that reach the hypernetworks' weights, the masks' scores and the penalty.
"""

import itertools
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.func import functional_call

from hyper_tune import MethodConfig, assemble, parallel
from hyper_tune.assembly import Assembly
from hyper_tune.method import HypernetworkSettings
from hyper_tune.parallel import shard_base_

WIDTH, CLASSES, SAMPLES, LENGTH = 6, 5, 4, 3
GAMMA = 0.1


class Block(nn.Module):
    """A residual block with an attention, wide enough to have two widths."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights = (self.query(x) @ x.transpose(1, 2)).softmax(-1)
        return x + self.down(torch.tanh(self.up(weights @ x)))


class Model(nn.Module):
    """Blocks and a head, in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.output = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.output(x)


class Recorder(torch.optim.SGD):
    """An optimizer that keeps the gradients it is given and changes nothing."""

    def step(self, closure: None = None) -> None:
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]


def data() -> tuple[Tensor, Tensor]:
    """Samples of unequal numbers of labels; -100 carries no loss."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SAMPLES, LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    labels = torch.randint(CLASSES, (SAMPLES, LENGTH), generator=generator)
    labels[0, 1:] = -100
    labels[3, 2] = -100
    return x, labels


def build(state: str) -> tuple[Model, Assembly]:
    """The model and its method, the same whatever the arrangement; λ is not zero."""
    torch.manual_seed(0)
    model = Model().double()
    config = MethodConfig(
        "hyperadalora",
        init_rank=3,
        budget=2,
        orthogonality=GAMMA,
        hypernetwork=HypernetworkSettings(preset="attention-small", state=state),
    )
    method = assemble(model, config, total_steps=100, dtype=torch.float64)
    with torch.no_grad():
        for name, weight in method.owner.named_parameters():
            generator = torch.Generator().manual_seed(len(name))
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return model, method


def loss_sum(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """The sum of the cross-entropies of the labels that count."""
    return nn.functional.cross_entropy(
        model(x).flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )


def literal_factors(method: Assembly, role: str, state: str) -> list[Tensor]:
    """The factors of one role, (matrices, rank, width) each, in one graph with the weights."""
    count = sum(group.role == role for group in method.stack.groups)
    before = [method.owner.get_buffer(f"state_{role}_{i}") for i in range(count)]
    after = method.owner.hypernetworks[role](before)
    if state == "static":
        after = [start + change for start, change in zip(before, after, strict=True)]
    if role == "lam":
        return after
    return [rows / rows.norm(dim=-1, keepdim=True) for rows in after]


def end_to_end(state: str) -> dict[str, Tensor]:
    """The twin: hypernetworks, model and penalty in one graph, one backward pass."""
    model, method = build(state)
    x, labels = data()
    names, weights = zip(*method.owner.named_parameters(), strict=True)
    generated = {role: literal_factors(method, role, state) for role in ("p", "lam", "q")}
    replaced = {}
    penalty = torch.zeros((), dtype=torch.float64)
    roles: dict[str, int] = {}
    for group in method.stack.groups:
        position = roles.setdefault(group.role, 0)
        roles[group.role] += 1
        for name, factor in zip(group.names, generated[group.role][position], strict=True):
            shaped = {"p": factor.T, "lam": factor[:, 0], "q": factor}[group.role]
            replaced[f"{name}.{group.role}"] = shaped
            if group.role != "lam":
                gram = factor @ factor.T - torch.eye(len(factor), dtype=torch.float64)
                penalty = penalty + gram.square().sum() / len(method.layers)
    logits = functional_call(model, replaced, (x,))
    task = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    grads = torch.autograd.grad(task + GAMMA * penalty, weights)
    return {"loss": task.detach(), "penalty": penalty.detach()} | dict(
        zip(names, grads, strict=True)
    )


def leaf_boundary(state: str, checkpointing: bool, accumulation: int) -> dict[str, Tensor]:
    """The step of the package, on this rank's share of the same samples."""
    model, method = build(state)
    if checkpointing:
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world > 1:
        shard_base_(model, model.layers, method.stack.leaf_parameters())
    x, labels = data()
    mine = slice(dist.get_rank(), None, world) if world > 1 else slice(None)
    batches = zip(x[mine].chunk(accumulation), labels[mine].chunk(accumulation), strict=True)
    optimizer = Recorder(method.parameters(), lr=0.0)
    with method.step(optimizer) as step:
        for inputs, targets in batches:
            step.backward(loss_sum(model, inputs, targets), (targets != -100).sum())
    names = [name for name, _ in method.owner.named_parameters()]
    report = {"loss": step.report.loss, "penalty": step.report.penalty}
    figures = {key: torch.tensor(value, dtype=torch.float64) for key, value in report.items()}
    return figures | dict(zip(names, optimizer.seen, strict=True))


def main(output: Path) -> None:
    """Write every arrangement of this number of ranks into one file."""
    torch.set_num_threads(1)
    distributed = dist.is_torchelastic_launched()
    if distributed:
        dist.init_process_group("gloo")
    results = {}
    for state, checkpointing, accumulation in itertools.product(
        ("recurrent", "static"), (False, True), (1, 2)
    ):
        arrangement = leaf_boundary(state, checkpointing, accumulation)
        for name, value in arrangement.items():
            results[f"{state}|{checkpointing}|{accumulation}|{name}"] = value.contiguous()
    if not distributed:
        for state in ("recurrent", "static"):
            for name, value in end_to_end(state).items():
                results[f"{state}|end-to-end|{name}"] = value.contiguous()
    if not distributed or dist.get_rank() == 0:
        save_file(results, output)
    parallel.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
