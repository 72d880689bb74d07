"""A method under accelerate: its state in accelerate's checkpoints, its base in shards."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyper_tune.parallel import shard_base_

if TYPE_CHECKING:
    from accelerate import Accelerator

    from hyper_tune.hf.adapted import AdaptedModel


def register_(accelerator: "Accelerator", adapted: "AdaptedModel") -> None:
    """Let ``accelerator.save_state`` and ``load_state`` keep the method's state.

    In place of the model's weights, which are the frozen base's, they write and read what
    `AdaptedModel.save` does; accelerate itself keeps the optimizer, the scheduler and the random
    numbers. Call it before or after ``accelerator.prepare``.
    """

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


def shard_(adapted: "AdaptedModel") -> None:
    """Shard the frozen base over all processes with FSDP2, by the blocks that the model names.

    Factors, hypernetworks and modules that are trained as a whole stay on every process; a step
    averages their gradients. Call it before ``accelerator.prepare`` or Trainer.
    """
    names = set(getattr(adapted.model, "_no_split_modules", None) or ())
    blocks = [module for module in adapted.model.modules() if type(module).__name__ in names]
    whole = [p for m in adapted.method.modules_to_save.values() for p in m.parameters()]
    shard_base_(adapted.model, blocks, [*adapted.method.stack.leaf_parameters(), *whole])
