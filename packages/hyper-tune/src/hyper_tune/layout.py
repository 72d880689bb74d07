"""Where the base's shards are: over all processes, or over groups of them that hold copies."""

from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from hyper_tune.checks import require_number
from hyper_tune.errors import UserError


@dataclass(frozen=True)
class BaseLayout:
    """``replicate`` copies of the frozen base, each in ``shard`` shards (HSDP).

    Process r has shard r mod ``shard``: processes of one copy have neighbouring numbers, so that
    what is gathered in each pass stays within a machine of ``shard`` GPUs. One copy is FSDP2; one
    shard leaves the base whole, and nothing of it is passed around. Factors and hypernetworks are
    on all processes in any layout, and their gradients are summed over all.

    >>> BaseLayout.of(8, replicate=2)
    BaseLayout(shard=4, replicate=2)
    """

    shard: int
    replicate: int

    @classmethod
    def of(cls, processes: int, shard: int = -1, replicate: int = 1) -> "BaseLayout":
        """Return the layout of a job; -1 for ``shard`` stands for all that ``replicate`` leaves.

        Raises:
            UserError: sizes that are not whole, or whose product is not ``processes``.
        """
        check_dims(shard, replicate)
        if shard == -1 and processes % replicate == 0:
            shard = processes // replicate
        if shard * replicate != processes:
            raise UserError(
                f"data_parallel_shard_dim={shard} and data_parallel_replicate_dim={replicate} need "
                f"{_product(shard, replicate)} processes, but the job has {processes}; make their "
                "product the number of processes, or set data_parallel_shard_dim=-1."
            )
        return cls(shard, replicate)

    def mesh(self, device: torch.device) -> DeviceMesh:
        """Return the processes as FSDP2 takes them: replicate x shard, or shard alone."""
        if self.replicate == 1:
            return init_device_mesh(device.type, (self.shard,), mesh_dim_names=("shard",))
        names = ("replicate", "shard")
        return init_device_mesh(device.type, (self.replicate, self.shard), mesh_dim_names=names)


def check_dims(shard: int, replicate: int) -> None:
    """Raise a `UserError` for sizes that no job can have."""
    if shard != -1:
        require_number("data_parallel_shard_dim", shard, whole=True, least=1)
    require_number("data_parallel_replicate_dim", replicate, whole=True, least=1)


def _product(shard: int, replicate: int) -> str:
    return f"a multiple of {replicate}" if shard == -1 else str(shard * replicate)


def own_shard(whole: torch.Tensor, like: DTensor, dtype: torch.dtype) -> DTensor:
    """Return this process's rows of ``whole``, copied, placed as ``like``, which FSDP2 made.

    No process sends another anything: each has read the same ``whole``.
    """
    local = whole
    for dimension, placement in enumerate(like.placements):
        if placement.is_shard():
            rows = -(-len(whole) // like.device_mesh.size(dimension))
            start = rows * like.device_mesh.get_local_rank(dimension)
            local = whole[start : start + rows]
    assert local.shape == like.to_local().shape
    return DTensor.from_local(
        local.to(dtype, copy=True),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=whole.shape,
        stride=torch.empty(whole.shape, device="meta").stride(),
    )
