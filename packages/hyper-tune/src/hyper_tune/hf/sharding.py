"""The frozen base of a model of transformers in shards."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from accelerate import DistributedType
from accelerate.state import is_initialized
from accelerate.utils import DynamoBackend
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from hyper_tune.checks import require_number
from hyper_tune.errors import UserError
from hyper_tune.parallel import shard_base_, world_size

if TYPE_CHECKING:
    from accelerate import Accelerator

    from hyper_tune.hf.adapted import AdaptedModel


def shard_(
    adapted: "AdaptedModel",
    accelerator: "Accelerator | None" = None,
    *,
    blocks: Sequence[str] | None = None,
    replicas: int = 1,
) -> None:
    """Shard the frozen base over all processes with FSDP2, block by block.

    Factors, hypernetworks and modules that are trained as a whole stay on every process; a step
    averages their gradients. ``accelerator``: the loop's, or ``trainer.accelerator``, which
    is told to leave the model as it is and to do mixed precision alone; call before
    ``accelerator.prepare``, and before ``trainer.train()``. ``blocks``: names of the modules'
    classes that are gathered each by itself; by default those that the model names itself.
    ``replicas``: copies of the base, each in shards over a part of the processes, neighbours by
    rank (HSDP): with the processes of a machine in each, none is gathered from another machine.
    A process that is alone shards nothing.

    Raises:
        UserError: before anything is changed: the model names no blocks, or has none of a name; the
            accelerator has an FSDP plugin or compiles the model, or was not given; the base is in
            shards already; the processes of the job have not met, or cannot have such replicas.
    """
    model, stack = adapted.model, adapted.method.stack
    _check_sharding(adapted, accelerator)
    _check_replicas(replicas)
    units = _blocks(model, blocks)
    if world_size() == 1:
        nn.Module.to(model, stack.values.device)
        return
    whole = [p for m in adapted.method.modules_to_save.values() for p in m.parameters()]
    shape = (replicas, world_size() // replicas)
    mesh = init_device_mesh(stack.values.device.type, shape, mesh_dim_names=("replicate", "shard"))
    mesh = mesh["shard"] if replicas == 1 else mesh
    name = type(model).__name__
    shard_base_(model, units, [*stack.leaf_parameters(), *whole], mesh)
    # Sharding changes the class; by its name Trainer knows whose labels to shift.
    setattr(model, "_get_name", lambda: name)  # noqa: B010
    if accelerator is not None:
        # In this mode accelerate adds autocast and wraps nothing, now or in a later `prepare`.
        accelerator.prepare_model(model, evaluation_mode=True)


def _check_sharding(adapted: "AdaptedModel", accelerator: "Accelerator | None") -> None:
    if adapted.sharded:
        raise UserError("the base is in shards already; call shard_ once.")
    if world_size() == 1 < int(os.environ.get("WORLD_SIZE", "1")):
        raise UserError(
            "the processes of this job have not met, so that nothing can be sharded over them; "
            "make the Accelerator or Trainer first, or call torch.distributed.init_process_group()."
        )
    if accelerator is None:
        if is_initialized():
            raise UserError(
                "there is an Accelerator, which would wrap the sharded model again; give it to "
                "shard_(adapted, accelerator), or trainer.accelerator."
            )
        return
    refuse_plugin(accelerator)
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise UserError(
            "accelerate would compile the sharded model as one; leave torch_compile or the dynamo "
            "backend out, and compile its blocks: block.compile()."
        )


def _check_replicas(replicas: int) -> None:
    require_number("replicas", replicas, whole=True, least=1)
    ranks = world_size()
    if ranks > 1 < replicas and (ranks % replicas or ranks == replicas):
        raise UserError(
            f"replicas is {replicas}, which must divide the job's {ranks} processes into parts of "
            "two or more, over which a copy of the base is in shards; lower it, or leave shard_ "
            "out where each process holds the whole base."
        )


def refuse_fsdp(whose: str, accelerator: str) -> NoReturn:
    """Say why accelerate's own FSDP cannot be, and what can.

    Raises:
        UserError: always.
    """
    raise UserError(
        f"{whose} shards by FSDP, and keeps the optimizer's state by the names of the model's "
        "parameters, which the hypernetworks' are not; leave its FSDP out, and call "
        f"hyper_tune.hf.shard_(adapted, {accelerator}), which shards the base with FSDP2."
    )


def refuse_plugin(accelerator: "Accelerator") -> None:
    """Refuse an accelerator that has an FSDP plugin."""
    if accelerator.distributed_type == DistributedType.FSDP:
        refuse_fsdp("accelerate", "accelerator")


def _blocks(model: nn.Module, names: Sequence[str] | None) -> list[nn.Module]:
    """Return the modules of these classes, the inner before the outer."""
    wanted = set(names or getattr(model, "_no_split_modules", None) or ())
    found = [module for module in model.modules() if type(module).__name__ in wanted]
    absent = sorted(set(names or ()) - {type(module).__name__ for module in found})
    if absent or not found:
        what = f"has no module of {', '.join(absent)}" if absent else "names no blocks of its own"
        raise UserError(
            f"{type(model).__name__} {what}; give shard_ the class names of its layers, such as "
            'blocks=["LlamaDecoderLayer"].'
        )
    return found[::-1]
