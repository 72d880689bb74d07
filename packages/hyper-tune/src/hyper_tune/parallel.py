"""One process or many: the reductions of a step, and the sharding of the frozen base."""

import gc
import os
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from hyper_tune.errors import UserError

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes of the job; 1 outside a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this process's rank; 0 outside a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_ranks_(tensor: Tensor) -> Tensor:
    """Add the tensor of every rank into each rank's own, in place; without a group, do nothing."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather_over_ranks(mine: Tensor) -> Tensor:
    """Return the vectors of all ranks, (ranks, numbers), which are of equal length."""
    everyone = mine.new_empty(world_size(), len(mine))
    if not dist.is_initialized():
        return everyone.copy_(mine)
    dist.all_gather(list(everyone.unbind()), mine)
    return everyone


@torch.no_grad()
def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Overwrite each rank's tensors by rank 0's."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def shard_base_(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    leaves: Iterable[nn.Parameter],
    mesh: DeviceMesh | None = None,
    *,
    offload: bool = False,
) -> None:
    """Shard the frozen base with FSDP2, block by block; the leaves stay whole.

    Every rank holds and reads all of ``leaves`` (the factors), whose gradients the training step
    reduces itself. A model on the meta device stays there until its weights are loaded.
    ``mesh``: replicate x shard, or shard alone; all ranks without it. ``offload``: shards are in
    the CPU's memory, and copied to the GPU for each use.
    """
    ignored = set(leaves)
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, ignored_params=ignored, offload_policy=policy)


def usable_device(name: str) -> torch.device:
    """Return the device of a name such as "cpu" or "cuda".

    Raises:
        UserError: the name is of neither, or this machine has no such device.
    """
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"device is {name!r}; expected cpu or cuda.")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device is {name!r}; expected cpu or cuda.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device is 'cuda', but this machine has no usable GPU; set device=cpu.")
    return device


def start(device: torch.device, timeout_seconds: float = 600) -> torch.device:
    """Join the job that `torchrun` describes in the environment; return this process's device.

    gloo carries the CPU's tensors and NCCL a GPU's; either raises where the other ranks do not
    take part within ``timeout_seconds``. Without `torchrun` nothing is started.
    """
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    return device


def stop() -> None:
    """Leave the job, if there is one; sharded models should be out of use by then."""
    if dist.is_initialized():
        # A sharded model holds the group: one that is freed when Python ends takes gloo's threads
        # down with it, which now and then aborts a process that has finished its work.
        gc.collect()
        dist.destroy_process_group()


def together(action: Callable[[], T], device: torch.device) -> T:
    """Run ``action`` on every rank and return what it returns; where one fails, every rank raises.

    Raises:
        Exception: on a rank where the action failed, whatever it raised.
        UserError: on the other ranks; it names the first that failed.
    """
    failure: Exception | None = None
    result: T | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    none = world_size()
    first = torch.tensor(none if failure is None else rank(), device=device)
    if dist.is_initialized():
        dist.all_reduce(first, dist.ReduceOp.MIN)
    if failure is not None:
        raise failure
    if first < none:
        raise UserError(f"rank {int(first)} could not go on; its message says why.")
    return cast("T", result)


def on_rank_zero(action: Callable[[], object], device: torch.device) -> None:
    """Run ``action`` on rank 0 alone; where it fails there, every rank raises, as `together`."""
    together(lambda: action() if rank() == 0 else None, device)


class HeldFailure:
    """The error of what one rank does alone, held until all ranks meet to raise it by `together`.

    A rank that raised at once would leave the others waiting for it. ``failed`` may go into what
    the ranks exchange anyway, so that they meet soon.
    """

    def __init__(self) -> None:
        self._error: OSError | None = None

    @property
    def failed(self) -> bool:
        """Whether an error is held."""
        return self._error is not None

    def attempt(self, action: Callable[[], object]) -> None:
        """Run ``action`` and hold its `OSError`; after one, do nothing."""
        if self._error is None:
            try:
                action()
            except OSError as error:
                self._error = error

    def release(self) -> None:
        """Raise the error that is held."""
        if self._error is not None:
            raise self._error


def agree(value: int, what: str, device: torch.device) -> None:
    """Raise a `UserError` on every rank unless all ranks have the same ``value``."""
    limits = torch.tensor([value, -value], device=device)
    if dist.is_initialized():
        dist.all_reduce(limits, dist.ReduceOp.MAX)
    highest, lowest_negated = limits.tolist()
    if highest != -lowest_negated:
        raise UserError(f"{what} differs between the ranks; rank {rank()} has {value}.")
