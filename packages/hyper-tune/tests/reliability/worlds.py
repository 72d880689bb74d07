"""What jobs of several sizes save, load and compute, for a test to compare."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from hyper_tune import MethodConfig, assemble, parallel, step
from hyper_tune.assembly import Assembly
from hyper_tune.checkpoint import read_newest, write_checkpoint
from hyper_tune.method import HypernetworkSettings, PruningSettings
from hyper_tune.parallel import shard_base_
from hyper_tune.tree import flatten

CPU = torch.device("cpu")


class Recorder(torch.optim.SGD):
    """An optimizer that keeps the gradients it is given, and then steps."""

    def step(self, closure: None = None) -> None:
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        super().step()


def build(dtype: torch.dtype) -> tuple[nn.Module, Assembly, Recorder]:
    """A base that is sharded where there are several processes, and its method."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)).to(dtype)
    config = MethodConfig(
        "hyperadalora",
        init_rank=3,
        budget=2,
        hypernetwork=HypernetworkSettings(preset="attention-small"),
        pruning=PruningSettings(interval=3),
    )
    method = assemble(model, config, total_steps=20, dtype=dtype)
    with torch.no_grad():  # λ is not zero.
        for number, weight in enumerate(method.parameters()):
            generator = torch.Generator().manual_seed(number)
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator, dtype=dtype))
    if parallel.world_size() > 1:
        shard_base_(model, [model[0], model[2]], method.stack.leaf_parameters())
    return model, method, Recorder(method.parameters(), lr=1e-3, momentum=0.9)


def train(model: nn.Module, method: Assembly, optimizer: Recorder, number: int) -> Any:
    """Step on eight sequences of unequal lengths, shared out over the processes."""
    generator = torch.Generator().manual_seed(number)
    weight = next(iter(method.parameters()))
    data = torch.randn(8, 6, 8, generator=generator, dtype=weight.dtype)
    mine = range(parallel.rank(), 8, parallel.world_size())
    with method.step(optimizer, max_grad_norm=1.0) as block:
        for sample in mine:
            x = data[sample, : 1 + (3 * sample + number) % 6]
            block.backward((model(x) - x.flip(-1)).square().sum(), tokens=len(x))
    return block.report


def colour(tensors: dict[str, torch.Tensor], rank: int) -> None:
    """Fill all numbers by values that say whose they are."""
    for position, tensor in enumerate(tensors.values()):
        if tensor.is_floating_point():
            tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape) + 1e3 * rank + position)


def digest(method: Assembly, optimizer: Recorder) -> str:
    """Return a digest of all bytes of a state."""
    tensors, plain = flatten(method.state_dict(optimizer))
    found = hashlib.sha256(json.dumps(plain).encode())
    for name, tensor in tensors.items():
        found.update(
            name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    return found.hexdigest()


@torch.no_grad()
def _coloured(rank: int) -> tuple[Assembly, Recorder]:
    model, method, optimizer = build(torch.float32)
    with torch.enable_grad():
        train(model, method, optimizer, 0)
    colour(flatten(method.state_dict(optimizer))[0], rank)
    return method, optimizer


def save_coloured(folder: str) -> None:
    """Save a state that says what is where, and its digest."""
    parallel.start(CPU)
    method, optimizer = _coloured(0)
    state = method.state_dict(optimizer)
    parallel.on_rank_zero(lambda: write_checkpoint(Path(folder), 1, state), CPU)
    (Path(folder).parent / f"saved.{parallel.rank()}").write_text(digest(method, optimizer))
    parallel.stop()


def load_coloured(folder: str) -> None:
    """Load it into a state that each process has filled with its own colour."""
    parallel.start(CPU)
    rank, world = parallel.rank(), parallel.world_size()
    method, optimizer = _coloured(rank + 1)
    before = digest(method, optimizer)
    method.load_state_dict(read_newest(Path(folder))[1], optimizer)
    found = {"before": before, "after": digest(method, optimizer)}
    (Path(folder).parent / f"loaded-{world}.{rank}").write_text(json.dumps(found))
    parallel.stop()


def compute_apart(folder: str) -> None:
    """Do as `compute`, but forget to sum over the processes, which the test must notice."""
    step.sum_over_ranks_ = lambda tensor: tensor
    compute(folder)


def compute(folder: str) -> None:
    """Write the gradients of a step in float64, and losses and masks of many in float32."""
    parallel.start(CPU)
    model, method, optimizer = build(torch.float64)
    train(model, method, optimizer, 0)
    gradients = {str(n): gradient.contiguous() for n, gradient in enumerate(optimizer.seen)}
    model, method, optimizer = build(torch.float32)
    losses = [train(model, method, optimizer, number).loss for number in range(20)]
    assert method.allocator is not None
    masks = {f"mask {name}": mask for name, mask in method.allocator.masks().items()}
    figures = {"losses": torch.tensor(losses, dtype=torch.float64)}
    Path(folder).mkdir(exist_ok=True)
    output = Path(folder) / f"{parallel.world_size()}-{parallel.rank()}.safetensors"
    save_file({**gradients, **masks, **figures}, output)
    parallel.stop()
