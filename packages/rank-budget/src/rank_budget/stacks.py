"""The factors of many matrices as few stacks, read together whatever holds them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rank_budget.errors import BudgetError
from rank_budget.layers import RankedFactors, RankedLayer, RankedMatrices, reading
from rank_budget.shards import Shard, local_part, local_parts, shard_of

ROLES = ("lam", "p", "q")
_COMPONENTS = {"lam": 0, "p": 1, "q": 0}


@dataclass(frozen=True)
class Block:
    """Factors of one role and shape: one live stack, or one tensor per matrix.

    ``read`` returns the tensors and their gradients, None where there is none.
    ``shape``: of all of them stacked, as this process holds them. ``rows``: how many components of
    each matrix are held, and ``first`` the first of them. ``width``: of the whole factor.
    ``last``: the last dimension is the width, else that before it.
    """

    role: str
    names: tuple[str, ...]
    rows: int
    width: int
    shape: tuple[int, ...]
    last: bool
    device: torch.device
    dtype: torch.dtype
    read: Callable[[], tuple[list[Tensor], list[Tensor | None]]]
    shard: Shard | None = None
    stacked: bool = False

    @property
    def first(self) -> int:
        """The first component held."""
        return self.shard.start if self.shard and self.shard.by_component else 0

    @property
    def contents(self) -> list[Any]:
        """What it holds, as plain values: role, names, shape, where its shard starts."""
        start = self.shard.start if self.shard else 0
        return [self.role, list(self.names), list(self.shape), start]

    @property
    def held(self) -> int:
        """How much of the width is held."""
        return self.numel // max(1, len(self.names) * self.rows)

    @property
    def numel(self) -> int:
        """Numbers held."""
        return torch.Size(self.shape).numel()

    @property
    def numel_of_one(self) -> int:
        """Numbers held of each matrix."""
        return torch.Size(self.shape[1:]).numel()

    def per_component(self, values: Tensor) -> Tensor:
        """Return (matrices, rows, width) of values in the block's shape, as a view."""
        if self.role == "lam":
            return values.reshape(len(self.names), self.rows, 1)
        return values if self.last else values.transpose(-1, -2)

    def stack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return tensors of the block as one, without a copy where it is one."""
        self.check(tensors)
        return tensors[0] if self.stacked else torch.stack(list(tensors))

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Refuse tensors that no longer have the block's shape.

        `read` does not: to look at hundreds of shapes takes a tenth of a step.
        """
        if self.stacked:
            return
        shape = self.shape[1:]
        for name, tensor in zip(self.names, tensors, strict=True):
            if tensor.shape != shape:
                raise BudgetError(
                    f"{self.role} of {name} has the shape {tuple(tensor.shape)}, but had "
                    f"{shape} when the allocator was made; make a new one."
                )


def blocks_of_stacks(
    matrices: Sequence[RankedMatrices], factors: Sequence[RankedFactors]
) -> list[Block]:
    """Return a block per live stack."""

    def block(role: str, stack: RankedMatrices | RankedFactors) -> Block:
        values, grads = stack.values, stack.gradients
        return Block(
            role=role,
            names=stack.names,
            rows=values.shape[1],
            width=1 if role == "lam" else values.shape[2],
            shape=tuple(values.shape),
            last=True,
            device=values.device,
            dtype=values.dtype,
            read=lambda: ([values], [grads]),
            stacked=True,
        )

    return [block("lam", stack) for stack in matrices] + [
        block(stack.role, stack) for stack in factors
    ]


def blocks_of_layers(layers: Mapping[str, RankedLayer], roles: Sequence[str]) -> list[Block]:
    """Return a block for all factors of one role, shape, dtype, device and sharding."""
    found: dict[tuple[object, ...], list[str]] = {}
    for role in roles:
        for name, layer in layers.items():
            factor = getattr(layer, role)
            local = local_part(factor)
            shard = shard_of(factor, _COMPONENTS[role], name)
            key = (role, tuple(local.shape), tuple(factor.shape), local.dtype, local.device, shard)
            found.setdefault(key, []).append(name)
    return [_block_of(role, layers, names) for (role, *_), names in found.items()]


def _block_of(role: object, layers: Mapping[str, RankedLayer], names: list[str]) -> Block:
    assert isinstance(role, str)
    factor = getattr(layers[names[0]], role)
    local = local_part(factor)

    factors = reading([layers[name] for name in names], role)

    def read() -> tuple[list[Tensor], list[Tensor | None]]:
        tensors = factors()
        return local_parts(tensors), local_parts([tensor.grad for tensor in tensors])

    component = _COMPONENTS[role]
    return Block(
        role=role,
        names=tuple(names),
        rows=local.shape[component],
        width=1 if role == "lam" else factor.shape[1 - component],
        shape=(len(names), *local.shape),
        last=component == 0,
        device=local.device,
        dtype=local.dtype,
        read=read,
        shard=shard_of(factor, component, names[0]),
    )


def wide_dtype(blocks: Sequence[Block]) -> torch.dtype:
    """Return the widest dtype of blocks, at least float32: a product of narrow numbers vanishes."""
    dtype = torch.float32
    for block in blocks:
        dtype = torch.promote_types(dtype, block.dtype)
    return dtype


class Gather:
    """Brings numbers per component, block by block, into the one order of all components.

    A component has one number from each role, the mean over the width; these are added. The sum
    over the shards of a role runs over all processes, and is the same on each. ``order``: the rank
    of each matrix, in order.
    """

    def __init__(self, blocks: Sequence[Block], order: Mapping[str, int]) -> None:
        starts, start = {}, 0
        for name, rank in order.items():
            starts[name] = start
            start += rank
        count = sum(len(block.names) * block.rows for block in blocks)
        self.device = blocks[0].device
        self.dtype = wide_dtype(blocks)
        present = [role for role in ROLES if any(block.role == role for block in blocks)]
        table = torch.full((len(present), start), count, dtype=torch.long)
        sharded = torch.zeros(len(present), start, dtype=torch.bool)
        weights = torch.zeros(len(present), start, dtype=torch.float64)
        position = 0
        for block in blocks:
            for name in block.names:
                places = slice(starts[name] + block.first, starts[name] + block.first + block.rows)
                row = present.index(block.role)
                table[row, places] = torch.arange(position, position + block.rows)
                weights[row, places] = block.held / block.width
                position += block.rows
                # All of it, for the sum must be over the same components on all processes.
                whole = slice(starts[name], starts[name] + order[name])
                sharded[row, whole] = block.shard is not None
        groups = {block.shard.group for block in blocks if block.shard is not None}
        if len(groups) > 1:
            raise BudgetError(
                "the factors are sharded over several process groups; shard all over one."
            )
        self._group = next(iter(groups), None)
        self._table = table.to(self.device)
        self._weights = weights.to(self.device, self.dtype)
        self._none = torch.zeros(1, dtype=self.dtype, device=self.device)
        self._sharded = sharded.to(self.device) if groups else None

    def __call__(self, parts: Sequence[Tensor]) -> Tensor:
        """Return (components,) from means over the width held, (matrices, rows), of each block."""
        flat = [part.reshape(-1).to(self.device) for part in parts]
        scores = torch.cat([*flat, self._none])[self._table]
        if self._sharded is None:
            return scores.sum(0)
        scores = scores * self._weights
        shared = torch.where(self._sharded, scores, 0).sum(0)
        torch.distributed.all_reduce(shared, group=self._group)
        return shared + torch.where(self._sharded, 0, scores).sum(0)

    def agree(self, finite: Tensor) -> Tensor:
        """Return whether it is so on every process that holds a part, without a read."""
        if self._sharded is None:
            return finite
        flag = finite.to(torch.float32)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN, group=self._group)
        return flag > 0
