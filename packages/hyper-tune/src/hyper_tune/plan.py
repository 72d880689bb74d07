"""What a run will take: memory of each GPU by part, and what goes between them in a step."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from hyper_tune.errors import UserError
from hyper_tune.layout import BaseLayout
from hyper_tune.memory import stored_parts
from hyper_tune.split import GenerationCost, SplitGeneration

# What is left of a GPU's memory for tensors: the rest goes to the driver's context, the buffers of
# communication and the gaps between blocks of the allocator.
USABLE = 0.9
_GPU = re.compile(r"[\w.]+-(\d+)")


@dataclass(frozen=True)
class Rehearsal:
    """One training step of one process, carried out without data or memory.

    ``blocks`` and ``root``: the base's parameters that are gathered together, those of each layer
    and the rest. ``buffers``: of the base, whole on each process. ``factors``: values of the
    low-rank factors, in numbers. ``hypernetworks``: weights that generate them; 0 where there are
    none. ``generation``: what generating costs, None where nothing is generated; ``split``: whether
    the processes share that, as `SharedGeneration` takes it. ``offload``: the base's shards are in
    the CPU's memory. ``held``: bytes that stay for the whole run, by part, besides the base.
    ``peak``: bytes that come and go, by part, at the moment when most are alive.
    """

    blocks: Sequence[Sequence[Tensor]]
    root: Sequence[Tensor]
    buffers: Sequence[Tensor]
    factors: int
    hypernetworks: int
    generation: GenerationCost | None
    split: SplitGeneration
    offload: bool
    held: Mapping[str, int]
    peak: Mapping[str, int]

    @property
    def base_parameters(self) -> int:
        """How many numbers the frozen base has."""
        return sum(tensor.numel() for tensor in self._base())

    def _base(self) -> list[Tensor]:
        return [*self.root, *(tensor for block in self.blocks for tensor in block)]

    def memory(self, layout: BaseLayout) -> dict[str, int]:
        """Return the bytes of one process's GPU at the peak of a step, by part.

        FSDP2 shards each parameter of the base by its first dimension. The root's are whole from
        the forward to the backward pass; of the blocks, one is in use while the next is gathered,
        into one buffer and from there into its parameters.
        """
        parts = {"base weights": 0 if self.offload else self.shards(layout)}
        if layout.shard > 1:
            largest = max(map(_bytes, self.blocks))
            parts["gathered base weights"] = _bytes(self.root) + 3 * largest
        parts["base buffers"] = _bytes(self.buffers)
        return parts | dict(self.held) | dict(self.peak)

    def shards(self, layout: BaseLayout) -> int:
        """Return the bytes of the base's weights that one process keeps."""
        return sum(_share(tensor, layout.shard) for tensor in self._base())

    def largest_weight(self) -> int:
        """Return the bytes of the base's largest tensor, which loading has in the CPU's memory."""
        return max(tensor.nbytes for tensor in self._base())

    def communication(self, layout: BaseLayout, micro_batches: int) -> dict[str, int]:
        """Return the bytes that one process receives in an optimizer step, by purpose.

        A ring of N passes (N - 1)/N of what is gathered, and twice that of what is summed. The
        base is gathered among the processes of one copy: the blocks in the forward and again in
        the backward pass, the root once. The factors' gradients are summed over all processes once
        a step; so are the hypernetworks' where generation is split, after one gathering of values.
        """
        processes = layout.shard * layout.replicate
        gathered = _bytes(self.root) + 2 * sum(map(_bytes, self.blocks))
        others = layout.shard - 1
        received = {
            "gathering the base": gathered * micro_batches * others // layout.shard,
            "summing gradients": 2 * self.held["factor gradients"] * (processes - 1) // processes,
        }
        if self.generation is not None and self._is_split(processes):
            received["generating in shares"] = self.generation.received(processes)
        return received

    def _is_split(self, processes: int) -> bool:
        assert self.generation is not None
        return self.split is True or (
            self.split == "auto" and self.generation.split_pays(processes)
        )


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(part.nbytes for tensor in tensors for part in stored_parts(tensor))


def _share(tensor: Tensor, processes: int) -> int:
    if processes == 1:
        return _bytes([tensor])
    rows = tensor.shape[0]
    return -(-rows // processes) * (tensor.nbytes // rows)


def gpu_bytes(name: str) -> int:
    """Return the memory that a GPU's name states, in GB of 10^9 bytes.

    Raises:
        UserError: the name does not end in its memory.

    >>> gpu_bytes("h100-80")
    80000000000
    """
    match = _GPU.fullmatch(name)
    if match is None:
        raise UserError(
            f"--gpu is {name!r}, but must end in the memory in GB, such as h100-80 or a100-40."
        )
    return int(match[1]) * 10**9
