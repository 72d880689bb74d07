"""What a resumed run must have in common with the first: each setting that changes a step."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from hyper_tune import UserError
from hyper_tune.torchtune import identity
from hyper_tune.torchtune.identity import refuse_other_run, run_identity
from hyper_tune.torchtune.samples import TrainingData
from hyper_tune.torchtune.settings import RecipeSettings

CHANGES = {
    "method.alpha": 3.0,
    "model.num_layers": 3,
    "validation_fraction": 0.25,
    "seed": 1,
    "shuffle": False,
    "batch_size": 3,
    "gradient_accumulation_steps": 3,
    "optimizer.lr": 0.5,
    "optimizer.weight_decay": 0.1,
    "lr_scheduler.num_warmup_steps": 1,
    "clip_grad_norm": 1.0,
    "dtype": "bf16",
    "quantize_base": True,
}
# By digests of what they name, by the total of steps, or by the content of the data.
BY_CONTENT = {"checkpointer", "tokenizer", "dataset", "epochs", "max_steps"}
# These change no sum, or only the order of one: see the guide to checkpoints.
MAY_CHANGE = {
    *("output_dir", "base_model", "dataset_val", "exact_match", "model_dir", "data_dir"),
    *("compile", "enable_activation_checkpointing", "enable_activation_offloading", "device"),
    *("data_parallel_shard_dim", "data_parallel_replicate_dim", "fsdp_cpu_offload"),
    *("split_generation", "save_every_n_steps", "keep_checkpoints", "validate_every_n_steps"),
    *("metric_logger", "log_every_n_steps", "diagnose_every_n_steps", "max_skipped_steps"),
    *("resume_from_checkpoint", "collective_timeout_seconds", "debug_rank_agreement"),
}


def identity_of(config: Path, **changes: Any) -> dict[str, Any]:
    """The identity of a configuration with some keys changed, on the same data."""
    loaded = OmegaConf.load(config)
    for key, value in changes.items():
        OmegaConf.update(loaded, key, value, force_add=True)
    data: Any = TrainingData(order=[], size=22, held_out=None, content="digest")
    return run_identity(RecipeSettings.from_config(loaded), data, total_steps=12)


@pytest.mark.parametrize("key", CHANGES)
def test_each_setting_that_changes_a_step_is_refused_by_name(
    make_config: Callable[..., Path], key: str
) -> None:
    config = make_config()
    before, now = identity_of(config), identity_of(config, **{key: CHANGES[key]})
    refuse_other_run(before, identity_of(config))
    with pytest.raises(UserError) as refused:
        refuse_other_run(before, now)
    said = str(refused.value)
    assert said.startswith(f"the checkpoint is of another run: {key} was ")
    assert said.count(" and is now ") == 1
    assert f"{CHANGES[key]!r}; restore the settings" in said


def test_another_number_of_processes_is_refused_by_name(
    make_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    before = identity_of(config)
    monkeypatch.setattr(identity, "world_size", lambda: 2)
    message = r"processes \(--nproc_per_node\) was 1 and is now 2; restore"
    with pytest.raises(UserError, match=message):
        refuse_other_run(before, identity_of(config))


def test_each_key_of_a_configuration_is_compared_or_may_change() -> None:
    compared = {key.partition(".")[0] for key in CHANGES}
    assert not compared & (BY_CONTENT | MAY_CHANGE)
    assert compared | BY_CONTENT | MAY_CHANGE == {field.name for field in fields(RecipeSettings)}
