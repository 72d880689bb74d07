"""The products θ·∇θ of many factors: of whole stacks, of large tensors, of many small ones."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from rank_budget.stacks import Block

# Numbers from which a tensor on a CPU is worth an operation of its own, which writes it once.
LARGE = 2**15
_NONE = type(None)

Read = Sequence[tuple[Sequence[Tensor], Sequence[Tensor | None]]]


@dataclass(frozen=True)
class Piece:
    """Matrices ``first`` up to ``last`` of an arena's block of that ``number``."""

    number: int
    block: Block
    first: int
    last: int

    @property
    def span(self) -> slice:
        """Its matrices among those of the block."""
        return slice(self.first, self.last)

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return (self.last - self.first) * self.block.numel_of_one

    @cached_property
    def nothing(self) -> Tensor:
        """Zeros for one of its tensors."""
        block = self.block
        return torch.zeros(block.shape[1:], dtype=block.dtype, device=block.device)

    def of(self, flat: Tensor) -> Tensor:
        """Return the piece's numbers, (matrices, *shape of the factor), as a view."""
        return flat.view(self.last - self.first, *self.block.shape[1:])


class Reader(Protocol):
    """Writes the products of some pieces to their place."""

    def __init__(self, pieces: Sequence[Piece], flat: Tensor, room: Tensor | None) -> None: ...

    def read_(self, read: Read) -> set[str]:
        """Write the products; return the matrices without a gradient, where zeros are written.

        ``read``: values and gradients of each block.

        Raises:
            RuntimeError: a tensor has another shape than it had; or PyTorch's warning of it.
        """


class Stacks:
    """Pieces of live stacks: an operation for each."""

    def __init__(self, pieces: Sequence[Piece], flat: Tensor, _: Tensor | None) -> None:
        self._parts = list(zip(pieces, split(pieces, flat), strict=True))

    def read_(self, read: Read) -> set[str]:
        """Write the products; a stack has its gradients always."""
        for piece, part in self._parts:
            values, grads = read[piece.number]
            grad = grads[0]
            assert grad is not None
            _multiply_(part, values[0][piece.span], grad[piece.span])
        return set()


class Large:
    """Tensors of which each is worth an operation of its own."""

    def __init__(self, pieces: Sequence[Piece], flat: Tensor, _: Tensor | None) -> None:
        parts = zip(pieces, split(pieces, flat), strict=True)
        self._places = [(piece, part.unbind()) for piece, part in parts]

    def read_(self, read: Read) -> set[str]:
        """Write the products; see `Reader`."""
        missing: set[str] = set()
        for piece, places in self._places:
            values, grads = read[piece.number]
            span = piece.span
            rows = zip(piece.block.names[span], places, values[span], grads[span], strict=True)
            for name, place, value, grad in rows:
                if grad is None:
                    missing.add(name)
                    place.zero_()
                else:
                    _multiply_(place, value, grad)
        return missing


class Small:
    """Tensors that are worth no operation of their own: brought together by a few."""

    def __init__(self, pieces: Sequence[Piece], flat: Tensor, room: Tensor | None) -> None:
        # Of those that differ in the first dimension alone, one stands behind the other.
        groups = [list(group) for _, group in groupby(pieces, lambda piece: piece.block.shape[2:])]

        def places(flat: Tensor) -> list[Tensor]:
            parts = torch.split(flat, [sum(piece.numel for piece in group) for group in groups])
            shapes = [(sum(map(_rows, group)), *group[0].block.shape[2:]) for group in groups]
            return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

        self._places = places(flat)
        rooms = [None] * len(groups) if room is None else places(room)
        self._groups = list(zip(groups, self._places, rooms, strict=True))

    def read_(self, read: Read) -> set[str]:
        """Write the products; see `Reader`."""
        missing: set[str] = set()
        factors: list[Tensor] = []
        for pieces, place, room in self._groups:
            values: list[Tensor] = []
            grads: list[Tensor] = []
            for piece in pieces:
                missing |= _append(piece, *read[piece.number], values, grads)
            factors.append(torch.cat(values, out=room))
            _check_fits(factors[-1], place)
            torch.cat(grads, out=place)
        torch._foreach_mul_(self._places, factors)
        return missing


def _rows(piece: Piece) -> int:
    """Return the length of its tensors along their first dimension, one behind the other."""
    return (piece.last - piece.first) * piece.block.shape[1]


def _append(
    piece: Piece,
    values: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    all_values: list[Tensor],
    all_grads: list[Tensor],
) -> set[str]:
    """Append a piece's values and gradients, zeros where there is none; return the missing."""
    here = grads[piece.span]
    if _NONE not in set(map(type, here)):
        all_values += values[piece.span]
        all_grads += here  # type: ignore[arg-type]
        return set()
    names = piece.block.names[piece.span]
    for value, grad in zip(values[piece.span], here, strict=True):
        all_values.append(piece.nothing if grad is None else value)
        all_grads.append(piece.nothing if grad is None else grad)
    return {name for name, grad in zip(names, here, strict=True) if grad is None}


def readers_of(pieces: Sequence[Piece], products: Tensor, room: Tensor | None) -> list[Reader]:
    """Return what reads the pieces, whose ``products`` stand flat, in their order.

    ``room``: for as many numbers, to be overwritten; where there is none, it is allocated anew.
    """
    groups = [(kind, list(group)) for kind, group in groupby(pieces, _kind)]
    sizes = [sum(piece.numel for piece in group) for _, group in groups]
    flats = torch.split(products, sizes)
    rooms = [None] * len(groups) if room is None else torch.split(room, sizes)
    rows = zip(groups, flats, rooms, strict=True)
    return [kind(group, flat, here) for (kind, group), flat, here in rows]


def split(pieces: Sequence[Piece], flat: Tensor) -> list[Tensor]:
    """Return a view for each piece of what stands flat over them."""
    parts = torch.split(flat, [piece.numel for piece in pieces])
    return [piece.of(part) for piece, part in zip(pieces, parts, strict=True)]


def _kind(piece: Piece) -> type[Reader]:
    block = piece.block
    if block.stacked:
        return Stacks
    large = block.device.type == "cpu" and block.numel_of_one >= LARGE
    return Large if large else Small


def _check_fits(values: Tensor, place: Tensor) -> None:
    """Refuse what an operation would expand, or make room for."""
    if values.shape != place.shape:
        raise RuntimeError(f"{tuple(values.shape)} for a place of {tuple(place.shape)}")


def _multiply_(place: Tensor, value: Tensor, grad: Tensor) -> None:
    """Write a product at the precision of ``place``."""
    _check_fits(value, place)
    if value.dtype == grad.dtype == place.dtype:
        torch.mul(value, grad, out=place)
    else:
        place.copy_(grad).mul_(value)
