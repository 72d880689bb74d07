"""A method under accelerate: its state in accelerate's checkpoints, its base in shards."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import DistributedType
from accelerate.state import is_initialized
from accelerate.utils import DynamoBackend
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from hyper_tune.errors import UserError
from hyper_tune.parallel import shard_base_, world_size

if TYPE_CHECKING:
    from accelerate import Accelerator

    from hyper_tune.hf.adapted import AdaptedModel

FSDP_REFUSED = (
    "{} shards by FSDP, and keeps the optimizer's state by the names of the model's parameters, "
    "which the hypernetworks' are not; leave its FSDP out, and call hyper_tune.hf.shard_(adapted, "
    "{}), which shards the base with FSDP2."
)


def register_(accelerator: "Accelerator", adapted: "AdaptedModel") -> None:
    """Let ``accelerator.save_state`` and ``load_state`` keep the method's state.

    In place of the model's weights, which are the frozen base's, they write and read what
    `AdaptedModel.save` does; accelerate itself keeps the optimizer, the scheduler and the random
    numbers. Call it before or after ``accelerator.prepare``.

    Raises:
        UserError: the accelerator has an FSDP plugin; use `shard_`.
    """
    _refuse_plugin(accelerator)

    def save(models: list[Any], weights: list[Any], folder: str) -> None:
        for place in _places(accelerator, adapted, models):
            weights.pop(place)
        if accelerator.is_main_process:
            adapted.save(folder)

    def load(models: list[Any], folder: str) -> None:
        for place in _places(accelerator, adapted, models):
            models.pop(place)
        adapted.load(Path(folder))

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def _places(accelerator: "Accelerator", adapted: "AdaptedModel", models: list[Any]) -> list[int]:
    plain = [accelerator.unwrap_model(model) for model in models]
    return [place for place in reversed(range(len(plain))) if plain[place] is adapted.model]


def shard_(
    adapted: "AdaptedModel",
    accelerator: "Accelerator | None" = None,
    *,
    blocks: Sequence[str] | None = None,
) -> None:
    """Shard the frozen base over all processes with FSDP2, block by block.

    Factors, hypernetworks and modules that are trained as a whole stay on every process; a step
    averages their gradients. ``accelerator``: the loop's, or ``trainer.accelerator``, which
    is told to leave the model as it is and to do mixed precision alone; call before
    ``accelerator.prepare``, and before ``trainer.train()``. ``blocks``: names of the modules'
    classes that are gathered each by itself; by default those that the model names itself.
    A process that is alone shards nothing.

    Raises:
        UserError: before anything is changed: the model names no blocks, or has none of a name; the
            accelerator has an FSDP plugin or compiles the model, or was not given; the base is in
            shards already; the processes of the job have not met.
    """
    model, stack = adapted.model, adapted.method.stack
    _check_sharding(adapted, accelerator)
    units = _blocks(model, blocks)
    if world_size() == 1:
        nn.Module.to(model, stack.values.device)
        return
    whole = [p for m in adapted.method.modules_to_save.values() for p in m.parameters()]
    mesh = init_device_mesh(stack.values.device.type, (world_size(),), mesh_dim_names=("shard",))
    shard_base_(model, units, [*stack.leaf_parameters(), *whole], mesh)
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
    _refuse_plugin(accelerator)
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise UserError(
            "accelerate would compile the sharded model as one; leave torch_compile or the dynamo "
            "backend out, and compile its blocks: block.compile()."
        )


def _refuse_plugin(accelerator: "Accelerator") -> None:
    if accelerator.distributed_type == DistributedType.FSDP:
        raise UserError(FSDP_REFUSED.format("accelerate", "accelerator"))


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
