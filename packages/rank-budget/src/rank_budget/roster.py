"""The matrices of an allocator in their one order: names, ranks, widths, and where masks go."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rank_budget.errors import BudgetError
from rank_budget.layers import RankedFactors, RankedLayer, RankedMatrices, check_layer, reading
from rank_budget.layout import Limits, order_of
from rank_budget.shards import local_part, local_parts, shard_of
from rank_budget.stacks import Block, blocks_of_layers, blocks_of_stacks


@dataclass(frozen=True)
class Roster:
    """What the allocator knows of the matrices.

    ``ranks``: of each matrix, in the order of everything flat. ``widths``: output and input of
    each, where known. ``writers`` put masks, (components,), where layers read them; ``silencers``
    put λ of what is pruned to zero where layers read no mask, and ``zeroers`` do so everywhere.
    ``layers``: where there are any, not stacks.
    """

    ranks: Mapping[str, int]
    widths: Mapping[str, tuple[int, int]]
    blocks: Sequence[Block]
    alive: Tensor
    writers: Sequence[Callable[[Tensor], None]]
    silencers: Sequence[Callable[[Tensor], None]]
    zeroers: Sequence[Callable[[Tensor], None]]
    layers: Mapping[str, RankedLayer] = field(default_factory=dict)

    def write(self, alive: Tensor) -> None:
        """Put masks where layers read them."""
        for write in self.writers:
            write(alive)

    def silence(self, alive: Tensor) -> None:
        """Put λ of what is dead to zero where layers read no mask."""
        for silence in self.silencers:
            silence(alive)

    def zero(self, alive: Tensor) -> None:
        """Put λ of what is dead to zero everywhere."""
        for zero in self.zeroers:
            zero(alive)

    def by_matrix(self, flat: Tensor) -> dict[str, Tensor]:
        """Return what stands flat over all components as a view per matrix."""
        return dict(zip(self.ranks, torch.split(flat, list(self.ranks.values())), strict=True))

    def components_of(self, names: Collection[str]) -> Tensor:
        """Return which components belong to the named matrices, bool, (components,)."""
        chosen = torch.tensor([name in names for name in self.ranks])
        counts = torch.tensor(list(self.ranks.values()))
        return chosen.repeat_interleave(counts).to(self.alive.device)


def roster_of(
    layers: Mapping[str, RankedLayer] | Sequence[RankedMatrices],
    factors: Sequence[RankedFactors],
    roles: Sequence[str],
    limits: Limits,
) -> Roster:
    """Return the roster of layers by name, or of live stacks.

    Raises:
        BudgetError: it is neither, or they do not fit.
    """
    if isinstance(layers, Mapping):
        return roster_of_layers(layers, roles, limits)
    if not isinstance(layers, Sequence):
        raise BudgetError(
            f"layers is a {type(layers).__name__}, expected layers by name, such as "
            "ranked_layers(model) returns, or a list of RankedMatrices."
        )
    for stack in (*layers, *factors):
        if not isinstance(stack, RankedMatrices | RankedFactors):
            raise BudgetError(
                f"a stack is a {type(stack).__name__}, expected RankedMatrices and RankedFactors; "
                "give layers with three tensors by name, in a dict."
            )
    return roster_of_stacks(layers, factors, roles, limits)


def roster_of_stacks(
    matrices: Sequence[RankedMatrices],
    factors: Sequence[RankedFactors],
    roles: Sequence[str],
    limits: Limits,
) -> Roster:
    """Return the roster of live stacks.

    Raises:
        BudgetError: no matrix, a name given twice, or factors that do not fit.
    """
    names = [name for stack in matrices for name in stack.names]
    if not names or len(set(names)) != len(names):
        raise BudgetError(f"matrices must have unique names, got {names}.")
    rank = {name: stack.values.shape[1] for stack in matrices for name in stack.names}
    widths: dict[str, dict[str, int]] = {name: {} for name in names}
    for factor in factors:
        _, components, width = factor.values.shape
        for name in factor.names:
            if rank.get(name) != components or factor.role in widths[name]:
                raise BudgetError(
                    f"{factor.role} of {name} has {components} components, expected "
                    f"{rank.get(name, 'no such matrix')}, once."
                )
            widths[name][factor.role] = width
    for name in names:
        for role in roles[1:]:
            if role not in widths[name]:
                raise BudgetError(
                    f"the score reads {role}, but {name} has none; give its stack in factors."
                )
    order = {name: rank[name] for name in order_of(names, limits)}
    device = matrices[0].rank_mask.device
    places = _places(order, device)
    alive = torch.zeros(sum(order.values()), dtype=torch.bool, device=device)
    writers, zeroers = [], []
    for stack in matrices:
        index = torch.stack([places[name] for name in stack.names])
        alive[index] = stack.rank_mask.to(device)
        writers.append(_stack_writer(stack, index))
        zeroers.append(_stack_zeroer(stack, index))
    both = {name: (w["p"], w["q"]) for name, w in widths.items() if len(w) == 2}
    read = [factor for factor in factors if factor.role in roles]
    return Roster(order, both, blocks_of_stacks(matrices, read), alive, writers, [], zeroers)


def _stack_writer(stack: RankedMatrices, index: Tensor) -> Callable[[Tensor], None]:
    return lambda alive: void(stack.rank_mask.copy_(alive[index]))


def _stack_zeroer(stack: RankedMatrices, index: Tensor) -> Callable[[Tensor], None]:
    return lambda alive: void(stack.values.mul_(alive[index].to(stack.values.device)))


def void(result: object) -> None:
    """Return nothing: for what is done for its effect."""
    del result


def roster_of_layers(
    layers: Mapping[str, RankedLayer], roles: Sequence[str], limits: Limits
) -> Roster:
    """Return the roster of layers with three tensors each.

    Raises:
        BudgetError: no layer, or one whose tensors are no triplet.
    """
    if not layers:
        raise BudgetError("there are no layers; put the adapters on the model first.")
    for name, layer in layers.items():
        check_layer(name, layer)
    rank = {name: layer.lam.shape[0] for name, layer in layers.items()}
    order = {name: rank[name] for name in order_of(list(layers), limits)}
    blocks = blocks_of_layers(layers, roles)
    device = blocks[0].device
    places = _places(order, device)
    alive = torch.ones(sum(order.values()), dtype=torch.bool, device=device)
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, layer in layers.items():
        mask = getattr(layer, "rank_mask", None)
        if mask is not None:
            alive[places[name]] = mask.to(device)
        lam = local_part(layer.lam)
        shard = shard_of(layer.lam, 0, name)
        groups.setdefault((lam.shape, lam.dtype, lam.device, shard, mask is None), []).append(name)
    writers, silencers, zeroers = [], [], []
    for (*_, maskless), names in groups.items():
        index = torch.stack([places[name] for name in names])
        zeroer = _layer_zeroer([layers[name] for name in names], index)
        zeroers.append(zeroer)
        if maskless:
            silencers.append(zeroer)
        else:
            writers.append(_layer_writer([layers[name] for name in names], index))
    widths = {name: (layer.p.shape[0], layer.q.shape[1]) for name, layer in layers.items()}
    return Roster(order, widths, blocks, alive, writers, silencers, zeroers, layers)


def _layer_writer(layers: Sequence[RankedLayer], index: Tensor) -> Callable[[Tensor], None]:
    def write(alive: Tensor) -> None:
        masks = [layer.rank_mask for layer in layers]  # type: ignore[attr-defined]
        torch._foreach_copy_(masks, alive[index].unbind())

    return write


def _layer_zeroer(layers: Sequence[RankedLayer], index: Tensor) -> Callable[[Tensor], None]:
    lam = local_part(layers[0].lam).detach()
    shape = lam.shape
    shard = shard_of(layers[0].lam, 0, "lam")
    first = shard.start if shard is not None else 0
    rows = index[:, first : first + lam.shape[0]]
    factors = reading(layers, "lam")
    keep = lam.new_empty(len(layers), *shape)
    keeps = list(keep.unbind())

    def zero(alive: Tensor) -> None:
        values = local_parts(factors())
        keep.copy_(alive[rows].view(keep.shape))
        try:
            torch._foreach_mul_(values, keeps)
        except RuntimeError:
            # A layer that `compact_` has made smaller has nothing dead any more.
            for value, kept in zip(values, keeps, strict=True):
                if value.shape == shape:
                    value.mul_(kept)

    return zero


def _places(order: Mapping[str, int], device: torch.device) -> dict[str, Tensor]:
    parts = torch.split(torch.arange(sum(order.values()), device=device), list(order.values()))
    return dict(zip(order, parts, strict=True))
