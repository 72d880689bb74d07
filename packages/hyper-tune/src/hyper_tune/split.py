"""Generation split over ranks: each generates a share of the matrices, one gathering for all."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from hyper_core import GeneratedParameters, Hypernetwork, Split
from hyper_core.context import Context
from hyper_tune.parallel import gather_over_ranks, rank, sum_over_ranks_, world_size

SplitGeneration = bool | Literal["auto"]

# What a GPU computes while it receives one byte from its neighbours: 60 TFLOP/s in float32 against
# 300 GB/s within a machine. Between machines it is more, and splitting pays later.
OPERATIONS_PER_BYTE = 200


class SharedGeneration(GeneratedParameters):
    """`GeneratedParameters` whose work may be shared over the ranks of a job.

    ``shared``: a training step's `refresh` generates this rank's share of the matrices and gathers
    the values of all; `backward` sums the weights' gradients over the ranks; each in one collective
    operation. The leaves' gradients must be those of all ranks before, as `TrainingStep` makes
    them. Values, gradients, state and what is saved are those of `GeneratedParameters`, but for
    the order of sums. An evaluation's refresh, under `torch.no_grad`, generates all on each rank,
    so that rank 0 may do it alone.
    """

    shared = False

    def share_(self, wanted: SplitGeneration) -> None:
        """Share the work from now on, or not, or where it takes less than generating all."""
        ranks = world_size()
        self.shared = ranks > 1 and (split_pays(self, ranks) if wanted == "auto" else wanted)

    def refresh(self, context: Context = None, *, split: Split | None = None) -> None:
        """Write this step's values into the leaves, on all ranks together."""
        if self.shared and torch.is_grad_enabled():
            split = Split(rank(), world_size(), gather_over_ranks)
        super().refresh(context, split=split)

    def backward(self, scale: float = 1.0) -> None:
        """Carry the leaves' gradients to the weights; all ranks get the same."""
        super().backward(scale)
        if not self.shared:
            return
        gradients = [weight.grad for weight in self.parameters() if weight.grad is not None]
        flat = sum_over_ranks_(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        summed = [part.view_as(g) for part, g in zip(parts, gradients, strict=True)]
        torch._foreach_copy_(gradients, summed)


def split_pays(generated: GeneratedParameters, processes: int) -> bool:
    """Return whether a share's operations and the exchange take less than generating all.

    Counted: three products (forward, backward to input and to weights) of every token with every
    weight it meets; the values received once and the weights' gradients twice, as by a ring.
    """
    saved = generation_operations(generated) * (processes - 1) // processes
    return saved > OPERATIONS_PER_BYTE * exchanged_bytes(generated, processes)


def generation_operations(generated: GeneratedParameters) -> int:
    """Return the additions and multiplications of one refresh and its backward pass."""
    total = 0
    for network in generated.hypernetworks.values():
        assert isinstance(network, Hypernetwork)
        trunk = _numel(network.trunk) // network.networks
        for matrices, tokens, width in network.shapes:
            name = str(width)
            maps = [network.inputs[name], network.outputs[name]]
            weights = sum(weight[0].numel() for part in maps for weight in part.parameters())
            total += matrices * tokens * (weights + trunk)
    return 6 * total


def _numel(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def exchanged_bytes(generated: GeneratedParameters, processes: int) -> int:
    """Return the bytes that each of ``processes`` receives in a step of split generation."""
    values = sum(_bytes(generated.state_of(role)) for role in generated.roles)
    weights = _bytes(generated.parameters())
    return (values + 2 * weights) * (processes - 1) // processes


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
