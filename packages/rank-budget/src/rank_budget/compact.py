"""Physically smaller factors: pruned components out of layers and optimizer state."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rank_budget.allocator import RankAllocator
from rank_budget.errors import BudgetError
from rank_budget.layers import AdaLoraLayer, RankedLayer

_COMPONENTS = {"p": 1, "lam": 0, "q": 0}


def droppable(allocator: RankAllocator) -> dict[str, list[int]]:
    """Return, by matrix, the components that will never live again.

    None where components may yet return: in growth and regrowth, until the budget is final.

    >>> from rank_budget import FixedPruning, RankedMatrices
    >>> sigma, mask = torch.tensor([[3.0, 0.1, 2.0]]), torch.ones(1, 3, dtype=torch.bool)
    >>> matrices = RankedMatrices(("w",), sigma, torch.ones(1, 3), mask)
    >>> allocator = RankAllocator([matrices], FixedPruning(3, 2, 1, interval=1))
    >>> _ = allocator.step()
    >>> droppable(allocator)
    {'w': [1]}
    """
    masks = allocator.masks() if allocator.dead_stay_dead() else {}
    names = allocator.ranks()
    return {
        name: masks[name].logical_not().nonzero()[:, 0].tolist() if name in masks else []
        for name in names
    }


@torch.no_grad()
def compact_(
    layers: Mapping[str, RankedLayer],
    masks: Mapping[str, Tensor],
    optimizer: Optimizer | None = None,
) -> None:
    """Replace the factors of ``layers`` by smaller ones, of the live components only.

    What the layers compute does not change, nor does the optimizer's next step: its state is
    resized with the factors. Adapters keep their scaling, whatever their rank. A module's ``rank``
    and ``rank_mask``, if it has them, follow. The allocator that gave the masks may stay attached
    once its budget is final; for further pruning make a new one. Of layers that `ranked_layers`
    found in a ``PeftModel``, PEFT's ``rank_pattern`` follows, by which it saves and loads them; one
    that has nothing alive keeps a component of λ zero, frozen, since PEFT loads none without.

    ``masks``: bool, (rank,), such as `RankAllocator.masks` returns.

    Raises:
        BudgetError: a matrix without a mask of its rank, sharded factors, or optimizer state that
            is neither a number nor of the factor's shape. Nothing has been changed then.

    >>> p, lam, q = (nn.Parameter(torch.ones(size)) for size in ((4, 2), 2, (2, 3)))
    >>> from rank_budget import Triplet
    >>> layer = Triplet(p, lam, q)
    >>> compact_({"w": layer}, {"w": torch.tensor([True, False])})
    >>> tuple(layer.p.shape), tuple(layer.q.shape)
    ((4, 1), (1, 3))
    """
    _check_masks(layers, masks)
    state = {} if optimizer is None else optimizer.state
    for name, role, factor in _factors(layers):
        for key, value in state.get(factor, {}).items():
            if isinstance(value, Tensor) and value.dim() and value.shape != factor.shape:
                raise BudgetError(
                    f"the optimizer's {key} of {role} of {name} has the shape "
                    f"{tuple(value.shape)}, expected {tuple(factor.shape)}; use an optimizer "
                    "whose state has the shape of its parameters, such as Adam."
                )
    replaced: dict[Tensor, Tensor] = {}
    for name, layer in layers.items():
        mask = masks[name]
        if isinstance(layer, AdaLoraLayer):
            mask = layer.keep(mask)
            layer.record(mask)
        for role in _COMPONENTS:
            factor = getattr(layer, role)
            kept = mask.nonzero()[:, 0].to(factor.device)
            replaced[factor] = _replace(layer, role, factor, kept, state)
            if mask is not masks[name]:
                getattr(layer, role).requires_grad_(False)
        if mask is not masks[name]:
            layer.lam.zero_()
        _follow(layer, mask)
    for group in [] if optimizer is None else optimizer.param_groups:
        group["params"] = [replaced.get(parameter, parameter) for parameter in group["params"]]


def _check_masks(layers: Mapping[str, RankedLayer], masks: Mapping[str, Tensor]) -> None:
    if missing := sorted(layers.keys() - masks.keys()):
        raise BudgetError(f"{missing[0]} has no mask; give one for each layer.")
    for name, role, factor in _factors(layers):
        mask, rank = masks[name], factor.shape[_COMPONENTS[role]]
        if mask.dtype != torch.bool or tuple(mask.shape) != (rank,):
            raise BudgetError(
                f"the mask of {name} is {mask.dtype} {tuple(mask.shape)}, expected torch.bool "
                f"({rank},); give what the allocator's masks() returned before the first compact_."
            )
        if getattr(factor, "placements", None) is not None:
            raise BudgetError(
                f"{role} of {name} is sharded, expected a whole tensor; gather the factors before "
                "compact_."
            )


def _factors(layers: Mapping[str, RankedLayer]) -> Iterator[tuple[str, str, Tensor]]:
    for name, layer in layers.items():
        for role in _COMPONENTS:
            yield name, role, getattr(layer, role)


def _replace(layer: Any, role: str, factor: Tensor, kept: Tensor, state: Any) -> Tensor:
    dim = _COMPONENTS[role]
    smaller: Tensor = factor.detach().index_select(dim, kept)
    if isinstance(factor, nn.Parameter):
        smaller = nn.Parameter(smaller, requires_grad=factor.requires_grad)
    setattr(layer, role, smaller)
    if factor in state:
        state[smaller] = {
            key: value.index_select(dim, kept)
            if isinstance(value, Tensor) and value.dim()
            else value
            for key, value in state.pop(factor).items()
        }
    return smaller


def _follow(layer: Any, mask: Tensor) -> None:
    old = getattr(layer, "rank_mask", None)
    if old is not None:
        layer.rank_mask = torch.ones(int(mask.sum()), dtype=torch.bool, device=old.device)
    if isinstance(getattr(layer, "rank", None), int):
        layer.rank = int(mask.sum())
