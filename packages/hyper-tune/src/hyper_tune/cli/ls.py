"""`hyper-tune ls`: what the package ships."""

from typing import Any

import typer

from hyper_tune.cli.table import print_table
from hyper_tune.packaged import packaged_configs, packaged_data, packaged_recipes, read_config


def ls() -> None:
    """List the recipes, configurations and data sets, to run, copy or plan."""
    recipes = []
    for recipe in packaged_recipes():
        for number, (name, path) in enumerate(packaged_configs().items()):
            config: Any = read_config(path)
            recipes.append(("" if number else recipe, name, str(config.base_model)))
    print_table(("recipe", "configuration", "base model"), recipes)
    typer.echo()
    print_table(
        ("data set", "source"), [(f"data={name}", _source(name)) for name in packaged_data()]
    )


def _source(name: str) -> str:
    config: Any = read_config(packaged_data()[name])
    return str(config.dataset.get("source", "a file or folder of your own"))
