"""The recipe saves only what can be gone on from, and restores only what it saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from hyper_tune import UserError
from hyper_tune.checkpoint import read_newest, write_checkpoint
from hyper_tune.torchtune import recipe
from hyper_tune.torchtune.recipe import FineTuning
from hyper_tune.torchtune.settings import RecipeSettings
from hyper_tune.torchtune.trained import open_trained


def test_parameters_that_are_not_finite_are_not_saved(
    tmp_path: Path,
    make_config: Callable[..., Path],
    run: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state_of = recipe.state_of

    def spoilt(training: Any) -> Any:
        if training.step == 4:
            with torch.no_grad():
                training.method.parameters()[2].view(-1)[0] = float("inf")
        return state_of(training)

    monkeypatch.setattr(recipe, "state_of", spoilt)
    config = make_config(max_steps=6, save_every_n_steps=2, keep_checkpoints=1)
    with pytest.raises(UserError) as caught:
        run(config)
    text = str(caught.value)
    assert text.startswith("after step 4, ")
    assert text.endswith(
        " is not finite (1 tensors are not), so that it is not saved; older checkpoints stay. "
        "Lower optimizer.lr and resume."
    )
    assert read_newest(tmp_path / "run" / "checkpoints")[::2] == (2, [])


@pytest.mark.parametrize("key", ["run", "method", "scheduler", "before", None])
def test_a_checkpoint_of_another_layout_is_refused(
    tmp_path: Path, make_config: Callable[..., Path], run: Callable[..., None], key: str | None
) -> None:
    config = make_config(max_steps=6)
    run(config)
    folder = tmp_path / "run" / "checkpoints"
    _, state, _ = read_newest(folder)
    if key is None:
        state = ["step", 7]
    else:
        del state[key]
    write_checkpoint(folder, 7, state)
    with pytest.raises(UserError) as caught:
        run(config, "resume_from_checkpoint=True")
    assert str(caught.value).startswith(
        f"the checkpoint of step 7 in {folder} is intact, but holds no state of this recipe ("
    )
    assert str(caught.value).endswith("); remove it, or set another output_dir.")


def test_a_last_step_that_is_skipped_is_saved_all_the_same(
    tmp_path: Path, make_config: Callable[..., Path]
) -> None:
    config = OmegaConf.load(make_config(max_steps=5))
    with FineTuning(RecipeSettings.from_config(config)) as training:

        def spoil(_: torch.nn.Module, __: Any, logits: list[torch.Tensor]) -> list[torch.Tensor]:
            return [part * float("nan") for part in logits] if training.step == 4 else logits

        training.model.register_forward_hook(spoil)
        training.train()
        trained = [value.clone() for value in training.method.parameters()]
    assert read_newest(tmp_path / "run" / "checkpoints")[0] == 5
    OmegaConf.save(config, tmp_path / "run" / "config.yaml")
    opened = open_trained(tmp_path / "run").method
    for value, saved in zip(trained, opened.parameters(), strict=True):
        assert torch.equal(value, saved)
