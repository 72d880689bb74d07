"""Whether all ranks hold the same state, to the bit."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad
from torch.optim import Optimizer

from hyper_tune.errors import UserError
from hyper_tune.parallel import world_size
from hyper_tune.tree import flatten

if TYPE_CHECKING:
    from hyper_tune.assembly import Assembly

_STRIDE = 0x9E3779B97F4A7C15 - (1 << 64)


def replicated_tensors(assembly: "Assembly", optimizer: Optimizer) -> dict[str, Tensor]:
    """Return, by name, every tensor of a method that must be the same on all ranks.

    What a checkpoint holds, hypernetworks, moments, scores and history among it, and the factors
    and masks that the layers read.
    """
    tensors, _ = flatten(assembly.state_dict(optimizer))
    masks = {
        f"rank_mask/{group.role}.{number}": group.rank_mask
        for number, group in enumerate(assembly.stack.groups)
        if group.rank_mask is not None
    }
    return {**tensors, **masks, "factors": assembly.stack.values}


def digests(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return a 64-bit digest of each tensor's bytes, (tensors,), int64, on the tensors' device.

    d = Σ (2i + 1)·c · wordᵢ mod 2⁶⁴, of words of eight bytes and an odd c: each word's factor is
    odd, so that any change of one word changes the digest, and factors differ, so that exchanged
    words do too. It finds faults, not forgeries.

    >>> a, b = torch.zeros(3), torch.tensor([0.0, 1e-45, 0.0])
    >>> digests({"a": a}).equal(digests({"a": b}))
    False
    """
    return torch.stack([_digest(tensor.detach()) for tensor in tensors.values()])


def _digest(tensor: Tensor) -> Tensor:
    content = tensor.contiguous().reshape(-1).view(torch.uint8)
    # At least one byte more: the padded copy also begins where a word may.
    words = pad(content, (0, 8 - content.numel() % 8)).view(torch.int64)
    position = torch.arange(len(words), device=words.device)
    return (words * (2 * position + 1) * _STRIDE).sum()


def refuse_disagreement(tensors: Mapping[str, Tensor], where: str) -> None:
    """Compare the bytes of every rank's tensors with rank 0's; all ranks must call it.

    Raises:
        UserError: on every rank; names the first tensor that differs and the ranks that hold
            another than rank 0.
    """
    if not dist.is_initialized():
        return
    mine = digests(tensors)
    everyone = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(everyone, mine)
    differs = torch.stack(everyone) != everyone[0]
    wrong = differs.any(0).nonzero().flatten().tolist()
    if wrong:
        ranks = differs[:, wrong[0]].nonzero().flatten().tolist()
        raise UserError(
            f"{where}, {list(tensors)[wrong[0]]} is not the same on every rank: rank "
            f"{', '.join(map(str, ranks))} holds other bits than rank 0 ({len(wrong)} of "
            f"{len(tensors)} tensors differ); look for faulty memory, or for code that changes "
            "one rank's copy, and resume from the last checkpoint."
        )
