"""An entry point trains its method: with the packaged files as they are, and no other method's."""

import runpy
import warnings
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from hyper_tune.entry import RECIPES
from hyper_tune.errors import UserError
from hyper_tune.method import METHODS, OWN_SETTINGS
from hyper_tune.packaged import packaged_configs, packaged_recipes
from hyper_tune.torchtune import cli
from hyper_tune.torchtune.settings import RecipeSettings

NAMED = [name for name in METHODS if name != "hyperadalora"]


def written(folder: Path, **method: object) -> list[str]:
    """The arguments for a file of one's own: a packaged one with another method section."""
    config = OmegaConf.load(packaged_configs()["llama3_2_1b"])
    config.method = method
    path = folder / "mine.yaml"
    path.write_text(OmegaConf.to_yaml(config))
    return ["--config", str(path)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_file_hands_its_method_to_the_command(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []

    def main(method: str | None = None) -> None:
        seen.append(method)

    monkeypatch.setattr(cli, "main", main)
    runpy.run_path(str(packaged_recipes()[recipe]), run_name="__main__")
    # The paper's runs what the configuration names.
    assert seen == [None if recipe == "hyper-tune/hyperadalora_full" else RECIPES[recipe]]
    assert packaged_recipes().keys() == RECIPES.keys()


@pytest.mark.filterwarnings("ignore:optimizer.lr is")
@pytest.mark.parametrize("name", METHODS)
def test_a_packaged_configuration_serves_every_method(name: str) -> None:
    file = OmegaConf.load(packaged_configs()["llama3_1_8b"]).method
    settings = RecipeSettings.from_config(cli.configuration(["--config", "llama3_1_8b"], name))
    assert settings.method.name == name
    assert settings.method.init_rank == file.init_rank
    if METHODS[name].generated:
        assert settings.method.hypernetwork is not None
        assert settings.method.hypernetwork.state == file.hypernetwork.state
    if METHODS[name].prunes:
        assert settings.method.budget == file.budget
        assert settings.method.orthogonality == file.orthogonality


@pytest.mark.parametrize("name", METHODS)
def test_a_file_without_a_name_takes_the_entry_points(tmp_path: Path, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = cli.configuration(written(tmp_path, init_rank=4), name)
    assert config.method.name == name
    assert config.method.init_rank == 4


@pytest.mark.parametrize("name", NAMED)
def test_another_methods_name_is_refused(tmp_path: Path, name: str) -> None:
    other = "adalora" if name != "adalora" else "lora"
    message = (
        f"method.name is {other!r}, but hyper-tune/{name}_full trains {name}; run "
        f"hyper-tune/{other}_full, or leave method.name out."
    )
    for arguments in (
        written(tmp_path, name=other),
        ["--config", "llama3_2_1b", f"method.name={other}"],
    ):
        with pytest.raises(UserError) as error:
            cli.configuration(arguments, name)
        assert str(error.value) == message
    with pytest.raises(UserError, match=r"'loora', but hyper-tune/.*; choose one of hyper-tune/lo"):
        cli.configuration(["--config", "llama3_2_1b", "method.name=loora"], name)


@pytest.mark.filterwarnings("ignore:optimizer.lr is")
@pytest.mark.parametrize("name", METHODS)
def test_what_is_asked_for_and_the_method_has_not_is_refused(tmp_path: Path, name: str) -> None:
    values = {
        "hypernetwork": {"preset": "mlp-small"},
        "pruning": {"interval": 3},
        "budget": 2,
        "orthogonality": 0.5,
        "magnitude": {"form": "rows"},
        "sampling": {"lowest": 2},
    }
    assert values.keys() == OWN_SETTINGS
    for key, value in values.items():
        mine = written(tmp_path, name=name, init_rank=4, **{key: value})
        for arguments in (mine, ["--config", "llama3_2_1b", f"method.{key}={value}"]):
            config = cli.configuration(arguments, name)
            if key in METHODS[name].settings:
                RecipeSettings.from_config(config)
                continue
            with pytest.raises(UserError) as error:
                RecipeSettings.from_config(config)
            assert str(error.value) == (
                f"method.name {name!r} has no method.{key}; leave them out (on the command line of "
                f"a recipe: '~method.{key}'), or choose a method that has them."
            )


def test_a_learning_rate_that_was_made_for_hypernetworks_is_named() -> None:
    with pytest.warns(UserWarning, match=r"optimizer.lr is 1e-05, .* hyperadalora, .* dora trains"):
        cli.configuration(["--config", "llama3_1_8b"], "dora")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cli.configuration(["--config", "llama3_1_8b", "optimizer.lr=3e-4"], "dora")
        cli.configuration(["--config", "llama3_1_8b"], "hyperdora")
        cli.configuration(["--config", "llama3_1_8b"])
