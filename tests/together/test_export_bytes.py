"""A budget in bytes is what the compact export of lowrank-adapters weighs."""

import json

import torch
from safetensors.torch import load_file
from torch import nn

from lowrank_adapters import SVD, export_peft, inject_adapters_
from rank_budget import OneShot, RankAllocator, ranked_layers
from rank_budget.costs import total_cost

RANK = 4


def test_a_budget_in_bytes_is_the_size_of_the_compact_export(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 5), nn.Linear(5, 7))
    adapters = inject_adapters_(model, SVD(rank=RANK, alpha=8.0))
    layers = ranked_layers(model)
    for layer in layers.values():
        for factor in (layer.p, layer.lam, layer.q):
            nn.init.normal_(factor)
    widths = {name: (layer.p.shape[0], layer.q.shape[1]) for name, layer in layers.items()}
    initial = total_cost([(RANK, *width) for width in widths.values()], "bytes")
    schedule = OneShot(initial, initial // 2, at=1)
    allocator = RankAllocator(layers, schedule, score="magnitude", cost="bytes")
    allocator.step()
    ranks = allocator.ranks()
    assert len(set(ranks.values())) > 1
    cost = total_cost([(ranks[name], *width) for name, width in widths.items()], "bytes")
    weights = {}
    for form in ("compact", "padded"):
        folder = export_peft(adapters, tmp_path / form, form=form)
        tensors = load_file(folder / "adapter_model.safetensors")
        weights[form] = sum(tensor.nbytes for tensor in tensors.values())
    assert weights["compact"] == cost <= initial // 2
    assert weights["padded"] > cost
    config = json.loads((tmp_path / "compact" / "adapter_config.json").read_text())
    assert set(config["rank_pattern"].values()) == set(filter(None, ranks.values()))
