"""What each rank of a job ends with after steps of DoRA and DyLoRA, for a test to compare.

The ranks start from different seeds, and the base is on the meta device until it is sharded.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from hyper_tune import (
    HypernetworkSettings,
    MethodConfig,
    SamplingSettings,
    assemble,
    parallel,
    step,
)
from hyper_tune.assembly import Assembly
from hyper_tune.tree import flatten
from leaf_gradients import Model, data, loss_sum

CASES = ("dora", "hyperdora", "dylora", "hyperdylora")


def build(name: str) -> tuple[Model, Assembly]:
    """The model with a method whose factors are away from their start."""
    torch.manual_seed(0)
    weights = Model().double().state_dict()
    with torch.device("meta"):
        model = Model().double()
    small = HypernetworkSettings(preset="attention-tiny") if "hyper" in name else None
    sampling = SamplingSettings(draw="each") if name == "dylora" else None
    config = MethodConfig(name, init_rank=3, hypernetwork=small, sampling=sampling)
    torch.manual_seed(parallel.rank())
    method = assemble(model, config, total_steps=100, dtype=torch.float64)
    if parallel.world_size() > 1:
        parallel.shard_base_(model, model.layers, method.stack.leaf_parameters())
    for module_name, module in model.named_modules():
        for key, place in module.named_parameters(recurse=False):
            if place.is_meta:
                whole = weights[f"{module_name}.{key}".replace(".base.", ".")]
                if isinstance(place, DTensor):
                    whole = distribute_tensor(whole, place.device_mesh, place.placements)
                module.register_parameter(key, torch.nn.Parameter(whole, requires_grad=False))
    for layer in method.layers.values():
        layer.materialise_()
    with torch.no_grad():
        for key, parameter in method.owner.named_parameters():
            random = torch.Generator().manual_seed(len(key))
            noise = torch.randn(parameter.shape, generator=random, dtype=parameter.dtype)
            parameter.add_(0.05 * noise)
    return model, method


def trained(name: str) -> dict[str, Tensor]:
    """The state after steps, each on this rank's share of the same samples."""
    model, method = build(name)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.05)
    x, labels = data()
    mine = slice(parallel.rank(), None, parallel.world_size())
    losses = []
    for _ in range(4):
        with method.step(optimizer, 1.0) as block:
            block.backward(loss_sum(model, x[mine], labels[mine]), (labels[mine] != -100).sum())
        losses.append(block.report.loss)
    tensors, _ = flatten(method.state_dict())
    found = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
    if method.sampled is not None:
        found["seed"] = torch.tensor(method.sampled.state_dict()["seed"])
    return found | {"losses": torch.tensor(losses), "factors": method.stack.values.clone()}


def train_all(folder: str) -> None:
    """Write FOLDER/RANKS-RANK.safetensors, what this rank ends with."""
    parallel.start(torch.device("cpu"))
    found = {f"{name}|{key}": tensor for name in CASES for key, tensor in trained(name).items()}
    Path(folder).mkdir(exist_ok=True)
    save_file(found, Path(folder) / f"{parallel.world_size()}-{parallel.rank()}.safetensors")
    parallel.stop()


def train_apart(folder: str) -> None:
    """Do as `train_all`, but forget to sum over the processes, which the test must notice."""
    step.sum_over_ranks_ = lambda tensor: tensor
    train_all(folder)
