"""Gradients of one training step under many arrangements, for the tests to compare.

Run as a script, alone or by torchrun: `leaf_gradients.py OUTPUT` writes, per arrangement, the
gradients that reach the hypernetworks' weights, loss and penalty, and what a few steps lead to.
"""

import itertools
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.func import functional_call

from hyper_tune import MethodConfig, assemble, parallel
from hyper_tune.assembly import Assembly
from hyper_tune.layout import BaseLayout
from hyper_tune.method import HypernetworkSettings, PruningSettings
from hyper_tune.parallel import shard_base_
from hyper_tune.step import StepReport
from hyper_tune.tree import flatten

WIDTH, CLASSES, SAMPLES, LENGTH = 6, 5, 8, 3
GAMMA = 0.1
STATES = ("recurrent", "static")


class Arrangement(NamedTuple):
    """How a step is carried out.

    ``copies``: of the base, each in shards, among the ranks. ``split``: each rank generates a share
    of the matrices. ``compiled``: each block by itself, before it is sharded.
    """

    state: str
    checkpointing: bool
    accumulation: int
    copies: int = 1
    split: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        return "|".join(map(str, self))


_PLAIN = [Arrangement(*choice) for choice in itertools.product(STATES, (False, True), (1, 2))]
_SPLIT = [Arrangement(state, True, 2, split=True) for state in STATES]
# By the number of ranks.
ARRANGEMENTS = {
    1: _PLAIN,
    2: _PLAIN + _SPLIT + [Arrangement("static", True, 2, compiled=True)],
    4: [Arrangement(state, True, 2, copies) for state in STATES for copies in (1, 2, 4)] + _SPLIT,
}


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


def build(state: str, split: bool = False) -> tuple[Model, Assembly]:
    """The model and its method, the same whatever the arrangement; λ is not zero."""
    torch.manual_seed(0)
    model = Model().double()
    config = MethodConfig(
        "hyperadalora",
        init_rank=3,
        budget=2,
        orthogonality=GAMMA,
        pruning=PruningSettings(interval=2, count=4),
        hypernetwork=HypernetworkSettings(preset="attention-small", state=state),
    )
    method = assemble(model, config, total_steps=100, dtype=torch.float64, split_generation=split)
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


def arranged(arrangement: Arrangement) -> tuple[Model, Assembly]:
    """The model, sharded over the ranks as the arrangement says."""
    model, method = build(arrangement.state, arrangement.split)
    if arrangement.compiled:
        for layer in model.layers:
            layer.compile(backend="aot_eager")
    if arrangement.checkpointing:
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    layout = BaseLayout.of(parallel.world_size(), replicate=arrangement.copies)
    if layout.shard > 1:
        mesh = layout.mesh(torch.device("cpu"))
        shard_base_(model, model.layers, method.stack.leaf_parameters(), mesh)
        sharded = model.layers[0].down.base.weight
        assert sharded.to_local().numel() < sharded.numel()
        assert sharded.device_mesh.ndim == (2 if arrangement.copies > 1 else 1)
    return model, method


def run_step(
    arrangement: Arrangement, model: Model, method: Assembly, optimizer: torch.optim.Optimizer
) -> StepReport:
    """One step on this rank's share of the same samples."""
    x, labels = data()
    mine = slice(parallel.rank(), None, parallel.world_size())
    count = arrangement.accumulation
    batches = zip(x[mine].chunk(count), labels[mine].chunk(count), strict=True)
    with method.step(optimizer) as step:
        for inputs, targets in batches:
            step.backward(loss_sum(model, inputs, targets), (targets != -100).sum())
    return step.report


def leaf_boundary(arrangement: Arrangement) -> dict[str, Tensor]:
    """What the step of the package gives the optimizer."""
    model, method = arranged(arrangement)
    optimizer = Recorder(method.parameters(), lr=0.0)
    report = run_step(arrangement, model, method, optimizer)
    names = [name for name, _ in method.owner.named_parameters()]
    values = {"loss": report.loss, "penalty": report.penalty}
    figures = {key: torch.tensor(value, dtype=torch.float64) for key, value in values.items()}
    return figures | dict(zip(names, optimizer.seen, strict=True))


def trained(arrangement: Arrangement) -> dict[str, Tensor]:
    """The method's state, masks and exported adapter after a few steps, with a pruning."""
    model, method = arranged(arrangement)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05)
    for _ in range(4):
        run_step(arrangement, model, method, optimizer)
    tensors, _ = flatten(method.state_dict())
    found = {f"state.{name}": tensor for name, tensor in tensors.items()}
    for group in method.stack.groups:
        if group.rank_mask is not None:
            found[f"mask.{group.names[0]}"] = group.rank_mask
    with tempfile.TemporaryDirectory() as folder:
        exported = load_file(method.export(Path(folder) / "adapter") / "adapter_model.safetensors")
    return found | {f"exported.{name}": tensor for name, tensor in exported.items()}


def main(output: Path) -> None:
    """Write every arrangement of this number of ranks into one file."""
    torch.set_num_threads(1)
    distributed = dist.is_torchelastic_launched()
    if distributed:
        dist.init_process_group("gloo")
    results = {}
    for arrangement in ARRANGEMENTS[parallel.world_size()]:
        for name, value in leaf_boundary(arrangement).items():
            results[f"{arrangement}|{name}"] = value.clone()
        if arrangement.checkpointing and arrangement.accumulation == 2:
            for name, value in trained(arrangement).items():
                results[f"{arrangement}|trained|{name}"] = value.clone()
    if not distributed:
        for state in STATES:
            for name, value in end_to_end(state).items():
                results[f"{state}|end-to-end|{name}"] = value.clone()
    if not distributed or dist.get_rank() == 0:
        save_file({name: value.contiguous() for name, value in results.items()}, output)
    parallel.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
