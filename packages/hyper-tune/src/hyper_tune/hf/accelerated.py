"""A method under accelerate: its state in accelerate's checkpoints."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hyper_tune.hf.sharding import refuse_plugin

if TYPE_CHECKING:
    from accelerate import Accelerator

    from hyper_tune.hf.adapted import AdaptedModel


def register_(accelerator: "Accelerator", adapted: "AdaptedModel") -> None:
    """Let ``accelerator.save_state`` and ``load_state`` keep the method's state.

    In place of the model's weights, which are the frozen base's, they write and read what
    `AdaptedModel.save` does; accelerate itself keeps the optimizer, the scheduler and the random
    numbers. Call it before or after ``accelerator.prepare``.

    Raises:
        UserError: the accelerator has an FSDP plugin; use `shard_`.
    """
    refuse_plugin(accelerator)

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
