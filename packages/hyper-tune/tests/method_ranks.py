"""What each rank of a job ends with after steps of DoRA and DyLoRA, for a test to compare.

Run alone or by torchrun: `method_ranks.py FOLDER` writes FOLDER/RANK.safetensors. The ranks start
from different seeds, and the base is on the meta device until it is sharded.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from hyper_tune import HypernetworkSettings, MethodConfig, SamplingSettings, assemble, parallel
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
        with method.step(optimizer, 1.0) as step:
            step.backward(loss_sum(model, x[mine], labels[mine]), (labels[mine] != -100).sum())
        losses.append(step.report.loss)
    tensors, _ = flatten(method.state_dict())
    found = {key: tensor.clone().contiguous() for key, tensor in tensors.items()}
    if method.sampled is not None:
        found["seed"] = torch.tensor(method.sampled.state_dict()["seed"])
    return found | {"losses": torch.tensor(losses), "factors": method.stack.values.clone()}


def main(folder: Path) -> None:
    """Write what this rank ends with."""
    torch.set_num_threads(1)
    parallel.start(torch.device("cpu"))
    found = {f"{name}|{key}": tensor for name in CASES for key, tensor in trained(name).items()}
    save_file(found, folder / f"{parallel.rank()}.safetensors")
    parallel.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
