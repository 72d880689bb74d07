"""What two starts of a run must share, so that the second goes on as if the first had not ended."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from hyper_tune.errors import UserError
from hyper_tune.parallel import world_size
from hyper_tune.torchtune.base_model import base_digest
from hyper_tune.torchtune.samples import TrainingData
from hyper_tune.torchtune.settings import RecipeSettings

_WORDS = {
    "base": "the digest of the base's weights and tokenizer",
    "dataset": "the digest of the dataset's tokens",
    "total_steps": "total_steps (from epochs, max_steps, the samples and the batch)",
    "samples": "samples (of dataset)",
    "processes": "processes (--nproc_per_node)",
}


def run_identity(settings: RecipeSettings, data: TrainingData, total_steps: int) -> dict[str, Any]:
    """Return every setting by which a step differs, and digests of base and data, as plain values.

    The data of a file are digested as tokens, wherever the file is; of other data sets the
    settings and the number of samples are all that is compared: see `TrainingData`.
    """
    identity = {
        "method": asdict(settings.method),
        "model": settings.model,
        "base": base_digest(settings),
        "dataset": data.content,
        "validation_fraction": settings.validation_fraction,
        "samples": data.size,
        "seed": settings.seed,
        "shuffle": settings.shuffle,
        "batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation_steps,
        "processes": world_size(),
        "total_steps": total_steps,
        "optimizer": settings.optimizer,
        "lr_scheduler": settings.lr_scheduler,
        "clip_grad_norm": settings.clip_grad_norm,
        "dtype": settings.dtype,
        "quantize_base": settings.quantize_base,
    }
    # As a checkpoint gives it back, which turns tuples into lists.
    plain: dict[str, Any] = json.loads(json.dumps(identity))
    return plain


def refuse_other_run(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Compare a checkpoint's identity with this run's.

    Raises:
        UserError: they differ; each setting that does is named with both values.
    """
    before, now = _leaves(saved), _leaves(here)
    different = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if different:
        listed = ", ".join(
            f"{_WORDS.get(key, key)} was {before.get(key)!r} and is now {now.get(key)!r}"
            for key in different
        )
        raise UserError(
            f"the checkpoint is of another run: {listed}; restore the settings, or start afresh in "
            "another output_dir."
        )


def _leaves(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values that are no sections, by their dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in section.items():
        if isinstance(value, Mapping):
            leaves |= _leaves(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
