"""Generation split over ranks: each generates a share of the matrices, one gathering for all."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

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
        """Share the work from now on, or not, or where it takes less than generating all.

        One process has nobody to share with, and is warned if it is to.
        """
        ranks = world_size()
        if wanted is True and ranks == 1:
            warnings.warn(
                "split_generation is True, but there is one process, which generates all; set it "
                "to auto, which splits where that is less work, or start more processes.",
                stacklevel=5,
            )
        pays = wanted == "auto" and GenerationCost.of(self).split_pays(ranks)
        self.shared = ranks > 1 and (wanted is True or pays)

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


@dataclass(frozen=True)
class GenerationCost:
    """What one refresh and its backward pass take.

    ``operations``: additions and multiplications: three products (forward, backward to input and
    to weights) of every token with every weight that it meets. ``values``, ``weights``: bytes of
    what is generated and of the hypernetworks' weights.

    >>> import torch
    >>> leaves = {"q": [torch.zeros(8, 2, 16)]}
    >>> cost = GenerationCost.of(GeneratedParameters(leaves, config="mlp-small"))
    >>> cost.values, cost.received(2), cost.split_pays(2)
    (1024, 24512, False)
    """

    operations: int
    values: int
    weights: int

    @classmethod
    def of(cls, generated: GeneratedParameters) -> "GenerationCost":
        """Count, on any device."""
        products = 0
        for network in generated.hypernetworks.values():
            assert isinstance(network, Hypernetwork)
            trunk = sum(w[0].numel() for w in network.trunk.parameters())
            for matrices, tokens, width in network.shapes:
                maps = [network.inputs[str(width)], network.outputs[str(width)]]
                met = trunk + sum(w[0].numel() for part in maps for w in part.parameters())
                products += matrices * tokens * met
        states = [state for role in generated.roles for state in generated.state_of(role)]
        return cls(6 * products, _bytes(states), _bytes(generated.parameters()))

    def received(self, processes: int) -> int:
        """Return the bytes that each process receives where generation is split.

        As by a ring: the values of the others' shares, and the weights' gradients twice.
        """
        return (self.values + 2 * self.weights) * (processes - 1) // processes

    def split_pays(self, processes: int) -> bool:
        """Return whether the others' share would take longer to generate than to receive."""
        others = self.operations * (processes - 1) // processes
        return others > OPERATIONS_PER_BYTE * self.received(processes)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
