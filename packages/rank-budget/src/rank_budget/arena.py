"""Flat buffers for the numbers of many factors, worked on in runs that a CPU's cache holds."""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from rank_budget.products import Piece, Read, readers_of, split
from rank_budget.stacks import Block, wide_dtype

# Numbers of a run on a CPU. Memory is what a step waits for there, so that all is done to a run
# while the cache holds it; elsewhere operations are what it waits for, and all is one run.
CACHED = 2**19


class Run:
    """Whole matrices that are worked on together: pieces of blocks, in their order."""

    def __init__(self, pieces: Sequence[Piece], products: Tensor, room: Tensor | None) -> None:
        self.pieces = list(pieces)
        self.products = products
        # Room for as many numbers, to be overwritten. Where all is one run, what is there is used
        # no more when the averages have moved.
        self.room = products if room is None else room[: products.numel()]
        self._readers = readers_of(pieces, products, None if room is None else self.room)

    def split(self, flat: Tensor) -> list[Tensor]:
        """Return a view for each piece of what stands flat over the run."""
        return split(self.pieces, flat)

    def read_products_(self, read: Read) -> set[str]:
        """Write |θ·∇θ| to ``products``; return the names of matrices without a gradient.

        ``read``: values and gradients of each block of the arena. Where there is no gradient
        ``products`` holds zero.
        """
        missing = set().union(*(reader.read_(read) for reader in self._readers))
        self.products.abs_()
        return missing


class Arena:
    """All blocks on one device, and a flat buffer in which each has its place.

    ``products`` serves until it is read anew.
    """

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = list(blocks)
        self.device = blocks[0].device
        self.dtype = wide_dtype(blocks)
        self.numel = sum(block.numel for block in blocks)
        self.products = self.zeros()
        on_cpu = self.device.type == "cpu"
        runs = list(_runs_of(blocks, CACHED if on_cpu else self.numel))
        self._lengths = [sum(piece.numel for piece in pieces) for pieces in runs]
        room = self.products.new_empty(max(self._lengths)) if on_cpu else None
        pairs = zip(runs, self.by_run(self.products), strict=True)
        self.runs = [Run(pieces, products, room) for pieces, products in pairs]
        self._largest = self.products.new_zeros(len(runs))

    def zeros(self) -> Tensor:
        """Return a flat buffer."""
        return torch.zeros(self.numel, dtype=self.dtype, device=self.device)

    def split(self, flat: Tensor) -> list[Tensor]:
        """Return a view of the block's shape for each block."""
        parts = torch.split(flat, [block.numel for block in self.blocks])
        return [part.view(block.shape) for part, block in zip(parts, self.blocks, strict=True)]

    def by_run(self, flat: Tensor) -> Sequence[Tensor]:
        """Return a view for each run."""
        return torch.split(flat, self._lengths)

    def read_products(self, grad_scale: Tensor | None = None) -> tuple[Tensor, set[str]]:
        """Put |θ·∇θ| of everything into ``products``; return the largest, and what is missing.

        The largest, unlike a sum, is finite whenever all are. ``grad_scale``: by which the
        gradients are still multiplied.
        """
        read = [block.read() for block in self.blocks]
        scale = None if grad_scale is None else grad_scale.to(self.device)
        missing: set[str] = set()
        for run, largest in zip(self.runs, self._largest.unbind(), strict=True):
            try:
                missing |= run.read_products_(read)
            except (RuntimeError, UserWarning):
                for block, (values, _) in zip(self.blocks, read, strict=True):
                    block.check(values)
                raise
            if scale is not None:
                run.products.div_(scale)
            if run.products.numel():
                torch.amax(run.products, 0, out=largest)
        return self._largest, missing

    def present(self, missing: Collection[str]) -> Tensor:
        """Return 1 for the numbers of each matrix, 0 for those of ``missing``, flat."""
        listed = [(name not in missing, block) for block in self.blocks for name in block.names]
        weights = torch.tensor([float(here) for here, _ in listed], dtype=self.dtype)
        sizes = torch.tensor([block.numel_of_one for _, block in listed])
        return weights.repeat_interleave(sizes).to(self.device)


def _runs_of(blocks: Sequence[Block], most: int) -> Iterator[list[Piece]]:
    """Yield whole matrices, as many as have at most so many numbers, but at least one."""
    pieces: list[Piece] = []
    room = most
    for number, block in enumerate(blocks):
        first, one = 0, max(1, block.numel_of_one)
        while first < len(block.names):
            if pieces and room < one:
                yield pieces
                pieces, room = [], most
            last = min(len(block.names), first + max(1, room // one))
            pieces.append(Piece(number, block, first, last))
            room -= (last - first) * one
            first = last
    yield pieces


def arenas_of(blocks: Sequence[Block]) -> list[Arena]:
    """Return an arena per device, in the order in which the devices come."""
    devices: dict[torch.device, list[Block]] = {}
    for block in blocks:
        devices.setdefault(block.device, []).append(block)
    return [Arena(blocks) for blocks in devices.values()]
