"""A run that was trained, opened again from its folder."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torchtune.modules import TransformerDecoder

from hyper_tune.assembly import Assembly, assemble
from hyper_tune.checkpoint import read_newest, read_step
from hyper_tune.errors import UserError
from hyper_tune.packaged import read_config
from hyper_tune.parallel import usable_device
from hyper_tune.torchtune.base_model import build_on_meta, check_files, load_
from hyper_tune.torchtune.settings import RecipeSettings


@dataclass(frozen=True)
class TrainedRun:
    """A method as a checkpoint has it, on its base, which is still on the meta device."""

    settings: RecipeSettings
    model: TransformerDecoder
    method: Assembly
    step: int
    device: torch.device

    def load_base_(self) -> None:
        """Load the base's weights and the factors that the next step would use.

        Raises:
            UserError: the weights or the tokenizer are not there, or of another model.
        """
        check_files(self.settings)
        load_(self.model, self.settings, self.method.layers, self.device)
        self.method.write_factors_()
        self.model.eval()


def open_trained(
    folder: Path,
    *,
    step: int | None = None,
    base: Path | None = None,
    device: str | None = "cpu",
) -> TrainedRun:
    """Rebuild a run's method from its newest intact checkpoint, or that of ``step``.

    ``base``: where the base model is now, if it is no longer where the run found it. ``device``:
    None takes the run's.

    Raises:
        UserError: not a run folder, no such checkpoint, or settings that cannot be used.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run folder: it has no config.yaml.")
    settings = RecipeSettings.from_config(read_config(folder / "config.yaml"))
    settings = replace(settings, output_dir=folder)
    if base is not None:
        if not base.is_dir():
            raise UserError(f"--base {base} is not a folder; give that of the base model.")
        settings = _moved(settings, base)
    place = usable_device(device or settings.device)
    if step is None:
        step, state, _ = read_newest(folder / "checkpoints")
    else:
        state = read_step(folder / "checkpoints", step)
    model = build_on_meta(settings)
    with warnings.catch_warnings():
        # What there is to say about the schedule was said when the run started.
        warnings.simplefilter("ignore", UserWarning)
        method = assemble(
            model, settings.method, total_steps=state["run"]["total_steps"], device=place
        )
    method.load_state_dict(state["method"])
    return TrainedRun(settings, model, method, step, place)


def _moved(settings: RecipeSettings, base: Path) -> RecipeSettings:
    """Return the settings with every path under the old base folder put under ``base``."""
    old = Path(settings.checkpointer["checkpoint_dir"])

    def moved(component: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: str(base / Path(value).relative_to(old))
            if isinstance(value, str) and Path(value).is_relative_to(old)
            else value
            for key, value in component.items()
        }

    return replace(
        settings,
        checkpointer=moved(settings.checkpointer),
        tokenizer=moved(settings.tokenizer),
    )
