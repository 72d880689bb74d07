"""Which sample is seen when: a pure function of seed, epoch and position."""

import hashlib
from functools import lru_cache

import torch

from hyper_tune.errors import UserError


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for one purpose, such as ``("step", 7, rank)``; stable for ever.

    >>> derive_seed(0, "step", 3) != derive_seed(0, "step", 4)
    True
    """
    text = repr((int(seed), *purpose)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, dataset_size: int) -> list[int]:
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(dataset_size, generator=generator).tolist()


def sample_at(position: int, *, dataset_size: int, seed: int, shuffle: bool) -> int:
    """Return the sample at a position of the endless stream of epochs.

    Epoch ``position // dataset_size`` is a permutation of all samples, so that none is skipped or
    repeated within an epoch; batches run across the ends of epochs.

    >>> [sample_at(p, dataset_size=3, seed=0, shuffle=False) for p in range(5)]
    [0, 1, 2, 0, 1]
    """
    epoch, offset = divmod(position, dataset_size)
    return _permutation(seed, epoch, dataset_size)[offset] if shuffle else offset


def batch_positions(
    step: int, *, batch_size: int, accumulation: int, world_size: int, rank: int
) -> list[range]:
    """Return where in the stream the micro-batches of one rank are at one step (from 0).

    A step takes the next ``batch_size * accumulation * world_size`` positions of the stream; any
    split of the same number covers the same samples.

    >>> batch_positions(1, batch_size=2, accumulation=2, world_size=2, rank=1)
    [range(10, 12), range(14, 16)]
    """
    start = step * batch_size * accumulation * world_size
    return [
        range(first, first + batch_size)
        for micro_batch in range(accumulation)
        for first in [start + (micro_batch * world_size + rank) * batch_size]
    ]


def total_steps(
    dataset_size: int | None, global_batch: int, epochs: int, max_steps: int | None
) -> int:
    """Return the optimizer steps of a run: the whole batches in ``epochs``, at most ``max_steps``.

    ``dataset_size``: None of a stream, whose run ``max_steps`` alone ends.

    Raises:
        UserError: there are fewer samples than one step takes, or a stream without ``max_steps``.

    >>> total_steps(100, 8, epochs=2, max_steps=None)
    25
    """
    if dataset_size is None:
        if max_steps is None:
            raise UserError("dataset is a stream, whose end is not known before; set max_steps.")
        return max_steps
    steps = epochs * dataset_size // global_batch
    if steps < 1:
        raise UserError(
            f"{epochs} epoch(s) of {dataset_size} samples are fewer than one step takes "
            f"({global_batch}); lower batch_size or gradient_accumulation_steps, or raise epochs."
        )
    return steps if max_steps is None else min(steps, max_steps)
