"""What each of two processes allocates, for the tests to compare.

Run by torchrun: `parallel_ranks.py FOLDER` writes FOLDER/RANK.json.
"""

import gc
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from rank_budget import (
    CubicBudget,
    NormShare,
    RankAllocator,
    SmoothedSensitivity,
    attach_,
    compact_,
    ranked_layers,
)

STEPS = 8


class SVD(nn.Module):
    """A frozen map and three factors; 5 components and widths of 6 and 7 split unevenly."""

    def __init__(self, mask):
        super().__init__()
        self.base = nn.Linear(7, 6).requires_grad_(False)
        self.p = nn.Parameter(torch.randn(6, 5))
        self.lam = nn.Parameter(torch.randn(5))
        self.q = nn.Parameter(torch.randn(5, 7))
        if mask:
            self.register_buffer("rank_mask", torch.ones(5, dtype=torch.bool))

    def forward(self, x):
        lam = self.lam * self.rank_mask if hasattr(self, "rank_mask") else self.lam
        return self.base(x) + (x @ self.q.T * lam) @ self.p.T


def build():
    torch.manual_seed(1)
    return nn.Sequential(SVD(True), nn.Linear(6, 7).requires_grad_(False), SVD(False))


def batch(step, rank):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 7, generator=generator)[2 * rank : 2 * rank + 2]


def train(model, inside, after_backward=lambda: None, score=None):
    """Train on this process's half of each batch; return the masks and scores of each step."""
    schedule = CubicBudget(10, 3, total_steps=STEPS, warmup=1, cooldown=2)
    allocator = RankAllocator(ranked_layers(inside), schedule, score=score or SmoothedSensitivity())
    factors = [p for p in inside.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(factors, lr=0.05)
    attach_(allocator, optimizer)
    seen: list = []
    for step in range(STEPS):
        optimizer.zero_grad()
        x = (
            torch.cat([batch(step, 0), batch(step, 1)])
            if model is None
            else batch(step, dist.get_rank())
        )
        loss = ((inside if model is None else model)(x) - 1).square().mean()
        loss.backward()
        after_backward()
        optimizer.step()
        masks = {name: mask.tolist() for name, mask in allocator.masks().items()}
        scores = {name: part.tolist() for name, part in allocator.importance().items()}
        lam = inside[2].lam.detach()
        whole = lam.full_tensor() if hasattr(lam, "full_tensor") else lam
        zero = (whole == 0).tolist()
        seen.append([masks, scores, allocator.steps, allocator.skipped, zero])
    return seen


def reference():
    """One process with the whole batch."""
    return train(None, build())


def ddp():
    model = build()
    return train(DistributedDataParallel(model), model)


def sharded():
    model = build()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    parts = {name: list(p.to_local().shape) for name, p in model[0].named_parameters()}
    return train(model, model), parts, sharded_compact(model)


def sharded_compact(model):
    """Factors that are sharded cannot be cut; nothing is changed."""
    layers = ranked_layers(model)
    before = list(model.parameters())
    try:
        compact_(layers, {name: torch.ones(5, dtype=torch.bool) for name in layers})
    except ValueError as error:
        return [str(error), list(map(id, before)) == list(map(id, model.parameters()))]
    return []


def not_finite():
    """One gradient of the part that the last process holds is not finite, at the third step."""
    model = build()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh)
    steps = iter(range(STEPS))

    def damage():
        if next(steps) == 2 and dist.get_rank() == 1:
            model[0].q.grad.to_local()[0, 0] = torch.nan

    return [row[2:4] for row in train(model, model, damage)]


def replicated():
    """The base is sharded; the factors are left out, and reduced by the loop."""
    model = build()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    factors = {p for p in model.parameters() if p.requires_grad}
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=mesh, ignored_params=factors)
    fully_shard(model, mesh=mesh, ignored_params=factors)

    def average():
        for factor in model.parameters():
            if factor in factors:
                dist.all_reduce(factor.grad)
                factor.grad /= dist.get_world_size()

    return train(model, model, average)


def other_part():
    """The state of one process is not that of another, though the parts have equal shapes."""
    torch.manual_seed(1)
    layer = SVD(True)
    layer.p, layer.lam, layer.q = (
        nn.Parameter(torch.randn(shape)) for shape in ((6, 4), (4,), (4, 8))
    )
    layer.rank_mask = torch.ones(4, dtype=torch.bool)
    model = nn.Sequential(layer)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    schedule = CubicBudget(4, 3, total_steps=STEPS)
    one, two = (
        RankAllocator(ranked_layers(model), schedule, score=SmoothedSensitivity()) for _ in "12"
    )
    states = [None] * dist.get_world_size()
    dist.all_gather_object(states, one.state_dict())
    two.load_state_dict(states[dist.get_rank()])
    try:
        two.load_state_dict(states[1 - dist.get_rank()])
    except ValueError as error:
        return str(error)
    return ""


def refusal():
    """NormShare needs whole factors."""
    model = build()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh)
    try:
        train(model, model, score=NormShare())
    except ValueError as error:
        return str(error)
    return ""


def main(folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    cases = (reference, ddp, sharded, not_finite, replicated, refusal, other_part)
    seen = {case.__name__: case() for case in cases}
    seen["sharded"], seen["parts"], seen["compact"] = seen["sharded"]
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(seen))
    gc.collect()  # a sharded model that is freed after the group may abort the process
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
